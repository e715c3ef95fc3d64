# SPDX-License-Identifier: Apache-2.0
"""Windows of interactions → prompt/completion rows → token ids with their trie nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from .catalog import ItemCatalog, encode_items
from .prompts import PromptTemplate, SeparateItems, fit_prompts
from .trie import ItemTrie


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


def completion_text(completion: Any, conversational: bool, argument: str = "completion") -> str:
    if not conversational:
        return completion
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        raise ValueError(f"`{argument}` must be a single message of the assistant, the item's text, not {completion}.")
    return completion[0]["content"]
