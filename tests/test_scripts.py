# SPDX-License-Identifier: Apache-2.0
"""The command line, and what commands share: the task beside a model, checkpoints to resume from, data options."""

import importlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import ROOT
from helpers import TITLES, make_model
from launching import FEW_STEPS, PROMPT, launch, run
from tqdm import tqdm
from transformers import TrainingArguments

from trl_msl import ItemCatalog, MSLConfig, RankingTask, Recommender, SoftmaxDPOConfig
from trl_msl.data import DataArguments
from trl_msl.experiments import pretrain
from trl_msl.scripts import cli, command_line, doctor, evaluate, train
from trl_msl.scripts.console import log_lines
from trl_msl.scripts.loading import checkpoint_to_resume, load_data
from trl_msl.scripts.option_parser import OptionParser


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
        module = importlib.import_module(cli.COMMANDS[name][0])
        assert callable(module.run) and module.__doc__

    def test_no_command(self, capsys):
        assert cli.main([]) == 0
        assert cli.main(["fly"]) == 2
        assert "'fly' is not a command. See trl-msl --help" in capsys.readouterr().err
        assert cli.main(["trian"]) == 2
        assert "did you mean train?" in capsys.readouterr().err

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


def fail(capsys, *arguments, code=2) -> str:
    """The only line on stderr of a command that fails."""
    error = fail_after_notes(capsys, *arguments, code=code)
    assert error.startswith(f"trl-msl {arguments[0]}: ") and error.count("\n") == 1
    return error


def fail_after_notes(capsys, *arguments, code=2) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([str(argument) for argument in arguments])
    assert end.value.code == code
    return capsys.readouterr().err


@pytest.fixture
def argv(monkeypatch):
    """`cli.main` sets `sys.argv`."""
    monkeypatch.setattr(sys, "argv", ["trl-msl"])


@pytest.fixture
def model_with_task(tmp_path, folder, tokenizer, template):
    """A recommender of the items of `folder`."""
    ids = [str(index) for index in range(len(TITLES))]
    task = RankingTask(ItemCatalog(ids, TITLES, template='"{text}"'), tokenizer, template, max_length=99)
    Recommender(make_model(tokenizer), task).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("argv")
class TestHelp:
    @pytest.fixture
    def text(self, capsys):
        with pytest.raises(SystemExit) as end:
            cli.main(["train", "--help"])
        assert end.value.code == 0
        return capsys.readouterr().out

    def test_is_in_groups_with_the_commands_own_options_first(self, text):
        names = ["data:", "this command:", "loss:", "model:", "training:", "all other options of the trainer:"]
        starts = [text.index(f"\n{name}\n") for name in names]
        assert text.startswith("usage: trl-msl train [options]\n") and starts == sorted(starts)
        groups = [text[start:end] for start, end in zip(starts, [*starts[1:], None])]
        for group, option in zip(groups, ["items", "decoding", "temperature_eta", "use_peft", "output_dir", "optim"]):
            assert f"\n  --{option} " in group
            assert len(re.findall(rf"^  --{option} ", text, flags=re.MULTILINE)) == 1
        every = {action.dest for action in OptionParser(train.main, "")._actions} - {"help"}
        assert every == {*re.findall(r"^  --(?!no_)(\w+)", text, flags=re.MULTILINE)} - {"config"}

    def test_example_and_negated_option(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["recommend", "--help"])
        text = capsys.readouterr().out
        assert "\n    accelerate launch -m trl_msl.scripts.recommend" in text
        assert re.search(r"--no_exclude_history +The same as --exclude_history false\.\n", text)

    def test_defaults_are_those_of_ones_own_data(self, text):
        text = " ".join(text.split())
        assert "--learning_rate VALUE The initial learning rate for AdamW. (default: 2e-05)" in text
        assert "weights initialization. --model_revision" in text  # no default
        assert "--no_gradient_checkpointing The same as --gradient_checkpointing false. --" in text

    def test_ends_with_the_examples_of_the_module(self, text):
        end = text[text.index("Your own log, a chat model, on one GPU or CPU:\n\n    trl-msl train --inter") :]
        assert "--conversational \\\n        --model_name_or_path Qwen" in end and "```" not in end

    def test_examples_at_the_start_are_indented(self, capsys):
        with pytest.raises(SystemExit):
            cli.main(["recommend", "--help"])
        assert "\n\n    accelerate launch -m trl_msl.scripts.recommend " in capsys.readouterr().out


