# SPDX-License-Identifier: Apache-2.0
"""Measuring a model's ranking of the catalogue, and doing so during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
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
    **kwargs: Any,
) -> dict[str, float] | tuple[dict[str, float], Recommendations]:
    """
    Rank the whole catalogue for each row and measure where its target stands.

    Args:
        model, task:
            As for [`recommend`].
        rows ([`~datasets.Dataset`]):
            Rows with `prompt` and `item_id`, the target, as [`build_rows`] makes them.
        ks (`Sequence[int]`, *optional*, defaults to `(5, 10)`):
            Cut-offs K of HR@K, NDCG@K and MRR@K.
        match (`str`, *optional*, defaults to `"id"`):
            What counts as a hit: `"id"`, the target itself, where items with the same text take a rank each, in
            catalogue order; or `"text"`, any item with the target's text.
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the bootstrap confidence intervals, over rows.
        return_recommendations (`bool`, *optional*, defaults to `False`):
            Whether to return the recommendations too.
        **kwargs:
            `mode`, `batch_size` and other arguments of [`recommend`].

    Returns:
        `dict` of `hr@K`, `ndcg@K`, `mrr@K`; for the largest K also the ends of their intervals, such as `ndcg@K_low`
        and `ndcg@K_high`; `coverage`, the share of the catalogue that was recommended to anybody; `exact_rate`, the
        share of rows whose items are certainly the best; `invalid_rate`; and `num_rows`. With
        `return_recommendations`, also the [`Recommendations`].
    """
    if match not in ("id", "text"):
        raise ValueError(f"`match` is {match!r}: it must be 'id' or 'text'.")
    missing = {"prompt", "item_id"} - set(rows.column_names)
    if missing:
        raise ValueError(f"`rows` lacks the column(s) {sorted(missing)}: make rows with `build_rows`.")
    targets = np.array(task.catalog.indices(rows["item_id"]))
    found = recommend(model, task, task.ranking_prompts(rows[:]), top_k=max(ks), **kwargs)
    recommended = found.items
    if match == "text":
        _, first, leaf = np.unique(task.trie.item_nodes.cpu().numpy(), return_index=True, return_inverse=True)
        representative = first[leaf]  # the first item with the same text
        targets, recommended = representative[targets], _first_of_each(representative, recommended)
    found.target_ranks = ranks_of_targets(recommended, targets)
    metrics = ranking_metrics(found.target_ranks, ks, confidence) | {
        "coverage": coverage(found.items, len(task.catalog)),
        "exact_rate": float(found.exact.mean()),
        "invalid_rate": found.invalid_rate,
        "num_rows": len(rows),
    }
    return (metrics, found) if return_recommendations else metrics


class RecommendationCallback(TrainerCallback):
    """
    Adds the ranking metrics of [`evaluate_recommendations`] to each evaluation of a trainer, so that
    `metric_for_best_model="eval_ndcg@10"` chooses the checkpoint by what a recommender is for.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer that the callback is added to; any, so that TRL's `SFTTrainer` can be compared.
        rows ([`~datasets.Dataset`]):
            As for [`evaluate_recommendations`].
        task ([`RankingTask`], *optional*):
            As for [`evaluate_recommendations`]. Defaults to that of the trainer, if it is one of this package.
        **kwargs:
            Passed to [`evaluate_recommendations`].

    Raises:
        `ValueError`: if there is no task.

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
            raise ValueError(f"`task` is missing: a {type(trainer).__name__} has none of its own. Pass it.")
        self.kwargs = kwargs
        self._measured: tuple[int, dict[str, float]] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        # Before callbacks that read the metrics, such as early stopping
        self.trainer.callback_handler.callbacks.remove(self)
        self.trainer.callback_handler.callbacks.insert(0, self)
        self._measured = None
        # What can't be done is found before the training, not after
        if is_sharded(self._model):
            raise ValueError(
                "`trainer` shards the model over processes (FSDP, ZeRO-3), and decoding needs all of it in each: "
                "leave `RecommendationCallback` out (recipes: --eval_strategy no) and evaluate what was saved."
            )
        if self.kwargs.get("mode", "exact") != "generate":
            TrieDecoder(self._model, self.task.trie)

    @property
    def _model(self) -> PreTrainedModel:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def on_evaluate(self, args, state, control, metrics: dict[str, float], **kwargs):
        if not all(name.startswith("eval_") for name in metrics if name != "epoch"):
            return  # `trainer.evaluate(metric_key_prefix=...)` of something else
        if self._measured is None or self._measured[0] != state.global_step:  # once for several `eval_dataset`s
            found = evaluate_recommendations(self._model, self.task, self.rows, **self.kwargs)
            self._measured = (state.global_step, {f"eval_{name}": value for name, value in found.items()})
            self.trainer.log(dict(self._measured[1]))
        metrics.update(self._measured[1])  # the dict from which `Trainer` picks `metric_for_best_model`


def _first_of_each(representative: np.ndarray, recommended: np.ndarray) -> np.ndarray:
    """Recommendations with each item replaced by the first one with its text, later repeats by -1."""
    same = np.where(recommended >= 0, representative[recommended], -1)
    repeated = (same[:, :, None] == same[:, None, :]) & np.tri(same.shape[1], k=-1, dtype=bool)
    return np.where(repeated.any(axis=2), -1, same)
