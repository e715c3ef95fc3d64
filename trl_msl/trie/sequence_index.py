# SPDX-License-Identifier: Apache-2.0
"""Exact lookup of token sequences by a marisa-trie."""

from __future__ import annotations

from collections.abc import Iterable

import marisa_trie
import numpy as np


MAX_TOKEN = (1 << 24) - 1  # token ids are written in 3 bytes


class SequenceIndex:
    """
    Distinct token sequences, numbered by a marisa-trie. A sequence's number is its *key*.

    Args:
        trie (`marisa_trie.BinaryTrie`):
            The sequences, three big-endian bytes a token.
    """

    def __init__(self, trie: marisa_trie.BinaryTrie):
        self.trie = trie

    def __len__(self) -> int:
        return len(self.trie)

    @classmethod
    def build(cls, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[SequenceIndex, np.ndarray]:
        """
        Index sequences.

        Args:
            parts (`Iterable` of `tuple[numpy.ndarray, numpy.ndarray]`):
                Tokens of shape `(num_sequences, longest)`, padded on the right, and lengths `(num_sequences,)`.

        Returns:
            The index, and the key of each sequence, int64.
        """
        encoded = []
        for tokens, lengths in parts:
            rows = _encode(tokens.reshape(-1)).reshape(len(tokens), -1)
            encoded += [row[: 3 * length].tobytes() for row, length in zip(rows, lengths)]
        trie = marisa_trie.BinaryTrie(encoded)
        return cls(trie), np.array([trie[sequence] for sequence in encoded], dtype=np.int64)

    def find(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """
        Keys of sequences.

        Args:
            tokens (`numpy.ndarray` of shape `(total,)`, int64):
                All tokens in a row.
            lengths (`numpy.ndarray` of shape `(num_sequences,)`, int64):
                Length of each sequence.

        Returns:
            `numpy.ndarray` of shape `(num_sequences,)`, int64: `-1` where a sequence is not there.
        """
        encoded = _encode(tokens).tobytes()
        ends = 3 * np.cumsum(lengths)
        places = zip((ends - 3 * lengths).tolist(), ends.tolist())
        keys = np.array([self.trie.get(encoded[start:end], -1) for start, end in places], dtype=np.int64)
        # Tokens that can't occur were encoded as others
        impossible = (tokens < 0) | (tokens > MAX_TOKEN)
        keys[np.repeat(np.arange(len(lengths)), lengths)[impossible]] = -1
        return keys


def _encode(tokens: np.ndarray) -> np.ndarray:
    """Token ids as three big-endian bytes each, uint8 of shape `(3 * len(tokens),)`: byte order is token order."""
    return tokens.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].reshape(-1)
