# SPDX-License-Identifier: Apache-2.0
"""State of best-first search for a batch of users: open nodes and the best items found so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..trie import CompressedTrie, pad_rows
from .item_bias import ItemBias, ListedBias
from .item_keys import NO_ITEM, best_keys, item_keys, key_items, key_scores
from .restriction import Restriction


class Frontier:
    """
    Open nodes and best items of each user of a batch.

    No item below a node has a higher score than the node's bound: its log-probability, which never rises along a path,
    plus the largest bias below it, which never rises either (an A* search). So the items are the best ones as soon as
    the K-th of them beats the bound of every open node.

    Where the score weighs in the vocabulary (`item_steps`), forced tokens cost something, and the search goes from
    token to token; elsewhere a node is reached at the end of its chain.

    If `max_expansions` nodes have been expanded and fewer than `top_k` items found, a user's search finishes by beams:
    the `top_k` best open nodes are expanded, then the best of their children, and so on. As each of them leads to an
    item, this finds `top_k` items, or all there are.

    Args:
        tree ([`CompressedTrie`]):
            Trie of the catalogue.
        restriction ([`Restriction`]):
            Which items each user may get.
        num_users, max_expansions (`int`):
            Number of users of the batch, and of nodes that may be expanded for each.
        item_steps (`torch.Tensor` of shape `(num_items,)`, int32, *optional*):
            Index of each item's last token in its node's chain, if forced tokens cost something.
        top_k (`int`):
            Number of items to find for each user.
        bias ([`ItemBias`] or [`ListedBias`], *optional*):
            Bias of each user's items, which adds to their scores.

    Attributes (a row for each user that still searches):
        users (`torch.Tensor` of shape `(num_users,)`, int64):
            User of each row.
        keys (`torch.Tensor` of shape `(num_users, top_k)`, int64):
            Best items, see [`item_keys`].
        nodes, steps (`torch.Tensor` of shape `(num_users, num_open)`, int64):
            Open nodes, best bound first, and index of the last token that was read in each one's chain.
        scores, bounds (`torch.Tensor` of shape `(num_users, num_open)`, fp32):
            Their log-probabilities and bounds; `-inf` where there is none.
        expansions, rounds (`torch.Tensor` of shape `(num_users,)`, int64):
            Number of nodes expanded, and number of rounds in which some were.
        is_finishing (`torch.Tensor` of shape `(num_users,)`, bool):
            Whether the search of each user finishes by beams.
        best_dropped (`torch.Tensor` of shape `(num_users,)`, fp32):
            Best bound of the nodes dropped because the expansions left would not reach them.
    """

    def __init__(
        self,
        tree: CompressedTrie,
        restriction: Restriction,
        num_users: int,
        max_expansions: int,
        item_steps: Tensor | None,
        top_k: int,
        bias: ItemBias | ListedBias | None = None,
    ):
        device = tree.device
        self.tree = tree
        self.restriction = restriction
        self.item_steps = item_steps
        self.bias = bias
        self.users = torch.arange(num_users, device=device)
        self.keys = torch.full((num_users, top_k), NO_ITEM, device=device)
        self.nodes = self.steps = torch.empty(num_users, 0, dtype=torch.int64, device=device)
        self.scores = self.bounds = torch.empty(num_users, 0, device=device)
        self.max_expansions = max_expansions
        self.expansions = torch.zeros_like(self.users)
        self.rounds = torch.zeros_like(self.users)
        self.is_finishing = torch.zeros_like(self.users, dtype=torch.bool)
        self.best_dropped = torch.full((num_users,), -torch.inf, device=device)
        root = torch.zeros_like(self.users)
        self.add(self.users, root, root - 1, torch.zeros(num_users, device=device))

    @property
    def threshold(self) -> Tensor:
        """Score of each user's K-th best item, fp32 of shape `(num_users,)`; `-inf` where there are fewer."""
        return key_scores(self.keys[:, -1])

    def add(self, rows: Tensor, nodes: Tensor, steps: Tensor, scores: Tensor) -> None:
        """
        Add nodes that were reached: the items that end there, and the nodes themselves if items may follow.

        Args:
            rows, nodes, steps, scores (`torch.Tensor` of shape `(num_reached,)`, int64 but for the scores, fp32):
                Row of each node's user, ascending; the nodes; the index of the token that was reached in each one's
                chain, if that matters; and their log-probabilities.
        """
        tree, num_users, top_k = self.tree, len(self.users), self.keys.shape[1]
        if self.item_steps is None:
            steps = tree.chain_length(nodes).long() - 1
        bounds = scores if self.bias is None else scores + self.bias.of_nodes(self.users[rows], nodes)
        promising = bounds >= self.threshold[rows]  # an equal score may win by its index
        rows, nodes, steps = rows[promising], nodes[promising], steps[promising]
        scores, bounds = scores[promising], bounds[promising]

        users, below = self.users[rows], tree.item_start[nodes] + tree.num_own_items[nodes]
        # Own items of equal score are in order, and the first of them will do
        limit = top_k if self.bias is None and self.item_steps is None else None
        index, items = self.restriction.first_items(users, tree.item_start[nodes], below, limit)
        is_open = self.restriction.count(users, below, tree.item_end[nodes]) > 0
        if self.item_steps is not None:  # some items may end further along the chain
            missing = self.item_steps[items] - steps[index]
            is_open[index[missing > 0]] = True
            index, items = index[missing == 0], items[missing == 0]
        found = scores[index]
        if self.bias is not None:
            found = found + self.bias.of_items(users[index], items)
        found = pad_rows(rows[index], item_keys(found, items), num_users, fill=NO_ITEM)
        self.keys = best_keys(torch.cat([self.keys, found], dim=1), top_k)

        is_open &= bounds >= self.threshold[rows]
        opened = is_open.nonzero().squeeze(1)
        place = pad_rows(rows[opened], opened, num_users, fill=len(nodes))
        for name, values, fill in (
            ("bounds", bounds, -torch.inf), ("scores", scores, -torch.inf), ("nodes", nodes, -1), ("steps", steps, -1)
        ):  # fmt: skip
            padded = torch.nn.functional.pad(values, (0, 1), value=fill)[place]
            setattr(self, name, torch.cat([getattr(self, name), padded], dim=1))
        self.bounds, order = self.bounds.sort(dim=1, descending=True, stable=True)
        # At least as many as finishing by beams needs
        self._keep((self.max_expansions - self.expansions).clamp(min=top_k))
        width = int((self.bounds > -torch.inf).sum(1).max())
        self.bounds = self.bounds[:, :width]
        for name in ("scores", "nodes", "steps"):
            setattr(self, name, getattr(self, name).gather(1, order[:, :width]))

    def take(self, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
        """
        Take out the best open nodes of each user that may lead to one of the K best items.

        Args:
            num_nodes (`int`):
                Maximum number of nodes of a user; `top_k` instead where a search finishes by beams.

        Returns:
            `tuple` of three `torch.Tensor` of shape `(num_users, num_taken)`: nodes, int64, `-1` where there is none;
            the index of the last token read in each one's chain, int64; and their log-probabilities, fp32.
        """
        top_k, remaining = self.keys.shape[1], self.max_expansions - self.expansions
        self.is_finishing = self.is_finishing | ((remaining <= 0) & (self.keys[:, -1] == NO_ITEM))
        # Beams never go back, so other nodes are given up
        self._keep(torch.where(self.is_finishing, top_k, self.bounds.shape[1]))
        limit = torch.where(self.is_finishing, top_k, remaining.clamp(max=num_nodes))
        taken = self._is_promising & (torch.arange(self.bounds.shape[1], device=limit.device) < limit[:, None])
        self.expansions = self.expansions + taken.sum(1)
        self.rounds = self.rounds + taken.any(1)
        width = int(taken.sum(1).max())
        nodes = torch.where(taken, self.nodes, -1)[:, :width]
        self.bounds = self.bounds.masked_fill(taken, -torch.inf)
        return nodes, self.steps[:, :width], self.scores[:, :width]

    @property
    def _is_promising(self) -> Tensor:
        """Which open nodes may lead to one of the K best items, bool of shape `(num_users, num_open)`."""
        return (self.bounds >= self.threshold[:, None]) & (self.bounds > -torch.inf)

    def _keep(self, num_nodes: Tensor) -> None:
        """Drop all open nodes of each user but the best `num_nodes`, int64 of shape `(num_users,)`."""
        kept = self._is_promising & (torch.arange(self.bounds.shape[1], device=num_nodes.device) < num_nodes[:, None])
        dropped = torch.cat([self.best_dropped[:, None], self.bounds.masked_fill(kept, -torch.inf)], dim=1)
        self.best_dropped = dropped.amax(1)
        self.bounds = self.bounds.masked_fill(~kept, -torch.inf)

    def best_items(self, top_k: int) -> Tensor:
        """Keys of each user's best items, int64 of shape `(num_users, top_k)`."""
        return self.keys[:, :top_k]

    @property
    def is_exact(self) -> Tensor:
        """Whether each user's items beat all that could be found below an open node, bool of shape `(num_users,)`."""
        best_open = torch.cat([self.best_dropped[:, None], self.bounds], dim=1).amax(1)
        return (best_open < self.threshold) | (best_open == -torch.inf)

    def select(self, rows: Tensor) -> None:
        """Keep only some users, given by a mask over rows."""
        of_open = ("nodes", "steps", "scores", "bounds")
        for name in ("users", "keys", *of_open, "expansions", "rounds", "is_finishing", "best_dropped"):
            setattr(self, name, getattr(self, name)[rows])


class RerankingFrontier(Frontier):
    """
    Looks for the best `num_candidates` items without their biases, and ranks these by their scores with biases.

    Args:
        *arguments:
            Those of [`Frontier`], with the number of candidates as `top_k` and without a bias.
        top_k (`int`):
            Number of the best candidates to keep.
        bias ([`ItemBias`] or [`ListedBias`]):
            Bias of each user's items.
    """

    def __init__(self, *arguments: Any, top_k: int, bias: ItemBias | ListedBias):
        super().__init__(*arguments)
        self.reranking_bias = bias
        self.num_best = top_k

    def best_items(self, top_k: int) -> Tensor:
        """As for [`Frontier`]."""
        items = key_items(self.keys)
        users = self.users.repeat_interleave(items.shape[1])
        biases = self.reranking_bias.of_items(users, items.flatten().clamp(min=0)).view_as(items)
        keys = item_keys(key_scores(self.keys) + biases, items)
        return best_keys(keys.masked_fill(items < 0, NO_ITEM), top_k)

    @property
    def is_exact(self) -> Tensor:
        """Whether each user's items beat any other item, even if that had the largest bias of all."""
        root = torch.zeros_like(self.users)
        others_best = self.threshold + self.reranking_bias.of_nodes(self.users, root)
        num_items = self.restriction.count(self.users, root, self.tree.item_end[root])
        beats_others = key_scores(self.best_items(self.num_best)[:, -1]) > others_best
        return super().is_exact & (beats_others | (num_items <= self.keys.shape[1]))
