# SPDX-License-Identifier: Apache-2.0
"""Recommending with a trained model and its task."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from ..collaborative import FUSION_FILE, Fusion, load_fusion
from ..data import TASK_FILE, TASK_FILES, ItemCatalog, RankingTask
from ..decoding import Biases, TrieDecoder, dense_bias, read_item_bias, recommend, select_users
from ..model import save_item_vectors
from .loading import check_files, find_base, find_folder, find_task_folder, load, load_causal_lm, name_base_absolutely
from .requests import AllowedItems, RecommendedItems, check_histories


logger = logging.getLogger(__name__)


class Recommender:
    """
    A trained model with its task: catalogue, tokenizer, trie and prompt.

    The first request makes a [`TrieDecoder`], which all later ones share; their cost does not depend on the size of
    the catalogue. Requests may come from several threads at once. If the weights change, the next request uses the
    new ones.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model: an adapter, merged, or full.
        task ([`RankingTask`]):
            What it ranks.
        fusion ([`Fusion`], *optional*):
            Popularity and neighbours of the task's items, which are added to the model's scores.

    Raises:
        `ValueError`: if `fusion` and `task` differ in their number of items.

    Example:

    ```python
    recommender = Recommender.from_pretrained("user/my-recommender")
    found = recommender.recommend([["17", "4"], ["23"]], k=10)  # item ids or texts, oldest first
    print(found.texts[0], found.scores[0])
    ```
    """

    def __init__(self, model: PreTrainedModel, task: RankingTask, fusion: Fusion | None = None):
        if fusion is not None and fusion.num_items != len(task.catalog):
            raise ValueError(
                f"`fusion` has {fusion.num_items} items, the catalogue of `task` has {len(task.catalog)}: pass one "
                "fitted on this catalogue, or `fusion.extend(num_items)` if items have been added."
            )
        self.model = model
        self._task, self._fusion = task, fusion
        self._lock = threading.Lock()
        self._available: AllowedItems | None = None

    def __repr__(self) -> str:
        model = self.model
        return f"Recommender({type(model).__name__}(dtype={model.dtype}, device={str(model.device)!r}), {self.task})"

    @property
    def task(self) -> RankingTask:
        """The task. For another one make another recommender: see [`Recommender.update`]."""
        return self._task

    @property
    def fusion(self) -> Fusion | None:
        """What is added to the model's scores. For another one make another recommender."""
        return self._fusion

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
                Folder written by `trainer.save_model` or [`Recommender.save_pretrained`], or repository that it was
                pushed to. The base model of an adapter is loaded from where the adapter says; a
                relative folder is also looked for in the adapter's folder and those above it.
            revision (`str`, *optional*):
                Branch, tag or commit of the repository.
            task_from (`str` or `Path`, *optional*):
                Folder or repository of the catalogue, for a model that was trained further by a script that knows
                nothing of it. Defaults to the model's own or, for an adapter without one, its base model's.
            **kwargs:
                Passed to `AutoModelForCausalLM.from_pretrained`: `dtype`, `device_map`, `attn_implementation`, ...
                Code from the repository is not run unless you pass `trust_remote_code=True`.

        Raises:
            `ValueError`: if a file is missing, damaged, foreign, or outside the folder, or the tokenizer differs from
                the one that the catalogue was saved with.
        """
        folder = find_folder(pretrained_model_name_or_path, "pretrained_model_name_or_path", revision)
        subfolder = kwargs.get("subfolder", "")
        check_files(folder, subfolder)
        if task_from is None:
            task_folder = find_task_folder(folder, subfolder)
        else:
            task_folder = find_folder(task_from, "task_from", allow_patterns=TASK_FILES)
        if not (task_folder / TASK_FILE).exists():
            raise ValueError(
                f"`pretrained_model_name_or_path` = {str(pretrained_model_name_or_path)!r} has no {TASK_FILE}, so "
                "it is a model without a catalogue: train with `MSLTrainer`, name a folder that has one as "
                "`task_from`, or make a `Recommender` from the model and a `RankingTask`."
            )
        # If this were left out, transformers would ask at the terminal
        trust_remote_code = kwargs.setdefault("trust_remote_code", False)
        tokenizer = load(AutoTokenizer, folder, trust_remote_code=trust_remote_code)
        task = RankingTask.from_pretrained(task_folder, tokenizer)
        fusion = load_fusion(folder, len(task.catalog))
        return cls(load_causal_lm(folder, **kwargs), task, fusion)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write model (or adapter), tokenizer, fusion and catalogue into a folder, the catalogue last."""
        self.model.save_pretrained(save_directory)
        save_item_vectors(self.model, Path(save_directory))
        name_base_absolutely(Path(save_directory), find_base(Path(save_directory)))
        self.task.tokenizer.save_pretrained(save_directory)
        if self.fusion is not None:
            self.fusion.save_pretrained(save_directory)
        else:  # left by a model that was saved there before
            Path(save_directory, FUSION_FILE).unlink(missing_ok=True)
        self.task.save_pretrained(save_directory)

    def update(
        self, add: ItemCatalog | None = None, withdraw: Iterable[str] = (), restore: Iterable[str] = ()
    ) -> Recommender:
        """
        The same model with items added and withdrawn: see [`RankingTask.update`]. In its `fusion` nobody has the new
        items.
        """
        task = self.task.update(add, withdraw, restore)
        return Recommender(self.model, task, self.fusion and self.fusion.extend(len(task.catalog)))

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        exclude_history: bool = True,
        allowed: Iterable[str] | None = None,
        popular_without_history: bool = False,
        fused: bool = True,
        **kwargs: Any,
    ) -> RecommendedItems:
        """
        Recommend items to users.

        Args:
            histories (`Sequence[Sequence[str]]`):
                Items that each user has had, oldest first: all ids, or all texts.
            k (`int`, *optional*, defaults to `10`):
                Number of items to recommend, at most as many as the catalogue holds. A user gets fewer if
                `exclude_history`, `allowed` and withdrawn items leave fewer.
            exclude_history (`bool`, *optional*, defaults to `True`):
                Whether to leave out the items of a user's history, and items with the same text.
            allowed (`Iterable[str]` or [`AllowedItems`], *optional*):
                Ids of the items that may be recommended, such as those in stock. For many requests prepare them once,
                by [`~Recommender.prepare_allowed`].
            popular_without_history (`bool`, *optional*, defaults to `False`):
                Whether users with an empty history get the most popular items by the counts of `fusion`, with scores
                from [`Fusion.most_popular`]. Otherwise an empty history is an error.
            fused (`bool`, *optional*, defaults to `True`):
                Whether to add `fusion`, if there is one, to the model's scores. A `vocab_weight` in `kwargs` replaces
                that of `fusion`; an `item_bias` is added to its biases and to the scores of popular items.
            **kwargs:
                `batch_size`, `mode` and other arguments of [`recommend`]. Without `mode`, the task's `decoding` is
                used. A model that [`TrieDecoder`] can't run takes `mode="generate"`, with `exclude_history=False`.

        Raises:
            `ValueError`: if a history is empty or holds an item that is not in the catalogue, `k` exceeds the number
                of items, no item is left to recommend, or a `fusion` is used without exact search.
        """
        catalog = self.task.catalog
        if not 1 <= k <= len(catalog):
            raise ValueError(f"`k` is {k}: it must lie between 1 and the number of items, {len(catalog)}.")
        check_histories(histories, may_be_empty=popular_without_history)
        if popular_without_history and self.fusion is None:
            raise ValueError("`popular_without_history` is True, but there is no `fusion` with counts: pass False.")
        indices = self._indices(histories)
        if (item_bias := kwargs.pop("item_bias", None)) is not None:
            item_bias = read_item_bias(item_bias, len(indices), len(catalog))
        known = [user for user, history in enumerate(indices) if history]
        shown = [indices[user] for user in known]
        settings = self._settings(shown, fused, None if item_bias is None else select_users(item_bias, known), kwargs)
        if settings.get("mode") == "generate":
            model, engine = self.model, {"allowed": self._available_indices(allowed)}
            if exclude_history:
                raise ValueError("`exclude_history` is True, but mode='generate' can't exclude items: pass False.")
        else:
            allowed = self.prepare_allowed(allowed)
            model, engine = allowed.decoder.model, {"decoder": allowed.decoder, "allowed": allowed.prepared}
        found: dict[int, Sequence] = {}  # items, scores and certainty of each user
        if unknown := [user for user, history in enumerate(indices) if not history]:
            found |= self._most_popular(unknown, k, allowed, item_bias)
        if shown:
            ranked = recommend(
                model,
                self.task,
                self._prompts(shown),
                top_k=k,
                exclude=[self._with_same_text(history) for history in shown] if exclude_history else None,
                **engine,
                **settings,
            )
            found |= zip(known, zip(ranked.items.tolist(), ranked.scores.tolist(), ranked.exact.tolist()))
        rows, scores, exact = zip(*(found[user] for user in range(len(indices))))
        items = [[index for index in row if index >= 0] for row in rows]
        return RecommendedItems(
            ids=[[catalog.ids[index] for index in row] for row in items],
            texts=[[catalog.texts[index] for index in row] for row in items],
            scores=[of_user[: len(row)] for of_user, row in zip(scores, items)],
            exact=list(exact),
        )

    def _most_popular(
        self, users: list[int], k: int, allowed: Iterable[str] | AllowedItems | None, item_bias: Biases | None
    ) -> dict[int, Sequence]:
        """What users without history get, in place of a search's items, scores and certainty."""
        rank = partial(self.fusion.most_popular, k, self._available_indices(allowed))
        if item_bias is None:
            return dict.fromkeys(users, (*rank(), True))
        return {user: (*rank(dense_bias(item_bias, [user], len(self.task.catalog))[0]), True) for user in users}

    def _prompts(self, histories: list[list[int]]) -> list[list[int]]:
        """Token ids of the prompts for histories of item indices."""
        catalog, template = self.task.catalog, self.task.prompt_template
        written = [[catalog.completions[index] for index in self.task.shown(history)] for history in histories]
        rows = {"prompt": [template.render(history) for history in written], "history": written}
        return self.task.ranking_prompts(rows)

    def _settings(
        self, histories: list[list[int]], fused: bool, item_bias: Biases | None, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Arguments of [`recommend`] from task, fusion and caller."""
        settings = ({} if "mode" in kwargs else self.task.decoding) | kwargs
        if not fused or self.fusion is None:
            return settings | {"item_bias": item_bias}
        if (mode := settings.get("mode", "exact")) != "exact":
            raise ValueError(f"`mode` is {mode!r}, but only exact search can rank by `fusion`: pass fused=False.")
        return self.fusion.arguments(histories, item_bias) | settings

    def prepare_allowed(self, allowed: Iterable[str] | AllowedItems | None) -> AllowedItems:
        """
        Look up item ids once, for many requests with the same `allowed`. Withdrawn items are left out.

        Args:
            allowed (`Iterable[str]` or [`AllowedItems`], *optional*):
                Ids of the items that may be recommended. `None` for all of the catalogue.

        Raises:
            `ValueError`: if an id is not in the catalogue, no item is left, or the items were prepared by a
                [`Recommender`] with another task.

        Example:

        ```python
        in_stock = recommender.prepare_allowed(ids)
        for histories in requests:
            found = recommender.recommend(histories, allowed=in_stock)
        ```
        """
        if isinstance(allowed, AllowedItems) and allowed.task is not self.task:
            raise ValueError(
                "`allowed` was prepared by a recommender with another task, such as one before `update`: prepare it "
                "again, by `prepare_allowed` of this one."
            )
        with self._lock:
            everything, model = self._available, self.model
            is_made = everything is not None and everything.decoder.model is model  # it may be another now, or moved
            if not is_made or everything.decoder.trie.device != model.device:
                everything = self._available = self._prepare(TrieDecoder(model, self.task.trie), None)
        if allowed is None:
            return everything
        if isinstance(allowed, AllowedItems) and allowed.decoder is everything.decoder:
            return allowed
        return self._prepare(everything.decoder, allowed)

    def _prepare(self, decoder: TrieDecoder, allowed: Iterable[str] | AllowedItems | None) -> AllowedItems:
        indices = self._available_indices(allowed)
        prepared = None if indices is None else decoder.prepare_allowed(indices)
        return AllowedItems(self.task, decoder, indices, prepared)

    @cached_property
    def _indices_of_text(self) -> dict[str, list[int]]:
        indices: dict[str, list[int]] = {}
        for index, text in enumerate(self.task.catalog.texts):
            indices.setdefault(text, []).append(index)
        return indices

    def _indices(self, histories: Sequence[Sequence[str]]) -> list[list[int]]:
        """Index of each item: by id if all items are ids, else by text."""
        catalog = self.task.catalog
        items = {str(item) for history in histories for item in history}
        unknown_ids = {item for item in items if item not in catalog.index_of_id}
        unknown_texts = {item for item in items if item not in self._indices_of_text}
        if unknown_ids and unknown_texts:
            kind, unknown = min(("ids", unknown_ids), ("texts", unknown_texts), key=lambda pair: len(pair[1]))
            raise ValueError(
                f"`histories` hold {len(unknown)} different {kind} that are not in the catalogue of {len(catalog)} "
                f"items, such as {sorted(unknown)[:3]}. Pass only ids or only texts, and leave out unknown items."
            )
        if not unknown_ids:
            return [catalog.indices(history) for history in histories]
        return [[self._indices_of_text[str(item)][0] for item in history] for history in histories]

    def _available_indices(self, allowed: Iterable[str] | AllowedItems | None) -> list[int] | None:
        """Indices of the `allowed` items that are not withdrawn; `None` if all of the catalogue is allowed."""
        catalog, withdrawn = self.task.catalog, self.task.withdrawn
        if isinstance(allowed, AllowedItems):
            return allowed.indices
        if allowed is None and not withdrawn:
            return None
        indices = range(len(catalog)) if allowed is None else catalog.indices(allowed, "allowed")
        available = [index for index in indices if catalog.ids[index] not in withdrawn]
        if indices and not available:
            raise ValueError(
                f"`allowed` holds {len(indices)} item(s), all of which are withdrawn, so there is nothing to "
                "recommend: allow others too, or restore some of them with `update(restore=...)`."
            )
        if not available:
            raise ValueError("`allowed` is empty: pass at least one item.")
        if allowed is not None and len(available) < len(indices):
            logger.warning("%d of %d `allowed` items are withdrawn.", len(indices) - len(available), len(indices))
        return available

    def _with_same_text(self, indices: list[int]) -> list[int]:
        """The items, and others with the same texts."""
        texts = self.task.catalog.texts
        return [same for index in indices for same in self._indices_of_text[texts[index]]]
