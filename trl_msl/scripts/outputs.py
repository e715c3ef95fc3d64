# SPDX-License-Identifier: Apache-2.0
"""What commands write: JSON, tables, the plot of a training, recommendations to read."""

import atexit
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import PartialState
from datasets import Dataset

from ..data import ItemCatalog
from ..decoding import Recommendations
from ..trie import replacing


logger = logging.getLogger(__name__)
TABLE_FORMATS = (".csv", ".jsonl", ".parquet")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_parquet(path: Path, table: pd.DataFrame | Dataset) -> None:
    options = {"index": False} if isinstance(table, pd.DataFrame) else {}
    with replacing(path) as temporary:
        table.to_parquet(str(temporary), **options)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table in the format of [`TABLE_FORMATS`] that the file's name ends in. In CSV, lists are JSON."""
    if path.suffix == ".parquet":
        write_parquet(path, table)
        return
    with replacing(path) as temporary:
        if path.suffix == ".csv":
            table.map(_as_cell).to_csv(temporary, index=False)
        else:
            options = {"orient": "records", "lines": True, "force_ascii": False, "date_format": "iso"}
            table.to_json(temporary, double_precision=15, **options)


def _as_cell(value: Any) -> Any:
    if not isinstance(value, list | dict | np.ndarray):
        return value
    return json.dumps(value, ensure_ascii=False, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v))


def write_results(
    folder: Path,
    metrics: dict[str, Any],
    catalog: ItemCatalog,
    targets: list[str],
    items: np.ndarray,
    ranks: np.ndarray,
    seen: set[str] | None = None,
    columns: dict[str, np.ndarray] | None = None,
) -> None:
    """
    Write what [`report`] compares systems by: `metrics.json`, and `rankings.parquet` with a row per test case.

    Args:
        folder (`Path`):
            The system's folder.
        metrics (`dict[str, Any]`):
            From `ranking_metrics`, with `train_seconds`, `test_seconds`, `num_parameters`, `seed` and
            `validation_ndcg@10` where they are known.
        catalog ([`ItemCatalog`]):
            The items.
        targets (`list[str]`):
            Id of each test case's target, in the order of the test split.
        items (`np.ndarray` of shape `(num_rows, top_k)`, integer), ranks (`np.ndarray` of shape `(num_rows,)`):
            As in [`Recommendations`].
        seen (`set[str]`, *optional*):
            Ids of the items that training has seen: [`Data.seen_items`]. Other targets are cold.
        columns (`dict[str, np.ndarray]`, *optional*):
            Further columns of `rankings.parquet`.
    """
    ids = [[catalog.ids[item] for item in row if item >= 0] for row in items.tolist()]
    rankings = pd.DataFrame({"item_id": targets, "recommended": ids, "rank": ranks.astype(int)})
    if seen is not None:
        rankings["is_cold"] = ~rankings["item_id"].isin(seen)
    write_parquet(folder / "rankings.parquet", rankings.assign(**columns or {}))
    write_json(folder / "metrics.json", metrics)


def format_table(results: dict[str, dict[str, float]], columns: tuple[str, ...] = ("ndcg@10", "hr@10")) -> str:
    """
    A row per system; each metric with its interval, if known. If some targets are cold, the first metric is also
    given for warm and for cold targets apart.
    """
    if any(metrics.get("num_cold") for metrics in results.values()):
        columns = (columns[0], f"{columns[0]}_warm", f"{columns[0]}_cold", *columns[1:])
    lines = [["", *columns]]
    for name, metrics in results.items():
        lines.append([name])
        for column in columns:
            cell, low = "not evaluated", metrics.get(f"{column}_low")
            if column in metrics:
                cell = f"{metrics[column]:.{4 if metrics[column] < 10 else 1}f}"
            if low is not None:
                cell += f" [{low:.4f}, {metrics[f'{column}_high']:.4f}]"
            lines[-1].append(cell)
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    return "\n".join("   ".join(map(str.rjust, line, widths)) for line in lines)


def plot_training(histories: dict[str, list[dict[str, float]]], path: Path) -> None:
    """
    Training loss, temperature τ, the target's probability among the valid tokens, and validation NDCG@10, also of warm
    and of cold targets, over steps: a line per system, in a panel for each that was logged; no file if none was.
    Losses of several systems may be on different scales, so each is then divided by its first value. Needs matplotlib.
    """
    panels = {
        "loss": "training loss",
        "temperature": "temperature τ",
        "target_probability": "target's probability",
        "eval_ndcg@10": "validation NDCG@10",
        "eval_ndcg@10_warm": "NDCG@10, warm targets",
        "eval_ndcg@10_cold": "NDCG@10, cold targets",
    }
    points = {
        key: {name: [(e["step"], e[key]) for e in history if key in e] for name, history in histories.items()}
        for key in panels
    }
    logged = [key for key in panels if any(points[key].values())]
    if not logged:
        return
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        logger.warning('%s was left out, as matplotlib is not installed: pip install "trl_msl[plots]".', path)
        return
    plt.switch_backend("Agg")
    if len(histories) > 1:
        panels["loss"] += ", first value = 1"
        points["loss"] = {
            name: [(step, value / (line[0][1] or 1)) for step, value in line] for name, line in points["loss"].items()
        }
    rows, columns = -(-len(logged) // 3), min(3, len(logged))
    size = (4 * columns, 3.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, constrained_layout=True)
    for axis in axes.flat[len(logged) :]:
        axis.remove()
    for axis, key in zip(axes.flat, logged):
        for name, line in points[key].items():
            # Plotted even if empty, so that a system has the same colour in all panels
            steps, values = zip(*line) if line else ((), ())
            marker = "o" if len(line) <= 40 else None  # a line of one point is invisible without
            axis.plot(steps, values, label=name if line else None, marker=marker, markersize=4)
        axis.set(xlabel="step", ylabel=panels[key])
        axis.locator_params(axis="x", integer=True, min_n_ticks=1)
        axis.grid(alpha=0.3)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def describe_recommendations(rows: Dataset, catalog: ItemCatalog, found: Recommendations, num_shown: int = 5) -> str:
    """History, target, and recommendations of a few users, as text."""
    blocks = []
    for row, items, scores in zip(rows.select(range(min(num_shown, len(rows)))), found.items, found.scores):
        target = catalog.indices([row["item_id"]])[0]
        lines = ["history: " + ", ".join(row["history"]), "next:    " + catalog.completions[target]]
        lines += [
            f"{rank:>5}. {catalog.completions[item]}  (score {score:.2f}){'  <-' * (item == target)}"
            for rank, (item, score) in enumerate(zip(items.tolist(), scores.tolist()), start=1)
            if item >= 0
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def finish() -> None:
    """
    End a command that several processes ran. They wait for each other, as one would be aborted if another left while
    they still communicate; and leave without tearing down the interpreter, which threads of the process group or of
    Arrow, where still alive, abort now and then.
    """
    process = PartialState()
    process.wait_for_everyone()
    process.destroy_process_group()
    if process.num_processes > 1:
        atexit._run_exitfuncs()  # of loggers, for example
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
