# SPDX-License-Identifier: Apache-2.0
"""Where item text becomes tokens, which are never control tokens, whatever the text contains."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase


_CONTENT = "\u2063item text\u2063"  # stands for the item where a chat template is rendered once for all items
_CUT = "\ufdd0cut\ufdd0"  # where a text is cut before tokenisation. Unicode reserves U+FDD0 for use within programs


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

    Special tokens spelled out in an item's text are tokenised as text: see [`texts_with_special_tokens`]. Tokens that
    are added to represent items, such as semantic ids, must therefore be ordinary ones: `tokenizer.add_tokens(...)`.

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
        `ValueError`: if the tokenizer has no end token or chat template, or the template does not continue its own
        generation prompt.
    """
    if conversational:
        before, after, end_token = _chat_turn(tokenizer, chat_template_kwargs or {})
    elif tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer` has no EOS token, with which an item must end: set `tokenizer.eos_token`.")
    else:
        before, after, end_token = "", tokenizer.eos_token, tokenizer.eos_token_id
    sequences = encode_texts(tokenizer, [before + text + after for text in cut_special_tokens(tokenizer, completions)])
    for text, sequence in zip(completions, sequences):
        # A tokenizer could still turn text into the end token, by normalising it for example
        if sequence.count(end_token) != 1 or sequence[-1] != end_token:
            raise ValueError(
                f"`completions`: the tokens of {text!r} must hold the end token {tokenizer.decode([end_token])!r} "
                "once, at the end. Change the item's text."
            )
    return sequences


def texts_with_special_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """
    The `texts` that spell out a special token, or another token that the chat template writes (such as `<think>`). In
    items it is tokenised as text, so that no title can end an item or open a turn of a conversation.
    """
    return [text for text, cut in zip(texts, cut_special_tokens(tokenizer, texts)) if text != cut]


def cut_special_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """
    Texts with a mark within each special token that they spell out, for [`encode_texts`] to cut there.

    Unlike one tokenised with `split_special_tokens=True`, a text that is cut may be part of another text whose special
    tokens are meant, or of a chat template. This works for slow and fast tokenizers, and for tokens that a chat
    template writes but the tokenizer does not call special. All other texts are unchanged.
    """
    template, joined = str(tokenizer.chat_template or ""), "\n".join(texts)
    added = tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special or token.content in template}
    tokens.update(tokenizer.all_special_tokens)
    # Not white space, which some tokenizers add as tokens for runs of blanks and templates write as ordinary text
    found = [re.escape(token) for token in tokens if token in joined and len(token) > 1 and not token.isspace()]
    if not found:
        return list(texts)
    first_character = re.compile(f"(?={'|'.join(found)}).", re.DOTALL)  # of each token, also where two overlap
    return [first_character.sub(rf"\g<0>{_CUT}", text) for text in texts]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], begin: bool = False) -> list[list[int]]:
    """
    Token ids of texts, tokenised in parts where [`cut_special_tokens`] has marked them.

    With `begin` they start with the special tokens that the tokenizer puts before a text (BOS), but do not end with
    the EOS that some tokenizers put after it.
    """
    if len(texts) == 0:
        return []
    parts = [text.split(_CUT) for text in texts]
    encoded = tokenizer([first for first, *_ in parts], add_special_tokens=begin)["input_ids"]
    if begin and tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id:
        encoded = [ids[:-1] for ids in encoded]
    for ids, (_, *rest) in zip(encoded, parts):
        if rest:
            ids += chain.from_iterable(tokenizer(rest, add_special_tokens=False)["input_ids"])
    return encoded


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
            f"`tokenizer.chat_template` ends a turn with {after!r}, which holds no special token to stop at."
        )
    place, end = min(found)
    return before, after[: place + len(end)], ends[end]
