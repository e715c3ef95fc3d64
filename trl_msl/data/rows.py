# SPDX-License-Identifier: Apache-2.0
"""Windows of interactions → prompt/completion rows → token ids with their trie nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from trl import is_conversational

from ..trie import ItemTrie
from .fit_prompts import supervised_prompts
from .tables import Source, read_table
from .task import RankingTask


def build_rows(windows: Dataset, task: RankingTask) -> Dataset:
    """
    Turn windows of interactions into TRL prompt/completion rows.

    Args:
        windows ([`~datasets.Dataset`]):
            Rows with `item_ids`, a list of ids in time order, the last one the target. Other columns are kept.
        task ([`RankingTask`]):
            The items, and how a history becomes a prompt.

    Returns:
        [`~datasets.Dataset`] with `prompt`, `completion`, `history` (the prompt's items as written, by which it can be
        shortened), `history_ids` (of the whole history) and `item_id` (the target).

    Raises:
        `ValueError`: if an item is not in the catalogue, or a window has no history.
    """
    catalog, template = task.catalog, task.prompt_template

    def rows(batch: dict[str, list]) -> dict[str, list]:
        short = [ids for ids in batch["item_ids"] if len(ids) < 2]
        if short:
            raise ValueError(f"`windows`: {len(short)} `item_ids` hold fewer than two items, such as {short[0]}.")
        indices = [catalog.indices(ids) for ids in batch["item_ids"]]
        texts = [[catalog.completions[index] for index in window] for window in indices]
        targets = [window[-1] for window in texts]
        histories = [task.shown(window[:-1]) for window in texts]
        return {
            "prompt": [template.render(history) for history in histories],
            "completion": (
                [[{"role": "assistant", "content": text}] for text in targets] if template.conversational else targets
            ),
            "history": histories,
            "history_ids": [[str(item) for item in ids[:-1]] for ids in batch["item_ids"]],
            "item_id": [str(ids[-1]) for ids in batch["item_ids"]],
        }

    return windows.map(rows, batched=True, remove_columns=["item_ids"], desc="Building rows")


def add_rows(rows: Dataset, source: Source, task: RankingTask) -> Dataset:
    """
    Training rows with further ones after them, such as titles with the semantic ids of their items.

    Args:
        rows ([`~datasets.Dataset`]):
            Rows as [`build_rows`] makes them.
        source (`str`, `Path`, [`~datasets.Dataset`] or `pandas.DataFrame`):
            The further ones, as for [`read_table`]: `prompt`, any text, and `completion`, an item as it is written.
            They become messages if the task is conversational.
        task ([`RankingTask`]):
            That of the rows.

    Returns:
        [`~datasets.Dataset`] with `prompt`, `completion` and `history`, which is empty in the further rows.

    Raises:
        `ValueError`: if the table can't be read, or the task's prompts can only be histories.
    """
    if task.prompt_template.separate_items:
        raise ValueError(
            "`extra_rows` have prompts of their own, but with `separate_items` a prompt is made of its history: leave "
            "one of them out."
        )
    table, _ = read_table(source, ["prompt", "completion"])
    if missing := int(table[["prompt", "completion"]].isna().any(axis=1).sum()):
        raise ValueError(f"`extra_rows` has {missing} rows without a prompt or a completion: fill or remove them.")
    columns = {name: table[name].tolist() for name in ("prompt", "completion")}
    if task.conversational:
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            columns[name] = [[{"role": role, "content": text}] for text in columns[name]]
    columns["history"] = [[]] * len(table)
    rows = rows.select_columns(list(columns))
    return concatenate_datasets([rows, Dataset.from_dict(columns, rows.features)])


def tokenize_rows(
    batch: dict[str, list], task: RankingTask, labels: str = "nodes", supervise_history: bool = False
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
        task ([`RankingTask`]):
            The items and the tokenizer. Rows longer than its `max_length` lose their oldest history items, never part
            of the title.
        labels (`str`, *optional*, defaults to `"nodes"`):
            `"nodes"` for [`MSLTrainer`], or `"tokens"` for TRL's `SFTTrainer` on the same tokens.
        supervise_history (`bool`, *optional*, defaults to `False`):
            Whether each item of the history but the first is a target too, given the ones before it. Needs a
            prompt template with `separate_items`.

    Returns:
        `dict` of `input_ids` and `labels` (`-100` on the prompt, or on its parts that are not targets), lists of int.
        A label is the token that *should* come: after an item of the history that is the end token.

    Raises:
        `ValueError`: if a completion is not an item of the catalogue, or a row is too long and can't be shortened.

    Example:

    ```python
    rows = rows.map(tokenize_rows, batched=True, fn_kwargs={"task": task})
    ```
    """
    if labels not in ("nodes", "tokens"):
        raise ValueError(f"`labels` is {labels!r}: it must be 'nodes' or 'tokens'.")
    missing = {"prompt", "completion"} - batch.keys()
    if missing:
        raise ValueError(
            f"`batch` lacks the column(s) {sorted(missing)}: it has {sorted(batch)}. Pass prompt/completion rows, "
            "whose completion is an item, as `build_rows` makes them from windows of interactions."
        )
    check_columns(batch)
    conversational = is_conversational({key: values[0] for key, values in batch.items()})
    texts = [completion_text(completion, conversational) for completion in batch["completion"]]
    if conversational != task.conversational:
        given, expected = ("conversational", "text") if conversational else ("text", "conversational")
        raise ValueError(
            f"`batch` holds {given} rows, but the task's prompt template makes {expected} rows: make rows with it."
        )
    items, trie = task.encode_items(texts), task.trie.to("cpu")
    nodes = trie.find(items)
    if (nodes < 0).any():
        unknown = [text for text, node in zip(texts, nodes.tolist()) if node < 0]
        raise ValueError(
            f"`completion`: {len(unknown)} of the {len(texts)} rows read are not items of the catalogue, such as "
            f"{unknown[:3]}. Write items as `ItemCatalog.completions` has them."
        )
    limit = float("inf") if task.max_length is None else task.max_length
    room = [limit - len(item) for item in items]
    if supervise_history:
        template, kwargs = task.prompt_template, task.chat_template_kwargs
        prompts, targets = supervised_prompts(task.tokenizer, trie, batch, room, template, kwargs, task.vector_tokens)
    else:
        prompts = task.fit_prompts(batch, room)
        targets = [[-100] * len(prompt) for prompt in prompts]
    for target, path, item in zip(targets, trie.paths(nodes).tolist(), items):
        target += path[: len(item)]
    if labels == "tokens":
        nodes = map(torch.tensor, targets)
        targets = [row.where(row == -100, trie.tokens(row.clamp(min=0))).tolist() for row in nodes]
    return {"input_ids": [prompt + item for prompt, item in zip(prompts, items)], "labels": targets}


