# SPDX-License-Identifier: Apache-2.0
"""Users to recommend to, and their histories: from a file, or from an interaction log."""

import re
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from ..data import ItemCatalog, ids_as_strings, parse_list, read_interactions, read_table


ADDED = {"recommended_ids", "recommended_texts", "scores", "exact"}


@dataclass
class UserArguments:
    """
    Arguments that name users and their histories.

    Parameters:
        users (`str`, *optional*):
            File (CSV, TSV, JSON lines or Parquet) with a column `item_ids`. With `interactions`, a file with user
            ids; defaults to all users of the log.
        interactions (`str`, *optional*):
            Interaction log: the history of a user is all of their items, in the order of time.
        user_column, item_column, timestamp_column (`str`, *optional*):
            Columns of the log. `user_column` is that of `users`, too.
        unknown_items (`str`, *optional*, defaults to `"error"`):
            What to do with items of a history that are not in the catalogue: `error`, or `drop`, which also drops
            users without any other items, and reports the numbers.
        popular_without_history (`bool`, *optional*, defaults to `False`):
            Whether users without history, or without any known items, get the most popular items. The model must have
            a [`Fusion`]. With `interactions`, users who are not in the log count as users without history.
    """

    users: str | None = field(default=None, metadata={"help": "File with a column `item_ids`, or with user ids."})
    interactions: str | None = field(default=None, metadata={"help": "Interaction log to take histories from."})
    user_column: str = field(default="user_id", metadata={"help": "User column of the log and of `users`."})
    item_column: str = field(default="item_id", metadata={"help": "Item column of the log."})
    timestamp_column: str = field(default="timestamp", metadata={"help": "Time column of the log."})
    unknown_items: str = field(
        default="error", metadata={"help": "Items that are not in the catalogue.", "choices": ["error", "drop"]}
    )
    popular_without_history: bool = field(
        default=False, metadata={"help": "Recommend popular items to users without history, by the model's fusion."}
    )


def read_users(args: UserArguments) -> tuple[pd.DataFrame, bool]:
    """
    The users as a table, with `item_ids` as lists of strings, and whether these can only be ids, not texts. User ids
    are strings; other columns are as [`read_table`] reads them.
    """
    if args.interactions:
        return _users_of_log(args), True
    if not args.users:
        raise ValueError("`users` and `interactions` are both missing: pass a file of users, or a log.")
    table = _read_file(args, "item_ids")
    cells = table["item_ids"].tolist()
    histories = [parse_history(cell) for cell in cells]
    malformed = [row for row, items in enumerate(histories) if items is None]
    if malformed:
        raise ValueError(
            f"`users` = {args.users!r}: `item_ids` must hold lists of ids or texts, in JSON or Python syntax, or ids "
            f"separated by commas or spaces, but {len(malformed)} of {len(table)} rows do not (the first: "
            f"{malformed[:5]}, with {repr(cells[malformed[0]])[:200]}). Correct them."
        )
    empty = [row for row, items in enumerate(histories) if not items]
    if empty and args.unknown_items == "error" and not args.popular_without_history:
        raise ValueError(
            f"`users` = {args.users!r}: {len(empty)} of {len(table)} users have an empty history (the first rows: "
            f"{empty[:5]}). Leave them out, for example by unknown_items='drop', or give them popular items by "
            "popular_without_history=True."
        )
    only_ids = any(isinstance(cell, str) and cell.strip() and not _is_list(cell) for cell in cells)
    return table.assign(item_ids=histories), only_ids


def _users_of_log(args: UserArguments) -> pd.DataFrame:
    log = read_interactions(args.interactions, args.user_column, args.item_column, args.timestamp_column)
    histories = log.groupby("user_id", sort=False)["item_id"].agg(list)
    if not args.users:
        return pd.DataFrame({args.user_column: histories.index, "item_ids": histories.tolist()})
    table = _read_file(args, args.user_column)
    if "item_ids" in table.columns:
        raise ValueError(
            f"`users` = {args.users!r} has a column 'item_ids', but histories come from `interactions`: leave one of "
            "the two out."
        )
    users = table[args.user_column]
    if len(unknown := users[~users.isin(histories.index)]) and not args.popular_without_history:
        raise ValueError(
            f"`users` = {args.users!r} holds {len(unknown)} user(s) of {len(users)} without interactions in "
            f"{args.interactions!r}, such as {unknown.tolist()[:3]}: leave them out, or give them popular items by "
            "popular_without_history=True."
        )
    return table.assign(item_ids=[histories.get(user, []) for user in users])


