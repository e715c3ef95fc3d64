# SPDX-License-Identifier: Apache-2.0
"""
Make a small base model that can write a catalogue's items and has read its training histories.

A masked softmax is meant for a model that can write already. Where there is no LLM at hand this makes a stand-in: a
tokenizer and a Llama from scratch, trained with the plain next-token loss on each item's text and on each user's items
of the training split, in time order. Every loss can then start from the same backbone:

```bash
accelerate launch recipes/pretrain.py --config recipes/configs/pretrain.yaml \
    --data_dir data/Book --empty_texts keep --output_dir outputs/book/base
accelerate launch recipes/sft_msl.py --model_name_or_path outputs/book/base --data_dir data/Book --empty_texts keep
```

With `--num_train_epochs 0` the weights stay random: the same start for runs from scratch.
"""

from accelerate import PartialState
from datasets import Dataset
from recipe_data import RecipeData, load_recipe_data
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer, TrlParser

from trl_msl import DataArguments, PromptTemplate, fit_prompts
from trl_msl.experiments.from_scratch import ScratchArguments, make_base_model


def main(data_args: DataArguments, scratch_args: ScratchArguments, config: SFTConfig) -> None:
    data = load_recipe_data(data_args)
    histories = read_histories(data)
    texts = [*data.catalog.completions, *(data.template.separator.join(items) for items in histories)]
    tokenizer, model = make_base_model(data.catalog, texts, scratch_args, config.seed)
    rows = Dataset.from_dict({"input_ids": tokenize(histories, tokenizer, data)})
    trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    if config.num_train_epochs > 0:
        is_last = config.resume_from_checkpoint == "last"
        trainer.train(resume_from_checkpoint=True if is_last else config.resume_from_checkpoint)
    trainer.save_model()
    process = PartialState()
    process.print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(rows)} texts")
    # A rank that exits while others still talk, or with the group's threads alive, is aborted
    process.wait_for_everyone()
    process.destroy_process_group()


def read_histories(data: RecipeData) -> list[list[str]]:
    """The items of each user's training windows in time order, as they are written."""
    histories: dict[str, dict[str, None]] = {}
    for window in data.windows["train"]:
        histories.setdefault(window["user_id"], {}).update(dict.fromkeys(window["item_ids"]))
    completions = data.catalog.completions
    return [[completions[index] for index in data.catalog.indices(list(items))] for items in histories.values()]


def tokenize(histories: list[list[str]], tokenizer: PreTrainedTokenizerBase, data: RecipeData) -> list[list[int]]:
    """Each item by itself and then the histories, with an end token, in the tokens that prompts and titles have."""
    template = PromptTemplate("{history}", data.template.separator, separate_items=data.template.separate_items)
    rows = {"prompt": [template.render(items) for items in histories], "history": histories}
    written = fit_prompts(tokenizer, rows, [float("inf")] * len(histories), template)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    items = tokenizer(data.catalog.completions, add_special_tokens=False)["input_ids"]
    return [ids + [tokenizer.eos_token_id] for ids in [*(start + item for item in items), *written]]


if __name__ == "__main__":
    main(*TrlParser((DataArguments, ScratchArguments, SFTConfig)).parse_args_and_config())
