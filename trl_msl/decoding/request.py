# SPDX-License-Identifier: Apache-2.0
"""What users may get and what is added to their scores: checked, then selected for each batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..trie import CompressedTrie
from .arguments import Items, read_allowed, read_item_lists
from .item_bias import Biases, ItemBias, ListedBias, SparseBias, bias_of_users, read_item_bias
from .restriction import Allowed, Restriction


class Request:
    """
    Arguments of a search as users pass them.

    Args:
        tree ([`CompressedTrie`]):
            Trie of the catalogue.
        num_users (`int`):
            Number of prompts.
        exclude, allowed, item_bias (*optional*):
            As for [`TrieDecoder.search`].

    Raises:
        `ValueError`: where they don't fit users or catalogue.
    """

    def __init__(
        self,
        tree: CompressedTrie,
        num_users: int,
        exclude: Sequence[Items] | None = None,
        allowed: Allowed | Items | Sequence[Items] | None = None,
        item_bias: Biases | None = None,
    ):
        self.tree, num_items = tree, len(tree.item_order)
        self.exclude = None if exclude is None else read_item_lists("exclude", exclude, num_users, num_items)
        if allowed is not None and not isinstance(allowed, Allowed):
            allowed = read_allowed(allowed, num_users, num_items)
            allowed = Allowed.from_items(tree, allowed) if isinstance(allowed, Tensor) else allowed
        if item_bias is not None:
            item_bias = read_item_bias(item_bias, num_users, num_items)
            is_shared = isinstance(item_bias, Tensor) and item_bias.ndim == 1
            item_bias = ItemBias.from_values(tree, item_bias) if is_shared else item_bias
        for name, value in (("allowed", allowed), ("item_bias", item_bias)):
            if isinstance(value, Allowed | ItemBias) and value.tree is not tree:
                raise ValueError(f"`{name}` was prepared by another `TrieDecoder`: prepare it with this one.")
        self.allowed = item_bias.restrict(allowed) if isinstance(item_bias, ItemBias) else allowed
        self.item_bias = item_bias

    def of_batch(self, users: Sequence[int]) -> tuple[Restriction, ItemBias | ListedBias | None]:
        """What the users of a batch may get, and their biases."""
        exclude, allowed = (
            [rows[user] for user in users] if isinstance(rows, list) else rows for rows in (self.exclude, self.allowed)
        )
        bias = self.item_bias
        if bias is not None:
            bias = bias_of_users(bias, users, len(self.tree.item_order))
        if isinstance(bias, SparseBias):
            bias = ListedBias(self.tree, bias)
        elif isinstance(bias, Tensor):
            bias = ItemBias.from_values(self.tree, bias)
        # A bias for all users has removed its items from `allowed`
        removed = None if bias is self.item_bias else bias.removed
        return Restriction(self.tree, exclude, allowed, removed), bias


def check_beams(num_beams: int, normalize: str, top_k: int) -> None:
    """Raise a `ValueError` where these arguments of [`TrieDecoder.beam_search`] are out of range."""
    if num_beams < top_k:
        raise ValueError(f"`num_beams` is {num_beams}: it must be at least `top_k` = {top_k}.")
    if normalize not in ("trie", "vocab"):
        raise ValueError(f"`normalize` is {normalize!r}: it must be 'trie' or 'vocab'.")


def check_score(vocab_weight: float, item_bias: Biases | None, num_candidates: int | None, top_k: int) -> None:
    """Raise a `ValueError` where these arguments of [`TrieDecoder.search`] are out of range."""
    if not (vocab_weight >= 0 and math.isfinite(vocab_weight)):
        raise ValueError(f"`vocab_weight` is {vocab_weight}: it must be a finite number, and at least 0.")
    if num_candidates is not None and item_bias is None:
        raise ValueError(f"`num_candidates` is {num_candidates}, but only `item_bias` ranks candidates: pass one.")
    if num_candidates is not None and num_candidates < top_k:
        raise ValueError(f"`num_candidates` is {num_candidates}: it must be at least `top_k` = {top_k}.")
