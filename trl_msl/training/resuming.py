# SPDX-License-Identifier: Apache-2.0
"""Resuming from checkpoints, which say what they were trained with, and what is logged when a run begins."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftModel
from pyarrow import compute
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_model_param_count
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import get_config_model_id

from ..trie import replacing


logger = logging.getLogger(__name__)

TRAINING_FILE = "training.json"
# Options of TRL and transformers that shape a training, as do all that a config of this package adds, but for `log*`.
# The batch size is that of a step, however it is split
_OPTIONS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
    "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "average_tokens_across_devices", "neftune_noise_alpha", "router_aux_loss_coef", "seed", "data_seed",
    "dataloader_drop_last", "train_sampling_strategy", "packing", "packing_strategy", "padding_free",
    "beta", "disable_dropout", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps",
)  # fmt: skip
# A resumed run may be longer, or on another device. It then ends differently from an uninterrupted one
_MAY_DIFFER = ("num_train_epochs", "max_steps", "precision")
ADAPTER_OPTIONS = (
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "target_modules",
    "modules_to_save",
)  # fmt: skip


class ResumableTrainerMixin:
    """
    For a [`~transformers.Trainer`] of TRL, to stand before it among the bases. `training.json` in each checkpoint says
    what it was trained with, and only a run with the same resumes from it.
    """

    _record: dict[str, Any] | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """
        As [`~transformers.Trainer.train`]; `resume_from_checkpoint=True` takes the last complete checkpoint in
        `output_dir`, so that a run may be killed at any moment.

        Raises:
            `ValueError`: if the checkpoint was trained with another model, catalogue, prompt, data or options.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        self._record = None  # the rows may have been replaced
        if self.args.should_save:  # with FSDP such a process alone has all weights, until they are sharded
            record = self.record
            if resume_from_checkpoint:
                check_resumable(resume_from_checkpoint, record)
        callback = _StartCallback(self, resume_from_checkpoint)
        self.add_callback(callback)
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            self.remove_callback(callback)

    @property
    def record(self) -> dict[str, Any]:
        """What shapes the training, as it is written to `training.json`."""
        if self._record is None:
            self._record = json.loads(json.dumps({**self._describe(), **describe_options(self)}, default=str))
        return self._record

    def _describe(self) -> dict[str, Any]:
        rows = self.train_dataset
        return {"training_rows": f"{len(rows):,} rows, {hash_rows(rows)[:16]}"} if isinstance(rows, Dataset) else {}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # with DeepSpeed and FSDP all ranks come here
            self._write_record(Path(output_dir or self.args.output_dir))

    def _write_record(self, folder: Path) -> None:
        with replacing(folder / TRAINING_FILE) as temporary:
            content = json.dumps(self.record, indent=2, ensure_ascii=False)
            temporary.write_text(content + "\n", encoding="utf-8")

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run resumed from its last step has nothing left to do, but `Trainer` would take one more step
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


class _StartCallback(TrainerCallback):
    """Logs what is trained, and from which step, once `Trainer` knows."""

    def __init__(self, trainer: Trainer, checkpoint: str | None):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        trainer, record, rows = self.trainer, self.trainer.record, self.trainer.train_dataset
        trainable = get_model_param_count(trainer.model, trainable_only=True)
        epochs = ""
        if isinstance(rows, Dataset):
            epochs = f", {state.max_steps * record['batch_size'] / len(rows):.3g} epochs of {len(rows):,} rows"
        lines = [
            f"Training with {type(trainer).__name__}, into {args.output_dir}:",
            f"  model: {record['base_model'] or 'made in Python'}, {record['num_parameters']:,} parameters, "
            f"{trainable:,} trained",
            *([f"  items: {len(trainer.task.catalog):,}"] if hasattr(trainer, "task") else []),
            f"  steps: {state.max_steps:,} of {record['batch_size']} rows{epochs}",
            f"  device: {args.world_size} x {args.device.type}, {record['precision']}",
        ]
        if self.checkpoint:
            lines.append(f"Resuming from step {state.global_step:,} of {state.max_steps:,} ({self.checkpoint})")
        logger.info("\n".join(lines))


