# SPDX-License-Identifier: Apache-2.0
"""Preference rows with several rejected items: their form, their tokens, and their batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from trl import is_conversational
from trl.data_utils import get_dataset_column_names

from .catalog import ItemCatalog, encode_items
from .data import completion_text
from .prompts import PromptTemplate, fit_prompts
from .trie import ItemTrie


def build_preferences(rows: Dataset, catalog: ItemCatalog, negatives: Sequence[Sequence[int]]) -> Dataset:
    """
    Preference rows with several rejected items each, in TRL's form but for `rejected`, which is a list.

    Args:
        rows ([`~datasets.Dataset`]):
            Rows of [`build_rows`]: their completion becomes `chosen`.
        catalog ([`ItemCatalog`]):
            The items.
        negatives (`Sequence[Sequence[int]]`):
            Item indices to be rejected for each row, as [`draw_negatives`] gives them.

    Returns:
        [`~datasets.Dataset`] with `prompt`, `chosen`, `rejected`, and the other columns of `rows`.
    """
    if len(negatives) != len(rows):
        raise ValueError(f"`negatives` has {len(negatives)} entries for {len(rows)} rows.")
    if len(rows) == 0:
        raise ValueError("`rows` is empty: there is nothing to choose.")
    conversational = is_conversational(rows[0])

    def write(item: int) -> Any:
        text = catalog.completions[item]
        return [{"role": "assistant", "content": text}] if conversational else text

    rejected = [[write(item) for item in items] for items in negatives]
    return rows.rename_column("completion", "chosen").add_column("rejected", rejected)


def split_pairs(preferences: Dataset) -> Dataset:
    """A row for each rejected item, with `prompt`, `chosen` and `rejected` as TRL's own `DPOTrainer` takes them."""

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
    Put the columns `rejected1` ... `rejectedN` of S-DPO's data into one column `rejected`, a list without what is
    missing. Other datasets are returned as they are.
    """
    columns = get_dataset_column_names(dataset)
    numbers = {name: name.removeprefix("rejected") for name in columns if name.startswith("rejected")}
    names = sorted((name for name in numbers if numbers[name].isdigit()), key=lambda name: int(numbers[name]))
    if not names:
        return dataset
    if "rejected" in columns:
        raise ValueError(f"`dataset` has a column 'rejected' and {names}: keep either the one or the others.")
    return dataset.map(
        lambda row: {"rejected": [row[name] for name in names if row[name] is not None]}, remove_columns=names
    )


def tokenize_preferences(
    batch: dict[str, list],
    tokenizer: PreTrainedTokenizerBase,
    trie: ItemTrie,
    max_length: int | None = None,
    prompt_template: PromptTemplate | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> dict[str, list]:
    """
    Token ids of preference rows, prompt and items apart: the function to `map` over a dataset.

    Args:
        batch (`dict[str, list]`):
            `prompt` and `chosen`, standard or conversational, as TRL takes them, and `rejected`: one completion of the
            same form, or a list of them. Optionally `history`, by which a long prompt is shortened.
        tokenizer, trie, max_length, prompt_template, chat_template_kwargs:
            As for [`tokenize_rows`]. `max_length` bounds a prompt with the longest of its completions.

    Returns:
        `dict` of `prompt_ids`, `chosen_ids` (lists of int) and `rejected_ids` (lists of lists of int).

    Raises:
        `ValueError`: if a completion is no item of the catalogue, a row has no rejected one, or rejects what it has
            chosen, or a row is too long and can't be shortened.
    """
    missing = {"prompt", "chosen", "rejected"} - batch.keys()
    if missing:
        raise ValueError(f"`batch` lacks the column(s) {sorted(missing)}: it has {sorted(batch)}.")
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
    items = encode_items(tokenizer, completions, conversational, chat_template_kwargs)
    nodes = trie.find(items).tolist()
    unknown = [text for text, node in zip(completions, nodes) if node < 0]
    if unknown:
        raise ValueError(
            f"`chosen` and `rejected`: {len(unknown)} of the {len(completions)} completions read are no item of the "
            f"catalogue, such as {unknown[:3]}. Write items as `ItemCatalog.completions` has them, and build the trie "
            f"with this tokenizer and conversational={conversational}."
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
            f"`rejected`: {len(contradictions)} of the {len(several)} rows read reject what they have chosen, such as "
            f"{contradictions[0]!r}. Draw other negatives."
        )
    longest = [max(map(len, [one, *others])) for one, others in zip(chosen_ids, rejected_ids)]
    room = [float("inf") if max_length is None else max_length - length for length in longest]
    prompts = fit_prompts(tokenizer, batch, room, prompt_template, chat_template_kwargs)
    return {"prompt_ids": prompts, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}


def check_preferences(
    batch: dict[str, list], trie: ItemTrie, max_length: int | None, dataset_name: str
) -> dict[str, list]:
    """Rows that the user tokenised: completions must be items of this trie, and no row too long."""
    if not {"chosen_ids", "rejected_ids"} <= batch.keys() or not isinstance(batch["rejected_ids"][0][0], list):
        raise ValueError(
            f"The {dataset_name} dataset has `prompt_ids`, but not `chosen_ids`, tokens, and `rejected_ids`, lists of "
            "tokens: map `tokenize_preferences` over preference rows, which makes all of them."
        )
    several = [[one, *others] for one, others in zip(batch["chosen_ids"], batch["rejected_ids"])]
    num_wrong = int((trie.find([ids for completions in several for ids in completions]) < 0).sum())
    if num_wrong:
        raise ValueError(
            f"The {dataset_name} dataset has {num_wrong} completion(s) that are no item of `trie`: map "
            "`tokenize_preferences` with this very trie and tokenizer."
        )
    lengths = [len(ids) + max(map(len, completions)) for ids, completions in zip(batch["prompt_ids"], several)]
    too_long = sum(max_length is not None and length > max_length for length in lengths)
    if too_long:
        raise ValueError(
            f"`max_length` = {max_length}: {too_long} row(s) of the {dataset_name} dataset are longer. Raise it, or "
            "pass it to `tokenize_preferences`."
        )
    return batch


def _as_list(rejected: Any, conversational: bool) -> list:
    """A single rejected completion, as TRL's own rows have it, as a list of one."""
    is_single = isinstance(rejected, str) or (conversational and len(rejected) > 0 and isinstance(rejected[0], dict))
    return [rejected] if is_single else list(rejected)


