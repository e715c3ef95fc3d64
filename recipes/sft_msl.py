# SPDX-License-Identifier: Apache-2.0
"""
Fine-tune an LLM recommender with the masked softmax loss, or the usual one, and evaluate it.

Without arguments: generated data, a small model, both losses, in a few minutes on a CPU.

```bash
accelerate launch recipes/sft_msl.py
```

A folder of the MSL paper's authors, a model from the Hub, LoRA:

```bash
accelerate launch recipes/sft_msl.py \
    --data_dir data/Book --train_file train_10000.csv --empty_texts keep --prompt_words book books read \
    --model_name_or_path meta-llama/Llama-3.2-3B --use_peft --lora_r 8 --lora_alpha 16 \
    --loss msl --learning_rate 1e-4 --per_device_train_batch_size 16 --gradient_accumulation_steps 8 \
    --num_train_epochs 10 --output_dir outputs/book
```

Your own log, a chat model:

```bash
accelerate launch recipes/sft_msl.py \
    --interactions log.parquet --items items.csv --conversational \
    --model_name_or_path Qwen/Qwen3-0.6B --use_peft --output_dir outputs/mine
```

A run that was killed goes on from its last whole checkpoint with `--resume_from_checkpoint last`.

All options can stand in a YAML file: `--config recipes/configs/quickstart.yaml`. What it leaves in `output_dir`: the
trained model of each loss with `metrics.json`, `rankings.parquet`, `log_history.json` and `recommendations.txt`, and
`summary.json` and `training.png`. With `--run_name` a run of one loss gets a folder of that name, so that many can be
compared by `report.py`.
"""

import dataclasses
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from ablation import LossProbe, ScaledLossTrainer
from accelerate import PartialState
from datasets import DatasetDict
from recipe_data import QUICKSTART, RecipeData, load_recipe_data
from recipe_evaluation import DECODINGS, evaluate_decodings
from recipe_outputs import describe_recommendations, format_table, plot_training, write_json, write_results
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Trainer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from trl_msl import DataArguments, ItemTrie, MSLConfig, RecommendationCallback, is_sharded, tokenize_rows
from trl_msl.experiments.from_scratch import ScratchArguments, write_base_model


# What tells one run from another, for `report.py`
REPORTED = (
    "normalize", "temperature", "learning_rate", "num_train_epochs", "max_steps", "supervise_history", "num_negatives",
    "negative_scale",
)  # fmt: skip


@dataclass
class RecipeArguments:
    """
    Arguments of this recipe, besides those of the data, the trainer and the model.

    Parameters:
        loss (`list[str]`, *optional*, defaults to `["msl"]`):
            What to train and compare, from the same start and with the same updates: `msl`, `lml` (TRL's
            `SFTTrainer`), and `untrained`.
        decoding (`list[str]`, *optional*, defaults to `["exact"]`):
            How the test finds the best items: `exact`, `beam` (10 beams), `beam-vocab` (by the probability over the
            vocabulary), or `generate` (as `beam`, for models that the engine can't run). The first one validates.
        eval_batch_users (`int`, *optional*, defaults to `16`):
            Users per process that are decoded at a time.
        loss_scale (`float`, *optional*, defaults to `1.0`):
            Constant factor on the loss of `msl`, for ablations.
        probe_steps (`int`, *optional*):
            Measure the parts of the loss of `msl` and their gradients every so many steps: `probe.json`.
    """

    loss: list[str] = field(
        default_factory=lambda: ["msl"],
        metadata={"help": "What to train and compare: msl, lml, untrained.", "choices": ["msl", "lml", "untrained"]},
    )
    decoding: list[str] = field(
        default_factory=lambda: ["exact"], metadata={"help": "How the test decodes.", "choices": list(DECODINGS)}
    )
    eval_batch_users: int = field(default=16, metadata={"help": "Users per process decoded at a time."})
    loss_scale: float = field(default=1.0, metadata={"help": "Constant factor on the loss of `msl`."})
    probe_steps: int | None = field(default=None, metadata={"help": "Measure parts of the loss every so many steps."})


