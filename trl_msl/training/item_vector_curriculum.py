# SPDX-License-Identifier: Apache-2.0
"""Training that begins with prompts of text alone and ends with the vectors of items in all of them."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import TrainerCallback

from ..model import backbone
from ..trie import FIRST_VECTOR_TOKEN


class ItemVectorCurriculum(TrainerCallback):
    """
    The curriculum of [LLaRA](https://huggingface.co/papers/2312.02445): at step t of T, a row of a batch keeps its
    vectors with probability t / T. From the others they are taken out by attention mask and positions, which gives the
    logits of the prompt without them. Evaluation always has all of them.

    The rows are drawn from PyTorch's random state, which checkpoints hold.
    """

    def __init__(self):
        self.share = 0.0
        self._hook = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if getattr(args, "packing", False) or getattr(args, "padding_free", False):
            raise ValueError("`packing` and `padding_free` leave no mask to take vectors out by: set both to False.")
        if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
            raise ValueError("`ItemVectorCurriculum` does not work with prompt tuning: use LoRA.")
        self.on_train_end(args, state, control)  # of a training that was broken off
        base = model.get_base_model() if is_peft_model(model) else model
        self._hook = backbone(base).register_forward_pre_hook(self._take_out, with_kwargs=True)

    def on_step_begin(self, args, state, control, **kwargs):
        self.share = state.global_step / state.max_steps

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()

    def _take_out(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if not module.training:
            return args, kwargs
        ids = kwargs["input_ids"]
        is_text_only = torch.rand(len(ids)).to(ids.device) >= self.share
        is_kept = (ids < FIRST_VECTOR_TOKEN) | ~is_text_only[:, None]
        if kwargs.get("attention_mask") is not None:
            is_kept &= kwargs["attention_mask"].bool()
        positions = (is_kept.cumsum(dim=1) - 1).clamp(min=0)
        return args, {**kwargs, "attention_mask": is_kept.long(), "position_ids": positions}
