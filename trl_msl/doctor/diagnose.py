# SPDX-License-Identifier: Apache-2.0
"""Checks data, tokenizer and model for what is known to go wrong with recommenders, before they are trained."""

from __future__ import annotations

from datasets import DatasetDict
from transformers import PreTrainedModel

from ..data import ItemCatalog, RankingTask
from .checks import CHECKS, MODEL_CHECKS, Case, Finding


def diagnose(
    task: RankingTask, windows: DatasetDict, model: PreTrainedModel | None = None, max_rows: int = 1000
) -> list[Finding]:
    """
    Check data, tokenizer and, where it is given, model.

    Args:
        task ([`RankingTask`]):
            What is to be trained and ranked.
        windows ([`~datasets.DatasetDict`]):
            Windows of interactions by split, as [`read_windows`] and [`split_by_time`] give them.
        model ([`~transformers.PreTrainedModel`], *optional*):
            Model to train or to recommend with.
        max_rows (`int`, *optional*, defaults to `1000`):
            Number of rows and of items on which checks that tokenise are made.

    Returns:
        `list[Finding]`: what the checks found, in the order in which data is prepared.
    """
    usable, findings = _usable(task.catalog, windows)
    if not usable:
        return findings
    case = Case(task, usable, model, max_rows)
    for check in CHECKS:
        findings += check(case)
    for check in MODEL_CHECKS if model is not None else ():
        findings += check(case)
        if findings[-1].status == "error":  # a model that can't be run
            break
    return findings


def _usable(catalog: ItemCatalog, windows: DatasetDict) -> tuple[DatasetDict, list[Finding]]:
    """The windows that can become rows, and what is to be said of the others."""
    known_ids = catalog.index_of_id.keys()
    unknown = {item for split in windows.values() for ids in split["item_ids"] for item in set(ids) - known_ids}
    known = windows.filter(lambda row: known_ids >= set(row["item_ids"])) if unknown else windows
    total, lost = _count(windows), _count(windows) - _count(known)
    seen = f"{len(unknown)} ids are not, such as {min(unknown)!r}, in {lost} of {total} windows" if unknown else ""
    findings = [
        Finding(
            "Items of the log in the catalogue",
            "error" if unknown else "ok",
            seen or f"all, in {total} windows",
            "Add these items to the catalogue, or leave their interactions out." if unknown else "",
        )
    ]
    usable = known.filter(lambda row: len(row["item_ids"]) > 1)
    if short := _count(known) - _count(usable):
        remedy = "A target needs a history: leave them out."
        findings.append(Finding("Windows of a single item", "error", f"{short} of {total}", remedy))
    return DatasetDict({name: split for name, split in usable.items() if len(split)}), findings


def _count(windows: DatasetDict) -> int:
    return sum(map(len, windows.values()))
