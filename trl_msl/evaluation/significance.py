# SPDX-License-Identifier: Apache-2.0
"""Whether a mean difference between two systems may be chance, and how large a difference would have shown."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


def sign_flip_p_value(differences: np.ndarray, num_permutations: int = 10_000, seed: int = 0) -> float:
    """
    Two-sided p-value of a paired randomisation test, with the mean difference as its statistic.

    If two systems are equally good, each user's difference could as well have had the other sign. So signs are flipped
    at random, and the p-value is the share of means at least as far from zero as the observed one (Smucker, Allan and
    Carterette, A Comparison of Statistical Significance Tests for Information Retrieval Evaluation, CIKM 2007), which
    counts as one of them, so that no p-value is 0 (Phipson and Smyth, 2010).

    Args:
        differences (`np.ndarray` of shape `(num_users,)`):
            Metric of one system minus that of the other, per user.
        num_permutations, seed (`int`, *optional*, defaults to `10_000` and `0`):
            Number of random flips, and their seed.

    Example: of two users' four equally likely flips, two have a mean as far from zero.

    ```python
    >>> round(sign_flip_p_value([0.5, 0.5]), 1)
    0.5

    ```
    """
    differences = np.asarray(differences, dtype=np.float64)
    differences = differences[differences != 0]  # the sign of 0 does not matter
    total, tolerance = differences.sum(), 1e-12 * np.abs(differences).sum()  # sums in another order are still ties
    rng = np.random.default_rng(seed)
    per_chunk = max(1, 2**20 // max(1, len(differences)))  # 8 MiB of signs
    count = 0
    for start in range(0, num_permutations, per_chunk):
        shape = (min(per_chunk, num_permutations - start), len(differences))
        kept = rng.integers(2, size=shape, dtype=np.int8) @ differences
        count += int((np.abs(2 * kept - total) >= abs(total) - tolerance).sum())
    return (count + 1) / (num_permutations + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """
    Correct p-values for their number: the smallest of m is multiplied by m, the next one by m - 1, and so on, at most
    1 and never below the one before (Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979).

    Example:

    ```python
    >>> holm([0.25, 0.125, 0.75])
    [0.5, 0.375, 0.75]

    ```
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p_values, dtype=float)[order] * factors))
    return corrected.tolist()


def detectable_difference(differences: ArrayLike, significance: float = 0.05, power: float = 0.8) -> float:
    """
    Size of a true mean difference that a two-sided paired test of as many users would find with probability `power`:
    `(z(1 - significance / 2) + z(power))` standard errors of the mean, by default 2.80, where `z` are quantiles of the
    normal distribution. What is much smaller, such a comparison most often misses.

    Args:
        differences (`np.ndarray` of shape `(num_users,)`):
            Metric of one system minus that of the other, per user. Only their spread counts.
        significance, power (`float`, *optional*, default to `0.05` and `0.8`):
            Largest p-value that counts as a find, and how probable a find is to be.

    Raises:
        `ValueError`: for fewer than two users, which have no spread.

    Example: a standard deviation of 1 over 100 users is a standard error of 0.1.

    ```python
    >>> round(detectable_difference([-0.995, 0.995] * 50), 2)
    0.28

    ```
    """
    differences = np.asarray(differences, dtype=np.float64)
    if differences.ndim != 1 or len(differences) < 2:
        raise ValueError(f"`differences` has shape {differences.shape}: pass a number for each of two or more users.")
    z = NormalDist().inv_cdf
    standard_error = differences.std(ddof=1) / np.sqrt(len(differences))
    return float((z(1 - significance / 2) + z(power)) * standard_error)
