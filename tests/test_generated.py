# SPDX-License-Identifier: Apache-2.0
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from trl_msl.data.generated import best_possible, generate_catalog, generate_transitions, generate_windows


@pytest.fixture(scope="module")
def catalog():
    return generate_catalog()


@pytest.fixture(scope="module")
def transitions(catalog):
    return generate_transitions(catalog)


@pytest.fixture(scope="module")
def windows(transitions):
    return generate_windows(transitions)


def ndcg_of(windows, score, k=10):
    """NDCG@k by a plain loop; `score(history)` gives every item's score, and items of the history come last."""
    total = 0.0
    for item_ids in windows["item_ids"]:
        *history, target = map(int, item_ids)
        scores = score(history)
        rank = sorted(range(len(scores)), key=lambda item: (item in history, -scores[item])).index(target)
        total += 1 / math.log2(rank + 2) if rank < k else 0.0
    return total / len(windows)


class TestGenerateCatalog:
    def test_titles_are_distinct_and_ids_count_up(self, catalog):
        assert list(catalog) == [str(item) for item in range(150)]
        assert len(set(catalog.values())) == 150

    def test_whole_grammar_is_distinct(self):
        with pytest.raises(ValueError, match="`num_items` is 1000000: it must be from 1 to") as error:
            generate_catalog(num_items=10**6)
        largest = int(str(error.value).split(" to ")[1].split(",")[0])
        assert len(set(generate_catalog(num_items=largest).values())) == largest

    def test_titles_share_prefixes(self, catalog):
        titles = list(catalog.values())
        assert len({title.split()[0] for title in titles}) > 20
        prefixes = [title for title in titles if any(other.startswith(f"{title}:") for other in titles)]
        assert len(prefixes) > len(titles) / 4

    def test_seed(self, catalog):
        assert generate_catalog() == catalog
        assert generate_catalog(seed=1) != catalog


class TestGenerateTransitions:
    def test_rows_are_distributions(self, transitions):
        assert transitions.shape == (150, 150) and transitions.dtype == np.float64
        np.testing.assert_allclose(transitions.sum(axis=1), 1.0)
        assert (transitions[~np.eye(150, dtype=bool)] > 0).all()
        assert not transitions.diagonal().any()

    def test_successors_have_their_mass(self, transitions):
        top = np.sort(transitions, axis=1)[:, -8:].sum(axis=1)
        assert (top > 0.85).all() and top.mean() < 0.95

    def test_next_volume_comes_first(self, catalog, transitions):
        titles = list(catalog.values())
        pairs = [item for item, title in enumerate(titles[:-1]) if titles[item + 1] == f"{title}: Book 2"]
        assert pairs and all(transitions[item].argmax() == item + 1 for item in pairs)

    def test_volumes_share_successors(self, catalog, transitions):
        first = next(item for item, title in enumerate(catalog.values()) if title.endswith(": Book 2")) - 1
        tops = [set(np.argsort(-transitions[item])[:8].tolist()) for item in (first, first + 1)]
        assert len(tops[0] & tops[1]) >= 5

    def test_seed(self, catalog, transitions):
        np.testing.assert_array_equal(generate_transitions(catalog), transitions)
        assert (generate_transitions(catalog, seed=1) != transitions).any()

    def test_smallest_catalogue(self):
        transitions = generate_transitions(generate_catalog(2), num_successors=1)
        np.testing.assert_allclose(transitions, [[0, 1], [1, 0]])

    @pytest.mark.parametrize("num_successors", [0, 150])
    def test_number_of_successors_out_of_range(self, catalog, num_successors):
        with pytest.raises(ValueError, match=f"`num_successors` is {num_successors}: .* less than 150.* Change it or"):
            generate_transitions(catalog, num_successors=num_successors)

    @pytest.mark.parametrize("successor_mass", [1.0, -0.1])
    def test_mass_out_of_range(self, catalog, successor_mass):
        with pytest.raises(ValueError, match=f"`successor_mass` is {successor_mass}: it must be at least 0"):
            generate_transitions(catalog, successor_mass=successor_mass)


