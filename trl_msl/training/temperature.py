# SPDX-License-Identifier: Apache-2.0
"""The temperature of the loss over the course of training, the same on all ranks."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .losses import adaptive_temperature, temperature_statistics
from .msl_config import MSLConfig
from .sparse_head import SparseCausalLMOutput


class TemperatureCallback(TrainerCallback, ExportableState):
    """
    Holds the temperature τ of the loss and, if it is adaptive (ATS), updates it after each optimizer step from all of
    the step's micro-batches, on all ranks. Stored in `trainer_state.json`.

    Each step uses the τ of the steps before it, so that gradient accumulation changes nothing. The released code uses
    each micro-batch's estimate at once; with a moving average of weight 0.05 that differs little.

    Args:
        **settings:
            `temperature` and all `temperature_*` of an [`MSLConfig`].
    """

    def __init__(self, **settings: Any):
        self.settings = settings
        self.adaptive = settings["temperature"] == "adaptive"
        self.value: float = settings["temperature_init" if self.adaptive else "temperature"]
        self._observed: Tensor | None = None

    @classmethod
    def from_config(cls, config: MSLConfig) -> TemperatureCallback:
        """Callback with the settings of an [`MSLConfig`]."""
        return cls(**{name: value for name, value in vars(config).items() if name.startswith("temperature")})

    def observe(self, output: SparseCausalLMOutput, first_branching_node: int) -> None:
        """Add the statistics of one micro-batch."""
        if not self.adaptive:
            return
        first = output.parents == first_branching_node
        rows = first if self.settings["temperature_positions"] == "first" else torch.ones_like(first)
        statistics = temperature_statistics(output.logits[rows], output.valid_mask[rows], output.targets[rows])
        # Every item passes the first branching node once: their number counts items
        observed = torch.cat([statistics, first.sum().view(1)])
        self._observed = observed if self._observed is None else self._observed + observed

    def on_train_begin(self, args, state, control, **kwargs):
        self._observed = None  # of a step that was interrupted
        if not self.adaptive:
            return
        if state.global_step == 0:
            self.value = self.settings["temperature_init"]
        # Not left to `restore_callback_states_from_checkpoint`, which is off by default
        elif type(self).__name__ in state.stateful_callbacks:
            self.value = state.stateful_callbacks[type(self).__name__]["attributes"]["value"]

    def on_step_end(self, args, state, control, **kwargs):
        if self._observed is None:
            return
        settings = self.settings
        *statistics, num_items = reduce(self._observed, "sum").cpu()  # a collective: every rank takes part
        self._observed = None
        if num_items == 0 or state.global_step <= settings["temperature_warmup_steps"]:
            return
        pooled = settings["temperature_positions"] == "first"
        statistics, num_items = torch.stack(statistics), None if pooled else num_items
        estimate = adaptive_temperature(statistics, settings["temperature_eta"], num_items)
        if estimate.isnan():  # logits overflowed: fp16's scaler skips such a step, too
            return
        estimate = float(estimate.clamp(settings["temperature_min"], settings["temperature_max"]))
        self.value += settings["temperature_ema"] * (estimate - self.value)

    def state(self) -> dict:
        return {"args": self.settings, "attributes": {"value": self.value}}
