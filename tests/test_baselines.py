# SPDX-License-Identifier: Apache-2.0
"""Traditional recommenders on a catalogue in which each item is followed by the next one."""

import importlib
import json
import math
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from launching import launch

from trl_msl import masked_softmax_loss
from trl_msl.data import DataArguments


NUM_ITEMS, COLD = 40, 40
SMALL = [
    "--hidden_size", "32", "--num_layers", "1", "--learning_rate", "1e-2", "--batch_size", "64", "--dropout", "0.1",
    "--max_epochs", "20", "--patience", "8", "--num_negatives", "10", "--sce_scale", "4", "--mask_probability", "0.4",
]  # fmt: skip
MODELS = ["popularity", "item-knn", "sasrec-bce", "sasrec-softmax", "sasrec-sampled", "sasrec-sce", "bert4rec"]


@pytest.fixture(scope="module")
def baselines():
    for module in ("rectools", "pytorch_lightning", "implicit"):
        pytest.importorskip(module, reason='needs pip install "trl_msl[baselines]"')
    return importlib.import_module("trl_msl.scripts.baselines")


@pytest.fixture(scope="module")
def circle(tmp_path_factory):
    """
    Windows that walk up a circle of items. The users of the test split are new; its first target is cold, and its
    second row's history.
    """
    path = tmp_path_factory.mktemp("data")
    titles = {str(item): f"Volume {item}" for item in range(NUM_ITEMS + 1)}
    (path / "id2name4Rec.json").write_text(json.dumps(titles))
    rng = np.random.default_rng(0)
    for name, rows in (("train.csv", 400), ("test.csv", 40)):
        starts, lengths = rng.integers(NUM_ITEMS, size=rows), rng.integers(3, 7, size=rows)
        windows = [[(start + t) % NUM_ITEMS for t in range(length)] for start, length in zip(starts, lengths)]
        if name == "test.csv":
            windows[0][-1] = COLD
            windows[1] = [COLD, COLD, 0]
        pd.DataFrame(
            {
                "user_id": [f"{name} {row}" for row in range(rows)],
                "item_ids": [str([int(item) for item in window]) for window in windows],
                "timestamp": range(rows),
            }
        ).to_csv(path / name, index=False)
    return path


def run(baselines, circle, output_dir, *arguments):
    """The command in this process: its metrics and rankings."""
    arguments = ["--data_dir", circle, "--output_dir", output_dir, *SMALL, *arguments]
    baselines.run([str(argument) for argument in arguments])
    return json.loads((output_dir / "metrics.json").read_text()), pd.read_parquet(output_dir / "rankings.parquet")


def test_scaled_cross_entropy_is_its_formula(baselines):
    torch.manual_seed(0)
    scores = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 4, dtype=torch.float64)
    loss = baselines.scaled_cross_entropy(scores[..., 0], scores[..., 1:], 7.5)
    expected = torch.empty(3, 4, dtype=torch.float64)
    for i in range(3):
        for j in range(4):
            target, *sampled = scores[i, j].exp()
            expected[i, j] = -torch.log(target / (target + 7.5 * sum(sampled)))
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad((weights * values).sum(), scores)[0] for values in (loss, expected)]
    torch.testing.assert_close(*gradients)
    trained = masked_softmax_loss(  # what MSLTrainer scales
        scores.flatten(0, 1),
        torch.ones(12, 6, dtype=torch.bool),
        torch.zeros(12, dtype=torch.long),
        negative_scale=torch.full((12,), 7.5),
    )
    torch.testing.assert_close(trained.view(3, 4), expected)


def test_scaled_cross_entropy_over_all_other_items_is_the_softmax_loss(baselines):
    torch.manual_seed(0)
    scores = torch.randn(5, 9)
    loss = baselines.scaled_cross_entropy(scores[:, 0], scores[:, 1:], 1.0)
    expected = torch.nn.functional.cross_entropy(scores, torch.zeros(5, dtype=torch.long), reduction="none")
    torch.testing.assert_close(loss, expected)


def test_scaled_cross_entropy_of_extreme_scores(baselines):
    positive = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    negatives = torch.tensor([[0.0, 0.0], [1e4, 0.0], [0.0, 0.0]])
    loss = baselines.scaled_cross_entropy(positive, negatives, 100.0)
    torch.testing.assert_close(loss.detach(), torch.tensor([0.0, 2e4 + math.log(100), math.log(201)]))
    loss.sum().backward()
    torch.testing.assert_close(positive.grad, torch.tensor([0.0, -1.0, 1 / 201 - 1]))


@pytest.mark.parametrize("name", MODELS)
def test_models_learn_what_follows(name, baselines, circle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics, rankings = run(baselines, circle, tmp_path / "out", "--model", name)
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "metrics.json", "rankings.parquet"}
    assert metrics["num_rows"] == len(rankings) == 40
    assert (metrics["num_cold"], rankings["rank"][0]) == (1, -1)
    assert all(len(items) == 10 and str(COLD) not in items for items in rankings["recommended"])
    if name == "popularity":
        assert metrics["ndcg@10"] < 0.3
        assert len({tuple(items) for items in rankings["recommended"]}) == 1
        return
    assert metrics["ndcg@10"] > (0.3 if name == "item-knn" else 0.8)
    assert metrics["ndcg@10"] == pytest.approx(metrics["validation_ndcg@10"], abs=0.1)
    assert metrics["ndcg@10_low"] <= metrics["ndcg@10"] <= metrics["ndcg@10_high"]
    assert metrics["arguments"]["model"] == name and metrics["arguments"]["data_dir"] == str(circle)
    assert (metrics["num_parameters"] > NUM_ITEMS * 32) == (metrics["epochs"] > 0) == (name != "item-knn")
    popular = run(baselines, circle, tmp_path / "popular", "--model", "popularity")[1]["recommended"]
    assert rankings["recommended"][1].tolist() == popular[1].tolist() != rankings["recommended"][2].tolist()


