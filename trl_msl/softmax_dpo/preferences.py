# SPDX-License-Identifier: Apache-2.0
"""Preference rows with several rejected items, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from trl import is_conversational
from trl.data_utils import get_dataset_column_names

from ..data import RankingTask, check_columns, completion_text


def build_preferences(rows: Dataset, task: RankingTask, negatives: Sequence[Sequence[int]]) -> Dataset:
    """
    Make preference rows with several rejected items each: TRL's form, except that `rejected` is a list.

    Args:
        rows ([`~datasets.Dataset`]):
            Rows of [`build_rows`]: their completion becomes `chosen`.
        task ([`RankingTask`]):
            The items.
        negatives (`Sequence[Sequence[int]]`):
            Indices of the rejected items of each row, as [`draw_negatives`] returns them.

    Returns:
        [`~datasets.Dataset`] with `prompt`, `chosen`, `rejected`, and the other columns of `rows`.

    Raises:
        `ValueError`: if `rows` is empty, or `negatives` has another length.
    """
    if len(negatives) != len(rows):
        raise ValueError(f"`negatives` has {len(negatives)} entries for {len(rows)} rows: pass one list for each row.")
    if len(rows) == 0:
        raise ValueError("`rows` is empty: pass at least one row.")
    conversational = is_conversational(rows[0])

    def write(item: int) -> Any:
        text = task.catalog.completions[item]
        return [{"role": "assistant", "content": text}] if conversational else text

    rejected = [[write(item) for item in items] for items in negatives]
    return rows.rename_column("completion", "chosen").add_column("rejected", rejected)


def split_pairs(preferences: Dataset) -> Dataset:
    """Make a row for each rejected item, with `prompt`, `chosen` and `rejected` as TRL's `DPOTrainer` takes them."""

    def pairs(batch: dict[str, list]) -> dict[str, list]:
        counts = [len(rejected) for rejected in batch["rejected"]]
        repeated = {
            name: [value for value, count in zip(batch[name], counts) for _ in range(count)]
            for name in ("prompt", "chosen")
        }
        return {**repeated, "rejected": [one for rejected in batch["rejected"] for one in rejected]}

    return preferences.map(pairs, batched=True, remove_columns=preferences.column_names, desc="Splitting into pairs")


def gather_rejected(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    Gather the columns `rejected1` ... `rejectedN` of S-DPO's data into lists without missing values, in one column
    `rejected`. Other datasets are returned unchanged.
    """
    columns = get_dataset_column_names(dataset)
    numbers = {name: name.removeprefix("rejected") for name in columns if name.startswith("rejected")}
    names = sorted((name for name in numbers if numbers[name].isdigit()), key=lambda name: int(numbers[name]))
    if not names:
        return dataset
    if "rejected" in columns:
        raise ValueError(f"`dataset` has a column 'rejected' and {names}: keep one or the other.")
    return dataset.map(
        lambda row: {"rejected": [row[name] for name in names if row[name] is not None]}, remove_columns=names
    )


def tokenize_preferences(batch: dict[str, list], task: RankingTask) -> dict[str, list]:
    """
    Tokenise preference rows, prompt and items separately: the function to `map` over a dataset.

    Args:
        batch (`dict[str, list]`):
            `prompt` and `chosen`, standard or conversational, as TRL takes them, and `rejected`: one completion of the
            same form, or a list of them. Optionally `history`, with which a long prompt is shortened.
        task ([`RankingTask`]):
            The items and the tokenizer. Its `max_length` bounds a prompt together with its longest completion.

    Returns:
        `dict` of `prompt_ids`, `chosen_ids` (lists of int) and `rejected_ids` (lists of lists of int).

    Raises:
        `ValueError`: if a completion is not an item of the catalogue, a row has no rejected completion or rejects its
            chosen one, or a row is too long and can't be shortened.
    """
    missing = {"prompt", "chosen", "rejected"} - batch.keys()
    if missing:
        raise ValueError(f"`batch` lacks the column(s) {sorted(missing)}: it has {sorted(batch)}.")
    check_columns(batch)
    conversational = is_conversational({"prompt": batch["prompt"][0]})
    several = [_as_list(rejected, conversational) for rejected in batch["rejected"]]
    empty = sum(len(rejected) == 0 for rejected in several)
    if empty:
        raise ValueError(f"`rejected`: {empty} of the {len(several)} rows read have no rejected completion.")
    completions = [
        completion_text(completion, conversational, "chosen` or `rejected")
        for chosen, rejected in zip(batch["chosen"], several)
        for completion in (chosen, *rejected)
    ]
    items = task.encode_items(completions)
    nodes = task.trie.find(items).tolist()
    unknown = [text for text, node in zip(completions, nodes) if node < 0]
    if unknown:
        raise ValueError(
            f"`chosen` and `rejected`: {len(unknown)} of the {len(completions)} completions read are not items "
            f"of the catalogue, such as {unknown[:3]}. Write items as `ItemCatalog.completions` has them."
        )
    chosen_ids, rejected_ids, contradictions, start = [], [], [], 0
    for rejected in several:
        chosen_ids.append(items[start])
        rejected_ids.append(items[start + 1 : start + 1 + len(rejected)])
        if nodes[start] in nodes[start + 1 : start + 1 + len(rejected)]:
            contradictions.append(completions[start])
        start += 1 + len(rejected)
    if contradictions:
        raise ValueError(
            f"`rejected`: {len(contradictions)} of the {len(several)} rows read reject their chosen item, such as "
            f"{contradictions[0]!r}. Draw other negatives."
        )
    longest = [max(map(len, [one, *others])) for one, others in zip(chosen_ids, rejected_ids)]
    limit = float("inf") if task.max_length is None else task.max_length
    prompts = task.fit_prompts(batch, [limit - length for length in longest])
    return {"prompt_ids": prompts, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}


def check_preferences(batch: dict[str, list], task: RankingTask, dataset_name: str) -> dict[str, list]:
    """Check rows that the user tokenised: completions must be items of the task, and no row too long."""
    rejected = batch.get("rejected_ids", [])
    if "chosen_ids" not in batch or not all(ids and isinstance(ids[0], list) for ids in rejected) or not rejected:
        raise ValueError(
            f"The {dataset_name} dataset has `prompt_ids`, but not in each row `chosen_ids`, a list of tokens, and "
            "`rejected_ids`, one or more lists of tokens: map `tokenize_preferences` over preference rows."
        )
    several = [[one, *others] for one, others in zip(batch["chosen_ids"], batch["rejected_ids"])]
    num_wrong = int((task.trie.find([ids for completions in several for ids in completions]) < 0).sum())
    if num_wrong:
        raise ValueError(
            f"The {dataset_name} dataset has {num_wrong} completion(s) that are not items of the task: map "
            "`tokenize_preferences` with the same task."
        )
    lengths = [len(ids) + max(map(len, completions)) for ids, completions in zip(batch["prompt_ids"], several)]
    max_length = task.max_length
    too_long = sum(max_length is not None and length > max_length for length in lengths)
    if too_long:
        raise ValueError(
            f"`max_length` = {max_length}: {too_long} row(s) of the {dataset_name} dataset are longer. Raise it in "
            "the task, and map `tokenize_preferences` with that task."
        )
    return batch


def _as_list(rejected: Any, conversational: bool) -> list:
    """The rejected completions of a row, which may be a single one as in TRL's own rows."""
    is_single = isinstance(rejected, str) or (conversational and len(rejected) > 0 and isinstance(rejected[0], dict))
    return [rejected] if is_single else list(rejected)
