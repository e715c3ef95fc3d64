# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import numpy as np
import pytest
from helpers import TITLES, make_model, make_windows
from peft import LoraConfig
from transformers import MambaConfig
from trl import SFTConfig, SFTTrainer

from trl_msl import (
    ItemCatalog,
    MSLConfig,
    MSLTrainer,
    RankingTask,
    RecommendationCallback,
    TrieDecoder,
    build_rows,
    evaluate_recommendations,
    recommend,
)
from trl_msl.data import encode_prompts
from trl_msl.decoding import Recommendations
from trl_msl.evaluation import ranking_metrics, ranks_of_targets


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


@pytest.mark.parametrize("match", ["id", "text"])
def test_warm_and_cold_targets(match, model, task, rows):
    """Items 5 and 6 have the same text, so that by text both have been seen."""
    seen = {"b1", "b3", "b5", "b8"}
    rows = rows.map(lambda row, index: {"item_id": f"b{index}"}, with_indices=True)
    metrics, found = evaluate_recommendations(
        model, task, rows, ks=(2, 8), match=match, return_recommendations=True, seen_items=seen
    )
    is_warm = [f"b{index}" in seen or (match == "text" and index == 6) for index in range(9)]
    expected = ranking_metrics(found.target_ranks[is_warm], (2, 8), confidence=0.95)
    assert (metrics["num_warm"], metrics["num_cold"]) == (sum(is_warm), 9 - sum(is_warm))
    assert 0 < metrics["ndcg@8_warm"] == expected["ndcg@8"] and metrics["hr@8_warm_low"] == expected["hr@8_low"]
    assert metrics["num_warm"] * metrics["hr@8_warm"] + metrics["num_cold"] * metrics["hr@8_cold"] == pytest.approx(
        9 * metrics["hr@8"]
    )
    assert "num_cold" not in evaluate_recommendations(model, task, rows, ks=(8,))


def test_items_with_the_same_text_follow_each_other_or_count_as_one(model, task, rows):
    found = recommend(model, task, rows["prompt"][:], top_k=task.trie.num_items)
    for user in found.items.tolist():
        assert user.index(6) == user.index(5) + 1  # "A History of Tea", twice
    second = rows.map(lambda row: {"item_id": "b6"})
    by_id = evaluate_recommendations(model, task, second, ks=(12,))
    by_text = evaluate_recommendations(model, task, second, ks=(12,), match="text")
    first = evaluate_recommendations(model, task, rows.map(lambda row: {"item_id": "b5"}), ks=(12,))
    assert by_text["mrr@12"] == first["mrr@12"] > by_id["mrr@12"]


def test_as_many_texts_as_places(model, task, rows):
    """Items 5 and 6 have the same text, and share a place."""
    everything = recommend(model, task, rows["prompt"][:], top_k=12).items
    num_checked = 0
    for user, items in enumerate(everything.tolist()):
        place = items.index(5)  # so item 6 has the next one
        if place == 10:
            continue
        row = rows.select([user]).map(
            lambda row, target: {"item_id": target}, fn_kwargs={"target": f"b{items[place + 2]}"}
        )
        k = place + 2  # different texts up to the target, which is the last of them
        by_text, found = evaluate_recommendations(model, task, row, ks=(k,), match="text", return_recommendations=True)
        assert (by_text[f"hr@{k}"], by_text[f"mrr@{k}"]) == (1, 1 / k)
        assert found.items.tolist() == [[*items[: place + 1], items[place + 2]]]
        assert by_text["coverage"] == k / NUM_TEXTS
        assert evaluate_recommendations(model, task, row, ks=(k,))[f"hr@{k}"] == 0
        by_text = evaluate_recommendations(
            model, task, row, ks=(k + 1,), match="text", exclude=[[]] if user % 2 else None, allowed=list(range(12))
        )
        assert by_text[f"mrr@{k + 1}"] == 1 / k
        num_checked += 1
    assert num_checked == 3


