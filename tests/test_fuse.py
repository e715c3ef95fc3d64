# SPDX-License-Identifier: Apache-2.0
"""Weights chosen on candidates, against a naive loop; and the command that fuses a model with neighbours."""

import itertools
import math

import numpy as np
import pytest

from trl_msl.evaluation import Candidates, choose_weights


# ---------------------------------------------------------------------- choosing


def make_candidates(seed: int, num_users: int = 30, num_items: int = 20, num_candidates: int = 9) -> Candidates:
    """Scores in quarters, so that many are equal, and users with fewer candidates than others."""
    rng = np.random.default_rng(seed)
    items = np.stack([rng.permutation(num_items)[:num_candidates] for _ in range(num_users)])
    items[rng.random(items.shape) < 0.2] = -1
    scores = np.where(items < 0, -np.inf, rng.integers(-8, 0, items.shape) / 4)
    return Candidates(items, scores, rng.integers(0, 4, (2, *items.shape)) / 4)


def naive_ndcg(candidates, targets, weights, k):
    """Each user's list sorted in full."""
    total = 0.0
    for user, target in enumerate(targets):
        ranked = []
        for place, item in enumerate(candidates.items[user]):
            if item >= 0:
                score = candidates.scores[user, place]
                for weight, part in zip(weights, candidates.parts):
                    score += weight * part[user, place]
                ranked.append((-score, item))
        ranked = [item for _, item in sorted(ranked)[:k]]
        total += 1 / math.log2(ranked.index(target) + 2) if target in ranked else 0.0
    return total / len(targets)


@pytest.mark.parametrize("seed", range(5))
def test_choosing_equals_a_naive_loop(seed):
    candidates = {0.0: make_candidates(seed), 0.5: make_candidates(seed + 100)}
    targets = np.random.default_rng(seed).integers(0, 20, 30)
    grids, k = [[0.25, 0.5], [-0.5, 1.0, 0.0]], 3
    points = list(itertools.product(candidates, [0.0, 0.25, 0.5], [-0.5, 0.0, 1.0]))
    ndcg = {(value, *weights): naive_ndcg(candidates[value], targets, weights, k) for value, *weights in points}
    chosen = choose_weights(candidates, targets, grids, k)
    assert chosen.ndcg == pytest.approx(max(ndcg.values()))
    best = [point for point in ndcg if ndcg[point] == pytest.approx(chosen.ndcg)]
    simplest = min(best, key=lambda point: (sum(map(bool, point)), sum(map(abs, point))))
    assert (chosen.vocab_weight, *chosen.weights) == simplest
    assert len(set(ndcg.values())) > 3  # else there was nothing to choose


def test_nothing_is_weighted_where_nothing_helps():
    candidates = make_candidates(0)
    chosen = choose_weights({0.0: candidates, 1.0: candidates}, np.full(30, 99), [[0.5], [2.0]])
    assert chosen == (0.0, (0.0, 0.0), 0.0)


def test_candidates_of_two_searches():
    one, other = make_candidates(1), make_candidates(2)
    # What both have found has one score and one value of each part
    values = np.random.default_rng(3).integers(-9, 9, (3, 20)) / 4
    one, other = (Candidates(c.items, values[0][c.items], values[1:, c.items]) for c in (one, other))
    joined = one.join(other)
    for user in range(30):
        found = [item for item in joined.items[user].tolist() if item >= 0]
        assert sorted(found) == sorted({*one.items[user].tolist(), *other.items[user].tolist()} - {-1})
    scores, *parts = np.tile(values[:, None], (1, 30, 1))
    every = Candidates(np.tile(np.arange(20), (30, 1)), scores, np.array(parts))
    every.items[[[item not in row for item in range(20)] for row in joined.items]] = -1
    targets = np.arange(30)
    assert joined.ranks(targets, (0.5, 2.0)).tolist() == every.ranks(targets, (0.5, 2.0)).tolist()
