# SPDX-License-Identifier: Apache-2.0
"""Searches for the same users by several weights, each made only once, even if the run is interrupted."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from ..collaborative import WEIGHTS, Fusion
from ..data import ItemCatalog, RankingTask, read_table
from ..decoding import Recommendations, SparseBias, TrieDecoder, recommend
from ..evaluation import Candidates, ranking_metrics, ranks_of_targets
from ..trie import replacing
from .baselines import TOP_K, fill, score_by_neighbours
from .evaluate import DECODINGS
from .loading import Data
from .recommend import silent


logger = logging.getLogger(__name__)
_USERS = 1024  # whose scores by neighbours are in memory at a time


@dataclass(frozen=True, eq=False)
class Split:
    """
    The windows of a split, as the searches need them.

    Args:
        name (`str`):
            Name of the split.
        prompts (`list`):
            A prompt for each window.
        histories (`list[list[int]]`):
            Item indices of each history.
        target_ids (`list[str]`), targets (`np.ndarray` of shape `(num_rows,)`, int64):
            Ids and indices of the targets.
        is_cold (`np.ndarray` of shape `(num_rows,)`, bool, *optional*):
            Whether no training window holds the target, if that is known.
    """

    name: str
    prompts: list
    histories: list[list[int]]
    target_ids: list[str]
    targets: np.ndarray
    is_cold: np.ndarray | None

    @classmethod
    def from_data(cls, data: Data, name: str, task: RankingTask) -> "Split":
        rows = data.rows(name, task)
        ids, seen = rows["item_id"][:], data.seen_items
        histories = [task.catalog.indices(history) for history in rows["history_ids"]]
        is_cold = None if seen is None else np.array([item not in seen for item in ids])
        return cls(name, task.ranking_prompts(rows[:]), histories, ids, np.array(task.catalog.indices(ids)), is_cold)


class ScoredWindows:
    """
    Another model's scores in place of [`ItemNeighbours`], for the histories that it has scored. Those of each history
    are scaled to lie between 0, the score of items that are not listed, and 1.
    """

    def __init__(self, folder: Path, splits: list[Split], catalog: ItemCatalog):
        self.num_items, self._scores = len(catalog), {}
        for split in splits:
            path = folder / f"scores_{split.name}.parquet"
            table, _ = read_table(path, ["item_ids", "scores"])
            is_same = len(table) == len(split.histories)
            if split.name == "test":
                rankings, _ = read_table(folder / "rankings.parquet", ["item_id"])
                is_same &= rankings["item_id"].tolist() == split.target_ids
            if not is_same:
                raise ValueError(
                    f"{path} has scores of other windows than the {len(split.histories)} of the {split.name} split: "
                    "run `trl-msl baselines` with the same data options."
                )
            for history, ids, scores in zip(split.histories, table["item_ids"], table["scores"]):
                items, scores = np.array(catalog.indices(ids), dtype=np.int64), np.asarray(scores, dtype=np.float32)
                low, high = (scores.min(), scores.max()) if len(scores) else (0, 0)
                scaled = (scores - low) / (high - low) if high > low else np.ones_like(scores)
                self._scores[tuple(history)] = torch.from_numpy(items), torch.from_numpy(scaled)

    def score(self, histories: list[list[int]]) -> SparseBias:
        return SparseBias(*zip(*(self._scores[tuple(history)] for history in histories)))


@dataclass
class Found(Recommendations):
    """What a search found, and how long it took."""

    seconds: float = 0.0


class Searches:
    """
    A model's exact searches, by the scores of a [`Fusion`], and its beams.

    Args:
        model ([`~transformers.PreTrainedModel`]), task ([`RankingTask`]):
            As for [`recommend`].
        folder (`Path`):
            Where results are kept for a run that resumes.
        max_expansions, batch_size (`int`):
            As for [`recommend`].
    """

    def __init__(self, model: PreTrainedModel, task: RankingTask, folder: Path, max_expansions: int, batch_size: int):
        self.task, self.folder, self.max_expansions = task, folder, max_expansions
        self.decoder = TrieDecoder(model, task.trie)
        self.settings = {"batch_size": batch_size, "decoder": self.decoder}
        self.available = [i for i, item in enumerate(task.catalog.ids) if item not in task.withdrawn]
        if task.withdrawn:
            self.settings["allowed"] = self.decoder.prepare_allowed(self.available)
        self._found: dict[str, Found] = {}

    def find(self, split: Split, fusion: Fusion | None, top_k: int) -> Found:
        """
        The best `top_k` items of each user of a split; without `fusion`, those that as many beams find by the
        probability over the vocabulary.
        """
        score = "beam-vocab"
        if fusion is not None:
            score = "_".join(str(getattr(fusion, weight)) for weight in WEIGHTS)
        name = f"{split.name}_{top_k}_{score}"
        if name not in self._found:
            self._found[name] = self._search(self.folder / f"{name}.npz", split, fusion, top_k)
        return self._found[name]

    def _search(self, path: Path, split: Split, fusion: Fusion | None, top_k: int) -> Found:
        if path.exists():
            return Found(**np.load(path))
        if fusion is None:
            score, arguments = "beams", DECODINGS["beam-vocab"]
        else:
            score = ", ".join(f"{weight} {getattr(fusion, weight):g}" for weight in WEIGHTS)
            arguments = fusion.arguments(split.histories) | {"max_expansions": self.max_expansions}
        logger.info("%s, top %d by %s", split.name.capitalize(), top_k, score)
        started = time.perf_counter()
        found = recommend(self.decoder.model, self.task, split.prompts, top_k, **arguments, **self.settings)
        known = {name: value for name, value in vars(found).items() if value is not None}
        found = Found(**known, seconds=time.perf_counter() - started)
        if PartialState().is_main_process:
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, **known, seconds=found.seconds)
        return found

    def candidates(self, split: Split, fusion: Fusion, top_k: int) -> Candidates:
        """What [`Searches.find`] finds, as candidates for other weights of what is added to the model's score."""
        with silent("trl_msl.decoding"):  # candidates need not be certain to be the best
            found = self.find(split, fusion, top_k)
        parts = np.zeros((3, *found.items.shape))
        parts[0], parts[2] = (part.numpy()[found.items] for part in (fusion.log_popularity, fusion.is_new))
        for start in range(0, len(found.items), _USERS):
            chunk = slice(start, start + _USERS)
            scores = fusion.neighbour_scores(split.histories[chunk])
            parts[1, chunk] = values_of(scores, found.items[chunk], fusion.num_items)
        weights = [getattr(fusion, weight) for weight in WEIGHTS[1:]]
        return Candidates(found.items, found.scores - np.tensordot(weights, parts, axes=1), parts)


