# SPDX-License-Identifier: Apache-2.0
"""A history of items → a prompt → its token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from .catalog import is_unicode
from .item_tokens import cut_special_tokens, encode_texts


Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class PromptTemplate:
    """
    How a user's history becomes a prompt.

    Args:
        text (`str`):
            Prompt with `{history}` where the items go.
        separator (`str`, *optional*, defaults to `", "`):
            What stands between two items of the history.
        conversational (`bool`, *optional*, defaults to `False`):
            Whether the prompt is a user's message, to be put into the tokenizer's chat template.
        separate_items (`bool`, *optional*, defaults to `False`):
            Whether each item of the history is tokenised by itself, so that it has the same tokens as a
            recommendation of it, whatever surrounds it. `MSLConfig(supervise_history=True)` needs it. Rows then need a
            `history`, and this template must be passed wherever their prompts are encoded.
        vector_tokens (`bool`, *optional*, defaults to `False`):
            Whether each item of the history is followed by the token of its vector, for a model with
            [`add_item_vectors`]. Needs `separate_items`.

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
    vector_tokens: bool = False

    def __post_init__(self):
        if not all(isinstance(text, str) and is_unicode(text) for text in (self.text, self.separator)):
            raise ValueError(f"`text` and `separator` are {self.text!r} and {self.separator!r}: they must be texts.")
        for name in ("conversational", "separate_items", "vector_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}: it must be `True` or `False`.")
        if self.text.count("{history}") != 1:
            raise ValueError(f"`text` is {self.text!r}: it must contain {{history}} exactly once.")
        if self.vector_tokens and not (self.separate_items and self.separator and self.text.split("{history}")[1]):
            raise ValueError(
                "`vector_tokens` needs `separate_items=True`, a `separator`, and text after {history} in `text`."
            )

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
        """The prompt for a history of written items, oldest first."""
        before, after = self.text.split("{history}")
        text = before + self.separator.join(history) + after
        return [{"role": "user", "content": text}] if self.conversational else text


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    chat_template_kwargs: dict[str, Any] | None = None,
    template: PromptTemplate | None = None,
) -> list[list[int]]:
    """
    Token ids of prompts, up to where the item begins.

    A text gets the special tokens that the tokenizer puts before it (BOS), but no EOS after it. A list of messages is
    put into the chat template, generation prompt included.

    Special tokens spelled out in a prompt become special tokens, as its author may mean them. In prompts made with
    `template`, however, those in items, whose texts come from elsewhere, are tokenised as text.

    Raises:
        `ValueError`: if `template` has `vector_tokens`, which only rows with a `history` can get.
    """
    if template is not None and template.vector_tokens:
        raise ValueError(
            "`prompts` are without their items' vectors: encode rows with `history` by `ranking_prompts`."
        )
    if template is not None:
        prompts = _with_cut_items(tokenizer, prompts, template)
    if len(prompts) and not isinstance(prompts[0], str):
        prompts = [render_chat(tokenizer, messages, chat_template_kwargs) for messages in prompts]
        return encode_texts(tokenizer, prompts)
    return encode_texts(tokenizer, prompts, begin=True)


def _with_cut_items(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], template: PromptTemplate
) -> list[Prompt]:
    """Prompts, with marks in the items of those made with `template`: see [`cut_special_tokens`]."""
    before, after = template.text.split("{history}")
    histories = {}
    for place, prompt in enumerate(prompts):
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        if not isinstance(text, str):
            continue
        # A prompt of another form is not marked: all of it is its author's text
        if text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after):
            history = text[len(before) : len(text) - len(after)]
            # Without the separators, which may hold special tokens like the rest of the template
            histories[place] = history.split(template.separator) if template.separator else [history]
    cut = iter(cut_special_tokens(tokenizer, list(chain.from_iterable(histories.values()))))
    prompts = list(prompts)
    for place, items in histories.items():
        text = before + template.separator.join(islice(cut, len(items))) + after
        is_text = isinstance(prompts[place], str)
        prompts[place] = text if is_text else [*prompts[place][:-1], {**prompts[place][-1], "content": text}]
    return prompts


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], chat_template_kwargs: dict[str, Any] | None
) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **(chat_template_kwargs or {})
    )
