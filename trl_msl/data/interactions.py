# SPDX-License-Identifier: Apache-2.0
"""Interaction logs -> windows -> time-ordered splits.

An *interaction* is a user, an item and a time. A *window* is one training or test case cut from a user's interactions,
`{"user_id": str, "item_ids": list[str], "timestamp": int}`: items in time order, the last one the target, and the time
of the target (a float where the log has fractions). Ids are always strings. Error messages count rows from 0, without
the header.
"""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetDict

from .catalog import is_unicode
from .tables import Source, as_timestamps, ids_as_strings, parse_list, read_table


logger = logging.getLogger(__name__)


def read_windows(
    data_dir: str | Path,
    train_file: str | None = "train.csv",
    test_file: str = "test.csv",
    validation_fraction: float = 0.1,
) -> DatasetDict:
    """
    Read CSV files of windows, whose `item_ids` are lists such as `"[12, 7, 31]"`: the format of the authors of MSL.
    `train` and `validation` come sorted by timestamp (ties in file order), `test` in file order.

    Args:
        data_dir (`str` or `Path`):
            Folder with both files.
        train_file (`str`, *optional*, defaults to `"train.csv"`):
            File with the train and validation windows; `None` for `test` alone.
        test_file (`str`, *optional*, defaults to `"test.csv"`):
            File with the test windows.
        validation_fraction (`float`, *optional*, defaults to `0.1`):
            Fraction of the train file, the last by time, that is held out for validation.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"`validation_fraction` is {validation_fraction}: it must lie between 0 and 1, such as 0.1.")
    splits = DatasetDict()
    if train_file is not None:
        windows = _read_window_file(Path(data_dir) / train_file)
        splits = _cut_by_time(windows, {"train": 1 - validation_fraction, "validation": validation_fraction})
    return DatasetDict(splits, test=_read_window_file(Path(data_dir) / test_file))


def read_interactions(
    source: Source, user_column: str = "user_id", item_column: str = "item_id", timestamp_column: str = "timestamp"
) -> pd.DataFrame:
    """
    Read an interaction log, one row per interaction.

    Args:
        source (`str`, `Path`, [`~datasets.Dataset`] or `pandas.DataFrame`):
            The log, its file, or the name of a Hub dataset with a train split: see [`read_table`].
        user_column (`str`, *optional*, defaults to `"user_id"`):
            Column of user ids, strings or integers.
        item_column (`str`, *optional*, defaults to `"item_id"`):
            Column of item ids, strings or integers.
        timestamp_column (`str`, *optional*, defaults to `"timestamp"`):
            Column of numbers (kept), or of datetimes or ISO 8601 strings (converted to seconds since 1970, UTC by
            default).

    Returns:
        `pandas.DataFrame` with `user_id` and `item_id` (strings) and `timestamp` (int64, or float64 if not all are
        whole), sorted by user and timestamp; ties stay in the order of the source.
    """
    table, name = read_table(source, [user_column, item_column, timestamp_column])
    users, items = ids_as_strings(table[user_column], name), ids_as_strings(table[item_column], name)
    timestamps = as_timestamps(table[timestamp_column], name)
    order = np.lexsort((timestamps, pd.factorize(users, sort=True)[0]))  # stable
    return pd.DataFrame({"user_id": users.array[order], "item_id": items.array[order], "timestamp": timestamps[order]})


def k_core(interactions: pd.DataFrame, k: int = 5) -> pd.DataFrame:
    """
    Drop users and items with fewer than `k` interactions, repeatedly until none is left.

    Args:
        interactions (`pandas.DataFrame`):
            Interactions, with columns as [`read_interactions`] returns them.
        k (`int`, *optional*, defaults to `5`):
            Minimum number of interactions of a user and of an item; repeated ones count. MSL (Section 5.1) uses 5.

    Example: item `z` is too rare, and without it so is user `b`.
    ```python
    >>> log = pd.DataFrame({"user_id": list("aabb"), "item_id": list("xxxz"), "timestamp": [1, 2, 3, 4]})
    >>> k_core(log, k=2)["user_id"].tolist()
    ['a', 'a']

    ```
    """
    if k < 1:
        raise ValueError(f"`k` is {k}: it must be at least 1, such as 5.")
    interactions = read_interactions(interactions)
    codes = [pd.factorize(interactions[column])[0] for column in ("user_id", "item_id")]
    kept, num_before = np.ones(len(interactions), dtype=bool), None
    while num_before != kept.sum():
        num_before = kept.sum()
        for code in codes:
            kept &= np.bincount(code, weights=kept)[code] >= k
    core = interactions[kept].reset_index(drop=True)
    sizes = [(len(log), log["user_id"].nunique(), log["item_id"].nunique()) for log in (interactions, core)]
    changes = [f"{before:,} → {after:,}" for before, after in zip(*sizes)]
    logger.info("%d-core: %s interactions, %s users, %s items.", k, *changes)
    if core.empty:
        raise ValueError(f"`k` = {k} leaves none of {len(interactions)} interactions: lower it or read a longer log.")
    return core


def sliding_windows(interactions: pd.DataFrame, window: int = 11) -> Dataset:
    """
    Cut each user's interactions into overlapping windows (MSL, https://arxiv.org/abs/2504.04178, Section 5.1), sorted
    by user and timestamp.

    A user with `n <= window` interactions gives one window of them all, a longer one `n - window + 1` full windows. A
    single interaction is a target without a history: such users give no window, and a warning counts them.

    Args:
        interactions (`pandas.DataFrame`):
            Interactions, with columns as [`read_interactions`] returns them.
        window (`int`, *optional*, defaults to `11`):
            Maximum number of items in a window, the target included.

    Example:
    ```python
    >>> log = pd.DataFrame({"user_id": list("aaabb"), "item_id": list("xyzxz"), "timestamp": [1, 2, 3, 8, 9]})
    >>> sliding_windows(log, window=2)[:]["item_ids"]
    [['x', 'y'], ['y', 'z'], ['x', 'z']]

    ```
    """
    if window < 2:
        raise ValueError(f"`window` is {window}: it must be at least 2, a history and the target. MSL uses 11.")
    interactions = read_interactions(interactions)
    codes, _ = pd.factorize(interactions["user_id"])  # sorted, so each user's rows are contiguous
    counts = np.bincount(codes)
    if num_single := (counts == 1).sum():
        logger.warning("%d of %d users have a single interaction and give no window.", num_single, len(counts))
    history = np.arange(len(codes)) - (np.cumsum(counts) - counts)[codes]  # how many of the user's rows come before
    targets = np.flatnonzero((history > 0) & (history >= np.minimum(window, counts[codes]) - 1))
    if len(targets) == 0:
        raise ValueError(f"None of {len(counts)} users has 2 interactions, so there is no window: read a longer log.")
    lengths = np.minimum(history[targets] + 1, window)
    ends = np.cumsum(lengths)
    rows = np.arange(ends[-1]) + np.repeat(targets + 1 - ends, lengths)  # each window's rows end at its target
    items = pa.array(interactions["item_id"], pa.string()).take(pa.array(rows))
    windows = pa.ListArray.from_arrays(np.append(0, ends), items)
    users, timestamps = interactions["user_id"].iloc[targets], interactions["timestamp"].to_numpy()[targets]
    return Dataset.from_dict({"user_id": users.tolist(), "item_ids": windows, "timestamp": timestamps})


def split_by_time(windows: Dataset, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)) -> DatasetDict:
    """
    Sort windows by timestamp (ties keep their order) and cut them into `train`, `validation` and `test`.

    Args:
        windows ([`~datasets.Dataset`]):
            Windows as [`sliding_windows`] returns them.
        fractions (`tuple[float, float, float]`, *optional*, defaults to `(0.8, 0.1, 0.1)`):
            Positive sizes of the three splits, summing to 1.
    """
    if len(fractions) != 3 or min(fractions) <= 0 or not abs(sum(fractions) - 1) < 1e-9:
        raise ValueError(f"`fractions` is {fractions}: pass 3 positive numbers that sum to 1, e.g. (0.8, 0.1, 0.1).")
    if "timestamp" not in windows.column_names:
        raise ValueError(f"`windows` has no column 'timestamp' but {windows.column_names}: use `sliding_windows`.")
    return _cut_by_time(windows, dict(zip(("train", "validation", "test"), fractions, strict=True)))


def covering_windows(windows: Dataset) -> Dataset:
    """
    Leave out windows whose target is in the history of another, for training in which items of the history are targets
    too. Each user's last window is kept, then the latest one whose target is not a target of that window, and so on:
    every target is trained on once, in as little as a tenth of the rows if windows hold 11 items.

    Args:
        windows ([`~datasets.Dataset`]):
            Windows of one split, in order of time.

    Returns:
        [`~datasets.Dataset`]: the kept ones, in the same order.

    Example: `f` and `e` are targets in the last window, `d` and `c` in the second.
    ```python
    >>> log = pd.DataFrame({"user_id": list("uuuuuu"), "item_id": list("abcdef"), "timestamp": range(6)})
    >>> covering_windows(sliding_windows(log, window=3))["item_ids"][:]
    [['b', 'c', 'd'], ['d', 'e', 'f']]

    ```
    """
    users, lists = (windows[column][:] for column in ("user_id", "item_ids"))
    kept, last_kept = [], {}
    for row in reversed(range(len(windows))):
        if not _covers(last_kept.get(users[row], []), lists[row]):
            kept.append(row)
            last_kept[users[row]] = lists[row]
    return windows.select(kept[::-1])


def _covers(later: list[str], earlier: list[str]) -> bool:
    """
    Whether the target of a user's `earlier` window is also a target of `later`. The items before it must agree too, as
    a user may have bought it twice.
    """
    ends = range(2, len(later))  # of the parts of `later` that end with a target, but for its own
    return any(later[max(0, end - len(earlier)) : end] == earlier[-end:] for end in ends)


def _cut_by_time(windows: Dataset, fractions: dict[str, float]) -> DatasetDict:
    timestamps = windows.select_columns("timestamp").to_pandas()["timestamp"]
    order = np.argsort(as_timestamps(timestamps, "the windows"), kind="stable")
    cuts = np.rint(np.cumsum(list(fractions.values())) * len(order)).astype(int)[:-1]
    splits = dict(zip(fractions, np.split(order, cuts), strict=True))
    if empty := [name for name, indices in splits.items() if len(indices) == 0]:
        raise ValueError(f"{len(order)} windows leave {empty} empty with {fractions}: change either of the two.")
    return DatasetDict({name: windows.select(indices) for name, indices in splits.items()})


def _read_window_file(path: Path) -> Dataset:
    table, name = read_table(path, ["user_id", "item_ids", "timestamp"])
    items = [_parse_items(cell, f"{name}, row {row}") for row, cell in enumerate(table["item_ids"])]
    users, timestamps = ids_as_strings(table["user_id"], name), as_timestamps(table["timestamp"], name)
    return Dataset.from_dict({"user_id": users.tolist(), "item_ids": items, "timestamp": timestamps})


def _parse_items(cell: str, where: str) -> list[str]:
    items = parse_list(cell) if isinstance(cell, str) else None
    ids = items if items and all(type(item) in (int, str) and item != "" for item in items) else []
    if len(ids) < 2 or not all(is_unicode(item) for item in ids if isinstance(item, str)):
        got = repr(cell) if len(repr(cell)) <= 200 else f"{cell[:200]!r}…"
        raise ValueError(f"{where}: item_ids must be a list of at least 2 ids, like [12, 7], not {got}: fix it.")
    return [str(item) for item in ids]
