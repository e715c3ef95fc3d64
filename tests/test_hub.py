# SPDX-License-Identifier: Apache-2.0
"""Train, push, and pull in another process, by huggingface_hub's own client over HTTP on this machine."""

import json
import os
import subprocess
import sys

import pytest
from helpers import make_model, make_windows
from hub_server import serve
from huggingface_hub import ModelCard, constants
from launching import FEW_STEPS, PROMPT
from launching import run as run_command
from peft import LoraConfig
from transformers.utils import hub as transformers_hub

from trl_msl import (
    MSLConfig,
    MSLTrainer,
    Recommender,
    SoftmaxDPOConfig,
    SoftmaxDPOTrainer,
    build_preferences,
    build_rows,
    draw_negatives,
)
from trl_msl.scripts import train
from trl_msl.training.hub import NEVER_PUSHED


TRAIN_AND_PUSH = """
import json, sys
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl_msl import (
    ItemCatalog, MSLConfig, MSLTrainer, PromptTemplate, RankingTask, RecommendationCallback, Recommender
)
from trl_msl.model import add_item_vectors

folder, histories = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/base")
catalog = ItemCatalog.from_pretrained(f"{folder}/base")
template = PromptTemplate("The user has read: {history}\\nNext: ", separate_items=True, vector_tokens=True)
task = RankingTask(catalog, tokenizer, template)
rows = Dataset.from_parquet(f"{folder}/rows.parquet")
trainer = MSLTrainer(
    "somebody/base",
    MSLConfig(
        f"{folder}/out", max_steps=2, report_to="none", bf16=False, use_cpu=True, learning_rate=1e-2, push_to_hub=True,
        hub_model_id="somebody/recommender", eval_strategy="steps", eval_steps=1,
    ),
    task=task,
    train_dataset=rows,
    eval_dataset=rows,
    peft_config=LoraConfig(task_type="CAUSAL_LM"),
)
add_item_vectors(trainer.model, torch.randn(len(catalog), 4))
trainer.add_callback(RecommendationCallback(trainer, rows))
trainer.train()
trainer.push_to_hub(dataset_name="somebody/books")
found = Recommender(trainer.model, trainer.task).recommend(histories)
print(json.dumps([found.ids, found.scores]))
"""

PULL = """
import json, sys
from trl_msl import Recommender

from huggingface_hub import hf_hub_download

card = open(hf_hub_download("somebody/recommender", "README.md"), encoding="utf-8").read()
exec(card.split("```python")[1].split("```")[0])  # the usage example of the model card
assert len(found.texts[0]) == 10
found = Recommender.from_pretrained("somebody/recommender").recommend(json.loads(sys.argv[2]))
print(json.dumps([found.ids, found.scores]))
"""


def run(code: str, folder, url: str, home: str) -> list:
    environment = {
        **os.environ, "HF_ENDPOINT": url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / home),
        "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    histories = json.dumps([["b0", "b3"], ["b8", "b4", "b10"], ["b5"]])
    command = [sys.executable, "-c", code, str(folder), histories]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_train_push_and_pull(tmp_path, tokenizer, catalog, task):
    make_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    catalog.save_pretrained(tmp_path / "base")
    build_rows(make_windows(catalog.ids), task).to_parquet(tmp_path / "rows.parquet")
    with serve() as hub:
        hub.repos["somebody/base"] = {path.name: path.read_bytes() for path in (tmp_path / "base").glob("*.*")}
        hub.repos["somebody/base"]["README.md"] = b"---\nlicense: mit\n---\n# Base\n"
        trained = run(TRAIN_AND_PUSH, tmp_path, hub.url, "home-of-the-trainer")
        files = hub.repos["somebody/recommender"]
        pulled = run(PULL, tmp_path, hub.url, "home-of-the-user")
    assert {"adapter_model.safetensors", "items.parquet", "trie.safetensors", "recommender.json", "README.md"} <= set(
        files
    )
    assert files["item_vectors.safetensors"] == (tmp_path / "out" / "item_vectors.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert (
        "Trained on a catalogue of 12 items" in card
        and "40 training rows" in card
        and "| ndcg@10 | 0." in card
        and "2504.04178" in card
    )
    assert card == (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    metadata = ModelCard(card).data
    assert (metadata.base_model, metadata.license, metadata.model_name) == ("somebody/base", "mit", "recommender")
    assert "training.json" in files
    assert "time machine" not in card and "None" not in card.split("## Quick start")[0]
    assert pulled == trained  # the same items with the same scores, to the last bit
    assert len(pulled[0][0]) == 10


# Of a whole model; what a training command and others leave in its folder is not in the list
PUSHED = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "items.parquet", "model.safetensors",
    "recommender.json", "tokenizer.json", "tokenizer_config.json", "training.json", "training_args.bin",
    "trie.safetensors",
}  # fmt: skip
CPU = {"max_steps": 4, "save_steps": 2, "report_to": "none", "bf16": False, "use_cpu": True}


