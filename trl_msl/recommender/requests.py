# SPDX-License-Identifier: Apache-2.0
"""What a recommender is asked with, checked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..data import RankingTask
from ..decoding import Allowed, TrieDecoder


@dataclass
class RecommendedItems:
    """
    Items recommended to each user, best first; fewer than asked for if no more are left.

    Args:
        ids, texts (`list[list[str]]`):
            Ids and texts of each user's items.
        scores (`list[list[float]]`):
            What the items are ranked by: their log-probabilities, plus any fusion and `item_bias`.
        exact (`list[bool]`):
            Whether these are certainly the best items for each user.
    """

    ids: list[list[str]]
    texts: list[list[str]]
    scores: list[list[float]]
    exact: list[bool]


@dataclass(frozen=True, eq=False)
class AllowedItems:
    """
    Items that may be recommended, prepared by [`Recommender.prepare_allowed`].

    Args:
        task ([`RankingTask`]), decoder ([`TrieDecoder`]):
            What they have been prepared for.
        indices (`list[int]`, *optional*):
            Their indices. `None` for the whole catalogue.
        prepared ([`~decoding.Allowed`], *optional*):
            The same for the decoder.
    """

    task: RankingTask
    decoder: TrieDecoder
    indices: list[int] | None
    prepared: Allowed | None


def check_histories(histories: Sequence[Sequence[str]], may_be_empty: bool = False) -> None:
    """Raise a `ValueError` if there is no history, one is not a list, or one is empty unless it may be."""
    if len(histories) == 0:
        raise ValueError("`histories` is empty: pass at least one.")
    # Not a string, each character of which could be an id
    not_lists = [
        user
        for user, history in enumerate(histories)
        if isinstance(history, str | bytes | Mapping) or not hasattr(history, "__len__")
    ]
    if not_lists:
        raise ValueError(
            f"`histories`: {len(not_lists)} of {len(histories)} are not lists, the first that of user {not_lists[0]}, "
            f"{histories[not_lists[0]]!r}. Pass a list of items for each user, even if there is only one user."
        )
    empty = [user for user, history in enumerate(histories) if len(history) == 0]
    if empty and not may_be_empty:
        raise ValueError(
            f"`histories`: {len(empty)} of {len(histories)} are empty, the first that of user {empty[0]}. Leave these "
            "users out, or give them the most popular items by popular_without_history=True, which needs a `fusion`."
        )