def _read_file(args: UserArguments, column: str) -> pd.DataFrame:
    """The file of users, with user ids as strings."""
    table, name = read_table(args.users, [column])
    if taken := sorted(ADDED & set(table.columns)):
        raise ValueError(f"`users` = {args.users!r} has the columns {taken}, which this command adds: rename them.")
    if args.user_column in table.columns:
        table = table.assign(**{args.user_column: ids_as_strings(table[args.user_column], name)})
    return table


def parse_history(cell: object) -> list[str] | None:
    """
    The items of a list, of a string that begins with `[` (a list in JSON or Python syntax), or of any other string
    (ids separated by commas or spaces). An empty cell has none; `None` stands for anything malformed.
    """
    if cell is None or (isinstance(cell, float) and np.isnan(cell)):
        return []
    if isinstance(cell, str):
        cell = parse_list(cell) if _is_list(cell) else _split_ids(cell)
    items = cell.tolist() if isinstance(cell, np.ndarray) else cell
    # Not floats: pandas turns integers into floats where one is missing, and the id 12.0 is not 12
    if not isinstance(items, list) or any(isinstance(i, bool) or not isinstance(i, str | int) for i in items):
        return None
    return [str(item) for item in items]


def _is_list(cell: str) -> bool:
    return cell.lstrip().startswith("[")


def _split_ids(cell: str) -> list[str] | None:
    """`None` for a title with commas and spaces, or the remains of a list."""
    ids = [item.strip() for item in cell.split(",")] if "," in cell else cell.split()
    return ids if all(re.fullmatch(r"""[^\s'"\[\]{}]+""", item) for item in ids) else None


def check_items(
    table: pd.DataFrame, only_ids: bool, catalog: ItemCatalog, args: UserArguments
) -> tuple[pd.DataFrame, str]:
    """
    The users with their histories reduced to items of the catalogue, without those who have none left unless they get
    popular items, and a note on what was dropped.

    Raises:
        `ValueError`: if there are unknown items and `unknown_items` is not `"drop"`, or no user is left.
    """
    items = {item for history in table["item_ids"] for item in history}
    unknown, kind = items - catalog.index_of_id.keys(), "ids"
    # Either all ids or all texts: an unknown id may be the title of another item, such as 1984
    if not only_ids and len(unknown_texts := items - set(catalog.texts)) < len(unknown):
        unknown, kind = unknown_texts, "texts"
    kept = [[item for item in history if item not in unknown] for history in table["item_ids"]]
    num_items = sum(map(len, table["item_ids"])) - sum(map(len, kept))
    hint = " A history from a log or without brackets holds ids; write titles as a list." if only_ids else ""
    if unknown and args.unknown_items == "error":
        num_users = sum(len(left) < len(history) for left, history in zip(kept, table["item_ids"]))
        raise ValueError(
            f"The histories of {num_users} of {len(table)} users hold {len(unknown)} different {kind} that are not in "
            f"the catalogue of {len(catalog)} items, such as {sorted(unknown)[:3]}. Pass ids or texts of this model's "
            f"catalogue, or drop unknown items by unknown_items='drop'.{hint}"
        )
    num_users = 0 if args.popular_without_history else sum(len(items) == 0 for items in kept)
    if num_users == len(table):
        raise ValueError(
            f"unknown_items='drop' leaves none of the {num_users:,} users: none of their items is in the catalogue, "
            f"such as {sorted(unknown)[:3]}. Pass ids or texts of this model's catalogue.{hint}"
        )
    kept = table.assign(item_ids=kept)[[len(items) > 0 or args.popular_without_history for items in kept]]
    note = f" ({num_items:,} unknown items were dropped, and {num_users:,} users without any other)"
    return kept, note if num_items or num_users else ""
