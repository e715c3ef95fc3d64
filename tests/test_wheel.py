# SPDX-License-Identifier: Apache-2.0
"""The wheel, installed outside the repository: what a user has after `pip install`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from launching import FEW_STEPS, PROMPT, write_log

from trl_msl import Recommender
from trl_msl.experiments.gpu_kit import build_wheel


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder that the wheel is installed into; built offline, with the setuptools that is here."""
    path = tmp_path_factory.mktemp("wheel")
    wheel = build_wheel(ROOT, path)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index", "--target", str(path / "site")]
    subprocess.run([*pip, "install", *options, str(wheel)], check=True)
    return path / "site"


@pytest.fixture
def trl_msl(site, tmp_path):
    """Runs `trl-msl` as it was installed, in another folder, and returns what it printed."""

    def call(*arguments) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(site / "bin" / "trl-msl"), *map(str, arguments)]
        run = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False
        )
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        return run.stdout

    return call


def test_the_wheel_holds_the_package(site):
    source, installed = (
        {str(path.relative_to(root)) for path in root.rglob("*") if path.suffix in (".py", ".sh", ".yaml", ".typed")}
        for root in (ROOT / "trl_msl", site / "trl_msl")
    )
    assert installed == source and "experiments/quickstart.yaml" in installed
    code = "import trl_msl; print(trl_msl.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=site.parent, env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == site / "trl_msl" / "__init__.py"


def test_from_a_log_to_recommendations(trl_msl, site, tmp_path, base_model):
    assert "recommend       Recommend items to the users of a file" in trl_msl("--help")
    options, histories = write_log(tmp_path)
    data = [*options, *PROMPT, "--model_name_or_path", base_model]
    assert " findings: 0 errors, " in trl_msl("doctor", *data)
    trl_msl("train", *data, *FEW_STEPS, "--output_dir", "out")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["num_rows"] == 3
    users = pd.DataFrame({"user_id": range(3), "item_ids": [json.dumps(ids) for ids in histories[:3]]})
    users.to_csv(tmp_path / "users.csv", index=False)
    trl_msl("recommend", "--model_name_or_path", "out", "--users", "users.csv", "--output", "found.parquet")
    found = pd.read_parquet(tmp_path / "found.parquet")
    expected = Recommender.from_pretrained(tmp_path / "out").recommend(histories[:3])
    assert [list(ids) for ids in found["recommended_ids"]] == expected.ids
