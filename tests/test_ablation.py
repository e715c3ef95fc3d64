# SPDX-License-Identifier: Apache-2.0
"""A small version of every run behind docs/baselines.md but the baselines': base model, rows, report."""

import contextlib
import io
import json
import re

import pytest
from conftest import ROOT
from launching import run

from trl_msl import Recommender
from trl_msl.experiments import ablation, pretrain
from trl_msl.scripts import evaluate, report


CONFIGS = ROOT / "recipes" / "configs"
TABLE = (ROOT / "docs" / "baselines.md").read_text(encoding="utf-8").split("| row |")[1]
ROWS = dict(re.findall(r"`--run_name (\S+?)((?: \S+)*)`", TABLE))  # the options of each
SMALL = [
    "--train_file", "train.csv", "--num_train_epochs", "1", "--per_device_train_batch_size", "8",
    "--logging_steps", "1", "--scratch_hidden_size", "32", "--scratch_num_layers", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """A base model, and a folder for what starts from it."""
    path = tmp_path_factory.mktemp("runs")
    options = ["--data_dir", folder, "--output_dir", path / "base", "--scratch_vocab_size", 400]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        run(pretrain, "--config", CONFIGS / "pretrain.yaml", *options, "--max_length", 64, *SMALL)
    assert "48 texts" in output.getvalue()  # 12 items and 36 users
    return path


@pytest.mark.parametrize("name", ROWS)
def test_row(name, runs, folder):
    is_text = not name.startswith("item")
    options = ["--data_dir", folder, "--output_dir", runs, *SMALL, "--run_name", name, *ROWS[name].split()]
    options += ["--model_name_or_path", runs / "base", "--probe_steps", 2] if is_text else []
    run(ablation, "--config", CONFIGS / ("ablation.yaml" if is_text else "item_tokens.yaml"), *options)
    row = runs / name
    metrics = json.loads((row / "metrics.json").read_text())
    assert metrics["exact_rate"] == 1 and metrics["num_rows"] == 6
    assert metrics["num_parameters"] == metrics["num_trainable_parameters"] > 1000
    assert 0 <= metrics["validation_ndcg@10"] <= 1
    assert metrics["arguments"]["loss"] == "msl"
    for decoding in ("beam", "beam-vocab") if is_text else ():
        assert json.loads((row / decoding / "metrics.json").read_text())["decoding"] == decoding
    recommender = Recommender.from_pretrained(row)
    history = recommender.task.catalog.ids[:3]
    assert len(recommender.recommend([history], k=5).ids[0]) == 5


def test_another_scale_of_the_loss_does_not_resume(runs, folder):
    options = ["--data_dir", folder, "--output_dir", runs, *SMALL, "--run_name", "msl", *ROWS["msl"].split()]
    options += ["--model_name_or_path", runs / "base", "--config", CONFIGS / "ablation.yaml"]
    options += ["--resume_from_checkpoint", "last", "--loss_scale", 3]
    with pytest.raises(ValueError, match=r"was trained with `loss_scale` 1.0 \(here 3.0\)\."):
        run(ablation, *options)


def test_probe_of_a_row(runs):
    probe = json.loads((runs / "lml" / "probe.json").read_text())
    steps = [entry["step"] for entry in probe["history"]]
    assert steps == [0, 2, 4]
    for entry in probe["history"]:
        assert entry["lml"] == pytest.approx(entry["lml1"] + entry["lml2"])
        assert min(entry[f"{name}_grad_norm"] for name in ("lml", "lml1", "lml2")) > 0
        assert entry["lml_grad_norm"] <= entry["lml1_grad_norm"] + entry["lml2_grad_norm"] + 1e-6
    assert probe["history"][-1]["lml"] < probe["history"][0]["lml"]
    assert sum(probe["target_probability"]["counts"]) == sum(probe["logits"]["target"]) > 32
    assert sum(probe["logits"]["invalid"]) > sum(probe["logits"]["valid"]) > sum(probe["logits"]["target"])


def test_report_of_all_rows(runs, capsys):
    report.main(report.ReportArguments(runs=str(runs), reference="msl-ats"))
    table = (runs / "report" / "report.md").read_text()
    assert table in capsys.readouterr().out
    names = {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")}
    assert names >= ROWS.keys() | {"lml/beam", "lml/beam-vocab", "msl-ats/beam"}
    for name in ("comparison", "cost", "training", "gradients", "target_probability", "logits"):
        assert (runs / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_prompts_that_the_model_was_not_trained_with(runs, folder):
    """The prompt of the training is taken where none is given; another one is an error."""
    options = ["--data_dir", folder, "--model_name_or_path", runs / "msl-ats", "--output_dir", runs / "evaluated"]
    run(evaluate, *options)
    found = json.loads((runs / "evaluated" / "metrics.json").read_text())["exact"]
    assert found["ndcg@10"] == pytest.approx(json.loads((runs / "msl-ats" / "metrics.json").read_text())["ndcg@10"])
    options[-1] = runs / "never"
    for given, named in (
        (["--prompt_text", "{history}"], r"'text': \('\{history\}', 'The user has bought: "),
        (["--prompt_words", "book", "books", "read"], "'text'"),
        (["--conversational"], r"'conversational': \(True, False\)"),
        (["--item_template", "{text}"], "'item_template'"),
        (["--max_length", 99], r"'max_length': \(99, 256\)"),
    ):
        with pytest.raises(ValueError, match=f"The options differ from what .*msl-ats was trained with.*{named}"):
            run(evaluate, *options, *given)
    assert not (runs / "never").exists()


def test_item_tokens_know_no_texts(folder, tmp_path):
    with pytest.raises(ValueError, match="`scratch_tokens` = 'item' knows no texts: set `scratch_pretrain_steps` 0"):
        run(ablation, "--data_dir", folder, "--output_dir", tmp_path, "--scratch_tokens", "item", *SMALL)
