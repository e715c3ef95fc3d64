# SPDX-License-Identifier: Apache-2.0
"""`trl-msl evaluate`, and what it shares with `dpo` and `preferences`: the task and the data of a trained model."""

import json
import logging
import re
import shutil

import pandas as pd
import pytest
from helpers import TITLES, make_model
from launching import FEW_STEPS, PROMPT, run, write_log
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from trl_msl import ItemCatalog, RankingTask, Recommender, evaluate_recommendations
from trl_msl.data import DataArguments, generate_catalog
from trl_msl.evaluation import target_log_probs
from trl_msl.experiments.from_scratch import train_tokenizer
from trl_msl.scripts import evaluate, merge, preferences, report, train, update_catalog
from trl_msl.scripts.trained import load_trained, write_options


IDS = [str(index) for index in range(len(TITLES))]  # of `folder`


@pytest.fixture
def model(tmp_path, tokenizer, template):
    """A recommender of the items of `folder`, as the API leaves it."""
    task = RankingTask(ItemCatalog(IDS, TITLES, template='"{text}"'), tokenizer, template, max_length=99)
    Recommender(make_model(tokenizer), task).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(model, max_length=None, **options):
    return load_trained(ModelConfig(model_name_or_path=str(model)), DataArguments(**options), max_length)


def evaluated(model, tmp_path, *options) -> dict:
    run(evaluate, "--model_name_or_path", model, "--output_dir", tmp_path / "evaluated", *options)
    return json.loads((tmp_path / "evaluated" / "metrics.json").read_text())


