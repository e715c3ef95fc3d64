# SPDX-License-Identifier: Apache-2.0
"""Biases that are added to the scores of items, and the largest one below each node of the trie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..trie import CompressedTrie
from .arguments import Items, read_item_lists
from .restriction import Allowed


@dataclass(frozen=True, eq=False)
class SparseBias:
    """
    Biases of some items for each user, such as the scores of a collaborative model's neighbours, and one for the rest.

    Args:
        items (`Sequence[Sequence[int]]`):
            Item indices of each user, each at most once.
        values (`Sequence[Sequence[float]]`):
            Their biases; `-inf` for an item that the user must not get.
        default (`float` or `Sequence[float]` of length `num_users`, *optional*, defaults to `0.0`):
            Bias of a user's other items.
    """

    items: Sequence[Items]
    values: Sequence[Sequence[float]]
    default: float | Sequence[float] = 0.0


@dataclass(frozen=True, eq=False)
class ItemBias:
    """
    Biases of all items, for all users, prepared once by [`TrieDecoder.prepare_item_bias`]; or for each of a batch.

    Args:
        tree ([`CompressedTrie`]):
            Trie of the catalogue.
        values (`torch.Tensor` of shape `(1 or num_users, num_items)`, fp32):
            Biases in the order of `tree.item_order`.
        maxima (`torch.Tensor` of shape `(1 or num_users, num_nodes)`, fp32):
            Largest bias of the items below each node of `tree`.
    """

    tree: CompressedTrie
    values: Tensor
    maxima: Tensor

    @classmethod
    def from_values(cls, tree: CompressedTrie, values: Tensor) -> ItemBias:
        """From biases by item, of shape `(num_items,)` or `(num_users, num_items)`."""
        values = torch.atleast_2d(values.to(tree.device))[:, tree.item_order]
        return cls(tree, values, range_maxima(values, tree.item_start, tree.item_end))

    def of_items(self, users: Tensor, items: Tensor) -> Tensor:
        """Bias of each item for a user, fp32."""
        return self.values[users.clamp(max=len(self.values) - 1), self.tree.item_place[items]]

    def of_nodes(self, users: Tensor, nodes: Tensor) -> Tensor:
        """Largest bias for a user of the items below each node, fp32."""
        return self.maxima[users.clamp(max=len(self.values) - 1), nodes]

    @property
    def removed(self) -> Tensor:
        """Items of a bias of `-inf` for each user, for a [`Restriction`]."""
        users, places = (self.values == -torch.inf).nonzero(as_tuple=True)
        return users * (len(self.tree.item_order) + 1) + places

    @cached_property
    def _finite(self) -> Allowed | None:
        """The other items, where this bias is that of all users; `None` if that is all of them."""
        places = (self.values[0] > -torch.inf).nonzero().squeeze(1)
        return None if len(places) == len(self.tree.item_order) else Allowed(self.tree, places)

    def restrict(self, allowed: Allowed | list[Tensor] | None) -> Allowed | list[Tensor] | None:
        """What users may get of `allowed` with this bias of all users: not the items whose bias is `-inf`."""
        if self._finite is None or allowed is None:
            return self._finite if allowed is None else allowed
        is_finite = self.values[0] > -torch.inf
        if isinstance(allowed, Allowed):
            return Allowed(self.tree, allowed.places[is_finite[allowed.places]])
        allowed = [row.to(self.tree.device) for row in allowed]
        return [row[is_finite[self.tree.item_place[row]]] for row in allowed]


class ListedBias:
    """
    A [`SparseBias`] for the users of a batch, in which nothing of the catalogue's size is made.

    Args:
        tree ([`CompressedTrie`]):
            Trie of the catalogue.
        bias ([`SparseBias`]):
            Biases of the users, from [`read_item_bias`].
    """

    def __init__(self, tree: CompressedTrie, bias: SparseBias):
        self.tree = tree
        self.stride = len(tree.item_order) + 1
        users = torch.repeat_interleave(torch.tensor([len(row) for row in bias.items]))
        keys = users.to(tree.device) * self.stride + tree.item_place[torch.cat(bias.items).to(tree.device)]
        self.keys, order = keys.sort()
        self.values = torch.cat(bias.values).to(tree.device)[order]
        self.default = bias.default.to(tree.device)

    def of_items(self, users: Tensor, items: Tensor) -> Tensor:
        """Bias of each item for a user, fp32."""
        places = self.tree.item_place[items]
        return self._largest(users, places, places + 1)

    def of_nodes(self, users: Tensor, nodes: Tensor) -> Tensor:
        """Largest bias for a user of the items below each node, fp32."""
        return self._largest(users, self.tree.item_start[nodes], self.tree.item_end[nodes])

    def _largest(self, users: Tensor, start: Tensor, end: Tensor) -> Tensor:
        first, last = (torch.searchsorted(self.keys, users * self.stride + place) for place in (start, end))
        largest = range_maxima(self.values[None], first, last)[0]
        return torch.where(last - first < end - start, largest.maximum(self.default[users]), largest)

    @property
    def removed(self) -> Tensor:
        """As for [`ItemBias`]."""
        return self.keys[self.values == -torch.inf]


def range_maxima(values: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """
    Largest value of each range. A range is covered by two of the largest power of two that fits, and the maxima of all
    ranges of such a size come from those of half of it: time is in proportion to `num_values · log(longest range)`.

    Args:
        values (`torch.Tensor` of shape `(num_rows, num_values)`):
            Values.
        start, end (`torch.Tensor` of shape `(num_ranges,)`):
            Ranges of columns.

    Returns:
        `torch.Tensor` of shape `(num_rows, num_ranges)`: `-inf` where a range is empty.
    """
    sizes = end - start
    maxima = values.new_full((len(values), len(start)), -torch.inf)
    for power in range(int(sizes.max()).bit_length() if len(sizes) > 0 else 0):
        here = (sizes >> power == 1).nonzero().squeeze(1)
        maxima[:, here] = torch.maximum(values[:, start[here]], values[:, end[here] - (1 << power)])
        values = torch.maximum(values[:, : -(1 << power)], values[:, 1 << power :])
    return maxima


Values = SparseBias | Tensor | np.ndarray | Sequence[float] | Sequence[Sequence[float]]
BiasFunction = Callable[[Sequence[int]], Values]
Biases = ItemBias | Values | BiasFunction
ReadBiases = ItemBias | SparseBias | Tensor | BiasFunction


def read_item_bias(item_bias: Biases, num_users: int | None, num_items: int) -> ReadBiases:
    """
    Biases of items as users pass them. Without `num_users` they must be the same for all users.

    Returns:
        `torch.Tensor` of shape `(num_items,)` or `(num_users, num_items)`, fp32; [`SparseBias`] of a list of int64
        and one of fp32 tensors, and a default of shape `(num_users,)`, fp32; or, unchanged, an [`ItemBias`] or a
        function, which [`bias_of_users`] calls.

    Raises:
        `ValueError`: if a shape does not fit, or a value is anything but a finite number or `-inf`.
    """
    if num_users is not None and (isinstance(item_bias, ItemBias) or callable(item_bias)):
        return item_bias
    if num_users is None or not isinstance(item_bias, SparseBias):
        values, of_users = _read_values(item_bias), f", or ({num_users}, {num_items}), one for each prompt and item"
        if tuple(values.shape) not in ((num_items,), (num_users, num_items)):
            raise ValueError(
                f"`item_bias` has shape {tuple(values.shape)}: pass ({num_items},), a number for each item"
                f"{'' if num_users is None else of_users}."
            )
        return values
    items = read_item_lists("item_bias.items", item_bias.items, num_users, num_items)
    values = [_read_values(row) for row in item_bias.values]
    if [len(row) for row in items] != [row.numel() if row.ndim == 1 else -1 for row in values]:
        raise ValueError("`item_bias.values` has other lengths than `item_bias.items`: pass a value for each item.")
    for user, row in enumerate(items):
        if len(row.unique()) < len(row):
            raise ValueError(f"`item_bias.items` has an item twice (list {user}): pass one value for it.")
    default = _read_values(item_bias.default)
    if tuple(default.shape) not in ((), (num_users,)) or not default.isfinite().all():
        raise ValueError(
            f"`item_bias.default` is {item_bias.default}: pass a finite number, or one for each prompt. (For items "
            "that users must not get there is `allowed`.)"
        )
    return SparseBias(items, values, default.expand(num_users))


def select_users(item_bias: ReadBiases, users: Sequence[int]) -> ReadBiases:
    """From what [`read_item_bias`] returns, the biases of some users, in their order."""
    if isinstance(item_bias, SparseBias):
        items, values = ([rows[user] for user in users] for rows in (item_bias.items, item_bias.values))
        return SparseBias(items, values, item_bias.default[list(users)])
    if isinstance(item_bias, Tensor) and item_bias.ndim == 2:
        return item_bias[list(users)]
    if callable(item_bias):
        return lambda batch: item_bias([users[user] for user in batch])
    return item_bias


def bias_of_users(item_bias: ReadBiases, users: Sequence[int], num_items: int) -> ItemBias | SparseBias | Tensor:
    """
    As [`select_users`] for a batch, for which a function is called. If it returns one row of numbers, each user gets
    it.

    Raises:
        `ValueError`: if what a function returns does not fit the users or the catalogue.
    """
    if not callable(item_bias):
        return select_users(item_bias, users)
    found = read_item_bias(item_bias(users), len(users), num_items)
    if isinstance(found, ItemBias) or callable(found):
        raise ValueError(
            f"`item_bias` is a function that returns `{type(found).__name__}`: return numbers for the users that it "
            "is given, or a `SparseBias`."
        )
    return found.expand(len(users), num_items) if isinstance(found, Tensor) else found


def sum_biases(biases: Sequence[Biases], num_users: int, num_items: int) -> Biases | None:
    """
    The sum of biases: `None` for none, a single one unchanged, and for several a function that adds them up for a
    batch.

    Raises:
        `ValueError`: as for [`read_item_bias`].
    """
    if len(biases) < 2:
        return biases[0] if biases else None
    biases = [read_item_bias(bias, num_users, num_items) for bias in biases]

    def of_batch(users: Sequence[int]) -> Tensor:
        total = torch.zeros(len(users), num_items)
        for bias in biases:
            total += dense_bias(bias, users, num_items)
        return total

    return of_batch


def dense_bias(item_bias: ReadBiases, users: Sequence[int], num_items: int) -> Tensor:
    """As [`bias_of_users`], by item and on the CPU: a row for each user, or one for all of them."""
    bias = bias_of_users(item_bias, users, num_items)
    if isinstance(bias, ItemBias):
        if bias.values.shape[1] != num_items:
            raise ValueError("`item_bias` was prepared by another `TrieDecoder`: prepare it with this one.")
        return bias.values[:, bias.tree.item_place].cpu()
    if isinstance(bias, Tensor):
        return torch.atleast_2d(bias.cpu())
    rows = bias.default.cpu()[:, None].repeat(1, num_items)
    for row, items, values in zip(rows, bias.items, bias.values):
        row[items.cpu()] = values.cpu()
    return rows


def _read_values(values: Tensor | np.ndarray | Sequence | float) -> Tensor:
    try:
        values = torch.as_tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`item_bias` must hold numbers ({error}).") from error
    if values.isnan().any() or (values == torch.inf).any():
        raise ValueError("`item_bias` holds NaN or inf: pass finite numbers, or -inf for what must not be found.")
    return values
