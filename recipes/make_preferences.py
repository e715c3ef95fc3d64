# SPDX-License-Identifier: Apache-2.0
"""
Write preference rows for TRL: the item that came next is chosen, others of the catalogue are rejected.

Pairs for TRL's own DPO script, which then runs on a model trained with MSL, after its adapter has been merged:

```bash
accelerate launch recipes/make_preferences.py --model_name_or_path outputs/quickstart/msl \
    --negatives model --num_negatives 3 --pairs --output_dir outputs/preferences
python recipes/merge_adapter.py --model_name_or_path outputs/quickstart/msl --output_dir outputs/merged
accelerate launch -m trl.scripts.dpo --model_name_or_path outputs/merged --dataset_name outputs/preferences \
    --use_peft --output_dir outputs/dpo
accelerate launch recipes/evaluate.py --model_name_or_path outputs/dpo
```

Without `--pairs` `rejected` is a list, as `recipes/softmax_dpo.py` makes and uses it by itself.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from preference_data import NegativeArguments, make_preferences
from recipe_data import load_recipe_data, with_quickstart_data
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, TrlParser

from trl_msl import DataArguments, split_pairs


@dataclass
class PreferenceArguments(NegativeArguments):
    """
    Arguments of this recipe, besides those of the data and the model.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"outputs/preferences"`):
            Folder to write `train.parquet` and `validation.parquet` into.
        pairs (`bool`, *optional*, defaults to `False`):
            Whether to write a row for each rejected item, as TRL's own `DPOTrainer` takes them.
        seed (`int`, *optional*, defaults to `0`):
            Seed of what is drawn.
        batch_size (`int`, *optional*, defaults to `16`):
            Users per process that are decoded at a time for `--negatives model`.
        max_length, chat_template_kwargs (*optional*):
            As in training, for `--negatives model`; the latter as JSON.
    """

    output_dir: str = field(default="outputs/preferences", metadata={"help": "Folder to write into."})
    pairs: bool = field(default=False, metadata={"help": "Write a row for each rejected item, for TRL's DPOTrainer."})
    seed: int = field(default=0, metadata={"help": "Seed of what is drawn."})
    batch_size: int = field(default=16, metadata={"help": "Users per process decoded at a time."})
    max_length: int | None = field(default=None, metadata={"help": "Longer prompts lose their oldest items."})
    chat_template_kwargs: str | None = field(default=None, metadata={"help": "As in training, JSON."})


def main(args: PreferenceArguments, data_args: DataArguments, model_args: ModelConfig) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing: pass the model to be trained, whose tokenizer counts.")
    process = PartialState(cpu=not torch.accelerator.is_available())
    data = load_recipe_data(data_args)
    loading = {"revision": model_args.model_revision, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **loading)
    chat_template_kwargs = json.loads(args.chat_template_kwargs or "null")
    trie = data.catalog.build_trie(tokenizer, data_args.conversational, chat_template_kwargs)
    model = None
    if args.negatives == "model":
        model = AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path, dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation, **loading,
        ).to(process.device)  # fmt: skip
    preferences = make_preferences(
        args, data, model, tokenizer, trie, args.seed, batch_size=args.batch_size, max_length=args.max_length,
        prompt_template=data.template, chat_template_kwargs=chat_template_kwargs,
    )  # fmt: skip
    if process.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        for split, rows in preferences.items():
            print(f"{split}: {len(rows):,} rows, {sum(map(len, rows['rejected'])):,} rejected items")
            columns = ["prompt", "chosen", "rejected", "history"]
            rows = split_pairs(rows) if args.pairs else rows.select_columns(columns)
            temporary = Path(args.output_dir) / f".{split}.tmp"
            rows.to_parquet(str(temporary))
            temporary.replace(temporary.with_name(f"{split}.parquet"))
        print(args.output_dir)
    process.wait_for_everyone()
    process.destroy_process_group()


if __name__ == "__main__":
    parser = TrlParser((PreferenceArguments, DataArguments, ModelConfig))
    main(*parser.parse_args_and_config(with_quickstart_data(sys.argv[1:])))
