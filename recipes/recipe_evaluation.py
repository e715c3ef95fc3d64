# SPDX-License-Identifier: Apache-2.0
"""Evaluating one model by several ways of decoding."""

import time
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_msl import ItemCatalog, ItemTrie, Recommendations, evaluate_recommendations


DECODINGS = {
    "exact": {"mode": "exact"},
    "beam": {"mode": "beam", "normalize": "trie"},
    "beam-vocab": {"mode": "beam", "normalize": "vocab"},
    "generate": {"mode": "generate", "normalize": "trie"},
}


def evaluate_decodings(
    decodings: list[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trie: ItemTrie,
    catalog: ItemCatalog,
    rows: Dataset,
    beam_settings: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[dict[str, dict[str, float]], dict[str, Recommendations]]:
    """
    Metrics and recommendations of each of some ways of decoding, of [`DECODINGS`]. `beam_settings` are for those that
    are not exact; `settings` are of [`evaluate_recommendations`].
    """
    results, found = {}, {}
    for name in decodings:
        started = time.time()
        results[name], found[name] = evaluate_recommendations(
            model, tokenizer, trie, catalog, rows, return_recommendations=True,
            **settings, **({} if name == "exact" else beam_settings or {}), **DECODINGS[name],
        )  # fmt: skip
        results[name]["test_seconds"] = round(time.time() - started, 1)
        for counter in ("expansions", "rounds"):
            counts = getattr(found[name], counter)
            results[name] |= {f"{counter}_mean": float(counts.mean()), f"{counter}_max": int(counts.max())}
    return results, found
