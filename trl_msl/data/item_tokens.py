# SPDX-License-Identifier: Apache-2.0
"""The one place where item text becomes tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


_CONTENT = "\u2063item text\u2063"  # stands for the item where a chat template is rendered once for all items


def encode_items(
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[str],
    conversational: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[int]]:
    """
    Token ids that a model has to write for each item, tokenised apart from the prompt.

    For a base model these are the text's tokens and the tokenizer's EOS. For a conversation they are exactly the
    tokens that the chat template puts after the generation prompt (an empty think block, say), up to and including the
    token that ends the assistant's turn, which need not be the tokenizer's EOS.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        completions (`Sequence[str]`):
            Items as they are written: [`ItemCatalog.completions`].
        conversational (`bool`, *optional*, defaults to `False`):
            Whether the item is the content of an assistant's turn.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Passed to the chat template.

    Raises:
        `ValueError`: if the tokenizer has no end token or chat template, the template does not continue its own
        generation prompt, or a text holds the end token.
    """
    if conversational:
        before, after, end_token = _chat_turn(tokenizer, chat_template_kwargs or {})
    elif tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer` has no EOS token, which must end an item: set `tokenizer.eos_token`.")
    else:
        before, after, end_token = "", tokenizer.eos_token, tokenizer.eos_token_id
    sequences = tokenizer([before + text + after for text in completions], add_special_tokens=False)["input_ids"]
    for text, sequence in zip(completions, sequences):
        if sequence.count(end_token) != 1 or sequence[-1] != end_token:
            raise ValueError(
                f"`completions`: the tokens of {text!r} must hold the end token {tokenizer.decode([end_token])!r} "
                "once, at the end. Remove it from the item's text."
            )
    return sequences


def texts_with_special_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """The texts that contain a special token of the tokenizer, such as `<|im_start|>`, as text."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    pattern = re.compile("|".join(map(re.escape, special)) or "(?!)")
    return [text for text in texts if pattern.search(text)]


def describe_end(
    tokenizer: PreTrainedTokenizerBase, conversational: bool, chat_template_kwargs: dict[str, Any] | None = None
) -> tuple[str, str]:
    """The token that ends an item, and what else the chat template writes around one, as text."""
    if not conversational:
        return tokenizer.eos_token, ""
    before, after, end_token = _chat_turn(tokenizer, chat_template_kwargs or {})
    end = tokenizer.decode([end_token])
    around = [repr(text) for text in (before, after.removesuffix(end)) if text]
    return end, " and ".join(around)


def _chat_turn(tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any]) -> tuple[str, str, int]:
    """What the chat template puts before and after an assistant's content: text, text, and the end token's id."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "`tokenizer` has no chat template, but the rows are conversational: set one, or use text rows."
        )
    messages = [{"role": "user", "content": "Hello."}]
    prompt = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **chat_template_kwargs
    )
    messages.append({"role": "assistant", "content": _CONTENT})
    whole = tokenizer.apply_chat_template(messages, tokenize=False, **chat_template_kwargs)
    if not whole.startswith(prompt) or whole.count(_CONTENT) != 1:
        raise ValueError(
            "`tokenizer.chat_template` does not continue its own generation prompt, so the model would be trained on "
            f"another context than it sees in use. Generation prompt: {prompt!r}; conversation: {whole!r}. Try "
            "`chat_template_kwargs`, such as {'enable_thinking': False}."
        )
    before, after = whole[len(prompt) :].split(_CONTENT)
    ends = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = [(after.index(text), text) for text in ends if text in after]
    if not found:
        raise ValueError(
            f"`tokenizer.chat_template` ends a turn by {after!r}, which holds no special token to stop at."
        )
    place, end = min(found)
    return before, after[: place + len(end)], ends[end]
