# SPDX-License-Identifier: Apache-2.0
"""State of best-first search for a batch of users: open nodes and the best items found so far."""

from __future__ import annotations

import torch
from torch import Tensor

from ..trie import CompressedTrie, pad_rows
from .item_keys import NO_ITEM, best_keys, item_keys, key_scores
from .restriction import Restriction


class Frontier:
    """
    Open nodes and best items of each user of a batch.

    If `max_expansions` nodes have been expanded and fewer than `top_k` items found, a user's search finishes by beams:
    the `top_k` best open nodes are expanded, then the best of their children, and so on. As each of them leads to an
    item, this finds `top_k` items, or all there are.

    Args:
        tree ([`CompressedTrie`]):
            Trie of the catalogue.
        restriction ([`Restriction`]):
            Which items each user may get.
        num_users, top_k, max_expansions (`int`):
            Number of users of the batch, of items to find for each, and of nodes that may be expanded for each.

    Attributes (a row for each user that still searches):
        users (`torch.Tensor` of shape `(num_users,)`, int64):
            User of each row.
        keys (`torch.Tensor` of shape `(num_users, top_k)`, int64):
            Best items, see [`item_keys`].
        nodes, scores (`torch.Tensor` of shape `(num_users, num_open)`, int64 and fp32):
            Open nodes, best first, and their log-probabilities; `-inf` where there is none.
        expansions, rounds (`torch.Tensor` of shape `(num_users,)`, int64):
            Number of nodes expanded, and number of rounds in which some were.
        is_finishing (`torch.Tensor` of shape `(num_users,)`, bool):
            Whether the search of each user finishes by beams.
        best_dropped (`torch.Tensor` of shape `(num_users,)`, fp32):
            Best score of the nodes dropped because the expansions left would not reach them.
    """

    def __init__(
        self, tree: CompressedTrie, restriction: Restriction, num_users: int, top_k: int, max_expansions: int
    ):
        device = tree.device
        self.tree = tree
        self.restriction = restriction
        self.users = torch.arange(num_users, device=device)
        self.keys = torch.full((num_users, top_k), NO_ITEM, device=device)
        self.nodes = torch.empty(num_users, 0, dtype=torch.int64, device=device)
        self.scores = torch.empty(num_users, 0, device=device)
        self.max_expansions = max_expansions
        self.expansions = torch.zeros_like(self.users)
        self.rounds = torch.zeros_like(self.users)
        self.is_finishing = torch.zeros_like(self.users, dtype=torch.bool)
        self.best_dropped = torch.full((num_users,), -torch.inf, device=device)
        self.add(self.users, torch.zeros_like(self.users), torch.zeros(num_users, device=device))

    @property
    def threshold(self) -> Tensor:
        """Score of each user's K-th best item, fp32 of shape `(num_users,)`; `-inf` where there are fewer."""
        return key_scores(self.keys[:, -1])

    def add(self, rows: Tensor, nodes: Tensor, scores: Tensor) -> None:
        """
        Add nodes that were reached: the items that end at them, and the nodes themselves if items may be found below.

        Args:
            rows, nodes, scores (`torch.Tensor` of shape `(num_reached,)`, int64, int64 and fp32):
                Row of each node's user, ascending; the nodes; and their log-probabilities.
        """
        tree, num_users = self.tree, len(self.users)
        promising = scores >= self.threshold[rows]  # an equal score may win by its index
        rows, nodes, scores = rows[promising], nodes[promising], scores[promising]

        top_k = self.keys.shape[1]
        below = tree.item_start[nodes] + tree.num_own_items[nodes]
        index, items = self.restriction.first_items(self.users[rows], tree.item_start[nodes], below, limit=top_k)
        found = pad_rows(rows[index], item_keys(scores[index], items), num_users, fill=NO_ITEM)
        self.keys = best_keys(torch.cat([self.keys, found], dim=1), top_k)

        is_open = (tree.num_children[nodes] > 0) & (scores >= self.threshold[rows])
        is_open &= self.restriction.count(self.users[rows], below, tree.item_end[nodes]) > 0
        rows, nodes, scores = rows[is_open], nodes[is_open], scores[is_open]
        scores = torch.cat([self.scores, pad_rows(rows, scores, num_users, fill=-torch.inf)], dim=1)
        nodes = torch.cat([self.nodes, pad_rows(rows, nodes, num_users, fill=-1)], dim=1)
        self.scores, order = scores.sort(dim=1, descending=True, stable=True)
        self.nodes = nodes.gather(1, order)
        # At least as many as finishing by beams needs
        self._keep((self.max_expansions - self.expansions).clamp(min=top_k))
        width = int((self.scores > -torch.inf).sum(1).max())
        self.scores, self.nodes = self.scores[:, :width], self.nodes[:, :width]

    def take(self, num_nodes: int) -> tuple[Tensor, Tensor]:
        """
        Take out the best open nodes of each user that may lead to one of the K best items.

        Args:
            num_nodes (`int`):
                Maximum number of nodes of a user; `top_k` instead where a search finishes by beams.

        Returns:
            `tuple` of two `torch.Tensor` of shape `(num_users, num_taken)`: nodes, int64, `-1` where there is none,
            and their scores, fp32.
        """
        top_k, remaining = self.keys.shape[1], self.max_expansions - self.expansions
        self.is_finishing = self.is_finishing | ((remaining <= 0) & (self.keys[:, -1] == NO_ITEM))
        # Beams never go back, so other nodes are given up
        self._keep(torch.where(self.is_finishing, top_k, self.scores.shape[1]))
        limit = torch.where(self.is_finishing, top_k, remaining.clamp(max=num_nodes))
        taken = self._is_promising & (torch.arange(self.scores.shape[1], device=limit.device) < limit[:, None])
        self.expansions = self.expansions + taken.sum(1)
        self.rounds = self.rounds + taken.any(1)
        width = int(taken.sum(1).max())
        nodes, scores = torch.where(taken, self.nodes, -1)[:, :width], self.scores[:, :width]
        self.scores = self.scores.masked_fill(taken, -torch.inf)
        return nodes, scores

    @property
    def _is_promising(self) -> Tensor:
        """Which open nodes may lead to one of the K best items, bool of shape `(num_users, num_open)`."""
        return (self.scores >= self.threshold[:, None]) & (self.scores > -torch.inf)

    def _keep(self, num_nodes: Tensor) -> None:
        """Drop all open nodes of each user but the best `num_nodes`, int64 of shape `(num_users,)`."""
        kept = self._is_promising & (torch.arange(self.scores.shape[1], device=num_nodes.device) < num_nodes[:, None])
        dropped = torch.cat([self.best_dropped[:, None], self.scores.masked_fill(kept, -torch.inf)], dim=1)
        self.best_dropped = dropped.amax(1)
        self.scores = self.scores.masked_fill(~kept, -torch.inf)

    def best_items(self, top_k: int) -> Tensor:
        """Keys of each user's best items, int64 of shape `(num_users, top_k)`."""
        return self.keys[:, :top_k]

    @property
    def is_exact(self) -> Tensor:
        """Whether each user's items beat all that could be found below an open node, bool of shape `(num_users,)`."""
        best_open = torch.cat([self.best_dropped[:, None], self.scores], dim=1).amax(1)
        return (best_open < self.threshold) | (best_open == -torch.inf)

    def select(self, rows: Tensor) -> None:
        """Keep only some users, given by a mask over rows."""
        for name in ("users", "keys", "nodes", "scores", "expansions", "rounds", "is_finishing", "best_dropped"):
            setattr(self, name, getattr(self, name)[rows])
