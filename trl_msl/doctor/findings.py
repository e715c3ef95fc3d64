# SPDX-License-Identifier: Apache-2.0
"""What a check is given, and what it returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import ItemCatalog, RankingTask, build_rows, completion_text
from ..trie import ItemTrie


@dataclass(frozen=True)
class Finding:
    """
    What a check found. A check with nothing to report returns no finding.

    Args:
        what (`str`):
            What was checked.
        status (`str`):
            `"ok"` (a fact), `"note"` (it may need a decision) or `"error"` (it stops the training or makes its results
            wrong).
        seen (`str`):
            What was seen: counts, and the first example.
        advice (`str`, *optional*, defaults to `""`):
            What to do about it.
    """

    what: str
    status: str
    seen: str
    advice: str = ""


@dataclass(frozen=True)
class Case:
    """What is checked, see [`diagnose`], with what several checks need of it."""

    task: RankingTask
    windows: DatasetDict
    model: PreTrainedModel | None
    max_rows: int

    @property
    def catalog(self) -> ItemCatalog:
        return self.task.catalog

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.task.tokenizer

    @property
    def trie(self) -> ItemTrie:
        return self.task.trie

    @cached_property
    def rows(self) -> Dataset:
        """Rows of the first windows of the first split."""
        windows = next(iter(self.windows.values()))
        return build_rows(windows.select(range(min(self.max_rows, len(windows)))), self.task)

    @cached_property
    def target_counts(self) -> Tensor:
        """
        How often each item is a target of `train` and `validation`, which are the train file together, or else of the
        first split: `(num_items,)`, int64.
        """
        names = [name for name in ("train", "validation") if name in self.windows] or list(self.windows)[:1]
        targets = [ids[-1] for name in names for ids in self.windows[name]["item_ids"][:]]
        return torch.bincount(torch.tensor(self.catalog.indices(targets)), minlength=len(self.catalog))

    @cached_property
    def lengths(self) -> list[tuple[int, int]]:
        """Numbers of tokens of the prompt, of any length, and the item of each row."""
        texts = [completion_text(text, self.task.conversational) for text in self.rows["completion"]]
        return [(len(a), len(b)) for a, b in zip(self.prompts(self.rows), self.task.encode_items(texts))]

    def prompts(self, rows: Dataset) -> list[list[int]]:
        """Token ids of the prompts of rows, of any length."""
        return self.task.fit_prompts(rows[:], [float("inf")] * len(rows))


def note_if(what: str, found: list[str], total: int, advice: str) -> Iterator[Finding]:
    """A note that counts what was found and shows the first; nothing if nothing was found."""
    if found:
        yield Finding(what, "note", f"{len(found)} of {total}, such as {shorten(found[0])!r}", advice)


def shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
