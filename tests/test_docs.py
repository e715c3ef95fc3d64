# SPDX-License-Identifier: Apache-2.0
"""The documentation: its code is run, its links lead somewhere, and it names every module and every public name."""

import doctest
import importlib
import json
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT
from helpers import TITLES, make_windows
from transformers import TrainerCallback, trainer

import trl_msl
from trl_msl.data import generate_windows, write_item_vectors
from trl_msl.experiments.from_scratch import build_model, train_tokenizer
from trl_msl.scripts import cli, loading


DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
EXECUTED = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
MODULES = [module.name for module in pkgutil.walk_packages(trl_msl.__path__, "trl_msl.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    if name.endswith(("sequence_models", "distilled_sasrec")):
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
    """As printed, in a folder with little data, and a folder with a small model in place of the one on the Hub."""
    monkeypatch.chdir(tmp_path)
    write_paper_folder(Path("data"))
    write_model(Path("Qwen/Qwen3-0.6B"))
    namespace = {}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), namespace)


def write_model(path):
    tokenizer = train_tokenizer(TITLES, vocab_size=400)
    build_model(tokenizer, hidden_size=32, num_layers=1, num_heads=2).save_pretrained(path)
    tokenizer.save_pretrained(path)


def write_paper_folder(path):
    ids = [str(index) for index in range(len(TITLES))]
    path.mkdir(parents=True)
    (path / "id2name4Rec.json").write_text(json.dumps(dict(zip(ids, TITLES))))
    for name, rows in (("train.csv", 20), ("train_10000.csv", 20), ("test.csv", 4)):
        windows = [[int(item) for item in window] for window in make_windows(ids, rows)["item_ids"]]
        frame = {"user_id": range(rows), "item_ids": map(str, windows), "timestamp": range(rows)}
        pd.DataFrame(frame).to_csv(path / name, index=False)


# The shell reads the blocks itself, and shows the words of each command that a test is to run
SHELL = r"""
show() { printf '%s\0' "$@"; printf '\n\0'; }
trl-msl() { show trl-msl "$@"; }
accelerate() { show accelerate "$@"; }
python() { show python "$@"; }
pip() { :; }
make() { :; }
source() { :; }
bash() { :; }
"""
WITH_A_KIT = "it is for a machine with a GPU: tests/test_gpu_kit.py makes a kit, unpacks it, and runs commands with it"
RECTOOLS = "it needs RecTools, in an environment of its own: tests/test_baselines.py runs it there"
NOT_RUN = {  # part of a command, and why
    "trl-msl quickstart": "it takes minutes: the other commands use what a shorter one leaves",
    "accelerate_configs/": "several GPUs, or minutes of compiling: tests/test_distributed.py and test_recipes.py",
    "fetch_smollm2": "it needs a network: tests/test_smollm2.py runs its result",
    "trl_msl.experiments.gpu_kit": WITH_A_KIT,
    "kit/unpack.py": WITH_A_KIT,
    "-m pytest": WITH_A_KIT,
    "benchmarks/run.py": WITH_A_KIT,
    "--reference hybrid-knn": "it compares baselines, which are not run",
    "--reference lml/exact": "it compares models of a training that is not run",
    "trl-msl baselines": RECTOOLS,
    "trl-msl distill": "it needs RecTools: tests/test_distill.py runs it there",
    "--runs outputs/mine/distilled": "it compares what distill leaves, which is not run",
    "--scores outputs/mine/distilled": "it takes the scores that distill leaves, which is not run",
    "-m trl_msl.scripts.baselines": RECTOOLS,
    "semantic": "it takes more items: tests/test_semantic_ids.py runs these commands",
}


class ShortTraining(TrainerCallback):
    """Ends a training after two steps."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= 2


def commands(page) -> list[list[str]]:
    """The commands of a page's shell blocks but those in `NOT_RUN`, as the shell reads them."""
    script = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL))
    read = subprocess.run(["bash", "-euc", SHELL + script], capture_output=True, text=True, check=True).stdout
    words = [command.split("\0")[:-1] for command in read.split("\n\0")[:-1]]
    return [command for command in words if not any(part in " ".join(command) for part in NOT_RUN)]