@pytest.mark.usefixtures("argv")
class TestErrors:
    def test_of_options(self, capsys, tmp_path):
        (tmp_path / "config.yaml").write_text("decoding: exakt\n")
        (tmp_path / "typo.yaml").write_text("tempature: 2\n")
        (tmp_path / "broken.yaml").write_text("a: [")
        for options, message in (
            (["--tempature", "2"], "--tempature is not an option of this command; did you mean --temperature?"),
            (["--temp", "2"], "--temp is not an option of this command"),  # abbreviations may match the wrong one
            (["--normalize", "tree"], "argument --normalize: invalid choice: 'tree' (choose from 'trie', 'vocab')."),
            (["--temperature_positions", "x"], "argument --temperature_positions: invalid choice"),
            (["--max_length", "x"], "argument --max_length: invalid int value: 'x'."),
            (["x"], "'x' is not the value of any option."),
            (["--config"], "--config needs a file."),
            (
                ["--config", tmp_path / "config.yaml"],
                "--decoding is 'exakt' in the YAML file: choose from exact, beam,",
            ),
            (["--config", tmp_path / "typo.yaml"], "did you mean --temperature?"),
            ([f"--config={tmp_path}/broken.yaml"], "The file after --config can't be read"),
            (["--config", tmp_path / "none"], "none: No such file or directory"),
        ):
            assert message in fail(capsys, "train", *options)
        assert "required: --model_name_or_path. See trl-msl doctor --help." in fail(capsys, "doctor")

    def test_name_options(self, capsys, tmp_path, base_model):
        options = ["--model_name_or_path", base_model, "--output_dir", tmp_path]
        error = fail(capsys, "train", *options, "--normalize", "vocab")
        assert "--temperature adaptive is estimated from all valid tokens, which --normalize vocab does" in error

    def test_debug_shows_where(self, capsys, base_model):
        options = ["train", "--model_name_or_path", str(base_model), "--data_dir", "nowhere", "--debug"]
        with pytest.raises(ValueError, match="nowhere"):
            cli.main(options)
        assert "--debug: invalid DebugOption value" in fail(capsys, *options, "x")  # TRL's option of that name

    def test_output_that_cannot_be_written(self, capsys, tmp_path, base_model):
        """Found first, and nothing is left behind."""
        (tmp_path / "file").touch()
        options = ["--model_name_or_path", base_model, "--data_dir", "nowhere"]
        error = fail(capsys, "train", *options, "--output_dir", tmp_path / "file" / "below")
        assert error.endswith(f"--output_dir is '{tmp_path}/file/below', which can't be written: Not a directory.\n")
        options = ["--model_name_or_path", base_model, "--users", "nowhere.csv"]
        assert "--output is" in fail(capsys, "recommend", *options, "--output", tmp_path / "file" / "found.csv")
        assert "nowhere" in fail(capsys, "recommend", *options, "--output", tmp_path / "new" / "found.csv")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    @pytest.mark.parametrize("messages", [[], ["stopped at step 30"]])
    def test_ctrl_c(self, messages, capsys, monkeypatch, folder, base_model):
        def stop(*args):
            raise KeyboardInterrupt(*messages)

        monkeypatch.setattr(train, "load_data", stop)
        error = fail(capsys, "train", "--data_dir", folder, "--model_name_or_path", base_model, code=130)
        assert error == f"trl-msl train: {messages[0] if messages else 'stopped'}\n"

    def test_a_reader_that_leaves(self):
        """As `| head` does; stdout here is a pipe without a reader."""
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "trl_msl.scripts.cli", "--help"]
        ended = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
        os.close(writing)
        assert (ended.returncode, ended.stderr) == (141, "")

    def test_of_one_of_two_processes(self, tmp_path):
        """It ends the others, which wait for it."""
        script = tmp_path / "script.py"
        script.write_text(TWO_PROCESSES)
        output = launch(script, "--output_dir", tmp_path, fails=True, num_processes=2)
        assert "script.py: error: --output_dir is wrong here\n" in output and "the end" not in output


@pytest.mark.usefixtures("argv")
class TestFileOfATraining:
    @pytest.fixture
    def config(self, tmp_path, folder, base_model):
        options = {"data_dir": str(folder), "prompt_text": PROMPT[1], "model_name_or_path": str(base_model)}
        options |= {"output_dir": str(tmp_path / "trained"), "max_steps": 4, "use_peft": True, "max_test_users": 2}
        options |= {"decoding": "beam", "save_strategy": False, "learning_rate": 1e-3}
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
        return tmp_path / "train.yaml"

    def test_names_the_data_of_an_evaluation(self, config, tmp_path, capsys, model_with_task, caplog):
        error = fail_after_notes(capsys, "evaluate", "--config", config)
        left_out = "model_name_or_path, output_dir, max_steps, save_strategy, learning_rate."
        assert f"Options of a training that this command ignores: {left_out}\n" in error
        assert error.endswith("--model_name_or_path is missing: pass the folder or repository of a model.\n")
        options = ["--model_name_or_path", model_with_task, "--output_dir", tmp_path / "evaluated"]
        with caplog.at_level("INFO"):
            run(evaluate, "--config", config, *options)
        assert left_out in caplog.text and not (tmp_path / "trained").exists()
        metrics = json.loads((tmp_path / "evaluated" / "metrics.json").read_text())
        assert metrics["beam"]["num_rows"] == 2 and "exact" not in metrics

    def test_names_data_and_base_model_for_the_doctor(self, config, capsys):
        assert cli.main(["doctor", "--config", str(config)]) == 0
        assert "ignores: output_dir, max_steps, use_peft, decoding, save_strategy," in capsys.readouterr().err

    def test_typos_are_errors(self, config, capsys):
        config.write_text(config.read_text() + "max_stepps: 3\n")
        assert "--max_stepps is not an option of this command; did you mean --max_steps?" in fail(
            capsys, "evaluate", "--config", config
        )

    def test_is_not_for_other_trainings(self, config, capsys):
        """The learning rate of an LLM is not that of SASRec, nor the loss's temperature that of softmax DPO."""
        config.write_text(config.read_text() + "temperature: 2.0\n")
        assert "--temperature is not an option" in fail(capsys, "dpo", "--config", config)


