# SPDX-License-Identifier: Apache-2.0
"""
Softmax DPO with several rejected items: teach a model that was trained with MSL (or the usual loss) what not to rank
high, and evaluate it.

```bash
accelerate launch -m trl_msl.scripts.dpo \
    --model_name_or_path outputs/quickstart/msl --output_dir outputs/softmax_dpo
```

As the S-DPO paper does it, over the vocabulary and with items of the whole catalogue rejected:

```bash
accelerate launch -m trl_msl.scripts.dpo --model_name_or_path outputs/book \
    --data_dir data/Book --train_file train_10000.csv --empty_texts keep \
    --negatives uniform --num_negatives 15 --normalize vocab --learning_rate 1e-5 --output_dir outputs/book/s-dpo
```

Prompt and catalogue are those that the model was trained with; without data options the windows are the quickstart's.
Rows that were made before, by `trl-msl preferences` or in the form of S-DPO's data: `--preferences FOLDER`. An adapter
is trained further, with a copy of it as the reference; `--use_peft` puts a new one on a whole model. It leaves in
`output_dir` what `trl-msl train` does.
"""

import time
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import is_peft_model
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import find_adapter_config_file
from trl import ModelConfig, get_peft_config, get_quantization_config

from ..data import DataArguments
from ..softmax_dpo import SoftmaxDPOConfig, SoftmaxDPOTrainer
from .command_line import command
from .loading import load_data, load_task
from .negatives import NegativeArguments, make_preferences
from .outputs import finish, format_table, plot_training
from .train_and_evaluate import DecodingArguments, model_options, train_and_evaluate


def main(args: NegativeArguments, data_args: DataArguments, config: SoftmaxDPOConfig, model_args: ModelConfig) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing: pass the model to train further.")
    data = load_data(data_args)
    task = load_task(model_args, data_args, data.catalog, config.max_length, config.trust_remote_code)
    model = load_policy(model_args, config)
    started = time.time()
    if args.negatives == "model" and args.preferences is None:
        model = model.to(PartialState().device)
    preferences = make_preferences(args, data, task, model, config.seed)
    seconds = round(time.time() - started, 1)
    trainer = SoftmaxDPOTrainer(
        model,
        args=config,
        task=task,
        train_dataset=preferences["train"],
        eval_dataset=preferences["validation"] if config.eval_strategy != "no" else None,
        peft_config=None if is_peft_model(model) else get_peft_config(model_args),
    )
    metrics = train_and_evaluate(trainer, task, data, DecodingArguments(), {"negatives_seconds": seconds})
    if trainer.is_world_process_zero():
        plot_training({"softmax DPO": trainer.state.log_history}, Path(config.output_dir) / "training.png")
        print(
            f"Test, {len(data.windows['test'])} users\n{format_table({'softmax DPO': metrics})}\n\n{config.output_dir}"
        )
    if config.push_to_hub:
        trainer.push_to_hub()
    finish()


def load_policy(model_args: ModelConfig, config: SoftmaxDPOConfig) -> PreTrainedModel:
    """The model to train: an adapter to train further, or a whole model."""
    name, revision = model_args.model_name_or_path, model_args.model_revision
    is_adapter = find_adapter_config_file(name, revision=revision) is not None
    return (AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM).from_pretrained(
        name,
        **model_options(config, model_args),
        quantization_config=get_quantization_config(model_args),
        **({"is_trainable": True} if is_adapter else {}),
    )


run = command(main, generated_data=True)


if __name__ == "__main__":
    run()
