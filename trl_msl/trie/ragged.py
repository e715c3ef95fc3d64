# SPDX-License-Identifier: Apache-2.0
"""Rows of different lengths, flat: a tensor of values and a tensor of the row that each belongs to."""

from __future__ import annotations

import torch
from torch import Tensor


def ragged_arange(counts: Tensor) -> tuple[Tensor, Tensor]:
    """
    `0, 1, …, counts[row] - 1` of each row, one after the other.

    Args:
        counts (`torch.Tensor` of shape `(num_rows,)`, int64):
            Length of each row.

    Returns:
        `tuple` of two int64 `torch.Tensor` of shape `(counts.sum(),)`: the row and the number.

    Example:

    ```python
    >>> ragged_arange(torch.tensor([2, 0, 1]))
    (tensor([0, 0, 2]), tensor([0, 1, 0]))

    ```
    """
    rows = torch.repeat_interleave(counts)
    return rows, torch.arange(len(rows), device=counts.device) - (counts.cumsum(0) - counts)[rows]


def pad_rows(rows: Tensor, values: Tensor, num_rows: int, fill: float) -> Tensor:
    """
    Values of ascending rows as a matrix.

    Example:

    ```python
    >>> pad_rows(torch.tensor([0, 0, 2]), torch.tensor([5, 6, 7]), num_rows=3, fill=-1)
    tensor([[ 5,  6],
            [-1, -1],
            [ 7, -1]])

    ```
    """
    counts = torch.bincount(rows, minlength=num_rows)
    column = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    padded = values.new_full((num_rows, int(counts.max())), fill)
    padded[rows, column] = values
    return padded


def logsumexp_by_row(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """`logsumexp` of the values of each row, fp32; `-inf` where a row has none or only `-inf`."""
    values = values.float()
    largest = torch.full((num_rows,), -torch.inf, device=values.device).scatter_reduce(0, rows, values, "amax")
    shift = largest.nan_to_num(neginf=0.0)
    return torch.zeros_like(shift).scatter_add(0, rows, (values - shift[rows]).exp()).log() + shift
