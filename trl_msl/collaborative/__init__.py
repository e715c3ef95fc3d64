# SPDX-License-Identifier: Apache-2.0
"""What users with similar histories chose, as scores of items. This room knows only item indices."""

from .item_neighbours import ItemNeighbours


__all__ = ["ItemNeighbours"]
