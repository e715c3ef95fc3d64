# SPDX-License-Identifier: Apache-2.0
"""Small things that tests share: a tokenizer trained on a few titles, tiny models, real data where it is at hand."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import TITLES, make_model, make_windows  # noqa: E402

from trl_msl import ItemCatalog, PromptTemplate, RankingTask  # noqa: E402
from trl_msl.experiments.from_scratch import train_tokenizer  # noqa: E402


torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real data and a real tokenizer beside the repository; not part of it."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("no folder shared/ with real data beside the repository")
    return path


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([*TITLES, "The user has read: ", "Next: "], vocab_size=400)


@pytest.fixture(scope="session")
def catalog() -> ItemCatalog:
    return ItemCatalog([f"b{index}" for index in range(len(TITLES))], TITLES, template='"{text}"')


@pytest.fixture(scope="session")
def template() -> PromptTemplate:
    return PromptTemplate("The user has read: {history}\nNext: ")


@pytest.fixture(scope="session")
def task(catalog, tokenizer, template) -> RankingTask:
    return RankingTask(catalog, tokenizer, template)


@pytest.fixture(scope="session")
def chat_task(catalog, tokenizer, template) -> RankingTask:
    return RankingTask(catalog, tokenizer, replace(template, conversational=True))


@pytest.fixture(scope="session")
def trie(task):
    return task.trie


@pytest.fixture(scope="session")
def chat_trie(chat_task):
    return chat_task.trie


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder in the format of the MSL paper's authors."""
    path = tmp_path_factory.mktemp("data")
    ids = [str(index) for index in range(len(TITLES))]
    (path / "id2name4Rec.json").write_text(json.dumps(dict(zip(ids, TITLES))))
    for name, rows, seed in (("train.csv", 40, 0), ("test.csv", 6, 1)):
        windows = make_windows(ids, rows, seed)
        pd.DataFrame(
            {
                "user_id": range(rows),
                "item_ids": [str([int(item) for item in window]) for window in windows["item_ids"]],
                "timestamp": range(1000, 1000 + rows),
            }
        ).to_csv(path / name, index=False)
    return path


@pytest.fixture(scope="session")
def base_model(tmp_path_factory, tokenizer) -> Path:
    """A small model with its tokenizer, as from the Hub."""
    path = tmp_path_factory.mktemp("base")
    make_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
