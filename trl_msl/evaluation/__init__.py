# SPDX-License-Identifier: Apache-2.0
"""Metrics, and measuring a model's ranking of the catalogue."""

from .evaluate import RecommendationCallback, evaluate_recommendations
from .metrics import bootstrap_interval, coverage, per_user_metrics, ranking_metrics, ranks_of_targets
from .pruning import beam_pruning


__all__ = [
    "RecommendationCallback",
    "beam_pruning",
    "bootstrap_interval",
    "coverage",
    "evaluate_recommendations",
    "per_user_metrics",
    "ranking_metrics",
    "ranks_of_targets",
]
