# SPDX-License-Identifier: Apache-2.0
"""The LM head as a function of hidden states, and trees of tokens in one forward."""

from .evaluating import evaluating
from .head import backbone, check_head, head_projection, hidden_states, unbound_forward
from .item_vectors import (
    ITEM_VECTORS_FILE,
    ItemVectors,
    add_item_vectors,
    get_item_vectors,
    load_item_vectors,
    save_item_vectors,
)
from .new_tokens import add_embeddings, embed_titles, embedding_names
from .tree_cache import TreeCache, prefill_prefix
from .tree_support import USE_GENERATE, check_length, check_tree_attention, check_whole, is_sharded, sliding_window


__all__ = [
    "ITEM_VECTORS_FILE",
    "ItemVectors",
    "add_item_vectors",
    "get_item_vectors",
    "load_item_vectors",
    "save_item_vectors",
    "unbound_forward",
    "TreeCache",
    "USE_GENERATE",
    "add_embeddings",
    "backbone",
    "check_head",
    "check_length",
    "check_tree_attention",
    "check_whole",
    "embed_titles",
    "embedding_names",
    "evaluating",
    "head_projection",
    "hidden_states",
    "is_sharded",
    "prefill_prefix",
    "sliding_window",
]
