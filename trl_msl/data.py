# SPDX-License-Identifier: Apache-2.0
"""Windows of interactions → prompt/completion rows → token ids with their trie nodes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from .catalog import ItemCatalog, encode_items, is_unicode
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


def build_rows(windows: Dataset, catalog: ItemCatalog, template: PromptTemplate) -> Dataset:
    """
    Turn windows of interactions into TRL prompt/completion rows.

    Args:
        windows ([`~datasets.Dataset`]):
            Rows with `item_ids`, a list of ids in time order, the last one the target. Other columns are kept.
        catalog ([`ItemCatalog`]):
            The items.
        template ([`PromptTemplate`]):
            How a history becomes a prompt.

    Returns:
        [`~datasets.Dataset`] with `prompt`, `completion`, `history` (the items as written, so that a prompt that is
        too long can be shortened), `history_ids` and `item_id` (the target).

    Raises:
        `ValueError`: if an item is not in the catalogue, or a window has no history.
    """

    def rows(batch: dict[str, list]) -> dict[str, list]:
        short = [ids for ids in batch["item_ids"] if len(ids) < 2]
        if short:
            raise ValueError(f"`windows`: {len(short)} `item_ids` hold fewer than two items, such as {short[0]}.")
        indices = [catalog.indices(ids) for ids in batch["item_ids"]]
        texts = [[catalog.completions[index] for index in window] for window in indices]
        targets = [window[-1] for window in texts]
        return {
            "prompt": [template.render(window[:-1]) for window in texts],
            "completion": (
                [[{"role": "assistant", "content": text}] for text in targets] if template.conversational else targets
            ),
            "history": [window[:-1] for window in texts],
            "history_ids": [[str(item) for item in ids[:-1]] for ids in batch["item_ids"]],
            "item_id": [str(ids[-1]) for ids in batch["item_ids"]],
        }

    return windows.map(rows, batched=True, remove_columns=["item_ids"], desc="Building rows")


def tokenize_rows(
    batch: dict[str, list],
    tokenizer: PreTrainedTokenizerBase,
    trie: ItemTrie,
    max_length: int | None = None,
    prompt_template: PromptTemplate | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    labels: str = "nodes",
    supervise_history: bool = False,
) -> dict[str, list[list[int]]]:
    """
    Attach the valid tokens of the catalogue to prompt/completion rows: the function to `map` over a dataset.

    A trie node says which tokens were valid (its parent's children) and which one is right (its own), so one integer
    per token stands for a mask over the vocabulary, and travels in the `labels` column through TRL's packing, padding
    and counting. Prompt and item are tokenised apart and their ids concatenated, here and at inference alike.

    Args:
        batch (`dict[str, list]`):
            `prompt` and `completion`, standard or conversational, as TRL takes them; optionally `history`, the items
            in the prompt as they are written, oldest first, by which a long prompt is shortened.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that the trie was built with.
        trie ([`ItemTrie`]):
            Trie of the catalogue.
        max_length (`int`, *optional*):
            Longest row, in tokens. Longer rows lose their oldest history items, never part of the title.
        prompt_template ([`PromptTemplate`], *optional*):
            Template that the rows were made with, needed to shorten a prompt and for `separate_items`.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Passed to the chat template.
        labels (`str`, *optional*, defaults to `"nodes"`):
            `"nodes"` for [`MSLTrainer`], or `"tokens"` for TRL's `SFTTrainer` on the very same tokens.
        supervise_history (`bool`, *optional*, defaults to `False`):
            Whether each item of the history but the first is a target, too, given the ones before it. Needs a
            `prompt_template` with `separate_items`.

    Returns:
        `dict` of `input_ids` and `labels` (`-100` on the prompt, or on what is no item in it), lists of int. Labels
        are of the token that *should* stand there: after an item of the history that is the end token.

    Raises:
        `ValueError`: if a completion is no item of the catalogue, or a row is too long and can't be shortened.

    Example:

    ```python
    rows = rows.map(tokenize_rows, batched=True, fn_kwargs={"tokenizer": tokenizer, "trie": trie, "max_length": 512})
    ```
    """
    if labels not in ("nodes", "tokens"):
        raise ValueError(f"`labels` is {labels!r}: it must be 'nodes' or 'tokens'.")
    missing = {"prompt", "completion"} - batch.keys()
    if missing:
        raise ValueError(f"`batch` lacks the column(s) {sorted(missing)}: it has {sorted(batch)}.")
    conversational = is_conversational({key: values[0] for key, values in batch.items()})
    texts = [completion_text(completion, conversational) for completion in batch["completion"]]
    items = encode_items(tokenizer, texts, conversational, chat_template_kwargs)
    nodes = trie.find(items).cpu()
    if (nodes < 0).any():
        unknown = [text for text, node in zip(texts, nodes.tolist()) if node < 0]
        raise ValueError(
            f"`completion`: {len(unknown)} of the {len(texts)} rows read are no item of the catalogue, such as "
            f"{unknown[:3]}. Write items as `ItemCatalog.completions` has them, and build the trie with this "
            f"tokenizer and conversational={conversational}."
        )
    limit = float("inf") if max_length is None else max_length
    room = [limit - len(item) for item in items]
    prompts = fit_prompts(tokenizer, batch, room, prompt_template, chat_template_kwargs)
    if supervise_history:
        lengths = [len(prompt) for prompt in prompts]
        targets = history_labels(tokenizer, trie, batch, lengths, prompt_template, chat_template_kwargs)
    else:
        targets = [[-100] * len(prompt) for prompt in prompts]
    for target, path, item in zip(targets, trie.to("cpu").paths(nodes).tolist(), items):
        target += path[: len(item)]
    if labels == "tokens":
        targets = [_tokens(trie, target) for target in targets]
    return {"input_ids": [prompt + item for prompt, item in zip(prompts, items)], "labels": targets}


def _tokens(trie: ItemTrie, labels: list[int]) -> list[int]:
    nodes = torch.tensor(labels)
    return torch.where(nodes == -100, nodes, trie.to("cpu").tokens(nodes.clamp(min=0))).tolist()


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
    layout = _SeparateItems(tokenizer, template, rows["history"], chat_template_kwargs)
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


class _SeparateItems:
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
        layout = _SeparateItems(tokenizer, template, rows["history"], chat_template_kwargs)
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


def completion_text(completion: Any, conversational: bool, argument: str = "completion") -> str:
    if not conversational:
        return completion
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        raise ValueError(f"`{argument}` must be a single message of the assistant, the item's text, not {completion}.")
    return completion[0]["content"]
