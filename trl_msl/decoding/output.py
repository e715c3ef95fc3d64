# SPDX-License-Identifier: Apache-2.0
"""What a search returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class DecodingOutput:
    """
    Ranked items of some users, on the CPU.

    Args:
        items (`torch.Tensor` of shape `(num_users, top_k)`, int64):
            Item indices, best first, those with equal scores by index; `-1` where there is none.
        scores (`torch.Tensor` of shape `(num_users, top_k)`, fp32):
            Score of each item, its bias included; `-inf` where there is none.
        exact (`torch.Tensor` of shape `(num_users,)`, bool):
            Whether these are certainly the best items, which beam search can't tell.
        expansions (`torch.Tensor` of shape `(num_users,)`, int64):
            Number of nodes, or tokens, whose next tokens were scored.
        rounds (`torch.Tensor` of shape `(num_users,)`, int64):
            Number of forward passes whose logits were used for the user.
        lost_at (`torch.Tensor` of shape `(num_users, num_followed)`, int64):
            For each item that beam search was told to follow, the number of the token, from 1, at which the last beam
            that led to it was pruned; 0 if it was not lost.
    """

    items: Tensor
    scores: Tensor
    exact: Tensor
    expansions: Tensor
    rounds: Tensor
    lost_at: Tensor

    @classmethod
    def empty(cls, num_users: int, top_k: int, num_followed: int = 0) -> DecodingOutput:
        """Output in which nothing has been found."""
        return cls(
            items=torch.full((num_users, top_k), -1),
            scores=torch.full((num_users, top_k), -torch.inf),
            exact=torch.zeros(num_users, dtype=torch.bool),
            expansions=torch.zeros(num_users, dtype=torch.int64),
            rounds=torch.zeros(num_users, dtype=torch.int64),
            lost_at=torch.zeros(num_users, num_followed, dtype=torch.int64),
        )
