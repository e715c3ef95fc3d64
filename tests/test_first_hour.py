# SPDX-License-Identifier: Apache-2.0
"""A stranger's first hour: the README's five commands on a messy log, as typed, and what they say of mistakes."""

import json
import random
import shlex
import shutil
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from conftest import ROOT
from helpers import TITLES

from trl_msl.scripts import cli


DATA = "--interactions log.csv --items items.csv"
CLEAN = "--empty_texts id --html_entities decode --unknown_items drop --drop_duplicates"
BASE = "--model_name_or_path base"
MODEL = "--model_name_or_path outputs/msl"
TRAIN = (
    f"train {DATA} {CLEAN} {BASE} --use_peft --num_train_epochs 1 --output_dir outputs/msl "
    "--save_steps 2 --logging_steps 1"
)


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The error of a command: a line, and no traceback above it."""
        assert self.code == 2 and "Traceback" not in self.err, self
        return self.err.splitlines()[-1]


@pytest.fixture
def type_(capsys, monkeypatch):
    """Type a command into the shell, here in this process."""

    def typed(line: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["trl-msl"])
        capsys.readouterr()
        try:
            code = cli.main(shlex.split(line))
        except SystemExit as left:
            code = left.code
        return Result(code or 0, *capsys.readouterr())

    return typed


def in_a_shell(line: str, folder: Path) -> Result:
    command = [sys.executable, "-m", "trl_msl.scripts.cli", *shlex.split(line)]
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    return Result(run.returncode, run.stdout, run.stderr)


def write_log(folder: Path) -> None:
    """Dates in ISO form; rare users and items, unknown items, spaces in ids, and rows that are there twice."""
    rng, start = random.Random(0), datetime(2024, 1, 1)
    ids = [f"b{number}" for number in range(len(TITLES) + 2)]
    rows = [
        (f"u{user}", item, start + timedelta(days=user, hours=hour))
        for user in range(40)
        for hour, item in enumerate(rng.sample(ids, 6))
    ]
    rows += rows[:3]  # twice
    rows += [("u0", "no such item", start), ("u1", " b1 ", start), ("a visitor", "b1", start), ("u2", "rare", start)]
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    log["timestamp"] = log["timestamp"].map(datetime.isoformat)
    log.to_csv(folder / "log.csv", index=False)
    titles = [*TITLES, "Salt &amp; Sea", ""]  # two of TITLES are the same
    items = pd.DataFrame({"item_id": [*ids, "rare"], "title": [*titles, "Rarely Read"]})
    items.to_csv(folder / "items.csv", index=False)
    (folder / "users.csv").write_text('user_id,item_ids\n007,"b0,b4"\nu2,"b12"\n')


@pytest.fixture(scope="module")
def first_hour(tmp_path_factory, base_model) -> tuple[Path, Result]:
    """The folder of somebody who has a log, and the training there, which alone took a shell."""
    folder = tmp_path_factory.mktemp("first_hour")
    write_log(folder)
    shutil.copytree(base_model, folder / "base")
    return folder, in_a_shell(TRAIN, folder)


@pytest.fixture
def here(first_hour, tmp_path, monkeypatch) -> Path:
    """A copy of that folder to work in."""
    shutil.copytree(first_hour[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestFiveCommands:
    def test_doctor(self, here, type_):
        dirty = type_(f"doctor {DATA} {BASE}")
        assert dirty.code == 1 and "ERROR" in dirty.out and "--empty_texts" in dirty.out
        clean = type_(f"doctor {DATA} {CLEAN} {BASE} --max_test_users 3")
        assert clean.code == 0 and " 0 errors, " in clean.out and "test 3" in clean.out

    def test_train(self, first_hour):
        folder, result = first_hour
        assert result.code == 0, result.err
        for said in (
            "log.csv: 247 interactions, 41 users, 17 items", "items.csv: 15 items", "1 of 15 texts hold HTML entities",
            "1 of 15 items repeat another item's text", "such as ' b1 ', which is another id than 'b1'",
            "2 item id(s), such as ' b1 ', are not in the catalogue", "3 of 245 interactions repeat the user",
            "5-core: 242 → 240 interactions, 41 → 40 users, 15 → 14 items", "steps: 4 of 8 rows",
        ):  # fmt: skip
            assert said in result.err, (said, result.err)
        for foreign in ("pin_memory", "deprecated", "accelerate", "Traceback"):
            assert foreign not in result.err, result.err
        written = {path.name for path in (folder / "outputs" / "msl").iterdir()}
        assert written >= {"adapter_model.safetensors", "items.parquet", "metrics.json", "data.json", "training.png"}
        assert "Test, 4 users, 15 items" in result.out and "outputs/msl/metrics.json" in result.out

    def test_evaluate(self, here, type_):
        result = type_(f"evaluate {MODEL}")
        assert result.code == 0 and "Using the data that outputs/msl was trained on" in result.err
        assert "4 users, 15 items" in result.out and '"Salt & Sea"' in result.out and "&amp;" not in result.out
        trained = json.loads((here / "outputs" / "msl" / "metrics.json").read_text())
        measured = json.loads((here / "outputs" / "evaluate" / "outputs" / "msl" / "metrics.json").read_text())
        assert measured["exact"]["ndcg@10"] == pytest.approx(trained["ndcg@10"])

    def test_recommend(self, here, type_):
        result = type_(f"recommend {MODEL} --users users.csv --top_k 3 --output found.csv")
        assert result.code == 0 and result.out.splitlines()[-1] == "found.csv"
        found = pd.read_csv("found.csv", dtype=str)
        assert found["user_id"].tolist() == ["007", "u2"]
        assert all(len(json.loads(ids)) == 3 for ids in found["recommended_ids"])


class TestWrongThings:
    """The last line of each command that would have been wrong without a word, or would have lost data."""

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            (f"evaluate {MODEL} --prompt_text 'Next to {{history}}:'", "The options differ from what outputs/msl was"),
            (f"evaluate {MODEL} --items other.csv", "The catalogue differs from the one that outputs/msl was trained"),
            ("evaluate --model_name_or_path base", "--data_dir and --interactions are both missing, and base has no"),
            (f"recommend {MODEL} --users users.csv --output found.txt", "--output"),
            (f"recommend {MODEL} --users users.csv --top_k 99", "--top_k"),
            (f"{TRAIN} --resume_from_checkpoint last --learning_rate 0.5", "learning_rate"),
            (f"{TRAIN} --push_to_hub", "--push_to_hub: the adapter's base model is the local folder 'base'"),
            (f"train --interactions mixed.csv --items items.csv {CLEAN} {BASE}", "mixes 246 numbers"),
            (f"train --interactions log.xlsx --items items.csv {CLEAN} {BASE}", "format is not known"),
            (f"train {DATA} {BASE}", "pass --empty_texts id to use the id as the text"),
            (f"train {DATA} --empty_texts id {BASE}", "or pass --unknown_items drop"),
            (f"train {DATA} --model_name_or_path no/such", "--model_name_or_path no/such has no tokenizer"),
            (f"train {DATA} {BASE} --tempature 2", "did you mean --temperature?"),
        ],
    )  # fmt: skip
    def test_last_line(self, line, said, here, type_):
        log, items = pd.read_csv("log.csv"), pd.read_csv("items.csv")
        log.assign(timestamp=["2014-01-01", *range(len(log) - 1)]).to_csv("mixed.csv", index=False)
        items.assign(title=items["title"].str.upper()).to_csv("other.csv", index=False)
        Path("log.xlsx").touch()
        before = {path: path.stat().st_mtime_ns for path in Path("outputs").rglob("*")}
        assert said in type_(line).last_line
        assert before == {path: path.stat().st_mtime_ns for path in Path("outputs").rglob("*")}

    def test_in_a_shell(self, here):
        """With nothing else on stderr."""
        result = in_a_shell("evaluate --model_name_or_path base", here)
        assert result.err.splitlines() == [result.last_line] and result.last_line.startswith(
            "trl-msl evaluate: error: "
        )

    def test_resumes_with_the_same_options(self, here, type_):
        shutil.rmtree("outputs/msl/checkpoint-4")
        assert "Resuming from step 2 of 4" in type_(f"{TRAIN} --resume_from_checkpoint last").err

    def test_an_adapter_elsewhere(self, here, type_, monkeypatch):
        """Its base is named relative to the folder of its training."""
        monkeypatch.chdir("outputs")
        result = type_("recommend --model_name_or_path msl --users ../users.csv --output found.jsonl")
        assert result.code == 0 and len(Path("found.jsonl").read_text().splitlines()) == 2

    def test_an_updated_catalogue(self, here, type_):
        Path("new.csv").write_text("item_id,title\nn1,Bread &amp; Butter\n")
        result = type_(f"update-catalog {MODEL} --add new.csv --withdraw b3 --output_dir outputs/new")
        assert result.code == 0 and "16 items" in result.out
        assert "Bread & Butter" in set(pd.read_parquet("outputs/new/items.parquet").stack().astype(str))
        assert not Path("outputs/new/metrics.json").exists()

    def test_other_formats(self, here, type_):
        log = pd.read_csv("log.csv")
        log.to_csv("log.tsv", sep="\t", index=False)
        log.to_csv("log.csv.gz", index=False)
        log.to_json("log.jsonl", orient="records", lines=True)
        for name in ("log.tsv", "log.csv.gz", "log.jsonl"):
            result = type_(f"doctor --interactions {name} --items items.csv {CLEAN} {BASE}")
            assert result.code == 0 and " 0 errors, " in result.out
