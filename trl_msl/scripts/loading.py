# SPDX-License-Identifier: Apache-2.0
"""Loading what a command's options name: data, tokenizer, model, task, and the checkpoint to resume from."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from trl import ModelConfig, SFTConfig

from ..data import (
    TASK_FILE,
    TASK_FILES,
    DataArguments,
    ItemCatalog,
    RankingTask,
    best_possible,
    build_rows,
    generate_catalog,
    generate_transitions,
    generate_windows,
    read_data,
)
from ..recommender import find_folder, find_task_folder, load_causal_lm
from ..training import last_complete_checkpoint, warn_of_missing_state


logger = logging.getLogger(__name__)


@dataclass
class Data:
    """The items and the windows by split; where the data is generated, also the best metrics possible on test."""

    catalog: ItemCatalog
    windows: DatasetDict
    best_possible: dict[str, float] | None = None

    def rows(self, split: str, task: RankingTask) -> Dataset:
        return build_rows(self.windows[split], task)

    @property
    def seen_items(self) -> set[str]:
        """Ids of the items in the training windows."""
        return {item for window in self.windows["train"]["item_ids"] for item in window}


def load_data(args: DataArguments) -> Data:
    """Read the data that `args` name; without `data_dir` and `interactions`, generate the quickstart's."""
    if args.data_dir or args.interactions:
        return Data(*read_data(args))
    titles = generate_catalog()
    texts = list(titles) if args.item_text == "id" else list(titles.values())
    transitions = generate_transitions(titles)
    windows = generate_windows(transitions)
    for split, most in (("validation", args.max_validation_users), ("test", args.max_test_users)):
        windows[split] = windows[split].select(range(min(most or len(windows[split]), len(windows[split]))))
    catalog = ItemCatalog(list(titles), texts, template=args.item_template)
    return Data(catalog, windows, best_possible(transitions, windows["test"]))


def model_options(model_args: ModelConfig, config: SFTConfig | None = None) -> dict[str, Any]:
    """Arguments of `from_pretrained`: the model's options and, in a training, those of its config."""
    options = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    if config is not None:
        options |= {"trust_remote_code": config.trust_remote_code, **(config.model_init_kwargs or {})}
    return options


def load_model(model_args: ModelConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model or adapter, on this process's device."""
    name, options = model_args.model_name_or_path, model_options(model_args)
    folder, revision = Path(name), model_args.model_revision
    if not folder.is_dir():  # of a whole model, only the files that are needed are downloaded
        folder = find_folder(name, "model_name_or_path", revision, allow_patterns=["adapter_config.json"])
    if (folder / "adapter_config.json").is_file():
        name, options["revision"] = find_folder(name, "model_name_or_path", revision), None
    return load_causal_lm(name, **options, trust_remote_code=trust_remote_code).to(PartialState().device)


def load_tokenizer(model_args: ModelConfig, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    # If `trust_remote_code` were left out, transformers would ask at the terminal
    return AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=trust_remote_code
    )


def make_task(
    tokenizer: PreTrainedTokenizerBase, args: DataArguments, catalog: ItemCatalog, max_length: int | None = None
) -> RankingTask:
    """The task that the options describe."""
    kwargs = {} if max_length is None else {"max_length": max_length}
    return RankingTask(
        catalog, tokenizer, args.prompt_template, chat_template_kwargs=args.chat_template_kwargs, **kwargs
    )


def load_task(
    model_args: ModelConfig,
    data_args: DataArguments,
    catalog: ItemCatalog,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> RankingTask:
    """
    The task saved beside the model or, for an adapter, beside its base model; if there is none, the one that the
    options describe.

    Raises:
        `ValueError`: if the saved task differs from the given options, or from the items of the data.
    """
    name, tokenizer = model_args.model_name_or_path, load_tokenizer(model_args, trust_remote_code)
    patterns = [*TASK_FILES, "adapter_config.json"]
    folder = find_folder(name, "model_name_or_path", model_args.model_revision, allow_patterns=patterns)
    folder = find_task_folder(folder)
    if not (folder / TASK_FILE).is_file():
        return make_task(tokenizer, data_args, catalog, max_length)
    task = RankingTask.from_pretrained(folder, tokenizer)
    _check_options(task, data_args, max_length, name)
    known = dict(zip(task.catalog.ids, task.catalog.texts))
    others = [item for item, text in zip(catalog.ids, catalog.texts) if known.get(item) != text]
    if others:
        text = catalog.texts[catalog.index_of_id[others[0]]]
        raise ValueError(
            f"The catalogue differs from the one that {name} was trained with, in {len(others)} of {len(catalog)} "
            f"items, such as {others[0]!r}: (here, there): {(text, known.get(others[0]))}. Pass the data of its "
            "training, with the same `item_text`, `empty_texts` and `html_entities`, or update its catalogue."
        )
    return task


def _check_options(task: RankingTask, args: DataArguments, max_length: int | None, name: str) -> None:
    """Raise a `ValueError` if an option that is not at its default differs from the task."""
    default = DataArguments()
    has_text = args.prompt_text is not None or args.prompt_words != default.prompt_words
    given = {
        "text": args.prompt_template.text if has_text else None,
        "conversational": args.conversational or None,
        "separate_items": args.separate_items or None,
        "item_template": args.item_template if args.item_template != default.item_template else None,
        "chat_template_kwargs": args.chat_template_kwargs,
        "max_length": max_length,
    }
    trained = dataclasses.asdict(task.prompt_template) | {
        "item_template": task.catalog.template,
        "chat_template_kwargs": task.chat_template_kwargs,
        "max_length": task.max_length,
    }
    different = {key: (v, trained[key]) for key, v in given.items() if v is not None and v != trained[key]}
    if different:
        raise ValueError(
            f"The prompt differs from the one that {name} was trained with, in (here, there): {different}. Leave "
            "these options out: those of its training are then used."
        )


def checkpoint_to_resume(config: TrainingArguments) -> str | None:
    """
    The checkpoint that `resume_from_checkpoint` names. `last` is the last complete one in `output_dir`, or none if
    there is none yet, so that the same command starts a run and resumes it.
    """
    checkpoint = config.resume_from_checkpoint
    if checkpoint == "last":
        try:
            return last_complete_checkpoint(config.output_dir)
        except ValueError:
            logger.warning("%s has no complete checkpoint yet: training starts from the beginning.", config.output_dir)
            return None
    if checkpoint is not None:
        warn_of_missing_state(checkpoint)
    return checkpoint
