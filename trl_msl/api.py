# SPDX-License-Identifier: Apache-2.0
"""The public names of the package: `from trl_msl import ...`."""

from .data import (
    ItemCatalog,
    PromptTemplate,
    RankingTask,
    build_rows,
    k_core,
    read_interactions,
    read_windows,
    sliding_windows,
    split_by_time,
    tokenize_rows,
)
from .decoding import SparseBias, TrieDecoder, TrieLogitsProcessor, recommend
from .evaluation import RecommendationCallback, evaluate_recommendations, ranking_metrics
from .recommender import Recommender
from .softmax_dpo import SoftmaxDPOConfig, SoftmaxDPOTrainer, build_preferences, draw_negatives, model_negatives
from .training import MSLConfig, MSLTrainer, adaptive_temperature, masked_softmax_loss
from .trie import ItemTrie


__all__ = [
    "ItemCatalog",
    "ItemTrie",
    "MSLConfig",
    "MSLTrainer",
    "PromptTemplate",
    "RankingTask",
    "RecommendationCallback",
    "Recommender",
    "SoftmaxDPOConfig",
    "SoftmaxDPOTrainer",
    "SparseBias",
    "TrieDecoder",
    "TrieLogitsProcessor",
    "adaptive_temperature",
    "build_preferences",
    "build_rows",
    "draw_negatives",
    "evaluate_recommendations",
    "k_core",
    "masked_softmax_loss",
    "model_negatives",
    "ranking_metrics",
    "read_interactions",
    "read_windows",
    "recommend",
    "sliding_windows",
    "split_by_time",
    "tokenize_rows",
]
