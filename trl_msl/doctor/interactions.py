# SPDX-License-Identifier: Apache-2.0
"""Checks of the interactions: what is usable, the splits, and the targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from datasets import DatasetDict

from ..data import ItemCatalog
from .findings import Case, Finding, note_if


_TOP_K = 10


def usable_windows(catalog: ItemCatalog, windows: DatasetDict) -> tuple[DatasetDict, list[Finding]]:
    """The windows that can become rows, without empty splits, and findings about the others."""
    known_ids, total, findings = catalog.index_of_id.keys(), _count(windows), []
    unknown = {item for split in windows.values() for ids in split["item_ids"] for item in ids} - known_ids
    if unknown:
        known = windows.filter(lambda row: known_ids >= set(row["item_ids"]), desc="Checking items")
        seen = f"{len(unknown)} ids, such as {min(unknown)!r}, in {total - _count(known)} of {total} windows"
        advice = "Add these items to the catalogue, or leave their interactions out."
        findings.append(Finding("Items that the catalogue lacks", "error", seen, advice))
        windows = known
    usable = windows.filter(lambda row: len(row["item_ids"]) > 1, desc="Checking windows")
    if short := _count(windows) - _count(usable):
        advice = "A target needs a history: leave them out."
        findings.append(Finding("Windows of a single item", "error", f"{short} of {total}", advice))
    return DatasetDict({name: split for name, split in usable.items() if len(split)}), findings


def _count(windows: DatasetDict) -> int:
    return sum(map(len, windows.values()))


def check_splits(case: Case) -> Iterator[Finding]:
    missing = [name for name in ("train", "validation", "test") if name not in case.windows]
    sizes = ", ".join(f"{name} {len(split)}" for name, split in case.windows.items())
    if missing:
        advice = "Choose checkpoints and settings on validation, and report test once."
        yield Finding("Splits", "error", f"{sizes}; no {' and no '.join(missing)}", advice)
    else:
        yield Finding("Splits", "ok", sizes)


def check_leaks(case: Case) -> Iterator[Finding]:
    """Test windows that are also in train, or from before its end."""
    if not {"train", "test"} <= case.windows.keys():
        return
    train, test = case.windows["train"], case.windows["test"]
    if "timestamp" in train.column_names and "timestamp" in test.column_names:
        last = max(train["timestamp"])
        early = [str(time) for time in test["timestamp"] if time < last]
        advice = "The model has seen the future of these users' items: split by time."
        yield from note_if("Test windows before the end of train", early, len(test), advice)
    seen = {tuple(ids) for ids in train["item_ids"]}
    leaked = [", ".join(ids) for ids in test["item_ids"] if tuple(ids) in seen]
    yield from note_if("Test windows that are also in train", leaked, len(test), "Remove them from train.")


def check_users(case: Case) -> Iterator[Finding]:
    if "validation" not in case.windows or "user_id" not in case.windows["validation"].column_names:
        return
    users = Counter(case.windows["validation"]["user_id"])
    repeated = [str(user) for user, count in users.items() if count > 1]
    advice = (
        "Windows of a user overlap, so metrics look better and intervals narrower than they are: compare them, but "
        "do not report them."
    )
    yield from note_if("Users with several validation windows", repeated, len(users), advice)


def check_targets(case: Case) -> Iterator[Finding]:
    windows = [ids for split in case.windows.values() for ids in split["item_ids"]]
    repeated = [ids[-1] for ids in windows if ids[-1] in ids[:-1]]
    advice = "`Recommender` excludes the history by default: pass `exclude_history=False` where users buy again."
    yield from note_if("Targets that are in their history", repeated, len(windows), advice)
    left = len(case.catalog) - max(len(set(ids[:-1])) for ids in windows)
    if left < _TOP_K:
        yield Finding(
            f"Items left for a top {_TOP_K}", "note", f"{left} of {len(case.catalog)} for some user",
            "Ask for fewer: otherwise results are padded with -1.",
        )  # fmt: skip


INTERACTION_CHECKS = (check_splits, check_leaks, check_users, check_targets)
