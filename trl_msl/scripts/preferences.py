# SPDX-License-Identifier: Apache-2.0
"""
Write preference rows: the item that came next is chosen, others of the catalogue are rejected.

Pairs for TRL's own DPO script, for a model trained with MSL whose adapter has been merged:

```bash
accelerate launch -m trl_msl.scripts.preferences --model_name_or_path outputs/quickstart/msl \
    --negatives model --num_negatives 3 --pairs --output_dir outputs/preferences
trl-msl merge --model_name_or_path outputs/quickstart/msl --output_dir outputs/merged
accelerate launch -m trl.scripts.dpo --model_name_or_path outputs/merged --dataset_name outputs/preferences \
    --use_peft --output_dir outputs/dpo
trl-msl evaluate --model_name_or_path outputs/dpo
```

Items and prompt are those of the model's training, and so are the windows unless the data options name others. Without
`--pairs`, `rejected` is a list, as `trl-msl dpo` takes it by `--preferences`, or makes it itself.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel
from trl import ModelConfig

from ..data import DataArguments, RankingTask
from ..softmax_dpo import build_preferences, count_interactions, draw_negatives, model_negatives, split_pairs
from .command_line import command
from .loading import Data, load_model
from .outputs import finish, write_parquet
from .trained import load_trained


@dataclass
class NegativeArguments:
    """
    Arguments that say which items are rejected.

    Parameters:
        negatives (`str`, *optional*, defaults to `"model"`):
            Where they come from: `uniform`, the whole catalogue; `popular`, the same by how often items occur in
            train; `near`, items that share most of the target's first tokens; `model`, items that the model ranks
            highest.
        num_negatives (`int`, *optional*, defaults to `3`):
            Number of rejected items of a row.
        max_preferences (`int`, *optional*):
            Maximum number of training rows. If there are more, they are drawn at random.
    """

    negatives: str = field(
        default="model",
        metadata={"help": "Where rejected items come from.", "choices": ["uniform", "popular", "near", "model"]},
    )
    num_negatives: int = field(default=3, metadata={"help": "Number of rejected items of a row."})
    max_preferences: int | None = field(default=None, metadata={"help": "Maximum number of training rows."})


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
            Random seed.
        batch_size (`int`, *optional*, defaults to `16`):
            Users per process that are decoded at a time for `--negatives model`.
        max_length (`int`, *optional*):
            Most tokens of a prompt and an item together, for models saved without a task.
    """

    output_dir: str = field(default="outputs/preferences", metadata={"help": "Folder to write into."})
    pairs: bool = field(default=False, metadata={"help": "Write a row for each rejected item, for TRL's DPOTrainer."})
    seed: int = field(default=0, metadata={"help": "Random seed."})
    batch_size: int = field(default=16, metadata={"help": "Users per process decoded at a time."})
    max_length: int | None = field(default=None, metadata={"help": "Longer prompts lose their oldest items."})


def main(args: PreferenceArguments, data_args: DataArguments, model_args: ModelConfig) -> None:
    process = PartialState(cpu=not torch.accelerator.is_available())
    data, task = load_trained(model_args, data_args, args.max_length)
    model = load_model(model_args) if args.negatives == "model" else None
    preferences = make_preferences(args, data, task, model, args.seed, batch_size=args.batch_size)
    if process.is_main_process:
        for split, rows in preferences.items():
            print(f"{split}: {len(rows):,} rows, {sum(map(len, rows['rejected'])):,} rejected items")
            columns = ["prompt", "chosen", "rejected", "history"]
            rows = split_pairs(rows) if args.pairs else rows.select_columns(columns)
            write_parquet(Path(args.output_dir) / f"{split}.parquet", rows)
        print(args.output_dir)
    finish()


def make_preferences(
    args: NegativeArguments, data: Data, task: RankingTask, model: PreTrainedModel | None, seed: int, **kwargs: Any
) -> DatasetDict:
    """
    Preference rows of train and validation. `negatives` = `"model"` takes `model` and `kwargs`, as for
    [`model_negatives`].
    """
    preferences = DatasetDict()
    for split in ("train", "validation"):
        rows = data.rows(split, task)
        if split == "train":
            rows = draw_rows(rows, args.max_preferences, seed)
        if args.negatives == "model":
            drawn = model_negatives(model, task, rows, args.num_negatives, **kwargs)
        else:
            is_popular = args.negatives == "popular"
            counts = count_interactions(data.windows["train"], task.catalog) if is_popular else None
            drawn = draw_negatives(rows, task, args.negatives, args.num_negatives, counts, seed)
        preferences[split] = build_preferences(rows, task, drawn)
    return preferences


def draw_rows(rows: Dataset, most: int | None, seed: int) -> Dataset:
    """At most `most` of the rows, all by default."""
    return rows if most is None or most >= len(rows) else rows.shuffle(seed).select(range(most))


run = command(main)


if __name__ == "__main__":
    run()
