# SPDX-License-Identifier: Apache-2.0
"""Training that is killed or stopped, and goes on as if nothing had happened, or not at all with other data."""

import dataclasses
import json
import logging
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers import make_model, make_windows
from launching import FEW_STEPS, PROMPT, TINY, run, start
from peft import LoraConfig
from safetensors.numpy import load_file

from trl_msl import (
    ItemCatalog,
    MSLConfig,
    MSLTrainer,
    RankingTask,
    SoftmaxDPOConfig,
    SoftmaxDPOTrainer,
    build_preferences,
    build_rows,
    draw_negatives,
)
from trl_msl.experiments import compare_losses, pretrain
from trl_msl.scripts import train
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
def runs(tmp_path_factory, tokenizer, catalog, task):
    path = tmp_path_factory.mktemp("resume")
    make_model(tokenizer).save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    catalog.save_pretrained(path / "base")
    build_rows(make_windows(catalog.ids), task).to_parquet(path / "rows.parquet")
    assert train_and_kill(path, "whole") == 0
    return path


def train_and_kill(folder, name: str, moment: str = "never", resume: bool = False) -> int:
    command = [sys.executable, "-c", TRAIN, str(folder), str(folder / name), moment, str(resume)]
    return subprocess.run(command, capture_output=True, timeout=280).returncode


@pytest.mark.parametrize(("moment", "last", "left"), [("training", 4, {2, 4}), ("saving", 2, {2, 4})])
def test_killed_and_resumed(moment, last, left, runs):
    assert train_and_kill(runs, moment, moment) == -signal.SIGKILL
    assert {int(path.name.split("-")[1]) for path in (runs / moment).glob("checkpoint-*")} == left
    assert last_complete_checkpoint(runs / moment) == str(runs / moment / f"checkpoint-{last}")
    assert train_and_kill(runs, moment, resume=True) == 0
    resumed, whole = (load_file(runs / name / "adapter_model.safetensors") for name in (moment, "whole"))
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


CPU = {"max_steps": 4, "save_steps": 2, "report_to": "none", "bf16": False, "use_cpu": True, "learning_rate": 1e-2}


def make_trainer(output_dir, task, rows_seed=0, adapter=None, **options):
    rows = build_rows(make_windows(task.catalog.ids, seed=rows_seed), task)
    config = MSLConfig(str(output_dir), **{**CPU, **options})
    return MSLTrainer(make_model(task.tokenizer), config, task=task, train_dataset=rows, peft_config=adapter)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, task):
    path = tmp_path_factory.mktemp("trained")
    make_trainer(path, task).train()
    return path


def replaced(task, catalog=None, **template):
    template = dataclasses.replace(task.prompt_template, **template)
    return RankingTask(catalog or task.catalog, task.tokenizer, template)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 1e-3}, r"trained with `learning_rate` 0.01 \(here 0.001\)\. Pass what it was"),
        ({"temperature": 1.0}, r"with `temperature` 'adaptive' \(here 1.0\)\."),
        ({"per_device_train_batch_size": 4}, r"with `batch_size` 8 \(here 4\)\."),
        ({"rows_seed": 1}, r"with `training_rows` '40 rows, \w+' \(here '40 rows, \w+'\)\."),
        ({"seed": 1}, r"with `seed` 42 \(here 1\)\."),
        ({"adapter": LoraConfig(task_type="CAUSAL_LM")}, r"`peft_type` None \(here 'LORA'\)"),
        ({"text": "Read: {history}\nNext: "}, r"`prompt_text` 'The user has read: .*`training_rows`"),
        ({"catalog": True}, r"`catalog` '12 items, \w+' \(here '12 items, \w+'\), `training_rows`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_training_does_not_resume(options, message, trained, task, tmp_path):
    given = dict(options)
    if "text" in given:
        task = replaced(task, text=given.pop("text"))
    if given.pop("catalog", False):
        task = replaced(task, ItemCatalog(task.catalog.ids, task.catalog.texts[::-1]))
    trainer = make_trainer(trained, task, **given)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(trained / "checkpoint-2"))
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 0


