# SPDX-License-Identifier: Apache-2.0
"""Tokens that are added to a model for its items, and the embeddings of titles, from which they come."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .evaluating import evaluating
from .head import hidden_states


@torch.no_grad()
def embed_titles(
    model: PreTrainedModel, titles: Sequence[list[int]], first: list[int], batch_size: int = 32
) -> Tensor:
    """
    Mean of the last hidden states over each title's tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, not PEFT-wrapped.
        titles (`Sequence[list[int]]`):
            Token ids of each title.
        first (`list[int]`):
            At least one token to put before each title, such as BOS. Models attend to the first token so much that
            its state says little of a text, so it must not be one of the title's.
        batch_size (`int`, *optional*, defaults to `32`):
            Titles in a forward pass.

    Returns:
        `torch.Tensor` of shape `(num_titles, hidden_size)`, fp32, on the CPU. The embedding of an empty title is zero.
    """
    vectors = torch.zeros(len(titles), model.get_input_embeddings().embedding_dim)
    order = sorted(range(len(titles)), key=lambda row: -len(titles[row]))
    with evaluating(model):
        for start in tqdm(range(0, len(order), batch_size), desc="Embedding titles"):
            rows = order[start : start + batch_size]
            for row, states in zip(rows, hidden_states(model, [first + titles[row] for row in rows])):
                if titles[row]:
                    vectors[row] = states[len(first) :].mean(dim=0)
    return vectors


@torch.no_grad()
def add_embeddings(model: PreTrainedModel, tokens: list[int], titles: Sequence[list[int]], groups: Tensor) -> None:
    """
    Set the rows of new tokens in a model's embeddings and LM head, which are made larger if need be. A token that
    stands for some items begins as the mean of their titles' tokens, any other as the mean of all tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, not PEFT-wrapped.
        tokens (`list[int]`):
            The new tokens, ascending and later than all others.
        titles (`Sequence[list[int]]`):
            Token ids of each item's title.
        groups (`torch.Tensor` of shape `(num_items, num_levels)`, int64):
            Places in `tokens` of the tokens that stand for each item.
    """
    if tokens[-1] >= model.get_input_embeddings().num_embeddings:  # some models have rows to spare
        model.resize_token_embeddings(tokens[-1] + 1, mean_resizing=False)
    lengths = torch.tensor([len(title) for title in titles])
    flat, offsets = torch.tensor(list(chain(*titles)), dtype=torch.int64), lengths.cumsum(0) - lengths
    counts = torch.bincount(groups.flatten(), minlength=len(tokens))
    for module in _embeddings(model):
        known = module.weight[: tokens[0]].float().cpu()
        of_all, of_titles = known.mean(dim=0), embedding_bag(flat, known, offsets, mode="mean")
        of_titles[lengths == 0] = of_all
        sums = torch.zeros(len(tokens), known.shape[1])
        for group in groups.T:
            sums.index_add_(0, group, of_titles)
        rows = torch.where(counts.unsqueeze(1) > 0, sums / counts.clamp(min=1).unsqueeze(1), of_all)
        module.weight[tokens] = rows.to(module.weight)


def embedding_names(model: PreTrainedModel) -> list[str]:
    """Names of the embeddings and of an LM head with its own weight, as for PEFT's `trainable_token_indices`."""
    modules = _embeddings(model)
    return [name.rpartition(".")[2] for name, module in model.named_modules() if any(module is one for one in modules)]


def _embeddings(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The embeddings, and the LM head unless it has the same weight: PEFT keeps a tied head in step."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embeddings] if head.weight is embeddings.weight else [embeddings, head]
