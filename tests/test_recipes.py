# SPDX-License-Identifier: Apache-2.0
"""The recipes, run as users run them: by `accelerate launch`."""

import json

import pandas as pd
import pytest
import yaml
from helpers import TITLES, make_model, make_windows
from launching import TINY, launch

from trl_msl import ItemCatalog, RankingTask, Recommender


def read(path):
    return json.loads(path.read_text())


def test_quickstart_compares_losses_on_generated_data(tmp_path):
    """Without data options: the embedded default, here with fewer steps and users."""
    output = launch(
        "sft_msl.py", "--output_dir", tmp_path, *TINY, "--eval_steps", 2, "--save_steps", 2, "--max_test_users", 20,
        "--max_validation_users", 8, "--loss", "untrained", "lml", "msl",
    )  # fmt: skip
    summary = read(tmp_path / "summary.json")
    assert list(summary) == ["untrained", "lml", "msl", "best_possible", "seconds"]
    for name in ("untrained", "lml", "msl"):
        assert summary[name]["invalid_rate"] == 0
        assert 0 <= summary[name]["ndcg@10"] <= summary[name]["hr@10"] <= 1
    assert 0.4 < summary["best_possible"]["ndcg@10"] < summary["best_possible"]["hr@10"] <= 1
    assert (tmp_path / "msl" / "adapter_model.safetensors").is_file()  # LoRA is the default's setting
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "msl" / "recommendations.txt").read_text() in output
    for row in ("untrained", "lml", "msl", "best_possible"):
        assert f"\n{row:>14}" in output

    again = launch("evaluate.py", "--model_name_or_path", tmp_path / "msl", "--output_dir", tmp_path / "evaluation",
                   "--max_test_users", 20)  # fmt: skip
    assert "ndcg@10" in again
    metrics = read(tmp_path / "evaluation" / "metrics.json")
    assert metrics["exact"]["ndcg@10"] == pytest.approx(summary["msl"]["ndcg@10"])


def test_folder_yaml_lora_and_best_checkpoint(tmp_path, folder):
    config = tmp_path / "config.yaml"
    options = {
        "data_dir": str(folder),
        "prompt_words": ["book", "books", "read"],
        "use_peft": True,
        "lora_target_modules": ["all-linear"],
        "temperature": 2.0,
        "max_length": 400,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_ndcg@10",
    }
    config.write_text(yaml.safe_dump(options))
    launch("sft_msl.py", "--config", config, "--output_dir", tmp_path / "out", *TINY)
    assert list(read(tmp_path / "out" / "summary.json")) == ["msl", "seconds"]
    launch(
        "evaluate.py", "--data_dir", folder, "--prompt_words", "book", "books", "read", "--model_name_or_path",
        tmp_path / "out" / "msl", "--output_dir", tmp_path / "out", "--match", "text", "--num_beams", 30,
        "--decoding", "exact", "beam", "beam-vocab", "generate",
    )  # fmt: skip
    metrics = read(tmp_path / "out" / "metrics.json")
    assert list(metrics) == ["exact", "beam", "beam-vocab", "generate", "differences", "arguments"]
    assert (metrics["exact"]["exact_rate"], metrics["beam"]["exact_rate"]) == (1, 0)
    for wide in ("beam", "generate"):  # more beams than items find them all
        assert metrics[wide]["ndcg@10"] == pytest.approx(metrics["exact"]["ndcg@10"])
        assert metrics["differences"][f"{wide} - exact"]["ndcg@10"] == pytest.approx(0)
    vocab = metrics["differences"]["beam-vocab - exact"]
    assert vocab["ndcg@10"] == pytest.approx(metrics["beam-vocab"]["ndcg@10"] - metrics["exact"]["ndcg@10"])
    assert vocab["ndcg@10_low"] <= vocab["ndcg@10"] <= vocab["ndcg@10_high"]


def test_interaction_log_conversational_full_fine_tuning_and_resume(tmp_path):
    log = tmp_path / "log.parquet"
    windows = make_windows([f"b{index}" for index in range(len(TITLES))], 30)
    events = [
        (user, item, 100 * user + t) for user, ids in enumerate(windows["item_ids"]) for t, item in enumerate(ids)
    ]
    pd.DataFrame(events, columns=["user_id", "item_id", "timestamp"]).to_parquet(log)
    items = tmp_path / "items.csv"
    pd.DataFrame({"item_id": [f"b{index}" for index in range(len(TITLES))], "title": TITLES}).to_csv(
        items, index=False
    )
    arguments = ["--interactions", log, "--items", items, "--min_interactions", 2, "--item_template", "{text}", *TINY]
    arguments += ["--conversational", "--output_dir", tmp_path / "out", "--save_strategy", "steps", "--save_steps", 2]
    launch("sft_msl.py", *arguments)
    first = read(tmp_path / "out" / "summary.json")
    checkpoint = tmp_path / "out" / "msl" / "checkpoint-2"
    launch("sft_msl.py", *arguments, "--resume_from_checkpoint", checkpoint)
    again = read(tmp_path / "out" / "summary.json")
    assert again["msl"]["ndcg@10"] == first["msl"]["ndcg@10"]
    assert (tmp_path / "out" / "msl" / "model.safetensors").is_file()


