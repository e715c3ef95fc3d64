# SPDX-License-Identifier: Apache-2.0
"""Scores of items from what users with similar histories chose, and from the words of titles. No model is needed."""

from .fusion import FUSION_FILE, WEIGHTS, Fusion, load_fusion
from .item_neighbours import ItemNeighbours, count_users
from .title_neighbours import add_titles, title_neighbours


__all__ = [
    "FUSION_FILE",
    "WEIGHTS",
    "Fusion",
    "ItemNeighbours",
    "add_titles",
    "count_users",
    "load_fusion",
    "title_neighbours",
]
