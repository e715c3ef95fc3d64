# SPDX-License-Identifier: Apache-2.0
"""
Compare losses from the same start and with the same updates: the masked softmax loss, the usual one by TRL's
`SFTTrainer`, and the model untrained.

```bash
accelerate launch -m trl_msl.experiments.compare_losses --config recipes/configs/amazon_small.yaml \
    --data_dir data/Book --empty_texts keep --output_dir outputs/amazon_books
```

`output_dir` then holds a folder for each loss, as `trl-msl train` leaves it, `summary.json` and `training.png`.
Without `model_name_or_path` a small model is made first, in `base_model`.
"""

import dataclasses
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import ModelConfig, SFTConfig

from ..data import DataArguments, RankingTask, tokenize_rows
from ..scripts.command_line import command
from ..scripts.loading import Data, load_data, load_tokenizer, make_task, model_options
from ..scripts.outputs import finish, format_table, plot_training, write_json
from ..scripts.train import make_trainer, reported
from ..scripts.train_and_evaluate import DecodingArguments, evaluate_and_write, train_and_evaluate, trainer_options
from ..training import MSLConfig
from .from_scratch import ScratchArguments, write_base_model
from .pretrain import PlainTrainer


@dataclass
class ComparisonArguments(DecodingArguments):
    """
    Arguments of this comparison, besides those of the data, the trainer and the model.

    Parameters:
        loss (`list[str]`, *optional*, defaults to `["untrained", "lml", "msl"]`):
            What to compare: `msl`, `lml` (TRL's `SFTTrainer`), and `untrained`.
    """

    loss: list[str] = field(
        default_factory=lambda: ["untrained", "lml", "msl"],
        metadata={"help": "What to compare.", "choices": ["msl", "lml", "untrained"]},
    )


def main(
    args: ComparisonArguments,
    data_args: DataArguments,
    scratch_args: ScratchArguments,
    config: MSLConfig,
    model_args: ModelConfig,
) -> None:
    if config.resume_from_checkpoint not in (None, "last") and len(args.loss) > 1:
        raise ValueError(
            f"`resume_from_checkpoint` is for one run, but `loss` is {args.loss}: pass only the one to resume, or "
            "'last' for the last checkpoint of each."
        )
    sharding = [name for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED") if os.environ.get(name) == "true"]
    if sharding and "untrained" in args.loss:
        raise ValueError("`loss` holds `untrained`, which a sharded run can't evaluate: use `trl-msl evaluate`.")
    started, process, output_dir = time.time(), PartialState(), Path(config.output_dir)
    data, task = prepare(output_dir, data_args, scratch_args, config, model_args)
    results, histories = {}, {}
    for name in args.loss:
        process.print(f"\n=== {name} ===")
        run_config = dataclasses.replace(config, output_dir=str(output_dir / name))
        results[name], history = run_loss(name, task, data, args, run_config, model_args)
        if history:
            histories[name] = history
    if data.best_possible:
        results["best_possible"] = data.best_possible
    if process.is_main_process:
        if histories:
            plot_training(histories, output_dir / "training.png")
        write_json(output_dir / "summary.json", {**results, "seconds": round(time.time() - started, 1)})
        num_users = len(data.windows["test"])
        print(f"\nTest, {num_users} users, {len(data.catalog)} items\n{format_table(results)}")
        print(f"\n{output_dir}/summary.json, {time.time() - started:.0f} seconds")
    finish()


def prepare(
    folder: Path, data_args: DataArguments, scratch_args: ScratchArguments, config: MSLConfig, model_args: ModelConfig
) -> tuple[Data, RankingTask]:
    """Data and task. If `model_args` names no model, one is made in `folder`, and named there."""
    data = load_data(data_args)
    if model_args.model_name_or_path is None:
        model_args.model_name_or_path = str(folder / "base_model")
        base, resumes = Path(model_args.model_name_or_path), config.resume_from_checkpoint is not None
        write_base_model(base, data.catalog, data_args.prompt_template, scratch_args, config.seed, resumes)
    tokenizer = load_tokenizer(model_args, config.trust_remote_code)
    return data, make_task(tokenizer, data_args, data.catalog, config.max_length)


def run_loss(
    name: str,
    task: RankingTask,
    data: Data,
    args: ComparisonArguments,
    config: MSLConfig,
    model_args: ModelConfig,
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Train with a loss, and test: the test's metrics and the log of the training."""
    if name == "untrained":
        options = model_options(model_args, config)
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **options)
        costs = {"train_seconds": 0.0, "num_trainable_parameters": 0, "seed": config.seed, "arguments": {"loss": name}}
        model = model.to(PartialState().device)
        return evaluate_and_write(model, task, data, args, Path(config.output_dir), costs), []
    if name == "msl":
        trainer, arguments = make_trainer(task, data, config, model_args), reported(config)
    else:
        rows = (tokenize(split, task, data, config) for split in ("train", "validation"))
        options = trainer_options(as_sft(config), model_args, *rows)
        trainer, arguments = PlainTrainer(processing_class=task.tokenizer, **options), {"loss": name}
    metrics = train_and_evaluate(trainer, task, data, args, name, {"arguments": arguments})
    return metrics, trainer.state.log_history


def tokenize(split: str, task: RankingTask, data: Data, config: MSLConfig) -> Dataset:
    """The tokens that [`MSLTrainer`] has, with themselves as labels."""
    rows = data.rows(split, task)
    supervise_history = config.supervise_history and split == "train"
    with PartialState().main_process_first():
        return rows.map(
            tokenize_rows,
            batched=True,
            remove_columns=rows.column_names,
            fn_kwargs={"task": task, "labels": "tokens", "supervise_history": supervise_history},
            desc=f"Tokenizing {split}",
        )


def as_sft(config: MSLConfig) -> SFTConfig:
    """The part of an `MSLConfig` that TRL's `SFTTrainer` knows. Only the model trained with MSL is pushed."""
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(SFTConfig) if f.init}
    return SFTConfig(**{**options, "push_to_hub": False})


run = command(main, model_is_optional=True)


if __name__ == "__main__":
    run()