TWO_PROCESSES = """
from accelerate import PartialState
from trl_msl.scripts.command_line import command
from trl_msl.scripts.merge import MergeArguments

def main(args: MergeArguments):
    process = PartialState(cpu=True)
    if process.process_index == 1:
        raise ValueError("`output_dir` is wrong here")
    process.wait_for_everyone()
    print("the end")

command(main, doc="Help")()
"""


@pytest.mark.usefixtures("argv")
def test_log_of_a_command(capsys, tmp_path, folder, base_model):
    """Plain lines on stderr from level INFO on, and only while the command runs."""
    logger = logging.getLogger("trl_msl.scripts.train")

    def main(args: DataArguments) -> None:
        logger.info("min_interactions=%d", args.min_interactions)
        for _ in range(2):  # as for each split
            logger.warning("`data_dir` is '%s'", args.data_dir)

    main.__annotations__ = {"args": DataArguments}
    sys.argv = ["trl-msl train", "--data_dir", str(folder)]
    command_line.command(main, doc="Help")()
    assert capsys.readouterr().err == f"--min_interactions 5\n--data_dir is '{folder}'\n"
    logger.info("quiet")
    assert capsys.readouterr().err == "" and logging.getLogger("trl_msl").handlers == []


@pytest.mark.usefixtures("argv")
def test_nothing_foreign_on_stderr(tmp_path, folder, tokenizer, capsys, recwarn, monkeypatch):
    """Here of a model without a padding token, whose start token is not the tokenizer's."""
    model = make_model(tokenizer)
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.bos_token_id = None, 7
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    handlers = logging.getLogger("transformers").handlers
    (handler,) = (handler for handler in handlers if type(handler) is logging.StreamHandler)  # not those of pytest
    monkeypatch.setattr(handler, "stream", sys.stderr)
    base, data = ["--model_name_or_path", tmp_path / "base"], ["--data_dir", folder, *PROMPT]
    trained, options = ["--model_name_or_path", tmp_path / "out"], ["--max_steps", 2, "--report_to", "none"]
    for arguments in (
        ["doctor", *data, *base, "--load_model"],
        ["train", *data, *base, *options, "--output_dir", tmp_path / "out", "--use_peft"],
        ["evaluate", *data, *trained, "--output_dir", tmp_path / "evaluated"],
        ["dpo", *data, *trained, *options, "--output_dir", tmp_path / "dpo"],
    ):
        cli.main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert not re.search("warn|deprecat|PAD/BOS/EOS", error, flags=re.IGNORECASE)
    shown = [str(warning.message) for warning in recwarn if issubclass(warning.category, FutureWarning | UserWarning)]
    assert shown == []


def test_doctor_takes_chat_template_kwargs_once(folder, base_model, capsys):
    options = ["--data_dir", folder, "--model_name_or_path", base_model, *PROMPT]
    run(doctor, *options, "--conversational", "--chat_template_kwargs", '{"enable_thinking": false}')
    assert " findings: 0 errors, " in capsys.readouterr().out


def test_log_lines_and_what_else_writes(capsys, caplog):
    """Progress bars, and DeepSpeed, which logs to stdout."""
    with log_lines():
        bar = tqdm(total=2, file=sys.stderr)
        logging.getLogger("trl_msl").info("a line")
        logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If you have GPU, ...")
        bar.close()
    before, line, _ = capsys.readouterr().err.partition("a line\n")
    assert line and "0/2" in before and before.split("\r")[-1].strip() == ""
    assert caplog.text == ""


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
        assert f"{tmp_path} has checkpoints of an earlier run: training starts from the beginning" in caplog.text
        caplog.clear()
        config.output_dir = str(tmp_path / "new")
        assert checkpoint_to_resume(config) is None and caplog.text == ""


def test_training_without_matplotlib(tmp_path, folder, base_model, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    options = ["--data_dir", folder, "--model_name_or_path", base_model, *PROMPT, *FEW_STEPS]
    with caplog.at_level(logging.WARNING):
        run(train, *options, "--output_dir", tmp_path)
    assert (tmp_path / "metrics.json").is_file() and not (tmp_path / "training.png").exists()
    assert "training.png was left out, as matplotlib is not installed: pip install" in caplog.text


def test_generated_data():
    data = load_data(DataArguments(max_validation_users=5, max_test_users=10**6))
    assert [len(split) for split in data.windows.values()] == [4000, 5, 500]
    assert len(load_data(DataArguments(train_period=[0, 0.5])).windows["train"]) == 2250
    assert 0.5 < data.best_possible["ndcg@10"] < 0.7
