# SPDX-License-Identifier: Apache-2.0
"""Exact top K, beam search and constrained generation over the trie."""

from .decoder import TrieDecoder
from .logits_processor import TrieLogitsProcessor
from .output import DecodingOutput
from .recommendations import Recommendations, recommend
from .restriction import Allowed


__all__ = ["Allowed", "DecodingOutput", "Recommendations", "TrieDecoder", "TrieLogitsProcessor", "recommend"]
