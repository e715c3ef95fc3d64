# SPDX-License-Identifier: Apache-2.0
"""
Exact search, beam search and item scores for one batch of users. All state is in the arguments, so several threads may
search at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..model import TreeCache
from ..trie import pad_rows
from .beams import Beams
from .frontier import Frontier
from .item_keys import key_items, key_scores
from .next_tokens import continuations, next_token_log_probs
from .output import DecodingOutput


Project = Callable[..., Tensor]  # the model's head, from `head_projection`


def search_batch(
    project: Project,
    output: DecodingOutput,
    users: Tensor,
    cache: TreeCache,
    frontier: Frontier,
    nodes_per_round: int,
    vocab_weight: float = 0.0,
) -> None:
    """Exact search for a batch of `users`, whose results go into their rows of `output`."""
    # Hidden states that are known: of the root's last token, or of all its tokens if they are scored
    num_known = cache.root_hidden.shape[1] if vocab_weight > 0 else 1
    for rounds in itertools.count(start=1):
        nodes, steps, scores = frontier.take(nodes_per_round)
        is_done = (nodes < 0).all(1)
        if is_done.any():
            _write(output, users, frontier, is_done)
            if is_done.all():
                return
            frontier.select(~is_done)
            cache.select(~is_done)
            nodes, steps, scores = nodes[~is_done], steps[~is_done], scores[~is_done]
        if rounds <= num_known:
            hidden = cache.root_hidden[:, rounds - num_known - 1]
        else:
            hidden = cache.append(nodes) if vocab_weight == 0 else cache.append(nodes, steps, steps + 1)
        row, column = (nodes >= 0).nonzero(as_tuple=True)
        parents, nodes, steps = continuations(cache.tree, nodes[row, column], steps[row, column])
        tokens = cache.tree.chain_tokens[cache.tree.chain_start[nodes] + steps]
        log_probs = next_token_log_probs(project, hidden, parents, tokens, vocab_weight)
        frontier.add(row[parents], nodes, steps, scores[row, column][parents] + log_probs)


def beam_search_batch(
    project: Project, output: DecodingOutput, users: Tensor, cache: TreeCache, beams: Beams, vocab_weight: float
) -> None:
    """Beam search for a batch of `users`, whose results go into their rows of `output`."""
    for rounds in itertools.count(start=1):
        is_done = beams.is_done
        if is_done.any():
            _write(output, users, beams, is_done)
            if is_done.all():
                return
            beams.select(~is_done)
            cache.select(~is_done)
        rows, nodes, steps = beams.continuations()
        log_probs = torch.zeros(len(rows), device=rows.device)
        # A forced token has a probability of 1 among the valid ones, but not over the vocabulary
        read = beams.is_choosing if vocab_weight == 0 else beams.is_alive
        if read.any():
            if rounds == 1:
                hidden = cache.root_hidden[:, -1]
            elif vocab_weight == 0:
                hidden = cache.append(torch.where(read, beams.nodes, -1))
            else:
                hidden = cache.append(torch.where(read, beams.nodes, -1), beams.steps, beams.steps + 1)
            state = read.reshape(-1).cumsum(0) - 1
            is_read = read.reshape(-1)[rows]
            tokens = cache.tree.chain_tokens[cache.tree.chain_start[nodes] + steps]
            log_probs[is_read] = next_token_log_probs(
                project, hidden, state[rows[is_read]], tokens[is_read], vocab_weight
            )
            beams.count_expansions(read)
        beams.advance(rows, nodes, steps, log_probs)


def score_batch(project: Project, cache: TreeCache, items: list[Tensor]) -> list[Tensor]:
    """Scores of items of each user of a batch, in one forward pass."""
    tree, counts = cache.tree, torch.tensor([len(row) for row in items])
    users = torch.repeat_interleave(counts).to(tree.device)
    leaves = tree.item_nodes[torch.cat(items).to(tree.device)].long()
    levels = [leaves]
    while (levels[-1] > 0).any():
        levels.append(tree.parent[levels[-1]].long().clamp(min=0))
    # Every node with a choice above some item of a user, by user and from the root down
    keys = torch.cat([users[:0], *(users * tree.num_nodes + nodes for nodes in levels[1:])]).unique()
    row, nodes = keys // tree.num_nodes, keys % tree.num_nodes
    hidden = cache.root_hidden.new_empty(len(keys), cache.root_hidden.shape[-1])
    hidden[nodes == 0] = cache.root_hidden[row[nodes == 0], -1]
    if (nodes > 0).any():
        hidden[nodes > 0] = cache.append(pad_rows(row[nodes > 0], nodes[nodes > 0], len(items), fill=-1))
    parents, children = tree.children(nodes)
    log_probs = next_token_log_probs(project, hidden, parents, tree.head_tokens(children))
    first = torch.searchsorted(parents, torch.arange(len(keys), device=tree.device))
    scores = torch.zeros(len(leaves), device=tree.device)
    for above, below in zip(levels[1:], levels):
        place = first[torch.searchsorted(keys, users * tree.num_nodes + above)] + below - tree.first_child[above]
        scores += torch.where(below > 0, log_probs[place.clamp(max=len(log_probs) - 1)], 0.0)
    return scores.cpu().split(counts.tolist())


def score_root(project: Project, cache: TreeCache, vocab_weight: float) -> Tensor:
    """Log-probability of the tokens that all items begin with, fp32 of shape `(num_users,)`."""
    num_users, num_tokens = len(cache.root_hidden), cache.root_hidden.shape[1] - 1
    if vocab_weight == 0 or num_tokens == 0:
        return torch.zeros(num_users, device=cache.tree.device)
    rows = torch.arange(num_users * num_tokens, device=cache.tree.device)
    tokens = cache.tree.chain_tokens[:num_tokens].repeat(num_users)
    hidden = cache.root_hidden[:, :-1].flatten(0, 1)
    log_probs = next_token_log_probs(project, hidden, rows, tokens, vocab_weight)
    return log_probs.view(num_users, num_tokens).sum(1)


def _write(output: DecodingOutput, users: Tensor, state: Frontier | Beams, is_done: Tensor) -> None:
    """Write the results of the users that are done into their rows of `output`."""
    done = users[state.users[is_done].cpu()]
    keys = state.best_items(output.items.shape[1])[is_done]
    output.items[done] = key_items(keys).cpu()
    output.scores[done] = key_scores(keys).cpu()
    output.exact[done] = state.is_exact[is_done].cpu()
    output.expansions[done] = state.expansions[is_done].cpu()
    output.rounds[done] = state.rounds[is_done].cpu()
    if isinstance(state, Beams):
        output.lost_at[done] = state.lost_at[is_done].cpu()
