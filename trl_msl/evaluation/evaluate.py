# SPDX-License-Identifier: Apache-2.0
"""Measuring a model's ranking of the catalogue, and doing so during training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..data import RankingTask
from ..decoding import Recommendations, TrieDecoder, recommend
from ..model import is_sharded
from .metrics import coverage, ranking_metrics, ranks_of_targets


def evaluate_recommendations(
    model: PreTrainedModel,
    task: RankingTask,
    rows: Dataset,
    ks: Sequence[int] = (5, 10),
    match: str = "id",
    confidence: float = 0.95,
    return_recommendations: bool = False,
    seen_items: Collection[str] | None = None,
    rank: Callable[..., Recommendations] | None = None,
    **kwargs: Any,
) -> dict[str, float] | tuple[dict[str, float], Recommendations]:
    """
    For each row, rank the whole catalogue, without withdrawn items, and measure the rank of its target.

    Args:
        model, task:
            As for [`recommend`].
        rows ([`~datasets.Dataset`]):
            Rows with `prompt` and `item_id`, the target, as [`build_rows`] makes them.
        ks (`Sequence[int]`, *optional*, defaults to `(5, 10)`):
            Cut-offs K of HR@K, NDCG@K and MRR@K.
        match (`str`, *optional*, defaults to `"id"`):
            What counts as a hit: `"id"`, the target itself, where items with the same text take one rank each, in
            catalogue order; or `"text"`, any item with the target's text, where they share one rank. (With `exclude`,
            `allowed`, `item_bias` or `mode="generate"`, repeats still take places at the end of the list.)
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the bootstrap confidence intervals, over rows.
        return_recommendations (`bool`, *optional*, defaults to `False`):
            Whether to return the recommendations, too.
        seen_items (`Collection[str]`, *optional*):
            Ids of the items in the training windows. Targets among them are warm, the others cold, and both are
            measured apart. With `match="text"`, having seen an item with the target's text is enough.
        rank (`Callable`, *optional*):
            What ranks items for the rows instead of [`recommend`], such as a [`Grounder`]. It is given `top_k`,
            `allowed` where not all items are ranked, and `kwargs`.
        **kwargs:
            `mode`, `batch_size` and other arguments of [`recommend`]. With `allowed`, exactly those items are ranked.

    Returns:
        `dict` of `hr@K`, `ndcg@K`, `mrr@K`, and the ends of their intervals, such as `ndcg@K_low` and `ndcg@K_high`;
        with `seen_items` also HR and NDCG of warm and of cold targets, such as `ndcg@K_cold` and
        `ndcg@K_cold_low`, and their numbers, `num_warm` and `num_cold`; `coverage`, the share of the catalogue's
        items, or with `match="text"` of its texts, that were recommended at least once; `exact_rate`, the share of
        rows whose items are certainly the best; `invalid_rate`; `num_rows`; and, if the task has withdrawn items,
        `withdrawn_targets`, the number of rows whose target is one of them and so can't be found. With
        `return_recommendations`, also the [`Recommendations`].

    Raises:
        `ValueError`: if `rows` is empty or lacks a column, some K exceeds the number of items, or for the reasons of
            [`recommend`].
    """
    _check_arguments(task, rows, ks, match)
    targets, top_k = np.array(task.catalog.indices(rows["item_id"])), max(ks)
    if rank is None:
        rank = functools.partial(recommend, model, task, task.ranking_prompts(rows[:]))
    available = _indices(task, lambda item: item not in task.withdrawn)
    seen = None if seen_items is None else _indices(task, set(seen_items).__contains__)
    can_restrict = kwargs.get("mode") != "generate" and kwargs.keys().isdisjoint(("allowed", "exclude", "item_bias"))
    if task.withdrawn and kwargs.get("allowed") is None:
        kwargs["allowed"] = torch.from_numpy(available)
    if match == "id":
        can_be_found, num_ranked = np.isin(targets, available), len(task.catalog)
        found = rank(top_k=top_k, **kwargs)
        recommended = found.items
    else:
        leaves = task.trie.item_nodes.cpu().numpy()
        texts, text = np.unique(leaves, return_inverse=True)
        first = available[np.unique(leaves[available], return_index=True)[1]]
        num_ranked = len(texts)
        if can_restrict and len(first) < len(leaves):
            # One item of each text, so that the list holds `top_k` texts
            top_k, kwargs["allowed"] = min(top_k, len(first)), torch.from_numpy(first)
        found = rank(top_k=top_k, **kwargs)
        targets, recommended = text[targets], _without_repeats(np.where(found.items < 0, -1, text[found.items]))
        can_be_found = np.isin(targets, text[first])
        seen = None if seen is None else text[seen]
    found.target_ranks = ranks_of_targets(recommended, targets)
    found.is_cold = None if seen is None else ~np.isin(targets, seen)
    metrics = ranking_metrics(found.target_ranks, ks, confidence, found.is_cold) | {
        "coverage": coverage(recommended, num_ranked),
        "exact_rate": float(found.exact.mean()),
        "invalid_rate": found.invalid_rate,
        "num_rows": len(rows),
    }
    if task.withdrawn:
        metrics["withdrawn_targets"] = int((~can_be_found).sum())
    return (metrics, found) if return_recommendations else metrics


class RecommendationCallback(TrainerCallback):
    """
    Adds the ranking metrics of [`evaluate_recommendations`] to each evaluation of a trainer, so that
    `metric_for_best_model="eval_ndcg@10"` chooses the checkpoint that ranks best.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer that the callback is added to: one of this package or any other, such as TRL's `SFTTrainer`.
        rows ([`~datasets.Dataset`]):
            As for [`evaluate_recommendations`].
        task ([`RankingTask`], *optional*):
            As for [`evaluate_recommendations`]. Defaults to that of a trainer of this package.
        **kwargs:
            Passed to [`evaluate_recommendations`].

    Raises:
        `ValueError`: if there is no task, or for the reasons of [`evaluate_recommendations`].

    Example:

    ```python
    trainer.add_callback(RecommendationCallback(trainer, validation_rows))
    ```
    """

    def __init__(self, trainer: Trainer, rows: Dataset, task: RankingTask | None = None, **kwargs: Any):
        self.trainer = trainer
        self.rows = rows
        self.task = getattr(trainer, "task", None) if task is None else task
        if not isinstance(self.task, RankingTask):
            raise ValueError(f"`task` is missing, and `{type(trainer).__name__}` has none: pass one.")
        _check_arguments(self.task, rows, **kwargs)
        self.kwargs = kwargs
        self._decoder: TrieDecoder | None = None
        self._metrics: dict[str, float] = {}
        self._measured_at: int | None = None  # step
        self._evaluations: set[str] = set()  # that these metrics were added to

    def on_train_begin(self, args, state, control, **kwargs):
        # Before callbacks that read the metrics, such as early stopping
        self.trainer.callback_handler.callbacks.remove(self)
        self.trainer.callback_handler.callbacks.insert(0, self)
        self._measured_at = None
        # Fail before the training, not at the first evaluation
        if is_sharded(self._model):
            raise ValueError(
                "`trainer` shards the model over processes (FSDP, ZeRO-3), but decoding needs it whole in each: "
                "leave `RecommendationCallback` out (commands: --eval_strategy no) and evaluate the saved model."
            )
        self._decoder = None
        self._get_decoder()

    @property
    def _model(self) -> PreTrainedModel:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def _get_decoder(self) -> TrieDecoder | None:
        """The decoder of the trainer's model, made once per training, or when the model was replaced or moved."""
        if self.kwargs.get("mode") == "generate":
            return None
        model, made = self._model, self._decoder
        if made is None or made.model is not model or made.trie.device != model.device:
            self._decoder = TrieDecoder(model, self.task.trie)
        return self._decoder

    def on_train_end(self, args, state, control, **kwargs):
        self._measured_at = None  # `load_best_model_at_end` has changed the weights

    def on_evaluate(self, args, state, control, metrics: dict[str, float], **kwargs):
        # The runtime's name has the prefix of the evaluated dataset; not all others have
        evaluations = {name for name in metrics if name.endswith("_runtime")}
        if not all(name.startswith("eval_") for name in evaluations):
            return  # `trainer.evaluate(metric_key_prefix=...)` of something else
        # Several `eval_dataset`s are evaluated one after another, but the rows are ranked once
        if self._measured_at != state.global_step or not self._evaluations.isdisjoint(evaluations):
            settings = {"decoder": self._get_decoder(), **self.kwargs}
            found = evaluate_recommendations(self._model, self.task, self.rows, **settings)
            self._metrics = {f"eval_{name}": value for name, value in found.items()}
            self._measured_at, self._evaluations = state.global_step, set()
            self.trainer.log(dict(self._metrics))
        self._evaluations |= evaluations
        metrics.update(self._metrics)  # the dict from which `Trainer` picks `metric_for_best_model`