COMMANDED = [page for page in PAGES if commands(page)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with all files that the commands of the documentation name, but those that they write."""
    path = tmp_path_factory.mktemp("workplace")
    for name in ("Book", "new", "amazon_books", "amazon_office"):
        write_paper_folder(path / "data" / name)
    for name in ("Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-3B"):
        write_model(path / name)
    log = pd.DataFrame(
        [(user, str((user + 3 * step) % 10), 10 * step + user) for user in range(20) for step in range(6)],
        columns=["user_id", "item_id", "timestamp"],
    )
    log.to_csv(path / "log.csv", index=False)
    log.to_parquet(path / "log.parquet")
    titles = pd.DataFrame({"item_id": map(str, range(10)), "title": TITLES[:10]})
    titles.to_csv(path / "items.csv", index=False)
    users = pd.DataFrame({"user_id": ["u1", "u2"], "item_ids": ["1,2", "3"]})
    users.to_csv(path / "users.csv", index=False)
    users.to_parquet(path / "users.parquet")
    titles.iloc[:2].assign(item_id=["new1", "new2"]).to_csv(path / "new_items.csv", index=False)
    for page in PAGES:
        for block in re.findall(
            r"```yaml\n(# (\S+\.yaml)\n.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL
        ):
            (path / block[1]).write_text(block[0])
    vectors = path / "outputs" / "book" / "sasrec" / "item_embeddings.safetensors"
    write_item_vectors(vectors, torch.randn(len(TITLES), 4), map(str, range(len(TITLES))))
    (path / "recipes").symlink_to(ROOT / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(sys, "argv", ["trl-msl"])
        patch.setattr(loading, "generate_windows", partial(generate_windows, num_users=40))
        cli.main(["quickstart", "--loss", "lml", "msl", "--max_steps", "2", "--scratch_pretrain_steps", "2",
                  "--scratch_hidden_size", "32", "--scratch_num_layers", "1", "--eval_strategy", "no",
                  "--save_strategy", "no", "--load_best_model_at_end", "false"])  # fmt: skip
        cli.main(["train", "--config", "my_run.yaml", "--max_steps", "2", "--output_dir", "outputs/mine/msl"])
    for copy in ("outputs/mine/sasrec-sce", "user/my-recommender"):
        shutil.copytree(path / "outputs" / "mine" / "msl", path / copy)
    return path


@pytest.mark.parametrize("page", COMMANDED, ids=[page.stem for page in COMMANDED])
def test_commands(page, workplace, tmp_path, monkeypatch):
    """
    As printed, one after the other, but in this process; with fewer users of generated data, and trainings that end
    after two steps.
    """
    monkeypatch.setattr(loading, "generate_windows", partial(generate_windows, num_users=40))
    monkeypatch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, ShortTraining])
    shutil.copytree(workplace, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["trl-msl"])
    for program, *words in commands(page):
        if program == "trl-msl":
            assert not cli.main(words), words
        else:
            assert words[:2] == ["launch", "-m"], words
            on_cpu = ["--use_cpu"] * words[2].startswith("trl.")  # TRL's own commands take a GPU for granted
            monkeypatch.setattr(sys, "argv", [*words[2:], *on_cpu])
            if on_cpu:
                runpy.run_module(words[2], run_name="__main__")
            else:
                assert not importlib.import_module(words[2]).run(), words


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
        missing += [name for name in re.findall(r"\btrl-msl ([a-z][a-z-]*)", text) if name not in cli.COMMANDS]
        missing += [name for name in re.findall(r"-m (trl_msl[\w.]*\w)", text) if name not in MODULES]
        files = re.findall(r"\b(?:recipes|tests)/[\w/-]+\.(?:py|yaml)", text)
        missing += [file for file in files if not (ROOT / file).exists()]
    assert not missing


def test_commands_that_are_not_run_are_there():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [part for part in NOT_RUN if part not in text]


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
