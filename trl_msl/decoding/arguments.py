# SPDX-License-Identifier: Apache-2.0
"""Prompts and item indices as users pass them: checked, and as lists or tensors."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence, Set
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..model import get_item_vectors
from ..trie import FIRST_VECTOR_TOKEN


Items = Sequence[int] | Set[int] | np.ndarray | Tensor  # item indices


def read_prompts(prompts: Sequence[Sequence[int]], model: PreTrainedModel, **counts: int) -> list[list[int]]:
    """
    Token ids of prompts as lists.

    Raises:
        `ValueError`: if there is no prompt, one is empty or holds a token that the model does not have, or some number
            in `counts` is below 1.
    """
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"`{name}` is {value}: it must be at least 1.")
    if len(prompts) == 0:
        raise ValueError("`prompts` is empty: pass at least one.")
    for user, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"`prompts` has no token for user {user}: pass at least one token each.")
    prompts = [[int(token) for token in prompt] for prompt in prompts]
    vocab_size = getattr(model.config.get_text_config(), "vocab_size", float("inf"))
    has_vectors = get_item_vectors(model) is not None
    for user, prompt in enumerate(prompts):
        strange = [token for token in prompt if not 0 <= token < vocab_size]
        if strange and has_vectors:
            strange = [token for token in strange if token < FIRST_VECTOR_TOKEN]
        if strange:  # on a GPU this would end the process
            token = strange[0]
            if token >= FIRST_VECTOR_TOKEN:
                raise ValueError(
                    "`prompts` has vectors of items, but `model` has none: load it from its whole folder, or call "
                    "`add_item_vectors`."
                )
            raise ValueError(
                f"`prompts` has token {token} for user {user}, but `model` has tokens 0 to {vocab_size - 1}: use the "
                "model's own tokenizer, or resize its embeddings (`resize_token_embeddings`) before training."
            )
    return prompts


def common_length(prompts: list[list[int]]) -> int:
    """Length of the beginning that all prompts share; 0 for a single one."""
    first, last = min(prompts), max(prompts)  # what these share, all between them do
    different = (place for place, (one, other) in enumerate(zip(first, last)) if one != other)
    return next(different, len(first)) if len(prompts) > 1 else 0


def read_item_lists(name: str, rows: Sequence[Items], num_users: int, num_items: int) -> list[Tensor]:
    """
    Item indices of each user as tensors.

    Args:
        name (`str`):
            Name of the argument, for errors.
        rows (`Sequence` of lists, ranges, sets, arrays or tensors):
            Item indices of each user.
        num_users, num_items (`int`):
            Number of lists required, and of items in the catalogue.

    Returns:
        `list` of `torch.Tensor` of shape `(len(row),)`, int64; a tensor stays on its device.

    Raises:
        `ValueError`: if there isn't a list for each user, or one holds anything but item indices.
    """
    if not _is_list(rows, is_outer=True):
        raise ValueError(f"`{name}` is {reprlib.repr(rows)}: pass a list that holds a list of items for each prompt.")
    for user, row in enumerate(rows):
        if not _is_list(row):
            raise ValueError(
                f"`{name}` holds {reprlib.repr(row)} instead of a list of items (prompt {user}): pass a list of "
                "lists, one for each prompt."
            )
    if len(rows) != num_users:
        raise ValueError(f"`{name}` has {len(rows)} lists for {num_users} prompts: pass a list for each.")
    return [_read_items(name, row, user, num_items) for user, row in enumerate(rows)]


def read_allowed(allowed: Items | Sequence[Items], num_users: int, num_items: int) -> Tensor | list[Tensor]:
    """
    Item indices that all users, or each of them, may get.

    Returns:
        `torch.Tensor` of shape `(num_allowed,)`, int64, if they are meant for all users; else a `list` of such
        tensors, one for each user.

    Raises:
        `ValueError`: if there is no item, or anything but item indices.
    """
    if not _is_list(allowed, is_outer=True) and not isinstance(allowed, Set):
        raise ValueError(f"`allowed` is {reprlib.repr(allowed)}: pass a list of items, or one for each prompt.")
    if len(allowed) == 0:
        raise ValueError("`allowed` is empty, so there is nothing to rank: pass at least one item.")
    is_array = isinstance(allowed, Tensor | np.ndarray)
    if allowed.ndim == 1 if is_array else isinstance(next(iter(allowed)), Integral):
        return read_item_lists("allowed", [allowed], 1, num_items)[0]
    return read_item_lists("allowed", allowed, num_users, num_items)


def read_followed(follow: Tensor | np.ndarray | None, num_users: int, num_items: int) -> Tensor:
    """
    Items for beam search to follow, int64 of shape `(num_users, num_followed)`; `None` becomes `(num_users, 0)`.

    Raises:
        `ValueError`: if `follow` has another shape, or holds anything but item indices and `-1`.
    """
    items = torch.zeros(num_users, 0, dtype=torch.int64) if follow is None else torch.as_tensor(follow)
    if items.ndim != 2 or len(items) != num_users or items.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"`follow` has shape {tuple(items.shape)} and dtype {items.dtype}: pass item indices, a row for each of "
            f"the {num_users} prompts, such as the `items` of a search."
        )
    if ((items < -1) | (items >= num_items)).any():
        raise ValueError(
            f"`follow` holds {int(items.min())} to {int(items.max())}: pass item indices from 0 to {num_items - 1}, "
            "and -1 for none."
        )
    return items.long()


def _is_list(values: Any, is_outer: bool = False) -> bool:
    """Whether these are a list of items or, `is_outer`, an ordered one that may hold lists of items."""
    if isinstance(values, Tensor | np.ndarray):
        return values.ndim > 0 if is_outer else values.ndim == 1
    is_other = isinstance(values, str | bytes | Mapping) or (is_outer and isinstance(values, Set))
    return hasattr(values, "__len__") and not is_other


def _read_items(name: str, row: Items, user: int, num_items: int) -> Tensor:
    if isinstance(row, range):
        items = torch.arange(row.start, row.stop, row.step) if len(row) > 0 else torch.empty(0, dtype=torch.int64)
    else:
        try:
            items = torch.as_tensor(list(row) if isinstance(row, Set) else row)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"`{name}` holds {reprlib.repr(row)} (list {user}), but must hold item indices, such as "
                f"`catalog.indices(ids)` ({error})."
            ) from error
    if len(items) == 0:
        return items.long()
    if items.dtype == torch.bool or items.dtype.is_floating_point:
        raise ValueError(
            f"`{name}` holds {items.dtype} (list {user}), but must hold item indices: pass "
            "`mask.nonzero().squeeze(1)` instead of a mask."
        )
    items = items.long()
    if items.min() < 0 or items.max() >= num_items:
        off = items[(items < 0) | (items >= num_items)]
        raise ValueError(
            f"`{name}` holds item {int(off[0])} (list {user}), but the catalogue has items 0 to {num_items - 1}: "
            "pass indices, such as `catalog.indices(ids)`."
        )
    return items