def test_contradicting_options(tmp_path, folder):
    output = launch(
        "sft_msl.py", "--resume_from_checkpoint", "x", "--loss", "lml", "msl", "--output_dir", tmp_path, fails=True
    )
    assert "`resume_from_checkpoint` is one run's" in output
    output = launch(
        "sft_msl.py", "--data_dir", folder, "--interactions", "log.csv", "--output_dir", tmp_path, fails=True
    )
    assert "`data_dir` and `interactions` are both given" in output
    output = launch("evaluate.py", "--data_dir", folder, fails=True)
    assert "`model_name_or_path` is missing" in output


def test_two_processes_follow_the_same_course_as_one(tmp_path, folder):
    """Same union of rows in each step: the same losses, temperatures and metrics, and a model on disk."""
    common = ["--data_dir", folder, *TINY, "--temperature_min", 0.1, "--temperature_ema", 0.3, "--max_grad_norm", 0]
    common += ["--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "no", "--scratch_pretrain_steps", 0]
    common += ["--train_sampling_strategy", "sequential"]
    launch("sft_msl.py", *common, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", 8)
    launch("sft_msl.py", *common, "--output_dir", tmp_path / "two", num_processes=2)
    one, two = ((read(tmp_path / name / "msl" / "log_history.json")) for name in ("one", "two"))
    assert len(one) == len(two)
    for entry, other in zip(one, two):
        for name in ("loss", "temperature", "target_probability", "valid_token_accuracy", "eval_ndcg@10"):
            if name in entry:
                assert other[name] == pytest.approx(entry[name], abs=1e-4), (entry["step"], name)
    metrics = [read(tmp_path / name / "msl" / "metrics.json") for name in ("one", "two")]
    assert metrics[0]["num_rows"] == metrics[1]["num_rows"] == 6
    assert metrics[0]["ndcg@10"] == pytest.approx(metrics[1]["ndcg@10"], abs=1e-4)


def test_recommend_to_the_users_of_a_file(tmp_path, folder):
    """On two processes; what is there of a killed run is taken up; CSV and Parquet; unknown items."""
    model = tmp_path / "out" / "msl"
    launch("sft_msl.py", "--data_dir", folder, "--output_dir", tmp_path / "out", *TINY, "--scratch_pretrain_steps", 0)
    windows = make_windows([str(index) for index in range(len(TITLES))], 11)["item_ids"][:]
    users = pd.DataFrame({"user_id": range(11), "item_ids": windows})
    users.to_parquet(tmp_path / "users.parquet")
    common = ["--model_name_or_path", model, "--part_size", 4, "--top_k", 3]
    arguments = [*common, "--users", tmp_path / "users.parquet", "--output", tmp_path / "found.parquet"]
    launch("recommend.py", *arguments, num_processes=2)
    found = pd.read_parquet(tmp_path / "found.parquet")
    expected = Recommender.from_pretrained(model).recommend(windows, k=3)
    assert [list(ids) for ids in found["recommended_ids"]] == expected.ids
    assert found["user_id"].tolist() == list(range(11)) and found["exact"].all()
    assert not (tmp_path / "found.parquet.parts").exists()

    # As a killed run would have left it: the second of three parts, here with a mark; and one of another run
    marked = found.iloc[4:8].assign(user_id=-1)
    arguments[-1] = tmp_path / "again.parquet"
    (tmp_path / "again.parquet.parts").mkdir()
    (tmp_path / "again.parquet.parts" / "job.json").write_text("{}")
    output = launch("recommend.py", *arguments, fails=True)
    assert "holds parts of a run with other users, output" in output
    (tmp_path / "again.parquet.parts" / "job.json").unlink()
    marked.to_parquet(tmp_path / "again.parquet.parts" / "000000000004.parquet")
    launch("recommend.py", *arguments)
    again = pd.read_parquet(tmp_path / "again.parquet")
    assert again["user_id"].tolist() == [0, 1, 2, 3, -1, -1, -1, -1, 8, 9, 10]
    assert again["recommended_ids"].map(list).tolist() == expected.ids

    strange = pd.DataFrame({"item_ids": [json.dumps(windows[0]), '["0", "no such item"]', '["nor this"]']})
    strange.to_csv(tmp_path / "users.csv", index=False)
    arguments = [*common, "--users", tmp_path / "users.csv", "--output", tmp_path / "csv.parquet"]
    assert "not in the catalogue" in launch("recommend.py", *arguments, fails=True)
    arguments[-1] = tmp_path / "dropped.parquet"
    output = launch("recommend.py", *arguments, "--unknown_items", "drop")
    assert "2 unknown items of histories were dropped, and 1 users who had no other" in output
    assert len(pd.read_parquet(tmp_path / "dropped.parquet")) == 2


def test_update_the_catalogue_of_a_trained_model(tmp_path, tokenizer, catalog, trie, template):
    recommender = Recommender(make_model(tokenizer), tokenizer, RankingTask(catalog, trie, template))
    recommender.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "checkpoint-1").mkdir()
    (tmp_path / "new.json").write_text(json.dumps({"n0": "The Silent Wood", "n1": "#42"}))
    arguments = ["--model_name_or_path", tmp_path / "model", "--output_dir", tmp_path / "updated"]
    arguments += ["--add", tmp_path / "new.json", "--withdraw", "b7", "b3"]
    output = launch("update_catalog.py", *arguments)
    assert "14 items: 12 that the model was trained with, 2 added since, 2 withdrawn." in output
    assert "1 share no token with an item of the training, such as ['n1']" in output
    assert pd.read_csv(tmp_path / "updated" / "new_items.csv")["shared_tokens"].tolist()[1] == 0
    assert not (tmp_path / "updated" / "checkpoint-1").exists()
    new = ItemCatalog(["n0", "n1"], ["The Silent Wood", "#42"])
    expected = recommender.update(add=new, withdraw=["b3", "b7"]).recommend([["b3", "n0"]], k=14)
    found = Recommender.from_pretrained(tmp_path / "updated").recommend([["b3", "n0"]], k=14)
    assert found.ids == expected.ids and found.scores[0] == pytest.approx(expected.scores[0], abs=1e-5)
    assert "exists already: name another" in launch("update_catalog.py", *arguments, fails=True)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, folder):
    """A model trained with MSL, as an adapter on a base model."""
    path = tmp_path_factory.mktemp("msl")
    launch("sft_msl.py", "--data_dir", folder, "--output_dir", path, *TINY, "--use_peft")
    return path / "msl"


