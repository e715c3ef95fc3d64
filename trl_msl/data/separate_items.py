# SPDX-License-Identifier: Apache-2.0
"""Histories whose items are tokenised one by one, so that each of them can be a target of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..trie import ItemTrie
from .item_tokens import encode_items
from .prompts import PromptTemplate, encode_prompts, render_chat


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
            prompt = render_chat(tokenizer, prompt, chat_template_kwargs)
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


def history_labels(
    tokenizer: PreTrainedTokenizerBase,
    trie: ItemTrie,
    rows: dict[str, list],
    lengths: Sequence[int],
    template: PromptTemplate | None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[int]]:
    """
    Labels of prompts by [`fit_prompts`], of `lengths` tokens: the trie's nodes where an item of the history stands
    that has one before it, the end node behind it, and -100 elsewhere.
    """
    if template is None or not template.separate_items:
        raise ValueError(
            "`supervise_history` needs histories with the trie's tokens: pass a `prompt_template` with "
            "`separate_items=True`, in training and wherever prompts are encoded."
        )
    layout = SeparateItems(tokenizer, template, rows["history"], chat_template_kwargs)
    if not layout.items:
        return [[-100] * length for length in lengths]
    sequences = encode_items(tokenizer, list(layout.items), template.conversational, chat_template_kwargs)
    ends = trie.find(sequences).cpu()
    if (ends < 0).any():
        unknown = [text for text, end in zip(layout.items, ends.tolist()) if end < 0]
        raise ValueError(
            f"`history` holds {len(unknown)} text(s) that are no item of the trie, such as {unknown[:3]}: write items "
            "as `ItemCatalog.completions` has them."
        )
    nodes = {}
    for (text, ids), sequence, path in zip(layout.items.items(), sequences, trie.to("cpu").paths(ends).tolist()):
        start = len(sequence) - 1 - len(ids)  # behind what a chat template writes before an item
        if sequence[start:-1] != ids:
            raise ValueError(
                f"`supervise_history`: {text!r} has the tokens {ids} in a history, and {sequence} as a recommendation "
                "in this chat template. Leave it out, or use text prompts."
            )
        nodes[text] = path[start : len(sequence)]
    return [layout.labels(history, length, nodes) for history, length in zip(rows["history"], lengths)]