def test_what_may_differ(trained, task, caplog):
    """Places, logging, evaluation and saving, the split of a batch; a longer run is a warning."""
    caplog.set_level(logging.INFO, "trl_msl")
    same = {"logging_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "save_steps": 50}
    make_trainer(trained.parent / "other", task, **same).train(str(trained / "checkpoint-2"))
    assert "Resuming from step 2 of 4 (" in caplog.text
    assert "was trained with" not in caplog.text
    make_trainer(trained.parent / "other", task, max_steps=6, save_strategy="no").train(str(trained / "checkpoint-2"))
    assert (
        "was trained with `max_steps` 4 (here 6): the run will end differently from an uninterrupted one"
        in caplog.text
    )


def test_the_base_of_an_adapter_is_known_by_its_weights(tmp_path, task, tokenizer):
    """Wherever it lies, whatever its folder is called, and in any dtype."""
    rows, made = build_rows(make_windows(task.catalog.ids), task), make_model(tokenizer)
    for name in ("base", "renamed", "other/base"):
        made.save_pretrained(tmp_path / name)
        made.model.layers[1].self_attn.v_proj.weight.data += 0.01 * (name == "renamed")  # as a merged adapter does

    def trainer(name, adapter=True, **dtype):
        config = MSLConfig(str(tmp_path / "out"), **CPU, model_init_kwargs=dtype)
        adapter = LoraConfig(task_type="CAUSAL_LM") if adapter else None
        return MSLTrainer(str(tmp_path / name), config, task=task, train_dataset=rows, peft_config=adapter)

    trainer("base").train()
    for name, dtype in (("renamed", "float32"), ("base", "float16"), ("base", "bfloat16")):
        trainer(name, dtype=dtype).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"was trained with `base_weights` '\w+' \(here '\w+'\)\. Pass"):
        trainer("other/base").train(resume_from_checkpoint=True)
    trainer("base", adapter=False).train()  # all of its weights are in the checkpoint
    trainer("other/base", adapter=False).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_does_not_say_what_it_was_trained_with(trained, task, caplog, tmp_path):
    (trained / "checkpoint-2" / "training.json").rename(tmp_path / "training.json")
    make_trainer(tmp_path, task, save_strategy="no").train(str(trained / "checkpoint-2"))
    assert "has no training.json, so its data and options can't be checked" in caplog.text
    (tmp_path / "training.json").rename(trained / "checkpoint-2" / "training.json")


def test_softmax_dpo_does_not_resume_with_other_rows(tmp_path, task):
    rows = build_rows(make_windows(task.catalog.ids), task)

    def trainer(seed, **options):
        preferences = build_preferences(rows, task, draw_negatives(rows, task, num_negatives=2, seed=seed))
        config = SoftmaxDPOConfig(str(tmp_path), **{**CPU, **options})
        adapter = LoraConfig(task_type="CAUSAL_LM")
        return SoftmaxDPOTrainer(
            make_model(task.tokenizer), args=config, task=task, train_dataset=preferences, peft_config=adapter
        )

    trainer(0).train()
    with pytest.raises(ValueError, match=r"was trained with `training_rows` '40 rows"):
        trainer(1).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"was trained with `beta` 1.0 \(here 0.5\)"):
        trainer(0, beta=0.5).train(resume_from_checkpoint=True)
    trainer(0).train(resume_from_checkpoint=True)


def test_what_runs_is_said_at_the_start(tmp_path, task, caplog):
    caplog.set_level(logging.INFO, "trl_msl")
    make_trainer(tmp_path, task, adapter=LoraConfig(task_type="CAUSAL_LM"), save_strategy="no").train()
    (text,) = [record.getMessage() for record in caplog.records if "Training with" in record.getMessage()]
    assert text.splitlines() == [
        f"Training with MSLTrainer, into {tmp_path}:",
        "  model: made in Python, 42,720 parameters, 1,792 trained",
        "  items: 12",
        "  steps: 4 of 8 rows, 0.8 epochs of 40 rows",
        "  device: 1 x cpu, float32",
    ]


