# SPDX-License-Identifier: Apache-2.0
"""A model's scores fused with popularity and neighbours, compared with the sum over all items; their file."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import make_model, make_windows
from safetensors import safe_open
from safetensors.torch import save_file
from test_scores import score_every_item

from trl_msl import ItemCatalog, Recommender, SparseBias, recommend
from trl_msl.collaborative import FUSION_FILE, Fusion, ItemNeighbours, count_users


HISTORIES = [["b0", "b4", "b9"], ["b3"], ["b7", "b2", "b11", "b8"], ["b5", "b1"]]


@pytest.fixture(scope="module")
def fusion(catalog) -> Fusion:
    windows = make_windows(catalog.ids, seed=3)
    sequences = [catalog.indices(ids) for ids in windows["item_ids"]]
    sequences = [[item for item in sequence if item != 10] for sequence in sequences]  # which nobody has
    users = [user % 15 for user in range(len(sequences))]
    return Fusion(count_users(sequences, users, 12), ItemNeighbours.fit(sequences, users, 12, 5), 0.4, 0.7, 3.0, 1.5)


@pytest.fixture(scope="module")
def recommender(task, fusion) -> Recommender:
    return Recommender(make_model(task.tokenizer), task, fusion)


@pytest.fixture(scope="module")
def expected(recommender, fusion, catalog) -> np.ndarray:
    """The fused score of every item for each of `HISTORIES`, item by item."""
    histories, neighbours = [catalog.indices(history) for history in HISTORIES], fusion.neighbours
    scores = score_every_item(recommender.model, recommender.task.trie, recommender._prompts(histories), 0.4)
    for row, history in zip(scores, histories):
        near = np.zeros(12)
        for age, item in enumerate(reversed(history)):
            places = range(*neighbours.offsets[item : item + 2].tolist())
            for place in places:
                near[neighbours.neighbours[place]] += 0.7**age * float(neighbours.similarities[place])
        for item in range(12):
            row[item] += 0.7 * math.log(1 + int(fusion.popularity[item])) + 3.0 * near[item] / near.max()
        row[10] += 1.5  # the item that nobody has
    return scores


def check(found, expected, catalog, k=12):
    """Whether these are the `k` best items by these scores, whatever the order of equal ones."""
    assert all(found.exact)
    for ids, scores, row in zip(found.ids, found.scores, expected, strict=True):
        np.testing.assert_allclose(scores, sorted(row[np.isfinite(row)], reverse=True)[:k], atol=1e-4)
        np.testing.assert_allclose(scores, row[catalog.indices(ids)], atol=1e-4)


def test_users_are_counted_once():
    assert count_users([[0, 1, 1], [0], [3]], ["a", "a", "b"], 5).tolist() == [1, 1, 0, 1, 0]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_recommendations_are_brute_force(batch_size, recommender, expected, catalog):
    everything = {"exclude_history": False, "batch_size": batch_size}
    check(recommender.recommend(HISTORIES, 12, **everything), expected, catalog)
    check(recommender.recommend(HISTORIES, 3, **everything), expected, catalog, 3)
    without = np.array(expected)
    for row, history in zip(without, HISTORIES):  # b5 and b6 share a text
        row[[*catalog.indices(history), *([6] if "b5" in history else [])]] = -np.inf
    check(recommender.recommend(HISTORIES, 12, batch_size=batch_size), without, catalog)


@pytest.mark.parametrize("kind", ["shared", "prepared", "users", "sparse", "function"])
def test_a_bias_of_the_caller_is_added(kind, recommender, expected, catalog):
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(5, 12)).astype(np.float32)
    dense[:, 3] = -np.inf
    if kind in ("shared", "prepared"):
        dense[:] = dense[0]
    decoder = recommender.prepare_allowed(None).decoder
    bias = {
        "shared": lambda: dense[0],
        "prepared": lambda: decoder.prepare_item_bias(torch.tensor(dense[0])),
        "users": lambda: dense,
        "sparse": lambda: SparseBias([range(1, 12)] * 5, dense[:, 1:], dense[:, 0]),
        "function": lambda: lambda users: torch.tensor(dense)[users],
    }[kind]()
    found = recommender.recommend(
        [*HISTORIES[:2], [], *HISTORIES[2:]], 12, False, popular_without_history=True, item_bias=bias, batch_size=2
    )
    # The user without history
    counts = recommender.fusion.popularity
    share = ((1 + counts) / (12 + counts.sum())).log().numpy() + dense[2]
    assert found.exact.pop(2) and catalog.index_of_id["b3"] == 3
    items, scores = catalog.indices(found.ids.pop(2)), found.scores.pop(2)
    assert sorted(items) == [item for item in range(12) if item != 3]
    np.testing.assert_allclose(scores, sorted(share[np.isfinite(share)], reverse=True), atol=1e-5)
    np.testing.assert_allclose(scores, share[items], atol=1e-5)
    check(found, expected + dense[[0, 1, 3, 4]], catalog)


def test_part_of_the_weights(recommender, fusion, task, catalog):
    """What is added, also where it takes less than a matrix."""
    histories = [catalog.indices(history) for history in HISTORIES]
    prompts, model = recommender._prompts(histories), recommender.model
    near = fusion.neighbour_scores(histories)
    near = SparseBias(near.items, [2.0 * row for row in near.values])
    popularity = -0.5 * (1 + fusion.popularity).log()
    for weights, score in (
        ((0.0, 0.0, 0.0), {}),
        ((0.5, 0.0, 0.0), {"vocab_weight": 0.5}),
        ((0.0, -0.5, 0.0), {"item_bias": popularity}),
        ((0.0, 0.0, 2.0), {"item_bias": near}),
        ((0.0, 0.0, 0.0, -2.0), {"item_bias": torch.tensor([0.0] * 10 + [-2.0, 0.0])}),
    ):
        arguments = Fusion(fusion.popularity, fusion.neighbours, *weights).arguments(histories)
        found, expected = (recommend(model, task, prompts, 12, **kwargs) for kwargs in (arguments, score))
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
        assert np.array_equal(found.items, expected.items)


@pytest.mark.parametrize(("age", "largest"), [(400, 1.0), (3000, 0.0)])
def test_only_old_items_have_neighbours(age, largest, fusion):
    """So old that their weights are 0 in fp32, or even in fp64."""
    scores = fusion.neighbour_scores([[0] + [10] * age, [0]])
    assert len(scores.items[0]) == len(scores.items[1]) > 0
    assert scores.values[0].max() == largest and scores.values[1].max() == 1.0


def test_a_bias_prepared_for_another_catalogue(recommender):
    bias = recommender.prepare_allowed(None).decoder.prepare_item_bias([0.0] * 12)
    updated = recommender.update(add=ItemCatalog(["n0"], ["The Silent Wood"]))
    with pytest.raises(ValueError, match="`item_bias` was prepared by another `TrieDecoder`: prepare it with this"):
        updated.recommend(HISTORIES, item_bias=bias)


def test_the_model_alone(recommender, task, catalog):
    alone = Recommender(recommender.model, task)
    expected = alone.recommend(HISTORIES, 5, vocab_weight=0.2)
    assert recommender.recommend(HISTORIES, 5, vocab_weight=0.2, fused=False) == expected
    # A caller's weight replaces the fusion's
    without = dataclasses.replace(recommender.fusion, vocab_weight=0.0)
    expected = Recommender(recommender.model, task, without).recommend(HISTORIES, 5)
    assert recommender.recommend(HISTORIES, 5, vocab_weight=0.0) == expected
    for mode in ("beam", "generate"):
        with pytest.raises(ValueError, match=f"`mode` is '{mode}', but only exact search .*fused=False"):
            recommender.recommend(HISTORIES, mode=mode)
    assert recommender.recommend(HISTORIES, 3, mode="beam", fused=False).ids


def test_users_without_history(recommender, fusion, task, catalog):
    counts = fusion.popularity.tolist()
    order = sorted(range(12), key=lambda item: (-counts[item], item))
    withdrawn = recommender.update(withdraw=[catalog.ids[order[0]]])
    for histories in ([[]], [["b3"], [], ["b0", "b4"], []]):
        found = recommender.recommend(histories, 4, popular_without_history=True)
        other = recommender.recommend([history for history in histories if history] or [["b1"]], 4)
        for history, ids, scores in zip(histories, found.ids, found.scores):
            if history:
                assert (ids, scores) == (other.ids.pop(0), pytest.approx(other.scores.pop(0), abs=1e-5))
            else:
                assert ids == [catalog.ids[item] for item in order[:4]]
                share = [math.log((1 + counts[item]) / (12 + sum(counts))) for item in order[:4]]
                assert scores == pytest.approx(share, abs=1e-6)
        assert all(found.exact)
        found = withdrawn.recommend(histories, 4, popular_without_history=True)
        assert found.ids[histories.index([])] == [catalog.ids[item] for item in order[1:5]]
        for some in ("b10", "b2"), recommender.prepare_allowed(["b10", "b2"]):
            found = recommender.recommend(histories, 4, allowed=some, popular_without_history=True)
            assert found.ids[histories.index([])] == ["b2", "b10"]
    with pytest.raises(ValueError, match="`histories`: 1 of 1 are empty.*popular_without_history=True"):
        recommender.recommend([[]])
    with pytest.raises(ValueError, match="`popular_without_history` is True, but there is no `fusion`"):
        Recommender(recommender.model, task).recommend([[]], popular_without_history=True)


def test_items_added_without_training(recommender, fusion):
    updated = recommender.update(add=ItemCatalog(["n0", "n1"], ["The Silent Wood", "A History of Ink"]))
    assert updated.fusion.popularity.tolist() == [*fusion.popularity.tolist(), 0, 0]
    found = updated.recommend([*HISTORIES, ["n1"]], 14, exclude_history=False)
    assert all(sorted(ids) == sorted(updated.task.catalog.ids) for ids in found.ids)
    assert recommender.update(withdraw=["b3"]).fusion.fingerprint() == fusion.fingerprint()
    with pytest.raises(ValueError, match="`fusion` has 12 items, the catalogue of `task` has 14"):
        Recommender(recommender.model, updated.task, fusion)


# ---------------------------------------------------------------------- storage


def test_saved_beside_the_model(recommender, task, tmp_path):
    recommender.save_pretrained(tmp_path)
    loaded = Recommender.from_pretrained(tmp_path)
    assert loaded.fusion.fingerprint() == recommender.fusion.fingerprint()
    assert loaded.recommend(HISTORIES, 5) == recommender.recommend(HISTORIES, 5)
    assert {path.name for path in tmp_path.glob("fusion*")} == {FUSION_FILE}
    Recommender(recommender.model, task).save_pretrained(tmp_path)
    assert Recommender.from_pretrained(tmp_path).fusion is None


@pytest.mark.parametrize("kind", ["whole", "popularity alone", "no neighbours", "other numbers"])
def test_read_as_written(kind, fusion, tmp_path):
    if kind == "popularity alone":
        fusion = Fusion(fusion.popularity, popularity_weight=1 / 3)
    if kind == "no neighbours":
        fusion = Fusion(fusion.popularity, ItemNeighbours.fit([[0]], ["a"], 12), neighbour_weight=1.0)
    if kind == "other numbers":
        neighbours = ItemNeighbours.fit([[0, 1]], ["a"], 12, decay=1)
        fusion = Fusion(fusion.popularity, neighbours, np.float64(0.5), np.float32(0.1), 2)
    fusion.save_pretrained(tmp_path)
    found = Fusion.from_pretrained(tmp_path, 12)
    assert repr(found) == repr(fusion) or kind == "other numbers"
    assert found.fingerprint() == fusion.fingerprint()
    assert torch.equal(found.popularity, fusion.popularity)
    with pytest.raises(ValueError, match="has 12 items, the catalogue has 13"):
        Fusion.from_pretrained(tmp_path, 13)


def test_a_file_that_is_damaged(fusion, tmp_path):
    fusion.save_pretrained(tmp_path)
    path, error = tmp_path / FUSION_FILE, "does not hold a readable fusion.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-3], content[:10], b"", b"[1]", content[::-1]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=error):
            Fusion.from_pretrained(tmp_path, 12)
    for place in range(8, len(content)):  # after the header's length, a change of which the reader finds itself
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            found = Fusion.from_pretrained(tmp_path, 12)
        except ValueError as raised:
            assert error in str(raised)
        else:  # a name of padding, say
            assert found.fingerprint() == fusion.fingerprint()
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="fusion.safetensors is not a regular file"):
        Fusion.from_pretrained(tmp_path, 12)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"popularity": torch.zeros(12)}, "`popularity` is torch.float32"),
        ({"popularity": torch.full((12,), -1)}, "at least 0"),
        ({"popularity": torch.zeros(11, dtype=torch.int64)}, "has 12 items, `popularity` has 11"),
        ({"neighbours": torch.tensor([12] * 3).int()}, "do not fit together"),
        ({"similarities": torch.ones(3, dtype=torch.float64)}, "`similarities` is torch.float64"),
        ({"offsets": None}, "offsets"),
        ({"vocab_weight": "-1.0"}, "`vocab_weight` is -1.0"),
        ({"neighbour_weight": "nan"}, "`neighbour_weight` is nan"),
        ({"popularity_weight": None}, "popularity_weight"),
        ({"popularity_weight": "much"}, "much"),
        ({"decay": "2.0"}, "`decay` is 2.0"),
        ({"decay": None}, "`neighbours` is None"),
        ({"format": "2"}, "its format is 2, this version reads 1"),
        ({"sha256": None}, "its checksum differs"),
        ({"vocab_weight": "0.5"}, "its checksum differs"),
    ],
)
def test_a_file_from_elsewhere(change, error, fusion, tmp_path):
    fusion.save_pretrained(tmp_path)
    with safe_open(tmp_path / FUSION_FILE, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, value in change.items():
        content = tensors if name in tensors else header
        content[name] = value
        if value is None:
            del content[name]
    save_file(tensors, tmp_path / FUSION_FILE, metadata=header)
    with pytest.raises(ValueError, match=error):
        Fusion.from_pretrained(tmp_path, 12)


def test_bad_arguments(fusion):
    counts = fusion.popularity
    for kwargs, error in (
        ({"popularity_weight": math.inf}, "`popularity_weight` is inf: it must be a finite number"),
        ({"vocab_weight": -0.1}, "`vocab_weight` is -0.1: it must be at least 0"),
        ({"neighbour_weight": 1.0}, "`neighbour_weight` is 1.0, but `neighbours` is None"),
        ({"neighbours": fusion.neighbours.extend(13)}, "`neighbours` has 13 items"),
    ):
        with pytest.raises(ValueError, match=error):
            Fusion(counts, **kwargs)
