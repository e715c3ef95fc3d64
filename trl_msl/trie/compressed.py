# SPDX-License-Identifier: Apache-2.0
"""The trie with its forced chains contracted: what search walks over. It knows only integers."""

from __future__ import annotations

import torch
from torch import Tensor

from .item_trie import ItemTrie
from .ragged import ragged_arange


class CompressedTrie:
    """
    View of an [`ItemTrie`] in which each node is a *chain*: a token that was chosen among several, and all tokens that
    are forced after it. So a node has no child or at least two, and nothing is left to choose within it.

    Nodes are numbered so that parents come before their children and siblings are contiguous, by token. The root `0`
    holds the tokens that all items begin with, usually none.

    The items stand in the order of the trie's leaves, so that each node owns a range of them: first those that end
    within its own chain, then its children's. Two nodes are ancestor and descendant if and only if their ranges nest.

    Args:
        trie ([`ItemTrie`]):
            Trie to contract.

    Attributes (`N` nodes):
        chain_tokens (`torch.Tensor` of shape `(total,)`, int32):
            Tokens of all chains in a row.
        chain_start (`torch.Tensor` of shape `(N + 1,)`, int32):
            Where each node's chain starts in `chain_tokens`.
        depth (`torch.Tensor` of shape `(N,)`, int32):
            Number of tokens before each node's chain.
        parent (`torch.Tensor` of shape `(N,)`, int32):
            Parent of each node; `-1` for the root.
        first_child, num_children (`torch.Tensor` of shape `(N,)`, int32):
            Children of each node: `first_child` and the nodes after it.
        item_order (`torch.Tensor` of shape `(num_items,)`, int32):
            Item indices in the order of the leaves, those with the same text by index.
        item_place (`torch.Tensor` of shape `(num_items,)`, int32):
            Where each item stands in `item_order`.
        item_start, item_end (`torch.Tensor` of shape `(N,)`, int32):
            Range of `item_order` below each node.
        num_own_items (`torch.Tensor` of shape `(N,)`, int32):
            How many items end within each node's chain.
        item_nodes (`torch.Tensor` of shape `(num_items,)`, int32):
            Node that each item ends in.
    """

    def __init__(self, trie: ItemTrie):
        nodes = torch.arange(trie.num_nodes, device=trie.device)
        is_head = torch.ones(trie.num_nodes, dtype=torch.bool, device=trie.device)
        is_head[1:] = trie.num_valid_tokens(nodes[1:]) > 1
        heads = is_head.nonzero().squeeze(1)
        chain = is_head.cumsum(0) - 1  # right for heads; the others are in their parent's chain
        for start, end in trie.levels[1:]:
            level = slice(start, end)
            chain[level] = torch.where(is_head[level], chain[level], chain[trie.parents(nodes[level])])

        chains, order = torch.sort(chain, stable=True)  # stable: a chain's nodes stay in order of depth
        start = torch.searchsorted(chains, torch.arange(len(heads) + 1, device=trie.device))
        ends = order[start[1:] - 1]
        self.chain_tokens = trie.tokens(order[1:]).int()
        self.chain_start = (start - 1).clamp_(min=0).int()  # the root node itself has no token
        self.num_children = trie.num_children(ends)
        self.first_child = chain[trie.first_child[ends].clamp(max=trie.num_nodes - 1)].int()
        starts = torch.tensor([first for first, _ in trie.levels], device=trie.device)
        self.depth = (torch.searchsorted(starts, heads, right=True) - 2).clamp_(min=0).int()
        parents = trie.parents(heads)
        self.parent = torch.where(parents < 0, -1, chain[parents.clamp(min=0)]).int()
        self.item_nodes = chain[trie.item_nodes].int()
        self.num_own_items = torch.bincount(self.item_nodes, minlength=len(heads)).int()
        self._order_items(torch.searchsorted(heads, starts).tolist())

    @property
    def num_nodes(self) -> int:
        return len(self.parent)

    @property
    def device(self) -> torch.device:
        return self.parent.device

    def _order_items(self, level_starts: list[int]) -> None:
        """Give each node its range of items, level by level: upwards their number, downwards their start."""
        levels = list(zip(level_starts[1:], [*level_starts[2:], self.num_nodes]))
        parent = self.parent.long()
        count = self.num_own_items.clone()
        for start, end in reversed(levels):
            count.index_add_(0, parent[start:end], count[start:end].clone())
        before = count.cumsum(0) - count
        first_sibling = self.first_child.long()[parent.clamp(min=0)]
        item_start = before - before[first_sibling]  # items of earlier siblings
        item_start[0] = 0
        for start, end in levels:
            above = parent[start:end]
            item_start[start:end] += item_start[above] + self.num_own_items[above]
        self.item_start = item_start.int()
        self.item_end = self.item_start + count
        self.item_order = torch.sort(self.item_start[self.item_nodes], stable=True).indices.int()
        self.item_place = torch.empty_like(self.item_order)
        self.item_place[self.item_order] = torch.arange(len(self.item_order), dtype=torch.int32, device=self.device)

    def chain_length(self, nodes: Tensor) -> Tensor:
        """Number of tokens of each node's chain, int32."""
        return self.chain_start[nodes + 1] - self.chain_start[nodes]

    def head_tokens(self, nodes: Tensor) -> Tensor:
        """First token of each node's chain, by which it is chosen, int32. Not of the root."""
        return self.chain_tokens[self.chain_start[nodes]]

    def children(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """
        Children of some nodes.

        Args:
            nodes (`torch.Tensor` of shape `(num_rows,)`):
                Nodes.

        Returns:
            `tuple` of two int64 `torch.Tensor` of shape `(total,)`: the row and the child of each pair, in order.
        """
        rows, offsets = ragged_arange(self.num_children[nodes].long())
        return rows, self.first_child[nodes].long()[rows] + offsets
