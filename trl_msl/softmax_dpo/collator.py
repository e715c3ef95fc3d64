# SPDX-License-Identifier: Apache-2.0
"""Batches of prompts with several completions each, which may share their prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..trie import ItemTrie


@dataclass
class DataCollatorForSoftmaxPreference:
    """
    Batches of prompts with their completions.

    A *segment* is the last token of a prompt, whose hidden state predicts a completion's first token, and the
    completion. With `share_prompt` a row is a prompt without its last token, followed by its segments, which must not
    attend to each other (see [`segment_mask`]): N completions cost one prompt. Otherwise each segment has its own row
    and its own copy of the prompt.

    Args:
        trie ([`ItemTrie`]):
            Trie of the catalogue.
        pad_token_id (`int`):
            Token with which rows are padded.
        share_prompt (`bool`, *optional*, defaults to `True`):
            Whether the completions of a prompt share a row.
        skip_forced (`bool`, *optional*, defaults to `False`):
            Whether to leave out forced tokens at the end of items, whose log-probability among the valid tokens is 0.
        num_rejected (`int`, *optional*, defaults to `0`):
            Minimum number of columns of rejected completions, so that all batches have the same number.
        pad_to_multiple_of (`int`, *optional*):
            Pad rows to a multiple of this length.

    A call returns, for `num_examples` examples, all of shape `(num_rows, length)` and int64 unless said otherwise:

    - `input_ids`, `position_ids`;
    - `labels`: trie nodes of the completions, `-100` elsewhere;
    - `segments`: 0 on the tokens before all segments, 1 on the chosen completion, 2, 3, ... on the rejected ones, `-1`
      on padding;
    - `examples`, of shape `(num_rows,)`: the example that each row belongs to;
    - `rejected_mask`, bool of shape `(num_examples, num_rejected)`: which rejected completions exist;
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
            # Perhaps precomputed with another number of columns; those without a completion are masked
            padded = [(example["ref_rejected_logps"] + [0.0] * width)[:width] for example in examples]
            batch["ref_rejected_logps"] = torch.tensor(padded)
        return batch

    def _paths(self, items: list[list[int]]) -> list[list[int]]:
        """Trie nodes of each item's tokens; with `skip_forced`, up to the last one that is a choice."""
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
    Which positions attend to which: to themselves, and to earlier ones of their own segment and of the shared prompt.

    Args:
        segments (`torch.Tensor` of shape `(num_rows, length)`, int64):
            From [`DataCollatorForSoftmaxPreference`].

    Returns:
        `torch.Tensor` of shape `(num_rows, length, length)`, bool, queries by keys.
    """
    same = segments[:, :, None] == segments[:, None, :]
    is_shared = (segments == 0)[:, None, :]
    return (same | is_shared).tril()
