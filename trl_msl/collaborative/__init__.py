# SPDX-License-Identifier: Apache-2.0
"""Scores of items from what users with similar histories chose. This room knows only item indices."""

from .fusion import FUSION_FILE, WEIGHTS, Fusion, load_fusion
from .item_neighbours import ItemNeighbours, count_users


__all__ = ["FUSION_FILE", "WEIGHTS", "Fusion", "ItemNeighbours", "count_users", "load_fusion"]