def main(
    args: RecipeArguments,
    data_args: DataArguments,
    scratch_args: ScratchArguments,
    config: MSLConfig,
    model_args: ModelConfig,
) -> None:
    if config.resume_from_checkpoint and len(args.loss) > 1:
        raise ValueError(f"`resume_from_checkpoint` is one run's, but `loss` is {args.loss}: pass the loss to resume.")
    sharding = [name for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED") if os.environ.get(name) == "true"]
    if sharding and "untrained" in args.loss:
        raise ValueError("`loss` holds `untrained`, which a sharded run can't evaluate: use `recipes/evaluate.py`.")
    if config.run_name and len(args.loss) > 1:
        raise ValueError(f"`run_name` names the folder of one run, but `loss` is {args.loss}: pass one of them.")
    started = time.time()
    process, output_dir = PartialState(), Path(config.output_dir, config.run_name or "")
    data = load_recipe_data(data_args)
    if model_args.model_name_or_path is None:
        base = output_dir / "base_model"
        write_base_model(base, data.catalog, data.template, scratch_args, config.seed)
        model_args.model_name_or_path = str(base)
    config.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "trust_remote_code": config.trust_remote_code,
        **(config.model_init_kwargs or {}),
    }
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=config.trust_remote_code
    )
    trie = data.catalog.build_trie(tokenizer, data_args.conversational, config.chat_template_kwargs)
    ranking = {
        "batch_size": args.eval_batch_users,
        "max_length": config.max_length,
        "prompt_template": data.template,
        "chat_template_kwargs": config.chat_template_kwargs,
    }

    results, histories = {}, {}
    for name in args.loss:
        process.print(f"\n=== {config.run_name or name} ===")
        folder = output_dir if config.run_name else output_dir / name
        results[name], history = run(name, folder, args, data, tokenizer, trie, config, model_args, ranking)
        if history:
            histories[config.run_name or name] = history
    if data.best_possible:
        results["best_possible"] = data.best_possible
    if process.is_main_process:
        if histories:
            plot_training(histories, output_dir / "training.png")
        write_json(output_dir / "summary.json", {**results, "seconds": round(time.time() - started, 1)})
        print(f"\nTest, {len(data.rows['test'])} users, {len(data.catalog)} items\n{format_table(results)}")
        print(f"\n{output_dir}/summary.json, {time.time() - started:.0f} seconds")
    # A rank that exits while others still talk, or with the group's threads alive, is aborted
    process.wait_for_everyone()
    process.destroy_process_group()


def run(
    name: str,
    folder: Path,
    args: RecipeArguments,
    data: RecipeData,
    tokenizer: PreTrainedTokenizerBase,
    trie: ItemTrie,
    config: MSLConfig,
    model_args: ModelConfig,
    ranking: dict,
) -> tuple[dict, list[dict]]:
    """Train by a loss, test, and leave both in a folder: the test's metrics and the log of the training."""
    process, history, seconds, arguments = PartialState(), [], 0.0, {"loss": name}
    if name == "untrained":
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **config.model_init_kwargs)
        model = model.to(process.device)
    else:
        trainer = make_trainer(name, folder, args, data, tokenizer, trie, config, model_args, ranking)
        begun = time.time()
        is_last = config.resume_from_checkpoint == "last"
        trainer.train(resume_from_checkpoint=True if is_last else config.resume_from_checkpoint)
        probes = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, LossProbe)]
        seconds = time.time() - begun - sum(probe.seconds for probe in probes)
        trainer.save_model()
        model, history = trainer.accelerator.unwrap_model(trainer.model), trainer.state.log_history
        if process.is_main_process:
            write_json(folder / "log_history.json", history)
    if name == "msl":
        arguments |= {option: getattr(config, option) for option in REPORTED} | {"loss_scale": args.loss_scale}
    costs = {
        "train_seconds": round(seconds, 1),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad and history),
        "seed": config.seed,
        "arguments": arguments,
    }
    if validated := {entry["step"]: entry["eval_ndcg@10"] for entry in history if "eval_ndcg@10" in entry}:
        last = max(validated)
        kept = trainer.state.best_global_step if config.load_best_model_at_end else last
        costs["validation_ndcg@10"] = validated.get(kept, validated[last])
    if is_sharded(model):
        metrics = costs
        process.print(
            "The model is sharded, and decoding needs all of it in each process. Evaluate what was saved:\n"
            f"accelerate launch recipes/evaluate.py --model_name_or_path {folder}"
        )
        if process.is_main_process:
            write_json(folder / "metrics.json", metrics)
    else:
        rows = data.rows["test"]
        results, found = evaluate_decodings(args.decoding, model, tokenizer, trie, data.catalog, rows, **ranking)
        metrics = results[args.decoding[0]] | costs
        if process.is_main_process:
            for decoding, result in found.items():
                # the first way of decoding is the system's own, others are beside it
                place = folder if decoding == args.decoding[0] else folder / decoding
                values = results[decoding] | costs | {"decoding": decoding}
                found_items = (result.items, result.target_ranks)
                write_results(place, values, data.catalog, rows["item_id"][:], *found_items, data.seen_items)
            text = describe_recommendations(rows, data.catalog, found[args.decoding[0]])
            (folder / "recommendations.txt").write_text(text, encoding="utf-8")
            print(text)
    if config.push_to_hub and name == "msl":
        trainer.push_to_hub()
    return metrics, history


