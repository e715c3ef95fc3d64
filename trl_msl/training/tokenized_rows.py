# SPDX-License-Identifier: Apache-2.0
"""Checks of rows that the user tokenised."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset

from ..data import RankingTask, have_single_items


def check_tokenized(batch: dict[str, list], task: RankingTask, dataset_name: str) -> dict[str, list]:
    """Raise if rows do not fit the task: labels must be nodes of the task's trie, and no title may be cut."""
    ids, nodes = (torch.from_numpy(np.concatenate(batch[name])) for name in ("input_ids", "labels"))
    is_last = torch.zeros(len(nodes), dtype=torch.bool)
    is_last[np.cumsum([len(row) for row in batch["labels"]]) - 1] = True
    labelled = nodes != -100
    ids, nodes, is_last = ids[labelled], nodes[labelled], is_last[labelled]
    trie, max_length = task.trie.to("cpu"), task.max_length
    on_trie = (nodes > 0) & (nodes < trie.num_nodes)
    # After an item of the history another token may stand in place of its end
    is_right = (trie.tokens(nodes * on_trie) == ids) | (torch.isin(nodes, trie.item_nodes) & ~is_last)
    num_wrong = int((~on_trie | ~is_right).sum())
    if num_wrong:
        raise ValueError(
            f"The {dataset_name} dataset has {num_wrong} label(s) that are not nodes of their tokens in the task's "
            "trie: map `tokenize_rows` with the same task."
        )
    too_long = sum(max_length is not None and len(row) > max_length for row in batch["input_ids"])
    if too_long:
        raise ValueError(
            f"`max_length` = {max_length}: {too_long} row(s) of the {dataset_name} dataset are longer, and would "
            "lose the end of their title. Map `tokenize_rows` with the same task."
        )
    return batch


def check_supervision(rows: Dataset, task: RankingTask) -> None:
    """Raise if rows to train on with `supervise_history` supervise only their last items."""
    num_targets, trie = 0, task.trie.to("cpu")
    for batch in rows.select_columns(["labels"]).iter(batch_size=10_000):
        nodes = torch.from_numpy(np.concatenate(batch["labels"]))
        num_targets += int((trie.parents(nodes[nodes != -100]) == trie.first_branching_node).sum())
    if num_targets <= len(rows) and not have_single_items(_prompts(rows), task):
        raise ValueError(
            f"`supervise_history` is True, but the {len(rows)} tokenised rows of the train dataset have only "
            f"{num_targets} targets, their last items: map `tokenize_rows` with `supervise_history=True`."
        )


def _prompts(dataset: Dataset) -> Iterator[list[int]]:
    """Tokens before the first label."""
    for batch in dataset.select_columns(["input_ids", "labels"]).iter(batch_size=10_000):
        for ids, labels in zip(batch["input_ids"], batch["labels"]):
            yield ids[: next((place for place, node in enumerate(labels) if node != -100), None)]
