# SPDX-License-Identifier: Apache-2.0
"""The sparse LM head: only the logits of valid tokens, computed inside the model's forward."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..model import backbone, check_head, head_projection, unbound_forward
from ..trie import ItemTrie


@dataclass(frozen=True)
class SparseHeadOptions:
    """
    What a sparse LM head computes in one forward.

    Args:
        valid_logits (`bool`, *optional*, defaults to `True`):
            Logits of the valid tokens at the branching positions.
        num_negatives (`int`, *optional*):
            Number of wrong tokens to draw, with replacement, at positions that have more.
        vocab_losses (`bool`, *optional*, defaults to `False`):
            Language modeling loss, over the whole vocabulary, of every supervised position.
        vocab_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of these losses, as in [`masked_softmax_loss`].
        trie ([`ItemTrie`], *optional*):
            Trie of the labels and the valid tokens, in place of the catalogue's.
    """

    valid_logits: bool = True
    num_negatives: int | None = None
    vocab_losses: bool = False
    vocab_temperature: float = 1.0
    trie: ItemTrie | None = None


@dataclass
class SparseCausalLMOutput(ModelOutput):
    """
    Output of a model given a sparse LM head with [`add_sparse_lm_head`] and called with `sparse_lm_head`.

    A *branching position* is one where several tokens are valid. `logits` spans the union of the tokens that are valid
    at some branching position of the batch, so `valid_mask` says which of them are valid at which position.

    Args:
        logits (`torch.Tensor` of shape `(num_positions, num_tokens)`, fp32, *optional*):
            Logits at the branching positions.
        valid_mask (`torch.Tensor` of shape `(num_positions, num_tokens)`, bool, *optional*):
            Which tokens are valid at which position; with `num_negatives`, only the target and the draws.
        targets (`torch.Tensor` of shape `(num_positions,)`, int64, *optional*):
            Column of the right token.
        parents (`torch.Tensor` of shape `(num_positions,)`, int64, *optional*):
            Trie node whose children each position chooses from.
        nodes (`torch.Tensor` of shape `(num_supervised,)`, int64):
            Trie node that is the label of every supervised position, forced ones included, in order.
        is_sampled (`torch.Tensor` of shape `(num_positions,)`, bool, *optional*):
            With `num_negatives`: the positions at which some valid tokens were left out.
        vocab_losses (`torch.Tensor` of shape `(num_supervised,)`, fp32, *optional*):
            Language modeling loss of every supervised position, including forced ones.
        aux_loss (`torch.Tensor`, *optional*):
            MoE load-balancing loss, when called with `output_router_logits=True`.
    """

    logits: Tensor | None = None
    valid_mask: Tensor | None = None
    targets: Tensor | None = None
    parents: Tensor | None = None
    nodes: Tensor | None = None
    is_sampled: Tensor | None = None
    vocab_losses: Tensor | None = None
    aux_loss: Tensor | None = None


def add_sparse_lm_head(model: PreTrainedModel, trie: ItemTrie) -> None:
    """
    Add a sparse LM head to `model`: `model(..., labels=nodes, sparse_lm_head=True)` returns a
    [`SparseCausalLMOutput`]. Pass [`SparseHeadOptions`] instead of `True` to change what it computes.

    The forward runs the backbone and projects the hidden states at branching positions onto the rows of the head that
    are valid somewhere in the batch: a few positions times a few hundred tokens instead of every token times the
    vocabulary. Without `sparse_lm_head` it is the original forward, so generation is unchanged. The head is inside the
    forward so that the hooks of DDP, FSDP and ZeRO-3 run, as in TRL's `add_fused_lm_head`. A `copy.deepcopy` of the
    model runs its own weights.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model to patch: the base model, not its PEFT wrapper.
        trie ([`ItemTrie`]):
            Trie of the catalogue, whose nodes are the labels.

    Raises:
        `ValueError`: if the logits of the trie's tokens depend on more than rows of the head's weight, its bias, a
            scale and a cap, as [`check_head`] finds out.
    """
    check_head(model, trie)
    original_forward = unbound_forward(model)

    # Keep the original signature: `generate` validates its model kwargs against it
    @functools.wraps(type(model).forward)
    def forward(
        self,
        *args,
        sparse_lm_head: SparseHeadOptions | bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        **kwargs,
    ):
        if not sparse_lm_head:
            given = {"labels": labels, "shift_labels": shift_labels}
            return original_forward(self, *args, **{k: v for k, v in given.items() if v is not None}, **kwargs)
        options = SparseHeadOptions() if sparse_lm_head is True else sparse_lm_head
        nodes = labels[:, 1:] if shift_labels is None else shift_labels
        return _sparse_forward(self, options.trie or trie, nodes, options, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def _sparse_forward(
    model: PreTrainedModel, trie: ItemTrie, nodes: Tensor, options: SparseHeadOptions, *args: Any, **kwargs: Any
) -> SparseCausalLMOutput:
    """Run the backbone, and compute what `options` ask for where `nodes` are not -100."""
    # The backbone and the head are looked up on each call, since FSDP and PEFT replace them after patching
    backbone_outputs = backbone(model)(*args, **{**kwargs, "use_cache": False})
    project = head_projection(model)
    weight, bias = project.keywords["weight"], project.keywords["bias"]
    hidden = backbone_outputs.last_hidden_state.to(weight.device)
    nodes, trie = nodes.to(weight.device), trie.to(weight.device)
    row, column = (nodes != -100).nonzero(as_tuple=True)
    nodes = nodes[row, column]

    output, vocab_losses = SparseCausalLMOutput(), None
    if options.vocab_losses:
        vocab_losses = _vocab_losses(trie.tokens(nodes), hidden[row, column], project, options.vocab_temperature)
    if options.valid_logits:
        branching = trie.num_valid_tokens(nodes) > 1
        states = hidden[row[branching], column[branching]]
        with maybe_gather_lm_head_ctx(weight, bias):
            output = _sparse_output(trie, nodes[branching], states, project, options.num_negatives)
    output.nodes, output.vocab_losses = nodes, vocab_losses
    if kwargs.get("output_router_logits"):
        text_config = model.config.get_text_config()
        output.aux_loss = _load_balancing_loss(text_config, backbone_outputs, kwargs.get("attention_mask"))
    return output


def _sparse_output(
    trie: ItemTrie, nodes: Tensor, hidden: Tensor, project, num_negatives: int | None
) -> SparseCausalLMOutput:
    """Logits of `hidden [positions, hidden_size]` over the union of the tokens that are valid before `nodes`."""
    parents = trie.parents(nodes)
    is_sampled = None
    if num_negatives is None:
        rows, tokens = trie.valid_tokens(parents)
    else:
        rows, tokens, is_sampled = _draw_tokens(trie, nodes, num_negatives)
    union, columns = tokens.unique(return_inverse=True)
    valid_mask = torch.zeros(len(nodes), len(union), dtype=torch.bool, device=nodes.device)
    valid_mask[rows, columns] = True
    return SparseCausalLMOutput(
        logits=project(hidden, rows=union),
        valid_mask=valid_mask,
        targets=torch.searchsorted(union, trie.tokens(nodes)),
        parents=parents,
        is_sampled=is_sampled,
    )


def _draw_tokens(trie: ItemTrie, nodes: Tensor, num_negatives: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Valid tokens before `nodes` as pairs of position and token; where more than `num_negatives` of them are wrong, the
    right one and that many draws of the others. And whether each position is one of these.
    """
    num_valid = trie.num_valid_tokens(nodes)
    is_sampled = num_valid - 1 > num_negatives
    (few,), (many,) = (mask.nonzero(as_tuple=True) for mask in (~is_sampled, is_sampled))
    rows, tokens = trie.valid_tokens(trie.parents(nodes[few]))
    # Siblings have consecutive numbers: a draw at or after the target's place stands for the next one
    first, target = trie.first_child[trie.parents(nodes[many])], nodes[many]
    draws = torch.rand(len(many), num_negatives, device=nodes.device) * (num_valid[many] - 1).unsqueeze(-1)
    drawn = first.unsqueeze(-1) + draws.long().clamp(max=(num_valid[many] - 2).unsqueeze(-1))
    drawn = drawn + (drawn >= target.unsqueeze(-1)).long()
    chosen = torch.cat([target.unsqueeze(-1), drawn], dim=-1)
    return (
        torch.cat([few[rows], many.repeat_interleave(num_negatives + 1)]),
        torch.cat([tokens, trie.tokens(chosen.flatten())]),
        is_sampled,
    )


