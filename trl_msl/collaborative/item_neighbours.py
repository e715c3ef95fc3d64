# SPDX-License-Identifier: Apache-2.0
"""Item-kNN: the neighbours of each item, and the scores that a history gives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..decoding import SparseBias
from ..trie import flatten_sequences, ragged_arange


_PAIRS = 1 << 23  # pairs of items in memory at a time


@dataclass(frozen=True, eq=False)
class ItemNeighbours:
    """
    The nearest neighbours of each item, by who chose them or by their vectors, on the CPU.

    Args:
        offsets (`torch.Tensor` of shape `(num_items + 1,)`, int64):
            Item `i` has the neighbours `offsets[i]` to `offsets[i + 1]` of the following.
        neighbours (`torch.Tensor` of shape `(num_neighbours,)`, int32):
            Item indices, nearest first for each item.
        similarities (`torch.Tensor` of shape `(num_neighbours,)`, fp32):
            Similarity of each neighbour, above 0.
        decay (`float`):
            Weight of each item of a history relative to the one after it, above 0 and at most 1.

    Raises:
        `ValueError`: if an argument is out of range, or the tensors do not fit together.
    """

    offsets: Tensor
    neighbours: Tensor
    similarities: Tensor
    decay: float

    def __post_init__(self):
        if not 0 < self.decay <= 1:
            raise ValueError(f"`decay` is {self.decay}: it must be above 0 and at most 1.")
        expected = {"offsets": torch.int64, "neighbours": torch.int32, "similarities": torch.float32}
        for name, dtype in expected.items():
            tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.ndim != 1:
                raise ValueError(
                    f"`{name}` is {tensor.dtype}{list(tensor.shape)}: it must have one dimension, {dtype}."
                )
        total = len(self.neighbours)
        ends = self.offsets[[0, -1]].tolist() if len(self.offsets) > 1 else []
        is_falling = (self.offsets[1:] < self.offsets[:-1]).any()  # differences could overflow
        if ends != [0, total] or is_falling or len(self.similarities) != total:
            raise ValueError("`offsets`, `neighbours` and `similarities` do not fit together.")
        if total and not 0 <= int(self.neighbours.min()) <= int(self.neighbours.max()) < self.num_items:
            raise ValueError(f"`neighbours` must hold item indices from 0 to {self.num_items - 1}.")
        if not (self.similarities.isfinite() & (self.similarities > 0)).all():
            raise ValueError("`similarities` must hold finite numbers above 0.")

    def __repr__(self) -> str:
        return f"ItemNeighbours({self.num_items} items, {len(self.neighbours)} neighbours, decay={self.decay})"

    @property
    def num_items(self) -> int:
        """Number of items in the catalogue."""
        return len(self.offsets) - 1

    @classmethod
    def fit(
        cls,
        sequences: Sequence[Sequence[int]],
        users: Sequence[Any],
        num_items: int,
        num_neighbours: int = 100,
        shrinkage: float = 5**0.5,
        decay: float = 0.7,
        weights: Sequence[float] | None = None,
    ) -> ItemNeighbours:
        r"""
        Neighbours by the shrunken cosine of two items' sets of users,
        \\( c_{ij} / ((\sqrt{n_i} + s) (\sqrt{n_j} + s)) \\), where \\( n_i \\) users have item \\( i \\) and
        \\( c_{ij} \\) have both.

        Args:
            sequences (`Sequence[Sequence[int]]`):
                Item indices of each window.
            users (`Sequence`):
                User of each window. An item counts once for a user, however many windows hold it.
            num_items (`int`):
                Number of items in the catalogue.
            num_neighbours (`int`, *optional*, defaults to `100`):
                Maximum number of neighbours of an item. Ties are broken by the order of the catalogue.
            shrinkage (`float`, *optional*, defaults to \\( \sqrt 5 \\)):
                The \\( s \\) above, at least 0: it lowers the similarity of items that few users have.
            decay (`float`, *optional*, defaults to `0.7`):
                As for the class.
            weights (`Sequence[float]`, *optional*):
                How much the user of each sequence counts, above 0; by default all count 1. Only where each user has
                one sequence.

        Raises:
            `ValueError`: if an argument is out of range, or there isn't a user for each sequence.
        """
        _check_number_of_neighbours(num_neighbours)
        if not 0 <= shrinkage < float("inf"):
            raise ValueError(f"`shrinkage` is {shrinkage}: it must be a finite number, and at least 0.")
        had = _items_of_users(sequences, users, num_items)
        user, item = had // num_items, had % num_items
        sizes = torch.bincount(user)
        weight = torch.ones(len(sizes)).double() if weights is None else torch.as_tensor(weights).double()
        if len(weight) != len(sizes) or not ((weight > 0) & weight.isfinite()).all():
            raise ValueError(f"`weights` has {len(weight)} entries for {len(sizes)} users: pass one above 0 for each.")
        counts = torch.bincount(item, weights=weight[user], minlength=num_items)
        starts, norms = sizes.cumsum(0) - sizes, counts.sqrt() + shrinkage

        # Each user's pairs of items, sorted by the first, a range of first items at a time to bound memory
        by_item = item.argsort(stable=True)
        user, item = user[by_item], item[by_item]
        chunk = torch.bincount(item, weights=sizes[user], minlength=num_items).cumsum(0)[item] // _PAIRS
        counts, parts = torch.unique_consecutive(chunk, return_counts=True)[1].tolist(), []
        for of_users, firsts in zip(user.split(counts), item.split(counts)):
            rows, places = ragged_arange(sizes[of_users])
            seconds = had[starts[of_users][rows] + places] % num_items
            pairs, inverse = torch.unique(firsts[rows] * num_items + seconds, return_inverse=True)
            common = torch.bincount(inverse, weights=weight[of_users][rows])
            rows, columns = pairs // num_items, pairs % num_items
            values = (common / (norms[rows] * norms[columns])).float()
            is_other = rows != columns
            parts.append(_nearest(rows[is_other], columns[is_other], values[is_other], num_neighbours))
        return cls._from_parts(parts, num_items, decay)

    @classmethod
    def from_vectors(cls, vectors: Tensor, num_neighbours: int = 100, decay: float = 0.7) -> ItemNeighbours:
        """
        Neighbours by the cosine of vectors, such as the item embeddings of a collaborative model.

        Args:
            vectors (`torch.Tensor` of shape `(num_items, dim)`):
                A vector for each item. An item whose vector is zero neither has neighbours nor is one.
            num_neighbours, decay (*optional*):
                As for [`ItemNeighbours.fit`]. Only items with a cosine above 0 are neighbours.

        Raises:
            `ValueError`: if an argument is out of range.
        """
        _check_number_of_neighbours(num_neighbours)
        if vectors.ndim != 2 or not vectors.isfinite().all():
            raise ValueError(f"`vectors` has shape {tuple(vectors.shape)}: pass finite numbers, (num_items, dim).")
        num_items, parts = len(vectors), []
        vectors = torch.nn.functional.normalize(vectors.detach().float().cpu(), dim=-1)
        for rows in torch.arange(num_items).split(max(1, _PAIRS // max(1, num_items))):
            cosines = vectors[rows] @ vectors.T
            cosines[range(len(rows)), rows] = 0.0
            values, columns = cosines.topk(min(num_neighbours, num_items))
            kept = values > 0
            parts.append((rows[:, None].expand_as(values)[kept], columns[kept], values[kept]))
        return cls._from_parts(parts, num_items, decay)

    @classmethod
    def _from_parts(cls, parts: list[tuple[Tensor, Tensor, Tensor]], num_items: int, decay: float) -> ItemNeighbours:
        """From tensors of items, neighbours and similarities, sorted by item."""
        rows, columns, values = (torch.cat(tensors) for tensors in zip(*parts)) if parts else torch.empty(3, 0)
        counts = torch.bincount(rows.long(), minlength=num_items)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        return cls(offsets, columns.int(), values.float(), decay)

    def score(self, histories: Sequence[Sequence[int]]) -> SparseBias:
        r"""
        Score of each item \\( i \\) for a history, \\( \sum_h \gamma^{a(h)} \operatorname{sim}(h, i) \\), with
        `decay` as \\( \gamma \\) and \\( a(h) \\) the age of the history's item \\( h \\), 0 for the newest.

        Args:
            histories (`Sequence[Sequence[int]]`):
                Item indices of each user, oldest first. A history may be empty.

        Returns:
            [`SparseBias`]: The neighbours of each history's items, in ascending order, with their scores in fp64; the
            other items have 0. This takes time in proportion to the number of these neighbours.

        Raises:
            `ValueError`: if a history holds anything but item indices.
        """
        items, lengths = _flatten("histories", histories, self.num_items)
        users, places = ragged_arange(lengths)
        weights = self.decay ** (lengths[users] - 1 - places).double()
        rows, places = ragged_arange(self.offsets[items + 1] - self.offsets[items])
        places = self.offsets[items][rows] + places
        keys, inverse = torch.unique(users[rows] * self.num_items + self.neighbours[places], return_inverse=True)
        # In the order of the history, so that a user has the same sums in every batch
        scores = torch.bincount(inverse, weights=weights[rows] * self.similarities[places], minlength=len(keys))
        counts = torch.bincount(keys // self.num_items, minlength=len(lengths)).tolist()
        return SparseBias((keys % self.num_items).split(counts), scores.split(counts))

    def join(self, other: ItemNeighbours, weights: Tensor) -> ItemNeighbours:
        """
        The neighbours of both, with `decay` of this one. Similarities are added, those of `other` times the weight of
        the neighbour.

        Args:
            other ([`ItemNeighbours`]):
                Neighbours of the same items, such as [`title_neighbours`].
            weights (`torch.Tensor` of shape `(num_items,)`):
                Weight of each item as a neighbour in `other`, at least 0. Those with weight 0 are left out.

        Raises:
            `ValueError`: if the numbers of items differ, or a weight is out of range.
        """
        if {self.num_items, other.num_items, len(weights)} != {self.num_items}:
            raise ValueError(
                f"`other` has {other.num_items} items and `weights` {len(weights)}, but there are {self.num_items}: "
                "pass those of the same catalogue."
            )
        if not (weights.isfinite() & (weights >= 0)).all():
            raise ValueError("`weights` must hold finite numbers, at least 0.")
        rows = torch.cat([torch.arange(self.num_items).repeat_interleave(of.offsets.diff()) for of in (self, other)])
        columns = torch.cat([self.neighbours, other.neighbours]).long()
        values = torch.cat([self.similarities, other.similarities * weights.float()[other.neighbours.long()]])
        pairs, inverse = torch.unique(rows * self.num_items + columns, return_inverse=True)
        rows, columns = pairs // self.num_items, pairs % self.num_items
        sums = torch.bincount(inverse, weights=values, minlength=len(pairs))
        kept = sums > 0
        part = _nearest(rows[kept], columns[kept], sums[kept].float(), self.num_items)
        return self._from_parts([part], self.num_items, self.decay)

    def extend(self, num_items: int) -> ItemNeighbours:
        """The same for a catalogue that has grown: the new items neither have neighbours nor are any."""
        offsets = torch.cat([self.offsets, self.offsets[-1:].expand(num_items - self.num_items)])
        return dataclasses.replace(self, offsets=offsets)


def count_users(sequences: Sequence[Sequence[int]], users: Sequence[Any], num_items: int) -> Tensor:
    """Number of users who have each item, int64 of shape `(num_items,)`. Arguments as for [`ItemNeighbours.fit`]."""
    return torch.bincount(_items_of_users(sequences, users, num_items) % num_items, minlength=num_items)


def _items_of_users(sequences: Sequence[Sequence[int]], users: Sequence[Any], num_items: int) -> Tensor:
    """`user · num_items + item` for each item that a user has, without repeats, in ascending order."""
    if len(sequences) != len(users):
        raise ValueError(f"`users` has {len(users)} entries for {len(sequences)} sequences: pass one for each.")
    items, lengths = _flatten("sequences", sequences, num_items)
    codes = torch.from_numpy(pd.factorize(pd.Series(list(users), dtype=object), use_na_sentinel=False)[0])
    return torch.unique(torch.repeat_interleave(codes, lengths) * num_items + items)


def _check_number_of_neighbours(num_neighbours: int) -> None:
    if num_neighbours < 1:
        raise ValueError(f"`num_neighbours` is {num_neighbours}: it must be at least 1.")


def _flatten(name: str, rows: Sequence[Sequence[int]], num_items: int) -> tuple[Tensor, Tensor]:
    """All items as one tensor, and the length of each list."""
    items, lengths = map(torch.from_numpy, flatten_sequences(rows))
    if len(items) and not 0 <= int(items.min()) <= int(items.max()) < num_items:
        raise ValueError(
            f"`{name}` hold items {items.min()} to {items.max()}, but the catalogue has items 0 to "
            f"{num_items - 1}: pass indices, such as `catalog.indices(ids)`."
        )
    return items, lengths


def _nearest(rows: Tensor, columns: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries with the largest values of each ascending row, largest first."""
    order = values.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    _, ranks = ragged_arange(torch.bincount(rows))
    kept = order[ranks < count]
    return rows[kept], columns[kept], values[kept]
