# SPDX-License-Identifier: Apache-2.0
"""Metrics, and measuring a model's ranking of the catalogue."""

from .choose_weights import Candidates, Choice, choose_weights
from .evaluate import RecommendationCallback, evaluate_recommendations
from .metrics import bootstrap_interval, coverage, per_user_metrics, ranking_metrics, ranks_of_targets
from .pruning import beam_pruning


__all__ = [
    "Candidates",
    "Choice",
    "RecommendationCallback",
    "beam_pruning",
    "bootstrap_interval",
    "choose_weights",
    "coverage",
    "evaluate_recommendations",
    "per_user_metrics",
    "ranking_metrics",
    "ranks_of_targets",
]
