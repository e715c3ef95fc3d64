# SPDX-License-Identifier: Apache-2.0
"""
Make a small base model that can write a catalogue's items and has read its training histories: a substitute where no
LLM is available, as the masked softmax loss is meant for a model that can already write. The tokenizer and the Llama
are made from scratch and trained with the plain next-token loss on each item's text and each user's training items, in
time order. Every loss can then start from the same model:

```bash
accelerate launch -m trl_msl.experiments.pretrain --config recipes/configs/pretrain.yaml \
    --data_dir data/Book --empty_texts keep --output_dir outputs/book/base
trl-msl train --model_name_or_path outputs/book/base --data_dir data/Book --empty_texts keep --output_dir outputs/msl
```

With `--num_train_epochs 0` the weights stay random: the same start for runs from scratch.
"""

from dataclasses import dataclass

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from ..data import DataArguments, PromptTemplate, encode_items, fit_prompts
from ..scripts.command_line import command
from ..scripts.interrupt import train
from ..scripts.loading import Data, load_data
from ..scripts.outputs import finish
from ..training import ResumableTrainerMixin, TrainingConfigMixin
from .from_scratch import ScratchArguments, make_base_model


@dataclass
class PretrainingConfig(TrainingConfigMixin, SFTConfig):
    """TRL's config, which also runs without an accelerator."""


def main(data_args: DataArguments, scratch_args: ScratchArguments, config: PretrainingConfig) -> None:
    data, template = load_data(data_args), data_args.prompt_template
    histories = read_histories(data)
    texts = [*data.catalog.completions, *(template.separator.join(items) for items in histories)]
    tokenizer, model = make_base_model(data.catalog, texts, scratch_args, config.seed)
    rows = Dataset.from_dict({"input_ids": tokenize(histories, tokenizer, data, template)})
    trainer = PlainTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    if config.num_train_epochs > 0:
        train(trainer)
    trainer.save_model()
    PartialState().print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(rows)} texts")
    finish()


class PlainTrainer(ResumableTrainerMixin, SFTTrainer):
    """TRL's trainer, whose checkpoints say what they were trained with."""


def read_histories(data: Data) -> list[list[str]]:
    """The texts of each user's items in the training windows, in time order."""
    histories: dict[str, dict[str, None]] = {}
    for window in data.windows["train"]:
        histories.setdefault(window["user_id"], {}).update(dict.fromkeys(window["item_ids"]))
    completions = data.catalog.completions
    return [[completions[index] for index in data.catalog.indices(list(items))] for items in histories.values()]


def tokenize(
    histories: list[list[str]], tokenizer: PreTrainedTokenizerBase, data: Data, template: PromptTemplate
) -> list[list[int]]:
    """Each item alone and then the histories, with end tokens, tokenised as in prompts."""
    template = PromptTemplate("{history}", template.separator, separate_items=template.separate_items)
    rows = {"prompt": [template.render(items) for items in histories], "history": histories}
    written = fit_prompts(tokenizer, rows, [float("inf")] * len(histories), template)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    items = [start + item for item in encode_items(tokenizer, data.catalog.completions)]
    return [*items, *(ids + [tokenizer.eos_token_id] for ids in written)]


run = command(main)


if __name__ == "__main__":
    run()
