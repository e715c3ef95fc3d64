# SPDX-License-Identifier: Apache-2.0
"""Exact lookup of token sequences by a marisa-trie."""

from __future__ import annotations

from collections.abc import Iterable

import marisa_trie
import numpy as np


MAX_TOKEN = (1 << 24) - 1  # token ids are written in 3 bytes
FIRST_VECTOR_TOKEN = MAX_TOKEN + 1  # stands in prompts for the vector of the first item; never in a trie


class SequenceIndex:
    """
    Token sequences and a value for each.

    Args:
        parts (`Iterable` of `tuple[numpy.ndarray, numpy.ndarray]`):
            Tokens of shape `(num_sequences, longest)`, padded on the right, and lengths `(num_sequences,)`.
        values (`numpy.ndarray` of shape `(total,)`):
            Value of each sequence of all parts, not negative, and the same where a sequence is repeated.
    """

    def __init__(self, parts: Iterable[tuple[np.ndarray, np.ndarray]], values: np.ndarray):
        encoded = []
        for tokens, lengths in parts:
            rows = _encode(tokens.reshape(-1)).reshape(len(tokens), -1)
            encoded += [row[: 3 * length].tobytes() for row, length in zip(rows, lengths)]
        self.trie = marisa_trie.BinaryTrie(encoded)  # it numbers the distinct sequences
        self.values = np.empty(len(self.trie), dtype=np.int64)
        self.values[np.array([self.trie[sequence] for sequence in encoded], dtype=np.int64)] = values

    def find(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """
        Values of sequences.

        Args:
            tokens (`numpy.ndarray` of shape `(total,)`, int64):
                All tokens in a row.
            lengths (`numpy.ndarray` of shape `(num_sequences,)`, int64):
                Length of each sequence.

        Returns:
            `numpy.ndarray` of shape `(num_sequences,)`, int64: `-1` where a sequence is not known.
        """
        encoded = _encode(tokens).tobytes()
        ends = 3 * np.cumsum(lengths)
        places = zip((ends - 3 * lengths).tolist(), ends.tolist())
        numbers = np.array([self.trie.get(encoded[start:end], -1) for start, end in places], dtype=np.int64)
        # Their lowest three bytes are those of other tokens
        impossible = (tokens < 0) | (tokens > MAX_TOKEN)
        numbers[np.repeat(np.arange(len(lengths)), lengths)[impossible]] = -1
        return np.where(numbers >= 0, self.values[numbers], -1)


def _encode(tokens: np.ndarray) -> np.ndarray:
    """Token ids as three big-endian bytes each, uint8 of shape `(3 * len(tokens),)`: byte order is token order."""
    return tokens.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].reshape(-1)
