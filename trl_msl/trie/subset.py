# SPDX-License-Identifier: Apache-2.0
"""The trie of some of a trie's items."""

from __future__ import annotations

import torch
from torch import Tensor

from .item_trie import ItemTrie


def subset(trie: ItemTrie, items: Tensor) -> tuple[ItemTrie, Tensor]:
    """
    The trie of some of a trie's items.

    Args:
        trie ([`ItemTrie`]):
            Trie of all items.
        items (`torch.Tensor` of shape `(num_kept,)`, int64):
            Indices of the items to keep, at least one. They are the items of the new trie, in this order.

    Returns:
        [`ItemTrie`] and `torch.Tensor` of shape `(trie.num_nodes,)`, int64: for each node of `trie` the same node of
        the new trie, `-1` where no kept item passes.

    Raises:
        `ValueError`: if `items` is empty.
    """
    if len(items) == 0:
        raise ValueError("`items` is empty: a trie needs at least one item.")
    ends = trie.item_nodes[items].long()
    is_kept, nodes = torch.zeros(trie.num_nodes, dtype=torch.bool, device=trie.device), ends
    while len(nodes):
        is_kept[nodes] = True
        nodes = trie.parents(nodes[nodes > 0]).unique()
    numbers = torch.where(is_kept, is_kept.cumsum(0) - 1, -1)
    kept = is_kept.nonzero().squeeze(1)
    # What is left out does not change the order, by level, parent and token
    edges = numbers[trie.parents(kept)] * trie.vocab_size + trie.tokens(kept)
    edges[0] = -1
    arrays = (array.cpu().numpy() for array in (edges, numbers[ends].int()))
    return ItemTrie._from_arrays(*arrays, trie.vocab_size).to(trie.device), numbers
