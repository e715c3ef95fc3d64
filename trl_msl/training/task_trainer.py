# SPDX-License-Identifier: Apache-2.0
"""What the trainers of this package share: a task that is saved and shared beside the model."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import HubStrategy
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import get_config_model_id, global_then_local_main_first

from ..data import RankingTask
from ..model import ITEM_VECTORS_FILE, get_item_vectors, load_item_vectors, save_item_vectors
from ..trie import ItemTrie
from .hub import check_base, name_bases_absolutely, skipping_private_files
from .item_vector_curriculum import ItemVectorCurriculum
from .model_card import make_model_card
from .resuming import ResumableTrainerMixin


logger = logging.getLogger(__name__)


class TaskTrainerMixin(ResumableTrainerMixin):
    """For a [`~transformers.Trainer`] of TRL, to stand before it among the bases."""

    _config_class: type[TrainingArguments]
    _unsupported: dict[str, str]  # arguments of TRL's trainer that have no meaning here, and the remedy
    _missing_metrics: dict[str, str]  # metrics that TRL's trainer logs and this one does not, and what to use
    _has_diverged = False
    test_metrics: dict[str, float] | None = None  # for the model card, once the model has been tested

    def _set_task(
        self, task: RankingTask, model: str | PreTrainedModel, args: TrainingArguments | None, kwargs: dict[str, Any]
    ) -> TrainingArguments:
        """
        Check a trainer's arguments before its `__init__`, complete `kwargs` by the task's tokenizer, and return the
        configuration to train with.
        """
        config_class = self._config_class
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = config_class(f"{model_name.split('/')[-1]}-{self._name.replace(' ', '')}")
        if not isinstance(args, config_class):
            raise ValueError(f"`args` is a `{type(args).__name__}`: pass a `{config_class.__name__}`.")
        for name, reason in self._unsupported.items():
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"`{name}` is not supported by `{type(self).__name__}`: {reason}.")
        if not isinstance(task, RankingTask):
            raise ValueError(f"`task` is a {type(task).__name__}: pass a `RankingTask`.")
        if task.trie.first_branching_node < 0:
            raise ValueError(f"`task` has only items with the same text ({task.trie}): add others to its catalogue.")
        best = (args.metric_for_best_model or "").removeprefix("eval_")
        if best in self._missing_metrics:
            raise ValueError(
                f"`metric_for_best_model` = {args.metric_for_best_model!r} is not measured by "
                f"`{type(self).__name__}`: use {self._missing_metrics[best]!r}."
            )
        given = kwargs.get("processing_class")
        if given is None:
            kwargs["processing_class"] = task.tokenizer
        elif getattr(given, "tokenizer", given).get_vocab() != task.tokenizer.get_vocab():
            raise ValueError("`processing_class` has another vocabulary than the task's tokenizer: leave it out.")
        if args.max_length not in (None, task.max_length):
            raise ValueError(
                f"`max_length` is {args.max_length} in `args` and {task.max_length} in `task`: set it in the task, "
                "and leave it out of `args`."
            )
        check_base(model, kwargs.get("peft_config"), args.output_dir, args.push_to_hub)
        if isinstance(kwargs.get("train_dataset"), Dataset | IterableDataset):  # TRL reads its first row
            self._column_names(kwargs["train_dataset"], "train")
        args = copy.copy(args)
        args.max_length = task.max_length
        self.task = task
        return args

    @property
    def trie(self) -> ItemTrie:
        """The task's trie, whose nodes are the labels."""
        return self.task.trie

    @property
    def _unwrapped_model(self) -> PreTrainedModel:
        return self.accelerator.unwrap_model(self.model)

    def _column_names(self, dataset: Dataset | IterableDataset, dataset_name: str) -> list[str]:
        if next(iter(dataset), None) is None:
            raise ValueError(f"The {dataset_name} dataset is empty: pass at least one row.")
        return get_dataset_column_names(dataset)

    def _map_rows(
        self,
        dataset: Dataset | IterableDataset,
        tokenize: Callable,
        dataset_name: str,
        args: TrainingArguments,
        **fn_kwargs: Any,
    ) -> Dataset | IterableDataset:
        """Replace the columns of a dataset by those that `tokenize(batch, task, **fn_kwargs)` returns."""
        map_kwargs = {}
        if isinstance(dataset, Dataset):  # `IterableDataset.map` supports neither
            map_kwargs = {"desc": f"Tokenizing {dataset_name} dataset", "num_proc": args.dataset_num_proc}
        with global_then_local_main_first():
            return dataset.map(
                tokenize,
                batched=True,
                remove_columns=get_dataset_column_names(dataset),
                fn_kwargs={"task": self.task, **fn_kwargs},
                **map_kwargs,
            )

    def _check_rows(
        self, dataset: Dataset | IterableDataset, check: Callable, dataset_name: str
    ) -> Dataset | IterableDataset:
        """Call `check(batch, task, dataset_name)` on all rows: now, or as they come from an `IterableDataset`."""
        fn_kwargs = {"task": self.task, "dataset_name": dataset_name}
        if isinstance(dataset, IterableDataset):
            return dataset.map(check, batched=True, fn_kwargs=fn_kwargs)
        for batch in dataset.iter(batch_size=10_000):
            check(batch, **fn_kwargs)
        return dataset

    def _warn_if_diverged(self, loss: float) -> None:
        """Warn once that a training loss is not finite."""
        if not math.isfinite(loss) and not self._has_diverged:
            self._has_diverged = True
            logger.warning(
                "The loss is %s at step %d: the training has diverged. Lower `learning_rate`, or check the model.",
                loss, self.state.global_step,
            )  # fmt: skip

    def train(self, *args: Any, **kwargs: Any):
        self._has_diverged = False
        has_vectors = get_item_vectors(self._unwrapped_model) is not None
        if self.task.vector_tokens is not None and not has_vectors:
            raise ValueError(
                "`task` puts vectors of items into prompts, but the model has none: call "
                "`add_item_vectors(trainer.model, vectors)` first, or `load_item_vectors(trainer.model, folder)` if "
                "it was trained with them."
            )
        if has_vectors and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("Item vectors are not saved with FSDP and DeepSpeed: train with DDP, or in one process.")
        return super().train(*args, **kwargs)

    def _describe(self) -> dict[str, Any]:
        task, vectors, callbacks = self.task, get_item_vectors(self._unwrapped_model), self.callback_handler.callbacks
        content = json.dumps([task.catalog.ids, task.catalog.completions, sorted(task.tokenizer.get_vocab().items())])
        prompt = dataclasses.asdict(task.prompt_template)
        return {
            "catalog": f"{len(task.catalog):,} items, {hashlib.sha256(content.encode()).hexdigest()[:16]}",
            "prompt_text": prompt.pop("text"),
            **prompt,
            "chat_template_kwargs": task.chat_template_kwargs,
            "max_length": task.max_length,
            "item_vectors": vectors and vectors.fingerprint(("vectors",)),
            "item_vector_curriculum": any(isinstance(callback, ItemVectorCurriculum) for callback in callbacks),
            **super()._describe(),
        }

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        name_bases_absolutely(self._unwrapped_model)
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # with DeepSpeed and FSDP all ranks come here
            folder = Path(output_dir or self.args.output_dir)
            save_item_vectors(self._unwrapped_model, folder)
            self.task.save_pretrained(folder)
            make_model_card(self).save(folder / "README.md")  # in place of PEFT's, which names local paths

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore_item_vectors(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._restore_item_vectors(self._unwrapped_model, self.state.best_model_checkpoint)

    @staticmethod
    def _restore_item_vectors(model: PreTrainedModel, folder: str) -> None:
        had_vectors = get_item_vectors(model) is not None
        if load_item_vectors(model, Path(folder)) is None and had_vectors:
            raise ValueError(f"{folder} lacks {ITEM_VECTORS_FILE}: restore it, or take another checkpoint.")

    def predict(self, *args, **kwargs):
        raise ValueError("`predict` is not supported, as full logits are never built: rank items with `recommend`.")

    def push_to_hub(self, *args: Any, **kwargs: Any):
        """As [`~transformers.Trainer.push_to_hub`], without evaluation files and user data ([`NEVER_PUSHED`])."""
        check_base(self.model, None, self.args.output_dir, is_pushed=True)
        with skipping_private_files():
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            folder = Path(self.args.output_dir)  # where `Trainer` copies the model
            save_item_vectors(self._unwrapped_model, folder)
            self.task.save_pretrained(folder)
            self._write_record(folder)
        with skipping_private_files():
            super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card of a recommender: see [`make_model_card`]."""
        if self.is_world_process_zero():
            card = make_model_card(self, model_name, dataset_name, tags)
            card.save(Path(self.args.output_dir) / "README.md")
