# SPDX-License-Identifier: Apache-2.0
"""Loading what a command's options name: data, tokenizer, model, a new task, and the checkpoint to resume from."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import cached_file, find_adapter_config_file
from trl import ModelConfig, SFTConfig, get_quantization_config

from ..data import (
    DataArguments,
    ItemCatalog,
    RankingTask,
    best_possible,
    build_rows,
    distinct_items,
    generate_catalog,
    generate_transitions,
    generate_windows,
    read_data,
    select_windows,
)
from ..model import ITEM_VECTORS_FILE
from ..recommender import find_folder, load_adapter, load_causal_lm
from ..training import last_complete_checkpoint, warn_of_missing_state
from ..trie import check_regular


logger = logging.getLogger(__name__)

TRAINABLE_TOKENS_FILE = "trainable_tokens.json"


@dataclass
class Data:
    """
    The items, the windows by split, the options that name them and, for generated data, the best metrics possible on
    test. `seen_items` are the ids of the items in the training windows, if there are any.
    """

    catalog: ItemCatalog
    windows: DatasetDict
    args: DataArguments
    best_possible: dict[str, float] | None = None

    def __post_init__(self):
        windows = self.windows.get("train")
        self.seen_items: set[str] | None = None if windows is None else distinct_items(windows)

    def rows(self, split: str, task: RankingTask) -> Dataset:
        if split not in self.windows:
            raise ValueError(
                f"`data_dir` = {self.args.data_dir!r} has no {split} split, only {list(self.windows)}: it needs "
                f"`train_file`, {self.args.train_file!r}, too."
            )
        return build_rows(self.windows[split], task)

    def training_windows(self) -> tuple[list[list[int]], list, int]:
        """Item indices and user of each training window, and the number of items: what [`count_users`] takes."""
        train = self.windows["train"]
        return [self.catalog.indices(ids) for ids in train["item_ids"]], train["user_id"][:], len(self.catalog)


def load_data(args: DataArguments, catalog: ItemCatalog | None = None) -> Data:
    """
    Read the data that `args` name, or generate the quickstart's if they name none. With the `catalog` of a trained
    model, the items need not be there.
    """
    if args.data_dir or args.interactions:
        return Data(*read_data(args, catalog), args)
    titles = generate_catalog()
    texts = list(titles) if args.item_text == "id" else list(titles.values())
    transitions = generate_transitions(titles)
    windows = select_windows(generate_windows(transitions), args)
    catalog = catalog or ItemCatalog(list(titles), texts, template=args.item_template)
    logger.info("Using the quickstart's generated data: %d items.", len(titles))
    return Data(catalog, windows, args, best_possible(transitions, windows["test"]))


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
    options = model_options(model_args) | {"trust_remote_code": trust_remote_code}
    return load_by_name(model_args.model_name_or_path, **options).to(PartialState().device)


def load_by_name(name: str, revision: str | None, **options: Any) -> PreTrainedModel:
    """A model or adapter, from a folder or the Hub, with its item vectors if it has any."""
    folder, files = Path(name), ["adapter_config.json", ITEM_VECTORS_FILE]
    if not folder.is_dir():  # of any other model, only the files that are needed are downloaded
        folder = find_folder(name, "model_name_or_path", revision, allow_patterns=files)
    if any((folder / file).is_file() for file in files):
        name, revision = find_folder(name, "model_name_or_path", revision), None
    return load_causal_lm(name, revision=revision, **options)


def load_trainable_adapter(
    model_args: ModelConfig, config: SFTConfig, tokenizer: PreTrainedTokenizerBase
) -> PeftModel | None:
    """The adapter that `model_name_or_path` names, to be trained further; `None` for a whole model."""
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if find_adapter_config_file(name, revision=revision) is None:
        return None
    options = model_options(model_args, config) | {"quantization_config": get_quantization_config(model_args)}
    del options["revision"]  # not that of the base model
    return load_adapter(find_folder(name, "model_name_or_path", revision), tokenizer, is_trainable=True, **options)


def read_trainable_tokens(model_args: ModelConfig) -> dict[str, list[int]] | None:
    """
    Tokens that were added to a model and not trained yet, as PEFT's `trainable_token_indices`, if its folder or
    repository has a file of them. LoRA alone would leave their embeddings as they are.

    Raises:
        `ValueError`: if the file is damaged.
    """
    missing = ("missing_entries", "connection_errors", "gated_repo")
    options = {f"_raise_exceptions_for_{name}": False for name in missing}
    name, revision = model_args.model_name_or_path, model_args.model_revision
    path = cached_file(name, TRAINABLE_TOKENS_FILE, revision=revision, **options)
    if path is None:
        return None
    try:
        check_regular(Path(path))
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not all(type(token) is int and token >= 0 for tokens in found.values() for token in tokens):
            raise ValueError("it must map names of modules to lists of token ids")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): write the model again.") from error
    return found


def load_tokenizer(model_args: ModelConfig, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    name = model_args.model_name_or_path
    # If `trust_remote_code` were left out, transformers would ask at the terminal
    options = {"revision": model_args.model_revision, "trust_remote_code": trust_remote_code}
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"`model_name_or_path` = {name!r} has no tokenizer that can be loaded: {error}") from error


def make_task(tokenizer: PreTrainedTokenizerBase, data: Data, max_length: int | None = None) -> RankingTask:
    """The task that the options describe. Its prompts hold no more items than those of the training windows."""
    windows = data.windows.get("train")
    return RankingTask(
        data.catalog,
        tokenizer,
        data.args.prompt_template,
        max_history=None if windows is None else max(map(len, windows["item_ids"][:])) - 1,
        chat_template_kwargs=data.args.chat_template_kwargs,
        **({} if max_length is None else {"max_length": max_length}),
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
    elif any(Path(config.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        logger.warning(
            "%s has checkpoints of an earlier run: training starts from the beginning and overwrites them. To "
            "continue that run, pass resume_from_checkpoint='last'.", config.output_dir,
        )  # fmt: skip
    return checkpoint
