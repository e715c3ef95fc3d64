# SPDX-License-Identifier: Apache-2.0
"""Unknown items, repeated interactions and oddly written ids: reported, and dropped on request."""

from __future__ import annotations

import logging
from collections.abc import Collection

import pandas as pd
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict

from .catalog import ItemCatalog


logger = logging.getLogger(__name__)


def report_odd_ids(name: str, ids: Collection[str]) -> None:
    """Warn of ids with spaces around them, and of whole numbers written as floats."""
    if odd := [item for item in ids if item != _plain(item)]:
        logger.warning(
            "%s: %s of %s ids have spaces around them or end in '.0', such as %r, which is another id than %r.",
            name, f"{len(odd):,}", f"{len(ids):,}", odd[0], _plain(odd[0]),
        )  # fmt: skip


def clean_log(log: pd.DataFrame, catalog: ItemCatalog, unknown_items: str, drop_duplicates: bool) -> pd.DataFrame:
    """
    Interactions cleaned according to `unknown_items` and `drop_duplicates` of [`DataArguments`].

    Raises:
        `ValueError`: if there are unknown items and they are not to be dropped, or nothing else is left.
    """
    is_known = log["item_id"].isin(catalog.index_of_id.keys())
    if not is_known.all():
        where = f"{(~is_known).sum():,} of {len(log):,} interactions"
        _report_unknown(set(log["item_id"][~is_known]), catalog, where, unknown_items, is_known.any())
        log = log[is_known]
    is_repeated = log.duplicated()
    if is_repeated.any():
        done = "dropped" if drop_duplicates else "kept: consider drop_duplicates=True"
        count = f"{is_repeated.sum():,} of {len(log):,}"
        logger.warning("%s interactions repeat the user, item and time of another (%s).", count, done)
    return log[~is_repeated] if drop_duplicates else log


def clean_windows(windows: DatasetDict, catalog: ItemCatalog, unknown_items: str) -> DatasetDict:
    """
    Windows without unknown items. Those that lose their target or their whole history are dropped.

    Raises:
        `ValueError`: if there are unknown items and they are not to be dropped, or a split loses all its windows.
    """
    unknown = set().union(*map(distinct_items, windows.values())) - catalog.index_of_id.keys()
    if not unknown:
        return windows
    num_held, cleaned = 0, DatasetDict()
    for name, split in windows.items():
        columns = split[:]
        kept = [[item for item in ids if item not in unknown] for ids in columns["item_ids"]]
        num_held += sum(len(left) < len(ids) for left, ids in zip(kept, columns["item_ids"]))
        rows = [row for row, left in enumerate(kept) if len(left) > 1 and columns["item_ids"][row][-1] == left[-1]]
        columns["item_ids"] = kept
        cleaned[name] = Dataset.from_dict({key: [values[row] for row in rows] for key, values in columns.items()})
    total, num_left = sum(windows.num_rows.values()), sum(cleaned.num_rows.values())
    where = f"{num_held:,} of {total:,} windows, {total - num_left:,} of them with no target or history left"
    _report_unknown(unknown, catalog, where, unknown_items, all(cleaned.num_rows.values()))
    return cleaned


def distinct_items(windows: Dataset) -> set[str]:
    """Ids of all items in windows."""
    ids = windows.with_format("arrow")[:]["item_ids"]  # may be many millions
    return set(pc.unique(pc.list_flatten(ids)).to_pylist())


def _report_unknown(unknown: set[str], catalog: ItemCatalog, where: str, policy: str, is_any_left: bool) -> None:
    """Warn that unknown items are dropped, or raise a `ValueError`."""
    missing = f"{len(unknown):,} item id(s), such as {min(unknown)!r}"
    found = f"{missing}, are not in the catalogue of {len(catalog):,} items: in {where}"
    if policy == "error":
        raise ValueError(f"{found}. Correct the ids, add the items, or pass unknown_items='drop'.")
    if not is_any_left:
        raise ValueError(f"{found}, and too little is left without them: check that items and interactions match.")
    logger.warning("%s. They are dropped.", found)


def _plain(item: str) -> str:
    """An id as it was probably meant: pandas writes 12.0 for 12 in a column where other numbers are missing."""
    item = item.strip()
    return item[:-2] if item.endswith(".0") and item[:-2].isdecimal() else item
