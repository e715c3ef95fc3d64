# SPDX-License-Identifier: Apache-2.0
"""The model card: its metadata, its sections, and its usage example, which is run."""

import re

import pytest
from datasets import Dataset
from helpers import make_model, make_windows
from huggingface_hub import ModelCard
from peft import LoraConfig

from trl_msl import (
    MSLConfig,
    MSLTrainer,
    RecommendationCallback,
    SoftmaxDPOConfig,
    SoftmaxDPOTrainer,
    build_preferences,
    build_rows,
    draw_negatives,
)


ARGS = {"max_steps": 1, "report_to": "none", "bf16": False, "use_cpu": True}
HEADINGS = [
    "# Model Card for my-recommender",
    "## Quick start",
    "## What it recommends",
    "## Data",
    "## Training procedure",
    "### Hyperparameters",
    "### Framework versions",
    "## Citations",
]


def headings(card):
    return re.findall(r"^#+ .*", re.sub(r"```.*?```", "", card.text, flags=re.DOTALL), flags=re.MULTILINE)


@pytest.fixture(scope="module")
def base(tmp_path_factory, task):
    path = tmp_path_factory.mktemp("models") / "base"
    make_model(task.tokenizer).save_pretrained(path)
    task.tokenizer.save_pretrained(path)
    (path / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    return path


@pytest.fixture(scope="module")
def card_of_msl(tmp_path_factory, task, base):
    """Of an adapter that was evaluated while it was trained."""
    rows, folder = build_rows(make_windows(task.catalog.ids), task), tmp_path_factory.mktemp("out")
    args = MSLConfig(folder, eval_strategy="steps", eval_steps=1, **ARGS)
    kwargs = {"train_dataset": rows, "eval_dataset": rows, "peft_config": LoraConfig(task_type="CAUSAL_LM")}
    trainer = MSLTrainer(str(base), args, task=task, **kwargs)
    trainer.add_callback(RecommendationCallback(trainer, rows, seen_items=task.catalog.ids[::2]))
    trainer.train()
    trainer.save_model()
    trainer.create_model_card("my-recommender", "somebody/books", "books")
    card = ModelCard.load(folder / "README.md")
    card.folder = folder
    return card


@pytest.fixture(scope="module")
def card_of_softmax_dpo(tmp_path_factory, task):
    """Of a model made in Python, which has no name, not evaluated."""
    rows = build_rows(make_windows(task.catalog.ids), task)
    preferences = build_preferences(rows, task, draw_negatives(rows, task, num_negatives=2))
    folder = tmp_path_factory.mktemp("out")
    kwargs = {"train_dataset": preferences, "peft_config": LoraConfig(task_type="CAUSAL_LM")}
    args = SoftmaxDPOConfig(folder, **ARGS)
    trainer = SoftmaxDPOTrainer(make_model(task.tokenizer), args=args, task=task, **kwargs)
    trainer.create_model_card("my-recommender")
    return ModelCard.load(folder / "README.md")


def test_sections(card_of_msl, card_of_softmax_dpo):
    assert headings(card_of_msl) == [*HEADINGS[:4], "## Evaluation", *HEADINGS[4:]]
    assert headings(card_of_softmax_dpo) == HEADINGS


def test_metadata(card_of_msl, card_of_softmax_dpo):
    data = card_of_msl.data.to_dict()
    assert data == {
        "datasets": "somebody/books",
        "library_name": "transformers",
        "license": "mit",  # of the base
        "model-index": data["model-index"],
        "tags": ["books", "generated_from_trainer", "msl", "trl"],
    }
    assert card_of_msl.data.model_name == "my-recommender"
    results = {result.metric_type: result for result in card_of_msl.data.eval_results}
    assert set(results) == {f"{name}@{k}" for name in ("ndcg", "hr", "mrr") for k in (5, 10)}
    assert f"| ndcg@10 | {results['ndcg@10'].metric_value:.4f} |" in card_of_msl.text
    assert (results["ndcg@10"].dataset_name, results["ndcg@10"].dataset_split) == ("somebody/books", "validation")
    assert card_of_softmax_dpo.data.tags == ["generated_from_trainer", "softmax-dpo", "trl"]
    assert card_of_softmax_dpo.data.license is None


def test_what_it_says(card_of_msl, card_of_softmax_dpo, base):
    text = card_of_msl.text
    assert "A recommender, fine-tuned from `base` with" in text and str(base) not in text
    assert "12 items" in text and "40 training rows of [somebody/books]" in text
    assert "| metric | value | 95% interval | warm | cold |" in text
    assert re.search(r"\| ndcg@10 \| 0\.\d{4} \| 0\.\d{4} to 0\.\d{4} \| 0\.\d{4} \| 0\.\d{4} \|", text)
    assert re.search(r"\| mrr@10 \| 0\.\d{4} \| 0\.\d{4} to 0\.\d{4} \| - \| - \|", text)
    num_warm = int(re.search(r"On 40 validation rows, .*; warm are the (\d+) whose item", text)[1])
    assert 0 < num_warm < 40
    assert "Trained with MSL, introduced in [MSL: Not All Tokens" in text and "papers/2504.04178" in text
    for option in ("temperature | adaptive", "batch_size | 8", "lora_alpha | 8", "target_modules | q_proj, v_proj"):
        assert f"| {option} |" in text
    assert "using `MSLTrainer`" in text and "| epochs | 0.2 |" in text
    assert "- trl_msl: " in text and "- peft: " in text
    assert "Trained with Softmax DPO" in card_of_softmax_dpo.text and "papers/2406.09215" in card_of_softmax_dpo.text
    for card in (card_of_msl, card_of_softmax_dpo):
        assert "None" not in card.content and "time machine" not in card.content
    assert "A recommender with" in card_of_softmax_dpo.text


def test_citations_begin_in_the_first_column(card_of_msl, card_of_softmax_dpo):
    for card, name in ((card_of_msl, "wang2025msl"), (card_of_softmax_dpo, "chen2024softmax")):
        entries = re.findall(r"```bibtex\n(.*?)\n```", card.text, flags=re.DOTALL)
        assert [entry.split(",")[0].split("{")[1] for entry in entries] == [name, "vonwerra2020trl"]
        for entry in entries:
            lines = entry.splitlines()
            assert lines[0].startswith("@") and lines[-1] == "}"
            assert {len(line) - len(line.lstrip()) for line in lines[1:-1]} in ({2}, {4})


def test_the_usage_example_runs(card_of_msl, monkeypatch):
    """It names the folder, whose path on this machine is nobody else's business."""
    monkeypatch.chdir(card_of_msl.folder.parent)
    assert str(card_of_msl.folder) not in card_of_msl.content
    namespace = {}
    exec(card_of_msl.text.split("```python")[1].split("```")[0], namespace)
    assert len(namespace["found"].texts[0]) == 10


def test_a_base_model_on_the_hub(tmp_path, task, monkeypatch):
    monkeypatch.setenv("JOB_ID", "1")
    model = make_model(task.tokenizer)
    model.config._name_or_path = "somebody/base"
    rows = build_rows(make_windows(task.catalog.ids), task)
    args = MSLConfig(tmp_path / "out", hub_model_id="somebody/recommender", **ARGS)
    trainer = MSLTrainer(model, args, task=task, train_dataset=rows.to_iterable_dataset())
    assert not isinstance(trainer.train_dataset, Dataset)  # whose length is unknown
    trainer.log({"recall@10": 0.5})  # of another callback
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "## Evaluation" not in card.text
    assert "fine-tuned from [somebody/base](https://huggingface.co/somebody/base)" in card.text
    assert (card.data.base_model, card.data.model_name) == ("somebody/base", "recommender")
    assert "hf_jobs" in card.data.tags and "training rows" not in card.text.split("## Data")[1].split("##")[0]
