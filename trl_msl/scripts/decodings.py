# SPDX-License-Identifier: Apache-2.0
"""Evaluating one model by one or several ways of decoding."""

import time
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from ..data import RankingTask
from ..decoding import Recommendations
from ..evaluation import evaluate_recommendations


DECODINGS = {
    "exact": {"mode": "exact"},
    "beam": {"mode": "beam", "normalize": "trie"},
    "beam-vocab": {"mode": "beam", "normalize": "vocab"},
    "generate": {"mode": "generate", "normalize": "trie"},
}


def evaluate_decodings(
    decodings: list[str],
    model: PreTrainedModel,
    task: RankingTask,
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
        beams = {} if name == "exact" else beam_settings or {}
        results[name], found[name] = evaluate_recommendations(
            model, task, rows, return_recommendations=True, **settings, **beams, **DECODINGS[name]
        )
        results[name]["test_seconds"] = round(time.time() - started, 1)
        for counter in ("expansions", "rounds"):
            counts = getattr(found[name], counter)
            results[name] |= {f"{counter}_mean": float(counts.mean()), f"{counter}_max": int(counts.max())}
    return results, found
