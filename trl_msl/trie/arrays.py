# SPDX-License-Identifier: Apache-2.0
"""The arrays of a trie: built from sequences, packed for storage, and checked when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .sequence_index import MAX_TOKEN


TRIE_FILE = "trie.safetensors"
_FORMAT = 3
_HAS_CHILD, _IS_FIRST_SIBLING = 1 << 24, 1 << 25  # beside the 24 bits of a token


def flatten_sequences(sequences: Sequence[Sequence[int]] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All tokens in a row, int64, and the length of each sequence, int64."""
    if isinstance(sequences, np.ndarray) and sequences.ndim == 2:
        lengths = np.full(len(sequences), sequences.shape[1], dtype=np.int64)
        tokens = sequences.reshape(-1).astype(np.int64)
    else:
        lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
        tokens = np.fromiter(chain.from_iterable(sequences), dtype=np.int64, count=int(lengths.sum()))
    return tokens, lengths


def build_arrays(
    sequences: Sequence[Sequence[int]] | np.ndarray, vocab_size: int | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """
    `edges`, `item_nodes` and `vocab_size` of the trie of some sequences: see [`ItemTrie.from_sequences`].

    Raises:
        `ValueError`: if there is no sequence, a sequence is empty, or a token id lies outside the vocabulary.
    """
    tokens, lengths = flatten_sequences(sequences)
    if len(lengths) == 0:
        raise ValueError("`sequences` is empty: a trie needs at least one item.")
    if lengths.min() == 0:
        raise ValueError(
            f"`sequences` holds {int((lengths == 0).sum())} empty sequence(s), the first at index "
            f"{int(lengths.argmin())}: append the end token to every item."
        )
    largest = int(tokens.max())
    vocab_size = largest + 1 if vocab_size is None else int(vocab_size)
    if int(tokens.min()) < 0 or largest >= vocab_size or vocab_size - 1 > MAX_TOKEN:
        raise ValueError(
            f"`sequences` hold token ids from {int(tokens.min())} to {largest}, but must stay within "
            f"0 and `vocab_size` - 1 = {vocab_size - 1} (and 2**24 - 1). Was the right tokenizer used?"
        )
    return *_build_edges(tokens, lengths, vocab_size), vocab_size


def _build_edges(tokens: np.ndarray, lengths: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Number the nodes breadth-first, one level at a time.

    Items stay sorted by their node from level to level, so that only those that still share a node with another item
    need sorting by their next token: after a few tokens most items are alone in their branch.
    """
    starts = np.cumsum(lengths) - lengths
    item_nodes = np.zeros(len(lengths), dtype=np.int32)
    items = np.arange(len(lengths))  # those that have not ended yet, sorted by node
    nodes = np.zeros(len(lengths), dtype=np.int64)  # the node of each of them
    levels = [np.array([-1], dtype=np.int64)]
    num_nodes = 1
    for depth in range(int(lengths.max())):
        keys = nodes * vocab_size + tokens[starts[items] + depth]
        shared = np.zeros(len(nodes), dtype=bool)
        shared[1:] = nodes[1:] == nodes[:-1]
        shared[:-1] |= shared[1:]
        crowd = np.flatnonzero(shared)  # crowds are contiguous, so sorting all of them at once keeps them in place
        order = crowd[np.argsort(keys[crowd], kind="stable")]
        keys[crowd], items[crowd] = keys[order], items[order]
        is_new = np.ones(len(keys), dtype=bool)
        is_new[1:] = keys[1:] != keys[:-1]
        nodes = num_nodes - 1 + np.cumsum(is_new)
        levels.append(keys[is_new])
        num_nodes += len(levels[-1])
        item_nodes[items] = nodes
        goes_on = lengths[items] > depth + 1
        items, nodes = items[goes_on], nodes[goes_on]
    return np.concatenate(levels), item_nodes


# ---------------------------------------------------------------------- storage


def write_arrays(folder: Path, edges: np.ndarray, item_nodes: np.ndarray, vocab_size: int) -> None:
    """
    Write a trie to a safetensors file, with a checksum of its content: four bytes for each node and each item.

    As nodes are in breadth-first order, a node's token and two bits, whether it has a child and whether it is its
    parent's first, are enough to restore it. A marisa-trie would be half as large, but its reader trusts what it
    reads: of 500 files with a few bits flipped, 20 crashed the interpreter and 3 hung it.
    """
    parents, tokens = edges // vocab_size, edges % vocab_size
    tokens[0] = 0
    nodes = tokens.astype(np.uint32)
    nodes[parents[1:]] |= _HAS_CHILD
    nodes[1:][parents[1:] != parents[:-1]] |= _IS_FIRST_SIBLING
    arrays = {"nodes": nodes, "item_nodes": item_nodes.astype(np.int32)}
    header = {"format": str(_FORMAT), "vocab_size": str(vocab_size), "sha256": _checksum(arrays, vocab_size)}
    with replacing(folder / TRIE_FILE) as temporary:
        save_file(arrays, temporary, metadata=header)


def read_arrays(folder: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """
    `edges`, `item_nodes` and `vocab_size` of a trie that `write_arrays` wrote. Memory stays in proportion to the file,
    and what is returned is a trie, whoever wrote the file.

    Raises:
        `OSError`, `KeyError`, `TypeError`, `ValueError` or `SafetensorError`: if the file does not hold a trie.
    """
    check_regular(folder / TRIE_FILE)
    with safe_open(folder / TRIE_FILE, framework="numpy") as file:
        header = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in ("nodes", "item_nodes")}
    if header.get("format") != str(_FORMAT):
        raise ValueError(f"its format is {header.get('format')}, this version reads {_FORMAT}")
    vocab_size = int(header["vocab_size"])
    if header.get("sha256") != _checksum(arrays, vocab_size):
        raise ValueError("its checksum differs")
    edges = _unpack(arrays["nodes"], vocab_size)
    _check_items(arrays["nodes"], arrays["item_nodes"])
    return edges, arrays["item_nodes"], vocab_size


def read_checksum(folder: Path) -> str | None:
    """The checksum in a trie's file, of its content; `read_arrays` compares the two."""
    check_regular(folder / TRIE_FILE)
    try:
        with safe_open(folder / TRIE_FILE, framework="numpy") as file:
            return (file.metadata() or {}).get("sha256")
    except SafetensorError as error:
        raise ValueError(f"{TRIE_FILE} is damaged: {error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which replaces it once written and is removed if writing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_regular(path: Path) -> None:
    """Raise a `ValueError` unless `path` is a file or a link to one: reading a pipe or a device may never end."""
    if not path.is_file():
        raise ValueError(f"{path.name} is {'not a regular file' if path.exists() else 'missing'}")


def _unpack(nodes: np.ndarray, vocab_size: int) -> np.ndarray:
    """Edges of packed nodes, which may come from anyone."""
    if nodes.dtype != np.uint32 or nodes.ndim != 1 or not 2 <= len(nodes) < 2**31:
        raise ValueError(f"`nodes` is {nodes.dtype}{list(nodes.shape)}")
    if not 0 < vocab_size <= MAX_TOKEN + 1:
        raise ValueError(f"`vocab_size` is {vocab_size}")
    tokens = (nodes & MAX_TOKEN).astype(np.int64)[1:]
    inner_nodes = np.flatnonzero(nodes & _HAS_CHILD)
    family = np.cumsum(nodes[1:] & _IS_FIRST_SIBLING > 0) - 1
    if family[0] != 0 or family[-1] != len(inner_nodes) - 1 or tokens.max() >= vocab_size:
        raise ValueError("`nodes` are not a trie")
    parents = inner_nodes[family]
    edges = np.concatenate([[-1], parents * vocab_size + tokens])
    # Siblings ascend, and a parent comes before its children
    if (edges[1:] <= edges[:-1]).any() or (parents >= np.arange(1, len(nodes))).any():
        raise ValueError("`nodes` are not a trie")
    return edges


def _check_items(nodes: np.ndarray, item_nodes: np.ndarray) -> None:
    if item_nodes.dtype != np.int32 or item_nodes.ndim != 1 or len(item_nodes) == 0:
        raise ValueError(f"`item_nodes` is {item_nodes.dtype}{list(item_nodes.shape)}")
    if item_nodes.min() < 1 or item_nodes.max() >= len(nodes):
        raise ValueError("items end outside the trie")
    is_end = np.zeros(len(nodes), dtype=bool)
    is_end[item_nodes] = True
    if not (is_end | (nodes & _HAS_CHILD > 0)).all():
        raise ValueError("some leaf is not the end of any item")


def _checksum(arrays: dict[str, np.ndarray], vocab_size: int) -> str:
    digest = hashlib.sha256(json.dumps([_FORMAT, vocab_size]).encode())
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
