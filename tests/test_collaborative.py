# SPDX-License-Identifier: Apache-2.0
"""Item-kNN: neighbours and scores, compared with what they are by definition."""

import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_msl.collaborative import ItemNeighbours, add_titles, item_neighbours, title_neighbours


NUM_ITEMS = 9
WINDOWS = st.lists(
    st.tuples(st.integers(0, 4), st.lists(st.integers(0, NUM_ITEMS - 2), min_size=1, max_size=6)),
    min_size=1, max_size=12,
)  # fmt: skip


def similarities(windows, shrinkage):
    """All of them, by definition."""
    sets = {}
    for user, items in windows:
        sets.setdefault(user, set()).update(items)
    counts = Counter(item for items in sets.values() for item in items)
    common = Counter(pair for items in sets.values() for pair in combinations(sorted(items), 2))
    found = np.zeros((NUM_ITEMS, NUM_ITEMS))
    for (i, j), number in common.items():
        found[i, j] = found[j, i] = number / ((counts[i] ** 0.5 + shrinkage) * (counts[j] ** 0.5 + shrinkage))
    return found


def rows_of(neighbours):
    ends = neighbours.offsets.tolist()
    items, values = neighbours.neighbours.tolist(), neighbours.similarities.tolist()
    return [dict(zip(items[a:b], values[a:b])) for a, b in zip(ends, ends[1:])]


def dense(bias, num_users):
    scores = np.zeros((num_users, NUM_ITEMS))
    for user, (items, values) in enumerate(zip(bias.items, bias.values)):
        scores[user, items.numpy()] = values.numpy()
    return scores


@pytest.mark.parametrize("pairs", [1, 7, 1 << 23])
@settings(max_examples=60, deadline=None)
@given(WINDOWS, st.integers(1, NUM_ITEMS), st.sampled_from([0.0, 5**0.5]))
def test_neighbours_are_the_most_similar_items(pairs, windows, num_neighbours, shrinkage):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_neighbours, "_PAIRS", pairs)
        found = ItemNeighbours.fit(
            [items for _, items in windows], [f"u{user}" for user, _ in windows], NUM_ITEMS, num_neighbours, shrinkage
        )
    for row, expected in zip(rows_of(found), similarities(windows, shrinkage), strict=True):
        best = sorted((-value, item) for item, value in enumerate(expected) if value > 0)[:num_neighbours]
        assert list(row) == [item for _, item in best]
        np.testing.assert_allclose(list(row.values()), [-value for value, _ in best], rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    WINDOWS,
    st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), max_size=5), min_size=1, max_size=4),
    st.sampled_from([0.5, 0.7, 1.0]),
)
def test_scores_are_weighted_sums_of_similarities(windows, histories, decay):
    found = ItemNeighbours.fit([items for _, items in windows], [user for user, _ in windows], NUM_ITEMS, decay=decay)
    table, expected = similarities(windows, 5**0.5), np.zeros((len(histories), NUM_ITEMS))
    for user, history in enumerate(histories):
        for age, item in enumerate(reversed(history)):
            expected[user] += decay**age * table[item]
    bias = found.score(histories)
    np.testing.assert_allclose(dense(bias, len(histories)), expected, rtol=1e-6)
    assert bias.default == 0.0 and all((row > 0).all() for row in bias.values)
    for user, history in enumerate(histories):  # alone as in the batch, to the last bit
        alone = found.score([history])
        assert torch.equal(alone.items[0], bias.items[user]) and torch.equal(alone.values[0], bias.values[user])


@pytest.mark.parametrize("pairs", [1, 1 << 23])
def test_neighbours_by_vectors(pairs, monkeypatch):
    monkeypatch.setattr(item_neighbours, "_PAIRS", pairs)
    vectors = torch.randn(NUM_ITEMS, 4, generator=torch.Generator().manual_seed(0))
    vectors[5] = 0.0
    cosines = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    for item, row in enumerate(rows_of(ItemNeighbours.from_vectors(vectors, num_neighbours=3))):
        best = sorted(
            ((-value, other) for other, value in enumerate(cosines[item].tolist()) if value > 0 and other != item)
        )[:3]
        assert list(row) == [other for _, other in best]
        np.testing.assert_allclose(list(row.values()), [-value for value, _ in best], rtol=1e-5)
        assert 5 not in row and not (item == 5 and row)


TITLES = ["Dragon School: The Prince (Volume 3)", "dragon school, Initiate (Volume 2)", "A Cook's Year", "The Prince",
          "Emma", "", "Volume 2: a year", "the year of the Dragon"]  # fmt: skip


@pytest.mark.parametrize("most_items", [1000, 2])
def test_neighbours_by_titles(most_items, monkeypatch):
    """The cosine of TF-IDF vectors, by definition."""
    monkeypatch.setitem(title_neighbours.__globals__, "_MOST_ITEMS", most_items)
    sets = [set(re.findall(r"\w+", title.lower())) for title in TITLES]
    counts = Counter(word for words in sets for word in words)
    words = sorted(word for word, count in counts.items() if count <= most_items)
    assert ("the" in words) == (most_items > 2)
    idf = np.array([np.log(len(TITLES) / counts[word]) for word in words])
    vectors = np.array([[word in of_item for word in words] for of_item in sets]) * idf
    norms = np.maximum(np.linalg.norm(vectors, axis=1), 1e-9)
    cosines = (vectors @ vectors.T) / np.outer(norms, norms)
    found = rows_of(title_neighbours(TITLES))
    for item, row in enumerate(found):
        expected = {other: value for other, value in enumerate(cosines[item]) if value > 0 and other != item}
        assert row == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="`texts` of 3 items have no word in common"):
        title_neighbours(["a", "b", "c"])


