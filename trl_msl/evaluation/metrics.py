# SPDX-License-Identifier: Apache-2.0
"""Hit rate, NDCG and MRR from ranks.

Each user has exactly one relevant item, the target, whose 0-based rank in the recommended list is all that the metrics
need: `recommended -> ranks_of_targets -> per_user_metrics -> mean or bootstrap_interval`.
"""

import numpy as np
from numpy.typing import ArrayLike


def ranks_of_targets(recommended: ArrayLike, targets: ArrayLike) -> np.ndarray:
    """
    Find each user's target in the list recommended to that user.

    Args:
        recommended (`np.ndarray` of shape `(num_users, k)`, integer):
            Item indices, best first; `-1` marks a place without an item.
        targets (`np.ndarray` of shape `(num_users,)`, integer):
            Index of each user's target.

    Returns:
        `np.ndarray` of shape `(num_users,)`, int64: the target's 0-based column, or `-1` where it was not recommended.

    Example:

    The first user's target, 4, is in second place; the second user's target, 9, is absent:

    ```python
    >>> ranks_of_targets([[7, 4, 1], [2, 0, -1]], targets=[4, 9])
    array([ 1, -1])

    ```
    """
    recommended = _recommended(recommended)
    targets = _integers(targets, "targets", ndim=1)
    if len(targets) != len(recommended):
        raise ValueError(
            f"`targets` has {len(targets)} entries for {len(recommended)} rows of `recommended`: pass one per row."
        )
    if (targets < 0).any():
        raise ValueError(
            f"`targets` has {(targets < 0).sum()} negative entries (the first in row {np.argmax(targets < 0)}), which "
            "would match empty places: leave out users without a target."
        )
    ordered = np.sort(recommended, axis=1)
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if repeated.any():
        row = np.argmax(repeated)
        raise ValueError(
            f"`recommended` holds an item twice in {repeated.sum()} rows (the first: row {row}, "
            f"{recommended[row].tolist()}), which would make later ranks too low: remove repeats."
        )
    is_target = recommended == targets[:, None]
    return np.where(is_target.any(axis=1), is_target.argmax(axis=1), -1)


def per_user_metrics(ranks: ArrayLike, ks: tuple[int, ...] = (5, 10)) -> dict[str, np.ndarray]:
    """
    HR@k, NDCG@k and MRR@k of every user.

    With the target at 0-based rank `r < k`, HR@k (which is Recall@k) is 1, NDCG@k is `1 / log2(r + 2)` and MRR@k is
    `1 / (r + 1)`; otherwise all three are 0. So `hr >= ndcg >= mrr`, and none falls as `k` grows.

    Args:
        ranks (`np.ndarray` of shape `(num_users,)`, integer):
            Ranks from [`ranks_of_targets`]; `-1` is a miss.
        ks (`tuple[int, ...]`, *optional*, defaults to `(5, 10)`):
            Cut-offs. A `k` beyond the length of the lists, which ranks do not tell, counts as that length.

    Returns:
        `dict[str, np.ndarray]`: arrays of shape `(num_users,)`, float64, under `"hr@5"`, `"ndcg@5"`, `"mrr@5"`, ...

    Example:

    First place counts 1, third place `1 / log2(4)`, and a rank of 5 is beyond the cut-off:

    ```python
    >>> per_user_metrics([0, 2, 5, -1], ks=(5,))["ndcg@5"]
    array([1. , 0.5, 0. , 0. ])

    ```
    """
    ranks = _integers(ranks, "ranks", ndim=1)
    if (ranks < -1).any():
        raise ValueError(f"`ranks` holds {ranks.min()}: pass 0-based ranks, and -1 for a miss (`ranks_of_targets`).")
    cutoffs = _integers(ks, "ks", ndim=1)
    if len(cutoffs) == 0 or (cutoffs < 1).any():
        raise ValueError(f"`ks` is {ks}: pass cut-offs of at least 1, such as (5, 10).")
    rank = np.maximum(ranks, 0)  # a miss has no place: `hit` leaves it out
    metrics = {}
    for k in cutoffs.tolist():
        hit = (ranks >= 0) & (ranks < k)
        metrics[f"hr@{k}"] = hit.astype(np.float64)
        metrics[f"ndcg@{k}"] = np.where(hit, 1 / np.log2(rank + 2), 0.0)
        metrics[f"mrr@{k}"] = np.where(hit, 1 / (rank + 1), 0.0)
    return metrics


