# SPDX-License-Identifier: Apache-2.0
"""
One row of the ablation in docs/baselines.md: a model trained by [`MSLTrainer`], optionally with a constant factor on
the loss, and with the parts of the loss measured during training.

```bash
accelerate launch -m trl_msl.experiments.ablation --config recipes/configs/ablation.yaml \
    --data_dir data/Book --empty_texts keep --model_name_or_path outputs/book/base --output_dir outputs/book \
    --run_name msl-ats --temperature adaptive
```

The folder `run_name` in `output_dir` then holds what `trl-msl train` leaves, for `trl-msl report`.
Without `model_name_or_path` a small model is made there first.
"""

import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback
from trl import ModelConfig

from ..data import DataArguments
from ..model import is_sharded
from ..scripts.command_line import command
from ..scripts.outputs import finish, write_json
from ..scripts.train import make_trainer, reported
from ..scripts.train_and_evaluate import DecodingArguments, train_and_evaluate
from ..training import MSLConfig, MSLTrainer, SparseHeadOptions, masked_softmax_loss
from .compare_losses import prepare
from .from_scratch import ScratchArguments


@dataclass
class AblationArguments(DecodingArguments):
    """
    Arguments of an ablation, besides those of the data, the trainer and the model.

    Parameters:
        loss_scale (`float`, *optional*, defaults to `1.0`):
            Constant factor on the loss.
        probe_steps (`int`, *optional*):
            Measure the parts of the loss and their gradients every `probe_steps` steps, and write `probe.json`.
    """

    loss_scale: float = field(default=1.0, metadata={"help": "Constant factor on the loss."})
    probe_steps: int | None = field(default=None, metadata={"help": "Steps between measurements of the loss's parts."})


def main(
    args: AblationArguments,
    data_args: DataArguments,
    scratch_args: ScratchArguments,
    config: MSLConfig,
    model_args: ModelConfig,
) -> None:
    folder = Path(config.output_dir, config.run_name or "")
    data, task = prepare(folder, data_args, scratch_args, config, model_args)
    config = dataclasses.replace(config, output_dir=str(folder))
    trainer = make_trainer(task, data, config, model_args, ScaledLossTrainer)
    trainer.loss_scale = args.loss_scale
    if args.probe_steps:
        trainer.add_callback(LossProbe(trainer, folder / "probe.json", args.probe_steps))
    arguments = {**reported(config), "loss_scale": args.loss_scale}
    train_and_evaluate(trainer, task, data, args, config.run_name or "MSL", {"arguments": arguments})
    finish()


class ScaledLossTrainer(MSLTrainer):
    """[`MSLTrainer`] whose loss is multiplied by a constant, the simplest way to enlarge a vanishing gradient."""

    loss_scale = 1.0

    def _describe(self) -> dict[str, Any]:
        return {**super()._describe(), "loss_scale": self.loss_scale}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scale = self.loss_scale if model.training else 1.0
        return (scale * found[0], found[1]) if return_outputs else scale * found


