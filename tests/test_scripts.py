# SPDX-License-Identifier: Apache-2.0
"""The command line, and what commands share: the task beside a model, checkpoints to resume from, data options."""

import importlib
import logging
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from launching import FEW_STEPS, PROMPT, run
from transformers import TrainingArguments

from trl_msl import MSLConfig, SoftmaxDPOConfig
from trl_msl.data import DataArguments
from trl_msl.experiments import pretrain
from trl_msl.scripts import cli, doctor, train
from trl_msl.scripts.command_line import with_generated_data
from trl_msl.scripts.loading import checkpoint_to_resume, load_data


class TestCommandLine:
    def test_help_comes_without_torch(self):
        code = "import sys; from trl_msl.scripts import cli; cli.main(['--help']); print('torch' in sys.modules)"
        command = [sys.executable, "-c", code]
        output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
        assert output.endswith("False\n")
        for name, (_, summary) in cli.COMMANDS.items():
            assert re.search(f"^  {name} +{re.escape(summary)}$", output, flags=re.MULTILINE)

    @pytest.mark.parametrize("name", cli.COMMANDS)
    def test_each_command_is_there(self, name):
        if name == "baselines":
            pytest.importorskip("rectools", reason='needs pip install "trl_msl[baselines]"')
        module = importlib.import_module(cli.COMMANDS[name][0])
        assert callable(module.run) and module.__doc__

    def test_options_of_a_command(self, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["trl-msl"])
        with pytest.raises(SystemExit) as exit_:
            cli.main(["train", "--help"])
        output = capsys.readouterr().out
        assert exit_.value.code == 0 and "usage: trl-msl train" in output and "--temperature_eta" in output

    def test_no_command(self, capsys):
        assert cli.main([]) == 0
        assert cli.main(["fly"]) == 2
        assert "'fly' is not a command" in capsys.readouterr().err

    def test_exit_code_of_the_doctor(self, tmp_path, base_model, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["trl-msl"])
        options = ["--data_dir", str(tmp_path / "nowhere"), "--model_name_or_path", str(base_model)]
        assert cli.main(["doctor", *options]) == 1
        assert "ERROR Reading the data" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [MSLConfig, SoftmaxDPOConfig, pretrain.PretrainingConfig])
class TestWithoutAccelerator:
    """Configs as the docs and `recipes/configs` have them, on a machine with nothing but a CPU."""

    @pytest.fixture(autouse=True)
    def no_accelerator(self, monkeypatch):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)

    def test_runs_on_the_cpu(self, kind, tmp_path, recwarn):
        config = kind(str(tmp_path), learning_rate=1e-4)
        assert (config.use_cpu, config.bf16, config.device.type) == (True, False, "cpu")
        assert config.gradient_checkpointing  # as TRL has it, without the warning that its name is old
        assert not config.dataloader_pin_memory and not list(recwarn)
        again = replace(config, gradient_checkpointing=False, activation_checkpointing=False)
        assert again.use_cpu and not again.bf16 and not again.gradient_checkpointing

    def test_bf16_as_given(self, kind, tmp_path):
        config = kind(str(tmp_path), bf16=True, gradient_checkpointing=False)
        assert config.use_cpu and config.bf16 and not config.gradient_checkpointing


def test_doctor_takes_chat_template_kwargs_once(folder, base_model, capsys):
    options = ["--data_dir", folder, "--model_name_or_path", base_model, *PROMPT]
    run(doctor, *options, "--conversational", "--chat_template_kwargs", '{"enable_thinking": false}')
    assert " findings: 0 errors, " in capsys.readouterr().out


class TestResuming:
    @pytest.fixture
    def complete(self, tmp_path, folder, base_model):
        """The options of a run with checkpoints 2 and 4, killed before its end."""
        options = ["--data_dir", folder, "--model_name_or_path", base_model, *PROMPT, *FEW_STEPS]
        options += ["--save_strategy", "steps", "--save_steps", 2, "--resume_from_checkpoint", "last"]
        return [*options, "--output_dir", tmp_path]

    def test_the_same_command_starts_and_resumes(self, complete, tmp_path, caplog):
        """Also if the only checkpoint was cut off."""
        (tmp_path / "checkpoint-2").mkdir()
        run(train, *complete)
        assert f"{tmp_path} has no complete checkpoint yet: training starts from the beginning" in caplog.text
        weights = (tmp_path / "model.safetensors").read_bytes()
        shutil.rmtree(tmp_path / "checkpoint-4")
        caplog.clear()
        run(train, *complete)
        assert "starts from the beginning" not in caplog.text
        assert (tmp_path / "model.safetensors").read_bytes() == weights

        run(train, *complete)  # nothing is left to do
        assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
        assert (tmp_path / "model.safetensors").read_bytes() == weights

        config = TrainingArguments(str(tmp_path), resume_from_checkpoint="last", bf16=False)
        (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
        (tmp_path / "checkpoint-4" / "rng_state.pth").unlink()
        assert checkpoint_to_resume(config) == str(tmp_path / "checkpoint-4")
        assert "checkpoint-4 lacks the optimizer's state and the random state: training restarts" in caplog.text
        caplog.clear()
        (tmp_path / "checkpoint-2" / "scheduler.pt").unlink()
        config.resume_from_checkpoint = str(tmp_path / "checkpoint-2")
        assert checkpoint_to_resume(config) == config.resume_from_checkpoint
        assert "checkpoint-2 lacks the learning rate's schedule: training restarts" in caplog.text
        config.resume_from_checkpoint = None
        assert checkpoint_to_resume(config) is None


def test_training_without_matplotlib(tmp_path, folder, base_model, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    options = ["--data_dir", folder, "--model_name_or_path", base_model, *PROMPT, *FEW_STEPS]
    with caplog.at_level(logging.WARNING):
        run(train, *options, "--output_dir", tmp_path)
    assert (tmp_path / "metrics.json").is_file() and not (tmp_path / "training.png").exists()
    assert "training.png was left out, as matplotlib is not installed: pip install" in caplog.text


def test_generated_data():
    options = with_generated_data(["--max_test_users", "7"])
    assert options[:2] == ["--prompt_text", "The user has read: {history}\nNext: "] and options[-1] == "7"
    assert with_generated_data(["--data_dir=data"]) == ["--data_dir=data"]
    data = load_data(DataArguments(max_validation_users=5, max_test_users=10**6))
    assert [len(split) for split in data.windows.values()] == [4000, 5, 500]
    assert 0.5 < data.best_possible["ndcg@10"] < 0.7