class TestTaskOfTheModel:
    def test_is_taken_where_the_options_say_nothing(self, model, folder, template):
        _, task = load(model, data_dir=str(folder))
        assert (task.prompt_template, task.max_length) == (template, 99)

    def test_is_taken_from_the_base_model_of_an_adapter(self, model, folder, template, tokenizer, tmp_path):
        """As for `Recommender`: of adapters trained by a script that knows nothing of the task."""
        adapter = tmp_path / "adapter"
        lora = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=str(model))
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(adapter)
        tokenizer.save_pretrained(adapter)
        _, task = load(adapter, data_dir=str(folder))
        assert (task.prompt_template, task.max_length) == (template, 99)
        name = ["--model_name_or_path", adapter]
        run(merge, *name, "--output_dir", tmp_path / "merged")
        run(update_catalog, *name, "--output_dir", tmp_path / "updated", "--withdraw", 3)
        assert Recommender.from_pretrained(tmp_path / "merged").task.max_length == 99
        assert Recommender.from_pretrained(tmp_path / "updated").task.withdrawn == {"3"}

    def test_may_have_been_given_items_since(self, model, folder):
        Recommender.from_pretrained(model).update(add=ItemCatalog(["new"], ["News"])).save_pretrained(model)
        data, task = load(model, data_dir=str(folder))
        assert len(data.catalog) == len(task.catalog) == len(TITLES) + 1

    def test_other_items(self, model, folder, tmp_path):
        other = tmp_path / "other"
        shutil.copytree(folder, other)
        for items, seen in (
            ({"0": "Ulysses"}, r"in 1 of 12 items .*, such as '0': .*\('Ulysses', 'The Silent River'\)"),
            ({"77": "Ulysses"}, r"in 1 of 13 items .*, such as '77': .*\('Ulysses', None\)"),
        ):
            titles = {**json.loads((folder / "id2name4Rec.json").read_text()), **items}
            (other / "id2name4Rec.json").write_text(json.dumps(titles))
            with pytest.raises(ValueError, match=f"The catalogue differs from the one that .* {seen}"):
                load(model, data_dir=str(other))
        assert load(model, data_dir=str(other), unknown_items="drop")[0].windows["test"].num_rows == 6

    def test_contradicting_options(self, model, folder):
        for options, here_and_there in (
            ({"prompt_text": "Read {history}"}, r"'text': \('Read {history}', 'The user has read"),
            ({"item_template": "{text}"}, r"'item_template': \('{text}', '\"{text}\"'\)"),
            ({"item_text": "id"}, r"'item_text': \('id', 'text'\)"),
            ({"html_entities": "decode"}, r"'html_entities': \('decode', 'keep'\)"),
            ({"conversational": True}, r"'conversational': \(True, False\)"),
            ({"max_length": 98}, r"'max_length': \(98, 99\)"),
        ):
            with pytest.raises(ValueError, match=f"The options differ from what .*{here_and_there}"):
                load(model, data_dir=str(folder), **options)
        same = {"prompt_text": "The user has read: {history}\nNext: ", "max_length": 99}
        assert load(model, data_dir=str(folder), **same)[1].max_length == 99

    def test_texts_are_the_models(self, tmp_path, tokenizer, template):
        """HTML entities and empty texts are as in training, whatever the options leave out."""
        options, _ = write_log(tmp_path)
        items = pd.read_csv(tmp_path / "items.csv")
        items.loc[:1, "title"] = ["Salt &amp; Tea", ""]
        items.to_csv(tmp_path / "items.csv", index=False)
        titles = items["title"].fillna("").tolist()
        policies = {"html_entities": "decode", "empty_texts": "id"}
        catalog = ItemCatalog(items["item_id"].tolist(), titles, **policies)
        task = RankingTask(catalog, tokenizer, template)
        Recommender(make_model(tokenizer), task).save_pretrained(tmp_path / "model")
        for given in (options, [*options, "--html_entities", "decode", "--empty_texts", "id"], options[:2]):
            evaluated(tmp_path / "model", tmp_path, *given, "--min_interactions", 2, "--top_k", 12)
            text = (tmp_path / "evaluated" / "recommendations.txt").read_text()
            assert "Salt & Tea" in text and "&amp;" not in text
        with pytest.raises(ValueError, match=r"in 1 of 12 items .* such as 'b1': \(here, there\): \('', 'b1'\)"):
            evaluated(tmp_path / "model", tmp_path, *options, "--empty_texts", "keep")

    def test_without_one_the_options_count(self, base_model, folder, caplog):
        options = {"prompt_text": "Read {history}", "separate_items": True}
        _, task = load(base_model, 77, data_dir=str(folder), **options)
        assert (task.prompt_template, task.max_length) == (DataArguments(**options).prompt_template, 77)
        assert "has no catalogue and prompt of its own: using those of the data options" in caplog.text

    def test_withdrawn_items(self, model, folder, tmp_path, capsys):
        targets = [json.loads(ids)[-1] for ids in pd.read_csv(folder / "test.csv")["item_ids"]]
        Recommender.from_pretrained(model).update(withdraw=[str(targets[0])]).save_pretrained(model)
        metrics = evaluated(model, tmp_path, "--data_dir", folder)
        count = metrics["exact"]["withdrawn_targets"]
        assert count == targets.count(targets[0]) and metrics["exact"]["coverage"] <= 11 / 12
        assert f"12 items; {count} targets are withdrawn and count as misses" in capsys.readouterr().out