def test_a_scratch_base_is_made_once(tmp_path, folder, caplog):
    caplog.set_level(logging.INFO, "trl_msl")
    command = ["--data_dir", folder, "--output_dir", tmp_path, *PROMPT, *TINY, "--loss", "lml", "msl"]
    command += ["--save_steps", 2, "--learning_rate", 1e-3]
    run(compare_losses, *command)
    assert "No `model_name_or_path`: making a model of" in caplog.text
    weights = tmp_path / "base_model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    run(compare_losses, *command, "--resume_from_checkpoint", "last")
    assert weights.stat().st_mtime_ns == before
    assert caplog.text.count("Resuming from step 4 of 4") == 2
    with pytest.raises(ValueError, match=r"base_model' was made with `scratch_num_layers` 1 \(here 2\)"):
        run(compare_losses, *command, "--resume_from_checkpoint", "last", "--scratch_num_layers", 2)
    with pytest.raises(ValueError, match=r"lml/checkpoint-4' was trained with `learning_rate` 0.001 \(here 0.002\)"):
        run(compare_losses, *command, "--resume_from_checkpoint", "last", "--learning_rate", 2e-3)


def test_pretraining_does_not_resume_with_other_data(tmp_path, folder):
    command = ["--data_dir", folder, "--output_dir", tmp_path, *FEW_STEPS, "--save_steps", 2]
    command += ["--scratch_hidden_size", 32, "--scratch_num_layers", 1]
    run(pretrain, *command)
    run(pretrain, *command, "--resume_from_checkpoint", "last")
    with pytest.raises(ValueError, match="was trained with `training_rows`"):
        run(pretrain, *command, "--resume_from_checkpoint", "last", "--item_template", "{text}")


def interrupt(output_dir, process) -> str:
    """Wait for the first checkpoint, press Ctrl-C, and return what the command wrote."""
    deadline = time.time() + 120
    while not any(output_dir.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = "".join(process.communicate(timeout=120))
    assert process.returncode
    return output


@pytest.mark.parametrize("num_processes", [1, 2])
def test_ctrl_c_stops_with_a_checkpoint(num_processes, tmp_path, folder, base_model):
    common = ["--data_dir", folder, "--model_name_or_path", base_model, *PROMPT, *FEW_STEPS, "--max_steps", 200]
    common += ["--save_steps", 20, "--save_total_limit", 2, "--temperature_min", 0.1, "--learning_rate", 1e-3]
    command = [*common, "--output_dir", tmp_path / "stopped", "--eval_strategy", "epoch"]
    output = interrupt(tmp_path / "stopped", start("trl_msl.scripts.train", *command, num_processes=num_processes))
    step = int(re.search(r"stopped at step (\d+) of 200; continue with --resume_from_checkpoint last", output)[1])
    assert "Press Ctrl-C again to stop at once" in output
    assert last_complete_checkpoint(tmp_path / "stopped") == str(tmp_path / "stopped" / f"checkpoint-{step}")
    assert not {"model.safetensors", "metrics.json"} & {path.name for path in (tmp_path / "stopped").iterdir()}
    if num_processes == 2:
        return
    run(train, *command, "--resume_from_checkpoint", "last")
    run(train, *common, "--output_dir", tmp_path / "whole", "--eval_strategy", "epoch")
    resumed, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole"))
    assert all((resumed[name] == whole[name]).all() for name in whole)
    histories = [json.loads((tmp_path / name / "log_history.json").read_text()) for name in ("stopped", "whole")]
    for name in ("loss", "eval_loss", "eval_ndcg@10"):
        one, other = ([(entry["step"], entry[name]) for entry in history if name in entry] for history in histories)
        assert one == other and len(one) > 1, name
