# SPDX-License-Identifier: Apache-2.0
"""The trie whose tokens are valid in training: that of all items, or of those that are targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..data import supervised_items
from ..trie import ItemTrie, subset


@dataclass(frozen=True)
class TrainingTrie:
    """
    A trie for training, and how labels become nodes of it.

    Args:
        trie ([`ItemTrie`]):
            The task's trie, or part of it.
        nodes (`torch.Tensor` of shape `(num_nodes,)`, int64, *optional*):
            For each node of the task's trie that of `trie`. Defaults to the same numbers.
    """

    trie: ItemTrie
    nodes: Tensor | None = None

    @classmethod
    def of_targets(cls, rows: Dataset, trie: ItemTrie, device: torch.device) -> TrainingTrie:
        """
        The part of the task's `trie` for the targets of tokenised `rows`.

        Raises:
            `ValueError`: if all targets are the same.
        """
        part, nodes = subset(trie.to("cpu"), supervised_items(rows, trie))
        if part.first_branching_node < 0:
            raise ValueError(
                "`negatives` = 'seen' leaves no wrong token, as all rows of `train_dataset` have the same target: use "
                "'all'."
            )
        return cls(part, nodes.to(device))

    def renumber(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch whose labels are nodes of `trie`: -1 where it has none, as in rows to evaluate."""
        if self.nodes is None:
            return inputs
        labels = {name: inputs[name] for name in ("labels", "shift_labels") if name in inputs}
        for name, old in labels.items():
            labels[name] = torch.where(old < 0, old, self.nodes.to(old.device)[old.clamp(min=0)])
        return {**inputs, **labels}
