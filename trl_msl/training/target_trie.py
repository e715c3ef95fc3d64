# SPDX-License-Identifier: Apache-2.0
"""The part of the trie that the targets of the training rows need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..data import supervised_items
from ..trie import ItemTrie, subset


@dataclass(frozen=True)
class TargetTrie:
    """
    The trie of the items that are targets of the training rows.

    Args:
        trie ([`ItemTrie`]):
            [`~trl_msl.trie.subset`] of the task's trie.
        nodes (`torch.Tensor` of shape `(num_nodes,)`, int64):
            For each node of the task's trie the same node of `trie`, `-1` where no target passes.
    """

    trie: ItemTrie
    nodes: Tensor

    @classmethod
    def from_rows(cls, rows: Dataset, trie: ItemTrie, device: torch.device) -> TargetTrie:
        """That of tokenised rows, where `trie` is the task's."""
        trie = trie.to("cpu")
        part, nodes = subset(trie, supervised_items(rows, trie))
        return cls(part, nodes.to(device))

    def renumber(self, nodes: Tensor) -> Tensor:
        """Nodes of the task's trie as nodes of `trie`."""
        return self.nodes.to(nodes.device)[nodes]

    def have_information_gain(self, nodes: Tensor) -> Tensor:
        r"""
        Whether tokens say anything about the item, by IGD ([Token Decisiveness Modeling via Information
        Gain](https://huggingface.co/papers/2506.13229)):

        $$ \text{IG}(y_t; y_{<t}) = H(y_{<t}) - H(y_{\le t}) > 0, \qquad
           H(y_{\le t}) = -\sum_{i \text{ below } y_{\le t}} p_i \log p_i $$

        where $p_i$ is item $i$'s share of all training targets; it is not normalised below a node. So the gain is the
        sum of $-p_i \log p_i$ over the targets that the token rules out: positive exactly where it has siblings.

        Args:
            nodes (`torch.Tensor` of any shape):
                Nodes of the task's trie on the paths of targets.

        Returns:
            `torch.Tensor` of the same shape, bool.
        """
        return self.trie.to(nodes.device).num_valid_tokens(self.renumber(nodes)) > 1


def map_labels(inputs: dict[str, Any], function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A batch with `function(nodes)` in place of its labels, but for those that are -100."""
    labels = {name: inputs[name] for name in ("labels", "shift_labels") if name in inputs}
    mapped = {name: torch.where(old == -100, old, function(old.clamp(min=0))) for name, old in labels.items()}
    return {**inputs, **mapped}