class TestDataOfTheTraining:
    def test_nothing_named(self, model, base_model):
        missing = "`data_dir` and `interactions` are both missing, .* no data.json"
        for command in (evaluate, preferences):
            for name in (model, base_model):
                with pytest.raises(ValueError, match=missing):
                    run(command, "--model_name_or_path", name)

    def test_is_found_again(self, tmp_path, folder, base_model, monkeypatch, caplog):
        """From another folder, of a checkpoint, of a merged model; its options can be added to."""
        monkeypatch.chdir(folder)
        options = ["--data_dir", ".", "--model_name_or_path", base_model, *PROMPT, *FEW_STEPS, "--use_peft"]
        run(train, *options, "--max_validation_users", 3, "--output_dir", tmp_path / "out", "--save_steps", 4)
        trained = json.loads((tmp_path / "out" / "metrics.json").read_text())
        monkeypatch.chdir(tmp_path)
        run(merge, "--model_name_or_path", "out", "--output_dir", "merged")
        caplog.set_level(logging.INFO)
        run(update_catalog, "--model_name_or_path", "out", "--output_dir", "updated", "--withdraw", 7)
        assert evaluated("updated", tmp_path)["exact"]["num_rows"] == 6
        for name in ("out", "out/checkpoint-4", "merged"):
            assert evaluated(name, tmp_path)["exact"]["ndcg@10"] == pytest.approx(trained["ndcg@10"])
            assert f"Using the data that {name} was trained on: {folder}." in caplog.text
        validation = evaluated("out", tmp_path, "--split", "validation")
        assert validation["exact"]["num_rows"] == validation["arguments"]["data"]["max_validation_users"] == 3
        assert evaluated("out", tmp_path, "--max_test_users", 2)["exact"]["num_rows"] == 2
        assert "The model was trained on" not in caplog.text

    def test_damaged(self, model):
        for content in ("[", "[]", "{}", '{"generated": false}', '{"generated": true, "shop": 1}'):
            (model / "data.json").write_text(content)
            with pytest.raises(ValueError, match="data.json is damaged"):
                load(model)

    def test_generated(self, tmp_path, template, caplog):
        titles = generate_catalog()
        tokenizer = train_tokenizer([*titles.values(), "The user has read: ", "Next: "], vocab_size=400)
        task = RankingTask(ItemCatalog(list(titles), list(titles.values())), tokenizer, template)
        Recommender(make_model(tokenizer), task).save_pretrained(tmp_path / "model")
        write_options(DataArguments(max_test_users=5), tmp_path / "model")
        caplog.set_level(logging.INFO)
        data, _ = load(tmp_path / "model")
        assert len(data.windows["test"]) == 5 and data.best_possible
        assert "Using the quickstart's generated data: 150 items." in caplog.text

    def test_training_windows_are_not_for_testing(self, tmp_path, tokenizer, template, caplog):
        """Other options than in training split the same log elsewhere."""
        _, histories = write_log(tmp_path)
        catalog = ItemCatalog([f"b{index}" for index in range(len(TITLES))], TITLES, template='"{text}"')
        Recommender(make_model(tokenizer), RankingTask(catalog, tokenizer, template)).save_pretrained(tmp_path / "m")
        log = {"interactions": str(tmp_path / "log.csv"), "items": str(tmp_path / "items.csv")}
        write_options(DataArguments(**log, min_interactions=1), tmp_path / "m")
        load(tmp_path / "m", **log, min_interactions=1)
        assert "The model was trained on" not in caplog.text
        pd.read_csv(tmp_path / "log.csv").head(60).to_csv(tmp_path / "first.csv", index=False)
        data, _ = load(tmp_path / "m", interactions=str(tmp_path / "first.csv"), min_interactions=1)
        count = len(data.windows["test"])
        assert f"was trained on {count} of the {count} targets of the test split" in caplog.text
        assert f"'interactions': ('{tmp_path / 'first.csv'}', '{tmp_path / 'log.csv'}')" in caplog.text
        (tmp_path / "log.csv").unlink()
        load(tmp_path / "m", interactions=str(tmp_path / "first.csv"), min_interactions=1)
        assert "Can't check whether the model was trained on some of these windows" in caplog.text


