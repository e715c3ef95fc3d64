# SPDX-License-Identifier: Apache-2.0
"""Which items each user of a batch may get."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .compressed_trie import CompressedTrie


class Restriction:
    """
    Which items each user may get. Each node owns a range of items, so how many of those below it are allowed is a
    difference of two places in a sorted list: nothing is rebuilt, and nothing of the catalogue's size made per user.

    Args:
        tree ([`CompressedTrie`]):
            Trie of the catalogue.
        exclude (`Sequence[Sequence[int]]`, *optional*):
            Item indices that each user must not get.
        allowed (`torch.Tensor` of shape `(num_allowed,)`, int64, or `Sequence[Sequence[int]]`, *optional*):
            Item indices that all users, or each user, may get. Defaults to the whole catalogue.
    """

    def __init__(
        self,
        tree: CompressedTrie,
        exclude: Sequence[Sequence[int]] | None = None,
        allowed: Tensor | Sequence[Sequence[int]] | None = None,
    ):
        self.tree = tree
        self.stride = len(tree.item_order) + 1
        # All users alike have the first one's keys
        self.allowed_stride = 0 if isinstance(allowed, Tensor) else self.stride
        self.allowed = self.excluded = None
        if allowed is not None:
            self.allowed = self._keys([allowed] if isinstance(allowed, Tensor) else allowed)
        if exclude is not None:
            keys = self._keys(exclude)
            users, places = keys // self.stride, keys % self.stride
            self.excluded = keys[self.count(users, places, places + 1) > 0]

    def _keys(self, items: Sequence[Tensor] | Sequence[Sequence[int]]) -> Tensor:
        """Sorted `user * stride + place` of the items of each user, without repeats."""
        counts = torch.tensor([len(row) for row in items])
        flat = torch.cat([torch.as_tensor(row, dtype=torch.int64) for row in items]).to(self.tree.device)
        users = torch.repeat_interleave(counts).to(self.tree.device)
        return (users * self.stride + self.tree.item_place[flat]).unique()

    def count(self, users: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """
        Number of items that users may get out of ranges of items.

        Args:
            users (`torch.Tensor` of shape `(num_ranges,)`, int64):
                User of each range.
            start, end (`torch.Tensor` of shape `(num_ranges,)`):
                Range of `tree.item_order`.

        Returns:
            `torch.Tensor` of shape `(num_ranges,)`, int64.
        """
        count = (end - start).long()
        if self.allowed is not None:
            count = _count(self.allowed, users * self.allowed_stride, start, end)
        if self.excluded is not None:
            count = count - _count(self.excluded, users * self.stride, start, end)
        return count


def _count(keys: Tensor, offset: Tensor, start: Tensor, end: Tensor) -> Tensor:
    return torch.searchsorted(keys, offset + end) - torch.searchsorted(keys, offset + start)