@settings(max_examples=40, deadline=None)
@given(WINDOWS, WINDOWS, st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=NUM_ITEMS, max_size=NUM_ITEMS))
def test_neighbours_of_two_kinds_are_added(windows, others, weights):
    one, other = (
        ItemNeighbours.fit([items for _, items in some], [user for user, _ in some], NUM_ITEMS, 3, decay=decay)
        for some, decay in ((windows, 0.5), (others, 0.9))
    )
    joined = one.join(other, torch.tensor(weights))
    assert joined.decay == 0.5
    for row, first, second in zip(rows_of(joined), rows_of(one), rows_of(other), strict=True):
        second = {item: weights[item] * value for item, value in second.items() if weights[item]}
        expected = {item: first.get(item, 0) + second.get(item, 0) for item in {*first, *second}}
        assert row == pytest.approx(expected) and list(row.values()) == sorted(row.values(), reverse=True)


def test_titles_are_added_to_users():
    """Item 7, which nobody has, becomes a neighbour only by its title."""
    by_users = ItemNeighbours.fit([[0, 1], [1, 2]], ["a", "b"], len(TITLES), shrinkage=0.0)
    titles, is_new = title_neighbours(TITLES), torch.tensor([0.0, 0, 0, 1, 1, 1, 1, 1])
    old, new = (rows_of(add_titles(by_users, titles, is_new, *weights))[0] for weights in ((0.1, 0.0), (0.1, 0.4)))
    similar = rows_of(titles)[0]
    assert rows_of(by_users)[0].keys() == {1} and old[1] == pytest.approx(2**-0.5 + 0.1 * similar[1])
    assert old[7] == pytest.approx(0.1 * similar[7]) and new[7] == pytest.approx(0.5 * similar[7])
    assert new[1] == old[1] and add_titles(by_users, None, is_new) is by_users
    with pytest.raises(ValueError, match="`other` has 8 items and `weights` 3"):
        by_users.join(titles, torch.ones(3))
    with pytest.raises(ValueError, match="`weights` must hold finite numbers, at least 0"):
        by_users.join(titles, -is_new)


def test_nobody_has_two_items():
    for sequences in ([], [[0], [2, 2]]):
        found = ItemNeighbours.fit(sequences, range(len(sequences)), NUM_ITEMS)
        assert rows_of(found) == [{}] * NUM_ITEMS and not len(found.score([[0, 2]]).items[0])


def test_more_neighbours_than_fp32_can_count():
    total = 2**24 + 1
    parts = torch.zeros(total, dtype=torch.uint8), torch.zeros(1).expand(total), torch.ones(1).expand(total)
    assert ItemNeighbours._from_parts([parts], 2, 1.0).offsets.tolist() == [0, total, total]


def test_a_catalogue_that_has_grown():
    found = ItemNeighbours.fit([[0, 1], [1, 2]], ["a", "b"], 3)
    grown = found.extend(5)
    assert rows_of(grown) == [*rows_of(found), {}, {}]
    assert torch.equal(grown.score([[1, 4]]).items[0], found.score([[1]]).items[0])


def test_bad_arguments():
    fit = {"sequences": [[0, 1]], "users": ["a"], "num_items": 2}
    for change, error in (
        ({"users": ["a", "b"]}, "`users` has 2 entries for 1 sequences"),
        ({"num_items": 1}, "`sequences` hold items 0 to 1, but .* 0 to 0"),
        ({"num_neighbours": 0}, "`num_neighbours` is 0"),
        ({"shrinkage": -1.0}, "`shrinkage` is -1.0"),
        ({"decay": 0.0}, "`decay` is 0.0: it must be above 0"),
        ({"decay": float("nan")}, "`decay` is nan"),
        ({"weights": [0.0]}, "`weights` has 1 entries for 1 users: pass one above 0 for each"),
    ):
        with pytest.raises(ValueError, match=error):
            ItemNeighbours.fit(**fit | change)
    for vectors in (torch.zeros(3), torch.full((3, 2), torch.nan)):
        with pytest.raises(ValueError, match="`vectors` has shape"):
            ItemNeighbours.from_vectors(vectors)
    with pytest.raises(ValueError, match="`histories` hold items -1 to 0"):
        ItemNeighbours.fit(**fit).score([[0, -1]])
    good = {
        "offsets": torch.tensor([0, 1, 2]),
        "neighbours": torch.tensor([1, 0]).int(),
        "similarities": torch.ones(2),
        "decay": 1.0,
    }
    ItemNeighbours(**good)
    for name, value, error in (
        ("offsets", torch.tensor([0, 1, 2]).int(), "`offsets` is torch.int32"),
        ("offsets", torch.tensor([0, 2, 1]), "do not fit"),
        ("offsets", torch.tensor([0, 3, 2]), "do not fit"),
        ("offsets", torch.tensor([1, 1, 2]), "do not fit"),
        ("offsets", torch.tensor([2]), "do not fit"),
        ("offsets", torch.tensor([0, 2**63 - 1, -(2**63), -1, 2]), "do not fit"),
        ("neighbours", torch.tensor([2, 0]).int(), "`neighbours` must hold item indices"),
        ("neighbours", torch.tensor([-1, 0]).int(), "`neighbours` must hold item indices"),
        ("similarities", torch.ones(3), "do not fit"),
        ("similarities", torch.tensor([1.0, torch.inf]), "finite numbers above 0"),
        ("similarities", torch.tensor([1.0, 0.0]), "finite numbers above 0"),
    ):
        with pytest.raises(ValueError, match=error):
            ItemNeighbours(**good | {name: value})
