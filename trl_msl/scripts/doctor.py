# SPDX-License-Identifier: Apache-2.0
"""
Check data, tokenizer and model for known problems of recommenders of this kind, before training.

```bash
trl-msl doctor --data_dir data/Book --train_file train_10000.csv --prompt_words book books read \
    --model_name_or_path Qwen/Qwen3-0.6B --load_model
```

It prints what was checked, what was seen on your data, and what to do. The exit code is 1 if there is an error, which
would stop the training or spoil its result, and 0 otherwise.
"""

import logging
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest

from datasets import DatasetDict, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data import DataArguments, ItemCatalog, read_data
from ..doctor import Finding, diagnose
from .command_line import command
from .console import name_options
from .loading import Data, make_task


WIDTHS = (30, 40, 44)  # of the columns


@dataclass
class DoctorArguments:
    """
    Arguments of the doctor, besides those of the data.

    Parameters:
        model_name_or_path (`str`):
            Folder or repository of the model, whose tokenizer is taken.
        load_model (`bool`, *optional*, defaults to `False`):
            Whether to load and check the model too.
        max_length (`int`, *optional*, defaults to `1024`):
            Maximum number of tokens of a prompt and an item together.
        max_rows (`int`, *optional*, defaults to `1000`):
            Number of rows to tokenise.
    """

    model_name_or_path: str = field(metadata={"help": "Folder or repository of the model."})
    load_model: bool = field(default=False, metadata={"help": "Load and check the model too."})
    max_length: int = field(default=1024, metadata={"help": "Maximum tokens of a prompt and an item together."})
    max_rows: int = field(default=1000, metadata={"help": "Number of rows to tokenise."})


OPTIONS = [option.name for kind in (DoctorArguments, DataArguments) for option in fields(kind)]


def main(args: DoctorArguments, data_args: DataArguments) -> int:
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=False)
    model = None
    if args.load_model:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, trust_remote_code=False).eval()
    data, findings = read(data_args)
    if data is None:
        print(format_findings(findings))
        return 1
    catalog, windows = data
    try:
        task = make_task(tokenizer, Data(catalog, windows, data_args), args.max_length)
    except ValueError as error:
        advice = "The trie of items can't be built before this is fixed."
        findings.append(Finding("Tokens of the items", "error", str(error), advice))
    else:
        findings += diagnose(task, windows, model, args.max_rows)
    print(format_findings(findings))
    return int(any(finding.status == "error" for finding in findings))


def read(args: DataArguments) -> tuple[tuple[ItemCatalog, DatasetDict] | None, list[Finding]]:
    """The data, or `None`, and what was found while reading it, which goes on after errors that a policy avoids."""
    findings, said, policies = [], [], {"empty_texts": "keep", "unknown_items": "drop"}

    def take(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = not any(text.startswith(message.removesuffix(". They are dropped.")) for text in said)
        said.append(message)
        if is_new and record.name.endswith("cleaning"):
            findings.append(Finding("Interactions and ids", "note", message))
        return is_new and record.levelno < logging.WARNING  # the table has a line for each warning

    def attempt(args: DataArguments) -> tuple[ItemCatalog, DatasetDict] | None:
        try:
            return read_data(args)
        except ValueError as error:
            findings.append(Finding("Reading the data", "error", str(error)))
            said.append(str(error))  # what the error says is no note when another policy passes over it
            remedy = next((name for name in policies if f"{name}=" in str(error)), None)
            return attempt(replace(args, **{remedy: policies.pop(remedy)})) if remedy else None

    loggers = [logging.getLogger(f"trl_msl.data.{name}") for name in ("catalog", "cleaning")]
    for logger in loggers:
        logger.addFilter(take)
    try:
        return attempt(args), list(dict.fromkeys(findings))
    finally:
        for logger in loggers:
            logger.removeFilter(take)


def format_findings(findings: list[Finding]) -> str:
    """A table: status, what was checked, what was seen, what to do, with arguments as options."""
    lines = [_format_row("", "WHAT", "SEEN ON YOUR DATA", "WHAT TO DO")]
    for found in findings:
        status = "ERROR" if found.status == "error" else found.status
        texts = (name_options(text, OPTIONS) for text in (found.what, found.seen, found.advice))
        lines.append(_format_row(status, *texts))
    counts = Counter(finding.status for finding in findings)
    numbers = [("finding", len(findings)), ("error", counts["error"]), ("note", counts["note"])]
    found, *kinds = [f"{number} {name}" + "s" * (number != 1) for name, number in numbers]
    lines.append(f"{found}: {', '.join(kinds)}.")
    return "\n".join(lines)


def _format_row(status: str, *texts: str) -> str:
    columns = [textwrap.wrap(text, width) for text, width in zip(texts, WIDTHS)]
    return "\n".join(
        f"{first:<6}" + "  ".join(f"{text:<{width}}" for text, width in zip(rest, WIDTHS)).rstrip()
        for first, *rest in zip_longest([status], *columns, fillvalue="")
    )


run = command(main)


if __name__ == "__main__":
    sys.exit(run())