def base_name(model: Any) -> str:
    """The model that a training began with: a repository, or the last part of a local path; empty if made here."""
    name = get_config_model_id(model.config) or ""
    return Path(name).resolve().name if name and Path(name).is_dir() else name


def describe_options(trainer: Trainer) -> dict[str, Any]:
    """The model and the options that shape a training."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    trl_class = next(kind for kind in type(args).__mro__ if kind.__module__.startswith("trl."))
    inherited = {field.name for field in dataclasses.fields(trl_class)}
    names = [name for name in _OPTIONS if hasattr(args, name)]
    names += [f.name for f in dataclasses.fields(args) if f.name not in inherited and not f.name.startswith("log")]
    options = {
        "base_model": base_name(model),
        "num_parameters": get_model_param_count(model),
        "base_weights": hash_frozen_weights(model),
        **{name: getattr(args, name) for name in names},
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "num_train_epochs": args.num_train_epochs,
        "max_steps": args.max_steps,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else str(model.dtype).removeprefix("torch."),
        "peft_type": None,
    }
    if is_peft_model(model):
        adapter = model.active_peft_config.to_dict()
        values = {name: adapter.get(name) for name in ADAPTER_OPTIONS}
        options |= {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    return options


def hash_frozen_weights(model: PreTrainedModel | PeftModel) -> str:
    """
    Fingerprint of the weights that no checkpoint holds, those of an adapter's base model: signs of some of them, which
    are the same in every dtype.
    """
    digest, adapters = hashlib.sha256(), getattr(model, "peft_config", ())
    for name, weight in model.named_parameters():
        # DPO's reference adapter is frozen, too, but is made anew by each run
        if not weight.requires_grad and weight.is_floating_point() and not any(f".{a}." in name for a in adapters):
            digest.update(weight.detach().flatten()[:4096].signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def hash_rows(rows: Dataset) -> str:
    """SHA-256 of the rows' tokens and labels, in order."""
    names = sorted(name for name in rows.column_names if name == "labels" or name.endswith("_ids"))
    digest = hashlib.sha256(repr(names).encode())
    for batch in rows.select_columns(names).with_format("arrow").iter(batch_size=10_000):
        for column in batch.columns:
            while not pa.types.is_integer(column.type):  # lists, of lists where several items are rejected
                digest.update(compute.list_value_length(column).to_numpy().astype("int64").tobytes())
                column = compute.list_flatten(column)
            digest.update(column.to_numpy().astype("int64").tobytes())
    return digest.hexdigest()


def check_resumable(checkpoint: str | Path, record: dict[str, Any]) -> None:
    """
    Compare a run with the one that wrote a checkpoint. Warns of another number of epochs or steps, of another
    precision, and of a checkpoint that does not say what it was trained with.

    Raises:
        `ValueError`: if they differ in anything else that shapes a training.
    """
    path = Path(checkpoint, TRAINING_FILE)
    if not path.is_file():
        logger.warning("%s has no %s, so its data and options can't be checked.", checkpoint, path.name)
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    if different := differences(record, there, leave_out=(*_MAY_DIFFER, "base_model")):
        raise ValueError(
            f"`resume_from_checkpoint`: {str(checkpoint)!r} was trained with {different}. Pass what it was trained "
            "with, or start over in another `output_dir`."
        )
    if different := differences(record, there, leave_out=record.keys() - set(_MAY_DIFFER)):
        logger.warning(
            "%s was trained with %s: the run will end differently from an uninterrupted one.", checkpoint, different
        )


def differences(here: dict[str, Any], there: dict[str, Any], leave_out: Any = ()) -> str:
    """Where two records differ, as part of a sentence; empty if they agree in all that both have."""
    names = [name for name in here if name in there and name not in leave_out and here[name] != there[name]]
    return ", ".join(f"`{name}` {there[name]!r} (here {here[name]!r})" for name in names)


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
