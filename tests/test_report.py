# SPDX-License-Identifier: Apache-2.0
"""The report of several systems: its statistics by hand, what counts as a system, and its files."""

import json
import math
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest

from trl_msl.scripts import report
from trl_msl.scripts.outputs import plot_training, write_json, write_results
from trl_msl.scripts.report import ReportArguments, find_systems, format_count, main
from trl_msl.scripts.report_plots import make_styles


ALWAYS = ["comparison.png", "report.json", "report.md"]
PROBE = {
    "history": [
        {"step": step, "lml1": 3.0, "lml2": 4.0, "lml1_grad_norm": 0.5, "lml2_grad_norm": 1 / (1 + step)}
        for step in (0, 10, 20)
    ],
    "target_probability": {"edges": [0, 0.5, 1], "counts": [3, 1]},
    "logits": {"edges": [-1, 0, 1, 2], "target": [0, 1, 3], "valid": [2, 2, 0], "invalid": [0, 0, 0]},
}


def test_counts_and_styles():
    assert [format_count(number) for number in (None, 12, 330_000, 1_280_000, 8e9)] == [
        "",
        "12",
        "330k",
        "1.28M",
        "8B",
    ]
    styles = make_styles([str(number) for number in range(28)])
    assert len({tuple(style.values()) for style in styles.values()}) == 28


@pytest.fixture
def add(tmp_path, catalog):
    """Writes a system as the recipes do; test cases are b0, b1, ..."""

    def add_system(name, ranks: list[int], targets=None, seen=None, items=None, columns=None, **metrics):
        items = np.full((len(ranks), 10), -1) if items is None else items
        targets = targets or [f"b{user}" for user in range(len(ranks))]
        write_results(tmp_path / name, metrics, catalog, targets, items, np.array(ranks), seen, columns)
        return tmp_path / name

    return add_system


def run(tmp_path, **arguments):
    main(ReportArguments(runs=str(tmp_path), **arguments))
    return json.loads((tmp_path / "report" / "report.json").read_text())["systems"]


def files(tmp_path):
    return sorted(path.name for path in (tmp_path / "report").iterdir())


def test_figures_by_hand(tmp_path, add, capsys):
    """Third place has an NDCG of 1 / log2(4); everything optional is missing from one system, none from the other."""
    add("msl-ats", [0, 2, -1, -1])
    costs = {"train_seconds": 1660.0, "test_seconds": 0.5, "num_parameters": 1_500_000, "coverage": 0.25}
    add("lml", [0, -1, -1, 12], **costs, **{"validation_ndcg@10": 0.5, "ndcg@10": 0.99})
    rows = run(tmp_path)
    assert list(rows) == ["msl-ats", "lml"]
    assert [(rows[name]["ndcg@10"], rows[name]["hr@10"]) for name in rows] == [(0.375, 0.5), (0.25, 0.25)]
    assert rows["lml"]["difference"] == -0.125
    assert rows["lml"]["difference_low"] <= -0.125 <= rows["lml"]["difference_high"] <= 0
    assert rows["lml"]["p_value"] == rows["lml"]["p_value_holm"] == 1  # a single user differs
    assert rows["lml"]["users_per_second"] == 8
    assert "difference" not in rows["msl-ats"] and rows["msl-ats"]["train_seconds"] is None
    text = (tmp_path / "report" / "report.md").read_text()
    assert text in capsys.readouterr().out
    header, _, ours, other = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[:4])
    assert dict(zip(header, ours))["training, s"] == dict(zip(header, ours))["p"] == ""
    cells = dict(zip(header, other))
    assert cells["NDCG@10"].startswith("0.2500 [0.0000, ") and cells["difference in NDCG@10"].startswith("−0.1250 [−")
    assert (cells["HR@10"], cells["p"], cells["seeds"]) == ("0.2500", "1.000", "1")
    assert (cells["training, s"], cells["users per second"], cells["parameters"]) == ("1,660", "8", "1.5M")
    assert (cells["coverage"], cells["validation NDCG@10"]) == ("25.0%", "0.5000")
    assert "\n4 test cases" in text and "Holm-corrected for 1 comparisons" in text


