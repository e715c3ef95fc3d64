# SPDX-License-Identifier: Apache-2.0
"""Exact top K, beam search and constrained generation over the trie."""

from .beams import Beams
from .decoder import TrieDecoder
from .frontier import Frontier
from .item_keys import key_items, key_scores
from .logits_processor import TrieLogitsProcessor
from .next_tokens import next_token_log_probs
from .output import DecodingOutput
from .recommendations import Recommendations, recommend
from .restriction import Restriction, check_items, check_restrictions, is_shared


__all__ = [
    "Beams",
    "DecodingOutput",
    "Frontier",
    "Recommendations",
    "Restriction",
    "TrieDecoder",
    "TrieLogitsProcessor",
    "check_items",
    "check_restrictions",
    "is_shared",
    "key_items",
    "key_scores",
    "next_token_log_probs",
    "recommend",
]
