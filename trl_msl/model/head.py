# SPDX-License-Identifier: Apache-2.0
"""The model's backbone, and its LM head as a function of the backbone's hidden states."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..trie import ItemTrie


# Cap of the logits, under the names that transformers' models give it
CAP_NAMES = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """
    The part of a causal language model, not PEFT-wrapped, that returns the hidden states for the LM head.

    Raises:
        `ValueError`: if it is not a module of its own.
    """
    if model.base_model is not model:
        return model.base_model
    # The text models of Llama 4 and Mllama are not named as their `base_model_prefix` says
    found = [module for module in model.children() if isinstance(module, PreTrainedModel)]
    if len(found) != 1:
        raise ValueError(
            f"`model`, a {type(model).__name__}, has no single module for its hidden states: pass a causal language "
            "model (`AutoModelForCausalLM`)."
        )
    return found[0]


@torch.no_grad()
def hidden_states(model: PreTrainedModel, sequences: Sequence[list[int]]) -> list[Tensor]:
    """
    The backbone's last hidden states of each sequence, read by itself: `(length, hidden_size)`, fp32, on the CPU.
    """
    model = model.get_base_model() if is_peft_model(model) else model
    ids = [torch.tensor(sequence, device=model.device) for sequence in sequences]
    # Padding on the right has no effect on what is before it
    inputs = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }
    states = backbone(model)(**inputs, use_cache=False).last_hidden_state.float().cpu()
    return [row[: len(sequence)] for row, sequence in zip(states, sequences)]


def unbound_forward(module: nn.Module) -> Callable:
    """A module's forward as a function of the module, also where a library has wrapped it."""
    forward = module.forward
    if getattr(forward, "__self__", None) is module:
        return forward.__func__
    if isinstance(forward, functools.partial) and forward.args[:1] == (module,):  # accelerate, for `device_map`
        return forward.func
    return lambda self, *args, **kwargs: forward(*args, **kwargs)


def head_projection(model: PreTrainedModel) -> functools.partial:
    """
    The model's LM head as a function of `hidden` states, `(positions, hidden_size)`, and of the `rows` of the head to
    project them onto. It returns logits in fp32, on the head's device, scaled and softcapped as in the model's own
    forward. The product is computed in `dtype`, fp32 by default, as logits near 20 are 0.125 apart in bf16.
    """
    text_config = model.config.get_text_config()
    head = model.get_output_embeddings()
    # With PEFT's `trainable_token_indices`, the whole weight with the trained rows in place
    weight, bias = head.weight, getattr(head, "bias", None)
    # FSDP2 exposes sharded parameters as DTensors where its own hooks have not gathered them
    if isinstance(weight, DTensor):
        weight, bias = _gather(weight), None if bias is None else _gather(bias)
    softcap = next((cap for name in CAP_NAMES if (cap := getattr(text_config, name, None)) is not None), None)
    return functools.partial(_project, weight=weight, bias=bias, scale=_logit_scale(text_config), softcap=softcap)


