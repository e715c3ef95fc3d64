# SPDX-License-Identifier: Apache-2.0
"""What the trainers of this package share: a task that is saved beside the model, and runs that survive a kill."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCardData
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import get_config_model_id, global_then_local_main_first

from ..data import RankingTask
from ..trie import ItemTrie
from .model_card import base_license, card_tags, make_model_card


logger = logging.getLogger(__name__)


class TaskTrainerMixin:
    """For a [`~transformers.Trainer`] of TRL, which stands after it among the bases."""

    _config_class: type[TrainingArguments]
    _unsupported: dict[str, str]  # arguments of TRL's trainer that have no meaning here, and the remedy
    _missing_metrics: dict[str, str]  # metrics that TRL's trainer logs and this one does not, and what to use
    _has_diverged = False

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

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run resumed from its last step has nothing left to do, but `Trainer` would take one more step
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _warn_if_diverged(self, loss: float) -> None:
        """Say once that a training loss is not a number."""
        if not math.isfinite(loss) and not self._has_diverged:
            self._has_diverged = True
            logger.warning(
                "The loss is %s at step %d: the training has diverged. Lower `learning_rate`, or check the model.",
                loss, self.state.global_step,
            )  # fmt: skip

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """
        As [`~transformers.Trainer.train`]; `resume_from_checkpoint=True` takes the last complete checkpoint in
        `output_dir`, so that a run may be killed at any moment.
        """
        self._has_diverged = False
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # with DeepSpeed and FSDP all ranks come here
            self.task.save_pretrained(output_dir or self.args.output_dir)

    def predict(self, *args, **kwargs):
        raise ValueError("`predict` is not supported, as full logits are never built: rank items with `recommend`.")

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card of a recommender: see [`make_model_card`]."""
        if not self.is_world_process_zero():
            return
        base = get_config_model_id(self.model.config) or ""
        model_id = self.hub_model_id or str(self.args.output_dir)
        metadata = ModelCardData(
            base_model=base if base and not Path(base).is_dir() else None,
            datasets=dataset_name,
            library_name="transformers",
            license=base_license(base),
            model_name=model_name or Path(model_id).name,
            tags=card_tags([*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])]),
        )
        evaluations = [entry for entry in self.state.log_history if "eval_num_rows" in entry]
        best = [entry for entry in evaluations if entry["step"] == self.state.best_global_step]
        metrics = (best or evaluations or [{}])[-1]
        num_rows = len(self.train_dataset) if isinstance(self.train_dataset, Dataset) else None
        card = make_model_card(metadata, self.task, model_id, base, self._name, self._paper, num_rows, metrics)
        card.save(Path(self.args.output_dir) / "README.md")


def last_complete_checkpoint(output_dir: str | Path) -> str:
    """
    Folder of the last checkpoint whose `trainer_state.json`, which is written last, is whole.

    Raises:
        `ValueError`: if there is none.
    """
    steps = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            state = TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
        except (OSError, TypeError, ValueError):
            logger.warning("%s is incomplete and is ignored.", path)
        else:
            steps[state.global_step] = path
    if not steps:
        raise ValueError(
            f"`resume_from_checkpoint` is True, but {str(output_dir)!r} has no complete checkpoint: leave it out."
        )
    last = str(steps[max(steps)])
    warn_of_missing_state(last)
    return last


def warn_of_missing_state(checkpoint: str | Path) -> None:
    """Warn if a checkpoint lacks state without which a resumed run ends differently; `Trainer` does not."""
    # FSDP and DeepSpeed save the optimizer under other names, DeepSpeed together with the schedule
    expected = {
        "the optimizer's state": ("optimizer*", "global_step*"),
        "the learning rate's schedule": ("scheduler.pt", "global_step*"),
        "the random state": ("rng_state*.pth",),
    }
    folder = Path(checkpoint)
    missing = [what for what, patterns in expected.items() if not any(any(folder.glob(p)) for p in patterns)]
    if missing:
        logger.warning("%s lacks %s: training restarts with new state for it.", checkpoint, " and ".join(missing))
