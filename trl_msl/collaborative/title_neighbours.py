# SPDX-License-Identifier: Apache-2.0
"""Neighbours of an item by the words of its title, which new items have, too."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from .item_neighbours import ItemNeighbours


_MOST_ITEMS = 1000  # of a word: more common ones say little, and have too many pairs of items


def title_neighbours(texts: Sequence[str], num_neighbours: int = 100, decay: float = 0.9) -> ItemNeighbours:
    """
    The items with the most similar titles, by the cosine of their words' TF-IDF vectors: other volumes of a series,
    other models of a brand. It needs no interactions.

    Args:
        texts (`Sequence[str]`):
            Title of each item. Words that more than 1,000 items have do not count.
        num_neighbours, decay (*optional*):
            As for [`ItemNeighbours.fit`].

    Raises:
        `ValueError`: if an argument is out of range, or no word is in two titles.

    Example:
    ```python
    >>> neighbours = title_neighbours(["Dragon School, Volume 1", "A Cook's Year", "Dragon School, Volume 2"])
    >>> neighbours.score([[0]]).items
    (tensor([2]),)

    ```
    """
    items_of_words = defaultdict(list)
    for item, text in enumerate(texts):
        for word in set(re.findall(r"\w+", text.lower())):
            items_of_words[word].append(item)
    # In a word's idf every item counts, and a word of all items would have none
    words = [items for items in items_of_words.values() if len(items) <= min(_MOST_ITEMS, len(texts) - 1)]
    if not any(len(items) > 1 for items in words):
        raise ValueError(f"`texts` of {len(texts)} items have no word in common: there are no neighbours by title.")
    weights = [math.log(len(texts) / len(items)) ** 2 for items in words]
    return ItemNeighbours.fit(words, range(len(words)), len(texts), num_neighbours, 0.0, decay, weights)


def add_titles(
    neighbours: ItemNeighbours,
    titles: ItemNeighbours | None,
    is_new: Tensor,
    title_weight: float = 0.0,
    new_title_weight: float = 0.0,
) -> ItemNeighbours:
    """
    Item-kNN that also knows new items: the similarity by users, plus `title_weight` times that by titles, plus
    `new_title_weight` times that by titles where the neighbour is new.

    Args:
        neighbours, titles ([`ItemNeighbours`]):
            Neighbours by users, whose `decay` is kept, and by titles: see [`title_neighbours`].
        is_new (`torch.Tensor` of shape `(num_items,)`):
            1 for each item that nobody has, else 0.
        title_weight, new_title_weight (`float`, *optional*, default to `0.0`):
            Weights, at least 0. With 0 for both, `titles` may be `None`.
    """
    if title_weight == new_title_weight == 0:
        return neighbours
    return neighbours.join(titles, title_weight + new_title_weight * is_new)
