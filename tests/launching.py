# SPDX-License-Identifier: Apache-2.0
"""Scripts run as users run them, by `accelerate launch`, on CPU processes."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
from conftest import ROOT
from helpers import TITLES, make_windows


FEW_STEPS = [
    "--max_steps", "4", "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4",
    "--logging_steps", "1", "--report_to", "none", "--bf16", "false", "--gradient_checkpointing", "false", "--use_cpu",
]  # fmt: skip
TINY = [
    "--scratch_hidden_size", "32", "--scratch_num_layers", "1", "--scratch_pretrain_steps", "2", *FEW_STEPS
]  # fmt: skip
PROMPT = ["--prompt_text", "The user has read: {history}\nNext: "]


def run(module, *arguments) -> int | None:
    """A command in this process: `run(train, "--data_dir", folder)`."""
    return module.run([str(argument) for argument in arguments])


def write_log(folder: Path) -> tuple[list, list[list[str]]]:
    """An interaction log and its items: the options that name them, and the histories of the users."""
    histories = make_windows([f"b{index}" for index in range(len(TITLES))], 30)["item_ids"][:]
    events = [(user, item, 100 * user + t) for user, ids in enumerate(histories) for t, item in enumerate(ids)]
    pd.DataFrame(events, columns=["user_id", "item_id", "timestamp"]).to_csv(folder / "log.csv", index=False)
    items = pd.DataFrame({"item_id": [f"b{index}" for index in range(len(TITLES))], "title": TITLES})
    items.to_csv(folder / "items.csv", index=False)
    options = ["--interactions", folder / "log.csv", "--items", folder / "items.csv", "--min_interactions", 2]
    return options, histories


def launch(script, *arguments, fails: bool = False, num_processes: int = 1, config: str | None = None) -> str:
    """
    Run a script of `recipes/`, or one by its path, or a module, and return what it printed.

    `config` is the name of a file in `recipes/accelerate_configs/`; several processes take that of DDP by default.
    """
    process = start(script, *arguments, num_processes=num_processes, config=config)
    output, errors = process.communicate(timeout=280)
    assert (process.returncode != 0) == fails, output[-3000:] + errors[-3000:]
    return output + errors


def start(script, *arguments, num_processes: int = 1, config: str | None = None) -> subprocess.Popen:
    """As [`launch`], without waiting for its end. No launcher for one process of a command."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0", "--num_processes", str(num_processes)]
    if num_processes > 1:
        config = config or "multi_gpu"
        command += ["--config_file", str(ROOT / "recipes" / "accelerate_configs" / f"{config}.yaml")]
    if config == "fsdp2":
        command.append(str(ROOT / "tests" / "fsdp_on_cpu.py"))
    if num_processes == 1 and str(script).startswith("trl_msl."):
        command = [sys.executable]
    # a module is named as in Python, with dots
    command += ["-m", script] if not str(script).endswith(".py") else [str(ROOT / "recipes" / script)]
    command += map(str, arguments)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
    }
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
