# SPDX-License-Identifier: Apache-2.0
"""
Write preference rows for TRL: the item that came next is chosen, others of the catalogue are rejected.

Pairs for TRL's own DPO script, which then runs on a model trained with MSL, after its adapter has been merged:

```bash
accelerate launch -m trl_msl.scripts.preferences --model_name_or_path outputs/quickstart/msl \
    --negatives model --num_negatives 3 --pairs --output_dir outputs/preferences
trl-msl merge --model_name_or_path outputs/quickstart/msl --output_dir outputs/merged
accelerate launch -m trl.scripts.dpo --model_name_or_path outputs/merged --dataset_name outputs/preferences \
    --use_peft --output_dir outputs/dpo
trl-msl evaluate --model_name_or_path outputs/dpo
```

Without `--pairs`, `rejected` is a list, as `trl-msl dpo` takes it by `--preferences`, or makes it by itself.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from ..data import DataArguments
from ..softmax_dpo import split_pairs
from .command_line import command
from .loading import load_data, load_task
from .negatives import NegativeArguments, make_preferences
from .outputs import finish, write_parquet


@dataclass
class PreferenceArguments(NegativeArguments):
    """
    Arguments of this command, besides those of the data and the model.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"outputs/preferences"`):
            Folder to write `train.parquet` and `validation.parquet` into.
        pairs (`bool`, *optional*, defaults to `False`):
            Whether to write a row for each rejected item, as TRL's own `DPOTrainer` takes them.
        seed (`int`, *optional*, defaults to `0`):
            Seed of what is drawn.
        batch_size (`int`, *optional*, defaults to `16`):
            Users per process that are decoded at a time for `--negatives model`.
        max_length (`int`, *optional*):
            Most tokens of a prompt and an item together, for models saved without a task.
    """

    output_dir: str = field(default="outputs/preferences", metadata={"help": "Folder to write into."})
    pairs: bool = field(default=False, metadata={"help": "Write a row for each rejected item, for TRL's DPOTrainer."})
    seed: int = field(default=0, metadata={"help": "Seed of what is drawn."})
    batch_size: int = field(default=16, metadata={"help": "Users per process decoded at a time."})
    max_length: int | None = field(default=None, metadata={"help": "Longer prompts lose their oldest items."})


def main(args: PreferenceArguments, data_args: DataArguments, model_args: ModelConfig) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing: pass the model to train, whose tokenizer is used.")
    process = PartialState(cpu=not torch.accelerator.is_available())
    data = load_data(data_args)
    task = load_task(model_args, data_args, data.catalog, args.max_length)
    model = None
    if args.negatives == "model":
        model = AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
            trust_remote_code=False,
        ).to(process.device)
    preferences = make_preferences(args, data, task, model, args.seed, batch_size=args.batch_size)
    if process.is_main_process:
        for split, rows in preferences.items():
            print(f"{split}: {len(rows):,} rows, {sum(map(len, rows['rejected'])):,} rejected items")
            columns = ["prompt", "chosen", "rejected", "history"]
            rows = split_pairs(rows) if args.pairs else rows.select_columns(columns)
            write_parquet(Path(args.output_dir) / f"{split}.parquet", rows)
        print(args.output_dir)
    finish()


run = command(main, generated_data=True)


if __name__ == "__main__":
    run()
