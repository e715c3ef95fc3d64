# SPDX-License-Identifier: Apache-2.0
"""
Evaluate a trained recommender: a folder or Hub repository with a model or a LoRA adapter.

```bash
accelerate launch recipes/evaluate.py --model_name_or_path outputs/quickstart/msl
```

The data options are those of `sft_msl.py`, and so is the generated data without them. Several ways of decoding are
compared on the same users, with the difference of each to the first:

```bash
accelerate launch recipes/evaluate.py --model_name_or_path outputs/quickstart/msl --decoding exact beam beam-vocab
```

Writes `metrics.json` and `recommendations.txt` into `--output_dir`.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from recipe_data import check_template, load_recipe_data, with_quickstart_data
from recipe_evaluation import DECODINGS, evaluate_decodings
from recipe_outputs import describe_recommendations, format_table, write_json
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, TrlParser

from trl_msl import DataArguments, Recommendations, bootstrap_interval, per_user_metrics


@dataclass
class EvaluationArguments:
    """
    Arguments of this recipe, besides those of the data and the model.

    Parameters:
        output_dir (`str`, *optional*, defaults to `"outputs/evaluate"`):
            Folder to write into.
        split (`str`, *optional*, defaults to `"test"`):
            `validation` or `test`.
        top_k (`int`, *optional*, defaults to `10`):
            Number of items to rank.
        decoding (`list[str]`, *optional*, defaults to `["exact"]`):
            How to find the best items: `exact`; `beam`, beam search by the restricted probability that MSL trains;
            `beam-vocab`, by the probability over the vocabulary, as published code does; or `generate`, like `beam`
            for models that the engine can't run.
        num_beams (`int`, *optional*):
            Beam width, `top_k` by default.
        length_penalty (`float`, *optional*, defaults to `0.0`):
            As for `generate`, for beams.
        match (`str`, *optional*, defaults to `"id"`):
            Whether a hit is the item itself (`id`) or any item with its text (`text`).
        batch_size (`int`, *optional*, defaults to `16`):
            Users per process that are decoded at a time.
        max_length (`int`, *optional*):
            As in training: longer prompts lose their oldest history items.
        chat_template_kwargs (`dict`, *optional*):
            As in training, JSON.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the model.
    """

    output_dir: str = field(default="outputs/evaluate", metadata={"help": "Folder to write into."})
    split: str = field(default="test", metadata={"help": "Split.", "choices": ["validation", "test"]})
    top_k: int = field(default=10, metadata={"help": "Number of items to rank."})
    decoding: list[str] = field(
        default_factory=lambda: ["exact"], metadata={"help": "How to decode.", "choices": list(DECODINGS)}
    )
    num_beams: int | None = field(default=None, metadata={"help": "Beam width, `top_k` by default."})
    length_penalty: float = field(default=0.0, metadata={"help": "As for `generate`, for beams."})
    match: str = field(default="id", metadata={"help": "What counts as a hit.", "choices": ["id", "text"]})
    batch_size: int = field(default=16, metadata={"help": "Users per process decoded at a time."})
    max_length: int | None = field(default=None, metadata={"help": "Longer prompts lose their oldest items."})
    chat_template_kwargs: str | None = field(default=None, metadata={"help": "As in training, JSON."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


def main(args: EvaluationArguments, data_args: DataArguments, model_args: ModelConfig) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing: pass the folder or repository of a trained model.")
    if args.decoding == ["exact"] and (args.num_beams or args.length_penalty):
        raise ValueError("`num_beams` and `length_penalty` mean nothing to exact search: add beam to `--decoding`.")
    process = PartialState(cpu=not torch.accelerator.is_available())
    data = load_recipe_data(data_args)
    check_template(model_args.model_name_or_path, data.template)
    loading = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **loading)
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        **loading,
    ).to(process.device)
    chat_template_kwargs = json.loads(args.chat_template_kwargs) if args.chat_template_kwargs else None
    trie = data.catalog.build_trie(tokenizer, data_args.conversational, chat_template_kwargs)
    rows = data.rows[args.split]
    ks = sorted({min(5, args.top_k), args.top_k})
    settings = {
        "ks": ks,
        "match": args.match,
        "batch_size": args.batch_size,
        "max_length": args.max_length,
        "prompt_template": data.template,
        "chat_template_kwargs": chat_template_kwargs,
    }
    beams = {"num_beams": args.num_beams, "length_penalty": args.length_penalty}
    results, found = evaluate_decodings(
        args.decoding, model, tokenizer, trie, data.catalog, rows, beam_settings=beams, **settings
    )
    first, *others = found
    differences = {f"{other} - {first}": compare(found[other], found[first], ks) for other in others}
    if process.is_main_process:
        text = describe_recommendations(rows, data.catalog, found[first])
        report = {**results, "differences": differences, "arguments": dataclasses.asdict(args)}
        write_json(Path(args.output_dir) / "metrics.json", report)
        (Path(args.output_dir) / "recommendations.txt").write_text(text, encoding="utf-8")
        columns = tuple(f"{name}@{k}" for k in ks for name in ("ndcg", "hr"))
        print(f"{text}\n{model_args.model_name_or_path}, {len(rows)} users\n{format_table(results, columns)}")
        if differences:
            print(f"\nDifference, with its interval\n{format_table(differences, (*columns, 'same_items'))}")
    # A rank that exits while others still talk, or with the group's threads alive, is aborted
    process.wait_for_everyone()
    process.destroy_process_group()


def compare(found: Recommendations, other: Recommendations, ks: list[int]) -> dict[str, float]:
    """
    Mean differences of the metrics of the same users, with their bootstrap intervals; and for what share of the users
    the two found the same items, in any order.
    """
    difference = {"same_items": float((np.sort(found.items) == np.sort(other.items)).all(axis=1).mean())}
    values, others = (per_user_metrics(result.target_ranks, tuple(ks)) for result in (found, other))
    for name in values:
        per_user = values[name] - others[name]
        difference[name] = float(per_user.mean())
        difference[f"{name}_low"], difference[f"{name}_high"] = bootstrap_interval(per_user)
    return difference


if __name__ == "__main__":
    parser = TrlParser((EvaluationArguments, DataArguments, ModelConfig))
    main(*parser.parse_args_and_config(with_quickstart_data(sys.argv[1:])))
