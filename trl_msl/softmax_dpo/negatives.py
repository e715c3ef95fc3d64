# SPDX-License-Identifier: Apache-2.0
"""Rejected items for preference rows: from the whole catalogue, near the target, or the model's own mistakes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data import ItemCatalog, RankingTask
from ..decoding import recommend
from ..trie import CompressedTrie, ItemTrie


logger = logging.getLogger(__name__)

SOURCES = ("uniform", "popular", "near")


def draw_negatives(
    rows: Dataset,
    task: RankingTask,
    source: str = "uniform",
    num_negatives: int = 3,
    popularity: Sequence[float] | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """
    Draw the rejected items of each row: never the target, an item of the history or one with the same text as any of
    these, and no text twice.

    Args:
        rows ([`~datasets.Dataset`]):
            Rows with `item_id` and `history_ids`, as [`build_rows`] makes them.
        task ([`RankingTask`]):
            The items.
        source (`str`, *optional*, defaults to `"uniform"`):
            How to draw: `"uniform"`, all items with the same probability; `"popular"`, in proportion to `popularity`;
            `"near"`, the items that share most of the target's first tokens, at random among equals.
        num_negatives (`int`, *optional*, defaults to `3`):
            Number of items for each row.
        popularity (`Sequence[float]` of length `num_items`, *optional*):
            Weight of each item, for `"popular"`, such as [`count_interactions`] returns. Items of weight 0 are never
            drawn.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.

    Returns:
        `list[list[int]]`: item indices of each row. A warning counts the rows with fewer than `num_negatives`.

    Raises:
        `ValueError`: if an argument is out of range, or a row has no item left to draw.
    """
    if source not in SOURCES:
        raise ValueError(f"`source` is {source!r}: it must be one of {', '.join(map(repr, SOURCES))}.")
    if num_negatives < 1:
        raise ValueError(f"`num_negatives` is {num_negatives}: it must be at least 1.")
    if (source == "popular") != (popularity is not None):
        raise ValueError("`popularity` and source='popular' belong together: pass both or neither.")
    catalog, trie = task.catalog, task.trie
    weights = np.ones(len(catalog)) if popularity is None else np.asarray(popularity, dtype=np.float64)
    if weights.shape != (len(catalog),) or not (np.isfinite(weights).all() and weights.min() >= 0 < weights.max()):
        raise ValueError(f"`popularity` must hold {len(catalog)} finite numbers, none negative and not all 0.")
    rng = np.random.default_rng(seed)
    draw = _NearItems(trie, rng) if source == "near" else _WeightedItems(weights, rng)
    leaves, drawn = trie.item_nodes.tolist(), []
    targets, histories = catalog.indices(rows["item_id"][:]), rows["history_ids"][:]
    for target, ids in zip(targets, tqdm(histories, desc="Drawing negatives", disable=len(targets) < 10_000)):
        taken = {leaves[item] for item in (target, *catalog.indices(ids))}
        drawn.append(_choose(draw(target, taken, num_negatives), leaves, taken, num_negatives))
    _check_drawn(drawn, num_negatives)
    return drawn


def model_negatives(
    model: PreTrainedModel, task: RankingTask, rows: Dataset, num_negatives: int = 3, **kwargs: Any
) -> list[list[int]]:
    """
    The model's own mistakes: the items that it ranks highest, of those that [`draw_negatives`] may draw.

    Args:
        model, task, kwargs:
            As for [`recommend`], without `exclude` and `allowed`.
        rows ([`~datasets.Dataset`]):
            Rows with `prompt`, `item_id` and `history_ids`, as [`build_rows`] makes them.
        num_negatives (`int`, *optional*, defaults to `3`):
            Number of items for each row.

    Returns:
        `list[list[int]]`: item indices of each row, best first. A warning counts the rows with fewer than
        `num_negatives`.

    Raises:
        `ValueError`: if a row has no item left, or for the reasons of [`recommend`].
    """
    catalog, same_text = task.catalog, _SameText(task.trie)
    targets = catalog.indices(rows["item_id"][:])
    exclude = [same_text.expand([t, *catalog.indices(ids)]) for t, ids in zip(targets, rows["history_ids"][:])]
    one_of_each = [items[0] for items in same_text.items.values()]
    top_k = min(len(one_of_each), num_negatives)
    prompts = task.ranking_prompts(rows[:])
    found = recommend(model, task, prompts, top_k=top_k, exclude=exclude, allowed=one_of_each, **kwargs)
    drawn = [[item for item in items if item >= 0] for items in found.items.tolist()]
    _check_drawn(drawn, num_negatives)
    return drawn


def count_interactions(windows: Dataset, catalog: ItemCatalog) -> np.ndarray:
    """
    How often each item occurs in windows of interactions, int64 of shape `(num_items,)`. As the windows of one user
    overlap, interactions in the middle of a long history count several times.
    """
    indices = [index for ids in windows["item_ids"] for index in catalog.indices(ids)]
    return np.bincount(indices, minlength=len(catalog))


def _check_drawn(drawn: list[list[int]], num_negatives: int) -> None:
    """Raise if a row has no negatives, and warn if some have too few."""
    none = [row for row, items in enumerate(drawn) if not items]
    if none:
        raise ValueError(
            f"`rows`: {len(none)} of {len(drawn)} have no item left to reject, the first of them row {none[0]}. "
            "Leave these rows out, or draw from another source."
        )
    num_short = sum(len(items) < num_negatives for items in drawn)
    if num_short:
        logger.warning("%d of %d rows have fewer than %d negatives.", num_short, len(drawn), num_negatives)


class _SameText:
    """Groups of items with the same text, which share a leaf of the trie."""

    def __init__(self, trie: ItemTrie):
        self.of_item = trie.item_nodes.tolist()
        self.items: dict[int, list[int]] = {}
        for item, leaf in enumerate(self.of_item):
            self.items.setdefault(leaf, []).append(item)

    def expand(self, items: list[int]) -> list[int]:
        """The items and all others with their texts."""
        return [same for item in items for same in self.items[self.of_item[item]]]


class _WeightedItems:
    """Draws items by weight, without replacement."""

    def __init__(self, weights: np.ndarray, rng: np.random.Generator):
        self.weights = weights
        self.cumulated = weights.cumsum()
        self.rng = rng

    def __call__(self, target: int, taken: set[int], count: int) -> Iterator[np.ndarray]:
        points = self.rng.random(2 * (count + len(taken))) * self.cumulated[-1]
        yield np.searchsorted(self.cumulated, points, side="right")
        # Few are left: all items, in a random order by weight
        with np.errstate(divide="ignore"):
            keys = np.log(self.rng.random(len(self.weights))) / self.weights
        order = np.argsort(-keys, kind="stable")
        yield order[self.weights[order] > 0]


class _NearItems:
    """Draws items from the smallest subtries that hold the target and other items."""

    def __init__(self, trie: ItemTrie, rng: np.random.Generator):
        tree = CompressedTrie(trie.to("cpu"))
        names = ("item_nodes", "parent", "item_start", "item_end", "item_order", "item_place")
        self.node_of, self.parent, self.start, self.end, self.order, self.place = (
            getattr(tree, name).numpy() for name in names
        )
        self.rng = rng

    def __call__(self, target: int, taken: set[int], count: int) -> Iterator[np.ndarray]:
        node, seen = int(self.node_of[target]), (int(self.place[target]), int(self.place[target]) + 1)
        while node >= 0:
            start, end = int(self.start[node]), int(self.end[node])
            size = (seen[0] - start) + (end - seen[1])
            # Of many items a sample, large enough even if some are taken or have the same text
            picked = self.rng.choice(size, min(size, 4 * count + 2 * len(taken) + 64), replace=False)
            places = start + picked + np.where(picked >= seen[0] - start, seen[1] - seen[0], 0)
            yield self.order[places.astype(np.int64)]
            node, seen = int(self.parent[node]), (start, end)


def _choose(candidates: Iterator[np.ndarray], leaves: list[int], taken: set[int], count: int) -> list[int]:
    """The first `count` candidates whose texts are not `taken`, to which they are added; no more are drawn then."""
    found: list[int] = []
    for items in candidates:
        for item in items.tolist():
            if leaves[item] not in taken:
                taken.add(leaves[item])
                found.append(item)
                if len(found) == count:
                    return found
    return found
