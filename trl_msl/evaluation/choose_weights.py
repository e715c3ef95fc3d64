# SPDX-License-Identifier: Apache-2.0
"""Weights of a score's parts, chosen by reranking the candidates of searches that have been made already."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .metrics import per_user_metrics


@dataclass(frozen=True, eq=False)
class Candidates:
    """
    Items among which those with the best weighted scores are, and the parts of these scores.

    Args:
        items (`np.ndarray` of shape `(num_users, num_candidates)`, integer):
            Item indices of each user, each at most once, in any order; `-1` where there is none.
        scores (`np.ndarray` of shape `(num_users, num_candidates)`):
            Score of each item without the parts that are weighted, such as its log-probability.
        parts (`np.ndarray` of shape `(num_parts, num_users, num_candidates)`):
            What is weighted and added, such as the logarithm of the item's popularity; finite.
    """

    items: np.ndarray
    scores: np.ndarray
    parts: np.ndarray

    def join(self, other: Candidates) -> Candidates:
        """The candidates of both, for the same users."""
        items = np.concatenate([self.items, other.items], axis=1)
        order = np.argsort(items, axis=1, kind="stable")
        ordered = np.take_along_axis(items, order, axis=1)
        is_repeated = np.zeros_like(items, dtype=bool)
        np.put_along_axis(is_repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        scores, parts = (
            np.concatenate(pair, axis=-1) for pair in ((self.scores, other.scores), (self.parts, other.parts))
        )
        return Candidates(np.where(is_repeated, -1, items), scores, parts)

    def ranks(self, targets: np.ndarray, weights: Sequence[float]) -> np.ndarray:
        """
        0-based rank of each user's target by `scores + Σ weight · part`, equal ones by index as in a search; `-1`
        where the target is no candidate.

        Args:
            targets (`np.ndarray` of shape `(num_users,)`, integer):
                Index of each user's target.
            weights (`Sequence[float]` of length `num_parts`):
                Weights of the parts.
        """
        scores = self.scores + np.tensordot(np.asarray(weights, dtype=self.parts.dtype), self.parts, axes=1)
        scores, targets = np.where(self.items < 0, -np.inf, scores), targets[:, None]
        is_target = self.items == targets
        of_target = np.where(is_target, scores, -np.inf).max(axis=1, keepdims=True)
        is_before = (scores > of_target) | ((scores == of_target) & (self.items < targets))
        return np.where(is_target.any(axis=1), is_before.sum(axis=1), -1)


class Choice(NamedTuple):
    """The best weights, from [`choose_weights`], and the NDCG of the candidates reranked by them."""

    vocab_weight: float
    weights: tuple[float, ...]
    ndcg: float


def choose_weights(
    candidates: Mapping[float, Candidates], targets: np.ndarray, grids: Sequence[Sequence[float]], k: int = 10
) -> Choice:
    """
    Try all combinations of weights on the candidates of all values of `vocab_weight`. Of equally good ones the
    simplest is chosen: with the most zeros, then with the smallest sum of absolute values.

    A target that is no candidate counts as a miss, and an item that is none takes no place, so the NDCG is
    approximate where candidates were found by weights far from those tried: search again by the weights chosen, and
    choose again from what both have found.

    Args:
        candidates (`Mapping[float, Candidates]`):
            Candidates of the same users, for each value of `vocab_weight`, which their scores depend on.
        targets (`np.ndarray` of shape `(num_users,)`, integer):
            Index of each user's target.
        grids (`Sequence[Sequence[float]]` of length `num_parts`):
            Weights to try for each part. Weight 0 is always tried.
        k (`int`, *optional*, defaults to `10`):
            Cut-off of NDCG@k.

    Returns:
        [`Choice`]: The best weights.

    Example:

    The target, item 7, is second by its score, and first as soon as its part counts:

    ```python
    >>> found = Candidates(np.array([[4, 7]]), np.array([[-1.0, -2.0]]), np.array([[[0.0, 3.0]]]))
    >>> choose_weights({0.0: found}, np.array([7]), grids=[[0.5, 1.0]])
    Choice(vocab_weight=0.0, weights=(0.5,), ndcg=1.0)

    ```
    """
    points = itertools.product(candidates, *(sorted({0.0, *grid}) for grid in grids))
    simplest_first = sorted(points, key=lambda point: (sum(map(bool, point)), sum(map(abs, point))))
    best = None
    for vocab_weight, *weights in simplest_first:
        ranks = candidates[vocab_weight].ranks(targets, weights)
        ndcg = float(per_user_metrics(ranks, (k,))[f"ndcg@{k}"].mean())
        if best is None or ndcg > best.ndcg + 1e-12:  # means of the same values in another order
            best = Choice(vocab_weight, tuple(weights), ndcg)
    return best