class TestGenerateWindows:
    def test_rows(self, catalog, windows):
        assert {name: len(split) for name, split in windows.items()} == {
            "train": 4000,
            "validation": 500,
            "test": 500,
        }
        rows = [row for split in windows.values() for row in split]
        assert {len(row["item_ids"]) for row in rows} == {4, 5, 6}
        assert all(len(set(row["item_ids"])) == len(row["item_ids"]) for row in rows)
        assert {item for row in rows for item in row["item_ids"]} <= set(catalog)
        assert len({row["user_id"] for row in rows}) == 5000

    def test_splits_are_in_order_of_time(self, windows):
        timestamps = [time for name in ("train", "validation", "test") for time in windows[name]["timestamp"]]
        assert all(earlier < later for earlier, later in pairwise(timestamps))

    def test_walks_follow_the_restricted_rows(self):
        # Three items and two steps: the target is always the one item left, the second item follows its row.
        transitions = np.array([[0.0, 0.3, 0.7], [0.5, 0.0, 0.5], [0.9, 0.1, 0.0]])
        walks = generate_windows(transitions, num_users=20_000, history_length=(2, 2))["train"]["item_ids"]
        assert all(sorted(walk) == ["0", "1", "2"] for walk in walks)
        pairs = Counter((int(walk[0]), int(walk[1])) for walk in walks)
        for item in range(3):
            row = np.array([pairs[item, other] for other in range(3)])
            np.testing.assert_allclose(row / row.sum(), transitions[item], atol=0.03)

    def test_seed(self, transitions, windows):
        assert generate_windows(transitions)["test"].to_list() == windows["test"].to_list()
        assert generate_windows(transitions, seed=1)["test"].to_list() != windows["test"].to_list()

    @pytest.mark.parametrize("history_length", [(0, 3), (4, 3), (3, 150)])
    def test_history_length_out_of_range(self, transitions, history_length):
        with pytest.raises(ValueError, match="`history_length` is .*: it must be .* Change it or"):
            generate_windows(transitions, history_length=history_length)

    def test_too_few_users(self, transitions):
        assert [len(split) for split in generate_windows(transitions, num_users=10).values()] == [8, 1, 1]
        with pytest.raises(ValueError, match="`num_users` is 9: it must be at least 10"):
            generate_windows(transitions, num_users=9)


class TestBestPossible:
    def test_equals_a_plain_loop(self, transitions, windows):
        metrics = best_possible(transitions, windows["test"], ks=(1, 10))
        assert list(metrics) == ["hr@1", "ndcg@1", "hr@10", "ndcg@10"]
        for k in (1, 10):
            assert metrics[f"ndcg@{k}"] == pytest.approx(
                ndcg_of(windows["test"], lambda history: transitions[history[-1]], k)
            )
        assert metrics["hr@1"] == pytest.approx(metrics["ndcg@1"])

    def test_values_by_hand(self):
        # Item 2 comes right after item 0 is left out: rank 1 of the row (0, 0.2, 0.3, 0.5), and rank 0 without item 3.
        transitions = np.array([[0.0, 0.2, 0.3, 0.5]] * 4)
        windows = {"item_ids": [["1", "0", "2"], ["3", "0", "2"]]}
        metrics = best_possible(transitions, windows, ks=(1, 2))
        assert metrics == pytest.approx(
            {"hr@1": 0.5, "ndcg@1": 0.5, "hr@2": 1.0, "ndcg@2": (1 + 1 / math.log2(3)) / 2}
        )

    def test_is_far_above_popularity_and_chance(self, transitions, windows):
        best = best_possible(transitions, windows["test"])["ndcg@10"]
        counts = Counter(int(item) for item_ids in windows["train"]["item_ids"] for item in item_ids)
        popularity = ndcg_of(windows["test"], lambda history: [counts[item] for item in range(150)])
        rng = np.random.default_rng(0)
        chance = ndcg_of(windows["test"], lambda history: rng.random(150))
        assert 0.5 < best < 0.7
        assert best > 4 * popularity > 4 * chance
