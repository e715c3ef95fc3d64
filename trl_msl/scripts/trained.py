# SPDX-License-Identifier: Apache-2.0
"""
A trained model's task and data. The task is the model's own, and options must not contradict it. Training commands
write the options of their data to `data.json` beside the model, where later commands find them.
"""

import dataclasses
import html
import json
import logging
import os
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import ModelConfig

from ..data import TASK_FILE, TASK_FILES, DataArguments, ItemCatalog, RankingTask, distinct_items, read_items
from ..recommender import find_folder, find_task_folder
from .loading import Data, load_data, load_tokenizer, make_task
from .outputs import write_json


logger = logging.getLogger(__name__)

DATA_FILE = "data.json"
# Options that decide which windows are in which split
_SPLITTING = (
    "data_dir", "train_file", "interactions", "user_column", "item_column", "timestamp_column", "min_interactions",
    "unknown_items", "drop_duplicates", "train_period", "covering_windows",
)  # fmt: skip


def write_options(args: DataArguments, folder: Path) -> None:
    """Write `data.json`."""
    generated = not (args.data_dir or args.interactions)
    write_json(folder / DATA_FILE, {"generated": generated, **dataclasses.asdict(_with_whole_paths(args))})


def read_options(folder: Path) -> DataArguments | None:
    """The options in `data.json` of a model's folder, for a checkpoint also of the folder above; `None` without."""
    path = folder / DATA_FILE
    if not path.is_file() and folder.resolve().name.startswith("checkpoint-"):
        path = folder.resolve().parent / DATA_FILE
    if not path.is_file():
        return None
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
        generated, args = options.pop("generated"), DataArguments(**options)
        if generated == bool(args.data_dir or args.interactions):
            raise ValueError("`generated` contradicts the other options")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): remove it.") from error
    return args


def copy_options(folder: Path, other: Path) -> None:
    """Write the `data.json` of a model, if it has one, into the folder of another that is made of it."""
    if args := read_options(folder):
        write_options(args, other)


def load_trained(
    model_args: ModelConfig, data_args: DataArguments, max_length: int | None = None, trust_remote_code: bool = False
) -> tuple[Data, RankingTask]:
    """
    The task of a trained model, and data for it.

    The task is the one saved beside the model or, for an adapter, beside its base model; without one it is made from
    the options. The windows are those that the options name, or else those of the model's training.

    Raises:
        `ValueError`: if no data is named, or options or items differ from those that the model was trained with.
    """
    name, tokenizer = model_args.model_name_or_path, load_tokenizer(model_args, trust_remote_code)
    patterns = [*TASK_FILES, "adapter_config.json"]
    folder = find_folder(name, "model_name_or_path", model_args.model_revision, allow_patterns=patterns)
    task_folder = find_task_folder(folder)
    args, trained_on = data_args, read_options(folder) or read_options(task_folder)
    if not (args.data_dir or args.interactions):
        if trained_on is None:
            raise ValueError(
                f"`data_dir` and `interactions` are both missing, and {name} has no {DATA_FILE}, in which training "
                "commands note their data: pass one of them."
            )
        args = dataclasses.replace(trained_on, **_given(data_args))
        logger.info(
            "Using the data that %s was trained on: %s.", name, args.data_dir or args.interactions or "generated"
        )
    if not (task_folder / TASK_FILE).is_file():
        logger.warning("%s has no catalogue and prompt of its own: using those of the data options.", name)
        data = load_data(args)
        return data, make_task(tokenizer, data, max_length)
    task = RankingTask.from_pretrained(task_folder, tokenizer)
    _check_options(task, data_args, max_length, name)
    if args.items is None and args.data_dir and trained_on is not None and trained_on.data_dir:
        args = dataclasses.replace(args, items=trained_on.items)  # semantic ids, in place of the folder's titles
    source = args.items or (f"{args.data_dir}/id2name4Rec.json" if args.data_dir else None)
    if source is not None and (data_args.items or os.path.exists(source)):
        _check_items(task.catalog, source, args, name)
    data = load_data(args, task.catalog)
    if trained_on is not None:
        _compare_splits(data, trained_on)
    return data, task


def load_to_train_further(
    model_args: ModelConfig, data_args: DataArguments, max_length: int | None = None, trust_remote_code: bool = False
) -> tuple[Data, RankingTask]:
    """
    As [`load_trained`], for an adapter that is trained on these windows, too: the items of its training count as seen,
    and on the same data its period as trained on.
    """
    data, task = load_trained(model_args, data_args, max_length, trust_remote_code)
    folder = find_folder(model_args.model_name_or_path, "model_name_or_path", model_args.model_revision)
    if trained_on := read_options(folder):
        period = _joined(trained_on.train_period, data.args.train_period)
        here, there = (
            dataclasses.replace(_with_whole_paths(args), train_period=period) for args in (data.args, trained_on)
        )
        if all(getattr(here, name) == getattr(there, name) for name in _SPLITTING):
            data.args = here
        data.seen_items = (data.seen_items or set()) | distinct_items(data.windows["train"])
    return data, task


