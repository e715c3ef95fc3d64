# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from helpers import TITLES, make_model, make_windows
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from trl_msl import (
    ItemCatalog,
    ItemTrie,
    PromptTemplate,
    build_rows,
    encode_prompts,
    evaluate_recommendations,
    ranking_metrics,
    ranks_of_targets,
    recommend,
)


NUM_TEXTS = len(set(TITLES))


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture(scope="module")
def rows(catalog, template):
    return build_rows(make_windows(catalog.ids, num_rows=9), catalog, template)


@torch.no_grad()
def score_every_item(model, tokenizer, trie, prompts) -> np.ndarray:
    """Restricted log-probability of every item for every prompt, one teacher-forced forward each."""
    scores = np.zeros((len(prompts), trie.num_items))
    for user, prompt in enumerate(encode_prompts(tokenizer, prompts)):
        for item in range(trie.num_items):
            path = trie.paths(trie.item_nodes[item : item + 1])[0]
            tokens = trie.tokens(path).tolist()
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 :]
            for row, node in zip(logits, path.tolist()):
                parent = int(trie.parents(torch.tensor(node)))
                valid = trie.tokens(torch.tensor(list(trie.children(parent))))
                scores[user, item] += float(row[int(trie.tokens(torch.tensor(node)))] - row[valid].logsumexp(0))
    return scores


def test_with_beams_for_every_text_the_ranking_is_that_of_brute_force(model, tokenizer, trie, rows):
    found = recommend(model, tokenizer, trie, rows["prompt"][:], top_k=trie.num_items, batch_size=4)
    scores = score_every_item(model, tokenizer, trie, rows["prompt"][:])
    for user in range(len(rows)):
        order = sorted(range(trie.num_items), key=lambda item: (-round(scores[user, item], 4), item))
        assert found.items[user].tolist() == order
        np.testing.assert_allclose(found.scores[user], scores[user, order], atol=1e-4)
    assert found.num_invalid == 0


def test_metrics_are_those_of_the_ranking(model, tokenizer, trie, catalog, rows):
    metrics = evaluate_recommendations(model, tokenizer, trie, catalog, rows, ks=(2, 5), batch_size=4)
    found = recommend(model, tokenizer, trie, rows["prompt"][:], top_k=5)
    expected = ranking_metrics(ranks_of_targets(found.items, np.array(catalog.indices(rows["item_id"]))), (2, 5))
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["ndcg@5_low"] <= metrics["ndcg@5"] <= metrics["ndcg@5_high"]
    assert (metrics["invalid_rate"], metrics["num_rows"]) == (0, 9)
    assert metrics["coverage"] == len(np.unique(found.items)) / len(catalog)


def test_batches_prompts_lengths_and_wrapping_do_not_matter(model, tokenizer, trie, rows):
    prompts = rows["prompt"][:]
    whole = recommend(model, tokenizer, trie, prompts, top_k=4, batch_size=16)
    single = recommend(model, tokenizer, trie, prompts, top_k=4, batch_size=1)
    wrapped = get_peft_model(make_model(tokenizer), LoraConfig(task_type="CAUSAL_LM"))
    adapter = recommend(wrapped, tokenizer, trie, prompts, top_k=4)  # a new adapter changes nothing
    for other in (single, adapter):
        assert np.array_equal(whole.items, other.items)
        np.testing.assert_allclose(whole.scores, other.scores, atol=1e-4)


def test_the_models_own_generation_settings_are_not_used_and_not_lost(tokenizer, trie, rows):
    model = make_model(tokenizer).train()
    expected = recommend(model, tokenizer, trie, rows["prompt"][:], top_k=4)
    model.generation_config = GenerationConfig(repetition_penalty=5.0, do_sample=True, top_k=1, max_new_tokens=2)
    found = recommend(model, tokenizer, trie, rows["prompt"][:], top_k=4)
    assert np.array_equal(found.items, expected.items)
    assert model.training
    assert model.generation_config.repetition_penalty == 5.0


def test_greedy_search_is_a_beam_of_one(model, tokenizer, trie, rows):
    found = recommend(model, tokenizer, trie, rows["prompt"][:], top_k=1)
    scores = score_every_item(model, tokenizer, trie, rows["prompt"][:])
    for user, (item,) in enumerate(found.items):
        assert found.scores[user, 0] == pytest.approx(scores[user, item], abs=1e-4)


