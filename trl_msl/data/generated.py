# SPDX-License-Identifier: Apache-2.0
"""
A generated catalogue and log whose best possible NDCG is known.

The log is a first-order Markov chain over the items, so the true probability of every next item is known, and with
it the score of the best possible ranker: a model's NDCG can be read as a share of [`best_possible`].

```python
catalog = generate_catalog()  # {"0": "The Hidden Forest", "1": "The Hidden Forest: Book 2", ...}
transitions = generate_transitions(catalog)
windows = generate_windows(transitions)
best_possible(transitions, windows["test"])  # {"hr@5": ..., "ndcg@5": ..., "hr@10": ..., "ndcg@10": ...}
```
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from datasets import Dataset, DatasetDict


ADJECTIVES = (
    "Silent Hidden Golden Broken Distant Burning Frozen Crooked Sacred Scarlet Bitter Wandering Forgotten Northern "
    "Electric Paper Velvet Hollow Restless Crimson Secret Ancient Gentle Stolen Midnight Borrowed Savage Lonely Glass "
    "Iron Second Last"
)
NOUNS = (
    "River Garden House Crown Forest Mirror Harbor Tower Letter Orchard Empire Bridge Storm Winter Key Road Island "
    "Library Daughter Song Kingdom Lantern Promise Shore"
)
PLACES = "Lisbon Venice Kyoto Prague Cairo Havana Bergen Samarkand"
TOPICS = "Glass Salt Maps Silk Bread Clocks Gardens Bridges Numbers Tides Tea Light Stone Bees Ink Rain"
KINDS = "A History of, A Field Guide to, An Introduction to, The Art of, Notes on, Thinking in, How to Draw, Everyday"
SERIES_LENGTHS = (1, 2, 3, 4)  # volumes of a series; all four are equally frequent
DECAY = 0.6  # how likely each successor is, relative to the one before it


def generate_catalog(num_items: int = 150, seed: int = 0) -> dict[str, str]:
    """
    Make up distinct titles that share prefixes as real ones do.

    Titles come in series, whose volumes have consecutive ids: `"The Silent River"`, `"The Silent River: Book 2"`, and
    so on. Hence some titles are prefixes of others.

    Args:
        num_items (`int`, *optional*, defaults to `150`):
            Number of items.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the choice of series and of their lengths.

    Returns:
        `dict[str, str]`: Item id, from `"0"` to `str(num_items - 1)`, to title.
    """
    nouns = NOUNS.split()
    names = nouns + [f"{adjective} {noun}" for adjective, noun in product(ADJECTIVES.split(), nouns)]
    stems = names + [f"The {name}" for name in names]
    stems += [f"The {noun} of {place}" for noun, place in product(nouns, PLACES.split())]
    stems += [f"{kind} {topic}" for kind, topic in product(KINDS.split(", "), TOPICS.split())]
    rng = np.random.default_rng(seed)
    lengths = rng.permutation(np.resize(SERIES_LENGTHS, len(stems)))
    if not 1 <= num_items <= lengths.sum():
        raise ValueError(f"`num_items` is {num_items}: it must be from 1 to {lengths.sum()}, the number of titles.")
    titles = []
    for stem, length in zip(rng.permutation(stems).tolist(), lengths):
        titles += [stem] + [f"{stem}: Book {volume}" for volume in range(2, length + 1)]
    return {str(item): title for item, title in enumerate(titles[:num_items])}


def generate_transitions(
    catalog: dict[str, str], num_successors: int = 8, successor_mass: float = 0.85, seed: int = 0
) -> np.ndarray:
    """
    Make up how readers move from one item to the next.

    With probability `successor_mass` a reader moves on to one of `num_successors` likely items, whose weights are
    geometric, and otherwise to any item in proportion to its popularity (Zipf: `1 / popularity rank`). The likeliest
    is the next volume of the series, if there is one, which the title reveals. The others have to be memorised, but
    are drawn once for all volumes of a series.

    Args:
        catalog (`dict[str, str]`):
            Item id to title, from [`generate_catalog`].
        num_successors (`int`, *optional*, defaults to `8`):
            Number of likely successors of an item.
        successor_mass (`float`, *optional*, defaults to `0.85`):
            Probability of going on to one of them, less than 1: what remains keeps every item possible.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the popularity and of the successors.

    Returns:
        `numpy.ndarray` of shape `(num_items, num_items)`, float64: row `i` is the distribution of the item that
        follows item `i`. Rows sum to 1, the diagonal is 0.
    """
    num_items = len(catalog)
    if not 1 <= num_successors < num_items:
        raise ValueError(
            f"`num_successors` is {num_successors}: it must be at least 1 and less than {num_items}, the number of "
            "items. Change it or generate a larger catalogue."
        )
    if not 0.0 <= successor_mass < 1.0:
        raise ValueError(f"`successor_mass` is {successor_mass}: it must be at least 0 and less than 1.")
    rng = np.random.default_rng(seed)
    popularity = 1.0 / (1.0 + rng.permutation(num_items))

    _, series = np.unique([title.split(": ")[0] for title in catalog.values()], return_inverse=True)
    affinity = rng.random((series.max() + 1, num_items))[series]
    volumes = np.flatnonzero(series[:-1] == series[1:])
    affinity[volumes, volumes + 1] = 2.0  # the next volume comes before all others
    np.fill_diagonal(affinity, -1.0)
    successors = np.argsort(-affinity, axis=1)[:, :num_successors]

    transitions = np.tile(popularity, (num_items, 1))
    np.fill_diagonal(transitions, 0.0)
    transitions *= (1.0 - successor_mass) / transitions.sum(axis=1, keepdims=True)
    weights = DECAY ** np.arange(num_successors)
    transitions[np.arange(num_items)[:, None], successors] += successor_mass * weights / weights.sum()
    return transitions


def generate_windows(
    transitions: np.ndarray, num_users: int = 5000, history_length: tuple[int, int] = (3, 5), seed: int = 0
) -> DatasetDict:
    """
    Let users walk through the catalogue, and split their windows by time: 80% train, 10% validation, 10% test.

    No item occurs twice in a window: each next item is drawn from the row of the last one, restricted to the items not
    yet seen and renormalised. The first item is drawn from the mean of all rows.

    Args:
        transitions (`numpy.ndarray` of shape `(num_items, num_items)`):
            Transition matrix, from [`generate_transitions`].
        num_users (`int`, *optional*, defaults to `5000`):
            Number of users, with one window each.
        history_length (`tuple[int, int]`, *optional*, defaults to `(3, 5)`):
            Fewest and most items before the target; lengths are uniform between them.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the walks.

    Returns:
        `DatasetDict`: Splits `train`, `validation` and `test` of rows `{"user_id": str, "item_ids": list[str],
        "timestamp": int}`, in order of time, with items in order of time and the target last.
    """
    shortest, longest = history_length
    if not 1 <= shortest <= longest < len(transitions):
        raise ValueError(
            f"`history_length` is {history_length}: it must be (fewest, most) with 1 <= fewest <= most < "
            f"{len(transitions)}, the number of items. Change it or generate a larger catalogue."
        )
    if num_users < 10:
        raise ValueError(f"`num_users` is {num_users}: it must be at least 10, as a split would be empty otherwise.")
    rng = np.random.default_rng(seed)
    users = np.arange(num_users)
    unseen = np.ones((num_users, len(transitions)))
    steps = []
    for step in range(longest + 1):
        weights = unseen * (transitions[steps[-1]] if step else transitions.mean(axis=0))
        cumulative = weights.cumsum(axis=1)  # draw by inverting it: item j if cumulative[j-1] <= u < cumulative[j]
        steps.append((cumulative <= rng.random((num_users, 1)) * cumulative[:, -1:]).sum(axis=1))
        unseen[users, steps[-1]] = 0.0
    walks = np.stack(steps, axis=1).astype(str).tolist()
    lengths = rng.integers(shortest, longest, size=num_users, endpoint=True) + 1
    item_ids = [walk[:length] for walk, length in zip(walks, lengths)]
    timestamps = 1_700_000_000 + rng.integers(1, 3600, size=num_users).cumsum()
    windows = Dataset.from_dict({"user_id": users.astype(str), "item_ids": item_ids, "timestamp": timestamps})
    tenth = num_users // 10
    splits = {"train": users[: -2 * tenth], "validation": users[-2 * tenth : -tenth], "test": users[-tenth:]}
    return DatasetDict({name: windows.select(rows) for name, rows in splits.items()})


def best_possible(transitions: np.ndarray, windows: Dataset, ks: Sequence[int] = (5, 10)) -> dict[str, float]:
    """
    Metrics of the oracle: the ranking of all items by their true probability of coming next.

    Given a window's history, that probability is the row of its last item, without the items of the history, up to a
    constant. No ranker's metrics have a higher expectation, but on a finite sample one may be luckier.

    Args:
        transitions (`numpy.ndarray` of shape `(num_items, num_items)`):
            Transition matrix that the windows were generated from.
        windows (`Dataset`):
            A split of [`generate_windows`].
        ks (`Sequence[int]`, *optional*, defaults to `(5, 10)`):
            Cut-offs.

    Returns:
        `dict[str, float]`: `"hr@k"`, the share of the windows whose target has a 0-based rank below `k`, and
        `"ndcg@k"`, the mean of `1 / log2(rank + 2)` where it does and of 0 where it does not, for each `k`.
    """
    histories = [[int(item) for item in item_ids[:-1]] for item_ids in windows["item_ids"]]
    targets = np.array([int(item_ids[-1]) for item_ids in windows["item_ids"]])
    scores = transitions[[history[-1] for history in histories]]
    for row, history in zip(scores, histories):
        row[history] = -1.0  # below the items of probability 0
    ranks = (np.argsort(-scores, axis=1, kind="stable") == targets[:, None]).argmax(axis=1)
    metrics = {}
    for k in ks:
        metrics[f"hr@{k}"] = float((ranks < k).mean())
        metrics[f"ndcg@{k}"] = float(np.where(ranks < k, 1.0 / np.log2(ranks + 2.0), 0.0).mean())
    return metrics
