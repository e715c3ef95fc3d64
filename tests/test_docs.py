# SPDX-License-Identifier: Apache-2.0
"""The documentation: its code is run, its links lead somewhere, and it names every module and every public name."""

import doctest
import importlib
import json
import pkgutil
import re

import pandas as pd
import pytest
from conftest import ROOT
from helpers import TITLES, make_windows

import trl_msl
from trl_msl.experiments.from_scratch import build_model, train_tokenizer
from trl_msl.scripts.cli import COMMANDS


DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
EXECUTED = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
MODULES = [module.name for module in pkgutil.walk_packages(trl_msl.__path__, "trl_msl.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    if name.endswith("baselines"):
        pytest.importorskip("rectools", reason='needs pip install "trl_msl[baselines]"')
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def blocks(page) -> list[str]:
    """
    The Python blocks of a page in order, those in a comment `<!-- setup` too, after the blocks of the page that it
    continues.
    """
    text = page.read_text(encoding="utf-8")
    continued = re.search(r"<!-- continues (\S+) -->", text)
    found = re.findall(r"(?:```python|<!-- setup)\n(.*?)(?:```|-->)", text, flags=re.DOTALL)
    return [*(blocks(page.parent / continued[1]) if continued else []), *found]


@pytest.mark.parametrize("page", EXECUTED, ids=[page.stem for page in EXECUTED])
def test_code_blocks(page, tmp_path, monkeypatch):
    """Run as printed, in a folder with data, with a small model in place of the one on the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DISABLED", "true")
    make_folder(tmp_path)
    namespace = {}
    for block in blocks(page):
        code = block.replace("Qwen/Qwen3-0.6B", "model")
        exec(compile(code, page.name, "exec"), namespace)


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


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for link, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if link.startswith("https://"):
                continue
            target = page.parent / link if link else page
            if not target.exists() or (anchor and anchor[1:] not in anchors(target)):
                broken.append(f"{page.name}: {link}{anchor}")
    assert not broken


def anchors(page) -> set[str]:
    """The headings of a page as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_commands_exist():
    missing = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        missing += [name for name in re.findall(r"\btrl-msl ([a-z][a-z-]*)", text) if name not in COMMANDS]
        missing += [name for name in re.findall(r"-m (trl_msl[\w.]*\w)", text) if name not in MODULES]
        files = re.findall(r"\b(?:recipes|tests)/[\w/-]+\.(?:py|yaml)", text)
        missing += [file for file in files if not (ROOT / file).exists()]
    assert not missing


def test_pages_are_in_the_index():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    missing = [page.name for page in DOCS.glob("*.md") if page.name != "index.md" and f"({page.name})" not in index]
    assert not missing


def test_architecture_lists_every_module():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    listed = []
    for folder, section in re.findall(r"^## `(trl_msl/\S*)`\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE):
        listed += [folder + module for module in re.findall(r"^- `(\S+\.py)`: ", section, flags=re.MULTILINE)]
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "trl_msl").rglob("*.py")]
    assert sorted(listed) == sorted(file for file in files if not file.endswith("__init__.py"))


def test_readme_shows_every_folder():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## Files")[1].split("## ")[0]
    folders = {path.parent for path in (ROOT / "trl_msl").rglob("*.py")} | {ROOT / "recipes", DOCS, ROOT / "tests"}
    missing = [folder.name for folder in folders if f"{folder.name}/ " not in tree]
    assert not missing


def test_reference_lists_the_public_names():
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    public, rooms = text.split("## The rooms")
    assert sorted(re.findall(r"^\| `(\w+)` \|", public, flags=re.MULTILINE)) == sorted(trl_msl.__all__)
    for room, names in re.findall(r"^### `([\w.]+)`\n\n(.*?)$", rooms, flags=re.MULTILINE):
        exported = importlib.import_module(room).__all__
        missing = [name for name in re.findall(r"`(\w+)`", names) if name not in exported]
        assert not missing, f"{room} does not export {missing}"


def test_public_names_have_docstrings():
    for name in trl_msl.__all__:
        assert getattr(trl_msl, name).__doc__, name
