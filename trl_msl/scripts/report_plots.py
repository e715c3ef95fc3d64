# SPDX-License-Identifier: Apache-2.0
"""The plots of [`report`]. A system has the same colour in all of them."""

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from .outputs import plot_training


plt.switch_backend("Agg")

# Okabe and Ito's colours, which colour-blind readers can tell apart, without yellow, which is too pale on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
}

Rows = dict[str, dict[str, Any]]
Styles = dict[str, dict[str, str]]


def write_plots(output_dir: Path, rows: Rows, reference: str, runs: Path) -> list[Path]:
    """Draw what there is data for, and return the files. `rows` are those of the report, from folders in `runs`."""
    histories = read_beside(rows, "log_history.json", runs)
    probes = read_beside(rows, "probe.json")
    # Systems that are drawn as lines choose their colours first
    styles = make_styles(sorted(rows, key=lambda name: (name not in probes, name not in histories)))
    plots: dict[str, tuple[Callable, Any]] = {
        "comparison.png": (plot_comparison, (rows, reference)),
        "cost.png": (plot_cost, ({name: row for name, row in rows.items() if row["train_seconds"]},)),
        "training.png": (plot_histories, (histories,)),
        "gradients.png": (plot_gradients, (measured_losses(probes),)),
        "target_probability.png": (plot_target_probability, (counted(probes, "target_probability"),)),
        "logits.png": (plot_logits, (counted(probes, "logits"),)),
        "temperature.png": (plot_temperature, (temperature_sweep(rows), rows[reference], reference)),
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    is_again, written = (output_dir / "report.json").is_file(), []
    for name, (plot, data) in plots.items():
        temporary = output_dir / f".{name}"
        if data[0]:
            with plt.rc_context(STYLE):
                plot(*data, styles, temporary)
        if temporary.is_file():
            written.append(temporary.replace(output_dir / name))
        elif is_again:  # remove an earlier report's plot
            (output_dir / name).unlink(missing_ok=True)
    return written


def make_styles(names: list[str]) -> Styles:
    """Colour, line and marker of each system; the latter two change when all colours have been used."""
    number, styles = len(COLOURS), {}
    for place, name in enumerate(names):
        turn = place // number % len(LINES)
        styles[name] = {"color": COLOURS[place % number], "linestyle": LINES[turn], "marker": MARKERS[turn]}
    return styles


def read_beside(rows: Rows, name: str, runs: Path | None = None) -> dict[str, Any]:
    """
    Content of the file `name` in each system's folder, of the first seed that has one; with `runs`, also in the parent
    folder, which holds the model of several ways of decoding. No file is used twice.
    """
    paths: dict[str, Path] = {}
    for in_parent in (False, True) if runs else (False,):
        for system, row in rows.items():
            folders = [Path(folder) for folder in row["folders"]]
            if in_parent:
                folders = [folder.parent for folder in folders if runs in folder.parent.parents]
            path = next((folder / name for folder in folders if (folder / name).is_file()), None)
            if path is not None and path not in paths.values():
                paths.setdefault(system, path)
    return {system: json.loads(paths[system].read_text(encoding="utf-8")) for system in rows if system in paths}


def measured_losses(probes: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """The measurements of each system that has any."""
    measured = {name: [entry for entry in probe["history"] if "lml1" in entry] for name, probe in probes.items()}
    return {name: entries for name, entries in measured.items() if entries}


def counted(probes: dict[str, Any], key: str) -> dict[str, dict[str, list[float]]]:
    """The histograms `key` of each system that has any, without edges on their own."""
    histograms = {name: probe.get(key, {}) for name, probe in probes.items()}
    return {
        name: found
        for name, found in histograms.items()
        if any(any(counts) for kind, counts in found.items() if kind != "edges")
    }


def temperature_sweep(rows: Rows) -> Rows:
    """`msl`, at τ = 1, and the systems `msl-tau*` by their temperature, if there are at least two."""
    sweep = {
        name: row
        for name, row in sorted(rows.items(), key=lambda entry: entry[1]["temperature"] or 0)
        if (name == "msl" or PurePosixPath(name).match("msl-tau*")) and row["temperature"] is not None
    }
    return sweep if len({row["temperature"] for row in sweep.values()}) > 1 else {}


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_comparison(rows: Rows, reference: str, styles: Styles, path: Path) -> None:
    """NDCG@10 with its interval, a line per system, seeds as small points; a band for the reference."""
    figure, axis = plt.subplots(figsize=(8, 1.1 + 0.36 * len(rows)), constrained_layout=True)
    for place, (name, row) in enumerate(rows.items()):
        low, value, high = (row[f"ndcg@10{end}"] for end in ("_low", "", "_high"))
        colour = styles[name]["color"]
        axis.plot([low, high], [place, place], color=colour, linewidth=2)
        axis.plot(value, place, color=colour, marker=styles[name]["marker"], markersize=7)
        if row["num_seeds"] > 1:
            seeds = row["ndcg@10_by_seed"]
            axis.plot(seeds, [place + 0.25] * len(seeds), ".", color=colour, markersize=4)
        axis.text(1.01, place, f"{value:.4f}", transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    base = rows[reference]
    axis.axvspan(base["ndcg@10_low"], base["ndcg@10_high"], color="0.92", zorder=0)
    axis.axvline(base["ndcg@10"], color="0.5", linestyle="--", linewidth=1, zorder=0)
    axis.set_yticks(range(len(rows)), [f"{name} (reference)" if name == reference else name for name in rows])
    axis.set(xlabel="NDCG@10, test, with 95% interval", ylim=(len(rows) - 0.4, -0.6))
    axis.grid(axis="x", alpha=0.3)
    save(figure, path)


def plot_cost(rows: Rows, styles: Styles, path: Path) -> None:
    """NDCG@10 against training time, a point per system that was trained."""
    figure, axis = plt.subplots(figsize=(8, 4.8), constrained_layout=True)
    points = [(row["train_seconds"], row["ndcg@10"]) for row in rows.values()]
    for name, point in zip(rows, points):
        style = {"color": styles[name]["color"], "marker": styles[name]["marker"]}
        axis.plot(*point, markersize=8, fillstyle="none", markeredgewidth=2, **style)  # points may coincide
    axis.set(xlabel="training, seconds", ylabel="NDCG@10, test", xscale="log")
    axis.margins(0.15)
    plain_ticks(axis.xaxis)
    axis.grid(alpha=0.3)
    label_points(axis, points, list(rows))
    save(figure, path)


def label_points(axis: Axes, points: list[tuple[float, float]], names: list[str]) -> None:
    """Write each name near its point without overlaps, with a line to a point that is far away."""
    axis.figure.canvas.draw()  # lays the axes out
    frame = axis.get_window_extent()
    taken = [Bbox.from_extents(*(centre - 7), *(centre + 7)) for centre in axis.transData.transform(points)]
    places = [(9, 0), (-9, 0), (0, 11), (0, -11)]
    places += [(side * 16, up * far) for far in (14, 28, 42, 56, 70) for up in (1, -1) for side in (1, -1)]
    for name, point in zip(names, points):
        for x, y in [*places, places[0]]:  # the first again, if all overlap
            text = axis.annotate(
                name, point, (x, y), textcoords="offset points", va="center", fontsize=9,
                ha="center" if x == 0 else "left" if x > 0 else "right",
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.7} if abs(x) > 9 else None,
            )  # fmt: skip
            text.set_in_layout(False)
            text.update_positions(axis.figure.canvas.get_renderer())
            box = Text.get_window_extent(text)  # without the line
            is_inside = frame.containsx(box.x0) and frame.containsx(box.x1)
            is_inside &= frame.containsy(box.y0) and frame.containsy(box.y1)
            if is_inside and not any(box.overlaps(other) for other in taken):
                break
            text.set_visible(False)
        text.set_visible(True)
        taken.append(box)


def plain_ticks(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis, more of them if it spans little."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e4 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def plot_histories(histories: dict[str, Any], styles: Styles, path: Path) -> None:
    keys = ("color", "linestyle")
    cycle = plt.cycler(**{key: [styles[name][key] for name in histories] for key in keys})
    with plt.rc_context({"axes.prop_cycle": cycle}):
        plot_training(histories, path)


def plot_gradients(measured: dict[str, list[dict[str, float]]], styles: Styles, path: Path) -> None:
    """LML¹ and LML² over steps, and the norms of their gradients, a line per system (Figures 3 and 4 of the paper)."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, constrained_layout=True)
    axes[1, 1].sharey(axes[0, 1])  # to compare the gradients
    for row, (key, label) in enumerate({"lml1": "LML¹ (valid tokens)", "lml2": "LML² (ranking)"}.items()):
        for axis, end, title in zip(axes[row], ("", "_grad_norm"), ("loss", "norm of its gradient")):
            for name, entries in measured.items():
                points = [(entry["step"], entry[key + end]) for entry in entries]
                axis.plot(*zip(*points), label=name, markersize=4, **styles[name])
            axis.set(xlabel="step" if row else None)
            axis.locator_params(axis="x", integer=True, min_n_ticks=1)
            axis.set_title(f"{label}, {title}", fontsize=10)
            axis.grid(alpha=0.3)
    if any(entry["lml1_grad_norm"] and entry["lml2_grad_norm"] for entries in measured.values() for entry in entries):
        axes[0, 1].set_yscale("log")
        for axis in axes[:, 1]:
            plain_ticks(axis.yaxis)
    legend_below(figure, axes[0, 0])
    save(figure, path)


def plot_target_probability(histograms: dict[str, Any], styles: Styles, path: Path) -> None:
    """Distribution of the target's probability among the valid tokens, a line per system (Figure 5 of the paper)."""
    figure, axis = plt.subplots(figsize=(6.5, 4.2), constrained_layout=True)
    for name, histogram in histograms.items():
        counts = np.asarray(histogram["counts"], dtype=float)
        line = {key: styles[name][key] for key in ("color", "linestyle")}
        axis.stairs(counts / counts.sum(), histogram["edges"], label=name, linewidth=1.6, **line)
    axis.set(xlabel="target's probability among the valid tokens, p; its weight is 1 − p", ylabel="share of positions")
    axis.grid(alpha=0.3)
    legend_below(figure, axis)
    save(figure, path)


def plot_logits(histograms: dict[str, Any], styles: Styles, path: Path) -> None:
    """Distributions of the logits of targets, other valid and invalid tokens, a panel per system (Figure 8)."""
    num_columns = min(3, len(histograms))
    num_rows = -(-len(histograms) // num_columns)
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=(max(5, 3.6 * num_columns), 0.5 + 2.8 * num_rows), sharex=True, squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    kinds = {"target": "target", "valid": "other valid tokens", "invalid": "invalid tokens"}
    ends: list[float] = []  # of the bins in use
    for axis, (name, logits) in zip(axes.flat, histograms.items()):
        widths = np.diff(logits["edges"])
        for colour, (kind, label) in zip((COLOURS[1], COLOURS[0], "0.5"), kinds.items()):
            counts = np.asarray(logits.get(kind, np.zeros(len(widths))), dtype=float)
            if counts.sum():
                density = counts / counts.sum() / widths
                axis.stairs(density, logits["edges"], color=colour, label=label, linewidth=1.6)
                axis.stairs(density, logits["edges"], color=colour, fill=True, alpha=0.2)
                seen = np.flatnonzero(counts)
                ends += [logits["edges"][seen[0]], logits["edges"][seen[-1] + 1]]
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(histograms) :]:
        axis.axis("off")
    for axis in axes.flat[max(0, len(histograms) - num_columns) : len(histograms)]:
        axis.set(xlabel="logit")
        axis.tick_params(labelbottom=True)  # also above an empty place
    for axis in axes[:, 0]:
        axis.set(ylabel="density")
    axes[0, 0].set_xlim(min(ends), max(ends))
    legend_below(figure, axes[0, 0])
    save(figure, path)


def plot_temperature(sweep: Rows, base: dict[str, Any], reference: str, styles: Styles, path: Path) -> None:
    """NDCG@10 by fixed temperature, on validation and test; the reference as a line (Figure 6 of the paper)."""
    figure, axis = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    tau, value, low, high = (
        np.array([row[key] for row in sweep.values()])
        for key in ("temperature", "ndcg@10", "ndcg@10_low", "ndcg@10_high")
    )
    spread = np.maximum(0, [value - low, high - value])
    axis.errorbar(tau, value, spread, color=COLOURS[0], marker="o", capsize=3, label="test, with 95% interval")
    points = [(row["temperature"], row["validation_ndcg@10"]) for row in sweep.values() if row["validation_ndcg@10"]]
    if points:
        axis.plot(*zip(*points), color=COLOURS[1], marker="s", linestyle="--", label="validation")
    if reference not in sweep:
        axis.axhline(base["ndcg@10"], color="0.4", linestyle=":", label=f"{reference}, test")
    axis.set(xlabel="temperature τ", ylabel="NDCG@10")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


def legend_below(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
