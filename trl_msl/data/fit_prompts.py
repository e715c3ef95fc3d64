# SPDX-License-Identifier: Apache-2.0
"""Prompts shortened to the room there is, oldest item first."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..trie import ItemTrie
from .prompts import PromptTemplate, encode_prompts
from .separate_items import SeparateItems


logger = logging.getLogger(__name__)


def fit_prompts(
    tokenizer: PreTrainedTokenizerBase,
    rows: dict[str, list],
    room: Sequence[int],
    template: PromptTemplate | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[int]]:
    """
    Token ids of the prompts of `rows`; those that are too long lose the oldest items of their history.

    Args:
        tokenizer, chat_template_kwargs:
            As for [`encode_prompts`].
        rows (`dict[str, list]`):
            `prompt`, and `history` where a prompt is to be shortened, as [`build_rows`] makes them.
        room (`Sequence[int]`):
            Most tokens of each prompt.
        template ([`PromptTemplate`], *optional*):
            Template that the prompts were made with.

    Raises:
        `ValueError`: if a prompt is too long and can't be shortened, or was not made with `template`.
    """
    is_separate = template is not None and template.separate_items
    if is_separate:
        _check_histories(rows, range(len(rows["prompt"])), template)
        layout = SeparateItems(tokenizer, template, rows["history"], chat_template_kwargs)
        prompts = [layout.prompt(history) for history in rows["history"]]
    else:
        prompts = encode_prompts(tokenizer, rows["prompt"], chat_template_kwargs)
    too_long = [row for row in range(len(prompts)) if len(prompts[row]) > room[row]]
    if too_long and (template is None or "history" not in rows):
        raise ValueError(
            f"`max_length`: {len(too_long)} of the {len(prompts)} rows read are too long and can't be shortened, "
            f"such as a prompt of {len(prompts[too_long[0]])} tokens where there is room for {room[too_long[0]]}. "
            "Raise it, or give rows a `history` column (see `build_rows`) and pass the `prompt_template`."
        )
    _check_histories(rows, too_long, template)
    num_shortened, dropped = len(too_long), 0
    while too_long:  # one more item in each round
        dropped += 1
        stuck = [row for row in too_long if len(rows["history"][row]) <= dropped]
        if stuck:
            raise ValueError(
                f"`max_length`: {len(stuck)} of the {len(prompts)} rows read are too long even with a single item of "
                f"history, such as a prompt of {len(prompts[stuck[0]])} tokens where there is room for "
                f"{room[stuck[0]]}. Raise it."
            )
        shorter = [rows["history"][row][dropped:] for row in too_long]
        if is_separate:
            encoded = [layout.prompt(history) for history in shorter]
        else:
            encoded = encode_prompts(
                tokenizer, [template.render(history) for history in shorter], chat_template_kwargs
            )
        for row, prompt in zip(too_long, encoded):
            prompts[row] = prompt
        too_long = [row for row in too_long if len(prompts[row]) > room[row]]
    if num_shortened:
        logger.warning(
            "%d of %d prompts were too long for `max_length`: up to %d of their oldest history items were left out.",
            num_shortened, len(prompts), dropped,
        )  # fmt: skip
    return prompts


def _check_histories(rows: dict[str, list], indices: Sequence[int], template: PromptTemplate) -> None:
    """Whether the prompts of some rows are their histories in `template`."""
    if len(indices) and "history" not in rows:
        raise ValueError(
            "`prompt_template` with `separate_items` needs rows with a `history` column (see `build_rows`)."
        )
    for row in indices:
        if template.render(rows["history"][row]) != rows["prompt"][row]:
            raise ValueError(
                "`prompt_template` must be the one that the rows were made with: it renders "
                f"{template.render(rows['history'][row])!r}, the row has {rows['prompt'][row]!r}."
            )


def ranking_prompts(
    tokenizer: PreTrainedTokenizerBase,
    trie: ItemTrie,
    rows: dict[str, list],
    max_length: int | None = None,
    template: PromptTemplate | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of prompts to rank items for: as [`fit_prompts`], with room for an item of average length."""
    limit = float("inf") if max_length is None else max_length
    room = [limit - int(trie.item_lengths.double().mean())] * len(rows["prompt"])
    return fit_prompts(tokenizer, rows, room, template, chat_template_kwargs)
