# SPDX-License-Identifier: Apache-2.0
"""
Checks data, tokenizer and model for what is known to go wrong with recommenders of this kind, before they are trained.

```bash
python -m trl_msl.doctor --data_dir data/Book --train_file train_10000.csv --prompt_words book books read \
    --model_name_or_path Qwen/Qwen3-0.6B --load_model
```

It prints what was looked at, what was seen on your data, and what to do. The exit code is 1 if there is an error, that
is, something that would stop the training or spoil its result; 0 if there are only remarks.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from dataclasses import dataclass, field, replace

from datasets import DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..data import DataArguments, RankingTask, read_data
from .findings import Case, Finding
from .interactions import INTERACTION_CHECKS, usable_windows
from .model import MODEL_CHECKS
from .texts import TEXT_CHECKS
from .tokens import TOKEN_CHECKS


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
    usable, findings = usable_windows(task.catalog, windows)
    if not usable:
        return findings
    case = Case(task, usable, model, max_rows)
    for check in (*TEXT_CHECKS, *TOKEN_CHECKS, *INTERACTION_CHECKS):
        findings += check(case)
    for check in MODEL_CHECKS if model is not None else ():
        found = list(check(case))
        findings += found
        if any(finding.status == "error" for finding in found):  # a model that cannot be run
            break
    return findings


# ---------------------------------------------------------------------- command line


@dataclass
class DoctorArguments:
    """
    Arguments of the doctor, besides those of the data.

    Parameters:
        model_name_or_path (`str`):
            Folder or repository of the model, whose tokenizer is taken.
        load_model (`bool`, *optional*, defaults to `False`):
            Whether to load the model and check it, too.
        max_length (`int`, *optional*, defaults to `1024`):
            As in `MSLConfig`.
        chat_template_kwargs (`str`, *optional*):
            As in `MSLConfig`, JSON.
        max_rows (`int`, *optional*, defaults to `1000`):
            Number of rows and of items on which checks that tokenise are made.
    """

    model_name_or_path: str = field(metadata={"help": "Folder or repository of the model."})
    load_model: bool = field(default=False, metadata={"help": "Load the model and check it, too."})
    max_length: int = field(default=1024, metadata={"help": "As in MSLConfig."})
    chat_template_kwargs: str | None = field(default=None, metadata={"help": "As in MSLConfig, JSON."})
    max_rows: int = field(default=1000, metadata={"help": "Rows and items on which checks that tokenise are made."})


def main(args: DoctorArguments, data_args: DataArguments) -> int:
    chat_template_kwargs = json.loads(args.chat_template_kwargs or "null")
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=False)
    model = None
    if args.load_model:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, trust_remote_code=False).eval()
    findings = []
    try:
        catalog, windows = read_data(data_args)
    except ValueError as error:
        findings.append(Finding("Reading the data", "error", str(error)))
        try:  # the only policy that can stop the reading
            catalog, windows = read_data(replace(data_args, empty_texts="keep"))
        except ValueError:
            print(format_findings(findings))
            return 1
    try:
        task = RankingTask(catalog, tokenizer, data_args.prompt_template, args.max_length, chat_template_kwargs)
    except ValueError as error:
        findings.append(Finding("Tokens of the items", "error", str(error), "No trie can be built before."))
    else:
        findings += diagnose(task, windows, model, args.max_rows)
    print(format_findings(findings))
    return int(any(finding.status == "error" for finding in findings))


def format_findings(findings: list[Finding], widths: tuple[int, int, int] = (30, 40, 44)) -> str:
    """A table: status, what, what was seen, what to do."""
    lines = [_format_row("", "WHAT", "SEEN ON YOUR DATA", "WHAT TO DO", widths)]
    signs = {"ok": "ok", "note": "note", "error": "ERROR"}
    lines += [_format_row(signs[f.status], f.what, f.seen, f.advice, widths) for f in findings]
    counts = Counter(finding.status for finding in findings)
    lines.append(f"{len(findings)} checks: {counts['error']} errors, {counts['note']} notes.")
    return "\n".join(lines)


def _format_row(status: str, what: str, seen: str, advice: str, widths: tuple[int, int, int]) -> str:
    columns = [textwrap.wrap(text, width) or [""] for text, width in zip((what, seen, advice), widths)]
    height = max(map(len, columns))
    cells = [[status, *[""] * (height - 1)]] + [column + [""] * (height - len(column)) for column in columns]
    return "\n".join(
        f"{row[0]:<6}" + "  ".join(f"{text:<{width}}" for text, width in zip(row[1:], widths)).rstrip()
        for row in zip(*cells)
    )