def test_targets_that_training_has_not_seen(tmp_path, add):
    """One system knows which those are: they are all systems' test cases."""
    add("msl-ats", [0, 2, -1, 0])
    add("lml", [0, -1, 0, -1], seen={"b0", "b1", "b7"})
    rows = run(tmp_path)
    assert [(row["ndcg@10_warm"], row["ndcg@10_cold"]) for row in rows.values()] == [(0.75, 0.5), (0.5, 0.5)]
    assert rows["lml"]["num_cold"] == 2
    assert "| warm   | cold   |" in (tmp_path / "report" / "report.md").read_text()
    add("msl-ats", [0, 2, -1, 0], seen={"b0"})
    with pytest.raises(ValueError, match="`runs` holds systems that were trained on different items"):
        run(tmp_path)
    for name in ("lml", "msl-ats"):
        add(name, [0, -1, 0, -1], seen={"b0", "b1", "b2", "b3"})
    assert "ndcg@10_warm" not in run(tmp_path)["lml"]


def test_log_probabilities_and_a_hundred_items(tmp_path, add):
    """Compared only where all systems have them, in all seeds."""
    rng, hundred = np.random.default_rng(0), np.zeros((60, 100), dtype=int)
    log_probs = rng.normal(-9, 3, size=60)
    better = log_probs + rng.normal(0.5, 0.5, size=60)
    add("msl", [50] * 60, items=hundred, columns={"log_prob_calibrated": log_probs}, seed=0)
    for seed in (1, 2):
        columns = {"log_prob_calibrated": better, "log_prob": better - 1}
        add(f"lml-seed{seed}", [*[50] * 59, -1], items=hundred, columns=columns, seed=seed)
    rows = run(tmp_path, reference="msl")
    assert rows["msl"]["ndcg@100"] == pytest.approx(1 / math.log2(52)) and rows["msl"]["ndcg@10"] == 0
    assert rows["lml"]["ndcg@100_difference"] == pytest.approx(-1 / math.log2(52) / 60)
    assert rows["lml"]["log_prob_calibrated_difference"] == pytest.approx((better - log_probs).mean())
    assert rows["lml"]["log_prob_calibrated_p_value_holm"] < 0.001 < rows["lml"]["ndcg@100_p_value"] == 1
    assert rows["lml"]["log_prob"] == pytest.approx(better.mean() - 1) and "log_prob_difference" not in rows["lml"]
    assert rows["lml"]["detectable_difference"] == 0  # no hit among ten items
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| difference in NDCG@100 " in text and "| p, log P |" in text and "probability of 80%: 0.0000 to" in text
    add("popular", [7] + [-1] * 59)
    rows = run(tmp_path, reference="msl")
    assert "ndcg@100" not in rows["popular"] and "ndcg@100_difference" not in rows["lml"]
    spread = 1 / math.log2(9) / 60  # of one user's difference, the standard error of the mean
    assert rows["popular"]["detectable_difference"] == pytest.approx(2.8016 * spread, rel=1e-4)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| NDCG@100 " in text and "difference in NDCG@100" not in text and " log P: mean" in text


def test_seeds_are_one_system(tmp_path, add):
    add("msl-ats", [0, 2, -1, -1], seed=0, train_seconds=10.0)
    add("msl-ats-seed1", [0, 0, -1, -1], seed=1, train_seconds=20.0)
    add("msl-ats-seed1/beam", [-1, -1, -1, -1], seed=1)
    row = run(tmp_path)["msl-ats"]
    assert list(find_systems(tmp_path)) == ["msl-ats", "msl-ats/beam"]
    assert (row["num_seeds"], row["seeds"], row["ndcg@10_by_seed"]) == (2, [0, 1], [0.375, 0.5])
    assert (row["ndcg@10"], row["train_seconds"]) == (0.4375, 15)
    assert row["ndcg@10_std"] == pytest.approx(0.125 / math.sqrt(2))
    assert row["ndcg@10_high"] <= 1  # of the users' means over the seeds: 1, 0.75, 0, 0
    assert "2 (sd 0.0884)" in (tmp_path / "report" / "report.md").read_text()
    add("msl-ats-seed2", [0, 0, -1, -1], seed=1)
    with pytest.raises(ValueError, match=r"'msl-ats' has a seed twice, \[0, 1, 1\]"):
        run(tmp_path)


