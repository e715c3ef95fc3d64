# SPDX-License-Identifier: Apache-2.0
"""Histories whose items are tokenised one by one, so that each of them can be a training target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..trie import FIRST_VECTOR_TOKEN, ItemTrie
from .item_tokens import cut_special_tokens, encode_items, encode_texts
from .prompts import Prompt, PromptTemplate, render_chat


class SeparateItems:
    """
    Token ids of `before item separator item ... after`, the parts of a template, each tokenised by itself; with
    `vector_tokens`, each item is followed by the token of its vector.

    Args:
        tokenizer, chat_template_kwargs:
            As for [`encode_prompts`].
        template ([`PromptTemplate`]):
            Template with `separate_items`.
        rows (`dict[str, list]`):
            `prompt` and `history`, as [`build_rows`] makes them.
        vector_tokens (`dict[str, int]`, *optional*):
            Token of each item's vector, by the item's text; for a template with `vector_tokens`.

    Raises:
        `ValueError`: if the rows have no history or were not made with `template`, a text in a history has no vector
        token, or the chat template does not write a user's message exactly once.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        rows: dict[str, list],
        chat_template_kwargs: dict[str, Any] | None,
        vector_tokens: dict[str, int] | None = None,
    ):
        check_histories(rows, range(len(rows["prompt"])), template)
        mark = "\u2063history\u2063"  # stands for the items, so that the prompt is rendered once for all rows
        prompt = template.render([mark])
        if template.conversational:
            prompt = render_chat(tokenizer, prompt, chat_template_kwargs)
        if prompt.count(mark) != 1:
            raise ValueError(
                f"`tokenizer.chat_template` writes a user's message {prompt.count(mark)} times, but `separate_items` "
                "needs it exactly once: leave `separate_items` out."
            )
        before, after = prompt.split(mark)
        # A text begins with what the tokenizer puts there (BOS), which a chat template writes itself
        (self.before,) = encode_texts(tokenizer, [before], begin=not template.conversational)
        self.separator, self.after = encode_texts(tokenizer, [template.separator, after])
        self.histories = rows["history"]
        texts = list(dict.fromkeys(text for history in self.histories for text in history))
        self.items = dict(zip(texts, encode_texts(tokenizer, cut_special_tokens(tokenizer, texts))))
        self.vectors: dict[str, list[int]] = {text: [] for text in texts}
        if template.vector_tokens:
            if unknown := [text for text in texts if text not in (vector_tokens or {})]:
                raise ValueError(
                    f"`history` holds {len(unknown)} text(s) without a vector token, such as {unknown[:3]}: write "
                    "items as `ItemCatalog.completions` has them, and encode prompts by the `RankingTask`."
                )
            self.vectors = {text: [vector_tokens[text]] for text in texts}
        self._num_vectors = int(template.vector_tokens)  # after each item
        self._encoding = tokenizer, template.conversational, chat_template_kwargs

    def prompts(self, prompts: Sequence[Prompt], histories: Sequence[Sequence[str]]) -> list[list[int]]:
        """Token ids of prompts, from their histories alone. The rows must hold all items."""
        return [self._prompt(history) for history in histories]

    def _prompt(self, history: Sequence[str]) -> list[int]:
        ids = list(self.before)
        for place, text in enumerate(history):
            ids += (self.separator if place else []) + self.items[text] + self.vectors[text]
        return ids + self.after

    def labels(self, trie: ItemTrie, lengths: Sequence[int]) -> list[list[int]]:
        """
        Labels of the rows' prompts, which may have been shortened to `lengths` tokens: see [`supervised_prompts`].

        Raises:
            `ValueError`: if a text in a history is not an item, or has other tokens there than as a recommendation.
        """
        nodes = self._nodes(trie)
        return [self._labels(history, length, nodes) for history, length in zip(self.histories, lengths)]

    def _labels(self, history: Sequence[str], length: int, nodes: dict[str, list[int]]) -> list[int]:
        """Labels of the prompt of `length` tokens, which holds the last items of `history`, or all of them."""
        labels, gap = [-100] * length, self._num_vectors + len(self.after)
        stop = length - gap
        for text in reversed(history):
            start = stop - len(self.items[text])
            if start == len(self.before):  # the oldest item, which follows from nothing
                break
            # The item's end belongs right after it, in place of its vector: nothing that predicts an item has seen
            # that. Without a token between items there is no position for it
            path = nodes[text]
            labels[start : stop + min(gap, 1)] = path[: len(path) if gap else -1]
            gap = self._num_vectors + len(self.separator)
            stop = start - gap
        return labels

    def _nodes(self, trie: ItemTrie) -> dict[str, list[int]]:
        """Nodes of each item's tokens as they stand in a history, and of its end."""
        if not self.items:
            return {}
        tokenizer, conversational, chat_template_kwargs = self._encoding
        sequences = encode_items(tokenizer, list(self.items), conversational, chat_template_kwargs)
        ends = trie.find(sequences).cpu()
        if (ends < 0).any():
            unknown = [text for text, end in zip(self.items, ends.tolist()) if end < 0]
            raise ValueError(
                f"`history` holds {len(unknown)} text(s) that are not items of the trie, such as {unknown[:3]}: write "
                "items as `ItemCatalog.completions` has them."
            )
        nodes = {}
        for (text, ids), sequence, path in zip(self.items.items(), sequences, trie.to("cpu").paths(ends).tolist()):
            start = len(sequence) - 1 - len(ids)  # after what a chat template writes before an item
            if sequence[start:-1] != ids:
                raise ValueError(
                    f"`supervise_history`: {text!r} has the tokens {ids} in a history, and {sequence} as a "
                    "recommendation in this chat template. Leave it out, or use text prompts."
                )
            nodes[text] = path[start : len(sequence)]
        return nodes


def make_vector_tokens(texts: Sequence[str]) -> dict[str, int]:
    """Token of the vector of each item, by its text; of items with the same text, that of the first."""
    return {text: FIRST_VECTOR_TOKEN + index for index, text in reversed(list(enumerate(texts)))}


def check_histories(rows: dict[str, list], indices: Sequence[int], template: PromptTemplate | None) -> None:
    """Raise where the prompts of some rows are not their histories in `template`."""
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
