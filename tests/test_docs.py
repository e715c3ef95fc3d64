# SPDX-License-Identifier: Apache-2.0
"""The code that the docs show, executed: docstrings, and the Python blocks of README and docs in order."""

import doctest
import importlib
import json
import os
import pkgutil
import re

import pandas as pd
import pytest
from conftest import ROOT
from helpers import TITLES, make_windows

import trl_msl
from trl_msl.experiments.from_scratch import build_model, train_tokenizer


MODULES = [
    module.name for module in pkgutil.walk_packages(trl_msl.__path__, "trl_msl.") if "__main__" not in module.name
]


@pytest.mark.parametrize(
    "name",
    [
        *MODULES,
    ],
)
def test_docstrings(name):
    if name.endswith("baselines"):
        pytest.importorskip("rectools", reason='needs pip install "trl_msl[baselines]"')
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("page", ["README.md", "docs/usage.md"])
def test_code_blocks(page, tmp_path, monkeypatch, capsys):
    """Run in a folder with data, and with a small model in the place of the one on the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DISABLED", "true")
    make_folder(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"(?:```python|<!-- setup)\n(.*?)(?:```|-->)", text, flags=re.DOTALL)
    assert len(blocks) >= 2
    namespace = {}
    for block in blocks:
        code = block.replace("Qwen/Qwen3-0.6B", "model").replace("learning_rate=1e-4", "max_steps=2, use_cpu=True")
        exec(compile(code, page, "exec"), namespace)


def make_folder(path):
    ids = [str(index) for index in range(len(TITLES))]
    (path / "data").mkdir()
    (path / "data" / "id2name4Rec.json").write_text(json.dumps(dict(zip(ids, TITLES))))
    for name, rows in (("train.csv", 20), ("test.csv", 4)):
        windows = [[int(item) for item in window] for window in make_windows(ids, rows)["item_ids"]]
        frame = {"user_id": range(rows), "item_ids": map(str, windows), "timestamp": range(rows)}
        pd.DataFrame(frame).to_csv(path / "data" / name, index=False)
    tokenizer = train_tokenizer(TITLES, vocab_size=400)
    build_model(tokenizer, hidden_size=32, num_layers=1, num_heads=2).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")


def test_readme_lists_every_file():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## Files")[1].split("## ")[0]
    for folder in ("trl_msl", "recipes"):
        for name in os.listdir(ROOT / folder):
            if name.endswith(".py") and name != "__init__.py":
                assert f" {name} " in tree, f"{folder}/{name} is missing from the README's file tree"


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_public_names_are_documented():
    for name in trl_msl.__all__:
        assert getattr(trl_msl, name).__doc__, name
