# SPDX-License-Identifier: Apache-2.0
"""The trie of a catalogue's token sequences, as two sorted arrays. It knows only integers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from .arrays import TRIE_FILE, build_arrays, flatten_sequences, read_arrays, write_arrays
from .ragged import ragged_arange
from .sequence_index import SequenceIndex


class ItemTrie:
    """
    Frozen trie over the token sequences of a catalogue's items.

    Nodes are numbered level by level from the root `0`, siblings by token. So the children of `p` are the contiguous
    nodes `first_child[p] : first_child[p + 1]`, and a node id alone describes a training position: its parent gives
    the valid tokens, its own token the target. Positions off the trie are written `-1` (or any negative value).

    An item is a leaf if the sequences end with an end token, as those of [`ItemCatalog`] do. Items with the same
    sequence share a node. A sequence that is a strict prefix of another ends at an inner node.

    Build one with [`ItemTrie.from_sequences`] or [`ItemCatalog.build_trie`].

    Args:
        first_child (`torch.Tensor` of shape `(num_nodes + 1,)`, int32):
            First child of each node; equal to the next entry where a node has no child.
        edges (`torch.Tensor` of shape `(num_nodes,)`, int64):
            `parent * vocab_size + token` of the edge into each node, ascending; `-1` for the root. Being sorted, it
            finds the child of any (node, token) pair in one binary search.
        item_nodes (`torch.Tensor` of shape `(num_items,)`, int32):
            Node at which each item ends.
        vocab_size (`int`):
            Number of token ids that can occur, at most 2**24.
    """

    def __init__(self, first_child: Tensor, edges: Tensor, item_nodes: Tensor, vocab_size: int):
        self.first_child = first_child
        self.edges = edges
        self.item_nodes = item_nodes
        self.vocab_size = vocab_size
        self._copies: dict[torch.device, ItemTrie] = {self.device: self}

    def __reduce__(self):
        # Without what is derived, so that `datasets` fingerprints a map over rows by the trie alone
        return ItemTrie, (self.first_child, self.edges, self.item_nodes, self.vocab_size)

    # ------------------------------------------------------------------ building

    @classmethod
    def from_sequences(
        cls, sequences: Sequence[Sequence[int]] | np.ndarray, vocab_size: int | None = None
    ) -> ItemTrie:
        """
        Build the trie of `sequences`, one per item, without Python node objects.

        Args:
            sequences (`Sequence[Sequence[int]]` or `numpy.ndarray` of shape `(num_items, length)`):
                Token ids of each item.
            vocab_size (`int`, *optional*):
                Number of token ids that can occur. Defaults to the largest token id plus one.

        Raises:
            `ValueError`: if there is no sequence, a sequence is empty, or a token id lies outside the vocabulary.
        """
        return cls._from_arrays(*build_arrays(sequences, vocab_size))

    @classmethod
    def _from_arrays(cls, edges: np.ndarray, item_nodes: np.ndarray, vocab_size: int) -> ItemTrie:
        first_child = np.searchsorted(edges, np.arange(len(edges) + 1, dtype=np.int64) * vocab_size).astype(np.int32)
        return cls(*map(torch.from_numpy, (first_child, edges, item_nodes)), vocab_size)

    # ------------------------------------------------------------------ size and device

    @property
    def num_nodes(self) -> int:
        return len(self.edges)

    @property
    def num_items(self) -> int:
        return len(self.item_nodes)

    @property
    def device(self) -> torch.device:
        return self.edges.device

    def __repr__(self) -> str:
        return f"ItemTrie(num_items={self.num_items}, num_nodes={self.num_nodes}, vocab_size={self.vocab_size})"

    def to(self, device: torch.device | str) -> ItemTrie:
        """The same trie with its arrays on `device`. Copies are kept, so a second call costs nothing."""
        device = torch.device(device)
        if device not in self._copies:
            copy = ItemTrie(*(a.to(device) for a in (self.first_child, self.edges, self.item_nodes)), self.vocab_size)
            copy._copies = self._copies
            # "cuda" is "cuda:0"; and another thread may have been first
            self._copies[device] = self._copies.setdefault(copy.device, copy)
        return self._copies[device]

    # ------------------------------------------------------------------ nodes (int tensors of any shape)

    def tokens(self, nodes: Tensor) -> Tensor:
        """Token on the edge into each node, int64. The root has none and gives `vocab_size - 1`."""
        return self.edges[nodes] % self.vocab_size

    def parents(self, nodes: Tensor) -> Tensor:
        """Parent of each node, int64; `-1` for the root."""
        return self.edges[nodes].div(self.vocab_size, rounding_mode="floor")

    def num_children(self, nodes: Tensor) -> Tensor:
        """Number of children of each node, int32."""
        return self.first_child[nodes + 1] - self.first_child[nodes]

    def num_valid_tokens(self, nodes: Tensor) -> Tensor:
        """Number of tokens that were valid where each node's token was chosen: the node and its siblings, int32."""
        return self.num_children(self.parents(nodes))

    def is_leaf(self, nodes: Tensor) -> Tensor:
        """Whether each node is a leaf, bool; `False` for negative nodes."""
        return (nodes >= 0) & (self.num_children(nodes.clamp(min=0)) == 0)

    def children(self, node: int) -> range:
        """Children of one node."""
        return range(int(self.first_child[node]), int(self.first_child[node + 1]))

    def child(self, nodes: Tensor, tokens: Tensor) -> Tensor:
        """Child of each node by each token, int64; `-1` where there is none, or where the node is negative."""
        keys = nodes.long() * self.vocab_size + tokens.long()
        found = torch.searchsorted(self.edges, keys).clamp_(max=self.num_nodes - 1)
        known = (nodes >= 0) & (tokens >= 0) & (tokens < self.vocab_size) & (self.edges[found] == keys)
        return torch.where(known, found, -1)

    def walk(self, tokens: Tensor) -> Tensor:
        """
        Nodes passed when reading token sequences from the root.

        Args:
            tokens (`torch.Tensor` of shape `(..., length)`):
                Token ids.

        Returns:
            `torch.Tensor` of shape `(..., length)`, int64: the node after each token, `-1` once off the trie.
        """
        nodes = torch.empty(tokens.shape, dtype=torch.int64, device=tokens.device)
        node = torch.zeros(tokens.shape[:-1], dtype=torch.int64, device=tokens.device)
        for position in range(tokens.shape[-1]):
            node = self.child(node, tokens[..., position])
            nodes[..., position] = node
        return nodes

    def reached(self, tokens: Tensor) -> Tensor:
        """
        Node that each sequence has reached after all its tokens; the leaf if it has passed one, whatever follows.

        Args:
            tokens (`torch.Tensor` of shape `(num_rows, length)`):
                Token ids, from the root; padding may follow a whole item.

        Returns:
            `torch.Tensor` of shape `(num_rows,)`, int64: `-1` off the trie, the root where `length` is 0.
        """
        if tokens.shape[1] == 0:
            return torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        nodes = self.walk(tokens)
        leaf = torch.where(self.is_leaf(nodes), nodes, -1).amax(dim=1)
        return torch.where(leaf >= 0, leaf, nodes[:, -1])

    def valid_tokens(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """
        Tokens that continue some item after each node.

        Args:
            nodes (`torch.Tensor` of shape `(num_rows,)`):
                Nodes; negative ones have no valid token.

        Returns:
            `tuple` of two int64 `torch.Tensor` of shape `(total,)`: the row and the token of each pair, rows in
            order and tokens ascending within a row.
        """
        nodes = nodes.long()
        on_trie = nodes >= 0
        nodes = nodes.clamp(min=0)
        counts = torch.where(on_trie, self.num_children(nodes), 0).long()
        rows, offset = ragged_arange(counts)
        return rows, self.tokens(self.first_child[nodes][rows] + offset)

    def valid_mask(self, nodes: Tensor, vocab_size: int | None = None) -> Tensor:
        """Dense mask of the tokens valid after each node, bool of shape `(num_rows, vocab_size)`."""
        mask = torch.zeros(len(nodes), vocab_size or self.vocab_size, dtype=torch.bool, device=self.device)
        mask[self.valid_tokens(nodes)] = True
        return mask

    @cached_property
    def largest_token(self) -> int:
        """Largest token id of any item."""
        return int((self.edges[1:] % self.vocab_size).max())

    # ------------------------------------------------------------------ items

    @cached_property
    def levels(self) -> list[tuple[int, int]]:
        """First node of each level and of the next one, from the root's level on."""
        levels = [(0, 1)]
        while True:
            start, end = (int(self.first_child[node]) for node in levels[-1])
            if start == end:
                return levels
            levels.append((start, end))

    @property
    def depth(self) -> int:
        """Number of tokens of the longest item: the least `max_new_tokens` that suffices for all of them."""
        return len(self.levels) - 1

    @property
    def item_lengths(self) -> Tensor:
        """Number of tokens of each item, int64 of shape `(num_items,)`: the level of its node."""
        starts = torch.tensor([start for start, _ in self.levels], dtype=torch.int32, device=self.device)
        return torch.searchsorted(starts, self.item_nodes, right=True) - 1

    @cached_property
    def first_branching_node(self) -> int:
        """First node from the root with several children, where items begin to differ; `-1` if there is none."""
        node = 0
        while len(self.children(node)) == 1:
            node = self.children(node)[0]
        return node if len(self.children(node)) > 1 else -1

    @cached_property
    def _items_by_node(self) -> tuple[Tensor, Tensor]:
        """Item indices sorted by node (ties by index), and their nodes."""
        nodes, items = torch.sort(self.item_nodes, stable=True)
        return items, nodes

    def items(self, node: int) -> list[int]:
        """Indices of the items that end at `node`, ascending: several where texts collide, none at most nodes."""
        items, nodes = self._items_by_node
        start, end = torch.searchsorted(nodes, torch.tensor([node, node + 1], dtype=nodes.dtype, device=nodes.device))
        return items[start:end].tolist()

    def paths(self, nodes: Tensor) -> Tensor:
        """
        Node ids from the root's child down to each node.

        Args:
            nodes (`torch.Tensor` of shape `(num_rows,)`):
                Nodes other than the root.

        Returns:
            `torch.Tensor` of shape `(num_rows, longest)`, int64, padded with `-1` on the right.
        """
        levels = [nodes.long()]
        while (parents := self.parents(levels[-1].clamp(min=0))).gt(0).any():
            levels.append(torch.where((levels[-1] > 0) & (parents > 0), parents, -1))
        paths = torch.stack(levels[::-1], dim=-1)
        missing = (paths < 0).sum(dim=-1, keepdim=True)  # they stand on the left: move them to the right
        position = torch.arange(paths.shape[-1], device=paths.device) + missing
        moved = paths.gather(-1, position.clamp(max=paths.shape[-1] - 1))
        return torch.where(position < paths.shape[-1], moved, -1)

    def average_valid_tokens(self, nodes: Tensor) -> float:
        """
        Average number of valid tokens (AVT) over all tokens of the targets `nodes` (Table 4 of the MSL paper).

        Args:
            nodes (`torch.Tensor` of shape `(num_targets,)`):
                Final nodes of the target items, with repetitions: `trie.item_nodes[target_indices]`.
        """
        paths = self.paths(nodes)
        return self.num_valid_tokens(paths[paths >= 0]).double().mean().item()

    def statistics(self) -> list[dict[str, float]]:
        """Per depth: number of nodes, of branching nodes, of item ends, and mean and maximum number of children."""
        statistics = []
        for depth, (start, end) in enumerate(self.levels):
            counts = self.first_child[start : end + 1].diff()
            statistics.append(
                {
                    "depth": depth,
                    "nodes": end - start,
                    "branching_nodes": int((counts > 1).sum()),
                    "items": int(((self.item_nodes >= start) & (self.item_nodes < end)).sum()),
                    "mean_children": counts.double().mean().item(),
                    "max_children": int(counts.max()),
                }
            )
        return statistics

    # ------------------------------------------------------------------ exact lookup

    @cached_property
    def _index(self) -> SequenceIndex:
        """The node of each item by its tokens."""
        parts = (  # as a matrix of all paths could be large
            (self.tokens(paths.clamp(min=0)).cpu().numpy(), (paths >= 0).sum(dim=1).cpu().numpy())
            for paths in map(self.paths, self.item_nodes.split(1 << 16))
        )
        return SequenceIndex(parts, self.item_nodes.cpu().numpy())

    def find(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """
        Final nodes of whole items.

        Args:
            sequences (`Sequence[Sequence[int]]`):
                Token ids, end token included.

        Returns:
            `torch.Tensor` of shape `(len(sequences),)`, int64: the item's node; `-1` for what is not an item.
        """
        return torch.from_numpy(self._index.find(*flatten_sequences(sequences))).to(self.device)

    # ------------------------------------------------------------------ storage

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the trie to `trie.safetensors` in a folder, whole or not at all, with a checksum of its arrays."""
        write_arrays(Path(save_directory), self.edges.cpu().numpy(), self.item_nodes.cpu().numpy(), self.vocab_size)

    @classmethod
    def from_pretrained(cls, save_directory: str | Path) -> ItemTrie:
        """
        Read a trie written by [`ItemTrie.save_pretrained`].

        Raises:
            `ValueError`: if the file is missing or damaged.
        """
        try:
            arrays = read_arrays(Path(save_directory))
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"`save_directory` = {str(save_directory)!r} does not hold a readable {TRIE_FILE} ({error}). Save it "
                "again with `ItemTrie.save_pretrained`."
            ) from error
        return cls._from_arrays(*arrays)
