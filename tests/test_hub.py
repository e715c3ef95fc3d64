# SPDX-License-Identifier: Apache-2.0
"""Train, push, and pull in another process, by huggingface_hub's own client over HTTP on this machine."""

import json
import os
import subprocess
import sys

from helpers import make_model, make_windows
from hub_server import serve

from trl_msl import build_rows


TRAIN_AND_PUSH = """
import json, sys
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl_msl import (
    ItemCatalog, MSLConfig, MSLTrainer, PromptTemplate, RankingTask, RecommendationCallback, Recommender
)

folder, histories = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/base")
catalog = ItemCatalog.from_pretrained(f"{folder}/base")
task = RankingTask(catalog, tokenizer, PromptTemplate("The user has read: {history}\\nNext: "))
rows = Dataset.from_parquet(f"{folder}/rows.parquet")
trainer = MSLTrainer(
    f"{folder}/base",
    MSLConfig(
        f"{folder}/out", max_steps=2, report_to="none", bf16=False, use_cpu=True, learning_rate=1e-2, push_to_hub=True,
        hub_model_id="somebody/recommender", eval_strategy="steps", eval_steps=1,
    ),
    task=task,
    train_dataset=rows,
    eval_dataset=rows,
    peft_config=LoraConfig(task_type="CAUSAL_LM"),
)
trainer.add_callback(RecommendationCallback(trainer, rows))
trainer.train()
trainer.push_to_hub()
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
        trained = run(TRAIN_AND_PUSH, tmp_path, hub.url, "home-of-the-trainer")
        files = hub.repos["somebody/recommender"]
        pulled = run(PULL, tmp_path, hub.url, "home-of-the-user")
    assert {"adapter_model.safetensors", "items.parquet", "trie.safetensors", "recommender.json", "README.md"} <= set(
        files
    )
    card = files["README.md"].decode()
    assert (
        "Trained with 12 items" in card
        and "40 training rows" in card
        and "| ndcg@10 | 0." in card
        and "2504.04178" in card
    )
    assert "time machine" not in card and "None" not in card.split("## Quick start")[0]
    assert pulled == trained  # the same items with the same scores, to the last bit
    assert len(pulled[0][0]) == 10
