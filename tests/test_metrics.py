# SPDX-License-Identifier: Apache-2.0
import doctest
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_msl.evaluation import metrics
from trl_msl.evaluation.metrics import (
    bootstrap_interval,
    coverage,
    per_user_metrics,
    ranking_metrics,
    ranks_of_targets,
)


rank_lists = st.lists(st.integers(-1, 30), min_size=1, max_size=20)
cutoffs = st.integers(1, 40)


def test_doctests():
    result = doctest.testmod(metrics)
    assert result.failed == 0
    assert result.attempted >= 5


class TestRanksOfTargets:
    def test_hand_derived(self):
        recommended = np.array([[3, 1, 2], [0, 2, 4], [5, -1, -1], [-1, -1, -1]])
        # 3 is first; 4 is third; 5 comes before empty places; nothing was recommended; see the columns above.
        assert ranks_of_targets(recommended, np.array([3, 4, 5, 0])).tolist() == [0, 2, 0, -1]

    def test_no_users_have_no_ranks(self):
        assert ranks_of_targets(np.empty((0, 5), dtype=int), np.empty(0, dtype=int)).tolist() == []

    @given(st.data())
    def test_equals_list_index(self, data):
        k, num_users = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
        row = st.permutations(range(8)).map(lambda items: items[:k])
        recommended = data.draw(st.lists(row, min_size=num_users, max_size=num_users))
        targets = data.draw(st.lists(st.integers(0, 9), min_size=num_users, max_size=num_users))
        expected = [
            row.index(target) if target in row else -1 for row, target in zip(recommended, targets, strict=True)
        ]
        assert ranks_of_targets(recommended, targets).tolist() == expected

    @pytest.mark.parametrize(
        ("recommended", "targets", "match"),
        [
            ([[1, 2], [3, 3]], [1, 3], r"item twice in 1 rows \(the first: row 1, \[3, 3\]\)"),
            ([[1, 2, -1, 1]], [1], "item twice"),
            ([[1, 2]], [1, 2], "`targets` has 2 entries for 1 rows of `recommended`"),
            ([[1, 2], [3, -1]], [1, -1], r"`targets` has 1 negative entries \(the first in row 1\)"),
            ([[1, -2]], [1], "`recommended` holds -2"),
            ([1, 2], [1, 2], r"`recommended` has shape \(2,\) of int64: pass a 2-dimensional array of integers"),
            ([[1.0, 2.0]], [1], "`recommended` has .* float64: pass .* integers"),
            ([[1, 2]], [True], "`targets` has .* bool: pass .* integers"),
            (np.empty((2, 0), dtype=int), [1, 1], "at least one item per user"),
        ],
    )
    def test_errors(self, recommended, targets, match):
        with pytest.raises(ValueError, match=match):
            ranks_of_targets(recommended, targets)