def _check_arguments(
    task: RankingTask, rows: Dataset, ks: Sequence[int] = (5, 10), match: str = "id", **kwargs: Any
) -> None:
    if match not in ("id", "text"):
        raise ValueError(f"`match` is {match!r}: it must be 'id' or 'text'.")
    num_items = len(task.catalog) - len(task.withdrawn)
    if max(ks) > num_items:
        found = f"{num_items} items" + (" that are not withdrawn" if task.withdrawn else "")
        raise ValueError(f"`ks` is {ks}, but the catalogue has {found}: pass smaller cut-offs.")
    if task.withdrawn and kwargs.get("mode") == "generate":
        raise ValueError(
            f"`mode` is 'generate', which can't leave out the {len(task.withdrawn)} withdrawn items of the catalogue: "
            "pass 'exact' or 'beam'."
        )
    if len(rows) == 0:
        raise ValueError("`rows` is empty: pass at least one row.")
    missing = {"prompt", "item_id"} - set(rows.column_names)
    if missing:
        raise ValueError(f"`rows` lacks the column(s) {sorted(missing)}: make rows with `build_rows`.")


def _indices(task: RankingTask, is_chosen: Callable[[str], bool]) -> np.ndarray:
    """Indices of the items whose ids are chosen."""
    return np.flatnonzero([is_chosen(item) for item in task.catalog.ids])


def _without_repeats(texts: np.ndarray) -> np.ndarray:
    """Each row's texts without later repeats, moved up, and padded with -1."""
    repeats = (texts[:, :, None] == texts[:, None, :]) & np.tri(texts.shape[1], k=-1, dtype=bool)
    texts = np.where(repeats.any(axis=2), -1, texts)
    return np.take_along_axis(texts, np.argsort(texts < 0, axis=1, kind="stable"), axis=1)
