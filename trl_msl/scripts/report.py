# SPDX-License-Identifier: Apache-2.0
"""
Compare systems that ranked the same test split: one table, and plots.

```bash
trl-msl report --runs outputs/book --reference msl-ats
```

A system is a folder below `runs` with `metrics.json` and `rankings.parquet`; its name is its path there. Folders whose
names differ only in an ending `-seed<N>` are one system with several seeds. `output_dir` then holds `report.md` with
the table, `report.json` with all figures, and, if matplotlib is installed, the plots that there is data for.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..evaluation import bootstrap_interval, per_user_metrics
from .command_line import command
from .outputs import write_json, write_text


NUM_PERMUTATIONS = 10_000
COSTS = ("train_seconds", "test_seconds", "num_parameters", "num_trainable_parameters")
MEANS = ("coverage", "validation_ndcg@10", *COSTS)


@dataclass
class ReportArguments:
    """
    Arguments of this command.

    Parameters:
        runs (`str`):
            Folder that holds the systems' folders, at any depth.
        reference (`str`, *optional*, defaults to `"msl-ats"`):
            System that the others are compared with.
        output_dir (`str`, *optional*):
            Folder to write into, `report` in `runs` by default.
        systems (`list[str]`, *optional*):
            Systems to show, in this order. By default all, the best NDCG@10 first.
    """

    runs: str = field(metadata={"help": "Folder that holds the systems' folders."})
    reference: str = field(default="msl-ats", metadata={"help": "System that the others are compared with."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder to write into, `report` in `runs`."})
    systems: list[str] | None = field(default=None, metadata={"help": "Systems to show, in this order."})


@dataclass
class System:
    """The results of a system, from a folder for each seed."""

    name: str
    folders: list[Path]
    metrics: list[dict[str, Any]]  # metrics.json of each folder
    item_ids: np.ndarray  # target of each test case
    values: dict[str, np.ndarray]  # metric to `(num_seeds, num_rows)`: `per_user_metrics` of the ranks
    is_cold: np.ndarray | None  # whether training has not seen the target, if known

    def per_user(self, metric: str) -> np.ndarray:
        """Mean over the seeds, shape `(num_rows,)`."""
        return self.values[metric].mean(axis=0)


def main(args: ReportArguments) -> None:
    runs = Path(args.runs)
    output_dir = Path(args.output_dir or runs / "report")
    folders = find_systems(runs)
    if not folders:
        raise ValueError(
            f"`runs` is {args.runs!r}, below which no folder has both metrics.json and rankings.parquet: evaluate "
            "systems into it first."
        )
    names = list(dict.fromkeys(args.systems or folders))
    for name, argument in [*((name, "systems") for name in names), (args.reference, "reference")]:
        if name not in folders:
            raise ValueError(f"`{argument}` has {name!r}, which is not in {args.runs}: pass some of {list(folders)}.")
    if args.reference not in names:
        raise ValueError(f"`reference` is {args.reference!r}, which is not among `systems`, {names}: add it there.")
    systems = read_systems({name: folders[name] for name in names})
    rows = compare(systems, args.reference)
    if not args.systems:
        rows = dict(sorted(rows.items(), key=lambda row: -row[1]["ndcg@10"]))
    try:
        from .report_plots import write_plots
    except ImportError:
        plots = ['The plots were left out, as matplotlib is not installed: pip install "trl_msl[plots]".']
    else:
        plots = write_plots(output_dir, rows, args.reference, runs)
    table = f"{format_markdown(rows)}\n\n{describe_statistics(rows, args.reference)}\n"
    write_text(output_dir / "report.md", table)
    write_json(output_dir / "report.json", {"runs": args.runs, "reference": args.reference, "systems": rows})
    print(table, output_dir / "report.md", output_dir / "report.json", *plots, sep="\n")


def find_systems(runs: Path) -> dict[str, list[Path]]:
    """Folders of each system below `runs`, one for each seed."""
    systems: dict[str, list[Path]] = {}
    for path in sorted(runs.rglob("rankings.parquet")):
        parts = path.parent.relative_to(runs).parts
        is_checkpoint = any(part.startswith("checkpoint-") for part in parts)
        if (path.parent / "metrics.json").is_file() and not is_checkpoint:
            name = "/".join(re.sub(r"-seed\d+$", "", part) for part in parts)
            systems.setdefault(name or runs.resolve().name, []).append(path.parent)
    return systems


def read_systems(folders: dict[str, list[Path]]) -> list[System]:
    """Read the systems, and check that all of them ranked the same test cases."""
    systems, first = [], None
    for name, paths in folders.items():
        metrics = [json.loads((path / "metrics.json").read_text(encoding="utf-8")) for path in paths]
        seeds = [entry["seed"] for entry in metrics if entry.get("seed") is not None]
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"System {name!r} has a seed twice, {seeds} in {[str(path) for path in paths]}: train with another "
                "`seed`, or remove a folder."
            )
        ranks, is_cold = [], None
        for path in paths:
            rankings = pd.read_parquet(path / "rankings.parquet")
            item_ids = rankings["item_id"].astype(str).to_numpy()
            first = first or (path, item_ids)
            if not np.array_equal(item_ids, first[1]):
                raise ValueError(
                    f"{path} and {first[0]} ranked different test cases ({len(item_ids)} and {len(first[1])}; their "
                    "`item_id` differ): evaluate both on the same rows in the same order, or choose by `systems`."
                )
            ranks.append(rankings["rank"].to_numpy())
            is_cold = rankings["is_cold"].to_numpy() if "is_cold" in rankings else is_cold
        values = [per_user_metrics(rank) for rank in ranks]
        values = {metric: np.stack([seed[metric] for seed in values]) for metric in values[0]}
        systems.append(System(name, paths, metrics, first[1], values, is_cold))
    return systems


def compare(systems: list[System], reference: str) -> dict[str, dict[str, Any]]:
    """What is known of each system, and its difference from the reference, for `report.json`."""
    base = next(system for system in systems if system.name == reference).per_user("ndcg@10")
    known = [system.is_cold for system in systems if system.is_cold is not None]
    if any(not np.array_equal(is_cold, known[0]) for is_cold in known):
        raise ValueError(
            "`runs` holds systems that were trained on different items: their `is_cold` in rankings.parquet differ."
        )
    is_cold = known[0] if known else None
    rows = {system.name: describe(system, is_cold) for system in systems}
    others = [system for system in systems if system.name != reference]
    for system in others:
        difference = system.per_user("ndcg@10") - base
        low, high = bootstrap_interval(difference)
        rows[system.name] |= {"difference": float(difference.mean()), "difference_low": low, "difference_high": high}
        rows[system.name]["p_value"] = sign_flip_p_value(difference)
    corrected = holm([rows[system.name]["p_value"] for system in others])
    for system, p_value in zip(others, corrected):
        rows[system.name]["p_value_holm"] = p_value
    return rows


def describe(system: System, is_cold: np.ndarray | None) -> dict[str, Any]:
    """Metrics from the ranks, and means over the seeds of other entries of `metrics.json`; `None` if missing."""
    row: dict[str, Any] = {"folders": [str(folder) for folder in system.folders], "num_rows": len(system.item_ids)}
    row |= {"num_seeds": len(system.folders), "seeds": [metrics.get("seed") for metrics in system.metrics]}
    for metric, values in system.values.items():
        row[metric] = float(values.mean())
        if metric.endswith("@10"):
            row[f"{metric}_low"], row[f"{metric}_high"] = bootstrap_interval(system.per_user(metric))
    row["num_cold"] = None if is_cold is None else int(is_cold.sum())
    for name, chosen in (("warm", ~is_cold), ("cold", is_cold)) if is_cold is not None and is_cold.any() else ():
        row[f"ndcg@10_{name}"] = float(system.per_user("ndcg@10")[chosen].mean()) if chosen.any() else None
    by_seed = system.values["ndcg@10"].mean(axis=1)
    row["ndcg@10_by_seed"] = by_seed.tolist()
    row["ndcg@10_std"] = float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None
    for key in MEANS:
        known = [metrics[key] for metrics in system.metrics if metrics.get(key) is not None]
        row[key] = float(np.mean(known)) if known else None
    row["users_per_second"] = row["num_rows"] / row["test_seconds"] if row["test_seconds"] else None
    temperature = (system.metrics[0].get("arguments") or {}).get("temperature")
    row["temperature"] = temperature if isinstance(temperature, (int, float)) else None
    return row


def sign_flip_p_value(differences: np.ndarray, num_permutations: int = NUM_PERMUTATIONS, seed: int = 0) -> float:
    """
    Two-sided p-value of a paired randomisation test, with the mean difference as its statistic.

    If two systems are equally good, each user's difference could as well have had the other sign. So signs are flipped
    at random, and the p-value is the share of means at least as far from zero as the observed one (Smucker, Allan and
    Carterette, A Comparison of Statistical Significance Tests for Information Retrieval Evaluation, CIKM 2007), which
    counts as one of them, so that no p-value is 0 (Phipson and Smyth, 2010).

    Args:
        differences (`np.ndarray` of shape `(num_users,)`):
            Metric of one system minus that of the other, per user.
        num_permutations, seed (`int`, *optional*, defaults to `10_000` and `0`):
            Number of random flips, and their seed.

    Example: of two users' four equally likely flips, two have a mean as far from zero.

    ```python
    >>> round(sign_flip_p_value([0.5, 0.5]), 1)
    0.5

    ```
    """
    differences = np.asarray(differences, dtype=np.float64)
    differences = differences[differences != 0]  # the sign of 0 does not matter
    total, tolerance = differences.sum(), 1e-12 * np.abs(differences).sum()  # sums in another order are still ties
    rng = np.random.default_rng(seed)
    per_chunk = max(1, 2**20 // max(1, len(differences)))  # 8 MiB of signs
    count = 0
    for start in range(0, num_permutations, per_chunk):
        shape = (min(per_chunk, num_permutations - start), len(differences))
        kept = rng.integers(2, size=shape, dtype=np.int8) @ differences
        count += int((np.abs(2 * kept - total) >= abs(total) - tolerance).sum())
    return (count + 1) / (num_permutations + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """
    Correct p-values for their number: the smallest of m is multiplied by m, the next one by m - 1, and so on, at most
    1 and never below the one before (Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979).

    Example:

    ```python
    >>> holm([0.25, 0.125, 0.75])
    [0.5, 0.375, 0.75]

    ```
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p_values, dtype=float)[order] * factors))
    return corrected.tolist()


