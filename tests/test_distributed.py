# SPDX-License-Identifier: Apache-2.0
"""Two processes (gloo, CPU) train as one does: DDP and FSDP2, by the accelerate configs that users get."""

import importlib.util
import json
import shutil

import pytest
import torch
from conftest import ROOT
from helpers import make_model, make_windows
from launching import TINY, launch
from packaging.version import Version
from safetensors.numpy import load_file

from trl_msl import Recommender, build_rows


AVERAGES = Version(torch.__version__) >= Version("2.13")  # 2.8 does not
SCRIPT = ROOT / "tests" / "distributed_training.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, catalog, task):
    path = tmp_path_factory.mktemp("distributed")
    make_model(tokenizer, hidden_size=320).save_pretrained(path / "base")  # ZeRO-3 leaves 100,000 weights in one piece
    tokenizer.save_pretrained(path / "base")
    catalog.save_pretrained(path / "base")
    build_rows(make_windows(catalog.ids), task).to_parquet(path / "rows.parquet")
    launch(SCRIPT, path, path / "one")
    return path


@pytest.mark.parametrize("kind", ["multi_gpu", "fsdp2", "zero3"])
def test_two_processes_train_as_one(kind, folder):
    """Weights, losses and τ, although one rank has a batch without any title; and going on from a checkpoint."""
    if kind == "zero3" and not (importlib.util.find_spec("deepspeed") and shutil.which("g++")):
        pytest.skip("DeepSpeed is not installed, or can't compile what it needs on a CPU")
    if kind == "fsdp2" and not AVERAGES:
        pytest.skip("FSDP2 of older PyTorch sums gradients over gloo where it should average them")
    launch(SCRIPT, folder, folder / kind, num_processes=2, config=kind)
    names = ("full", "vocab", "seen", "lora", "resumed")
    for name, weights in zip(names, ("model", "model", "model", "adapter_model", "model")):
        expected = load_file(folder / "one" / ("full" if name == "resumed" else name) / f"{weights}.safetensors")
        found = load_file(folder / kind / name / f"{weights}.safetensors")
        assert found.keys() == expected.keys()
        for key in expected:
            assert found[key] == pytest.approx(expected[key], abs=1e-5), key
        one, first, second = (
            json.loads((folder / run / name / f"rank{rank}.json").read_text())
            for run, rank in (("one", 0), (kind, 0), (kind, 1))
        )
        assert first["sharded"] == (kind != "multi_gpu") and not one["sharded"]
        assert (first["num_head_values"] == 0) == (kind == "zero3")  # in one piece nowhere: sharding is not just said
        assert first["temperature"] == second["temperature"] == pytest.approx(one["temperature"], abs=1e-4)
        assert first["num_saved"] >= 2 and second["num_saved"] == 0  # one writes
        assert first["eval_loss"] == second["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
        assert len(first["log"]) == len(one["log"]) == 4
        for entry, other in zip(one["log"], first["log"]):
            for measure in ("loss", "grad_norm", "temperature", "target_probability"):
                assert other[measure] == pytest.approx(entry[measure], rel=1e-4), (entry["step"], measure)
    found = [Recommender.from_pretrained(folder / run / "full").recommend([["b0", "b3"]]) for run in ("one", kind)]
    assert found[0].ids == found[1].ids
    for rank in (0, 1) if kind == "fsdp2" else ():  # ZeRO-3 gathers what it sees being read
        errors = json.loads((folder / kind / f"errors{rank}.json").read_text())
        assert "lm_head.weight" in errors and max(errors.values()) < 1e-5, errors


def test_the_recipe_with_a_sharded_model(tmp_path):
    """It trains and saves; what needs the whole model is refused before training, or left to `trl-msl evaluate`."""
    arguments = [
        *TINY,
        "--scratch_pretrain_steps",
        0,
        "--loss",
        "msl",
        "--max_test_users",
        8,
        "--output_dir",
        tmp_path,
    ]
    output = launch("sft_msl.py", *arguments, num_processes=2, config="fsdp2", fails=True)
    assert "shards the model over processes (FSDP, ZeRO-3), but decoding needs it whole" in output
    arguments += ["--eval_strategy", "no", "--load_best_model_at_end", "false"]
    output = launch("sft_msl.py", *arguments, num_processes=2, config="fsdp2")
    assert "Evaluate what was saved" in output and "not evaluated" in output
    arguments = ["--model_name_or_path", tmp_path / "msl", "--max_test_users", 8, "--output_dir", tmp_path / "found"]
    launch("evaluate_recommender.py", *arguments)
    # Preferences that do not come from the model, which is sharded
    rows = ["--preferences", tmp_path / "preferences"]
    shutil.copy(tmp_path / "msl" / "data.json", tmp_path / "base_model")
    source = ["--model_name_or_path", tmp_path / "base_model", "--max_test_users", 8]
    launch("make_preferences.py", *source, "--negatives", "near", "--output_dir", rows[1])
    arguments = [*source, *rows, "--output_dir", tmp_path / "dpo", "--max_steps", 2, "--report_to", "none"]
    arguments += ["--bf16", "false", "--use_cpu", "--gradient_checkpointing", "false"]
    output = launch("softmax_dpo.py", *arguments, num_processes=2, config="fsdp2")
    assert "Evaluate what was saved" in output and (tmp_path / "dpo" / "log_history.json").is_file()
    assert json.loads((tmp_path / "found" / "metrics.json").read_text())["exact"]["num_rows"] == 8
