# SPDX-License-Identifier: Apache-2.0
"""State of best-first search for a batch of users: open nodes and the best items found so far."""

from __future__ import annotations

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

    Where the score weighs in the vocabulary (`item_steps`), a node's forced tokens cost something. They are run only
    when the node is taken; until then its items are unknown, and its log-probability is that after its first token.

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
            How many forced tokens of its node's chain each item has, if they cost something.
        top_k (`int`):
            Number of items to find for each user.
        bias ([`ItemBias`] or [`ListedBias`], *optional*):
            Bias of each user's items, which adds to their scores.

    Attributes (a row for each user that still searches):
        users (`torch.Tensor` of shape `(num_users,)`, int64):
            User of each row.
        keys (`torch.Tensor` of shape `(num_users, top_k)`, int64):
            Best items, see [`item_keys`].
        nodes, scores, bounds (`torch.Tensor` of shape `(num_users, num_open)`, int64, fp32 and fp32):
            Open nodes, best bound first, their log-probabilities, and their bounds; `-inf` where there is none.
        expansions, rounds (`torch.Tensor` of shape `(num_users,)`, int64):
            Number of nodes taken, and number of rounds in which some were.
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
        self.nodes = torch.empty(num_users, 0, dtype=torch.int64, device=device)
        self.scores = self.bounds = torch.empty(num_users, 0, device=device)
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
        Add nodes that were reached: the items that end at them, if known, and the nodes themselves if others may be
        found there.

        Args:
            rows, nodes, scores (`torch.Tensor` of shape `(num_reached,)`, int64, int64 and fp32):
                Row of each node's user, ascending; the nodes; and their log-probabilities.
        """
        tree, num_users = self.tree, len(self.users)
        bounds = self._bound(rows, nodes, scores)
        promising = bounds >= self.threshold[rows]  # an equal score may win by its index
        rows, nodes, scores, bounds = rows[promising], nodes[promising], scores[promising], bounds[promising]
        below = tree.item_start[nodes] + tree.num_own_items[nodes]
        if self.item_steps is None:
            self._find(rows, nodes, scores[:, None])
        else:
            is_known = num_forced(tree, nodes) == 0
            self._find(rows[is_known], nodes[is_known], scores[is_known, None])
            below = torch.where(is_known, below, tree.item_start[nodes])

        is_open = bounds >= self.threshold[rows]
        is_open &= self.restriction.count(self.users[rows], below, tree.item_end[nodes]) > 0
        rows, nodes, scores, bounds = rows[is_open], nodes[is_open], scores[is_open], bounds[is_open]
        bounds = torch.cat([self.bounds, pad_rows(rows, bounds, num_users, fill=-torch.inf)], dim=1)
        scores = torch.cat([self.scores, pad_rows(rows, scores, num_users, fill=-torch.inf)], dim=1)
        nodes = torch.cat([self.nodes, pad_rows(rows, nodes, num_users, fill=-1)], dim=1)
        self.bounds, order = bounds.sort(dim=1, descending=True, stable=True)
        self.scores, self.nodes = scores.gather(1, order), nodes.gather(1, order)
        # At least as many as finishing by beams needs
        self._keep((self.max_expansions - self.expansions).clamp(min=self.keys.shape[1]))
        width = int((self.bounds > -torch.inf).sum(1).max())
        self.bounds, self.scores, self.nodes = self.bounds[:, :width], self.scores[:, :width], self.nodes[:, :width]

    def settle(self, rows: Tensor, nodes: Tensor, scores: Tensor) -> Tensor:
        """
        Find the items that end within the chains of nodes, whose forced tokens have been scored.

        Args:
            rows, nodes (`torch.Tensor` of shape `(num_nodes,)`, int64):
                Row of each node's user, ascending; and the nodes.
            scores (`torch.Tensor` of shape `(num_nodes, 1 + longest)`, fp32):
                Log-probability of each node after each number of forced tokens.

        Returns:
            `torch.Tensor` of shape `(num_nodes,)`, bool: whether one of the best items may be below the node's chain.
        """
        forced = num_forced(self.tree, nodes)
        was_open = forced > 0  # the items of others are known
        self._find(rows[was_open], nodes[was_open], scores[was_open])
        bounds = self._bound(rows, nodes, scores.gather(1, forced[:, None]).squeeze(1))
        return (bounds >= self.threshold[rows]) & (self.tree.num_children[nodes] > 0)

    def _bound(self, rows: Tensor, nodes: Tensor, scores: Tensor) -> Tensor:
        """The highest score that an item below each node may have, given the nodes' log-probabilities."""
        return scores if self.bias is None else scores + self.bias.of_nodes(self.users[rows], nodes)

    def _find(self, rows: Tensor, nodes: Tensor, scores: Tensor) -> None:
        """Add the items that end within nodes' chains. Arguments as for [`~Frontier.settle`]."""
        top_k, users, start = self.keys.shape[1], self.users[rows], self.tree.item_start[nodes]
        # Items of a node that have the same score are in order, and the first of them will do
        limit = top_k if self.bias is None and self.item_steps is None else None
        index, items = self.restriction.first_items(users, start, start + self.tree.num_own_items[nodes], limit)
        scores = scores[index, 0 if self.item_steps is None else self.item_steps[items]]
        if self.bias is not None:
            scores = scores + self.bias.of_items(users[index], items)
        found = pad_rows(rows[index], item_keys(scores, items), len(self.users), fill=NO_ITEM)
        self.keys = best_keys(torch.cat([self.keys, found], dim=1), top_k)

    def take(self, num_nodes: int) -> tuple[Tensor, Tensor]:
        """
        Take out the best open nodes of each user that may lead to one of the K best items.

        Args:
            num_nodes (`int`):
                Maximum number of nodes of a user; `top_k` instead where a search finishes by beams.

        Returns:
            `tuple` of two `torch.Tensor` of shape `(num_users, num_taken)`: nodes, int64, `-1` where there is none,
            and their log-probabilities, fp32.
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
        nodes, scores = torch.where(taken, self.nodes, -1)[:, :width], self.scores[:, :width]
        self.bounds = self.bounds.masked_fill(taken, -torch.inf)
        return nodes, scores

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
        for name in (
            "users", "keys", "nodes", "scores", "bounds", "expansions", "rounds", "is_finishing", "best_dropped"
        ):  # fmt: skip
            setattr(self, name, getattr(self, name)[rows])


class RerankingFrontier(Frontier):
    """
    Looks for the best `num_candidates` items without their biases, and ranks these by their scores with biases.

    Args:
        tree, restriction, num_users, max_expansions, item_steps, bias:
            As for [`Frontier`].
        num_candidates, top_k (`int`):
            Number of items to look for, and of the best ones of these.
    """

    def __init__(
        self,
        tree: CompressedTrie,
        restriction: Restriction,
        num_users: int,
        max_expansions: int,
        item_steps: Tensor | None,
        num_candidates: int,
        top_k: int,
        bias: ItemBias | ListedBias,
    ):
        super().__init__(tree, restriction, num_users, max_expansions, item_steps, num_candidates)
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


def num_forced(tree: CompressedTrie, nodes: Tensor) -> Tensor:
    """Number of tokens of each node's chain that are forced: all but the first one, and all of the root's."""
    return (tree.chain_length(nodes) - (nodes > 0).int()).long()