def _vocab_losses(tokens: Tensor, hidden: Tensor, project, temperature: float, chunk_size: int = 256) -> Tensor:
    """
    Language modeling loss of each supervised position, with a temperature as in MSL. The logits are computed for a few
    positions at a time, and again in the backward pass, so that they are never all in memory; and in the head's dtype,
    as in the model's own forward, since in fp32 they would take several times as long as the backbone.
    """
    dtype = project.keywords["weight"].dtype

    def chunk_losses(states: Tensor, targets: Tensor) -> Tensor:
        # Gathered for each chunk (ZeRO-3), since the backward pass recomputes it
        with maybe_gather_lm_head_ctx(project.keywords["weight"], project.keywords["bias"]):
            logits = project(states, rows=slice(None), dtype=dtype) / temperature
        return temperature * torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    chunks = zip(hidden.split(chunk_size), tokens.split(chunk_size))
    return torch.cat([checkpoint(chunk_losses, states, targets, use_reentrant=False) for states, targets in chunks])


def _load_balancing_loss(text_config: PretrainedConfig, backbone_outputs: ModelOutput, attention_mask) -> Tensor:
    # Every MoE family of transformers takes this function from Mixtral
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    num_experts = text_config.num_experts if hasattr(text_config, "num_experts") else text_config.num_local_experts
    return load_balancing_loss_func(
        backbone_outputs.router_logits, num_experts, text_config.num_experts_per_tok, attention_mask
    )
