# SPDX-License-Identifier: Apache-2.0
"""The sparse LM head: only the logits that the catalogue asks for, computed inside the model's forward."""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..model import check_head, head_projection
from ..trie import ItemTrie


@dataclass
class SparseCausalLMOutput(ModelOutput):
    """
    Output of a model given a sparse LM head with [`add_sparse_lm_head`] and called with `sparse_lm_head=True`.

    A *branching position* is one where several tokens are valid. `logits` spans the union of the tokens that are valid
    at some branching position of the batch, so `valid_mask` says which of them are valid at which position.

    With `vocab_lm_head=True` alone, only `vocab_losses` is there.

    Args:
        logits (`torch.Tensor` of shape `(num_positions, num_tokens)`, fp32):
            Logits at the branching positions.
        valid_mask (`torch.Tensor` of shape `(num_positions, num_tokens)`, bool):
            Which tokens are valid at which position.
        targets (`torch.Tensor` of shape `(num_positions,)`, int64):
            Column of the right token.
        parents (`torch.Tensor` of shape `(num_positions,)`, int64):
            Trie node at which each position chooses.
        is_sampled (`torch.Tensor` of shape `(num_positions,)`, bool, *optional*):
            Where `valid_mask` holds but the target and `num_negatives` draws of the other valid tokens.
        vocab_losses (`torch.Tensor` of shape `(num_supervised,)`, fp32, *optional*):
            Language modeling loss of every supervised position, forced ones too: with `vocab_lm_head=True` at
            `vocab_temperature`, with `output_vocab_losses=True` detached.
        aux_loss (`torch.Tensor`, *optional*):
            MoE load-balancing loss, when called with `output_router_logits=True`.
    """

    logits: Tensor | None = None
    valid_mask: Tensor | None = None
    targets: Tensor | None = None
    parents: Tensor | None = None
    is_sampled: Tensor | None = None
    vocab_losses: Tensor | None = None
    aux_loss: Tensor | None = None


def add_sparse_lm_head(model: PreTrainedModel, trie: ItemTrie) -> None:
    """
    Add a sparse LM head to `model`: `model(..., labels=nodes, sparse_lm_head=True)` returns a
    [`SparseCausalLMOutput`], and `model(..., labels=nodes, vocab_lm_head=True)` losses over the whole vocabulary.

    The forward runs the backbone and projects the hidden states at branching positions onto the rows of the head that
    are valid somewhere in the batch: a few positions times a few hundred tokens instead of every token times the
    vocabulary. Without either argument the forward is the original one, so generation is unchanged. It happens
    inside the forward so that the hooks of DDP, FSDP and ZeRO-3 are armed, as in TRL's `add_fused_lm_head`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model to patch: the base model, not its PEFT wrapper.
        trie ([`ItemTrie`]):
            Trie of the catalogue, whose nodes are the labels.

    Raises:
        `ValueError`: if the head's weight is no floating-point matrix or smaller than the trie's vocabulary needs.
    """
    check_head(model, trie)
    original_forward = model.forward
    text_config = model.config.get_text_config()

    # Keep the original signature: `generate` validates its model kwargs against it
    @functools.wraps(type(model).forward)
    def forward(
        self,
        *args,
        sparse_lm_head=False,
        vocab_lm_head=False,
        labels=None,
        shift_labels=None,
        output_vocab_losses=False,
        vocab_temperature=1.0,
        num_negatives=None,
        **kwargs,
    ):
        if not (sparse_lm_head or vocab_lm_head):
            given = {"labels": labels, "shift_labels": shift_labels}
            return original_forward(*args, **{k: v for k, v in given.items() if v is not None}, **kwargs)
        kwargs["use_cache"] = False
        # The backbone and the head are looked up on each call, since FSDP and PEFT replace them after patching
        backbone_outputs = self.base_model(*args, **kwargs)
        project = head_projection(self)
        weight, bias = project.keywords["weight"], project.keywords["bias"]
        device = weight.device
        hidden = backbone_outputs.last_hidden_state.to(device)
        nodes = (labels[:, 1:] if shift_labels is None else shift_labels).to(device)
        local_trie = trie.to(device)
        row, column = (nodes != -100).nonzero(as_tuple=True)
        nodes = nodes[row, column]
        branching = local_trie.num_valid_tokens(nodes) > 1

        output = SparseCausalLMOutput()
        if vocab_lm_head:
            vocab_losses = _vocab_losses(local_trie.tokens(nodes), hidden[row, column], project, vocab_temperature)
        with maybe_gather_lm_head_ctx(weight, bias):
            if sparse_lm_head:
                states = hidden[row[branching], column[branching]]
                output = _sparse_output(local_trie, nodes[branching], states, project, num_negatives)
            if vocab_lm_head:
                output.vocab_losses = vocab_losses
            elif output_vocab_losses:
                # cast once, not for each chunk of positions
                project = functools.partial(project, weight=weight.detach().float())
                with torch.no_grad():
                    output.vocab_losses = _vocab_losses(local_trie.tokens(nodes), hidden[row, column], project)
        if kwargs.get("output_router_logits"):
            output.aux_loss = _load_balancing_loss(text_config, backbone_outputs, kwargs.get("attention_mask"))
        return output

    model.forward = types.MethodType(forward, model)


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
    Valid tokens before `nodes` as pairs of position and token; where there are more wrong ones than `num_negatives`,
    so many draws of them, and the right one. And which positions that concerns.
    """
    num_valid = trie.num_valid_tokens(nodes)
    is_sampled = num_valid - 1 > num_negatives
    (few,), (many,) = (mask.nonzero(as_tuple=True) for mask in (~is_sampled, is_sampled))
    rows, tokens = trie.valid_tokens(trie.parents(nodes[few]))
    # Siblings are numbered in a row: a draw that is not below the target's place means the one after it
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


def _vocab_losses(tokens: Tensor, hidden: Tensor, project, temperature: float = 1.0, chunk_size: int = 256) -> Tensor:
    """
    Language modeling loss, with a temperature as MSL has it, of each supervised position, a few positions at a time,
    whose logits are made again in the backward pass: never `[positions, vocabulary]` at once.
    """

    def chunk_losses(states: Tensor, targets: Tensor) -> Tensor:
        # Gathered for each chunk (ZeRO-3), as the backward pass makes it again
        with maybe_gather_lm_head_ctx(project.keywords["weight"], project.keywords["bias"]):
            logits = project(states, rows=slice(None)) / temperature
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
