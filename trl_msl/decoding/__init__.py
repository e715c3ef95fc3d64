# SPDX-License-Identifier: Apache-2.0
"""Exact top K, beam search and constrained generation over the trie."""

from .decoder import TrieDecoder
from .grounding import Grounder, check_gamma, embed_texts
from .item_bias import Biases, ItemBias, SparseBias, dense_bias, read_item_bias, select_users, sum_biases
from .logits_processor import TrieLogitsProcessor
from .next_tokens import next_token_log_probs
from .output import DecodingOutput
from .recommendations import Recommendations, recommend
from .restriction import Allowed


__all__ = [
    "Allowed",
    "Biases",
    "DecodingOutput",
    "Grounder",
    "ItemBias",
    "Recommendations",
    "SparseBias",
    "TrieDecoder",
    "TrieLogitsProcessor",
    "check_gamma",
    "dense_bias",
    "embed_texts",
    "next_token_log_probs",
    "read_item_bias",
    "recommend",
    "select_users",
    "sum_biases",
]