def test_items_with_the_same_text_follow_each_other_or_count_as_one(model, tokenizer, trie, catalog, rows):
    found = recommend(model, tokenizer, trie, rows["prompt"][:], top_k=trie.num_items)
    for user in found.items.tolist():
        assert user.index(6) == user.index(5) + 1  # "A History of Tea", twice
    second = rows.map(lambda row: {"item_id": "b6"})
    by_id = evaluate_recommendations(model, tokenizer, trie, catalog, second, ks=(12,))
    by_text = evaluate_recommendations(model, tokenizer, trie, catalog, second, ks=(12,), match="text")
    first = evaluate_recommendations(
        model, tokenizer, trie, catalog, rows.map(lambda row: {"item_id": "b5"}), ks=(12,)
    )
    assert by_text["mrr@12"] == first["mrr@12"] > by_id["mrr@12"]


def test_conversational_prompts(model, tokenizer, chat_trie, catalog, template):
    chat = PromptTemplate(template.text, conversational=True)
    rows = build_rows(make_windows(catalog.ids, num_rows=3), catalog, chat)
    metrics = evaluate_recommendations(model, tokenizer, chat_trie, catalog, rows, ks=(5,))
    assert metrics["invalid_rate"] == 0


def test_long_prompts_are_shortened_as_in_training(model, tokenizer, trie, catalog, rows, template):
    short = rows.map(lambda row: {"prompt": template.render(row["history"][-1:])})
    longest = max(len(ids) for ids in encode_prompts(tokenizer, short["prompt"][:]))
    title_length = int(trie.item_lengths.double().mean())
    settings = {"max_length": longest + title_length, "prompt_template": template}
    found = evaluate_recommendations(model, tokenizer, trie, catalog, rows, ks=(5,), **settings)
    untouched = evaluate_recommendations(model, tokenizer, trie, catalog, rows, ks=(5,))
    assert found != untouched
    with pytest.raises(ValueError, match="`max_length`: .* can't be shortened"):
        evaluate_recommendations(model, tokenizer, trie, catalog, rows, max_length=longest + title_length)


def test_items_must_end_and_catalogue_and_trie_belong_together(model, tokenizer, trie, catalog, rows):
    prompts = rows["prompt"][:]
    with pytest.raises(ValueError, match="append an end token"):
        recommend(model, tokenizer, ItemTrie.from_sequences([[5, 6], [6, 5]]), prompts, top_k=1)
    with pytest.raises(ValueError, match="append an end token"):
        recommend(model, tokenizer, ItemTrie.from_sequences([[5], [5, 6]]), prompts, top_k=1)
    reordered = ItemCatalog(catalog.ids, catalog.texts[::-1], template=catalog.template)
    with pytest.raises(ValueError, match="do not belong together"):
        evaluate_recommendations(model, tokenizer, trie, reordered, rows)


def test_token_ids_as_prompts(model, tokenizer, trie, rows):
    texts = recommend(model, tokenizer, trie, rows["prompt"][:], top_k=3)
    ids = recommend(model, tokenizer, trie, encode_prompts(tokenizer, rows["prompt"][:]), top_k=3)
    assert np.array_equal(texts.items, ids.items)


def test_bad_arguments(model, tokenizer, trie, catalog, rows):
    prompts = rows["prompt"][:]
    with pytest.raises(ValueError, match="`top_k` is 13: it must lie between 1 and the number of items, 12"):
        recommend(model, tokenizer, trie, prompts, top_k=13)
    with pytest.raises(ValueError, match="`num_beams` is 3: it must be at least `top_k` = 5"):
        recommend(model, tokenizer, trie, prompts, top_k=5, num_beams=3)
    with pytest.raises(ValueError, match="`prompts` is empty"):
        recommend(model, tokenizer, trie, [])
    with pytest.raises(ValueError, match="`match` is 'title'"):
        evaluate_recommendations(model, tokenizer, trie, catalog, rows, match="title")
    with pytest.raises(ValueError, match=r"`rows` lacks the column\(s\) \['item_id'\]"):
        evaluate_recommendations(model, tokenizer, trie, catalog, rows.remove_columns("item_id"))
    with pytest.raises(ValueError, match="`catalog` with 1 items and `trie` with 12 do not belong together"):
        evaluate_recommendations(model, tokenizer, trie, ItemCatalog(["b0"], ["Dune"]), rows)
