# SPDX-License-Identifier: Apache-2.0
"""Preference rows: the rows of the data, with items to be rejected."""

from dataclasses import dataclass, field
from typing import Any

from datasets import DatasetDict, load_dataset
from transformers import PreTrainedModel

from ..data import RankingTask
from ..softmax_dpo import build_preferences, count_interactions, draw_negatives, model_negatives
from .loading import Data


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
            Use at most this many training rows, drawn at random.
        preferences (`str`, *optional*):
            Folder or dataset on the Hub with preference rows, such as `trl-msl preferences` writes or S-DPO's own,
            instead of drawing any. No decoding is then needed before the training.
    """

    negatives: str = field(
        default="model",
        metadata={"help": "Where rejected items come from.", "choices": ["uniform", "popular", "near", "model"]},
    )
    num_negatives: int = field(default=3, metadata={"help": "How many rejected items for each row."})
    max_preferences: int | None = field(default=None, metadata={"help": "Use at most this many training rows."})
    preferences: str | None = field(
        default=None, metadata={"help": "Preference rows to read, instead of drawing any."}
    )


def make_preferences(
    args: NegativeArguments, data: Data, task: RankingTask, model: PreTrainedModel | None, seed: int, **kwargs: Any
) -> DatasetDict:
    """
    Preference rows of train and validation. `model` and `kwargs`, as for [`model_negatives`], are for `negatives` =
    `"model"`.
    """
    if args.preferences is not None:
        return load_dataset(args.preferences)
    preferences = DatasetDict()
    for split in ("train", "validation"):
        rows = data.rows(split, task)
        if split == "train" and args.max_preferences is not None and args.max_preferences < len(rows):
            rows = rows.shuffle(seed).select(range(args.max_preferences))
        if args.negatives == "model":
            drawn = model_negatives(model, task, rows, args.num_negatives, **kwargs)
        else:
            is_popular = args.negatives == "popular"
            counts = count_interactions(data.windows["train"], task.catalog) if is_popular else None
            drawn = draw_negatives(rows, task, args.negatives, args.num_negatives, counts, seed)
        preferences[split] = build_preferences(rows, task, drawn)
    return preferences
