# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of next tokens, computing only the logits needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..trie import logsumexp_by_row


_MAX_LOGITS = 1 << 23  # number of logits over the trie computed at a time
_VOCAB_ROWS = 64  # number of rows of logits over the vocabulary computed at a time


def next_token_log_probs(
    project: Callable[..., Tensor], hidden: Tensor, rows: Tensor, tokens: Tensor, normalize: str = "trie"
) -> Tensor:
    """
    Log-probabilities of next tokens.

    Args:
        project (`Callable`):
            The model's head, from [`head_projection`].
        hidden (`torch.Tensor` of shape `(num_rows, hidden_size)`):
            Hidden state that predicts each row's tokens.
        rows, tokens (`torch.Tensor` of shape `(total,)`):
            Row and id of each token, rows ascending.
        normalize (`str`, *optional*, defaults to `"trie"`):
            `"trie"`, among the tokens of the row; or `"vocab"`, over the vocabulary.

    Returns:
        `torch.Tensor` of shape `(total,)`, fp32, none positive.

    Raises:
        `ValueError`: if the model gives NaN.
    """
    device, log_probs = rows.device, torch.empty(len(rows), device=rows.device)
    if normalize == "trie":
        for chosen in _groups(torch.bincount(rows, minlength=len(hidden))):
            here = chosen[rows]
            # A product with the union of the rows' tokens, of which each row takes its own
            union, columns = tokens[here].unique(return_inverse=True)
            logits = project(hidden[chosen], rows=union).to(device)
            log_probs[here] = logits[(chosen.cumsum(0) - 1)[rows[here]], columns]
        log_probs = log_probs - logsumexp_by_row(log_probs, rows, len(hidden))[rows]
    else:
        for start in range(0, len(hidden), _VOCAB_ROWS):
            logits = project(hidden[start : start + _VOCAB_ROWS], rows=slice(None)).to(device)
            here = (rows >= start) & (rows < start + _VOCAB_ROWS)
            row = rows[here] - start
            log_probs[here] = logits[row, tokens[here].long()] - logits.logsumexp(1)[row]
    if log_probs.isnan().any():
        raise ValueError("`model` gives NaN as logits, so no item can be ranked. Has its training diverged?")
    return log_probs.clamp_(max=0.0)


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