class TestWarmAndColdTargets:
    def test_are_told_apart_by_the_data_of_the_training(self, folder, base_model, tmp_path, capsys):
        """Other windows than those of the training are evaluated on, whose train split says nothing of what it saw."""
        small = tmp_path / "small"
        shutil.copytree(folder, small)
        windows, first = pd.read_csv(folder / "train.csv"), json.loads(pd.read_csv(folder / "test.csv")["item_ids"][0])
        has_not = ~windows["item_ids"].map(json.loads).map(set(first[-1:]).issubset)
        windows[has_not].to_csv(small / "train.csv", index=False)
        options = ["--data_dir", small, "--model_name_or_path", base_model, *PROMPT, *FEW_STEPS]
        run(train, *options, "--eval_strategy", "steps", "--eval_steps", 4, "--output_dir", tmp_path / "out")
        trained = json.loads((tmp_path / "out" / "metrics.json").read_text())
        rankings = pd.read_parquet(tmp_path / "out" / "rankings.parquet")
        assert trained["num_cold"] == rankings["is_cold"].sum() == (rankings["item_id"] == str(first[-1])).sum() > 0
        assert "eval_ndcg@10_warm" in (tmp_path / "out" / "log_history.json").read_text()
        assert "ndcg@10_warm" in capsys.readouterr().out
        names = [name for name in trained if name.endswith(("_warm", "_cold", "_low", "_high"))]
        for data in ([], ["--data_dir", folder]):  # the latter's train split holds all items
            found = evaluated(tmp_path / "out", tmp_path, *data)["exact"]
            assert {name: found[name] for name in names} == {name: trained[name] for name in names}
            assert f"12 items; {trained['num_cold']} targets are cold" in capsys.readouterr().out
        shutil.rmtree(small)
        assert "num_cold" not in evaluated(tmp_path / "out", tmp_path, "--data_dir", folder)["exact"]

    def test_of_the_named_windows_without_data_of_a_training(self, model, folder, tmp_path):
        found = evaluated(model, tmp_path, "--data_dir", folder)["exact"]
        assert found["num_warm"] == 6 and found["ndcg@10_warm"] == found["ndcg@10"]


class TestVocabWeight:
    def test_a_row_for_each(self, model, folder, tmp_path):
        options, decoding = ["--max_expansions", 4096, "--top_k", 5], ["--decoding", "exact", "beam-vocab"]
        options += ["--data_dir", folder]
        metrics = evaluated(model, tmp_path, *options, *decoding, "--vocab_weight", 0, 0.5, 1)
        assert list(metrics)[:4] == ["exact", "exact-0.5", "exact-1", "beam-vocab"]
        assert metrics["exact"]["ndcg@5"] == evaluated(model, tmp_path, *options)["exact"]["ndcg@5"]
        loaded = Recommender.from_pretrained(model)
        rows = load(model, data_dir=str(folder))[0].rows("test", loaded.task)
        for weight in (0.5, 1):
            expected = evaluate_recommendations(
                loaded.model, loaded.task, rows, ks=(5,), vocab_weight=weight, max_expansions=4096
            )
            assert metrics[f"exact-{weight:g}"]["ndcg@5"] == expected["ndcg@5"]
            assert metrics[f"exact-{weight:g}"]["exact_rate"] == 1
        assert metrics["exact-1"]["expansions_mean"] > metrics["exact"]["expansions_mean"]

    def test_is_not_for_beams(self, model, folder, tmp_path):
        for option in (["--vocab_weight", 1], ["--max_expansions", 9]):
            with pytest.raises(ValueError, match="`vocab_weight` and `max_expansions` have no effect on beams"):
                evaluated(model, tmp_path, "--data_dir", folder, "--decoding", "beam", *option)


