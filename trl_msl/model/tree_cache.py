# SPDX-License-Identifier: Apache-2.0
"""Hidden states of prompts and of trie nodes below them, each computed once and appended to one cache."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..trie import CompressedTrie, ragged_arange


class TreeCache:
    """
    Key-value cache of a batch of prompts and of the trie nodes that have been visited below each of them.

    A user's nodes are stored in the order in which they were appended. The attention mask and the position ids let
    each token see only the prompt and its own ancestors, so the cache holds a tree and never needs reordering.

    Args:
        backbone ([`~transformers.PreTrainedModel`]):
            The model without its head.
        tree ([`CompressedTrie`]):
            Trie of the catalogue, on the backbone's device.
        prompts (`list[list[int]]`):
            Token ids of each user's prompt.
        prefix (`tuple[DynamicCache, int]`, *optional*):
            Cache and number of the tokens that all prompts start with, from [`prefill_prefix`].

    Attributes:
        root_hidden (`torch.Tensor` of shape `(num_users, 1 + chain_length, hidden_size)`):
            Hidden states of each prompt's last token and of the tokens that all items start with.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tree: CompressedTrie,
        prompts: list[list[int]],
        prefix: tuple[DynamicCache, int] | None = None,
    ):
        self.backbone = backbone
        self.tree = tree
        self.cache, shared = (DynamicCache(), 0) if prefix is None else (copy.deepcopy(prefix[0]), prefix[1])
        self.cache.batch_repeat_interleave(len(prompts))
        forced = tree.chain_tokens[: tree.chain_start[1]].tolist()
        rows = [prompt[shared:] + forced for prompt in prompts]
        longest = max(map(len, rows))
        device = tree.device
        input_ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
        padding = longest - torch.tensor([len(row) for row in rows], device=device)
        column = torch.arange(longest, device=device)
        is_token = torch.nn.functional.pad(column >= padding[:, None], (shared, 0), value=True)
        causal = torch.arange(shared + longest, device=device) <= shared + column[:, None]
        # Padding sees at least itself, as the softmax over nothing is NaN
        itself = torch.arange(shared + longest, device=device) == shared + column[:, None]
        visible = causal & is_token[:, None, :] | itself
        positions = (shared + column - padding[:, None]).clamp(min=0)
        hidden = forward(backbone, input_ids, positions, visible, self.cache)
        self.root_hidden = hidden[:, longest - len(forced) - 1 :].clone()  # not a view that keeps all of it
        self.is_prompt = is_token
        self.prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        # Ranges of items below the nodes in the cache's further slots: one nests in another's if it is its descendant
        self.item_start = self.item_end = torch.empty(len(prompts), 0, dtype=torch.int32, device=device)

    def append(self, nodes: Tensor, first: Tensor | None = None, last: Tensor | None = None) -> Tensor:
        """
        Run the tokens of some nodes of each user through the model. Their ancestors must have been appended before,
        or come before them in `nodes`.

        Args:
            nodes (`torch.Tensor` of shape `(num_users, num_nodes)`, int64):
                Nodes of each user; `-1` where there is none.
            first, last (`torch.Tensor` of shape `(num_users, num_nodes)`, int64, *optional*):
                Range of the tokens of each node's chain, the whole chain by default.

        Returns:
            `torch.Tensor` of shape `(num_known, hidden_size)`: hidden state of the last token of each node that is not
            `-1`, user by user.
        """
        tree, num_users = self.tree, len(nodes)
        known = nodes.clamp(min=0)
        first = torch.zeros_like(nodes) if first is None else first
        last = tree.chain_length(known).long() if last is None else last
        counts = torch.where(nodes >= 0, last - first, 0)
        ends = counts.cumsum(1)
        num_tokens = int(ends[:, -1].max())
        cell, offset = ragged_arange(counts.reshape(-1))
        user = cell // nodes.shape[1]
        column = (ends - counts).reshape(-1)[cell] + offset
        node = known.reshape(-1)[cell]
        step = first.reshape(-1)[cell] + offset

        def per_token(values: Tensor, fill: int) -> Tensor:
            padded = torch.full((num_users, num_tokens), fill, dtype=values.dtype, device=nodes.device)
            padded[user, column] = values
            return padded

        input_ids = per_token(tree.chain_tokens[tree.chain_start[node] + step].long(), 0)
        positions = per_token(self.prompt_lengths[user] + tree.depth[node] + step, 0)
        # Padding has a range that neither holds nor lies within any other
        start = per_token(tree.item_start[node], torch.iinfo(torch.int32).max)
        end = per_token(tree.item_end[node], -1)
        before = self.item_start.shape[1]
        self.item_start = torch.cat([self.item_start, start], dim=1)
        self.item_end = torch.cat([self.item_end, end], dim=1)
        slots = torch.arange(before + num_tokens, device=nodes.device)
        is_ancestor = (self.item_start[:, None] <= start[..., None]) & (self.item_end[:, None] >= end[..., None])
        is_ancestor &= slots <= slots[before:, None]
        visible = torch.cat([self.is_prompt[:, None, :].expand(-1, num_tokens, -1), is_ancestor], dim=2)
        hidden = forward(self.backbone, input_ids, positions, visible, self.cache)
        user, column = (nodes >= 0).nonzero(as_tuple=True)
        return hidden[user, ends[user, column] - 1]

    def select(self, users: Tensor) -> None:
        """Keep only some users, given by a mask."""
        self.cache.batch_select_indices(users.nonzero().squeeze(1).cpu())  # the layers may be on several devices
        for name in ("root_hidden", "is_prompt", "prompt_lengths", "item_start", "item_end"):
            setattr(self, name, getattr(self, name)[users])

    def clear(self) -> None:
        """Remove all nodes and keep the prompts."""
        if self.item_start.shape[1] > 0:
            self.cache.crop(-self.item_start.shape[1])
        self.item_start = self.item_end = self.item_start[:, :0]


def prefill_prefix(backbone: PreTrainedModel, tokens: list[int], device: torch.device) -> tuple[DynamicCache, int]:
    """Run the tokens that all prompts start with through the model, once for all batches."""
    cache = DynamicCache()
    if tokens:
        positions = torch.arange(len(tokens), device=device)
        visible = positions <= positions[:, None]
        forward(backbone, torch.tensor([tokens], device=device), positions[None], visible[None], cache)
    return cache, len(tokens)


def forward(
    backbone: PreTrainedModel, input_ids: Tensor, positions: Tensor, visible: Tensor, cache: DynamicCache
) -> Tensor:
    """
    Hidden states of new tokens, whose keys and values are appended to the cache.

    Args:
        backbone ([`~transformers.PreTrainedModel`]):
            The model without its head.
        input_ids, positions (`torch.Tensor` of shape `(num_rows, num_tokens)`, int64):
            New tokens and their positions.
        visible (`torch.Tensor` of shape `(num_rows, num_tokens, num_slots)`, bool):
            Which slots of the cache each new token sees, those of the new tokens included.
        cache ([`~transformers.DynamicCache`]):
            Keys and values so far.

    Returns:
        `torch.Tensor` of shape `(num_rows, num_tokens, hidden_size)`, the model's dtype.
    """
    mask = visible[:, None]
    if backbone.config.get_text_config()._attn_implementation == "eager":  # which adds its mask to the scores
        mask = torch.zeros_like(mask, dtype=backbone.dtype).masked_fill_(~mask, torch.finfo(backbone.dtype).min)
    output = backbone(
        input_ids=input_ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
    )
    return output.last_hidden_state.to(input_ids.device)  # with `device_map` it may end on another one
