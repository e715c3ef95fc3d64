# SPDX-License-Identifier: Apache-2.0
"""Metrics, and measuring a model's ranking of the catalogue."""

from .choose_weights import Candidates, Choice, choose_weights
from .evaluate import RecommendationCallback, evaluate_recommendations
from .metrics import (
    bootstrap_interval,
    coverage,
    detectable_difference,
    per_user_metrics,
    ranking_metrics,
    ranks_of_targets,
)
from .pruning import beam_pruning
from .target_log_probs import TEMPERATURES, calibrate, mean_by_group, target_log_probs


__all__ = [
    "Candidates",
    "Choice",
    "RecommendationCallback",
    "TEMPERATURES",
    "beam_pruning",
    "bootstrap_interval",
    "calibrate",
    "choose_weights",
    "coverage",
    "detectable_difference",
    "evaluate_recommendations",
    "mean_by_group",
    "per_user_metrics",
    "ranking_metrics",
    "ranks_of_targets",
    "target_log_probs",
]
