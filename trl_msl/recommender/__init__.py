# SPDX-License-Identifier: Apache-2.0
"""A trained model with its task, loaded from one folder or repository."""

from .loading import find_base, find_folder, find_task_folder, load_adapter, load_causal_lm, name_base_absolutely
from .recommender import Recommender
from .requests import AllowedItems, RecommendedItems


__all__ = [
    "AllowedItems",
    "RecommendedItems",
    "Recommender",
    "find_base",
    "find_folder",
    "find_task_folder",
    "load_adapter",
    "load_causal_lm",
    "name_base_absolutely",
]
