# SPDX-License-Identifier: Apache-2.0
"""Which items each user of a batch may get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..trie import CompressedTrie, ragged_arange


@dataclass(frozen=True, eq=False)
class Allowed:
    """
    Items that all users may get, sorted once for any number of searches by [`TrieDecoder.prepare_allowed`].

    Args:
        tree ([`CompressedTrie`]):
            Trie of the catalogue.
        places (`torch.Tensor` of shape `(num_allowed,)`, int64):
            Their places in `tree.item_order`, ascending and without repeats.
    """

    tree: CompressedTrie
    places: Tensor

    @classmethod
    def from_items(cls, tree: CompressedTrie, items: Tensor) -> Allowed:
        """From item indices, int64 of shape `(num_items,)`, in any order."""
        places = tree.item_place[items.to(tree.device)].long()
        if len(places) <= len(tree.item_order) // 16:
            return cls(tree, places.unique())
        is_allowed = torch.zeros(len(tree.item_order), dtype=torch.bool, device=tree.device)  # quicker than to sort
        is_allowed[places] = True
        return cls(tree, is_allowed.nonzero().squeeze(1))


class Restriction:
    """
    Which items each user may get. The items below a node are a range, so the number of allowed ones among them is the
    difference of two places in a sorted list: nothing of the catalogue's size is made for a user.

    Args:
        tree ([`CompressedTrie`]):
            Trie of the catalogue.
        exclude (`Sequence` of `torch.Tensor` of shape `(num_excluded,)`, int64, *optional*):
            Item indices that each user must not get.
        allowed ([`Allowed`], or `Sequence` of `torch.Tensor` of shape `(num_allowed,)`, int64, *optional*):
            Items that all users, or item indices that each user, may get. Defaults to the whole catalogue.
        removed (`torch.Tensor` of shape `(num_removed,)`, int64, *optional*):
            More items that users must not get, as `user * (num_items + 1) + place`.
    """

    def __init__(
        self,
        tree: CompressedTrie,
        exclude: Sequence[Tensor] | None = None,
        allowed: Allowed | Sequence[Tensor] | None = None,
        removed: Tensor | None = None,
    ):
        self.tree = tree
        self.stride = len(tree.item_order) + 1
        # What all users may get has the keys of the first one
        self.allowed_stride = 0 if isinstance(allowed, Allowed) else self.stride
        self.allowed = self.excluded = None
        if allowed is not None:
            self.allowed = allowed.places if isinstance(allowed, Allowed) else self._keys(allowed)
        if exclude is not None or removed is not None:
            parts = [] if exclude is None else [self._keys(exclude)]
            keys = torch.cat(parts if removed is None else [*parts, removed]).unique()
            users, places = keys // self.stride, keys % self.stride
            self.excluded = keys[self.count(users, places, places + 1) > 0]

    def _keys(self, items: Sequence[Tensor]) -> Tensor:
        """Sorted `user * stride + place` of the items of each user, without repeats."""
        flat = torch.cat([row.to(self.tree.device) for row in items])
        users = torch.repeat_interleave(torch.tensor([len(row) for row in items])).to(self.tree.device)
        return (users * self.stride + self.tree.item_place[flat]).unique()

    def count(self, users: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """
        Number of items in ranges of items that users may get.

        Args:
            users (`torch.Tensor` of shape `(num_ranges,)`, int64):
                User of each range.
            start, end (`torch.Tensor` of shape `(num_ranges,)`):
                Range of `tree.item_order`.

        Returns:
            `torch.Tensor` of shape `(num_ranges,)`, int64.
        """
        return self._count_allowed(users, start, end) - self._count_excluded(users, start, end)

    def first_items(
        self, users: Tensor, start: Tensor, end: Tensor, limit: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """
        The first items of each range that users may get. A text shared by very many items costs no more than others.

        Args:
            users, start, end:
                As for [`~Restriction.count`].
            limit (`int`, *optional*):
                Maximum number of items of a range, which bounds the work.

        Returns:
            `tuple` of two `torch.Tensor` of shape `(num_found,)`: index of the range, and item, in order.
        """
        counts = self._count_allowed(users, start, end)
        if limit is not None:  # of this many at least `limit` are not excluded, if there are that many
            counts = torch.minimum(counts, limit + self._count_excluded(users, start, end))
        index, offset = ragged_arange(counts)
        places = start[index].long() + offset
        if self.allowed is not None:
            shift = users[index] * self.allowed_stride
            places = self.allowed[torch.searchsorted(self.allowed, shift + start[index]) + offset] - shift
        kept = self._count_excluded(users[index], places, places + 1) == 0
        index, places = index[kept], places[kept]
        if limit is not None:
            first = torch.searchsorted(index, index)  # where each range begins
            within = torch.arange(len(index), device=index.device) - first < limit
            index, places = index[within], places[within]
        return index, self.tree.item_order[places]

    def _count_allowed(self, users: Tensor, start: Tensor, end: Tensor) -> Tensor:
        if self.allowed is None:
            return (end - start).long()
        return _count(self.allowed, users * self.allowed_stride, start, end)

    def _count_excluded(self, users: Tensor, start: Tensor, end: Tensor) -> Tensor:
        if self.excluded is None:
            return torch.zeros_like(users)
        return _count(self.excluded, users * self.stride, start, end)


def _count(keys: Tensor, offset: Tensor, start: Tensor, end: Tensor) -> Tensor:
    return torch.searchsorted(keys, offset + end) - torch.searchsorted(keys, offset + start)
