# SPDX-License-Identifier: Apache-2.0
"""State of beam search for a batch of users: beams and finished items, by the rules of `generate`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..trie import CompressedTrie, pad_rows
from .item_keys import NO_ITEM, best_keys, item_keys
from .next_tokens import continuations
from .restriction import Restriction


class Beams:
    """
    Beams and finished items of each user of a batch. The search stops, and finished items are scored, as in the beam
    search of transformers' `generate` with `early_stopping=False`.

    Args:
        tree ([`CompressedTrie`]):
            Trie of the catalogue.
        restriction ([`Restriction`]):
            Which items each user may get.
        num_beams (`int`):
            Beam width.
        length_penalty (`float`):
            Power of the number of tokens by which the score of a finished item is divided.
        root_scores (`torch.Tensor` of shape `(num_users,)`, fp32):
            Log-probability of the tokens that all items begin with.
        followed (`torch.Tensor` of shape `(num_users, num_followed)`, int64):
            Indices of the items to follow; `-1` where there is none.

    Attributes (a row for each user that still searches):
        users (`torch.Tensor` of shape `(num_users,)`, int64):
            User of each row.
        nodes, steps, scores (`torch.Tensor` of shape `(num_users, num_beams)`, int64, int64 and fp32):
            Node of each beam, index of its last token in the node's chain, and log-probability; best first, `-inf`
            where there is no beam.
        finished_nodes, finished_scores (`torch.Tensor` of shape `(num_users, num_beams)`, int64 and fp32):
            Finished items by their node, and scores; best first, `-inf` where there is none.
        expansions, rounds (`torch.Tensor` of shape `(num_users,)`, int64):
            Number of positions whose next tokens were scored, and number of rounds in which some were.
        lost_at (`torch.Tensor` of shape `(num_users, num_followed)`, int64):
            As in [`DecodingOutput`].
    """

    def __init__(
        self,
        tree: CompressedTrie,
        restriction: Restriction,
        num_beams: int,
        length_penalty: float,
        root_scores: Tensor,
        followed: Tensor,
    ):
        shape, device = (len(root_scores), num_beams), tree.device
        self.tree = tree
        self.restriction = restriction
        self.length_penalty = length_penalty
        self.length = int(tree.chain_start[1])
        self.users = torch.arange(len(root_scores), device=device)
        self.nodes = torch.zeros(shape, dtype=torch.int64, device=device)
        self.steps = torch.full(shape, self.length - 1, device=device)
        self.scores = torch.full(shape, -torch.inf, device=device)
        self.finished_nodes = torch.zeros(shape, dtype=torch.int64, device=device)
        self.finished_scores = torch.full(shape, -torch.inf, device=device)
        self.expansions = torch.zeros_like(self.users)
        self.rounds = torch.zeros_like(self.users)
        followed = followed.to(device)
        self.followed = torch.where(followed < 0, -1, tree.item_place[followed].long())  # places in `item_order`
        self.lost_at = torch.zeros_like(self.followed)
        if tree.num_children[0] > 0:
            self.scores[:, 0] = root_scores
        else:  # all items have the same tokens
            self.finished_scores[:, 0] = root_scores / self.length**length_penalty

    @property
    def is_alive(self) -> Tensor:
        """Whether each place holds a beam, bool of shape `(num_users, num_beams)`."""
        return self.scores > -torch.inf

    @property
    def is_choosing(self) -> Tensor:
        """Whether each beam is at the end of its chain, where it has a choice, bool of the same shape."""
        return self.is_alive & (self.steps == self.tree.chain_length(self.nodes) - 1)

    @property
    def is_done(self) -> Tensor:
        """Whether no beam of a user can improve on the finished items, bool of shape `(num_users,)`."""
        best_possible = self.scores[:, 0] / max(self.length, 1) ** self.length_penalty
        return (best_possible <= self.finished_scores[:, -1]) | ~self.is_alive.any(1)

    def continuations(self) -> tuple[Tensor, Tensor, Tensor]:
        """
        All tokens by which some beam can be extended.

        Returns:
            `tuple` of three int64 `torch.Tensor` of shape `(total,)`: place of the beam among all users' beams, and
            the token's node and index in the node's chain.
        """
        alive = self.is_alive.reshape(-1).nonzero().squeeze(1)
        rows, nodes, steps = continuations(self.tree, self.nodes.reshape(-1)[alive], self.steps.reshape(-1)[alive])
        return alive[rows], nodes, steps

    def advance(self, rows: Tensor, nodes: Tensor, steps: Tensor, log_probs: Tensor) -> None:
        """
        Extend the beams by the best tokens.

        Args:
            rows, nodes, steps, log_probs (`torch.Tensor` of shape `(total,)`):
                What [`~Beams.continuations`] returns, and the log-probability of each token after its beam, fp32.
        """
        num_users, num_beams = self.nodes.shape
        users = rows // num_beams
        tree = self.tree
        allowed = self.restriction.count(self.users[users], tree.item_start[nodes], tree.item_end[nodes]) > 0
        users, nodes, steps = users[allowed], nodes[allowed], steps[allowed]
        scores = self.scores.reshape(-1)[rows[allowed]] + log_probs[allowed]
        scores = pad_rows(users, scores, num_users, fill=-torch.inf)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        nodes = pad_rows(users, nodes, num_users, fill=0).gather(1, order)
        steps = pad_rows(users, steps, num_users, fill=0).gather(1, order)
        self.length += 1
        is_finished = (tree.num_children[nodes] == 0) & (steps == tree.chain_length(nodes) - 1)

        # Only those among the best `num_beams` count as finished, as in `generate`
        finished = torch.where(is_finished, scores / self.length**self.length_penalty, -torch.inf)[:, :num_beams]
        finished = torch.cat([self.finished_scores, finished], dim=1)
        self.finished_scores, best = finished.sort(dim=1, descending=True, stable=True)
        self.finished_scores, best = self.finished_scores[:, :num_beams], best[:, :num_beams]
        self.finished_nodes = torch.cat([self.finished_nodes, nodes[:, :num_beams]], dim=1).gather(1, best)

        scores = torch.where(is_finished, -torch.inf, scores)
        missing = max(0, num_beams - scores.shape[1])
        scores, nodes, steps = (
            torch.nn.functional.pad(values, (0, missing), value=fill)
            for values, fill in ((scores, -torch.inf), (nodes, 0), (steps, 0))
        )
        self.scores, best = scores.topk(num_beams, dim=1, sorted=True)
        self.nodes, self.steps = nodes.gather(1, best), steps.gather(1, best)
        if self.followed.shape[1] > 0:
            self._follow()

    def _follow(self) -> None:
        """Note which followed items no beam leads to, and no finished item is, since the last token."""
        nodes = torch.cat([self.nodes, self.finished_nodes], dim=1)
        is_held = torch.cat([self.is_alive, self.finished_scores > -torch.inf], dim=1)
        start, end = self.tree.item_start[nodes], torch.where(is_held, self.tree.item_end[nodes], 0)
        place = self.followed[:, :, None]
        is_kept = ((start[:, None] <= place) & (place < end[:, None])).any(2)
        self.lost_at = self.lost_at.where(is_kept | (self.lost_at > 0) | (self.followed < 0), self.length)

    def count_expansions(self, is_expanded: Tensor) -> None:
        """Count the beams that are expanded, bool of shape `(num_users, num_beams)`."""
        self.expansions = self.expansions + is_expanded.sum(1)
        self.rounds = self.rounds + is_expanded.any(1)

    @property
    def is_exact(self) -> Tensor:
        """`False` for all users: beam search gives no certificate."""
        return torch.zeros_like(self.users, dtype=torch.bool)

    def best_items(self, top_k: int) -> Tensor:
        """Keys of each user's best finished items, int64 of shape `(num_users, top_k)`."""
        rows, columns = (self.finished_scores > -torch.inf).nonzero(as_tuple=True)
        scores = self.finished_scores[rows, columns]
        nodes = self.finished_nodes[rows, columns]
        start, end = self.tree.item_start[nodes], self.tree.item_end[nodes]
        index, items = self.restriction.first_items(self.users[rows], start, end, limit=top_k)
        keys = pad_rows(rows[index], item_keys(scores[index], items), len(self.users), fill=NO_ITEM)
        none = keys.new_full((len(keys), top_k), NO_ITEM)
        return best_keys(torch.cat([keys, none], dim=1), top_k)

    def select(self, rows: Tensor) -> None:
        """Keep only some users, given by a mask over rows."""
        finished, counts = ("finished_nodes", "finished_scores"), ("expansions", "rounds", "lost_at")
        for name in ("users", "nodes", "steps", "scores", *finished, *counts, "followed"):
            setattr(self, name, getattr(self, name)[rows])
