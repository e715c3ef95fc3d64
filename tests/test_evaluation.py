# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import numpy as np
import pytest
from helpers import TITLES, make_model, make_windows
from transformers import MambaConfig
from trl import SFTConfig, SFTTrainer

from trl_msl import (
    ItemCatalog,
    MSLConfig,
    MSLTrainer,
    RankingTask,
    RecommendationCallback,
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
def rows(catalog, task):
    return build_rows(make_windows(catalog.ids, num_rows=9), task)


def test_metrics_are_those_of_the_ranking(model, task, catalog, rows):
    metrics, found = evaluate_recommendations(model, task, rows, ks=(2, 5), batch_size=4, return_recommendations=True)
    assert np.array_equal(found.items, recommend(model, task, rows["prompt"][:], top_k=5).items)
    expected = ranking_metrics(ranks_of_targets(found.items, np.array(catalog.indices(rows["item_id"]))), (2, 5))
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["ndcg@5_low"] <= metrics["ndcg@5"] <= metrics["ndcg@5_high"]
    assert (metrics["exact_rate"], metrics["invalid_rate"], metrics["num_rows"]) == (1, 0, 9)
    assert metrics["coverage"] == len(np.unique(found.items)) / len(catalog)


def test_items_with_the_same_text_follow_each_other_or_count_as_one(model, task, rows):
    found = recommend(model, task, rows["prompt"][:], top_k=task.trie.num_items)
    for user in found.items.tolist():
        assert user.index(6) == user.index(5) + 1  # "A History of Tea", twice
    second = rows.map(lambda row: {"item_id": "b6"})
    by_id = evaluate_recommendations(model, task, second, ks=(12,))
    by_text = evaluate_recommendations(model, task, second, ks=(12,), match="text")
    first = evaluate_recommendations(model, task, rows.map(lambda row: {"item_id": "b5"}), ks=(12,))
    assert by_text["mrr@12"] == first["mrr@12"] > by_id["mrr@12"]


def test_conversational_prompts(model, chat_task, catalog):
    rows = build_rows(make_windows(catalog.ids, num_rows=3), chat_task)
    metrics = evaluate_recommendations(model, chat_task, rows, ks=(5,))
    by_generate = evaluate_recommendations(model, chat_task, rows, ks=(5,), mode="generate", num_beams=12)
    assert metrics["ndcg@5"] == by_generate["ndcg@5"]
    assert (metrics["invalid_rate"], by_generate["invalid_rate"], by_generate["exact_rate"]) == (0, 0, 0)


def test_long_prompts_are_shortened_as_in_training(model, tokenizer, task, rows, template):
    short = rows.map(lambda row: {"prompt": template.render(row["history"][-1:])})
    longest = max(len(ids) for ids in encode_prompts(tokenizer, short["prompt"][:]))
    title_length = int(task.trie.item_lengths.double().mean())
    tight = replace(task, max_length=longest + title_length)
    found = evaluate_recommendations(model, tight, rows, ks=(5,))
    untouched = evaluate_recommendations(model, task, rows, ks=(5,))
    assert found != untouched
    with pytest.raises(ValueError, match="`max_length`: .* can't be shortened"):
        evaluate_recommendations(model, tight, rows.remove_columns("history"))


def test_catalogue_and_trie_belong_together(trie, catalog, tokenizer, template):
    reordered = ItemCatalog(catalog.ids, catalog.texts[::-1], template=catalog.template)
    for other in (reordered, ItemCatalog(["b0"], ["Dune"])):
        with pytest.raises(ValueError, match="`trie` .* does not hold the items of `catalog`"):
            RankingTask(other, tokenizer, template, trie=trie)


def test_bad_arguments(model, task, rows):
    with pytest.raises(ValueError, match="`match` is 'title'"):
        evaluate_recommendations(model, task, rows, match="title")
    with pytest.raises(ValueError, match=r"`rows` lacks the column\(s\) \['item_id'\]"):
        evaluate_recommendations(model, task, rows.remove_columns("item_id"))


def test_a_model_that_cannot_be_evaluated_is_found_before_the_training(tokenizer, task, rows, tmp_path):
    args = SFTConfig(tmp_path, max_steps=1, report_to="none", use_cpu=True, bf16=False, max_length=None)
    trainer = SFTTrainer(make_model(tokenizer, MambaConfig), args, train_dataset=rows, processing_class=tokenizer)
    trainer.add_callback(RecommendationCallback(trainer, rows, task))
    with pytest.raises(ValueError, match="MambaForCausalLM, can't run a tree of tokens"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_full_fine_tuning_in_bf16_is_evaluated_in_fp32(tokenizer, task, rows, tmp_path):
    """The trainer runs the model's forward under autocast; a deep model's own logits differ a lot then."""
    model = make_model(tokenizer, num_hidden_layers=8, hidden_size=128)
    args = MSLConfig(tmp_path, max_steps=1, report_to="none", use_cpu=True, bf16=True, save_strategy="no")
    trainer = MSLTrainer(model, args, train_dataset=rows, eval_dataset=rows, task=task)
    trainer.add_callback(RecommendationCallback(trainer, rows, ks=(5,)))
    trainer.train()
    found = trainer.evaluate()
    fp32 = make_model(tokenizer, num_hidden_layers=8, hidden_size=128)
    fp32.load_state_dict(model.state_dict())
    assert found["eval_ndcg@5"] == evaluate_recommendations(fp32, task, rows, ks=(5,))["ndcg@5"]
