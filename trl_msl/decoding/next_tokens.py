# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of next tokens, computing only the logits needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..trie import CompressedTrie, logsumexp_by_row, ragged_arange


_MAX_LOGITS = 1 << 23  # number of logits over the trie computed at a time
_VOCAB_ROWS = 64  # number of rows of logits over the vocabulary computed at a time


def next_token_log_probs(
    project: Callable[..., Tensor], hidden: Tensor, rows: Tensor, tokens: Tensor, vocab_weight: float = 0.0
) -> Tensor:
    """
    Log-probabilities of next tokens, `log P_valid + vocab_weight · log m`: among the valid tokens, and of these within
    the vocabulary, `m` being their share of its probability. With logits `f` and both normalisers as log-sum-exps,

        f(token) − (1 − vocab_weight) · lse(valid tokens) − vocab_weight · lse(vocabulary)

    Args:
        project (`Callable`):
            The model's head, from [`head_projection`].
        hidden (`torch.Tensor` of shape `(num_rows, hidden_size)`):
            Hidden state that predicts each row's tokens.
        rows, tokens (`torch.Tensor` of shape `(total,)`):
            Row and id of each token, rows ascending: all valid tokens of each row.
        vocab_weight (`float`, *optional*, defaults to `0.0`):
            0 for the log-probability among the valid tokens, for which no other logits are computed; 1 for that over
            the vocabulary.

    Returns:
        `torch.Tensor` of shape `(total,)`, fp32, none positive.

    Raises:
        `ValueError`: if the model gives NaN.
    """
    device, found = rows.device, torch.empty(len(rows), device=rows.device)  # logits
    vocabulary = torch.empty(len(hidden), device=rows.device)
    if vocab_weight == 0:
        for chosen in _groups(torch.bincount(rows, minlength=len(hidden))):
            here = chosen[rows]
            # A product with the union of the rows' tokens, of which each row takes its own
            union, columns = tokens[here].unique(return_inverse=True)
            logits = project(hidden[chosen], rows=union).to(device)
            found[here] = logits[(chosen.cumsum(0) - 1)[rows[here]], columns]
    else:
        for start in range(0, len(hidden), _VOCAB_ROWS):
            logits = project(hidden[start : start + _VOCAB_ROWS], rows=slice(None)).to(device)
            here = (rows >= start) & (rows < start + _VOCAB_ROWS)
            found[here] = logits[rows[here] - start, tokens[here].long()]
            vocabulary[start : start + _VOCAB_ROWS] = logits.logsumexp(1)
    normalizer = logsumexp_by_row(found, rows, len(hidden))
    if vocab_weight > 0:
        normalizer = normalizer.lerp(vocabulary, vocab_weight)
    log_probs = found - normalizer[rows]
    if log_probs.isnan().any():
        raise ValueError("`model` gives NaN as logits, so no item can be ranked. Has its training diverged?")
    return log_probs.clamp_(max=0.0)


def continuations(tree: CompressedTrie, nodes: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    Tokens that may follow after some tokens of nodes' chains: the next one, or the first ones of the children.

    Args:
        tree ([`CompressedTrie`]):
            Trie of the catalogue.
        nodes, steps (`torch.Tensor` of shape `(num_rows,)`, int64):
            Nodes, and the index of a token in each one's chain.

    Returns:
        `tuple` of three int64 `torch.Tensor` of shape `(total,)`: the row of each token, its node, and its index in
        the node's chain.
    """
    is_last = steps == tree.chain_length(nodes) - 1
    rows, offset = ragged_arange(torch.where(is_last, tree.num_children[nodes], 1).long())
    is_last, nodes, steps = is_last[rows], nodes[rows], steps[rows]
    nodes = torch.where(is_last, tree.first_child[nodes] + offset, nodes)
    return rows, nodes, torch.where(is_last, 0, steps + 1)


def _groups(counts: Tensor) -> Iterator[Tensor]:
    """
    Split rows with `counts` tokens each into groups, given as masks, so that the product of a group's rows and all its
    tokens stays small, and rows with few tokens are not multiplied with the tokens of rows with many.
    """
    if len(counts) * int(counts.sum()) <= _MAX_LOGITS:
        yield torch.ones_like(counts, dtype=torch.bool)
        return
    sizes, order = counts.sort(descending=True)
    start = 0
    while start < len(sizes):
        total = sizes[start:].cumsum(0) * torch.arange(1, len(sizes) - start + 1, device=sizes.device)
        end = start + max(1, int((total <= _MAX_LOGITS).sum()))
        yield torch.zeros_like(counts, dtype=torch.bool).index_fill_(0, order[start:end], True)
        start = end
