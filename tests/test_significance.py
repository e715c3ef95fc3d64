# SPDX-License-Identifier: Apache-2.0
"""P-values by enumeration and by hand, and how often a difference is found, by simulation."""

import doctest
import itertools
import math

import numpy as np
import pytest

from trl_msl.evaluation import detectable_difference, holm, sign_flip_p_value, significance


def test_doctests():
    result = doctest.testmod(significance)
    assert (result.failed, result.attempted) == (0, 3)


class TestSignFlip:
    @pytest.mark.parametrize("differences", [[0.5, 0.1, -0.2, 0.4, 0.3, 0.0], [1.0, 1.0, 1.0, -1.0], [0.3]])
    def test_equals_enumeration(self, differences):
        observed = abs(sum(differences)) - 1e-12
        flips = itertools.product((1, -1), repeat=len(differences))
        exact = np.mean([abs(np.dot(signs, differences)) >= observed for signs in flips])
        assert sign_flip_p_value(np.array(differences)) == pytest.approx(exact, abs=0.02)

    def test_known_cases(self):
        assert sign_flip_p_value(np.zeros(5)) == 1
        assert sign_flip_p_value([0.1, 0.2, -0.3]) == 1  # their sum is zero but for rounding
        assert sign_flip_p_value(np.tile([1.0, -1.0], 1500)) == 1
        assert sign_flip_p_value(np.full(40, 0.1)) == 1 / 10_001
        differences = np.random.default_rng(0).normal(0.1, 1, size=3000)
        assert sign_flip_p_value(differences) == sign_flip_p_value(-differences) < 0.001

    def test_of_equal_systems_a_tenth_is_below_a_tenth(self):
        draws = np.random.default_rng(0).normal(size=(400, 30))
        p_values = [sign_flip_p_value(draw, num_permutations=199, seed=seed) for seed, draw in enumerate(draws)]
        assert np.mean(np.array(p_values) <= 0.1) == pytest.approx(0.1, abs=0.045)


def test_holm():
    # 0.005 * 4; 0.01 * 3; 0.03 * 2; 0.04 * 1, which may not fall below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


class TestDetectableDifference:
    def test_is_found_as_often_as_it_says(self):
        """By the sign-flip test, in samples of a few users, many of whom do not differ."""
        rng = np.random.default_rng(0)
        noise = rng.normal(size=(400, 150)) * (rng.random((400, 150)) < 0.3)
        size = detectable_difference(noise.flatten()) * math.sqrt(400)  # for as many users as a sample has
        p_values = [sign_flip_p_value(sample + size, num_permutations=399) for sample in noise]
        assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.8, abs=0.05)

    def test_by_hand(self):
        values = [0.0, 0.4, -0.4, 0.0]  # a variance of 0.32 / 3, and 2.8016 standard errors
        assert detectable_difference(values) == pytest.approx(2.8016 * math.sqrt(0.32 / 3 / 4), abs=1e-4)
        assert detectable_difference(np.array(values) + 7) == pytest.approx(detectable_difference(values))
        assert detectable_difference([0.5, 0.5]) == 0
        for few in ([0.5], [[0.5, 0.5]]):
            with pytest.raises(ValueError, match="`differences` has shape .* pass a number for each of two or more"):
                detectable_difference(few)