class TestRankingMetrics:
    def test_hand_derived(self):
        # Ranks 0, 1, 7 and a miss, that is places 1, 2 and 8:
        #   k=5:  HR = 2/4;  NDCG = (1/log2(2) + 1/log2(3)) / 4;  MRR = (1/1 + 1/2) / 4 = 0.375
        #   k=10: HR = 3/4;  NDCG adds 1/log2(9), where log2(9) = 2 log2(3);  MRR adds 1/8, so 1.625 / 4 = 0.40625
        log2_of_3 = 1.584962500721156
        expected = {
            "hr@5": 0.5,
            "ndcg@5": (1 + 1 / log2_of_3) / 4,
            "mrr@5": 0.375,
            "hr@10": 0.75,
            "ndcg@10": (1 + 1 / log2_of_3 + 0.5 / log2_of_3) / 4,
            "mrr@10": 0.40625,
        }
        result = ranking_metrics(np.array([0, 1, 7, -1]))
        assert list(result) == list(expected)
        assert result == pytest.approx(expected, rel=1e-12)

    def test_last_place_counts_and_the_next_does_not(self):
        assert per_user_metrics([4, 5], ks=(5,))["hr@5"].tolist() == [1, 0]

    def test_narrow_integers_do_not_overflow(self):
        assert ranking_metrics(np.array([127], dtype=np.int8), ks=(128,))["mrr@128"] == 1 / 128

    @given(rank_lists, cutoffs)
    def test_equals_slow_loop(self, ranks, k):
        for user, rank in enumerate(ranks):
            hit, ndcg, mrr = 0.0, 0.0, 0.0
            for place in range(k):
                if place == rank:
                    hit, ndcg, mrr = 1.0, 1 / math.log2(place + 2), 1 / (place + 1)
            values = per_user_metrics(ranks, ks=(k,))
            assert values[f"hr@{k}"][user] == hit
            assert values[f"ndcg@{k}"][user] == pytest.approx(ndcg)
            assert values[f"mrr@{k}"][user] == mrr

    @given(rank_lists, cutoffs)
    def test_ranking_metrics_is_the_mean_of_per_user_metrics(self, ranks, k):
        for name, values in per_user_metrics(ranks, ks=(k,)).items():
            assert values.shape == (len(ranks),)
            assert ranking_metrics(ranks, ks=(k,))[name] == pytest.approx(sum(values) / len(ranks))

    @given(rank_lists, cutoffs)
    def test_never_falls_with_k(self, ranks, k):
        values = per_user_metrics(ranks, ks=(k, k + 1))
        for name in ("hr", "ndcg", "mrr"):
            assert (values[f"{name}@{k}"] <= values[f"{name}@{k + 1}"]).all()

    @given(rank_lists, cutoffs)
    def test_hit_rate_bounds_ndcg_bounds_mrr(self, ranks, k):
        # 1 <= log2(r + 2) <= r + 1 for r >= 0, with equality of the last two at r = 0 only up to rounding.
        values = per_user_metrics(ranks, ks=(k,))
        assert (values[f"hr@{k}"] <= 1).all()
        assert (values[f"hr@{k}"] >= values[f"ndcg@{k}"]).all()
        assert (values[f"ndcg@{k}"] >= values[f"mrr@{k}"]).all()
        assert (values[f"mrr@{k}"] >= 0).all()

    def test_warm_and_cold(self):
        """Each group has the metrics that it would have alone."""
        ranks, is_cold = np.array([0, 3, -1, 1, 6]), np.array([False, True, True, False, False])
        result = ranking_metrics(ranks, (2, 5), confidence=0.9, is_cold=is_cold)
        assert (result["num_warm"], result["num_cold"]) == (3, 2)
        for group, chosen in (("warm", [0, 1, 6]), ("cold", [3, -1])):
            alone = ranking_metrics(chosen, (2, 5), confidence=0.9)
            for metric in ("hr@2", "ndcg@2", "hr@5", "ndcg@5"):
                assert result[f"{metric}_{group}"] == alone[metric]
                for end in ("low", "high"):
                    assert result[f"{metric}_{group}_{end}"] == alone[f"{metric}_{end}"]
        assert ranking_metrics(ranks, (2, 5), confidence=0.9).items() < result.items()
        only_warm = ranking_metrics([0, 1], (5,), is_cold=[False, False])
        assert only_warm["num_cold"] == 0 and "ndcg@5_cold" not in only_warm
        with pytest.raises(ValueError, match=r"`is_cold` has shape \(1,\) for ranks of shape \(2,\)"):
            ranking_metrics([0, 1], is_cold=[True])

    @given(rank_lists)
    def test_all_agree_at_one(self, ranks):
        result = ranking_metrics(ranks, ks=(1,))
        assert result["hr@1"] == result["ndcg@1"] == result["mrr@1"] == ranks.count(0) / len(ranks)

    @pytest.mark.parametrize(
        ("ranks", "ks", "match"),
        [
            ([], (5,), "`ranks` is empty"),
            ([0, -2], (5,), "`ranks` holds -2: pass 0-based ranks"),
            ([0.0], (5,), "`ranks` has .* float64: pass .* integers"),
            ([[0]], (5,), r"`ranks` has shape \(1, 1\) .* pass a 1-dimensional"),
            ([0], (), r"`ks` is \(\): pass cut-offs of at least 1"),
            ([0], (5, 0), r"`ks` is \(5, 0\): pass cut-offs of at least 1"),
            ([0], 5, r"`ks` has shape \(\) .* pass a 1-dimensional array"),
        ],
    )
    def test_errors(self, ranks, ks, match):
        with pytest.raises(ValueError, match=match):
            ranking_metrics(ranks, ks=ks)


