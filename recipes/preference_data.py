# SPDX-License-Identifier: Apache-2.0
"""Preference rows for recipes: the data's rows with items to be rejected."""

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from recipe_data import RecipeData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_msl import ItemTrie, build_preferences, count_interactions, draw_negatives, model_negatives


@dataclass
class NegativeArguments:
    """
    Arguments that say which items are rejected.

    Parameters:
        negatives (`str`, *optional*, defaults to `"model"`):
            Where they come from: `uniform`, the whole catalogue; `popular`, by how often they occur in train; `near`,
            those that share most of the target's first tokens; `model`, those that the model ranks highest.
        num_negatives (`int`, *optional*, defaults to `3`):
            How many for each row.
        max_preferences (`int`, *optional*):
            Use so many training rows at most, drawn at random.
        preferences (`str`, *optional*):
            Folder or dataset on the Hub with preference rows, such as `recipes/make_preferences.py` writes or S-DPO's
            own, instead of drawing any. The trainer then needs no decoding before it.
    """

    negatives: str = field(
        default="model",
        metadata={"help": "Where rejected items come from.", "choices": ["uniform", "popular", "near", "model"]},
    )
    num_negatives: int = field(default=3, metadata={"help": "How many rejected items for each row."})
    max_preferences: int | None = field(default=None, metadata={"help": "Use so many training rows at most."})
    preferences: str | None = field(
        default=None, metadata={"help": "Preference rows to read, instead of drawing any."}
    )


def make_preferences(
    args: NegativeArguments,
    data: RecipeData,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    trie: ItemTrie,
    seed: int,
    **kwargs: Any,
) -> DatasetDict:
    """Preference rows of train and validation. `model` and `kwargs`, as for `model_negatives`, are for that source."""
    if args.preferences is not None:
        return load_dataset(args.preferences)
    train = data.rows["train"]
    if args.max_preferences is not None and args.max_preferences < len(train):
        train = train.shuffle(seed).select(range(args.max_preferences))

    def build(rows: Dataset) -> Dataset:
        if args.negatives == "model":
            drawn = model_negatives(model, tokenizer, trie, data.catalog, rows, args.num_negatives, **kwargs)
        else:
            counts = count_interactions(data.windows["train"], data.catalog) if args.negatives == "popular" else None
            drawn = draw_negatives(rows, data.catalog, trie, args.negatives, args.num_negatives, counts, seed)
        return build_preferences(rows, data.catalog, drawn)

    return DatasetDict(train=build(train), validation=build(data.rows["validation"]))