class LossProbe(TrainerCallback):
    """
    Measures the parts of the loss on the targets of the same few rows during training, and writes a file with

    - `history`, at step 0 and every `every` steps: `lml`, `lml1` and `lml2` per title token (Eq. 2-4 of the
      [MSL paper](https://huggingface.co/papers/2504.04178)), the norms of their gradients, and the temperature;
    - histograms of the final model, at positions with several valid tokens: `target_probability`, the restricted
      probability of the right token at the last temperature (1 minus it is the position's weight in the gradient); and
      `logits` of right, other valid, and invalid tokens.

    Args:
        trainer ([`MSLTrainer`]):
            The trainer. Its rows must not be packed, nor its model sharded.
        path (`Path`):
            File to write.
        every (`int`):
            Optimizer steps between two measurements.
        num_rows (`int`, *optional*, defaults to `64`):
            Number of rows, the first of training.
    """

    def __init__(self, trainer: MSLTrainer, path: Path, every: int, num_rows: int = 64):
        self.trainer, self.path, self.every = trainer, path, every
        rows = trainer.train_dataset.select_columns(["input_ids", "labels"])
        self.rows = [_target_only(rows[index]) for index in range(min(num_rows, len(rows)))]
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if is_sharded(self._model):
            raise ValueError("`probe_steps` needs the whole model in each process: leave it out of a sharded run.")
        before = json.loads(self.path.read_text())["history"] if state.global_step and self.path.is_file() else []
        self.history = [entry for entry in before if entry["step"] < state.global_step]
        self._measure(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self._measure(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_json(self.path, {"history": self.history, **self._histograms()})

    def _measure(self, step: int) -> None:
        started = time.time()
        model = self._model
        was_training = model.training
        model.eval()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sums: dict[str, float] = {"lml": 0.0, "lml2": 0.0}
        gradients = {name: [torch.zeros_like(p) for p in parameters] for name in sums}
        num_tokens = 0
        with torch.enable_grad():
            for start in range(0, len(self.rows), 16):
                batch = self._batch(self.rows[start : start + 16])
                output = model(**batch, sparse_lm_head=SparseHeadOptions(vocab_losses=True))
                num_tokens += len(output.vocab_losses)
                restricted = masked_softmax_loss(output.logits, output.valid_mask, output.targets)
                for name, losses in (("lml", output.vocab_losses), ("lml2", restricted)):
                    found = torch.autograd.grad(losses.sum(), parameters, retain_graph=True, allow_unused=True)
                    sums[name] += losses.sum().item()
                    for total, gradient in zip(gradients[name], found):
                        if gradient is not None:
                            total += gradient
        model.train(was_training)
        gradients["lml1"] = [whole - part for whole, part in zip(gradients["lml"], gradients["lml2"])]
        sums["lml1"] = sums["lml"] - sums["lml2"]
        entry = {"step": step, "temperature": self.trainer.temperature}
        for name in ("lml", "lml1", "lml2"):
            entry[name] = sums[name] / num_tokens
            entry[f"{name}_grad_norm"] = _norm(gradients[name]) / num_tokens
        self.history.append(entry)
        if self.trainer.is_world_process_zero():
            write_json(self.path, {"history": self.history})
        self.seconds += time.time() - started

    @torch.no_grad()
    def _histograms(self) -> dict[str, Any]:
        model, trie, temperature = self._model, self.trainer.trie, self.trainer.temperature
        was_training = model.training
        model.eval()
        probabilities, logits = [], {"target": [], "valid": [], "invalid": []}
        for row in self.rows:  # one at a time: all logits of a row are needed
            batch = self._batch([row])
            nodes = batch.pop("labels")[0, 1:]
            scores = model(**batch).logits[0, :-1].float()
            local_trie = trie.to(nodes.device)
            branching = (nodes != -100) & (local_trie.num_valid_tokens(nodes.clamp(min=0)) > 1)
            nodes, scores = nodes[branching], scores[branching]
            is_valid = local_trie.valid_mask(local_trie.parents(nodes), scores.shape[-1])
            targets = local_trie.tokens(nodes)
            losses = masked_softmax_loss(scores / temperature, is_valid, targets)
            probabilities.append(losses.neg().exp().cpu())
            is_target = torch.zeros_like(is_valid).scatter_(1, targets.unsqueeze(1), True)
            for name, mask in (("target", is_target), ("valid", is_valid & ~is_target), ("invalid", ~is_valid)):
                logits[name].append(scores[mask].cpu())
        model.train(was_training)
        values = {name: torch.cat(parts).numpy() for name, parts in logits.items()}
        edges = np.linspace(min(map(np.min, values.values())), max(map(np.max, values.values())), 61)
        return {
            "target_probability": _histogram(torch.cat(probabilities).numpy(), np.linspace(0, 1, 21)),
            "logits": {
                "edges": edges.tolist(),
                **{name: _histogram(value, edges)["counts"] for name, value in values.items()},
            },
        }

    @property
    def _model(self):
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def _batch(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        batch = self.trainer.data_collator(rows)
        return {name: value.to(self._model.device) for name, value in batch.items() if torch.is_tensor(value)}


def _target_only(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """The row without labels on its history, so that all trainings are measured at the same positions."""
    labels = row["labels"]
    start = len(labels) - next(place for place, label in enumerate(reversed(labels)) if label == -100)
    return {**row, "labels": [-100] * start + labels[start:]}


def _norm(gradients: list[Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def _histogram(values: np.ndarray, edges: np.ndarray) -> dict[str, list]:
    return {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()}


run = command(main, model_is_optional=True)


if __name__ == "__main__":
    run()