class TestBootstrapInterval:
    def test_equals_slow_loop_across_chunks(self):
        values = np.random.default_rng(1).random(2**17)  # 8 resamples fit in a chunk, so 20 need three
        rng = np.random.default_rng(7)
        means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(20)]
        expected = np.percentile(means, [5, 95])
        assert bootstrap_interval(values, confidence=0.9, num_resamples=20, seed=7) == pytest.approx(tuple(expected))

    def test_has_the_width_of_the_central_limit_theorem(self):
        # Half of 10,000 values are 1: the standard error is 0.5 / sqrt(10,000) = 0.005, so 95% is 0.5 -+ 1.96 * 0.005.
        lower, upper = bootstrap_interval([0, 1] * 5000, num_resamples=4000)
        assert (lower, upper) == pytest.approx((0.4902, 0.5098), abs=8e-4)

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 100))
    def test_lies_within_the_values_and_widens_with_confidence(self, values, seed):
        narrow = bootstrap_interval(values, confidence=0.5, num_resamples=50, seed=seed)
        wide = bootstrap_interval(values, confidence=0.9, num_resamples=50, seed=seed)
        assert min(values) - 1e-12 <= wide[0] <= narrow[0] <= narrow[1] <= wide[1] <= max(values) + 1e-12

    def test_seed_decides(self):
        values = np.arange(50)
        assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
        assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"values": []}, r"`values` has shape \(0,\): pass a non-empty"),
            ({"values": [[1.0]]}, r"`values` has shape \(1, 1\): pass .* one-dimensional"),
            ({"values": [1.0, math.nan]}, "`values` .* finite"),
            ({"values": [1.0], "confidence": 95}, "`confidence` is 95: it must lie strictly between 0 and 1"),
            ({"values": [1.0], "num_resamples": 0}, "`num_resamples` is 0: it must be at least 1"),
        ],
    )
    def test_errors(self, arguments, match):
        with pytest.raises(ValueError, match=match):
            bootstrap_interval(**arguments)


class TestCoverage:
    @given(st.lists(st.lists(st.integers(-1, 6), min_size=3, max_size=3), min_size=1, max_size=6))
    def test_equals_set_of_items(self, recommended):
        items = {item for row in recommended for item in row} - {-1}
        assert coverage(recommended, num_items=7) == pytest.approx(len(items) / 7)

    @pytest.mark.parametrize(
        ("recommended", "num_items", "match"),
        [
            ([[0, 4]], 4, "`recommended` holds item 4, but `num_items` is 4"),
            ([[0]], 0, "`num_items` is 0: it must be at least 1"),
            ([[-3]], 4, "`recommended` holds -3"),
        ],
    )
    def test_errors(self, recommended, num_items, match):
        with pytest.raises(ValueError, match=match):
            coverage(recommended, num_items)


def test_interval_over_groups():
    """Resampling groups of one is resampling users; a group of many users is one draw."""
    values = np.random.default_rng(0).normal(size=40)
    assert bootstrap_interval(values, groups=np.arange(40)) == pytest.approx(bootstrap_interval(values))
    few = np.repeat([0.0, 1.0], [30, 10])
    low, high = bootstrap_interval(few, groups=["a"] * 30 + ["b"] * 10)
    assert (low, high) == (0, 1) and bootstrap_interval(few)[1] < 0.5
    means = [few[np.concatenate([np.flatnonzero(np.repeat([0, 1], [30, 10]) == g) for g in draw])].mean()
             for draw in ((0, 0), (0, 1), (1, 1))]  # fmt: skip
    assert means == [0, 0.25, 1]
    assert bootstrap_interval(few, 0.2, groups=[0] * 30 + [1] * 10) == (0.25, 0.25)
    with pytest.raises(ValueError, match="`groups` has 2 entries for 40 `values`"):
        bootstrap_interval(values, groups=["a", "b"])
