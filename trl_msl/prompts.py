# SPDX-License-Identifier: Apache-2.0
"""A history of items → a prompt → its token ids, shortened where it is too long."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .catalog import is_unicode
from .trie import ItemTrie


logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class PromptTemplate:
    """
    How a user's history becomes a prompt.

    Args:
        text (`str`):
            Prompt with `{history}` where the items go.
        separator (`str`, *optional*, defaults to `", "`):
            Between two items of the history.
        conversational (`bool`, *optional*, defaults to `False`):
            Whether the prompt is a user's message, to be put into the tokenizer's chat template.
        separate_items (`bool`, *optional*, defaults to `False`):
            Whether each item of the history is tokenised by itself, so that it has the very tokens that it has as a
            recommendation, whatever stands around it. `MSLConfig(supervise_history=True)` needs it. Rows then need a
            `history`; and pass this template wherever their prompts are encoded, in training and in evaluation.

    Example:

    ```python
    >>> from trl_msl import PromptTemplate

    >>> PromptTemplate("Read: {history}. Next: ").render(['"Dune"', '"Emma"'])
    'Read: "Dune", "Emma". Next: '

    ```
    """

    text: str
    separator: str = ", "
    conversational: bool = False
    separate_items: bool = False

    def __post_init__(self):
        if not all(isinstance(text, str) and is_unicode(text) for text in (self.text, self.separator)):
            raise ValueError(f"`text` and `separator` are {self.text!r} and {self.separator!r}: they must be texts.")
        for name in ("conversational", "separate_items"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}: it must be `True` or `False`.")
        if self.text.count("{history}") != 1:
            raise ValueError(f"`text` is {self.text!r}: it must contain {{history}} exactly once.")

    @classmethod
    def from_paper(
        cls, item: str = "item", items: str = "items", verb: str = "interacted with", conversational: bool = False
    ) -> PromptTemplate:
        """The prompt of the MSL paper (Table 1), e.g. `from_paper("book", "books", "read")`."""
        return cls(
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\nGiven a list of {items} the user has {verb} before, please recommend a new {item} "
            "that the user likes to the user.\n\n"
            f"### Input:\nThe user has {verb} the following {items} before: {{history}}\n\n### Response:\n",
            conversational=conversational,
        )

    def render(self, history: Sequence[str]) -> Prompt:
        """The prompt for a history of items as they are written, oldest first."""
        before, after = self.text.split("{history}")
        text = before + self.separator.join(history) + after
        return [{"role": "user", "content": text}] if self.conversational else text


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], chat_template_kwargs: dict[str, Any] | None = None
) -> list[list[int]]:
    """
    Token ids of prompts, up to where the item begins.

    A text gets the special tokens that the tokenizer puts before it (BOS), not an EOS after it; a list of messages is
    put into the chat template, generation prompt included.
    """
    if len(prompts) == 0:
        return []
    if not isinstance(prompts[0], str):
        prompts = [_render_chat(tokenizer, messages, chat_template_kwargs) for messages in prompts]
        return tokenizer(prompts, add_special_tokens=False)["input_ids"]
    encoded = tokenizer(list(prompts))["input_ids"]
    adds_eos = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    return [ids[:-1] for ids in encoded] if adds_eos else encoded


def _render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], chat_template_kwargs: dict[str, Any] | None
) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **(chat_template_kwargs or {})
    )


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


class SeparateItems:
    """Token ids of `before item separator item ... after`, the parts of a template, each tokenised by itself."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        histories: Sequence[Sequence[str]],
        chat_template_kwargs: dict[str, Any] | None,
    ):
        mark = "\u2063history\u2063"  # stands for the items where the prompt is rendered once for all rows
        prompt = template.render([mark])
        if template.conversational:
            prompt = _render_chat(tokenizer, prompt, chat_template_kwargs)
        if prompt.count(mark) != 1:
            raise ValueError(
                "`tokenizer.chat_template` writes a user's message not once, but "
                f"{prompt.count(mark)} times: `separate_items` needs to know where it stands. Leave it out."
            )
        before, after = prompt.split(mark)
        special = {"add_special_tokens": False}
        # a text begins with what the tokenizer puts there (BOS), which a chat template writes itself
        self.before = (
            tokenizer(before, **special)["input_ids"]
            if template.conversational
            else (encode_prompts(tokenizer, [before])[0])
        )
        self.separator, self.after = tokenizer([template.separator, after], **special)["input_ids"]
        texts = list(dict.fromkeys(text for history in histories for text in history))
        self.items = dict(zip(texts, tokenizer(texts, **special)["input_ids"] if texts else []))

    def prompt(self, history: Sequence[str]) -> list[int]:
        ids = list(self.before)
        for place, text in enumerate(history):
            ids += (self.separator if place else []) + self.items[text]
        return ids + self.after

    def labels(self, history: Sequence[str], length: int, nodes: dict[str, list[int]]) -> list[int]:
        """Labels of the prompt of `length` tokens, which holds the last items of `history`, or all of them."""
        labels, stop, gap = [-100] * length, length - len(self.after), len(self.after)
        for text in reversed(history):
            start = stop - len(self.items[text])
            if start == len(self.before):  # the oldest item, which follows from nothing
                break
            # Behind the item its end should stand. Without a token between items there is no place to say so
            path = nodes[text]
            labels[start : stop + min(gap, 1)] = path[: len(path) if gap else -1]
            stop, gap = start - len(self.separator), len(self.separator)
        return labels