def mean_ndcg(items: np.ndarray, split: Split) -> float:
    """NDCG@10 of each user's recommended items."""
    return ranking_metrics(ranks_of_targets(items, split.targets), (TOP_K,))[f"ndcg@{TOP_K}"]


def values_of(sparse: SparseBias, items: np.ndarray, num_items: int) -> np.ndarray:
    """Value of each item for its user, 0 where there is none: shape `(num_users, num_columns)`, as `items`."""
    values = np.zeros(items.shape)
    for row, wanted, known, of_known in zip(values, items, sparse.items, sparse.values):
        of_all = np.zeros(num_items + 1)  # the last one is that of -1
        of_all[np.asarray(known, dtype=np.int64)] = of_known
        row[:] = of_all[wanted]
    return values


def rank_without_model(fusion: Fusion, histories: list[list[int]], available: Sequence[int]) -> np.ndarray:
    """The items with the best scores by neighbours, if there are any, then the most popular ones, as baselines do."""
    popular, is_available = fusion.most_popular(2 * TOP_K, available)[0], np.zeros(fusion.num_items, dtype=bool)
    is_available[available] = True
    ranked = [np.array([], dtype=np.int64)] * len(histories)
    for start in range(0, len(histories) if fusion.neighbours else 0, _USERS):
        chunk = slice(start, start + _USERS)
        items, _ = score_by_neighbours(fusion.neighbours, histories[chunk], fusion.num_items)
        ranked[chunk] = [row[is_available[row]] for row in items]
    return fill(ranked, np.array(popular))
