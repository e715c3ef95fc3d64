# SPDX-License-Identifier: Apache-2.0
"""Masked Softmax Loss for TRL: fine-tune an LLM to rank the items of a catalogue."""

from .bundle import Bundle
from .catalog import ItemCatalog, encode_items
from .compressed_trie import CompressedTrie
from .data import build_rows, tokenize_rows
from .data_arguments import DataArguments, read_data, read_items
from .decoding import DecodingOutput, TrieDecoder
from .evaluation import RecommendationCallback, evaluate_recommendations
from .generation import Recommendations, recommend
from .interactions import k_core, read_interactions, read_windows, sliding_windows, split_by_time
from .lm_head import SparseCausalLMOutput, add_sparse_lm_head
from .logits_process import TrieLogitsProcessor
from .losses import adaptive_temperature, masked_softmax_loss, softmax_dpo_loss, temperature_statistics
from .metrics import bootstrap_interval, coverage, per_user_metrics, ranking_metrics, ranks_of_targets
from .msl_config import MSLConfig
from .msl_trainer import MSLTrainer
from .negatives import count_interactions, draw_negatives, model_negatives
from .preferences import DataCollatorForSoftmaxPreference, build_preferences, split_pairs, tokenize_preferences
from .prompts import PromptTemplate, encode_prompts, fit_prompts
from .recommender import RecommendedItems, Recommender
from .softmax_dpo_config import SoftmaxDPOConfig
from .softmax_dpo_trainer import SoftmaxDPOTrainer
from .temperature import TemperatureCallback
from .tree_support import is_sharded
from .trie import ItemTrie


__all__ = [
    "Bundle",
    "CompressedTrie",
    "DataArguments",
    "DataCollatorForSoftmaxPreference",
    "DecodingOutput",
    "ItemCatalog",
    "ItemTrie",
    "MSLConfig",
    "MSLTrainer",
    "PromptTemplate",
    "RecommendationCallback",
    "Recommendations",
    "RecommendedItems",
    "Recommender",
    "SoftmaxDPOConfig",
    "SoftmaxDPOTrainer",
    "SparseCausalLMOutput",
    "TemperatureCallback",
    "TrieDecoder",
    "TrieLogitsProcessor",
    "adaptive_temperature",
    "add_sparse_lm_head",
    "bootstrap_interval",
    "build_preferences",
    "build_rows",
    "count_interactions",
    "coverage",
    "draw_negatives",
    "encode_items",
    "encode_prompts",
    "evaluate_recommendations",
    "fit_prompts",
    "is_sharded",
    "k_core",
    "masked_softmax_loss",
    "model_negatives",
    "per_user_metrics",
    "ranking_metrics",
    "ranks_of_targets",
    "read_data",
    "read_interactions",
    "read_items",
    "read_windows",
    "recommend",
    "sliding_windows",
    "softmax_dpo_loss",
    "split_by_time",
    "split_pairs",
    "temperature_statistics",
    "tokenize_preferences",
    "tokenize_rows",
]
