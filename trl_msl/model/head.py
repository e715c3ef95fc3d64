# SPDX-License-Identifier: Apache-2.0
"""The sparse LM head: only the logits that the catalogue asks for, computed inside the model's forward."""

from __future__ import annotations

import functools

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from transformers import PretrainedConfig, PreTrainedModel

from ..trie import ItemTrie


def head_projection(model: PreTrainedModel) -> functools.partial:
    """
    The model's LM head as a function of `hidden` states, `(positions, hidden_size)`, and of the `rows` of the head to
    project them onto; it returns the logits in fp32, on the head's device, scaled and softcapped as the model's own
    forward does.
    """
    text_config = model.config.get_text_config()
    head = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    # FSDP2 exposes sharded parameters as DTensors where its own hooks have not gathered them
    if isinstance(weight, DTensor):
        weight, bias = _gather(weight), None if bias is None else _gather(bias)
    softcap = getattr(text_config, "final_logit_softcapping", None)
    return functools.partial(_project, weight=weight, bias=bias, scale=_logit_scale(text_config), softcap=softcap)


def _gather(parameter: DTensor) -> Tensor:
    """The whole of a sharded parameter. Its gradient is averaged over ranks, as FSDP does for what it gathers."""
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, rows: Tensor | slice
) -> Tensor:
    # With the model split across devices (`device_map`), the backbone can end on another device than the head
    device = weight.device
    rows = rows if isinstance(rows, slice) else rows.to(device)
    with torch.autocast(device.type, enabled=False):
        logits = hidden.to(device).float() @ weight[rows].float().T
        if bias is not None:
            logits = logits + bias[rows].float()
        logits = logits * scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _logit_scale(text_config: PretrainedConfig) -> float:
    """Factor on the logits, under the names that transformers' models give it (the list is TRL's)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text_config, name, None) is not None:
            return getattr(text_config, name)
    scaling = getattr(text_config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if text_config.model_type == "hyperclovax" else 1 / scaling


def check_head(model: PreTrainedModel, trie: ItemTrie) -> None:
    """Raise a `ValueError` where rows of the head's weight are not all there is to the logits of `trie`'s tokens."""
    head = model.get_output_embeddings()
    is_adapted = isinstance(head, BaseTunerLayer) and not (head.merged or head.disable_adapters)
    if is_adapted or isinstance(head, TrainableTokensWrapper):
        raise ValueError(
            f"`model` has an adapter on its LM head ({type(head).__name__}), which picking rows would leave out: "
            "merge it with `merge_and_unload()`, or leave the head out of `target_modules` and "
            "`trainable_token_indices` (`modules_to_save=['lm_head']` trains all of it)."
        )
    weight = head.weight
    if not weight.is_floating_point():
        raise ValueError(
            f"`model` has an LM head of {weight.dtype}, whose rows can't be picked: keep it out of the quantisation, "
            "e.g. `BitsAndBytesConfig(llm_int8_skip_modules=['lm_head'])`."
        )
    vocab_size = getattr(weight, "ds_shape", weight.shape)[0]
    if trie.largest_token >= vocab_size:
        raise ValueError(
            f"`trie` holds token {trie.largest_token}, but the model's LM head has {vocab_size} rows. Was the trie "
            "built with another tokenizer?"
        )