def make_trainer(
    name: str,
    folder: Path,
    args: RecipeArguments,
    data: RecipeData,
    tokenizer: PreTrainedTokenizerBase,
    trie: ItemTrie,
    config: MSLConfig,
    model_args: ModelConfig,
    ranking: dict,
) -> Trainer:
    """The trainer of a loss: same rows, same tokens, same model; validation NDCG@10 at each evaluation."""
    config = dataclasses.replace(config, output_dir=str(folder))
    rows = tokenize(data, tokenizer, trie, config, labels="nodes" if name == "msl" else "tokens")
    kwargs = {
        "model": model_args.model_name_or_path,
        "train_dataset": rows["train"],
        "eval_dataset": rows["validation"] if config.eval_strategy != "no" else None,
        "processing_class": tokenizer,
        "quantization_config": get_quantization_config(model_args),
        "peft_config": get_peft_config(model_args),
    }
    if name == "msl":
        trainer = ScaledLossTrainer(
            args=config, trie=trie, catalog=data.catalog, prompt_template=data.template, **kwargs
        )
        trainer.loss_scale = args.loss_scale
        if args.probe_steps:
            trainer.add_callback(LossProbe(trainer, folder / "probe.json", args.probe_steps))
    else:
        trainer = SFTTrainer(args=as_sft(config), **kwargs)
    if config.eval_strategy != "no":
        ranking = {**ranking, **DECODINGS[args.decoding[0]], "ks": (10,)}
        trainer.add_callback(RecommendationCallback(trainer, trie, data.catalog, data.rows["validation"], **ranking))
    return trainer


def tokenize(
    data: RecipeData, tokenizer: PreTrainedTokenizerBase, trie: ItemTrie, config: MSLConfig, labels: str
) -> DatasetDict:
    """The same token ids for both losses; only the labels differ."""
    settings = {
        "tokenizer": tokenizer,
        "trie": trie,
        "max_length": config.max_length,
        "prompt_template": data.template,
        "chat_template_kwargs": config.chat_template_kwargs,
        "labels": labels,
    }
    tokenized = {}
    with PartialState().main_process_first():
        for split, rows in data.rows.items():
            tokenized[split] = rows.map(
                tokenize_rows,
                batched=True,
                remove_columns=rows.column_names,
                fn_kwargs={**settings, "supervise_history": config.supervise_history and split == "train"},
                desc=f"Tokenizing {split}",
            )
    return DatasetDict(tokenized)


def as_sft(config: MSLConfig) -> SFTConfig:
    """The part of an `MSLConfig` that TRL's `SFTTrainer` knows."""
    return SFTConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(SFTConfig) if f.init})


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not {"--config", "--data_dir", "--interactions"} & {argument.split("=")[0] for argument in arguments}:
        arguments = ["--config", str(QUICKSTART), *arguments]
    main(
        *TrlParser((RecipeArguments, DataArguments, ScratchArguments, MSLConfig, ModelConfig)).parse_args_and_config(
            arguments
        )
    )
