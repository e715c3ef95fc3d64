# SPDX-License-Identifier: Apache-2.0
"""Metrics, and measuring a model's ranking of the catalogue."""

from .choose_weights import Candidates, Choice, choose_weights
from .evaluate import RecommendationCallback, evaluate_recommendations
from .metrics import bootstrap_interval, coverage, per_user_metrics, ranking_metrics, ranks_of_targets
from .pruning import beam_pruning
from .significance import detectable_difference, holm, sign_flip_p_value
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
    "holm",
    "mean_by_group",
    "per_user_metrics",
    "ranking_metrics",
    "ranks_of_targets",
    "sign_flip_p_value",
    "target_log_probs",
]
