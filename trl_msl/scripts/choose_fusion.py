# SPDX-License-Identifier: Apache-2.0
"""The parts of a fusion, and their weights: chosen on the validation windows, or taken from an earlier run."""

import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..collaborative import WEIGHTS, Fusion, ItemNeighbours, add_titles, count_users, title_neighbours
from ..evaluation import choose_weights
from .baselines import TOP_K
from .loading import Data
from .searches import Searches, Split, mean_ndcg, rank_without_model


logger = logging.getLogger(__name__)

Tried = Iterator[tuple[dict[str, float], ItemNeighbours]]


@dataclass
class ChoiceArguments:
    """
    Settings and weights to try.

    Parameters:
        vocab_weights, popularity_weights, neighbour_weights, new_item_weights (`list[float]`, *optional*):
            Weights to try, besides 0. Each of the first takes three searches of all validation windows.
        decays, shrinkages (`list[float]`, *optional*):
            `decay` and `shrinkage` of [`ItemNeighbours`] to try.
        title_weights, new_title_weights (`list[float]`, *optional*):
            Weights to try, besides 0, as for [`add_titles`].
        num_neighbours (`int`, *optional*, defaults to `100`):
            Neighbours of each item by users, and as many by titles.
        num_candidates (`int`, *optional*, defaults to `100`):
            Number of items of each validation window that weights are tried on.
    """

    vocab_weights: list[float] = field(
        default_factory=lambda: [0.0, 0.25, 0.5, 1.0], metadata={"help": "Weights of the valid tokens' share to try."}
    )
    popularity_weights: list[float] = field(
        default_factory=lambda: [-1.0, -0.5, -0.25, 0.0, 0.25, 1.0], metadata={"help": "Weights of popularity to try."}
    )
    neighbour_weights: list[float] = field(
        default_factory=lambda: [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0],
        metadata={"help": "Weights of the neighbours to try."},
    )
    new_item_weights: list[float] = field(
        default_factory=lambda: [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
        metadata={"help": "Weights of new items to try."},
    )
    decays: list[float] = field(
        default_factory=lambda: [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], metadata={"help": "Decays of item-kNN to try."}
    )
    shrinkages: list[float] = field(
        default_factory=lambda: [0.0, 1.0, 5**0.5, 5.0], metadata={"help": "Shrinkages of item-kNN to try."}
    )
    title_weights: list[float] = field(
        default_factory=lambda: [0.1, 0.2, 0.4, 0.8], metadata={"help": "Weights of similar titles to try."}
    )
    new_title_weights: list[float] = field(
        default_factory=lambda: [0.2, 0.4, 0.8, 1.6], metadata={"help": "What to add to these for new items."}
    )
    num_neighbours: int = field(default=100, metadata={"help": "Neighbours of each item in item-kNN."})
    num_candidates: int = field(default=100, metadata={"help": "Items per window that weights are tried on."})

    def __post_init__(self):
        for name in ("num_neighbours", "num_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}: it must be at least 1.")
        at_least_0 = ("vocab_weights", "title_weights", "new_title_weights")
        for name in (*(f"{weight}s" for weight in WEIGHTS), *at_least_0[1:]):
            weights = getattr(self, name)
            if not all(map(math.isfinite, weights)) or (name in at_least_0 and min(weights, default=0) < 0):
                least = ", at least 0" if name in at_least_0 else ""
                raise ValueError(f"`{name}` is {weights}: pass finite numbers{least}.")
            setattr(self, name, sorted({0.0, *weights}))
        for name in ("decays", "shrinkages"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is empty: pass at least one number.")


def choose_neighbours(
    args: ChoiceArguments, data: Data, validation: Split, available: list[int]
) -> tuple[Fusion, dict[str, float]]:
    """
    Popularity and neighbours from the training windows, with the settings that are best on validation: first those by
    users, with these the weights of titles, and with these the decay again.
    """
    windows = data.training_windows()
    fusion = Fusion(count_users(*windows))

    def by_users() -> Tried:
        for shrinkage in args.shrinkages:
            fitted = ItemNeighbours.fit(*windows, args.num_neighbours, shrinkage)
            for decay in args.decays:
                yield {"decay": decay, "shrinkage": shrinkage}, dataclasses.replace(fitted, decay=decay)

    def with_titles(neighbours: ItemNeighbours) -> Tried:
        weights = list(itertools.product(args.title_weights, args.new_title_weights))
        try:
            titles = title_neighbours(data.catalog.texts, args.num_neighbours) if any(map(sum, weights)) else None
        except ValueError as error:
            titles = None
            logger.warning("Titles are left out of item-kNN: %s", error)
        for of_all, of_new in weights if titles else [(0.0, 0.0)]:
            settings = {"title_weight": of_all, "new_title_weight": of_new}
            yield settings, add_titles(neighbours, titles, fusion.is_new, **settings)

    def best(tried: Tried) -> tuple[dict[str, float], ItemNeighbours]:
        def ndcg(found: tuple[dict[str, float], ItemNeighbours]) -> float:
            alone = dataclasses.replace(fusion, neighbours=found[1])
            return mean_ndcg(rank_without_model(alone, validation.histories, available), validation)

        return max(tried, key=ndcg)

    def with_decays(neighbours: ItemNeighbours) -> Tried:
        return (({"decay": decay}, dataclasses.replace(neighbours, decay=decay)) for decay in args.decays)

    settings, neighbours = best(by_users())
    for tried in (with_titles, with_decays):
        chosen, neighbours = best(tried(neighbours))
        settings |= chosen
    logger.info("Item-kNN with %s", ", ".join(f"{name} {value:g}" for name, value in settings.items()))
    return dataclasses.replace(fusion, neighbours=neighbours), settings


def fit_earlier(folder: str, data: Data) -> tuple[Fusion, dict[str, float], dict[str, float]]:
    """
    Popularity and neighbours from the training windows, the weights that an earlier run of `fuse` has chosen, and the
    settings of the neighbours.

    Raises:
        `ValueError`: if `folder` is not one of such a run with item-kNN.
    """
    try:
        report = json.loads(Path(folder, "metrics.json").read_text())
        chosen, num_neighbours = report["chosen"], int(report["arguments"]["num_neighbours"])
        weights = {name: float(chosen[name]) for name in WEIGHTS}
        settings = {name: float(chosen[name]) for name in ("decay", "shrinkage", "title_weight", "new_title_weight")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"`weights_from` = {folder!r} has no metrics.json with weights ({error!r}): pass the `output_dir` of a "
            "run of this command without `--scores`."
        ) from error
    windows = data.training_windows()
    fusion = Fusion(count_users(*windows))
    neighbours = ItemNeighbours.fit(*windows, num_neighbours, settings["shrinkage"], settings["decay"])
    of_titles = {name: settings[name] for name in ("title_weight", "new_title_weight")}
    titles = title_neighbours(data.catalog.texts, num_neighbours) if any(of_titles.values()) else None
    neighbours = add_titles(neighbours, titles, fusion.is_new, **of_titles)
    return dataclasses.replace(fusion, neighbours=neighbours), weights, settings


def choose_weights_by_search(
    args: ChoiceArguments, searches: Searches, validation: Split, fusion: Fusion
) -> dict[str, Fusion]:
    """
    The best weights on validation: of `vocab_weight` alone, then also of popularity, of new items, and of all parts.

    Weights are tried on the candidates found by all searches before: for each `vocab_weight`, one by medium weights of
    popularity and neighbours, one by the largest weight of new items and one without any; and searches by the weights
    chosen. The NDCG of the latter decides.
    """
    targets, candidates = validation.targets, {}

    def search(tried: Fusion, top_k: int = TOP_K) -> float:
        """Add candidates to those that are known, and return the NDCG."""
        new, known = searches.candidates(validation, tried, top_k), candidates.get(tried.vocab_weight)
        candidates[tried.vocab_weight] = new if known is None else known.join(new)
        return mean_ndcg(new.items[:, :TOP_K], validation)

    def weighted(vocab_weight: float, weights: Sequence[float]) -> Fusion:
        return dataclasses.replace(fusion, **dict(zip(WEIGHTS, (vocab_weight, *weights))))

    popularity, neighbours = args.popularity_weights, args.neighbour_weights
    new = args.new_item_weights if fusion.is_new.any() else [0.0]
    starts = {
        (popularity[len(popularity) // 2], neighbours[len(neighbours) // 2], 0.0): args.num_candidates,
        (0.0, 0.0, new[-1]): args.num_candidates,
        (0.0, 0.0, 0.0): TOP_K,
    }
    for vocab_weight, (weights, num_candidates) in itertools.product(args.vocab_weights, starts.items()):
        search(weighted(vocab_weight, weights), min(max(num_candidates, TOP_K), len(searches.available)))
    rows = {"vocab-weight": ((), (), ()), "with-popularity": (popularity, (), ())}
    if len(new) > 1:
        rows["with-new-items"] = popularity, (), new
    rows["fused"] = popularity, neighbours, new
    best, chosen = fusion, {}
    for name, grids in rows.items():
        tried = {best: search(best)}
        for _ in range(3):
            found = weighted(*choose_weights(candidates, targets, grids, TOP_K)[:2])
            tried[found] = search(found)
        best = chosen[name] = max(tried, key=tried.get)  # of equal ones the first, which is the simplest
    return chosen
