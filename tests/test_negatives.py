# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from helpers import make_model, make_windows, score_every_item

from trl_msl import ItemCatalog, RankingTask, build_rows
from trl_msl.data import encode_prompts
from trl_msl.softmax_dpo import build_preferences, count_interactions, draw_negatives, model_negatives, split_pairs


@pytest.fixture(scope="module")
def rows(catalog, task):
    return build_rows(make_windows(catalog.ids, 30), task)


def banned_texts(row, catalog):
    return {catalog.texts[index] for index in catalog.indices([row["item_id"], *row["history_ids"]])}


def check_allowed(drawn, rows, catalog, count):
    for row, items in zip(rows, drawn):
        texts = [catalog.texts[item] for item in items]
        assert len(items) == count and len(set(texts)) == count
        assert not set(texts) & banned_texts(row, catalog)


@pytest.mark.parametrize("source", ["uniform", "popular", "near"])
def test_neither_target_nor_history_nor_what_is_written_like_them(source, rows, catalog, task):
    popularity = np.arange(1, 13) if source == "popular" else None
    drawn = draw_negatives(rows, task, source, 4, popularity, seed=1)
    check_allowed(drawn, rows, catalog, 4)
    assert drawn == draw_negatives(rows, task, source, 4, popularity, seed=1)
    assert drawn != draw_negatives(rows, task, source, 4, popularity, seed=2)


def test_draws_follow_the_weights(tokenizer, template):
    catalog = ItemCatalog([str(i) for i in range(40)], [f"item {i}" for i in range(40)])
    task = RankingTask(catalog, tokenizer, template)
    rows = Dataset.from_dict({"item_id": ["0"] * 4000, "history_ids": [["1"]] * 4000})
    weights = np.array([5.0, 5.0, *range(38)])
    for source, expected in (("uniform", np.array([0, 0, *[1] * 38])), ("popular", np.array([0, 0, *range(38)]))):
        drawn = draw_negatives(rows, task, source, 1, weights if source == "popular" else None)
        shares = np.bincount(np.concatenate(drawn), minlength=40) / 4000
        np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.01)
    # All that may be drawn, when that many are asked for
    every = draw_negatives(rows.select([0]), task, "popular", 37, weights)
    assert sorted(every[0]) == list(range(3, 40))  # item 2 has no weight


def test_near_ones_share_the_longest_prefix(rows, catalog, task, trie):
    """Compared with counting the tokens that each pair of items shares."""
    paths = trie.paths(trie.item_nodes.long()).numpy()
    drawn = draw_negatives(rows, task, "near", 3)
    check_allowed(drawn, rows, catalog, 3)
    for row, items in zip(rows, drawn):
        target = catalog.indices([row["item_id"]])[0]
        shared = ((paths == paths[target]) & (paths >= 0)).sum(axis=1)
        banned = banned_texts(row, catalog)
        of_text = {text: shared[index] for index, text in enumerate(catalog.texts) if text not in banned}
        assert [shared[item] for item in items] == sorted(of_text.values(), reverse=True)[:3]


def test_the_models_own_mistakes(rows, catalog, task, trie, tokenizer):
    model = make_model(tokenizer)
    drawn = model_negatives(model, task, rows, num_negatives=4)
    check_allowed(drawn, rows, catalog, 4)
    scores = score_every_item(model, trie, encode_prompts(tokenizer, rows["prompt"][:5]))
    for row, items, score in zip(rows, drawn, scores):
        banned = banned_texts(row, catalog)
        of_text = {text: score[index] for index, text in enumerate(catalog.texts) if text not in banned}
        best = sorted(of_text, key=of_text.get, reverse=True)[:4]
        assert [catalog.texts[item] for item in items] == best


def test_too_few_are_counted(catalog, task, caplog):
    window = Dataset.from_list([{"item_ids": catalog.ids[:9]}, {"item_ids": catalog.ids[:2]}])
    rows = build_rows(window, task)
    drawn = draw_negatives(rows, task, "uniform", 6)
    assert [len(items) for items in drawn] == [3, 6]
    assert "1 of 2 rows have fewer than 6 negatives" in caplog.text
    rows = build_rows(Dataset.from_list([{"item_ids": catalog.ids}]), task)
    with pytest.raises(ValueError, match="1 of 1 have no item left to reject"):
        draw_negatives(rows, task)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "hard"}, "`source` is 'hard'"),
        ({"num_negatives": 0}, "`num_negatives` is 0"),
        ({"source": "popular"}, "`popularity` and source=.popular. belong together"),
        ({"source": "popular", "popularity": [1.0]}, "`popularity` must hold 12 finite numbers"),
    ],
)
def test_bad_arguments(arguments, message, rows, task):
    with pytest.raises(ValueError, match=message):
        draw_negatives(rows, task, **arguments)


def test_preference_rows_and_pairs(rows, catalog, task, chat_task):
    drawn = draw_negatives(rows, task, num_negatives=3)
    preferences = build_preferences(rows, task, drawn)
    assert preferences["chosen"][:] == rows["completion"][:]
    assert preferences[0]["rejected"] == [catalog.completions[item] for item in drawn[0]]
    pairs = split_pairs(preferences)
    assert pairs.column_names == ["prompt", "chosen", "rejected"] and len(pairs) == 90
    assert pairs["rejected"][:3] == preferences[0]["rejected"]
    assert pairs[5]["chosen"] == preferences[1]["chosen"]
    chat = build_rows(make_windows(catalog.ids, 3), chat_task)
    message = build_preferences(chat, chat_task, [[1], [2, 3], [4]])[1]["rejected"][0]
    assert message == [{"role": "assistant", "content": catalog.completions[2]}]
    with pytest.raises(ValueError, match="`negatives` has 1 entries for 30 rows"):
        build_preferences(rows, task, [[1]])
    with pytest.raises(ValueError, match="`rows` is empty: pass at least one row"):
        build_preferences(rows.select([]), task, [])


def test_counts(catalog):
    windows = Dataset.from_list([{"item_ids": ["b0", "b1"]}, {"item_ids": ["b1", "b3"]}])
    assert count_interactions(windows, catalog).tolist() == [1, 2, 0, 1, *[0] * 8]


def test_mistakes_of_a_catalogue_with_many_repeats(tokenizer, template):
    texts = [*["The Silent River"] * 4, *["Dune"] * 4, *["A History of Tea"] * 4, "Emma", "The Silver Key"]
    catalog = ItemCatalog(range(len(texts)), texts)
    task = RankingTask(catalog, tokenizer, template)
    rows = build_rows(Dataset.from_list([{"item_ids": ["12", "13"]}] * 3), task)
    drawn = model_negatives(make_model(tokenizer), task, rows, num_negatives=3)
    assert all({texts[item] for item in items} == set(texts[:12]) for items in drawn)
    shortened = model_negatives(make_model(tokenizer), replace(task, max_length=60), rows)
    assert shortened == drawn