@pytest.fixture
def hub(monkeypatch):
    """The server, for this process."""
    with serve() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(transformers_hub.hf_api(), "endpoint", server.url)
        monkeypatch.setattr(transformers_hub.hf_api(), "token", "hf_test")
        yield server


def leave_private_files(folder):
    for place in (folder, folder / "beam", folder / "base_model"):
        place.mkdir(parents=True, exist_ok=True)
        for name in NEVER_PUSHED:
            if "*" not in name:
                (place / name).write_text("what users did")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.safetensors").write_text("")


def make_trainer(kind, folder, base, task, **options):
    rows = build_rows(make_windows(task.catalog.ids), task)
    # `Trainer` leaves a push out while another one is under way
    options = {**CPU, "push_to_hub": True, "hub_always_push": True, "hub_model_id": "somebody/books", **options}
    if kind is MSLTrainer:
        args = MSLConfig(str(folder), **options)
        return MSLTrainer(str(base), args, task=task, train_dataset=rows)
    preferences = build_preferences(rows, task, draw_negatives(rows, task, num_negatives=2))
    args = SoftmaxDPOConfig(str(folder), **options)
    return SoftmaxDPOTrainer(str(base), args=args, task=task, train_dataset=preferences)


@pytest.mark.parametrize("kind", [MSLTrainer, SoftmaxDPOTrainer])
@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_no_push_holds_user_data(kind, strategy, tmp_path, base_model, task, hub):
    leave_private_files(tmp_path)
    trainer = make_trainer(kind, tmp_path, base_model, task, hub_strategy=strategy)
    trainer.train()
    files = hub.repos["somebody/books"]
    checkpoints = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-2", "checkpoint-4"}}
    assert {name.split("/")[0] for name in files if "/" in name} == checkpoints.get(strategy, set())
    assert {name for name in files if "/" not in name} == (set() if strategy == "end" else PUSHED)
    trainer.save_model()
    trainer.push_to_hub(commit_message="again", blocking=False).result()
    assert {name for name in files if "/" not in name} == PUSHED
    assert b"what users did" not in b"".join(files.values())
    for name, content in files.items():
        if name.endswith("README.md"):
            assert content == (tmp_path / "README.md").read_bytes() or "/" in name
            assert str(tmp_path).encode() not in content


def test_a_command_pushes_once_after_the_test(tmp_path, folder, base_model, hub):
    command = ["--data_dir", folder, "--model_name_or_path", base_model, *PROMPT, *FEW_STEPS, "--output_dir"]
    command += [tmp_path / "out", "--push_to_hub", "--hub_model_id", "somebody/books", "--hub_strategy", "end"]
    command += ["--decoding", "exact", "beam"]
    run_command(train, *command)
    files = hub.repos["somebody/books"]
    assert set(files) == PUSHED and len([call for call in hub.calls if "/commit/" in call]) == 1
    assert (tmp_path / "out" / "beam" / "metrics.json").is_file()
    card = files["README.md"].decode()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert f"| ndcg@10 | {metrics['ndcg@10']:.4f} | " in card and "On 6 test rows" in card
    results = {result.metric_type: result.metric_value for result in ModelCard(card).data.eval_results}
    assert results["ndcg@10"] == metrics["ndcg@10"]
    assert (tmp_path / "out" / "README.md").read_text() == card


@pytest.mark.parametrize("kind", [MSLTrainer, SoftmaxDPOTrainer])
def test_an_adapter_on_a_local_base(kind, tmp_path, task, tokenizer, hub, monkeypatch, caplog):
    """Not pushed, as nobody else has its base; and it finds that from every folder of this machine."""
    monkeypatch.chdir(tmp_path)
    make_model(tokenizer).save_pretrained("base")
    rows = build_rows(make_windows(task.catalog.ids), task)
    if kind is SoftmaxDPOTrainer:
        rows = build_preferences(rows, task, draw_negatives(rows, task, num_negatives=2))
    rest = {"task": task, "train_dataset": rows, "peft_config": LoraConfig(task_type="CAUSAL_LM")}
    config = MSLConfig if kind is MSLTrainer else SoftmaxDPOConfig
    with pytest.raises(ValueError, match="`push_to_hub`: the adapter's base model is the local folder 'base'"):
        kind("base", args=config("out", push_to_hub=True, **CPU), **rest)
    assert not hub.repos
    trainer = kind("base", args=config("out", **CPU), **rest)
    assert caplog.text.count("its base model is the local folder base. Merge it first") == 1
    trainer.train()
    with pytest.raises(ValueError, match="`push_to_hub`: the adapter's base model is the local folder 'base'"):
        trainer.push_to_hub()
    assert not hub.repos
    caplog.clear()
    (tmp_path / "base").rename("base_model")
    kind("base_model", args=config("run", **CPU), **rest)
    assert "can't be loaded elsewhere" not in caplog.text  # it was made for this run, by the quickstart for example
    (tmp_path / "base_model").rename("base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for place in ("out/checkpoint-2", "out/checkpoint-4"):
        assert len(Recommender.from_pretrained(tmp_path / place).recommend([["b0"]]).ids[0]) == 10
