# SPDX-License-Identifier: Apache-2.0
"""Softmax DPO with several rejected items."""

from .collator import DataCollatorForSoftmaxPreference
from .config import SoftmaxDPOConfig
from .negatives import count_interactions, draw_negatives, model_negatives
from .preferences import build_preferences, split_pairs, tokenize_preferences
from .trainer import SoftmaxDPOTrainer


__all__ = [
    "DataCollatorForSoftmaxPreference",
    "SoftmaxDPOConfig",
    "SoftmaxDPOTrainer",
    "build_preferences",
    "count_interactions",
    "draw_negatives",
    "model_negatives",
    "split_pairs",
    "tokenize_preferences",
]
