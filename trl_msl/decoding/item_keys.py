# SPDX-License-Identifier: Apache-2.0
"""An item's score and index in one integer, whose order is that of the ranking."""

from __future__ import annotations

import torch
from torch import Tensor


NO_ITEM = torch.iinfo(torch.int64).max


def item_keys(scores: Tensor, items: Tensor) -> Tensor:
    """
    An item's score and index in one integer: smaller keys have better scores, or lower indices where scores are equal.

    Args:
        scores (`torch.Tensor`, fp32):
            Scores.
        items (`torch.Tensor` of the same shape):
            Item indices.

    Returns:
        `torch.Tensor` of the same shape, int64.
    """
    # + 0.0, as -0.0 has other bits than 0.0
    return ~_flip_negative((scores + 0.0).view(torch.int32)).long() << 32 | items.long()


def best_keys(keys: Tensor, top_k: int) -> Tensor:
    """The `top_k` best keys of each row in order; each row must have at least as many."""
    return keys.topk(top_k, dim=1, largest=False, sorted=True).values


def key_scores(keys: Tensor) -> Tensor:
    """Scores of keys, fp32; `-inf` where there is no item."""
    return torch.where(keys == NO_ITEM, -torch.inf, _flip_negative(~(keys >> 32).int()).view(torch.float32))


def key_items(keys: Tensor) -> Tensor:
    """Item indices of keys, int64; `-1` where there is no item."""
    return torch.where(keys == NO_ITEM, -1, keys & 0xFFFFFFFF)


def _flip_negative(bits: Tensor) -> Tensor:
    """
    Between the bits of floats and integers that sort like the floats, in either direction: the bits of non-negative
    floats do so already, those of negative ones in reverse.
    """
    return bits ^ (bits >> 31 & 0x7FFFFFFF)
