# SPDX-License-Identifier: Apache-2.0
"""
Fine-tune an LLM with the masked softmax loss to rank the items of a catalogue, and evaluate it.

A folder of the MSL paper's authors, a model from the Hub, LoRA:

```bash
accelerate launch -m trl_msl.scripts.train \
    --data_dir data/Book --train_file train_10000.csv --empty_texts keep --prompt_words book books read \
    --model_name_or_path meta-llama/Llama-3.2-3B --use_peft --lora_r 8 --lora_alpha 16 \
    --learning_rate 1e-4 --per_device_train_batch_size 16 --gradient_accumulation_steps 8 \
    --num_train_epochs 10 --output_dir outputs/book
```

Your own log, a chat model, on one GPU or CPU:

```bash
trl-msl train --interactions log.parquet --items items.csv --conversational \
    --model_name_or_path Qwen/Qwen3-0.6B --use_peft --output_dir outputs/mine
```

If `model_name_or_path` is an adapter that was trained with a catalogue, it is trained further, on the windows of
`--train_period` or of another log; items and prompt are those of its training.

The usual language modeling loss, over the vocabulary: `--normalize vocab --temperature 1`. With
`--resume_from_checkpoint last` a run that was killed resumes from its last complete checkpoint, or starts from the
beginning if there is none. All options can stand in a YAML file: `--config`.

`output_dir` then holds the model or the adapter with its catalogue, `metrics.json`, `rankings.parquet`,
`recommendations.txt`, `log_history.json`, `training.png`, and `data.json`, the options of the data, by which
`trl-msl evaluate` finds it again.
"""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from trl import ModelConfig

from ..data import DataArguments, RankingTask, add_rows, read_item_vectors
from ..model import ITEM_VECTORS_FILE, add_item_vectors
from ..training import ItemVectorCurriculum, MSLConfig, MSLTrainer
from .command_line import command
from .loading import Data, load_data, load_tokenizer, load_trainable_adapter, make_task, read_trainable_tokens
from .outputs import finish
from .train_and_evaluate import DecodingArguments, train_and_evaluate, trainer_options
from .trained import load_to_train_further


logger = logging.getLogger(__name__)

REPORTED = (
    "normalize", "temperature", "learning_rate", "num_train_epochs", "max_steps", "supervise_history", "negatives",
    "num_negatives", "negative_scale", "position_weights", "bear_beams", "bear_scale", "bear_weight", "igd_weight",
)  # fmt: skip


@dataclass
class TrainArguments(DecodingArguments):
    """
    Arguments of this command, besides those of the data, the trainer and the model.

    Parameters:
        item_vectors (`str`, *optional*):
            Safetensors file with a vector of each item, as for [`read_item_vectors`], to put behind the item's title
            in histories, which are then tokenised item by item.
        item_vector_curriculum (`bool`, *optional*, defaults to `False`):
            Whether training begins without the vectors: see [`ItemVectorCurriculum`].
        extra_rows (`str`, *optional*):
            Table of further texts to train on, as for [`add_rows`].
    """

    item_vectors: str | None = field(default=None, metadata={"help": "Vectors of items, to put behind their titles."})
    item_vector_curriculum: bool = field(default=False, metadata={"help": "Begin the training without the vectors."})
    extra_rows: str | None = field(
        default=None, metadata={"help": "Further rows to train on, with the columns prompt and completion."}
    )


def main(args: TrainArguments, data_args: DataArguments, config: MSLConfig, model_args: ModelConfig) -> None:
    if not (data_args.data_dir or data_args.interactions):
        raise ValueError(
            "`data_dir` and `interactions` are both missing: pass one of them. `trl-msl quickstart` needs no data."
        )
    tokenizer = load_tokenizer(model_args, config.trust_remote_code)  # first, as a name may be mistyped
    adapter = load_trainable_adapter(model_args, config, tokenizer)
    if adapter is not None:
        if args.item_vectors is not None or args.item_vector_curriculum:
            raise ValueError(
                "`item_vectors` and `item_vector_curriculum`: an adapter that is trained further keeps its own "
                "vectors, in all of its prompts. Leave the options out."
            )
        data, task = load_to_train_further(model_args, data_args, config.max_length, config.trust_remote_code)
    else:
        check_item_vectors(args, model_args)
        data = load_data(data_args)
        task = make_task(tokenizer, data, config.max_length)
        if args.item_vectors is not None:
            vectors = read_item_vectors(args.item_vectors, task.catalog)
            template = replace(task.prompt_template, separate_items=True, vector_tokens=True)
            task = replace(task, prompt_template=template)
    trainer = make_trainer(task, data, config, model_args, adapter=adapter, extra_rows=args.extra_rows)
    if args.item_vectors is not None:  # now that the adapter is there, beside which the projector is trained
        add_item_vectors(trainer.model, vectors)
    prompted = {name: getattr(args, name) for name in ("item_vectors", "item_vector_curriculum")}
    if args.item_vector_curriculum:
        trainer.add_callback(ItemVectorCurriculum())
    train_and_evaluate(trainer, task, data, args, "MSL", {"arguments": reported(config) | prompted})
    finish()


def check_item_vectors(args: TrainArguments, model_args: ModelConfig) -> None:
    """Raise a `ValueError` for options of item vectors that can't be together, before the model is loaded."""
    if args.item_vector_curriculum and args.item_vectors is None:
        raise ValueError("`item_vector_curriculum` is True, but `item_vectors` is missing: pass it, too.")
    if args.item_vectors is not None and read_trainable_tokens(model_args) is not None and model_args.use_peft:
        raise ValueError("`item_vectors` can't be combined with semantic ids under LoRA: leave one of them out.")
    if Path(model_args.model_name_or_path, ITEM_VECTORS_FILE).is_file():
        logger.warning(
            "%s has item vectors, which are left out: only an adapter is trained further with its own.",
            model_args.model_name_or_path,
        )


def make_trainer(
    task: RankingTask,
    data: Data,
    config: MSLConfig,
    model_args: ModelConfig,
    trainer_class: type = MSLTrainer,
    adapter: PreTrainedModel | None = None,
    extra_rows: str | None = None,
) -> MSLTrainer:
    """The trainer that the options describe, of a new model or of an `adapter` to be trained further."""
    if data.args.covering_windows and not config.supervise_history:
        raise ValueError(
            "`covering_windows` leaves out windows whose target is in the history of another, but `supervise_history` "
            "is off, so that nothing would be learnt from it: pass supervise_history=True."
        )
    train = data.rows("train", task)
    if extra_rows is not None:
        train = add_rows(train, extra_rows, task)
    options = trainer_options(config, model_args, train, data.rows("validation", task), adapter)
    return trainer_class(task=task, **options)


def reported(config: MSLConfig) -> dict[str, Any]:
    """The options that tell one training from another, for `metrics.json`."""
    return {"loss": "msl", **{name: getattr(config, name) for name in REPORTED}}


run = command(main)


if __name__ == "__main__":
    run()