def test_more_items_and_log_probabilities(model, folder, tmp_path, capsys):
    """Each way of decoding is a system of the report, with the log-probability of its model."""
    seen = tmp_path / "seen"
    shutil.copytree(folder, seen)
    windows = pd.read_csv(folder / "train.csv")
    windows[~windows["item_ids"].map(json.loads).map(lambda ids: 6 in ids)].to_csv(seen / "train.csv", index=False)
    tests = pd.read_csv(folder / "test.csv")
    tests.loc[0, "item_ids"] = "[1, 2, 6]"  # of which training has seen the text, that of item 5
    tests.to_csv(seen / "test.csv", index=False)
    options = ["--data_dir", seen, "--top_k", 12, "--target_log_probs", "true", "--decoding", "exact", "beam"]
    metrics = evaluated(model, tmp_path, *options)
    assert {"ndcg@10", "ndcg@10_low", "ndcg@12", "mrr@12_low"} < metrics["exact"].keys()
    output = capsys.readouterr().out
    assert re.search("ndcg@10 +ndcg@10_warm +ndcg@10_cold +hr@10 +ndcg@12 +mrr@12", output)
    assert "Log-probability of the target, calibrated by τ = " in output
    task = Recommender.from_pretrained(model).task
    rows = load(model, data_dir=str(seen))[0].rows("test", task)
    expected, vocab = target_log_probs(AutoModelForCausalLM.from_pretrained(model), task, rows, [1])
    for name in ("exact", "beam"):
        rankings = pd.read_parquet(tmp_path / "evaluated" / name / "rankings.parquet")
        assert rankings["log_prob"].tolist() == pytest.approx(expected[:, 0], abs=1e-4)
        assert rankings["log_prob_vocab"].tolist() == pytest.approx(vocab, abs=1e-4)
        assert rankings["is_cold"].tolist() == (rankings["item_id"] == "6").tolist()
        of_rows = rankings["log_prob_calibrated"]
        found = metrics["target_log_probs"]["log_prob_calibrated"]
        assert found["mean"] == pytest.approx(of_rows.mean())
        assert found["mean_cold"] == pytest.approx(of_rows[rankings["is_cold"]].mean())
    run(report, "--runs", tmp_path / "evaluated", "--reference", "exact")
    assert "| beam " in capsys.readouterr().out
    by_text = evaluated(model, tmp_path, *options[:4], "--match", "text")
    rankings = pd.read_parquet(tmp_path / "evaluated" / "exact" / "rankings.parquet")
    assert not rankings["is_cold"].any() and by_text["exact"]["num_cold"] == 0
    assert "log_prob" not in rankings and "target_log_probs" not in by_text


class TestDataWithoutItems:
    def test_a_folder_with_only_test_windows(self, model, folder, tmp_path):
        expected = evaluated(model, tmp_path, "--data_dir", folder)["exact"]
        (tmp_path / "only").mkdir()
        shutil.copy(folder / "test.csv", tmp_path / "only")
        found = evaluated(model, tmp_path, "--data_dir", tmp_path / "only")["exact"]
        assert found["ndcg@10"] == expected["ndcg@10"] and found["num_rows"] == 6
        with pytest.raises(ValueError, match=r"has no validation split, only \['test'\]: .*`train_file`, 'train.csv'"):
            evaluated(model, tmp_path, "--data_dir", tmp_path / "only", "--split", "validation")
        with pytest.raises(ValueError, match="has no train split"):
            run(preferences, "--model_name_or_path", model, "--data_dir", tmp_path / "only")
        assert load(model, data_dir=str(tmp_path / "only"))[0].seen_items is None

    def test_unknown_targets(self, model, folder, tmp_path, caplog):
        windows = pd.read_csv(folder / "test.csv")
        windows.loc[0, "item_ids"] = "[1, 2, 99]"
        windows.to_csv(tmp_path / "test.csv", index=False)
        with pytest.raises(ValueError, match="'99', are not in the catalogue of 12 items: in 1 of 6 windows"):
            evaluated(model, tmp_path, "--data_dir", tmp_path)
        found = evaluated(model, tmp_path, "--data_dir", tmp_path, "--unknown_items", "drop")
        assert found["exact"]["num_rows"] == 5
        assert "in 1 of 6 windows, 1 of them with no target or history left" in caplog.text


def test_where_results_are_written(model, folder, tmp_path, monkeypatch):
    """Not over those of another model or of a training."""
    monkeypatch.chdir(tmp_path)
    names = {"model": "model", "../x": "x", str(model): str(model)[1:], "user/model": "user/model"}
    for name, place in names.items():
        assert str(evaluate.find_output_dir(None, name)) == f"outputs/evaluate/{place}"
    run(evaluate, "--model_name_or_path", "model", "--data_dir", folder)
    metrics = json.loads((tmp_path / "outputs/evaluate/model/metrics.json").read_text())
    assert metrics["arguments"]["model_name_or_path"] == "model"
    (model / "log_history.json").touch()
    with pytest.raises(ValueError, match="`output_dir` = 'model' holds the results of a training"):
        run(evaluate, "--model_name_or_path", "model", "--data_dir", folder, "--output_dir", "model")