def _joined(first: list[float] | None, second: list[float] | None) -> list[float] | None:
    """The period from the beginning of the earlier one to the end of the later one."""
    if first == second:
        return first
    held_out = [0.0, 0.9]  # without a period, training ends where the validation begins
    starts, ends = zip(first or held_out, second or held_out)
    return [min(starts), max(ends)]


def _check_options(task: RankingTask, args: DataArguments, max_length: int | None, name: str) -> None:
    """Raise a `ValueError` if an option that is not at its default differs from the task."""
    given, catalog = _given(args) | ({} if max_length is None else {"max_length": max_length}), task.catalog
    if "prompt_text" in given or "prompt_words" in given:
        given["text"] = args.prompt_template.text
    trained = dataclasses.asdict(task.prompt_template) | {
        "item_template": catalog.template,
        "item_text": "id" if catalog.texts == catalog.ids else "text",
        "html_entities": catalog.html_entities,
        "chat_template_kwargs": task.chat_template_kwargs,
        "max_length": task.max_length,
    }
    if not all(map(str.strip, catalog.texts)):
        trained["empty_texts"] = "keep"
    different = {key: (given[key], trained[key]) for key in trained if key in given and given[key] != trained[key]}
    if different:
        raise ValueError(
            f"The options differ from what {name} was trained with, in (here, there): {different}. Leave these "
            "options out: items and prompt are always those of its training."
        )


def _check_items(catalog: ItemCatalog, source: str, args: DataArguments, name: str) -> None:
    """
    Raise a `ValueError` if items are not those of a model's catalogue. HTML entities and empty texts may have been
    treated differently: the texts that are ranked are the model's own.
    """
    if catalog.texts == catalog.ids:
        return
    policies = {"empty_texts": "keep", "html_entities": catalog.html_entities}
    items = read_items(source, args.item_column, args.text_column, **policies)
    known = dict(zip(catalog.ids, catalog.texts))

    def differs(item: str, text: str) -> bool:
        if item not in known:
            return args.unknown_items == "error"
        if not text.strip() and args.empty_texts != "keep" and known[item] == item:
            return False
        return html.unescape(text) != html.unescape(known[item])

    others = [(item, text) for item, text in zip(items.ids, items.texts) if differs(item, text)]
    if others:
        item, text = others[0]
        raise ValueError(
            f"The catalogue differs from the one that {name} was trained with, in {len(others)} of {len(items)} items "
            f"of {source}, such as {item!r}: (here, there): {(text, known.get(item))}. Pass the data of its training, "
            "or update its catalogue."
        )


def _compare_splits(data: Data, trained_on: DataArguments) -> None:
    """
    If the options differ from those of the training, warn of training targets in the validation or test split, and
    take `seen_items` from the data of the training.
    """
    here, there = (vars(_with_whole_paths(args)) for args in (data.args, trained_on))
    different = {name: (here[name], there[name]) for name in _SPLITTING if here[name] != there[name]}
    if not different:
        return
    logger.info("The data of its training, to compare the splits:")
    data.seen_items = None
    try:
        training = load_data(trained_on, data.catalog)
        trained, data.seen_items = set(_targets(training.windows["train"])), training.seen_items
    except (ValueError, KeyError) as error:
        logger.warning("Can't check whether the model was trained on some of these windows: %s", error)
        return
    for split in ("validation", "test"):
        targets = _targets(data.windows[split]) if split in data.windows else []
        if count := sum(target in trained for target in targets):
            logger.warning(
                "The model was trained on %d of the %d targets of the %s split, so that metrics on it are too high: "
                "the data options differ from those of its training, in (here, there): %s.",
                count, len(targets), split, different,
            )  # fmt: skip


def _targets(windows: Dataset) -> list[tuple[Any, ...]]:
    """User, item and time of each window's target."""
    return list(zip(windows["user_id"], (ids[-1] for ids in windows["item_ids"]), windows["timestamp"]))


def _given(args: DataArguments) -> dict[str, Any]:
    """The options that are not at their defaults."""
    default = vars(DataArguments())
    return {name: value for name, value in vars(args).items() if value != default[name]}


def _with_whole_paths(args: DataArguments) -> DataArguments:
    """The options with absolute paths; names of datasets on the Hub stay."""
    sources = {name: getattr(args, name) for name in ("data_dir", "interactions", "items")}
    whole = {name: os.path.abspath(source) for name, source in sources.items() if source and os.path.exists(source)}
    return dataclasses.replace(args, **whole)
