# SPDX-License-Identifier: Apache-2.0
"""
Softmax DPO with several rejected items: train a model further that was trained with MSL (or the usual loss), and
evaluate it.

```bash
accelerate launch -m trl_msl.scripts.dpo \
    --model_name_or_path outputs/quickstart/msl --output_dir outputs/softmax_dpo
```

As in the S-DPO paper, over the vocabulary, with items drawn from the whole catalogue:

```bash
accelerate launch -m trl_msl.scripts.dpo --model_name_or_path outputs/book \
    --negatives uniform --num_negatives 15 --normalize vocab --learning_rate 1e-5 --output_dir outputs/book/s-dpo
```

Prompt and catalogue are those that the model was trained with; the windows are those of the data options, by default
those of the model's training. An adapter is trained further, with a copy of it as the reference; `--use_peft` adds a
new one to a whole model. `output_dir` then holds what `trl-msl train` leaves.
"""

import time
from dataclasses import dataclass, field

from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import load_dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..data import DataArguments
from ..softmax_dpo import SoftmaxDPOConfig, SoftmaxDPOTrainer
from .command_line import command
from .loading import load_by_name, load_trainable_adapter, model_options
from .outputs import finish
from .preferences import NegativeArguments, draw_rows, make_preferences
from .train_and_evaluate import DecodingArguments, train_and_evaluate
from .trained import load_trained


@dataclass
class DPOArguments(NegativeArguments, DecodingArguments):
    """
    Arguments of this command, besides those of the data, the trainer and the model.

    Parameters:
        preferences (`str`, *optional*):
            Folder or dataset on the Hub with preference rows, such as `trl-msl preferences` writes or S-DPO's own. By
            default they are made first, which takes some decoding with `--negatives model`.
    """

    preferences: str | None = field(default=None, metadata={"help": "Preference rows to read, instead of making any."})


def main(args: DPOArguments, data_args: DataArguments, config: SoftmaxDPOConfig, model_args: ModelConfig) -> None:
    data, task = load_trained(model_args, data_args, config.max_length, config.trust_remote_code)
    model = load_policy(model_args, config, task.tokenizer)
    started = time.time()
    if args.preferences is not None:
        preferences = load_dataset(args.preferences)
        preferences["train"] = draw_rows(preferences["train"], args.max_preferences, config.seed)
    else:
        model = model.to(PartialState().device) if args.negatives == "model" else model
        preferences = make_preferences(args, data, task, model, config.seed, batch_size=args.eval_batch_users)
    seconds = round(time.time() - started, 1)
    trainer = SoftmaxDPOTrainer(
        model,
        args=config,
        task=task,
        train_dataset=preferences["train"],
        eval_dataset=preferences.get("validation") if config.eval_strategy != "no" else None,
        peft_config=None if is_peft_model(model) else get_peft_config(model_args),
    )
    train_and_evaluate(trainer, task, data, args, "softmax DPO", {"negatives_seconds": seconds})
    finish()


def load_policy(
    model_args: ModelConfig, config: SoftmaxDPOConfig, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The model to train: an adapter to train further, or a whole model."""
    if (adapter := load_trainable_adapter(model_args, config, tokenizer)) is not None:
        return adapter
    options = model_options(model_args, config) | {"quantization_config": get_quantization_config(model_args)}
    return load_by_name(model_args.model_name_or_path, **options)


run = command(main)


if __name__ == "__main__":
    run()
