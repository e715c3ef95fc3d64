# SPDX-License-Identifier: Apache-2.0
"""Catalogue, interactions, prompts, rows, and the one object that holds what belongs together."""

from .catalog import ItemCatalog
from .fit_prompts import fit_prompts, ranking_prompts
from .interactions import k_core, read_interactions, read_windows, sliding_windows, split_by_time
from .item_tokens import describe_end, encode_items
from .options import DataArguments, read_data, read_items
from .prompts import Prompt, PromptTemplate, encode_prompts
from .rows import build_rows, completion_text, tokenize_rows
from .task import RankingTask
from .task_files import TASK_FILE, TASK_FILES


__all__ = [
    "TASK_FILE",
    "TASK_FILES",
    "DataArguments",
    "ItemCatalog",
    "Prompt",
    "PromptTemplate",
    "RankingTask",
    "build_rows",
    "completion_text",
    "describe_end",
    "encode_items",
    "encode_prompts",
    "fit_prompts",
    "k_core",
    "ranking_prompts",
    "read_data",
    "read_interactions",
    "read_items",
    "read_windows",
    "sliding_windows",
    "split_by_time",
    "tokenize_rows",
]
