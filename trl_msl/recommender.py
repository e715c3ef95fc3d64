# SPDX-License-Identifier: Apache-2.0
"""Recommending with a trained model and its catalogue, from one folder or repository."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .data import TASK_FILE, TASK_FILES, ItemCatalog, RankingTask
from .decoding import recommend


logger = logging.getLogger(__name__)

# What transformers and what it builds on raise at files that are damaged, foreign or missing
_UNREADABLE = (
    OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError, UnpicklingError
)  # fmt: skip


@dataclass
class RecommendedItems:
    """
    Items recommended to some users, best first; fewer than asked for where a user may get no more.

    Args:
        ids (`list[list[str]]`):
            Item ids of each user.
        texts (`list[list[str]]`):
            Their texts.
        scores (`list[list[float]]`):
            Their log-probabilities.
        exact (`list[bool]`):
            Whether these are certainly the best items for each user.
    """

    ids: list[list[str]]
    texts: list[list[str]]
    scores: list[list[float]]
    exact: list[bool]


class Recommender:
    """
    A trained model with its task: catalogue, tokenizer, trie and prompt.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model: an adapter, merged, or full.
        task ([`RankingTask`]):
            What it ranks.

    Example:

    ```python
    recommender = Recommender.from_pretrained("user/my-recommender")
    found = recommender.recommend([["17", "4"], ["23"]], k=10)  # item ids or texts, oldest first
    print(found.texts[0], found.scores[0])
    ```
    """

    def __init__(self, model: PreTrainedModel, task: RankingTask):
        self.model = model
        self.task = task

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        revision: str | None = None,
        task_from: str | Path | None = None,
        **kwargs: Any,
    ) -> Recommender:
        """
        Load a model and its catalogue from a folder or from a repository on the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                Folder that `trainer.save_model` or [`Recommender.save_pretrained`] wrote, or repository that it was
                pushed to. An adapter's base model is loaded from where the adapter says.
            revision (`str`, *optional*):
                Branch, tag or commit of the repository.
            task_from (`str` or `Path`, *optional*):
                Folder or repository whose catalogue to take, for a model that was trained further by a script that
                knows nothing of it. Defaults to the model's own, or for an adapter without one to its base model's.
            **kwargs:
                Passed to `AutoModelForCausalLM.from_pretrained`: `dtype`, `device_map`, `attn_implementation`, ...
                Code from the repository is not run unless you pass `trust_remote_code=True`.

        Raises:
            `ValueError`: if there is no catalogue in it, or it is damaged or does not fit the tokenizer.
        """
        folder = _find(pretrained_model_name_or_path, "pretrained_model_name_or_path", revision)
        task_folder = folder if task_from is None else _find(task_from, "task_from", allow_patterns=TASK_FILES)
        if task_from is None and not (folder / TASK_FILE).is_file() and (base := _base_of_adapter(folder)):
            task_folder = _find(base, "base_model_name_or_path", allow_patterns=TASK_FILES)
        if not (task_folder / TASK_FILE).is_file():
            raise ValueError(
                f"`pretrained_model_name_or_path` = {str(pretrained_model_name_or_path)!r} has no {TASK_FILE}, so "
                "it is a model without a catalogue: train with `MSLTrainer`, name a folder that has one by "
                "`task_from`, or make a `Recommender` of the model and a `RankingTask`."
            )
        # Left out, transformers would ask at the terminal
        trust_remote_code = kwargs.setdefault("trust_remote_code", False)
        tokenizer = _load(AutoTokenizer, folder, trust_remote_code=trust_remote_code)
        task = RankingTask.from_pretrained(task_folder, tokenizer)
        return cls(_load(AutoModelForCausalLM, folder, **kwargs), task)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write model (or adapter), tokenizer and catalogue into a folder, the catalogue last."""
        self.model.save_pretrained(save_directory)
        self.task.tokenizer.save_pretrained(save_directory)
        self.task.save_pretrained(save_directory)

    def update(
        self, add: ItemCatalog | None = None, withdraw: Iterable[str] = (), restore: Iterable[str] = ()
    ) -> Recommender:
        """The same model with items added and withdrawn: see [`RankingTask.update`]."""
        return Recommender(self.model, self.task.update(add, withdraw, restore))

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        exclude_history: bool = True,
        allowed: Iterable[str] | None = None,
        **kwargs: Any,
    ) -> RecommendedItems:
        """
        Recommend items to some users.

        Args:
            histories (`Sequence[Sequence[str]]`):
                Items that each user has had, oldest first: all of them ids, or all of them texts.
            k (`int`, *optional*, defaults to `10`):
                Number of items to recommend.
            exclude_history (`bool`, *optional*, defaults to `True`):
                Whether to leave out what a user has had, and items with the same text.
            allowed (`Iterable[str]`, *optional*):
                Ids of the items that may be recommended, such as those in stock.
            **kwargs:
                `batch_size`, `mode` and other arguments of [`recommend`]. Without `mode` the task's hold.

        Raises:
            `ValueError`: if a history is empty or holds an item that is not in the catalogue.
        """
        catalog, template = self.task.catalog, self.task.prompt_template
        if len(histories) == 0:
            raise ValueError("`histories` is empty: there is nobody to recommend to.")
        no_lists = [user for user, history in enumerate(histories) if _is_no_list(history)]
        if no_lists:  # the characters of a text may well be ids
            raise ValueError(
                f"`histories`: {len(no_lists)} of {len(histories)} are no lists, the first that of user "
                f"{no_lists[0]}, {histories[no_lists[0]]!r}. Pass a list of items for each user, even for one alone."
            )
        empty = [user for user, history in enumerate(histories) if len(history) == 0]
        if empty:
            raise ValueError(
                f"`histories`: {len(empty)} of {len(histories)} are empty, the first that of user {empty[0]}, so "
                "there is nothing to go by. Recommend them the most popular items instead."
            )
        indices = self._indices(histories)
        written = [[catalog.completions[index] for index in history] for history in indices]
        rows = {"prompt": [template.render(history) for history in written], "history": written}
        found = recommend(
            self.model,
            self.task,
            self.task.ranking_prompts(rows),
            top_k=min(k, len(catalog)),
            exclude=[self._with_same_text(history) for history in indices] if exclude_history else None,
            allowed=self._allowed_indices(allowed),
            **({} if "mode" in kwargs else self.task.decoding) | kwargs,
        )
        items = [[index for index in row if index >= 0] for row in found.items.tolist()]
        return RecommendedItems(
            ids=[[catalog.ids[index] for index in row] for row in items],
            texts=[[catalog.texts[index] for index in row] for row in items],
            scores=[scores[: len(row)] for scores, row in zip(found.scores.tolist(), items)],
            exact=found.exact.tolist(),
        )

    @cached_property
    def _indices_of_text(self) -> dict[str, list[int]]:
        indices: dict[str, list[int]] = {}
        for index, text in enumerate(self.task.catalog.texts):
            indices.setdefault(text, []).append(index)
        return indices

    def _indices(self, histories: Sequence[Sequence[str]]) -> list[list[int]]:
        """Index of each item: by id if all are ids, else by text."""
        catalog = self.task.catalog
        items = {str(item) for history in histories for item in history}
        unknown_ids, unknown_texts = items - catalog.index_of_id.keys(), items - self._indices_of_text.keys()
        if unknown_ids and unknown_texts:
            kind, unknown = min(("ids", unknown_ids), ("texts", unknown_texts), key=lambda pair: len(pair[1]))
            raise ValueError(
                f"`histories` hold {len(unknown)} different {kind} that are not in the catalogue of {len(catalog)} "
                f"items, such as {sorted(unknown)[:3]}. Pass ids throughout or texts throughout, and leave out what "
                "is not in the catalogue."
            )
        if not unknown_ids:
            return [catalog.indices(history) for history in histories]
        return [[self._indices_of_text[str(item)][0] for item in history] for history in histories]

    def _allowed_indices(self, allowed: Iterable[str] | None) -> list[int] | None:
        """Indices of the items that may be recommended, of those `allowed`; `None` if all of the catalogue may."""
        catalog, withdrawn = self.task.catalog, self.task.withdrawn
        if allowed is None and not withdrawn:
            return None
        indices = range(len(catalog)) if allowed is None else catalog.indices(allowed)
        available = [index for index in indices if catalog.ids[index] not in withdrawn]
        if allowed is not None and len(available) < len(indices):
            logger.warning("%d of %d `allowed` items are withdrawn.", len(indices) - len(available), len(indices))
        return available

    def _with_same_text(self, indices: list[int]) -> list[int]:
        """The items, and those that are written alike."""
        texts = self.task.catalog.texts
        return [same for index in indices for same in self._indices_of_text[texts[index]]]


def _is_no_list(history: Any) -> bool:
    return isinstance(history, str | bytes | Mapping) or not hasattr(history, "__len__")


def _find(name: str | Path, argument: str, revision: str | None = None, **kwargs: Any) -> Path:
    """A folder, or where the snapshot of a repository lies."""
    if os.path.isdir(name):  # unlike `Path.is_dir`, also of names that no file system takes
        return Path(name)
    try:
        return Path(snapshot_download(str(name), revision=revision, **kwargs))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{argument}` = {str(name)!r} is no folder, and can't be had from the Hub ({error})."
        ) from error


def _base_of_adapter(folder: Path) -> str | None:
    """Folder or repository of the base model, if there is an adapter in the folder."""
    try:
        name = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def _load(auto_class: type, folder: Path, **kwargs: Any) -> Any:
    """Load a model or tokenizer; what transformers makes of damaged or foreign files becomes one kind of error."""
    try:
        return auto_class.from_pretrained(folder, **kwargs)
    except _UNREADABLE as error:
        raise ValueError(
            f"{auto_class.__name__} can't load {str(folder)!r} ({type(error).__name__}: {error}). Are its files "
            "whole, and, of an adapter, is the base model where its adapter_config.json says?"
        ) from error