def format_markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The table, without columns that are blank for all systems."""
    columns: dict[str, list[str]] = {"system": list(rows)}
    cells = [format_row(row) for row in rows.values()]
    columns |= {title: [row[title] for row in cells] for title in cells[0]}
    columns = {title: column for title, column in columns.items() if any(column)}
    widths = {title: max(map(len, [title, *column])) for title, column in columns.items()}
    lines = [[title.ljust(width) for title, width in widths.items()], ["-" * width for width in widths.values()]]
    lines += [[column[place].ljust(widths[title]) for title, column in columns.items()] for place in range(len(rows))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_row(row: dict[str, Any]) -> dict[str, str]:
    """The cells of a system by column title, blank if unknown."""

    def cell(key: str, form: str) -> str:
        return form.format(row[key]).replace("-", "−") if row.get(key) is not None else ""

    def interval(key: str) -> str:
        form = "{:+.4f}" if key == "difference" else "{:.4f}"
        value, low, high = (cell(f"{key}{end}", form) for end in ("", "_low", "_high"))
        return f"{value} [{low}, {high}]" if value else ""

    def number(key: str) -> str:
        return cell(key, "{:,.0f}" if (row[key] or 0) >= 10 else "{:.2g}")

    p_value, spread = row.get("p_value_holm"), row["ndcg@10_std"]
    trained = row["num_trainable_parameters"] if row["num_trainable_parameters"] != row["num_parameters"] else None
    return {
        "NDCG@10": interval("ndcg@10"),
        "HR@10": cell("hr@10", "{:.4f}"),
        "warm": cell("ndcg@10_warm", "{:.4f}"),
        "cold": cell("ndcg@10_cold", "{:.4f}"),
        "difference in NDCG@10": interval("difference"),
        "p": "< 0.001" if p_value is not None and p_value < 0.001 else cell("p_value_holm", "{:.3f}"),
        "seeds": f"{row['num_seeds']} (sd {spread:.4f})" if spread is not None else str(row["num_seeds"]),
        "coverage": cell("coverage", "{:.1%}"),
        "validation NDCG@10": cell("validation_ndcg@10", "{:.4f}"),
        "training, s": number("train_seconds"),
        "users per second": number("users_per_second"),
        "parameters": format_count(row["num_parameters"]) + (f", {format_count(trained)} trained" if trained else ""),
    }


def format_count(number: float | None) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number is not None and number >= unit:
            return f"{number / unit:.3g}{name}"
    return "" if number is None else f"{number:.0f}"


def describe_statistics(rows: dict[str, dict[str, Any]], reference: str) -> str:
    """How to read the table."""
    num_rows = next(iter(rows.values()))["num_rows"]
    text = f"{num_rows:,} test cases; 95% bootstrap intervals over them, of means over the seeds."
    if any("ndcg@10_warm" in row for row in rows.values()):
        text += " Warm and cold: NDCG@10 where training has seen the target, and where it has not."
    if len(rows) > 1:
        text += (
            f" Differences are from `{reference}`, paired by test case; p: two-sided sign-flip test with "
            f"{NUM_PERMUTATIONS:,} permutations, Holm-corrected for {len(rows) - 1} comparisons."
        )
    return text


run = command(main)


if __name__ == "__main__":
    run()