def have_single_items(prompts: Iterable[list[int]], task: RankingTask) -> bool:
    """Whether each of the tokenised prompts has a history of at most one item, so that no item in it is a target."""
    left = set(map(tuple, prompts))
    for start in range(0, len(task.catalog), 10_000):
        histories = [[], *([text] for text in task.catalog.completions[start : start + 10_000])]
        rows = {"prompt": [task.prompt_template.render(history) for history in histories], "history": histories}
        left.difference_update(map(tuple, task.fit_prompts(rows, [float("inf")] * len(histories))))
        if not left:
            return True
    return False


def supervised_items(rows: Dataset, trie: ItemTrie) -> Tensor:
    """
    Items that are a target of some row.

    Args:
        rows ([`~datasets.Dataset`]):
            Rows with `labels`, as [`tokenize_rows`] makes them; packed or not.
        trie ([`ItemTrie`]):
            The task's trie, whose nodes are the labels.

    Returns:
        `torch.Tensor` of shape `(num_targets,)`, int64: their indices, ascending; with each item all of the same text.
    """
    trie = trie.to("cpu")
    end_token = trie.tokens(trie.item_nodes[0])
    is_target = torch.zeros(trie.num_nodes, dtype=torch.bool)
    for batch in rows.select_columns("labels").with_format("numpy").iter(batch_size=10_000):
        nodes = torch.from_numpy(np.concatenate(batch["labels"])).long()
        nodes = nodes[nodes != -100]
        last = nodes[trie.parents(nodes).roll(-1) != nodes]
        # Where nothing separates the items of a history, there is no position for an item's end
        end = trie.child(last, end_token.expand_as(last))
        is_target[torch.where(end < 0, last, end)] = True
    return is_target[trie.item_nodes].nonzero().squeeze(1)


def check_columns(batch: dict[str, list]) -> None:
    """Raise a `ValueError` where rows have their own options of the chat template, which TRL's trainers follow."""
    for name in ("chat_template_kwargs", "tools"):
        if any(batch.get(name) or ()):
            raise ValueError(
                f"`{name}` is a column of the rows, but all prompts must be written in the same way, in training and "
                "in use: remove it, and pass `chat_template_kwargs` to the `RankingTask`."
            )


def completion_text(completion: Any, conversational: bool, argument: str = "completion") -> str:
    """An item as it is written, from a completion of either form."""
    if not conversational:
        return completion
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        raise ValueError(f"`{argument}` must be a single message of the assistant, the item's text, not {completion}.")
    return completion[0]["content"]
