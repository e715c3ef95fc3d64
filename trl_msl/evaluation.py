# SPDX-License-Identifier: Apache-2.0
"""Measuring a model's ranking of the catalogue, and doing so during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from .catalog import ItemCatalog, encode_items
from .decoding import TrieDecoder
from .generation import Recommendations, recommend
from .metrics import coverage, ranking_metrics, ranks_of_targets
from .prompts import PromptTemplate, ranking_prompts
from .tree_support import is_sharded
from .trie import ItemTrie


def evaluate_recommendations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trie: ItemTrie,
    catalog: ItemCatalog,
    rows: Dataset,
    ks: Sequence[int] = (5, 10),
    match: str = "id",
    confidence: float = 0.95,
    max_length: int | None = None,
    prompt_template: PromptTemplate | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    return_recommendations: bool = False,
    **kwargs: Any,
) -> dict[str, float] | tuple[dict[str, float], Recommendations]:
    """
    Rank the whole catalogue for each row and measure where its target stands.

    Args:
        model, tokenizer, trie:
            As for [`recommend`].
        catalog ([`ItemCatalog`]):
            The items that the trie was built from.
        rows ([`~datasets.Dataset`]):
            Rows with `prompt` and `item_id`, the target, as [`build_rows`] makes them.
        ks (`Sequence[int]`, *optional*, defaults to `(5, 10)`):
            Cut-offs K of HR@K, NDCG@K and MRR@K.
        match (`str`, *optional*, defaults to `"id"`):
            What counts as a hit: `"id"`, the target itself, where items with the same text take a rank each, in
            catalogue order; or `"text"`, any item with the target's text.
        confidence (`float`, *optional*, defaults to `0.95`):
            Level of the bootstrap confidence intervals, over rows.
        max_length (`int`, *optional*):
            As in training: prompts that, with a title of average length, are longer lose their oldest history items.
        prompt_template ([`PromptTemplate`], *optional*):
            Template that the rows were made with, needed to shorten a prompt and for `separate_items`.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Passed to the chat template.
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
    if len(catalog) != trie.num_items or not _belong_together(catalog, trie, tokenizer, rows, chat_template_kwargs):
        raise ValueError(
            f"`catalog` with {len(catalog)} items and `trie` with {trie.num_items} do not belong together: build the "
            "trie from this catalogue, with this tokenizer, for rows of this form."
        )
    targets = np.array(catalog.indices(rows["item_id"]))
    prompts = ranking_prompts(tokenizer, trie, rows[:], max_length, prompt_template, chat_template_kwargs)
    found = recommend(model, tokenizer, trie, prompts, top_k=max(ks), **kwargs)
    recommended = found.items
    if match == "text":
        _, first, leaf = np.unique(trie.item_nodes.cpu().numpy(), return_index=True, return_inverse=True)
        representative = first[leaf]  # the first item with the same text
        targets, recommended = representative[targets], _first_of_each(representative, recommended)
    found.target_ranks = ranks_of_targets(recommended, targets)
    metrics = ranking_metrics(found.target_ranks, ks, confidence) | {
        "coverage": coverage(found.items, len(catalog)),
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
        trie ([`ItemTrie`]), catalog ([`ItemCatalog`]), rows ([`~datasets.Dataset`]):
            As for [`evaluate_recommendations`].
        **kwargs:
            Passed to [`evaluate_recommendations`]. `max_length`, `prompt_template` and `chat_template_kwargs` are the
            trainer's where it has them.

    Example:

    ```python
    trainer.add_callback(RecommendationCallback(trainer, trie, catalog, validation_rows))
    ```
    """

    def __init__(self, trainer: Trainer, trie: ItemTrie, catalog: ItemCatalog, rows: Dataset, **kwargs: Any):
        self.trainer = trainer
        self.trie = trie
        self.catalog = catalog
        self.rows = rows
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
            TrieDecoder(self._model, self.trie)

    @property
    def _model(self) -> PreTrainedModel:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def on_evaluate(self, args, state, control, metrics: dict[str, float], **kwargs):
        if not all(name.startswith("eval_") for name in metrics if name != "epoch"):
            return  # `trainer.evaluate(metric_key_prefix=...)` of something else
        if self._measured is None or self._measured[0] != state.global_step:  # once for several `eval_dataset`s
            found = evaluate_recommendations(
                self._model,
                getattr(self.trainer.processing_class, "tokenizer", self.trainer.processing_class),
                self.trie,
                self.catalog,
                self.rows,
                **{**self._trainer_settings(), **self.kwargs},
            )
            self._measured = (state.global_step, {f"eval_{name}": value for name, value in found.items()})
            self.trainer.log(dict(self._measured[1]))
        metrics.update(self._measured[1])  # the dict from which `Trainer` picks `metric_for_best_model`

    def _trainer_settings(self) -> dict[str, Any]:
        args = self.trainer.args
        template = getattr(self.trainer, "prompt_template", None)
        return {
            "max_length": None if template is None else getattr(args, "max_length", None),
            "prompt_template": template,
            "chat_template_kwargs": getattr(args, "chat_template_kwargs", None),
        }


def _first_of_each(representative: np.ndarray, recommended: np.ndarray) -> np.ndarray:
    """Recommendations with each item replaced by the first one with its text, later repeats by -1."""
    same = np.where(recommended >= 0, representative[recommended], -1)
    repeated = (same[:, :, None] == same[:, None, :]) & np.tri(same.shape[1], k=-1, dtype=bool)
    return np.where(repeated.any(axis=2), -1, same)


def _belong_together(
    catalog: ItemCatalog,
    trie: ItemTrie,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    chat_template_kwargs: dict[str, Any] | None,
) -> bool:
    """Whether some of the catalogue's items stand in the trie where they should, for prompts of the rows' form."""
    sample = range(0, len(catalog), max(1, len(catalog) // 50))
    conversational = not isinstance(rows[0]["prompt"], str)
    sequences = encode_items(tokenizer, [catalog.completions[i] for i in sample], conversational, chat_template_kwargs)
    reached = [int(trie.to("cpu").walk(torch.tensor(sequence))[-1]) for sequence in sequences]
    return reached == trie.item_nodes[list(sample)].tolist()
