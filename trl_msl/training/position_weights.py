# SPDX-License-Identifier: Apache-2.0
"""Weights on the positions of the loss, as pure functions: BEAR's and IGD's."""

from __future__ import annotations

import math

import torch
from datasets import Dataset
from pyarrow import compute
from torch import Tensor

from ..trie import ItemTrie
from .msl_config import MSLConfig
from .sparse_head import SparseCausalLMOutput


def position_weights(
    config: MSLConfig, output: SparseCausalLMOutput, temperature: float, trie: ItemTrie, has_gain: Tensor | None
) -> Tensor:
    """
    Weights, by `config.position_weights`, of the losses of one micro-batch, as many as `config.normalize` makes.
    `has_gain` is what [`has_information_gain`] returns, for `"igd"`.
    """
    if config.position_weights == "bear":
        constants = config.bear_beams, config.bear_scale, config.bear_weight
        return bear_weights(output.logits, output.valid_mask, output.targets, temperature, *constants)
    nodes = output.nodes
    if config.normalize == "trie":
        nodes = nodes[trie.to(nodes.device).num_valid_tokens(nodes) > 1]
    return torch.where(has_gain.to(nodes.device)[nodes], 1.0, config.igd_weight)


def bear_weights(
    logits: Tensor,
    valid_mask: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    num_beams: int = 10,
    scale: float = 2.75,
    weight: float = 0.25,
) -> Tensor:
    r"""
    Weight of each position by BEAR ([Beam-Search-Aware Optimization for Recommendation with Large Language
    Models](https://huggingface.co/papers/2601.22925)), as its authors'
    [code](https://github.com/Tiny-Snow/BEAR-SIGIR-2026) computes it:

    $$ w = 1 + \lambda \, \sigma\Big(\frac{\log p_y - \log p_B}{\xi}\Big) $$

    where $p_y$ is the target's probability among the valid tokens and $p_B$ the B-th largest one, below which a beam
    search with B beams would drop the target.

    The paper adds $\lambda' \log \sigma((\log p_B - \log p_y) / \xi)$ to $-\log p_y$ instead. With $p_B$ constant, the
    gradient of that sum is the one of $-\log p_y$ times $w$, where $\lambda = \lambda' / \xi$. So the weight is large
    for targets that are *inside* the B best, although the regulariser's argument is large outside of them.

    Where fewer than B tokens are valid, none can be dropped, and $p_B$ is the smallest probability.

    Args:
        logits, valid_mask, targets, temperature:
            As for [`masked_softmax_loss`]; all valid tokens are needed.
        num_beams (`int`, *optional*, defaults to `10`):
            B.
        scale (`float`, *optional*, defaults to `2.75`):
            ξ.
        weight (`float`, *optional*, defaults to `0.25`):
            λ, above -1. As $\sigma(-x) = 1 - \sigma(x)$, a negative one favours targets outside the B best.

    Returns:
        `torch.Tensor` of shape `(num_positions,)`, detached, between 1 and 1 + λ.
    """
    logits = logits.detach() if logits.dtype == torch.float64 else logits.detach().float()
    target_logits = logits.gather(-1, targets.unsqueeze(-1))
    best = logits.masked_fill(~valid_mask, -math.inf).topk(min(num_beams, logits.shape[-1])).values
    place = valid_mask.sum(dim=-1, keepdim=True).clamp(max=num_beams) - 1
    # A difference of log-probabilities of one position is that of its logits
    margin = (target_logits - best.gather(-1, place)).squeeze(-1) / temperature
    return 1 + weight * torch.sigmoid(margin / scale)


def has_information_gain(trie: ItemTrie, num_targets: Tensor) -> Tensor:
    r"""
    Whether each token of the trie says anything about the item, by IGD ([Token Decisiveness Modeling via Information
    Gain](https://huggingface.co/papers/2506.13229)):

    $$ \text{IG}(y_t; y_{<t}) = H(y_{<t}) - H(y_{\le t}) > 0, \qquad
       H(y_{\le t}) = -\sum_{i \text{ below } y_{\le t}} p_i \log p_i $$

    where $p_i$ is item $i$'s share of all training targets; it is not normalised below a node. So the gain is the sum
    of $-p_i \log p_i$ over the items that the token rules out. It is zero exactly where the token rules out no target
    of the training, which is decided by counting, without rounding errors.

    Args:
        trie ([`ItemTrie`]):
            Trie of the catalogue.
        num_targets (`torch.Tensor` of shape `(num_nodes,)`, int64):
            Number of training targets at or below each node, as [`count_targets`] returns.

    Returns:
        `torch.Tensor` of shape `(num_nodes,)`, bool; `False` for the root.
    """
    parents = trie.parents(torch.arange(trie.num_nodes, device=trie.device)).clamp(min=0)
    return num_targets < num_targets[parents]


def count_targets(trie: ItemTrie, rows: Dataset) -> Tensor:
    """
    Number of training targets at or below each node: every target's path is in the labels.

    Args:
        trie ([`ItemTrie`]):
            Trie of the catalogue, on the CPU.
        rows ([`~datasets.Dataset`]):
            Rows with the `labels` of [`tokenize_rows`].

    Returns:
        `torch.Tensor` of shape `(num_nodes,)`, int64.
    """
    counts = torch.zeros(trie.num_nodes, dtype=torch.int64)
    for batch in rows.select_columns(["labels"]).with_format("arrow").iter(batch_size=10_000):
        nodes = torch.tensor(compute.list_flatten(batch["labels"]).to_numpy(), dtype=torch.int64)
        counts += torch.bincount(nodes[nodes != -100], minlength=trie.num_nodes)
    counts[0] = counts[1 : trie.first_child[1]].sum()  # the root is no label; its children come first
    return counts
