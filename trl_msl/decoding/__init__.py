# SPDX-License-Identifier: Apache-2.0
"""Exact top K, beam search and constrained generation over the trie."""

from .decoder import TrieDecoder
from .item_bias import ItemBias, SparseBias
from .logits_processor import TrieLogitsProcessor
from .output import DecodingOutput
from .recommendations import Recommendations, recommend
from .restriction import Allowed


__all__ = [
    "Allowed",
    "DecodingOutput",
    "ItemBias",
    "Recommendations",
    "SparseBias",
    "TrieDecoder",
    "TrieLogitsProcessor",
    "recommend",
]
