# SPDX-License-Identifier: Apache-2.0
"""The commands, from data to recommendations; launched where several processes or the recipes themselves matter."""

import json
import shutil

import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT
from launching import FEW_STEPS, PROMPT, TINY, launch, run, write_log
from safetensors.torch import load_file

from trl_msl import Recommender
from trl_msl.experiments import compare_losses
from trl_msl.scripts import dpo, evaluate, merge, preferences, recommend, train


def read(path):
    return json.loads(path.read_text())


def test_recipes_shadow_no_package():
    """Python looks for modules beside the script first, so `import evaluate` in a library would find a recipe."""
    names = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    assert not names & {"evaluate", "datasets", "train", "merge", "trl", "report_plots"}
    for path in (ROOT / "recipes").glob("*.py"):
        assert len(path.read_text().splitlines()) < 25, path  # launchers only


def test_quickstart_compares_losses_on_generated_data(tmp_path):
    """What runs without data options, here with fewer steps and users."""
    output = launch(
        "sft_msl.py", "--output_dir", tmp_path, *TINY, "--eval_steps", 2, "--save_steps", 2, "--max_test_users", 20,
        "--max_validation_users", 8,
    )  # fmt: skip
    assert "can't be loaded elsewhere" not in output  # the base model is the run's own
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
        assert f"\n{row:>13} " in output

    again = launch("evaluate_recommender.py", "--model_name_or_path", tmp_path / "msl", "--output_dir", tmp_path / "a")
    assert "ndcg@10" in again and "Using the quickstart's generated data" in again
    run(evaluate, "--model_name_or_path", tmp_path / "lml", "--output_dir", tmp_path / "b")  # has no task
    for name, place in (("msl", "a"), ("lml", "b")):
        assert read(tmp_path / place / "metrics.json")["exact"]["ndcg@10"] == pytest.approx(summary[name]["ndcg@10"])


def test_folder_yaml_lora_and_best_checkpoint(tmp_path, folder, base_model):
    config = tmp_path / "config.yaml"
    options = {
        "data_dir": str(folder),
        "model_name_or_path": str(base_model),
        "prompt_text": PROMPT[1],
        "use_peft": True,
        "lora_target_modules": ["all-linear"],
        "temperature": 2.0,
        "max_length": 200,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_ndcg@10",
    }
    config.write_text(yaml.safe_dump(options))
    run(train, "--config", config, "--output_dir", tmp_path / "msl", *FEW_STEPS)
    for name in ("metrics.json", "rankings.parquet", "log_history.json", "recommendations.txt", "training.png"):
        assert (tmp_path / "msl" / name).is_file(), name
    metrics = read(tmp_path / "msl" / "metrics.json")
    assert metrics["num_rows"] == 6 and metrics["arguments"]["temperature"] == 2
    assert 0 < metrics["num_trainable_parameters"] < metrics["num_parameters"]
    assert Recommender.from_pretrained(tmp_path / "msl").task.max_length == 200

    run(
        evaluate, "--data_dir", folder, "--model_name_or_path", tmp_path / "msl", "--output_dir", tmp_path / "out",
        "--match", "text", "--num_beams", 30, "--decoding", "exact", "beam", "beam-vocab", "generate",
    )  # fmt: skip
    metrics = read(tmp_path / "out" / "metrics.json")
    assert list(metrics) == ["exact", "beam", "beam-vocab", "generate", "differences", "pruning", "arguments"]
    assert (metrics["exact"]["exact_rate"], metrics["beam"]["exact_rate"]) == (1, 0)
    for wide in ("beam", "generate"):  # more beams than items find them all
        assert metrics[wide]["ndcg@10"] == pytest.approx(metrics["exact"]["ndcg@10"])
        assert metrics["differences"][f"{wide} - exact"]["ndcg@10"] == pytest.approx(0)
    vocab = metrics["differences"]["beam-vocab - exact"]
    assert vocab["ndcg@10"] == pytest.approx(metrics["beam-vocab"]["ndcg@10"] - metrics["exact"]["ndcg@10"])
    assert vocab["ndcg@10_low"] <= vocab["ndcg@10"] <= vocab["ndcg@10_high"]