def _gather(parameter: DTensor) -> Tensor:
    """The whole of a sharded parameter. Its gradient is averaged over ranks, as FSDP does when it gathers itself."""
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _project(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    rows: Tensor | slice,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    # With the model split across devices (`device_map`), the backbone can end on another device than the head
    device = weight.device
    rows = rows if isinstance(rows, slice) else rows.to(device)
    with torch.autocast(device.type, enabled=False):
        logits = (hidden.to(device, dtype) @ weight[rows].to(dtype).T).float()
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
    """
    Raise a `ValueError` where [`head_projection`] does not give the model's own logits of `trie`'s tokens.

    The model's own logits are those that its class computes from made-up hidden states. The backbone is neither run
    nor changed, so this is cheap, and works for a backbone that is quantised, split over devices, or can't run on its
    current device. The comparison is skipped where the head's weights are not available: on the meta device, and where
    only the model's own forward gathers them (FSDP2, an engine of ZeRO-3). Under ZeRO-3 all processes must call this.
    """
    model = model.get_base_model() if is_peft_model(model) else model
    head = model.get_output_embeddings()
    is_adapted = isinstance(head, BaseTunerLayer) and not (head.merged or head.disable_adapters)
    if is_adapted:
        raise ValueError(
            f"`model` has an adapter on its LM head ({type(head).__name__}), which picking rows would leave out: "
            "merge it with `merge_and_unload()`, or leave the head out of `target_modules` "
            "(`trainable_token_indices` trains rows of it, `modules_to_save=['lm_head']` all)."
        )
    weight = getattr(head, "weight", None)
    if weight is None:
        raise ValueError(
            f"`model`, a {type(model).__name__}, has no LM head with a weight: pass a causal language model "
            "(`AutoModelForCausalLM`), with its head kept out of any quantisation."
        )
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
    is_armed = hasattr(weight, "ds_id") and len(head._forward_pre_hooks) > 0
    if not (weight.is_meta or isinstance(weight, DTensor) or is_armed):
        some_nodes = torch.arange(1, trie.num_nodes, max(1, trie.num_nodes // 64), device=trie.device)
        _check_logits(model, trie.tokens(some_nodes))


@torch.no_grad()
def _check_logits(model: PreTrainedModel, tokens: Tensor) -> None:
    """Raise a `ValueError` where [`head_projection`] gives other logits of `tokens` than the model's own forward."""
    name = type(model).__name__
    remedy = "train it with `SFTTrainer` and decode with `recommend(..., mode='generate')`, or use another model."
    body = backbone(model)
    inside = {id(parameter) for parameter in body.parameters()}
    project = head_projection(model)
    weight, bias = project.keywords["weight"], project.keywords["bias"]
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    try:
        with maybe_gather_lm_head_ctx(weight, bias, *outside):
            tokens = tokens.to(weight.device)
            states = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0), device="cpu")
            states = states.to(weight)
            # Scaled to logits of up to 1, 2, 4, ..., 128, since only large logits reveal a cap
            largest = (states.float() @ weight[tokens].float().T).abs().amax(dim=1).clamp(min=1e-4)
            states = states * (2.0 ** torch.arange(8, device=weight.device) / largest).to(states).unsqueeze(1)
            expected = project(states, rows=tokens)
            error = (_own_logits(model, body, states)[:, tokens] - expected).abs().amax(dim=1)
    except torch.OutOfMemoryError:
        raise
    except Exception as exception:
        raise ValueError(
            f"`model`, a {name}, does not allow a check of how it computes its logits ({exception!r}): {remedy}"
        ) from exception
    relative = (error / expected.abs().amax(dim=1)).max().item()
    if relative > 8 * torch.finfo(torch.bfloat16).eps:  # a model in fp32 may be called under autocast
        raise ValueError(
            f"`model`, a {name}, computes its logits from more than its LM head's weight, bias, scale and cap, so "
            f"picking rows would give wrong logits (off by up to {relative:.0%}): {remedy}"
        )


class _HiddenStates(BaseModelOutput):
    """What a backbone returns; `None` for whatever else a family looks up in it."""

    def __getattr__(self, name: str) -> None:
        return None


def _own_logits(model: PreTrainedModel, body: PreTrainedModel, states: Tensor) -> Tensor:
    """The model's own logits of hidden `states`, `(positions, hidden_size)`. The model is not changed."""
    input_ids = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)

    def forward(*args, **kwargs) -> _HiddenStates:
        if not any(value is input_ids for value in (*args, *kwargs.values())):
            raise ValueError("its forward does not pass `input_ids` to the backbone")
        return _HiddenStates(last_hidden_state=states[None])

    # Shallow copies, as another thread may use the model. Some families, e.g. OPT, call the decoder in their backbone
    replaced: dict[nn.Module, nn.Module] = {}
    for module in (body, *(child for child in body.children() if isinstance(child, PreTrainedModel))):
        replaced[module] = copy.copy(module)
        replaced[module].forward = forward
    model = copy.copy(model)
    for module in (replaced[body], model):
        module._modules = {name: replaced.get(child, child) for name, child in module._modules.items()}
    model.training = False
    return type(model).forward(model, input_ids=input_ids, use_cache=False).logits[0].float()
