# SPDX-License-Identifier: Apache-2.0
"""Exact lookup of token sequences, and their storage, by a marisa-trie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import marisa_trie
import numpy as np
from safetensors.numpy import load_file, save_file


MAX_TOKEN = (1 << 24) - 1  # token ids are stored in 3 bytes
_FORMAT = 2
_TRIE_FILE, _ITEMS_FILE, _HEADER_FILE = "trie.marisa", "trie.safetensors", "trie.json"


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

    def save(self, folder: Path, item_keys: np.ndarray, header: dict[str, Any]) -> None:
        """
        Write the index, the key of each item, and a header with their checksums. Each file is written whole and then
        renamed, the header last: where a crash comes between, the checksums do not fit.
        """
        folder.mkdir(parents=True, exist_ok=True)
        temporary = {name: folder / f".{name}.tmp" for name in (_TRIE_FILE, _ITEMS_FILE, _HEADER_FILE)}
        self.trie.save(str(temporary[_TRIE_FILE]))
        save_file({"item_keys": item_keys.astype(np.int32)}, temporary[_ITEMS_FILE])
        sums = {name: file_checksum(temporary[name]) for name in (_TRIE_FILE, _ITEMS_FILE)}
        text = json.dumps({"format": _FORMAT, "sha256": sums, **header})
        temporary[_HEADER_FILE].write_text(text, encoding="utf-8")
        for name, path in temporary.items():
            path.replace(folder / name)

    @staticmethod
    def load(folder: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """What `save` wrote: each item's tokens, all in a row, their lengths, and the header."""
        header = json.loads((folder / _HEADER_FILE).read_text(encoding="utf-8"))
        if header["format"] != _FORMAT:
            raise ValueError(f"its format is {header['format']}, this version reads {_FORMAT}")
        # Before marisa-trie and safetensors read a byte: a damaged file could make them crash or ask for any memory
        for name in (_TRIE_FILE, _ITEMS_FILE):
            if file_checksum(folder / name) != header["sha256"][name]:
                raise ValueError(f"{name} is damaged, or does not belong to {_HEADER_FILE}")
        trie = marisa_trie.BinaryTrie().load(str(folder / _TRIE_FILE))
        item_keys = load_file(folder / _ITEMS_FILE)["item_keys"]
        sequences = [trie.restore_key(key) for key in item_keys.tolist()]
        lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences)) // 3
        return _decode(b"".join(sequences)), lengths, header


def file_checksum(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _encode(tokens: np.ndarray) -> np.ndarray:
    """Token ids as three big-endian bytes each, uint8 of shape `(3 * len(tokens),)`: byte order is token order."""
    return tokens.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].reshape(-1)


def _decode(encoded: bytes) -> np.ndarray:
    """Inverse of `_encode`, int64."""
    padded = np.zeros((len(encoded) // 3, 4), dtype=np.uint8)
    padded[:, 1:] = np.frombuffer(encoded, dtype=np.uint8).reshape(-1, 3)
    return padded.view(">u4").astype(np.int64).reshape(-1)