def test_what_is_a_system(tmp_path, add):
    add("msl-ats", [0])
    add("deep/er/lml", [0])
    add("msl-ats/checkpoint-4", [0])
    (add("half", [0]) / "metrics.json").unlink()
    (add("other-half", [0]) / "rankings.parquet").unlink()
    assert list(run(tmp_path)) == ["deep/er/lml", "msl-ats"]
    assert list(run(tmp_path)) == ["deep/er/lml", "msl-ats"]  # the report itself is not a system
    assert list(find_systems(tmp_path / "msl-ats")) == ["msl-ats"]
    assert list(run(tmp_path, systems=["msl-ats", "deep/er/lml"])) == ["msl-ats", "deep/er/lml"]
    assert list(run(tmp_path, systems=["msl-ats"])) == ["msl-ats"]


def test_errors(tmp_path, add):
    with pytest.raises(ValueError, match="required: --runs"):
        report.run([])
    with pytest.raises(ValueError, match="no folder has both metrics.json and rankings.parquet"):
        run(tmp_path)
    add("lml", [0, 1])
    add("msl", [0, 1])
    with pytest.raises(ValueError, match=r"`reference` has 'msl-ats', .* pass some of \['lml', 'msl'\]"):
        run(tmp_path)
    with pytest.raises(ValueError, match=r"`systems` has 'sasrec', .* pass some of \['lml', 'msl'\]"):
        run(tmp_path, reference="lml", systems=["lml", "sasrec"])
    with pytest.raises(ValueError, match=r"`reference` is 'lml', which is not among `systems`, \['msl'\]"):
        run(tmp_path, reference="lml", systems=["msl"])
    for targets in (["b1", "b0"], ["b0"]):
        add("other", [0] * len(targets), targets)
        with pytest.raises(ValueError, match="other and .*lml ranked different test cases .* evaluate both on"):
            run(tmp_path, reference="lml")
    assert list(run(tmp_path, reference="lml", systems=["lml", "msl"])) == ["lml", "msl"]


