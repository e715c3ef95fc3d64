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
from ..trie import pad_rows, ragged_arange
from .beams import Beams
from .frontier import Frontier, num_forced
from .item_keys import key_items, key_scores
from .next_tokens import next_token_log_probs
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
    for rounds in itertools.count(start=1):
        nodes, scores = frontier.take(nodes_per_round)
        is_done = (nodes < 0).all(1)
        if is_done.any():
            _write(output, users, frontier, is_done)
            if is_done.all():
                return
            frontier.select(~is_done)
            cache.select(~is_done)
            nodes, scores = nodes[~is_done], scores[~is_done]
        row, column = (nodes >= 0).nonzero(as_tuple=True)
        scores = scores[row, column]
        if vocab_weight > 0:
            hidden, scores = _run_chains(project, cache, nodes, scores, vocab_weight)
            nodes = nodes[row, column]
            is_open = frontier.settle(row, nodes, scores)
            row, nodes, hidden = row[is_open], nodes[is_open], hidden[is_open]
            scores = scores[is_open].gather(1, num_forced(cache.tree, nodes)[:, None]).squeeze(1)
        else:
            # The prompt's last token stands for the root
            hidden = cache.root_hidden[:, -1] if rounds == 1 else cache.append(nodes)
            nodes = nodes[row, column]
        parents, children = cache.tree.children(nodes)
        log_probs = next_token_log_probs(project, hidden, parents, cache.tree.head_tokens(children), vocab_weight)
        frontier.add(row[parents], children, scores[parents] + log_probs)


def _run_chains(
    project: Project, cache: TreeCache, nodes: Tensor, scores: Tensor, vocab_weight: float
) -> tuple[Tensor, Tensor]:
    """
    Run nodes and score their forced tokens. The last token of a leaf is not run, as nothing follows.

    Args:
        nodes (`torch.Tensor` of shape `(num_users, num_nodes)`, int64):
            Nodes of each user; `-1` where there is none.
        scores (`torch.Tensor` of shape `(num_known,)`, fp32):
            Log-probability of each node that is not `-1`, after its first token.

    Returns:
        `tuple` of the hidden state of each node's last token (any, if it is a leaf), shape `(num_known, hidden_size)`,
        and its log-probability after each number of forced tokens, shape `(num_known, 1 + longest)`, fp32.
    """
    tree, has_children = cache.tree, cache.tree.num_children[nodes.clamp(min=0)] > 0
    known = nodes[nodes >= 0]
    forced = num_forced(tree, known)
    if (known == 0).all():  # the first round
        hidden = cache.root_hidden.flatten(0, 1)
        num_states = forced + 1
    else:
        last = (tree.chain_length(nodes.clamp(min=0)) - (~has_children).int()).long()
        hidden = cache.append(nodes, last=last, all_tokens=True)
        num_states = forced + has_children[nodes >= 0].int()
    first_state = num_states.cumsum(0) - num_states
    rows, step = ragged_arange(forced)
    first_token = tree.chain_start[known] + (known > 0).int()
    log_probs = next_token_log_probs(
        project,
        hidden[first_state[rows] + step],
        torch.arange(len(rows), device=rows.device),
        tree.chain_tokens[first_token[rows] + step],
        vocab_weight,
    )
    log_probs = pad_rows(rows, log_probs, len(known), fill=0.0).cumsum(1)
    last_state = (first_state + forced).clamp(max=len(hidden) - 1)
    return hidden[last_state], scores[:, None] + torch.nn.functional.pad(log_probs, (1, 0))


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
