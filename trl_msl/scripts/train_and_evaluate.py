# SPDX-License-Identifier: Apache-2.0
"""Training a model, saving it, testing it on the whole catalogue, and writing the results into its folder."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback
from trl import ModelConfig, SFTConfig, get_peft_config, get_quantization_config

from ..data import DataArguments, RankingTask
from ..evaluation import RecommendationCallback
from ..model import is_sharded
from ..training import TaskTrainerMixin
from .evaluate import DECODINGS, evaluate_decodings
from .interrupt import train
from .loading import Data, model_options, read_trainable_tokens
from .outputs import describe_recommendations, format_table, plot_training, write_json, write_results, write_text
from .trained import write_options


@dataclass
class DecodingArguments:
    """
    Arguments that say how a trained model is validated and tested.

    Parameters:
        decoding (`list[str]`, *optional*, defaults to `["exact"]`):
            How the test finds the best items: `exact`, `beam` (10 beams), `beam-vocab` (by the probability over the
            vocabulary), or `generate` (as `beam`, for models that the engine can't run). Validation uses the first.
        eval_batch_users (`int`, *optional*, defaults to `16`):
            Users per process that are decoded at a time.
    """

    decoding: list[str] = field(
        default_factory=lambda: ["exact"], metadata={"help": "How the test decodes.", "choices": list(DECODINGS)}
    )
    eval_batch_users: int = field(default=16, metadata={"help": "Users per process decoded at a time."})


def trainer_options(
    config: SFTConfig,
    model_args: ModelConfig,
    train: Dataset,
    validation: Dataset,
    adapter: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """
    Arguments of a trainer that loads its model, or trains an adapter further: model, datasets, adapter, quantisation,
    and the config itself.
    """
    options = {
        "args": config,
        "model": adapter or model_args.model_name_or_path,
        "train_dataset": train,
        "eval_dataset": validation if config.eval_strategy != "no" else None,
    }
    if adapter is not None:
        return options
    config.model_init_kwargs = model_options(model_args, config)
    peft_config = get_peft_config(model_args)
    if peft_config is not None and (tokens := read_trainable_tokens(model_args)):
        whole = peft_config.modules_to_save or ()
        peft_config.trainable_token_indices = {name: ids for name, ids in tokens.items() if name not in whole} or None
    return options | {"peft_config": peft_config, "quantization_config": get_quantization_config(model_args)}


def train_and_evaluate(
    trainer: Trainer, task: RankingTask, data: Data, args: DecodingArguments, name: str, extra: dict[str, Any]
) -> dict[str, Any]:
    """
    Train a model with validation NDCG@10 at each evaluation, save it, test it, and push it where the config says so.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, of any loss.
        task ([`RankingTask`]), data ([`Data`]):
            What is ranked.
        args ([`DecodingArguments`]):
            How it is validated and tested.
        name (`str`):
            The model's name in the table and the plot.
        extra (`dict[str, Any]`):
            Entries to add to the metrics.

    Returns:
        `dict[str, Any]`: the test's metrics, as in `metrics.json`. The trainer's folder then has what
        [`evaluate_and_write`] writes, `data.json`, `log_history.json`, and `training.png`.
    """
    config, folder = trainer.args, Path(trainer.args.output_dir)
    if config.eval_strategy != "no":
        settings = {"ks": (10,), "batch_size": args.eval_batch_users, "seen_items": data.seen_items}
        settings |= DECODINGS[args.decoding[0]]
        trainer.add_callback(RecommendationCallback(trainer, data.rows("validation", task), task, **settings))
    trainer.add_callback(_OptionsCallback(data.args))
    started = time.time()
    train(trainer)
    # An experiment's callbacks say how long their measurements took
    measuring = sum(getattr(callback, "seconds", 0.0) for callback in trainer.callback_handler.callbacks)
    seconds = time.time() - started - measuring
    trainer.save_model(_internal_call=True)  # it is pushed once, after the test
    model, history = trainer.accelerator.unwrap_model(trainer.model), trainer.state.log_history
    costs = {
        "train_seconds": round(seconds, 1),
        "num_trainable_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "seed": config.seed,
        **extra,
    }
    if validated := {entry["step"]: entry["eval_ndcg@10"] for entry in history if "eval_ndcg@10" in entry}:
        last = max(validated)
        kept = trainer.state.best_global_step if config.load_best_model_at_end else last
        costs["validation_ndcg@10"] = validated.get(kept, validated[last])
    if trainer.is_world_process_zero():  # before the test, which may take long
        write_json(folder / "log_history.json", history)
        plot_training({name: history}, folder / "training.png")
    metrics = evaluate_and_write(model, task, data, args, folder, costs)
    if trainer.is_world_process_zero():
        print(f"\nTest, {len(data.windows['test'])} users, {len(data.catalog)} items\n{format_table({name: metrics})}")
        print(f"\n{folder}/metrics.json")
    if isinstance(trainer, TaskTrainerMixin):
        trainer.test_metrics = metrics
        trainer.create_model_card()
    if config.push_to_hub:
        trainer.push_to_hub()
    return metrics


class _OptionsCallback(TrainerCallback):
    """Writes `data.json` once the training begins: not sooner, as a run that may not resume must leave it alone."""

    def __init__(self, data_args: DataArguments):
        self.data_args = data_args

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_options(self.data_args, Path(args.output_dir))


def evaluate_and_write(
    model: PreTrainedModel, task: RankingTask, data: Data, args: DecodingArguments, folder: Path, costs: dict[str, Any]
) -> dict[str, Any]:
    """
    Test a model, and write `metrics.json`, `rankings.parquet` and `recommendations.txt` into `folder`; metrics and
    rankings of further ways of decoding go into folders below it. A sharded model can't be decoded, so that
    `metrics.json` has only `costs`.

    Returns:
        `dict[str, Any]`: metrics of the first way of decoding, and `costs`.
    """
    process = PartialState()
    costs = {"num_parameters": sum(parameter.numel() for parameter in model.parameters()), **costs}
    if is_sharded(model):
        process.print(
            "The model is sharded, and decoding needs all of it in each process. Evaluate what was saved:\n"
            f"accelerate launch -m trl_msl.scripts.evaluate --model_name_or_path {folder}"
        )
        if process.is_main_process:
            write_json(folder / "metrics.json", costs)
        return costs
    rows = data.rows("test", task)
    settings = {"batch_size": args.eval_batch_users, "seen_items": data.seen_items}
    decodings = {name: DECODINGS[name] for name in args.decoding}
    results, found = evaluate_decodings(decodings, model, task, rows, **settings)
    first = args.decoding[0]
    if process.is_main_process:
        for decoding, result in found.items():
            place = folder if decoding == first else folder / decoding
            metrics = results[decoding] | costs | {"decoding": decoding}
            ranking = (result.items, result.target_ranks)
            write_results(place, metrics, task.catalog, rows["item_id"][:], *ranking, data.seen_items)
        text = describe_recommendations(rows, task.catalog, found[first])
        write_text(folder / "recommendations.txt", text)
        print(text)
    return results[first] | costs
