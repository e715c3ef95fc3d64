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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..evaluation import bootstrap_interval, detectable_difference, holm, per_user_metrics, sign_flip_p_value
from .command_line import command
from .outputs import write_json, write_text


NUM_PERMUTATIONS = 10_000
COSTS = ("train_seconds", "test_seconds", "num_parameters", "num_trainable_parameters")
LOG_PROBS = ("log_prob_calibrated", "log_prob", "log_prob_vocab")  # columns that `trl-msl evaluate` can write
# Metrics that have columns of their own in the table, besides NDCG@10
FURTHER = {"ndcg@100": "NDCG@100", "log_prob_calibrated": "log P"}
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
    values: dict[str, np.ndarray]  # metric to `(num_seeds, num_rows)`: from the ranks, and `LOG_PROBS`
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
        values, is_cold = [], None
        for path in paths:
            rankings = pd.read_parquet(path / "rankings.parquet")
            item_ids = rankings["item_id"].astype(str).to_numpy()
            first = first or (path, item_ids)
            if not np.array_equal(item_ids, first[1]):
                raise ValueError(
                    f"{path} and {first[0]} ranked different test cases ({len(item_ids)} and {len(first[1])}; their "
                    "`item_id` differ): evaluate both on the same rows in the same order, or choose by `systems`."
                )
            ks = (5, 10, 100) if rankings["recommended"].str.len().max() >= 100 else (5, 10)
            log_probs = {name: rankings[name].to_numpy() for name in LOG_PROBS if name in rankings}
            values.append(per_user_metrics(rankings["rank"].to_numpy(), ks) | log_probs)
            is_cold = rankings["is_cold"].to_numpy() if "is_cold" in rankings else is_cold
        known = [metric for metric in values[0] if all(metric in of_seed for of_seed in values)]
        stacked = {metric: np.stack([of_seed[metric] for of_seed in values]) for metric in known}
        systems.append(System(name, paths, metrics, first[1], stacked, is_cold))
    return systems


def compare(systems: list[System], reference: str) -> dict[str, dict[str, Any]]:
    """What is known of each system, and its difference from the reference, for `report.json`."""
    known = [system.is_cold for system in systems if system.is_cold is not None]
    if any(not np.array_equal(is_cold, known[0]) for is_cold in known):
        raise ValueError(
            "`runs` holds systems that were trained on different items: their `is_cold` in rankings.parquet differ."
        )
    is_cold = known[0] if known else None
    rows = {system.name: describe(system, is_cold) for system in systems}
    base = next(system for system in systems if system.name == reference)
    others = [system for system in systems if system.name != reference]
    for metric in ("ndcg@10", "ndcg@100", *LOG_PROBS):
        if not all(metric in system.values for system in systems):
            continue
        start = "" if metric == "ndcg@10" else f"{metric}_"
        differences = [system.per_user(metric) - base.per_user(metric) for system in others]
        found = [describe_difference(difference, base.item_ids) for difference in differences]
        corrected = holm([difference["p_value"] for difference in found])
        for system, difference, p_value in zip(others, found, corrected):
            difference["p_value_holm"] = p_value
            rows[system.name] |= {f"{start}{name}": value for name, value in difference.items()}
    return rows


def describe_difference(difference: np.ndarray, targets: np.ndarray) -> dict[str, float | None]:
    """
    Mean difference with its interval, also over the target items, and its p-value; and the smallest one that such a
    comparison would find.
    """
    low, high = bootstrap_interval(difference)
    low_by_item, high_by_item = bootstrap_interval(difference, groups=targets)
    return {
        "difference": float(difference.mean()),
        "difference_low": low,
        "difference_high": high,
        "difference_by_item_low": low_by_item,
        "difference_by_item_high": high_by_item,
        "p_value": sign_flip_p_value(difference, NUM_PERMUTATIONS),
        "detectable_difference": detectable_difference(difference) if len(difference) > 1 else None,
    }


def describe(system: System, is_cold: np.ndarray | None) -> dict[str, Any]:
    """Metrics from the ranks, and means over the seeds of other entries of `metrics.json`; `None` if missing."""
    row: dict[str, Any] = {"folders": [str(folder) for folder in system.folders], "num_rows": len(system.item_ids)}
    row["num_target_items"] = len(set(system.item_ids))
    row |= {"num_seeds": len(system.folders), "seeds": [metrics.get("seed") for metrics in system.metrics]}
    for metric, values in system.values.items():
        row[metric] = float(values.mean())
        if not metric.endswith("@5"):
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
        form = "{:+.4f}" if key.endswith("difference") else "{:.4f}"
        value, low, high = (cell(f"{key}{end}", form) for end in ("", "_low", "_high"))
        return f"{value} [{low}, {high}]" if value else ""

    def ends(key: str) -> str:
        low, high = (cell(f"{key}{end}", "{:+.4f}") for end in ("_low", "_high"))
        return f"[{low}, {high}]" if low else ""

    def number(key: str) -> str:
        return cell(key, "{:,.0f}" if (row[key] or 0) >= 10 else "{:.2g}")

    def p_value(key: str) -> str:
        return "< 0.001" if (row.get(key) or 1) < 0.001 else cell(key, "{:.3f}")

    spread, further = row["ndcg@10_std"], {}
    for metric, title in FURTHER.items():
        further[title] = interval(metric)
        further[f"difference in {title}"] = interval(f"{metric}_difference")
        further[f"p, {title}"] = p_value(f"{metric}_p_value_holm")
    trained = row["num_trainable_parameters"] if row["num_trainable_parameters"] != row["num_parameters"] else None
    return {
        "NDCG@10": interval("ndcg@10"),
        "HR@10": cell("hr@10", "{:.4f}"),
        "warm": cell("ndcg@10_warm", "{:.4f}"),
        "cold": cell("ndcg@10_cold", "{:.4f}"),
        "difference in NDCG@10": interval("difference"),
        "by item": ends("difference_by_item"),
        "p": p_value("p_value_holm"),
        "detectable": cell("detectable_difference", "{:.4f}"),
        **further,
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
    num_rows, num_items = (next(iter(rows.values()))[name] for name in ("num_rows", "num_target_items"))
    text = f"{num_rows:,} test cases; 95% bootstrap intervals over them, of means over the seeds."
    if any("ndcg@10_warm" in row for row in rows.values()):
        text += " Warm and cold: NDCG@10 where training has seen the target, and where it has not."
    if len(rows) > 1:
        text += (
            f" Differences are from `{reference}`, paired by test case; p: two-sided sign-flip test with "
            f"{NUM_PERMUTATIONS:,} permutations, Holm-corrected for {len(rows) - 1} comparisons of a metric. "
            f"By item: interval of the difference if the {num_items:,} target items are resampled, not the test cases."
        )
    found = [row["detectable_difference"] for row in rows.values() if row.get("detectable_difference") is not None]
    if found:
        text += (
            " Detectable: the true difference in NDCG@10 that such a comparison, with as many test cases and the same "
            "standard error, finds at p < 0.05 (two-sided, not corrected) with a probability of 80%: "
            f"{min(found):.4f} to {max(found):.4f}."
        )
    if any("log_prob_calibrated" in row for row in rows.values()):
        text += " log P: mean log-probability of the target among the items, at the temperature that fits best."
    return text


run = command(main)


if __name__ == "__main__":
    run()