def test_the_seed_decides(baselines, circle, tmp_path):
    common = ["--model", "sasrec-sampled", "--max_epochs", 2]
    runs = [run(baselines, circle, tmp_path / str(i), *common, "--seed", seed) for i, seed in enumerate((0, 0, 1))]
    same, other = ([str(rankings) for _, rankings in pair] for pair in (runs[:2], runs[1:]))
    assert same[0] == same[1] and other[0] != other[1]


def test_the_best_epoch_is_kept_and_patience_ends_training(baselines):
    args = baselines.BaselineArguments(hidden_size=8, num_layers=1, num_heads=1, patience=2)
    ratings, states = iter([0.1, 0.4, 0.2, 0.3]), []

    def validate(model):
        states.append({name: weight.clone() for name, weight in model.torch_model.state_dict().items()})
        return next(ratings)

    dataset = baselines.make_dataset([[0, 1, 2], [2, 1]], range(2))
    model, chosen = baselines.train_transformer(args, dataset, 3, validate)
    assert len(states) == 4 and (chosen["epochs"], chosen["validation_ndcg@10"]) == (2, 0.4)
    for name, weight in model.torch_model.state_dict().items():
        assert torch.equal(weight, states[1][name])
    assert any(not torch.equal(states[1][name], states[3][name]) for name in states[1])


def test_datasets(baselines):
    sequences, users = [[3, 5, 5], [5, 3, 4]], ["a", "a"]
    assert len(baselines.make_dataset(sequences, users).interactions.df) == 6
    counted = baselines.make_dataset(sequences, users, once=True)
    assert sorted(counted.get_raw_interactions()["item_id"]) == [3, 4, 5]
    known = baselines.make_dataset([[9, 4], [9], [5, 3, 8]], range(3), counted.item_id_map)
    assert known.get_raw_interactions()[["user_id", "item_id"]].values.tolist() == [[0, 4], [2, 5], [2, 3]]


def test_histories_without_a_known_item_get_popular_ones(baselines):
    counted = baselines.make_dataset([[1, 2, 3], [2, 3]], ["a", "b"], once=True)
    model = baselines.ImplicitItemKNNWrapperModel(baselines.ItemKNN(21, num_threads=1)).fit(counted)
    assert not model.model.similarity.diagonal().any()
    items = baselines.rank_items(model, [[9], [1, 9]], counted.item_id_map, [2, 3, 1])
    assert items[:, 3:].max() == -1 and items[0, :3].tolist() == [2, 3, 1] and sorted(items[1, :3]) == [1, 2, 3]
    assert (baselines.rank_items(model, [[9]], counted.item_id_map, [2])[0] == [2] + [-1] * 9).all()


def test_launched_with_a_config(baselines, circle, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data_dir": str(circle), "model": "sasrec-sce", "hidden_size": 16}))
    output = launch(
        "baselines.py", "--config", config, "--output_dir", tmp_path / "out", *SMALL[2:], "--max_epochs", 1
    )
    assert "Test, 40 users, 41 items, 1 cold targets, which" in output and f"{tmp_path}/out/metrics.json" in output
    assert "epoch 1: loss" in output
    assert "GPU available" not in output and "Warning" not in output
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["arguments"]["hidden_size"] == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 10, "num_heads": 4}, "`hidden_size` is 10: it must be a multiple of `num_heads`, 4"),
        ({"patience": 0}, "`patience` is 0: it must be above 0"),
        ({"sce_scale": -1.0}, "`sce_scale` is -1.0"),
        ({"dropout": 1.0}, "`dropout` is 1.0: it must be at least 0 and below 1"),
    ],
)
def test_bad_options(options, message, baselines):
    with pytest.raises(ValueError, match=message):
        baselines.BaselineArguments(**options)


def test_what_cannot_be_trained(baselines, circle, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="invalid choice: 'sasrec'"):
        run(baselines, circle, tmp_path, "--model", "sasrec")
    diverging = baselines.BaselineArguments(hidden_size=8, num_heads=1, learning_rate=1e30)
    with pytest.raises(ValueError, match="lower `learning_rate`, which is 1e\\+30"):
        baselines.train_transformer(diverging, baselines.make_dataset([[0, 1, 2]] * 9, range(9)), 3, lambda model: 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="`num_processes` is 2, but baselines train in one process"):
        baselines.main(baselines.BaselineArguments(), DataArguments())


def test_without_rectools_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("rectools", "implicit")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "trl_msl.scripts.baselines", raising=False)
    monkeypatch.setitem(sys.modules, "rectools", None)
    monkeypatch.setitem(sys.modules, "implicit", None)
    with pytest.raises(ImportError, match=r'pip install "trl_msl\[baselines\]"'):
        importlib.import_module("trl_msl.scripts.baselines")