def ranking_metrics(
    ranks: ArrayLike,
    ks: tuple[int, ...] = (5, 10),
    confidence: float | None = None,
    is_cold: ArrayLike | None = None,
) -> dict[str, float]:
    """
    Means of [`per_user_metrics`] over the users, and over those with warm and those with cold targets.

    Args:
        ranks, ks:
            As for [`per_user_metrics`].
        confidence (`float`, *optional*):
            Level of the intervals of [`bootstrap_interval`] to add.
        is_cold (`np.ndarray` of shape `(num_users,)`, bool, *optional*):
            Whether training has not seen the user's target.

    Returns:
        `dict[str, float]`: `"hr@5"`, `"ndcg@5"`, `"mrr@5"`, ...; with `confidence` also the ends of intervals, such as
        `"ndcg@10_low"` and `"ndcg@10_high"`; with `is_cold` also `"num_warm"` and `"num_cold"`, and of each of the two
        groups that has a user HR and NDCG, such as `"ndcg@10_cold"` and `"ndcg@10_cold_low"`.

    Example:

    Three users, with the target in first place, in third place, and absent: NDCG is `(1 + 1/2 + 0) / 3`.

    ```python
    >>> ranking_metrics([0, 2, -1], ks=(3,))
    {'hr@3': 0.6666666666666666, 'ndcg@3': 0.5, 'mrr@3': 0.4444444444444444}

    ```
    """
    if np.size(ranks) == 0:
        raise ValueError("`ranks` is empty: pass at least one user's rank.")
    values = per_user_metrics(ranks, ks)
    metrics = {name: float(value.mean()) for name, value in values.items()}
    if confidence is not None:
        for name, value in values.items():
            metrics[f"{name}_low"], metrics[f"{name}_high"] = bootstrap_interval(value, confidence)
    if is_cold is not None:
        is_cold = np.asarray(is_cold, dtype=bool)
        if is_cold.shape != np.shape(ranks):
            raise ValueError(
                f"`is_cold` has shape {is_cold.shape} for ranks of shape {np.shape(ranks)}: pass one entry per user."
            )
        for group, chosen in (("warm", ~is_cold), ("cold", is_cold)):
            metrics[f"num_{group}"] = int(chosen.sum())
            of_group = ranking_metrics(np.asarray(ranks)[chosen], ks, confidence) if chosen.any() else {}
            for name, value in of_group.items():
                metric, *end = name.split("_")
                if not metric.startswith("mrr"):
                    metrics["_".join([metric, group, *end])] = value
    return metrics


def bootstrap_interval(
    values: ArrayLike,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> tuple[float, float]:
    """
    Percentile bootstrap interval of a mean: users are resampled with replacement, and both tails of the means cut off.

    To compare two models on the same users, pass the per-user *differences*: their interval is much tighter than the
    two separate ones suggest.

    Args:
        values (`np.ndarray` of shape `(num_users,)`):
            One metric per user, such as `per_user_metrics(ranks)["ndcg@10"]`.
        confidence (`float`, *optional*, defaults to `0.95`):
            Probability mass inside the interval, strictly between 0 and 1.
        num_resamples, seed (`int`, *optional*, default to `1000` and `0`):
            Number of bootstrap samples, and seed of the resampling.
        groups (`np.ndarray` of shape `(num_users,)`, *optional*):
            Group of each user: whole groups are resampled. With the users' targets, the interval says what other
            targets would have given: where few items are the target of many users, it is much wider.

    Returns:
        `tuple[float, float]`: lower and upper end.

    Example:

    Without spread every resample has the same mean:

    ```python
    >>> bootstrap_interval([0.5, 0.5, 0.5])
    (0.5, 0.5)

    ```
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"`values` has shape {values.shape}: pass a non-empty one-dimensional array of finite numbers, such as "
            '`per_user_metrics(ranks)["ndcg@10"]`.'
        )
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` is {confidence}: it must lie strictly between 0 and 1, such as 0.95.")
    if num_resamples < 1:
        raise ValueError(f"`num_resamples` is {num_resamples}: it must be at least 1, and is usually 1000.")
    sizes = None  # of the groups
    if groups is not None:
        if len(groups) != len(values):
            raise ValueError(f"`groups` has {len(groups)} entries for {len(values)} `values`: pass one for each.")
        _, group = np.unique(np.asarray(groups), return_inverse=True)
        values, sizes = np.bincount(group, weights=values), np.bincount(group)
    rng = np.random.default_rng(seed)
    per_chunk = max(1, 2**20 // len(values))  # limits the index matrix to 8 MiB, or to one resample if that is larger
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, per_chunk):
        chunk = means[start : start + per_chunk]
        drawn = rng.integers(len(values), size=(len(chunk), len(values)))
        chunk[:] = values[drawn].sum(axis=1) / (len(values) if sizes is None else sizes[drawn].sum(axis=1))
    lower, upper = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(lower), float(upper)


def coverage(recommended: ArrayLike, num_items: int) -> float:
    """
    Share of the catalogue that is recommended to at least one user.

    Args:
        recommended (`np.ndarray` of shape `(num_users, k)`, integer):
            Item indices below `num_items`; `-1` marks a place without an item.
        num_items (`int`):
            Number of items in the catalogue.

    Returns:
        `float` between 0 and 1.

    Example:

    Items 0, 1 and 3 out of four:

    ```python
    >>> coverage([[0, 1], [1, 3], [0, -1]], num_items=4)
    0.75

    ```
    """
    recommended = _recommended(recommended)
    if num_items < 1:
        raise ValueError(f"`num_items` is {num_items}: it must be at least 1, the size of the catalogue.")
    if recommended.max(initial=-1) >= num_items:
        raise ValueError(
            f"`recommended` holds item {recommended.max()}, but `num_items` is {num_items}: pass 0-based indices into "
            "the same catalogue."
        )
    is_recommended = np.zeros(num_items, dtype=bool)
    is_recommended[recommended[recommended >= 0]] = True
    return float(is_recommended.mean())


def _recommended(recommended: ArrayLike) -> np.ndarray:
    recommended = _integers(recommended, "recommended", ndim=2)
    if recommended.shape[1] == 0:
        raise ValueError(f"`recommended` has shape {recommended.shape}: recommend at least one item per user.")
    if recommended.min(initial=-1) < -1:
        raise ValueError(
            f"`recommended` holds {recommended.min()}: pass 0-based item indices, and -1 for a place without an item."
        )
    return recommended


def _integers(values: ArrayLike, name: str, ndim: int) -> np.ndarray:
    """`values` as int64, unless that would truncate floats or count `True` as item 1."""
    values = np.asarray(values)
    if values.ndim != ndim or (values.dtype.kind not in "iu" and values.size):
        raise ValueError(
            f"`{name}` has shape {values.shape} of {values.dtype}: pass a {ndim}-dimensional array of integers."
        )
    return values.astype(np.int64)