DPO = ["--max_steps", 3, "--report_to", "none", "--bf16", "false", "--use_cpu", "--gradient_checkpointing", "false"]
DPO += ["--per_device_train_batch_size", 4, "--logging_steps", 1, "--learning_rate", 1e-3]


@pytest.mark.parametrize(("negatives", "num_processes"), [("model", 2), ("popular", 1)])
def test_softmax_dpo(negatives, num_processes, tmp_path, folder, adapter):
    output = launch(
        "softmax_dpo.py", "--data_dir", folder, "--model_name_or_path", adapter, "--output_dir", tmp_path, *DPO,
        "--negatives", negatives, "--eval_strategy", "steps", "--eval_steps", 2, num_processes=num_processes,
    )  # fmt: skip
    assert "Each completion is run with a prompt of its own" not in output
    assert read(tmp_path / "metrics.json")["num_rows"] == 6
    history = read(tmp_path / "log_history.json")
    assert history[0]["loss"] == pytest.approx(1.3863, abs=1e-3)  # log 4: policy and reference are still the same
    assert any("eval_ndcg@10" in entry for entry in history)
    before, after = (Recommender.from_pretrained(path).recommend([["0", "3"]]) for path in (adapter, tmp_path))
    assert before.scores != after.scores


def test_trls_own_dpo_script_on_a_model_trained_with_msl(tmp_path, folder, adapter):
    """As the docs say: preference pairs, the adapter merged, TRL's script, and the catalogue is found."""
    data = ["--data_dir", folder, "--model_name_or_path", adapter]
    output = launch(
        "make_preferences.py", *data, "--negatives", "near", "--num_negatives", 2, "--pairs", "--output_dir",
        tmp_path / "preferences",
    )  # fmt: skip
    assert "train: 36 rows, 72 rejected items" in output
    pairs = pd.read_parquet(tmp_path / "preferences" / "train.parquet")
    assert list(pairs.columns) == ["prompt", "chosen", "rejected"] and len(pairs) == 72
    launch("merge_adapter.py", "--model_name_or_path", adapter, "--output_dir", f"{tmp_path}/merged/")
    merged = Recommender.from_pretrained(tmp_path / "merged").recommend([["0", "3"]])
    assert merged.ids == Recommender.from_pretrained(adapter).recommend([["0", "3"]]).ids
    for name, options in (("adapter", ["--use_peft"]), ("full", [])):
        launch(
            "trl.scripts.dpo", "--model_name_or_path", tmp_path / "merged", "--dataset_name", tmp_path / "preferences",
            "--output_dir", tmp_path / name, *DPO, *options,
        )  # fmt: skip
        source = {} if name == "adapter" else {"bundle_from": tmp_path / "merged"}
        found = Recommender.from_pretrained(tmp_path / name, **source).recommend([["0", "3"]])
        assert len(found.ids[0]) == 10 and found.scores != merged.scores
    with pytest.raises(ValueError, match="name a folder that has one by `bundle_from`"):
        Recommender.from_pretrained(tmp_path / "full")