def test_interaction_log_conversational_full_fine_tuning_and_resume(tmp_path, base_model):
    arguments = [*write_log(tmp_path)[0], "--item_template", "{text}", "--conversational", *PROMPT, *FEW_STEPS]
    arguments += ["--model_name_or_path", base_model]
    arguments += ["--output_dir", tmp_path / "out", "--save_strategy", "steps", "--save_steps", 2]
    run(train, *arguments)
    first = read(tmp_path / "out" / "metrics.json")
    run(train, *arguments, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2")
    again = read(tmp_path / "out" / "metrics.json")
    assert again["ndcg@10"] == first["ndcg@10"]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_contradicting_options(tmp_path, folder, base_model):
    model, cpu = ["--model_name_or_path", base_model], ["--output_dir", tmp_path, "--use_cpu", "--bf16", "false"]
    with pytest.raises(ValueError, match="`resume_from_checkpoint` is for one run"):
        run(compare_losses, "--resume_from_checkpoint", "x", "--loss", "lml", "msl", *cpu)
    with pytest.raises(ValueError, match="`covering_windows` leaves out .* but `supervise_history` is off"):
        run(train, *model, "--data_dir", folder, "--covering_windows", *cpu)
    with pytest.raises(ValueError, match="`data_dir` and `interactions` are both given"):
        run(train, *model, "--data_dir", folder, "--interactions", "log.csv", *cpu)
    with pytest.raises(ValueError, match="`data_dir` and `interactions` are both missing.*`trl-msl quickstart`"):
        run(train, *model, *cpu)
    data = ["--data_dir", folder, *cpu[:2]]
    for command, options in (
        (train, [*data, *cpu]), (dpo, [*data, *cpu]), (evaluate, data), (preferences, data), (merge, cpu[:2]),
        (recommend, ["--users", tmp_path / "users.csv"]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="`model_name_or_path` is missing"):
            run(command, *options)
    with pytest.raises(ValueError, match="`part_size` is 0: it must be at least 1"):
        run(recommend, *model, "--users", tmp_path / "users.csv", "--part_size", 0)
    assert not list(tmp_path.iterdir())


def test_two_processes_follow_the_same_course_as_one(tmp_path, folder, base_model):
    """Each step has the same rows: the same losses, temperatures and metrics, and a model on disk."""
    common = ["--data_dir", folder, "--model_name_or_path", base_model, *PROMPT, *FEW_STEPS, "--temperature_min", 0.1]
    common += ["--temperature_ema", 0.3, "--max_grad_norm", 0, "--train_sampling_strategy", "sequential"]
    common += ["--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "no"]
    run(train, *common, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", 8)
    launch("trl_msl.scripts.train", *common, "--output_dir", tmp_path / "two", num_processes=2)
    one, two = ((read(tmp_path / name / "log_history.json")) for name in ("one", "two"))
    assert len(one) == len(two)
    for entry, other in zip(one, two):
        for name in ("loss", "temperature", "target_probability", "valid_token_accuracy", "eval_ndcg@10"):
            if name in entry:
                assert other[name] == pytest.approx(entry[name], abs=1e-4), (entry["step"], name)
    metrics = [read(tmp_path / name / "metrics.json") for name in ("one", "two")]
    assert metrics[0]["num_rows"] == metrics[1]["num_rows"] == 6
    assert metrics[0]["ndcg@10"] == pytest.approx(metrics[1]["ndcg@10"], abs=1e-4)


def test_compiled_layers_follow_the_same_course(tmp_path, folder, base_model, monkeypatch):
    """As in `compiled.yaml`, by a backend that needs no C++ compiler."""
    compiled = yaml.safe_load((ROOT / "recipes" / "accelerate_configs" / "compiled.yaml").read_text())
    assert compiled["dynamo_config"]["dynamo_use_regional_compilation"]
    common = ["--data_dir", folder, "--model_name_or_path", base_model, *PROMPT, *FEW_STEPS, "--use_peft"]
    run(train, *common, "--output_dir", tmp_path / "plain")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    options = ["--torch_compile", "true", "--torch_compile_backend", "aot_eager"]
    run(train, *common, *options, "--output_dir", tmp_path / "compiled")
    plain, layers = (read(tmp_path / name / "log_history.json") for name in ("plain", "compiled"))
    losses = [entry["loss"] for entry in plain if "loss" in entry]
    assert [entry["loss"] for entry in layers if "loss" in entry] == pytest.approx(losses, abs=1e-4)
    assert (
        read(tmp_path / "compiled" / "metrics.json")["ndcg@10"] == read(tmp_path / "plain" / "metrics.json")["ndcg@10"]
    )


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, folder, base_model):
    """A model trained with MSL, as an adapter on a base model."""
    path = tmp_path_factory.mktemp("msl")
    data = ["--data_dir", folder, "--model_name_or_path", base_model, *PROMPT]
    run(train, *data, "--output_dir", path, *FEW_STEPS, "--use_peft")
    return path


def test_an_adapter_is_trained_further(tmp_path, folder, adapter):
    """With its prompt and items, from its weights: a learning rate of 0 leaves them as they are."""
    options = ["--data_dir", folder, "--model_name_or_path", adapter, *FEW_STEPS, "--max_steps", 1]
    run(train, *options, "--train_period", 0.5, 1, "--learning_rate", 0, "--output_dir", tmp_path)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(name.endswith("lora_B.weight") and weight.any() for name, weight in before.items())
    first, then = (read(path / "metrics.json") for path in (adapter, tmp_path))
    assert then["ndcg@10"] == first["ndcg@10"]
    assert then["num_trainable_parameters"] == first["num_trainable_parameters"]
    assert read(tmp_path / "data.json")["train_period"] == [0, 1]  # of both trainings
    shutil.copytree(folder, tmp_path / "newer")
    run(
        train,
        *options,
        "--data_dir",
        tmp_path / "newer",
        "--train_period",
        0,
        0.5,
        "--output_dir",
        tmp_path / "on_newer",
    )
    assert read(tmp_path / "on_newer" / "data.json")["train_period"] == [
        0,
        0.5,
    ]  # periods of other data are not joined
    with pytest.raises(ValueError, match="The options differ from what .* was trained with.*'text'"):
        run(train, *options, "--prompt_text", "Another {history}", "--output_dir", tmp_path)


DPO = ["--max_steps", 3, "--report_to", "none", "--bf16", "false", "--use_cpu", "--gradient_checkpointing", "false"]
DPO += ["--per_device_train_batch_size", 4, "--logging_steps", 1, "--learning_rate", 1e-3]


@pytest.mark.parametrize(("negatives", "num_processes"), [("model", 2), ("popular", 1)])
def test_softmax_dpo(negatives, num_processes, tmp_path, folder, adapter, capsys):
    """The prompt is that of the adapter's training."""
    arguments = ["--data_dir", folder, "--model_name_or_path", adapter, "--output_dir", tmp_path, *DPO]
    arguments += ["--negatives", negatives, "--eval_strategy", "steps", "--eval_steps", 2]
    if num_processes == 1:
        run(dpo, *arguments)
        output = capsys.readouterr().out
    else:
        output = launch("trl_msl.scripts.dpo", *arguments, num_processes=num_processes)
    assert "Each completion is run with a prompt of its own" not in output
    assert read(tmp_path / "metrics.json")["num_rows"] == 6
    history = read(tmp_path / "log_history.json")
    assert history[0]["loss"] == pytest.approx(1.3863, abs=1e-3)  # log 4: policy and reference are still the same
    assert any("eval_ndcg@10" in entry for entry in history)
    before, after = (Recommender.from_pretrained(path).recommend([["0", "3"]]) for path in (adapter, tmp_path))
    assert before.scores != after.scores


def test_preference_rows_that_were_made_before(tmp_path, folder, adapter):
    """At most `max_preferences` of them are used; without validation rows a run that evaluates is an error."""
    data = ["--data_dir", folder, "--model_name_or_path", adapter]
    run(preferences, *data, "--negatives", "uniform", "--output_dir", tmp_path / "rows")
    options = [
        *data,
        *DPO,
        "--preferences",
        tmp_path / "rows",
        "--max_preferences",
        4,
        "--output_dir",
        tmp_path / "out",
    ]
    run(dpo, *options)
    assert read(tmp_path / "out" / "log_history.json")[-1]["epoch"] == 3  # three steps of four rows
    (tmp_path / "rows" / "validation.parquet").unlink()
    with pytest.raises(ValueError, match="eval_dataset"):
        run(dpo, *options, "--eval_strategy", "steps", "--eval_steps", 2)


def test_trls_own_dpo_script_on_a_model_trained_with_msl(tmp_path, folder, adapter, capsys):
    """As documented: preference pairs, the adapter merged, TRL's script; then the catalogue is found."""
    data = ["--data_dir", folder, "--model_name_or_path", adapter]
    options = ["--negatives", "near", "--num_negatives", 2, "--pairs", "--output_dir", tmp_path / "preferences"]
    run(preferences, *data, *options)
    assert "train: 36 rows, 72 rejected items" in capsys.readouterr().out
    pairs = pd.read_parquet(tmp_path / "preferences" / "train.parquet")
    assert list(pairs.columns) == ["prompt", "chosen", "rejected"] and len(pairs) == 72
    run(merge, "--model_name_or_path", adapter, "--output_dir", f"{tmp_path}/merged/")
    merged = Recommender.from_pretrained(tmp_path / "merged").recommend([["0", "3"]])
    assert merged.ids == Recommender.from_pretrained(adapter).recommend([["0", "3"]]).ids
    for name, options in (("adapter", ["--use_peft"]), ("full", [])):
        launch(
            "trl.scripts.dpo", "--model_name_or_path", tmp_path / "merged", "--dataset_name", tmp_path / "preferences",
            "--output_dir", tmp_path / name, *DPO, *options,
        )  # fmt: skip
        source = {} if name == "adapter" else {"task_from": tmp_path / "merged"}
        found = Recommender.from_pretrained(tmp_path / name, **source).recommend([["0", "3"]])
        if name == "adapter":
            run(evaluate, "--model_name_or_path", tmp_path / name, "--output_dir", tmp_path / "evaluated")
        assert len(found.ids[0]) == 10 and found.scores != merged.scores
    with pytest.raises(ValueError, match="name a folder that has one as `task_from`"):
        Recommender.from_pretrained(tmp_path / "full")
