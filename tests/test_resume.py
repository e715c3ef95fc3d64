# SPDX-License-Identifier: Apache-2.0
"""Training that is killed, and goes on as if nothing had happened."""

import signal
import subprocess
import sys

import pytest
from helpers import make_model, make_windows
from safetensors.numpy import load_file

from trl_msl import ItemCatalog, RankingTask, build_rows
from trl_msl.training.resuming import last_complete_checkpoint


TRAIN = """
import os, signal, sys
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback, set_seed
from peft import LoraConfig
from trl_msl import ItemCatalog, MSLConfig, MSLTrainer, PromptTemplate, RankingTask

folder, output_dir, moment, resume = sys.argv[1:]

class Killer(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if moment == "training" and state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

class Trainer(MSLTrainer):
    def _save_optimizer_and_scheduler(self, output_dir):
        if moment == "saving" and self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_optimizer_and_scheduler(output_dir)

set_seed(0)  # TRL 1.14 makes a new adapter before it sets the seed
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/base")
task = RankingTask(
    ItemCatalog.from_pretrained(f"{folder}/base"), tokenizer, PromptTemplate("The user has read: {history}\\nNext: ")
)
trainer = Trainer(
    f"{folder}/base",
    MSLConfig(
        output_dir, max_steps=8, save_steps=2, report_to="none", bf16=False, use_cpu=True, learning_rate=1e-2,
        per_device_train_batch_size=2, temperature_min=0.1, temperature_ema=0.3,
    ),
    train_dataset=Dataset.from_parquet(f"{folder}/rows.parquet"),
    task=task,
    peft_config=LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.2),
    callbacks=[Killer()],
)
trainer.train(resume_from_checkpoint=resume == "True")
trainer.save_model()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, catalog, task):
    path = tmp_path_factory.mktemp("resume")
    make_model(tokenizer).save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    catalog.save_pretrained(path / "base")
    build_rows(make_windows(catalog.ids), task).to_parquet(path / "rows.parquet")
    assert train(path, "whole") == 0
    return path


def train(folder, name: str, moment: str = "never", resume: bool = False) -> int:
    command = [sys.executable, "-c", TRAIN, str(folder), str(folder / name), moment, str(resume)]
    return subprocess.run(command, capture_output=True, timeout=280).returncode


@pytest.mark.parametrize(("moment", "last", "left"), [("training", 4, {2, 4}), ("saving", 2, {2, 4})])
def test_killed_and_resumed(moment, last, left, folder):
    assert train(folder, moment, moment) == -signal.SIGKILL
    assert {int(path.name.split("-")[1]) for path in (folder / moment).glob("checkpoint-*")} == left
    assert last_complete_checkpoint(folder / moment) == str(folder / moment / f"checkpoint-{last}")
    assert train(folder, moment, resume=True) == 0
    resumed, whole = (load_file(folder / name / "adapter_model.safetensors") for name in (moment, "whole"))
    assert resumed.keys() == whole.keys()
    assert all((resumed[name] == whole[name]).all() for name in whole)


def test_a_task_that_is_cut_off_is_an_error(tmp_path, tokenizer, catalog, task, template):
    """Killed between two files: what lies there is one of the two tasks, whole, or an error."""
    task.save_pretrained(tmp_path)
    before = (tmp_path / "trie.safetensors").read_bytes()
    other = ItemCatalog(catalog.ids, catalog.texts[::-1])
    RankingTask(other, tokenizer, template).save_pretrained(tmp_path / "new")
    (tmp_path / "trie.safetensors").write_bytes((tmp_path / "new" / "trie.safetensors").read_bytes())
    with pytest.raises(ValueError, match="trie.safetensors is damaged, or does not belong"):
        RankingTask.from_pretrained(tmp_path, tokenizer)
    (tmp_path / "trie.safetensors").write_bytes(before)
    assert RankingTask.from_pretrained(tmp_path, tokenizer).catalog.texts == catalog.texts


def test_no_complete_checkpoint(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3')
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        last_complete_checkpoint(tmp_path)
