# SPDX-License-Identifier: Apache-2.0
"""The loss by which a student learns a teacher's ranking, as in DLLM2Rec (https://arxiv.org/abs/2405.00338)."""

import torch
from torch import Tensor


def importance_weights(
    log_probs: Tensor, is_common: Tensor, rank_weight: float, confidence_weight: float, consistency_weight: float
) -> Tensor:
    r"""
    How much each item of a teacher's ranking counts. With \\( P_r \\) the teacher's probability of the item at rank
    \\( r \\) and \\( c_r \\) 1 if the student, too, has it among its best items and else 0,

    \\[ w_r \propto \gamma_r \frac{e^{-r}}{\sum_j e^{-j}} + \gamma_c \frac{P_r}{\sum_j P_j} + \gamma_s c_r. \\]

    The paper's teacher writes a title freely, and is the more confident of an item the nearer the title's embedding is
    to the item's. Here the second term is simpler, as the teacher's probability of each item is known exactly.

    Args:
        log_probs (`torch.Tensor` of shape `[batch, top_k]`):
            Teacher's log-probabilities, best item first; `-inf` where there is no item to learn. The others keep their
            ranks.
        is_common (`torch.Tensor` of shape `[batch, top_k]`, bool):
            Whether the item is among the student's best, too.
        rank_weight, confidence_weight, consistency_weight (`float`):
            \\( \gamma_r, \gamma_c, \gamma_s \\): 0.3, 0.5 and 0.1 in the paper's code.

    Returns:
        `torch.Tensor` of shape `[batch, top_k]`: weights of sum 1 in each row, or of 0 in a row without items.
    """
    is_item = log_probs > -torch.inf
    by_rank = torch.exp(-torch.arange(1.0, log_probs.shape[1] + 1, device=log_probs.device)) * is_item
    by_confidence = torch.exp(log_probs - log_probs.amax(dim=1, keepdim=True).clamp(min=torch.finfo().min))
    weights = rank_weight * _shares(by_rank) + confidence_weight * _shares(by_confidence)
    return _shares(weights + consistency_weight * (is_common & is_item))


def distillation_loss(
    scores: Tensor,
    items: Tensor,
    log_probs: Tensor,
    rank_weight: float = 0.3,
    confidence_weight: float = 0.5,
    consistency_weight: float = 0.1,
) -> Tensor:
    """
    The student's softmax loss with the teacher's items as targets, weighted by [`importance_weights`].

    The paper's code takes the binary cross-entropy with one sampled item in place of the softmax. The scores of all
    items are needed in any case, to see which are the student's best.

    Args:
        scores (`torch.Tensor` of shape `[batch, num_items]`):
            Student's scores.
        items (`torch.Tensor` of shape `[batch, top_k]`, int64):
            Teacher's items, best first; -1 where the student can't rank the item.
        log_probs (`torch.Tensor` of shape `[batch, top_k]`):
            Teacher's log-probabilities.
        rank_weight, confidence_weight, consistency_weight (`float`, *optional*):
            As for [`importance_weights`].

    Returns:
        `torch.Tensor` of shape `[batch]`: the loss of each row, 0 without items.
    """
    is_item, places = items >= 0, items.clamp(min=0)
    best = scores.detach().topk(min(items.shape[1], scores.shape[1]), dim=1).indices
    is_common = (items[:, :, None] == best[:, None, :]).any(dim=2)
    log_probs = log_probs.masked_fill(~is_item, -torch.inf)
    weights = importance_weights(log_probs, is_common, rank_weight, confidence_weight, consistency_weight)
    return -(weights * scores.log_softmax(dim=1).gather(1, places)).sum(dim=1)


def _shares(values: Tensor) -> Tensor:
    """Values of each row divided by their sum; a row of zeros stays so."""
    return values / values.sum(dim=1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