def test_plots_that_there_is_data_for(tmp_path, add):
    history = [
        {"step": 1, "loss": 2.0, "temperature": 1.5},
        {"step": 1, "eval_ndcg@10": 0.1},
        {"step": 2, "loss": 1.0},
    ]
    names = ["msl-ats/exact", "msl-ats/beam", "lml", "msl-tau1", "msl-tau2-seed1"]
    for name, temperature in zip(names, ["adaptive", "adaptive", None, 1, 2.0]):
        folder = add(name, [0, 3, -1], arguments={"temperature": temperature} if temperature else {})
    write_json(tmp_path / "log_history.json", history)  # belongs to no system
    run(tmp_path, reference="lml", systems=["lml", "msl-tau1"])
    assert files(tmp_path) == ALWAYS
    run(tmp_path, reference="lml")
    assert files(tmp_path) == sorted([*ALWAYS, "temperature.png"])

    (tmp_path / "report" / "notes.txt").write_text("stays")
    write_json(tmp_path / "msl-ats" / "log_history.json", history)  # the model's, above both ways of decoding
    for name in ("lml", "msl-tau1"):
        write_json(tmp_path / name / "probe.json", PROBE)
    write_json(folder / "probe.json", {"history": [{"step": 0}]})
    for name in ("lml", "msl-ats/exact"):
        add(name, [0, 3, -1], train_seconds=10.0)  # the same point: their names must not lie upon each other
    run(tmp_path, reference="lml")
    figures = ["cost", "gradients", "logits", "target_probability", "temperature", "training"]
    assert files(tmp_path) == sorted([*ALWAYS, *(f"{name}.png" for name in figures), "notes.txt"])
    for path in (tmp_path / "report").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG"), path
    run(tmp_path, reference="msl-tau1", systems=["msl-tau1", "msl-ats/beam"])  # plots without data are gone
    expected = [*ALWAYS, "gradients.png", "logits.png", "notes.txt", "target_probability.png", "training.png"]
    assert files(tmp_path) == sorted(expected)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, which stay open."""
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    yield drawn
    monkeypatch.undo()
    plt.close("all")


def panels(figure) -> dict[str, list]:
    """The lines that can be seen in each panel: of several points, or with markers."""
    lines = {axis.get_ylabel() or axis.get_title(): axis.lines for axis in figure.axes}
    return {
        label: [list(line.get_ydata()) for line in drawn if len(line.get_ydata()) > (line.get_marker() == "None")]
        for label, drawn in lines.items()
    }


class TestTrainingPlot:
    def test_has_a_panel_for_what_was_logged(self, tmp_path, figures):
        history = [{"step": 10, "loss": 3.0, "temperature": 1.5}, {"step": 10, "train_loss": 3.0}]
        plot_training({"msl": history}, tmp_path / "training.png")
        evaluated = {"step": 10, "eval_ndcg@10": 0.2, "eval_ndcg@10_cold": 0.1}
        plot_training({"msl": [*history, evaluated]}, tmp_path / "training.png")
        assert panels(figures[0]) == {"training loss": [[3.0]], "temperature τ": [[1.5]]}
        added = {"validation NDCG@10": [[0.2]], "NDCG@10, cold targets": [[0.1]]}
        assert panels(figures[1]) == panels(figures[0]) | added
        (tmp_path / "training.png").unlink()
        plot_training({"msl": history[1:]}, tmp_path / "training.png")
        assert len(figures) == 2 and not list(tmp_path.iterdir())

    def test_losses_on_different_scales(self, tmp_path, figures):
        """And a system has one colour, also where another has no line."""
        lml = [{"step": step, "loss": 8.0 / step} for step in (1, 2)]
        msl = [{"step": step, "loss": 1.0 / step, "temperature": 1.5} for step in (1, 2)]
        plot_training({"lml": lml, "msl": msl}, tmp_path / "training.png")
        assert panels(figures[0])["training loss, first value = 1"] == [[1.0, 0.5], [1.0, 0.5]]
        colours = [[line.get_color() for line in axis.lines] for axis in figures[0].axes]
        assert colours[0] == colours[1] and len(set(colours[0])) == 2


def test_plots_of_one_measurement(tmp_path, add, figures):
    """With no gradient, which a logarithmic axis would not show, and without logits of invalid tokens."""
    entry = {"step": 0, "lml1": 3.0, "lml2": 4.0, "lml1_grad_norm": 0.0, "lml2_grad_norm": 0.0}
    folder = add("msl", [0, 2])
    write_json(folder / "log_history.json", [{"step": 1, "train_loss": 1.0}])
    empty = {"edges": [0, 1], "counts": [0], "target": [0]}
    for probe, written in (
        ({"history": [entry]}, ["gradients.png"]),
        ({"history": [{"step": 0}], "target_probability": empty, "logits": empty}, []),
    ):
        write_json(folder / "probe.json", probe)
        run(tmp_path, reference="msl")
        assert files(tmp_path) == sorted([*ALWAYS, *written])
    assert all(lines for figure in figures for lines in panels(figure).values())


def test_without_matplotlib(tmp_path, add, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.delitem(sys.modules, "trl_msl.scripts.report_plots")
    add("msl-ats", [0, 2])
    assert list(run(tmp_path)) == ["msl-ats"]
    assert files(tmp_path) == ["report.json", "report.md"]
    assert 'pip install "trl_msl[plots]"' in capsys.readouterr().out


def test_on_the_command_line(tmp_path, add, capsys):
    add("msl", [0, 2])
    add("popular", [-1, 2])
    arguments = ["--runs", tmp_path, "--reference", "msl", "--output_dir", tmp_path / "out"]
    report.run([str(argument) for argument in (*arguments, "--systems", "popular", "msl")])
    output = capsys.readouterr().out
    assert output.index("\n| popular") < output.index("\n| msl")
    for name in ALWAYS:
        assert f"{tmp_path}/out/{name}\n" in output and (tmp_path / "out" / name).is_file()
