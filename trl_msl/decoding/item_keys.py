# SPDX-License-Identifier: Apache-2.0
"""An item's score and index in one integer, whose order is that of the ranking."""

from __future__ import annotations

import torch
from torch import Tensor


NO_ITEM = torch.iinfo(torch.int64).max


def item_keys(scores: Tensor, items: Tensor) -> Tensor:
    """
    An item's score and index in one integer: smaller keys have better scores, or lower indices where scores are equal.
    This works because no score is positive, and the bits of non-negative floats sort like the floats.

    Args:
        scores (`torch.Tensor`, fp32):
            Scores, none positive.
        items (`torch.Tensor` of the same shape):
            Item indices.

    Returns:
        `torch.Tensor` of the same shape, int64.
    """
    return scores.abs().view(torch.int32).long() << 32 | items.long()


def best_keys(keys: Tensor, top_k: int) -> Tensor:
    """The `top_k` best keys of each row in order; each row must have at least as many."""
    return keys.topk(top_k, dim=1, largest=False, sorted=True).values


def key_scores(keys: Tensor) -> Tensor:
    """Scores of keys, fp32; `-inf` where there is no item."""
    return torch.where(keys == NO_ITEM, -torch.inf, -(keys >> 32).int().view(torch.float32))


def key_items(keys: Tensor) -> Tensor:
    """Item indices of keys, int64; `-1` where there is no item."""
    return torch.where(keys == NO_ITEM, -1, keys & 0xFFFFFFFF)
