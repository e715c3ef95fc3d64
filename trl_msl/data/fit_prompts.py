# SPDX-License-Identifier: Apache-2.0
"""Prompts shortened to fit, oldest item first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..trie import ItemTrie
from .prompts import Prompt, PromptTemplate, encode_prompts
from .separate_items import SeparateItems, check_histories


logger = logging.getLogger(__name__)


def fit_prompts(
    tokenizer: PreTrainedTokenizerBase,
    rows: dict[str, list],
    room: Sequence[float],
    template: PromptTemplate | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    vector_tokens: dict[str, int] | None = None,
) -> list[list[int]]:
    """
    Token ids of the prompts of `rows`; those that are too long lose the oldest items of their history.

    Args:
        tokenizer, chat_template_kwargs:
            As for [`encode_prompts`].
        rows (`dict[str, list]`):
            `prompt`, and `history` where a prompt is to be shortened, as [`build_rows`] makes them.
        room (`Sequence[float]`):
            Maximum number of tokens of each prompt; infinity for no limit.
        template ([`PromptTemplate`], *optional*):
            Template that the prompts were made with.
        vector_tokens (`dict[str, int]`, *optional*):
            Token of each item's vector, as for [`SeparateItems`].

    Raises:
        `ValueError`: if a prompt is too long and can't be shortened, or was not made with `template`.
    """
    if template is not None and template.separate_items:
        layout = SeparateItems(tokenizer, template, rows, chat_template_kwargs, vector_tokens)
        return _fit(rows, room, template, layout.prompts)

    def encode(prompts: list[Prompt], _: list[list[str]] | None) -> list[list[int]]:
        return encode_prompts(tokenizer, prompts, chat_template_kwargs, template)

    return _fit(rows, room, template, encode)


def supervised_prompts(
    tokenizer: PreTrainedTokenizerBase,
    trie: ItemTrie,
    rows: dict[str, list],
    room: Sequence[float],
    template: PromptTemplate,
    chat_template_kwargs: dict[str, Any] | None = None,
    vector_tokens: dict[str, int] | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """
    Token ids of prompts as from [`fit_prompts`], and their labels: for each item of the history but the first, its
    trie nodes at its tokens and its end node right after them; -100 elsewhere.

    Raises:
        `ValueError`: as [`fit_prompts`], or if the template does not separate items or a text in a history is not an
            item.
    """
    if not template.separate_items:
        raise ValueError(
            "`supervise_history` needs histories with the trie's tokens: use a `prompt_template` with "
            "`separate_items=True`, in training and wherever prompts are encoded."
        )
    layout = SeparateItems(tokenizer, template, rows, chat_template_kwargs, vector_tokens)
    prompts = _fit(rows, room, template, layout.prompts)
    return prompts, layout.labels(trie, [len(prompt) for prompt in prompts])


def _fit(
    rows: dict[str, list],
    room: Sequence[float],
    template: PromptTemplate | None,
    encode: Callable[[list[Prompt], list[list[str]] | None], list[list[int]]],
) -> list[list[int]]:
    """Prompts encoded from their texts and histories, without the oldest items where that is needed to fit."""
    prompts = encode(rows["prompt"], rows.get("history"))
    too_long = [row for row in range(len(prompts)) if len(prompts[row]) > room[row]]
    if not too_long:
        return prompts
    if template is None or "history" not in rows or not all(rows["history"][row] for row in too_long):
        raise ValueError(
            f"`max_length`: {len(too_long)} of the {len(prompts)} rows read are too long and can't be shortened, "
            f"such as a prompt of {len(prompts[too_long[0]])} tokens where there is room for {room[too_long[0]]}. "
            "Raise it, or give rows a `history` column (see `build_rows`) and pass the `prompt_template`."
        )
    check_histories(rows, too_long, template)

    def shorten(dropped: dict[int, int]) -> dict[int, list[int]]:
        """Some rows' prompts without a number of their oldest items."""
        histories = [rows["history"][row][number:] for row, number in dropped.items()]
        return dict(zip(dropped, encode([template.render(history) for history in histories], histories)))

    # Bisection between a number of dropped items that is too small and one that is enough: histories can be long
    too_few = dict.fromkeys(too_long, 0)
    enough = {row: len(rows["history"][row]) - 1 for row in too_long}
    shortened = shorten(enough)
    stuck = [row for row in too_long if len(shortened[row]) > room[row]]
    if stuck:
        raise ValueError(
            f"`max_length`: {len(stuck)} of the {len(prompts)} rows read are too long even with a single item of "
            f"history, such as a prompt of {len(shortened[stuck[0]])} tokens where there is room for "
            f"{room[stuck[0]]}. Raise it."
        )
    while middle := {row: (too_few[row] + enough[row]) // 2 for row in too_long if enough[row] - too_few[row] > 1}:
        for row, prompt in shorten(middle).items():
            if len(prompt) <= room[row]:
                enough[row], shortened[row] = middle[row], prompt
            else:
                too_few[row] = middle[row]
    logger.warning(
        "%d of %d prompts were too long for `max_length`: up to %d of their oldest history items were left out.",
        len(too_long), len(prompts), max(enough.values()),
    )  # fmt: skip
    return [shortened.get(row, prompt) for row, prompt in enumerate(prompts)]
