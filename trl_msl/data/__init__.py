# SPDX-License-Identifier: Apache-2.0
"""Catalogue, interactions, prompts, rows, and the task that holds together what must fit."""

from .catalog import ItemCatalog
from .cleaning import distinct_items
from .fit_prompts import fit_prompts
from .generated import best_possible, generate_catalog, generate_transitions, generate_windows
from .interactions import (
    covering_windows,
    k_core,
    read_interactions,
    read_windows,
    sliding_windows,
    split_by_time,
)
from .item_tokens import encode_items, texts_with_special_tokens
from .item_vectors import read_item_vectors, write_item_vectors
from .options import DataArguments, read_data, read_items, select_windows
from .prompts import Prompt, PromptTemplate, encode_prompts
from .rows import (
    add_rows,
    build_rows,
    check_columns,
    completion_text,
    have_single_items,
    supervised_items,
    tokenize_rows,
)
from .semantic_ids import SemanticIds
from .tables import ids_as_strings, parse_list, read_table
from .task import RankingTask
from .task_files import TASK_FILE, TASK_FILES


__all__ = [
    "DataArguments",
    "ItemCatalog",
    "Prompt",
    "PromptTemplate",
    "RankingTask",
    "SemanticIds",
    "TASK_FILE",
    "TASK_FILES",
    "add_rows",
    "best_possible",
    "build_rows",
    "check_columns",
    "completion_text",
    "covering_windows",
    "distinct_items",
    "encode_items",
    "encode_prompts",
    "fit_prompts",
    "generate_catalog",
    "generate_transitions",
    "generate_windows",
    "have_single_items",
    "ids_as_strings",
    "k_core",
    "parse_list",
    "read_data",
    "read_interactions",
    "read_item_vectors",
    "read_items",
    "read_table",
    "read_windows",
    "select_windows",
    "sliding_windows",
    "split_by_time",
    "supervised_items",
    "texts_with_special_tokens",
    "tokenize_rows",
    "write_item_vectors",
]
