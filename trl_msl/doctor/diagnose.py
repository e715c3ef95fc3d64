# SPDX-License-Identifier: Apache-2.0
"""All checks that apply, in order."""

from __future__ import annotations

from datasets import DatasetDict
from transformers import PreTrainedModel

from ..data import RankingTask
from .findings import Case, Finding
from .interactions import INTERACTION_CHECKS, usable_windows
from .model import MODEL_CHECKS
from .texts import TEXT_CHECKS
from .tokens import TOKEN_CHECKS


def diagnose(
    task: RankingTask, windows: DatasetDict, model: PreTrainedModel | None = None, max_rows: int = 1000
) -> list[Finding]:
    """
    Check data, tokenizer and, if given, the model for known problems of recommenders of this kind.

    Args:
        task ([`RankingTask`]):
            Catalogue, tokenizer, trie and prompt.
        windows ([`~datasets.DatasetDict`]):
            Windows of interactions by split, as [`read_windows`] and [`split_by_time`] give them.
        model ([`~transformers.PreTrainedModel`], *optional*):
            Model to train or to recommend with.
        max_rows (`int`, *optional*, defaults to `1000`):
            Number of rows to tokenise.

    Returns:
        `list[Finding]`: what the checks found.
    """
    usable, findings = usable_windows(task.catalog, windows)
    if not usable:
        return findings
    case = Case(task, usable, model, max_rows)
    for check in (*TEXT_CHECKS, *TOKEN_CHECKS, *INTERACTION_CHECKS):
        findings += check(case)
    for check in MODEL_CHECKS if model is not None else ():
        found = list(check(case))
        findings += found
        if any(finding.status == "error" for finding in found):  # the model can't be run
            break
    return findings
