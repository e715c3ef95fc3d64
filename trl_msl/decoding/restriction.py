# SPDX-License-Identifier: Apache-2.0
"""Which items each user of a batch may get."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from ..trie import CompressedTrie, ragged_arange


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
        return self._count_allowed(users, start, end) - self._count_excluded(users, start, end)

    def first_items(self, users: Tensor, start: Tensor, end: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """
        The first items of each range that users may get, so that a text which very many items share costs no more.

        Args:
            users, start, end:
                As for [`~Restriction.count`].
            limit (`int`):
                Number of items of a range to give at most.

        Returns:
            `tuple` of two `torch.Tensor` of shape `(num_found,)`: index of the range, and item, in order.
        """
        # Of this many at least `limit` are not excluded, if there are as many
        counts = torch.minimum(self._count_allowed(users, start, end), limit + self._count_excluded(users, start, end))
        index, offset = ragged_arange(counts)
        places = start[index].long() + offset
        if self.allowed is not None:
            shift = users[index] * self.allowed_stride
            places = self.allowed[torch.searchsorted(self.allowed, shift + start[index]) + offset] - shift
        kept = self._count_excluded(users[index], places, places + 1) == 0
        index, places = index[kept], places[kept]
        first = torch.searchsorted(index, index)  # where each range begins
        within = torch.arange(len(index), device=index.device) - first < limit
        return index[within], self.tree.item_order[places[within]]

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


def is_shared(allowed: Sequence[int] | Tensor | Sequence[Sequence[int]]) -> bool:
    """Whether one list of items is meant for all users."""
    return allowed.ndim == 1 if isinstance(allowed, Tensor) else isinstance(allowed[0], Integral)


def check_restrictions(
    num_users: int,
    num_items: int,
    exclude: Sequence[Sequence[int]] | None,
    allowed: Sequence[int] | Tensor | Sequence[Sequence[int]] | None,
) -> None:
    """Raise a `ValueError` if the arguments of [`Restriction`] do not fit the users or the catalogue."""
    if exclude is not None:
        check_items("exclude", exclude, num_users, num_items)
    if allowed is None:
        return
    if len(allowed) == 0:
        raise ValueError("`allowed` is empty: leave it out to allow the whole catalogue.")
    if is_shared(allowed):
        check_items("allowed", [allowed], 1, num_items)
    else:
        check_items("allowed", allowed, num_users, num_items)


def check_items(name: str, rows: Sequence[Sequence[int]], num_users: int, num_items: int) -> None:
    """Raise a `ValueError` if the argument `name` is not a list of item indices for each user."""
    if len(rows) != num_users:
        raise ValueError(f"`{name}` has {len(rows)} lists for {num_users} prompts: pass a list for each.")
    for user, row in enumerate(rows):
        items = torch.as_tensor(row)
        if len(items) > 0 and (items.dtype == torch.bool or items.dtype.is_floating_point):
            raise ValueError(
                f"`{name}` holds {items.dtype} (list {user}), but must hold item indices: pass "
                "`mask.nonzero().squeeze(1)` instead of a mask."
            )
        off = items[(items < 0) | (items >= num_items)]
        if len(off) > 0:
            raise ValueError(
                f"`{name}` holds item {int(off[0])} (list {user}), but the catalogue has items 0 to {num_items - 1}: "
                "pass indices, such as `catalog.indices(ids)`."
            )
