# SPDX-License-Identifier: Apache-2.0
"""The options that name a command's data, and reading that data."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from datasets import Dataset, DatasetDict, concatenate_datasets

from .catalog import ItemCatalog
from .cleaning import clean_log, clean_windows, report_odd_ids
from .interactions import (
    covering_windows,
    k_core,
    read_interactions,
    read_windows,
    sliding_windows,
    split_by_time,
)
from .prompts import PromptTemplate
from .tables import read_table


logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """
    Arguments that name a command's data: a folder, or an interaction log and its items. If both are left out, commands
    on a trained model take the data of its training; the quickstart and the baselines generate some.

    Parameters:
        data_dir (`str`, *optional*):
            Folder with `id2name4Rec.json`, a train file and `test.csv`, as the MSL paper's authors publish them.
        train_file (`str`, *optional*, defaults to `"train.csv"`):
            Train file in `data_dir`. Its last tenth by time is held out for validation.
        interactions (`str`, *optional*):
            Interaction log: a file or a dataset on the Hub, as for [`read_table`]. 5-core, windows of 11, split 8:1:1
            by time.
        items (`str`, *optional*):
            Items of the log, or in place of those of the folder: likewise, or a JSON file that maps ids to texts.
        user_column, item_column, timestamp_column, text_column (`str`, *optional*):
            Columns of the log and of the items.
        min_interactions (`int`, *optional*, defaults to `5`):
            Minimum number of interactions of a user and of an item in the log (k-core).
        item_text (`str`, *optional*, defaults to `"text"`):
            What represents an item: its `text`, or its `id`, for models of item tokens.
        item_template (`str`, *optional*, defaults to `'"{text}"'`):
            How it is written into prompts and completions.
        empty_texts, html_entities (`str`, *optional*):
            As for [`ItemCatalog`].
        unknown_items (`str`, *optional*, defaults to `"error"`):
            What to do with items of interactions that are not in the catalogue: `"error"` or `"drop"`. In a folder,
            `"drop"` also drops windows that lose their target or their whole history.
        drop_duplicates (`bool`, *optional*, defaults to `False`):
            Whether to drop interactions of the log that repeat the user, item and time of another.
        train_period (`list[float]`, *optional*):
            Part of the windows before the test to train on, as two fractions of them in order of time; by default all
            that are not held out for validation. `[0, 0.8]` leaves a gap before the validation: if the test begins
            long after the training, settings are better chosen on a validation split that does so too. `[0, 1]` trains
            on everything, for the test.
        covering_windows (`bool`, *optional*, defaults to `False`):
            Whether to train only on windows that together hold each target once, by [`covering_windows`]. For
            `supervise_history` and sequence models.
        prompt_words (`list[str]`, *optional*, defaults to `["item", "items", "interacted with"]`):
            Singular, plural and verb of the paper's prompt: `book books read`.
        prompt_text (`str`, *optional*):
            Prompt with `{history}`, instead of the paper's.
        conversational (`bool`, *optional*, defaults to `False`):
            Whether to put the prompt into the tokenizer's chat template.
        separate_items (`bool`, *optional*, defaults to `False`):
            As for [`PromptTemplate`]: whether the items of a history are tokenised one by one.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Passed to the chat template, as JSON: `{"enable_thinking": false}`.
        max_validation_users, max_test_users (`int`, *optional*):
            Maximum number of users to evaluate on, the first of each split.
    """

    data_dir: str | None = field(default=None, metadata={"help": "Folder in the format of the MSL paper's authors."})
    train_file: str = field(default="train.csv", metadata={"help": "Train file in `data_dir`."})
    interactions: str | None = field(
        default=None, metadata={"help": "Interaction log: CSV, TSV, JSONL, Parquet or Hub dataset."}
    )
    items: str | None = field(
        default=None, metadata={"help": "Items of the log, or in place of the folder's: likewise, or JSON."}
    )
    user_column: str = field(default="user_id", metadata={"help": "User column of the log."})
    item_column: str = field(default="item_id", metadata={"help": "Item column of the log and of the items."})
    timestamp_column: str = field(default="timestamp", metadata={"help": "Time column of the log."})
    text_column: str = field(default="title", metadata={"help": "Text column of the items."})
    min_interactions: int = field(default=5, metadata={"help": "Minimum interactions of a user and of an item."})
    item_text: str = field(default="text", metadata={"help": "What represents an item.", "choices": ["text", "id"]})
    item_template: str = field(default='"{text}"', metadata={"help": "How an item is written."})
    empty_texts: str = field(default="error", metadata={"help": "Items without text: 'error', 'keep' or 'id'."})
    html_entities: str = field(default="keep", metadata={"help": "HTML entities in texts: 'keep' or 'decode'."})
    unknown_items: str = field(
        default="error", metadata={"help": "Interactions with items not in `items`.", "choices": ["error", "drop"]}
    )
    drop_duplicates: bool = field(default=False, metadata={"help": "Whether to drop repeated interactions."})
    train_period: list[float] | None = field(
        default=None,
        metadata={"help": "Part of the windows before the test to train on, as two fractions, such as: 0 0.8."},
    )
    covering_windows: bool = field(
        default=False, metadata={"help": "Whether to train on few windows, in which each target occurs once."}
    )
    prompt_words: list[str] = field(
        default_factory=lambda: ["item", "items", "interacted with"],
        metadata={"help": "Singular, plural and verb of the paper's prompt, such as: book books read."},
    )
    prompt_text: str | None = field(default=None, metadata={"help": "Prompt with {history}, instead of the paper's."})
    conversational: bool = field(default=False, metadata={"help": "Whether to use the tokenizer's chat template."})
    separate_items: bool = field(default=False, metadata={"help": "Whether histories are tokenised item by item."})
    chat_template_kwargs: str | None = field(default=None, metadata={"help": "For the chat template, as JSON."})
    max_validation_users: int | None = field(default=None, metadata={"help": "Maximum number of validation users."})
    max_test_users: int | None = field(default=None, metadata={"help": "Maximum number of test users."})

    def __post_init__(self):
        for name in ("interactions", "drop_duplicates"):  # of a folder they would be ignored
            if self.data_dir and getattr(self, name):
                raise ValueError(f"`data_dir` and `{name}` are both given: pass only one of them.")
        if self.item_text not in ("text", "id"):
            raise ValueError(f"`item_text` is {self.item_text!r}: it must be 'text' or 'id'.")
        if self.unknown_items not in ("error", "drop"):
            raise ValueError(f"`unknown_items` is {self.unknown_items!r}: it must be 'error' or 'drop'.")
        period = self.train_period
        if period is not None and not (len(period) == 2 and 0 <= period[0] < period[1] <= 1):
            raise ValueError(f"`train_period` is {period}: it must be two increasing fractions, such as [0, 0.8].")
        if isinstance(self.chat_template_kwargs, str):  # a YAML file may hold the dictionary itself
            try:
                self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
            except ValueError as error:
                raise ValueError(
                    f"`chat_template_kwargs` is {self.chat_template_kwargs!r}: it must be JSON."
                ) from error
        for name in ("max_validation_users", "max_test_users"):
            most = getattr(self, name)
            if most is not None and most < 1:
                raise ValueError(f"`{name}` is {most}: it must be at least 1, or left out for all users.")
        if len(self.prompt_words) != 3:
            raise ValueError(f"`prompt_words` is {self.prompt_words}: it must be a singular, a plural and a verb.")

    @property
    def prompt_template(self) -> PromptTemplate:
        """How a history becomes a prompt."""
        form = {"conversational": self.conversational, "separate_items": self.separate_items}
        return PromptTemplate(self.prompt_text or PromptTemplate.from_paper(*self.prompt_words).text, **form)


def read_data(args: DataArguments, catalog: ItemCatalog | None = None) -> tuple[ItemCatalog, DatasetDict]:
    """
    Catalogue and windows, split by time into `train`, `validation` and `test`. With `data_dir`, `train` and
    `validation` together are the train file, unless `max_validation_users` is given.

    Args:
        args ([`DataArguments`]):
            What to read.
        catalog ([`ItemCatalog`], *optional*):
            That of a trained model, to use instead of the items that `args` name. Of `data_dir`, only `test.csv` must
            then exist.

    Raises:
        `ValueError`: if no data is named, it can't be read, or items are unknown.
    """
    if not (args.data_dir or args.interactions):
        raise ValueError("`data_dir` and `interactions` are both missing: pass one of them.")
    train_file = args.train_file
    if catalog is None:
        catalog = _read_catalog(args)
    elif args.data_dir and not (Path(args.data_dir) / train_file).exists():
        train_file = None
    if args.data_dir:
        windows = clean_windows(read_windows(args.data_dir, train_file), catalog, args.unknown_items)
    else:
        log = k_core(_read_log(args, catalog), args.min_interactions)
        windows = split_by_time(sliding_windows(log))
    return catalog, select_windows(windows, args)


def select_windows(windows: DatasetDict, args: DataArguments) -> DatasetDict:
    """The windows of each split, in order of time, that `args` do not leave out."""
    chosen = DatasetDict(windows)
    for split, most in (("validation", args.max_validation_users), ("test", args.max_test_users)):
        if most is not None and split in chosen:
            chosen[split] = chosen[split].select(range(min(most, len(chosen[split]))))
    if "train" in chosen:
        train = _windows_of_period(windows, args.train_period) if args.train_period else chosen["train"]
        chosen["train"] = covering_windows(train) if args.covering_windows else train
    sizes = (f"{name} {len(split):,}" for name, split in chosen.items())
    left_out = len(windows.get("train", [])) - len(chosen.get("train", []))
    suffix = f" ({left_out:,} training windows left out)" if left_out > 0 else ""
    logger.info("Windows: %s%s.", ", ".join(sizes), suffix)
    return chosen


def _windows_of_period(windows: DatasetDict, period: list[float]) -> Dataset:
    before_test = concatenate_datasets([windows["train"], windows["validation"]])
    start, end = (round(fraction * len(before_test)) for fraction in period)
    if start == end:
        raise ValueError(f"`train_period` {period} is none of {len(before_test)} windows: widen it.")
    if end > len(windows["train"]):
        logger.warning(
            "Of the validation windows, %d are trained on (`train_period` %s): choose no settings by them.",
            end - max(start, len(windows["train"])),
            period,
        )
    return before_test.select(range(start, end))


def _read_log(args: DataArguments, catalog: ItemCatalog) -> pd.DataFrame:
    """The interaction log, cleaned."""
    log = read_interactions(args.interactions, args.user_column, args.item_column, args.timestamp_column)
    users, items = log["user_id"].unique(), log["item_id"].unique()
    sizes = [f"{len(values):,}" for values in (log, users, items)]
    logger.info("%s: %s interactions, %s users, %s items.", args.interactions, *sizes)
    for column, ids in ((args.user_column, users), (args.item_column, items)):
        report_odd_ids(f"{args.interactions}, {column!r}", ids)
    return clean_log(log, catalog, args.unknown_items, args.drop_duplicates)


def _read_catalog(args: DataArguments) -> ItemCatalog:
    empty_texts = "keep" if args.item_text == "id" else args.empty_texts  # texts are not used
    policies = {"template": args.item_template, "empty_texts": empty_texts, "html_entities": args.html_entities}
    source = args.items or (f"{args.data_dir}/id2name4Rec.json" if args.data_dir else None)
    if source:
        catalog = read_items(source, args.item_column, args.text_column, **policies)
    else:
        raise ValueError("`items` is missing: pass the file with the ids and titles of the items of `interactions`.")
    if args.item_text == "id":
        catalog = ItemCatalog(catalog.ids, catalog.ids, template=args.item_template)
    return catalog


def read_items(source: str, item_column: str = "item_id", text_column: str = "title", **policies: str) -> ItemCatalog:
    """
    Catalogue from a JSON file that maps ids to texts, or from a table as for [`read_table`].
    """
    if source.endswith(".json"):
        catalog = ItemCatalog.from_json(source, **policies)
    else:
        table, _ = read_table(source, [item_column, text_column])
        texts = table[text_column].astype(object)
        texts = texts.where(texts.notna(), "").tolist()  # a missing text is an empty one
        catalog = ItemCatalog(table[item_column].tolist(), texts, **policies)
    logger.info("%s: %s items.", source, f"{len(catalog):,}")
    report_odd_ids(source, catalog.ids)
    return catalog
