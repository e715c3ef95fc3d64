# SPDX-License-Identifier: Apache-2.0
"""How many of the best items a beam search loses, and at which token."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..decoding import Recommendations


def beam_pruning(exact: Recommendations, beams: Recommendations) -> dict[str, Any]:
    """
    How much of the true top K a beam search loses, and at which token.

    Beam search drops an item for good once the beginning of its title is not among the best, however likely the rest.
    The BEAR paper (https://arxiv.org/abs/2601.22925) measures this by the pruning rate: the share of targets among the
    B most probable items that a search with B beams prunes. With K = B this is `pruned_targets`. The other shares need
    no targets, so they say more with few users.

    Args:
        exact ([`Recommendations`]):
            From [`evaluate_recommendations`] with exact search. Users whose top K is not certain are left out.
        beams ([`Recommendations`]):
            From beam search by the same score for the same rows, with `follow=exact.items`.

    Returns:
        `dict` of `num_users`, the number of users counted; `num_targets`, the number of their targets in the true top
        K; `pruned_users`, the share of users who lose at least one item; `pruned_items` and `pruned_targets`, the
        shares of items and of these targets that are lost; and `pruned_by_token`, the share of items lost at the first
        token of their titles, at the second, and so on. A share of nothing is left out.

    Raises:
        `ValueError`: if `beams` did not follow as many items.
    """
    if beams.lost_at.shape != exact.items.shape:
        raise ValueError(
            f"`beams` followed items of shape {beams.lost_at.shape}, but `exact` has {exact.items.shape}: search with "
            "`follow=exact.items`."
        )
    users = np.flatnonzero(exact.exact)
    lost_at, is_item, ranks = beams.lost_at[users], exact.items[users] >= 0, exact.target_ranks[users]
    is_lost = lost_at > 0
    lost = {
        "pruned_users": is_lost.any(axis=1),
        "pruned_items": is_lost[is_item],
        "pruned_targets": is_lost[np.arange(len(users)), ranks][ranks >= 0],
    }
    shares = {name: float(values.mean()) for name, values in lost.items() if len(values) > 0}
    by_token = np.bincount(lost_at[is_lost])[1:] / max(is_item.sum(), 1)
    num_targets = len(lost["pruned_targets"])
    return {"num_users": len(users), "num_targets": num_targets, **shares, "pruned_by_token": by_token.tolist()}
