# SPDX-License-Identifier: Apache-2.0
"""How many of the best items a beam search loses, and at which token."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..decoding import Recommendations


def beam_pruning(exact: Recommendations, beams: Recommendations) -> dict[str, Any]:
    """
    How many of the true top K a beam search loses, and at which token.

    Beam search drops an item for good once the beginning of its title is not among the best, however likely the rest.
    The paper on BEAR (https://arxiv.org/abs/2601.22925) measures this by the pruning rate: of the targets that are
    among the B items with the highest probability, the share that a search with B beams prunes. With K = B this is
    `pruned_targets`. The other shares need no targets, so they say more with few users.

    Args:
        exact ([`Recommendations`]):
            From [`evaluate_recommendations`] with exact search. Users whose items are not certain to be the best are
            left out.
        beams ([`Recommendations`]):
            From beam search by the same score and for the same rows, with `follow=exact.items`.

    Returns:
        `dict` of `num_users`, the number of users that count; `num_targets`, the number of their targets that are in
        the true top K; `pruned_users`, the share of users who lose at least one item; `pruned_items` and
        `pruned_targets`, the shares of items and of these targets that are lost; and `pruned_by_token`, a list of what
        share of the items is lost at the first token of the titles, at the second, and so on. Shares of nothing are
        left out.

    Raises:
        `ValueError`: if `beams` did not follow as many items.
    """
    if beams.lost_at.shape != exact.items.shape:
        raise ValueError(
            f"`beams` followed items of shape {beams.lost_at.shape}, `exact` has {exact.items.shape}: search with "
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
