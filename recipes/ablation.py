# SPDX-License-Identifier: Apache-2.0
"""What only ablations need: a loss with a constant factor, and a look into the loss as training goes on."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipe_outputs import write_json
from torch import Tensor
from transformers import TrainerCallback

from trl_msl import MSLTrainer, is_sharded, masked_softmax_loss
from trl_msl.training import SparseHeadOptions


class ScaledLossTrainer(MSLTrainer):
    """[`MSLTrainer`] whose loss is multiplied by a constant: the simplest way to enlarge a gradient that vanishes."""

    loss_scale = 1.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scale = self.loss_scale if model.training else 1.0
        return (scale * found[0], found[1]) if return_outputs else scale * found


class LossProbe(TrainerCallback):
    """
    Measures the parts of the loss on the same few rows all along a training by [`MSLTrainer`], and writes a file:

    - `history`, of the rows' targets, at step 0 and every `every` steps: `lml`, `lml1` and `lml2` per title token
      (Eq. 2-4 of the [MSL paper](https://huggingface.co/papers/2504.04178)), the norms of their gradients, and the
      temperature;
    - at the end, histograms of the model that is kept, where several tokens are valid: `target_probability`, the
      restricted probability of the right token at the last temperature (1 minus it is the position's weight in the
      gradient); and `logits` of right, other valid, and invalid tokens.

    Args:
        trainer ([`MSLTrainer`]):
            The trainer, of rows that are not packed; its model must not be sharded.
        path (`Path`):
            File to write.
        every (`int`):
            Optimizer steps between two measurements.
        num_rows (`int`, *optional*, defaults to `64`):
            Number of training rows, the first ones.
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
    """A row whose history is not supervised: the same positions for all trainers."""
    labels = row["labels"]
    start = len(labels) - next(place for place, label in enumerate(reversed(labels)) if label == -100)
    return {**row, "labels": [-100] * start + labels[start:]}


def _norm(gradients: list[Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def _histogram(values: np.ndarray, edges: np.ndarray) -> dict[str, list]:
    return {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()}