@dataclass
class DataCollatorForSoftmaxPreference:
    """
    Batches of prompts with their completions.

    A *segment* is a completion after the last token of its prompt, which is repeated at its start, so that its hidden
    state predicts the completion's first token. With `share_prompt` a row is a prompt followed by its segments, none
    of which is to see another one (see [`segment_mask`]): N completions cost one prompt. Otherwise each segment has a
    row, and a prompt, of its own.

    Args:
        trie ([`ItemTrie`]):
            Trie of the catalogue.
        pad_token_id (`int`):
            Token that fills rows up.
        share_prompt (`bool`, *optional*, defaults to `True`):
            Whether completions of a prompt share it.
        skip_forced (`bool`, *optional*, defaults to `False`):
            Whether to leave out the tokens at an item's end that are forced: among the valid tokens they cost nothing.
        num_rejected (`int`, *optional*, defaults to `0`):
            Fewest columns of rejected completions, so that all batches are alike.
        pad_to_multiple_of (`int`, *optional*):
            Number of which the length of rows is a multiple.

    Returns of a call, for `num_examples` examples, all of shape `(num_rows, length)` and int64 unless said otherwise:

    - `input_ids`, `position_ids`;
    - `labels`: trie nodes of the completions, `-100` elsewhere;
    - `segments`: 0 on what comes before all completions, 1 on the chosen one, 2 and so on on the rejected ones, `-1`
      on padding;
    - `examples`, of shape `(num_rows,)`: the example that a row belongs to;
    - `rejected_mask`, bool of shape `(num_examples, num_rejected)`: which rejected completions there are;
    - `ref_chosen_logps` and `ref_rejected_logps`, fp32, if the examples have them.
    """

    trie: ItemTrie
    pad_token_id: int
    share_prompt: bool = True
    skip_forced: bool = False
    num_rejected: int = 0
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        paths = iter(self._paths([ids for e in examples for ids in (e["chosen_ids"], *e["rejected_ids"])]))
        rows, owners = [], []
        for number, example in enumerate(examples):
            *shared, last = example["prompt_ids"]
            completions = [example["chosen_ids"], *example["rejected_ids"]]
            segments = []
            for place, ids in enumerate(completions, start=1):
                nodes = next(paths)
                segments.append(([last, *ids[: len(nodes)]], [-100, *nodes], place))
            for group in [segments] if self.share_prompt else [[segment] for segment in segments]:
                rows.append(_row(shared, group))
                owners.append(number)
        columns = ("input_ids", "position_ids", "labels", "segments")
        fills = (self.pad_token_id, 0, -100, -1)
        batch = {
            name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=fill)
            for name, fill in zip(columns, fills)
        }
        missing = -batch["input_ids"].shape[1] % (self.pad_to_multiple_of or 1)
        batch = {n: torch.nn.functional.pad(batch[n], (0, missing), value=fill) for n, fill in zip(columns, fills)}
        counts = torch.tensor([len(example["rejected_ids"]) for example in examples])
        width = max(self.num_rejected, int(counts.max()))
        batch["examples"] = torch.tensor(owners)
        batch["rejected_mask"] = torch.arange(width) < counts[:, None]
        if "ref_chosen_logps" in examples[0]:
            batch["ref_chosen_logps"] = torch.tensor([example["ref_chosen_logps"] for example in examples])
            # Precomputed for batches that can have been wider, or narrower; what there is not does not count
            padded = [(example["ref_rejected_logps"] + [0.0] * width)[:width] for example in examples]
            batch["ref_rejected_logps"] = torch.tensor(padded)
        return batch

    def _paths(self, items: list[list[int]]) -> list[list[int]]:
        """Trie nodes of each item's tokens, up to the last one that was a choice if forced ones are to be skipped."""
        trie = self.trie.to("cpu")
        paths = trie.paths(trie.find(items))
        lengths = (paths >= 0).sum(dim=1)
        if self.skip_forced:
            is_choice = (trie.num_valid_tokens(paths.clamp(min=0)) > 1) & (paths >= 0)
            lengths = ((torch.arange(paths.shape[1]) + 1) * is_choice).amax(dim=1)
        return [path[:length] for path, length in zip(paths.tolist(), lengths.tolist())]


def _row(shared: list[int], segments: list[tuple[list[int], list[int], int]]) -> dict[str, list[int]]:
    """One row of a batch: the shared beginning and the segments after it."""
    row = {
        "input_ids": list(shared),
        "position_ids": list(range(len(shared))),
        "labels": [-100] * len(shared),
        "segments": [0] * len(shared),
    }
    for ids, labels, place in segments:
        row["input_ids"] += ids
        row["position_ids"] += range(len(shared), len(shared) + len(ids))
        row["labels"] += labels
        row["segments"] += [place] * len(ids)
    return row


def segment_mask(segments: Tensor) -> Tensor:
    """
    Which positions see which: those before them of their own segment, and of what all segments share.

    Args:
        segments (`torch.Tensor` of shape `(num_rows, length)`, int64):
            As [`DataCollatorForSoftmaxPreference`] makes them.

    Returns:
        `torch.Tensor` of shape `(num_rows, length, length)`, bool: rows see columns. Padding sees itself.
    """
    same = segments[:, :, None] == segments[:, None, :]
    is_shared = (segments == 0)[:, None, :]
    return (same | is_shared).tril()