def test_repeats_in_a_list_take_no_rank(model, task, rows, monkeypatch):
    """The first two rows hold the texts A, A, B, C, the third B, A, C, A."""
    items = np.array([[5, 6, 0, 7], [5, 6, 0, 7], [0, 5, 7, 6]])
    rest = {name: np.zeros(3) for name in ("scores", "expansions", "rounds", "lost_at")}
    found = Recommendations(items, exact=np.zeros(3, dtype=bool), **rest)
    monkeypatch.setattr("trl_msl.evaluation.evaluate.recommend", lambda *args, **kwargs: found)
    targets = rows.select(range(3)).map(lambda row, index: {"item_id": ["b6", "b0", "b7"][index]}, with_indices=True)
    by_text = evaluate_recommendations(model, task, targets, ks=(4,), match="text", mode="generate")
    assert found.target_ranks.tolist() == [0, 1, 2]
    assert by_text["mrr@4"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    evaluate_recommendations(model, task, targets, ks=(4,), mode="generate")
    assert found.target_ranks.tolist() == [1, 2, 2]


@pytest.mark.parametrize("match", ["id", "text"])
def test_withdrawn_items_are_not_ranked(match, model, task, rows, catalog):
    """As by `Recommender`. Items 5 and 6 have the same text, so that of item 5 is still there."""
    rows = rows.map(lambda row, index: {"item_id": catalog.ids[index]}, with_indices=True)
    gone = task.update(withdraw=["b0", "b1", "b5"])
    metrics, found = evaluate_recommendations(
        model, gone, rows, ks=(9 if match == "id" else 8,), match=match, return_recommendations=True
    )
    assert not np.isin(found.items, [0, 1, 5]).any() and metrics["coverage"] == (9 / 12 if match == "id" else 9 / 11)
    assert metrics["withdrawn_targets"] == (3 if match == "id" else 2)
    everything = recommend(model, task, rows["prompt"][:], top_k=12).items
    for items, before in zip(found.items.tolist(), everything.tolist()):
        assert [item for item in items if item >= 0] == [item for item in before if item not in (0, 1, 5)][
            : len(items)
        ]
    assert "withdrawn_targets" not in evaluate_recommendations(model, task, rows, ks=(5,))
    with pytest.raises(ValueError, match="has 9 items that are not withdrawn: pass smaller cut-offs"):
        evaluate_recommendations(model, gone, rows, ks=(10,))
    with pytest.raises(ValueError, match="`mode` is 'generate', which can't leave out the 3 withdrawn items"):
        RecommendationCallback(None, rows, gone, ks=(5,), mode="generate")


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
    with pytest.raises(ValueError, match="`rows` is empty: pass at least one row"):
        evaluate_recommendations(model, task, rows.select([]))
    with pytest.raises(ValueError, match=r"`ks` is \(5, 13\), but the catalogue has 12 items: pass smaller cut-offs"):
        evaluate_recommendations(model, task, rows, ks=(5, 13))
    # Before the training, not at its first evaluation
    for kwargs, message in (
        ({"ks": (13,)}, "`ks`"),
        ({"match": "title"}, "`match`"),
        ({"rows": rows.select([])}, "`rows`"),
    ):
        with pytest.raises(ValueError, match=message):
            RecommendationCallback(None, **{"rows": rows, "task": task, **kwargs})


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


def test_metrics_are_those_of_the_best_weights_once_they_are_loaded(tokenizer, task, rows, tmp_path):
    args = MSLConfig(
        tmp_path, max_steps=2, learning_rate=0.5, report_to="none", use_cpu=True, bf16=False, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_ndcg@5", greater_is_better=True,
    )  # fmt: skip
    trainer = MSLTrainer(make_model(tokenizer), args, train_dataset=rows, eval_dataset=rows, task=task)
    trainer.add_callback(RecommendationCallback(trainer, rows, ks=(5,)))
    trainer.train()
    first, last = (entry["eval_ndcg@5"] for entry in trainer.state.log_history if "eval_ndcg@5" in entry)
    assert trainer.state.best_global_step == 1 and first > last
    assert trainer.evaluate(rows, metric_key_prefix="eval_other")["eval_ndcg@5"] == first
    # Other weights, without a step
    weights = make_model(tokenizer, seed=1).state_dict()
    trainer.model.load_state_dict(weights)
    expected = evaluate_recommendations(trainer.model, task, rows, ks=(5,))["ndcg@5"]
    assert trainer.evaluate(rows, metric_key_prefix="eval_other")["eval_ndcg@5"] == expected != first


@pytest.mark.parametrize("include_num_input_tokens_seen", ["no", "all"])
def test_several_datasets_of_one_evaluation_rank_once(
    include_num_input_tokens_seen, tokenizer, task, rows, tmp_path, monkeypatch
):
    calls = []

    def count(*args, **kwargs):
        calls.append(args)
        return evaluate_recommendations(*args, **kwargs)

    monkeypatch.setattr("trl_msl.evaluation.evaluate.evaluate_recommendations", count)
    args = MSLConfig(
        tmp_path, max_steps=2, report_to="none", use_cpu=True, bf16=False, eval_strategy="steps", eval_steps=1,
        save_strategy="no", include_num_input_tokens_seen=include_num_input_tokens_seen,
    )  # fmt: skip
    trainer = MSLTrainer(
        make_model(tokenizer), args, train_dataset=rows, eval_dataset={"a": rows, "b": rows.select([0])}, task=task
    )
    trainer.add_callback(RecommendationCallback(trainer, rows, ks=(5,)))
    trainer.train()
    assert len(calls) == 2
    trainer.evaluate()
    assert len(calls) == 3
    trainer.evaluate(metric_key_prefix="test")  # not an evaluation of the training
    assert len(calls) == 3


@pytest.mark.parametrize("mode", ["beam", "generate"])
def test_one_decoder_serves_a_training(mode, tokenizer, task, rows, tmp_path, monkeypatch):
    made, make = [], TrieDecoder.__init__

    def count(decoder, model, trie):
        made.append(model)
        make(decoder, model, trie)

    monkeypatch.setattr(TrieDecoder, "__init__", count)
    args = MSLConfig(
        tmp_path, max_steps=2, learning_rate=0.1, report_to="none", use_cpu=True, bf16=False, eval_strategy="steps",
        eval_steps=1, save_strategy="no",
    )  # fmt: skip
    kwargs = {"peft_config": LoraConfig(task_type="CAUSAL_LM"), "train_dataset": rows, "eval_dataset": rows}
    trainer = MSLTrainer(make_model(tokenizer), args, task=task, **kwargs)
    trainer.add_callback(RecommendationCallback(trainer, rows, ks=(5,), mode=mode))
    untrained = trainer.evaluate()["eval_ndcg@5"]  # without a training
    is_made = mode != "generate"
    assert made == [trainer.model] * is_made
    trainer.train()
    found = trainer.evaluate()["eval_ndcg@5"]
    assert made == [trainer.model] * 2 * is_made
    assert found == evaluate_recommendations(trainer.model, task, rows, ks=(5,), mode=mode)["ndcg@5"] != untrained
    trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
    made.clear()
    assert trainer.evaluate()["eval_ndcg@5"] == found
    assert made == [trainer.model] * is_made
