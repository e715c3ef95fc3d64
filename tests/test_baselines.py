# SPDX-License-Identifier: Apache-2.0
"""Traditional recommenders on a catalogue in which each item is followed by the next one."""

import importlib
import json
import math
import shutil
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from launching import launch

from trl_msl import ItemCatalog, masked_softmax_loss
from trl_msl.collaborative import ItemNeighbours, title_neighbours
from trl_msl.data import DataArguments, read_item_vectors
from trl_msl.scripts import baselines


NUM_ITEMS, COLD = 40, 40
FILES = {"metrics.json", "rankings.parquet", "scores_validation.parquet", "scores_test.parquet"}
SMALL = [
    "--hidden_size", "32", "--num_layers", "1", "--learning_rate", "1e-2", "--batch_size", "64", "--dropout", "0.1",
    "--max_epochs", "20", "--patience", "8", "--num_negatives", "10", "--sce_scale", "4", "--mask_probability", "0.4",
    "--dros_alpha", "0.1",
]  # fmt: skip
MODELS = ["sasrec-bce", "sasrec-softmax", "sasrec-sampled", "sasrec-sce", "sasrec-dros", "bert4rec"]


@pytest.fixture(scope="module")
def sequence_models():
    for module in ("rectools", "pytorch_lightning"):
        pytest.importorskip(module, reason='needs pip install "trl_msl[baselines]"')
    return importlib.import_module("trl_msl.scripts.sequence_models")


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


def run(circle, output_dir, *arguments):
    """The command in this process: its metrics and rankings."""
    arguments = ["--data_dir", circle, "--output_dir", output_dir, *SMALL, *arguments]
    baselines.run([str(argument) for argument in arguments])
    return json.loads((output_dir / "metrics.json").read_text()), pd.read_parquet(output_dir / "rankings.parquet")


def test_scaled_cross_entropy_is_its_formula(sequence_models):
    torch.manual_seed(0)
    scores = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 4, dtype=torch.float64)
    loss = sequence_models.scaled_cross_entropy(scores[..., 0], scores[..., 1:], 7.5)
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


def test_scaled_cross_entropy_over_all_other_items_is_the_softmax_loss(sequence_models):
    torch.manual_seed(0)
    scores = torch.randn(5, 9)
    loss = sequence_models.scaled_cross_entropy(scores[:, 0], scores[:, 1:], 1.0)
    expected = torch.nn.functional.cross_entropy(scores, torch.zeros(5, dtype=torch.long), reduction="none")
    torch.testing.assert_close(loss, expected)


def test_scaled_cross_entropy_of_extreme_scores(sequence_models):
    positive = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    negatives = torch.tensor([[0.0, 0.0], [1e4, 0.0], [0.0, 0.0]])
    loss = sequence_models.scaled_cross_entropy(positive, negatives, 100.0)
    torch.testing.assert_close(loss.detach(), torch.tensor([0.0, 2e4 + math.log(100), math.log(201)]))
    loss.sum().backward()
    torch.testing.assert_close(positive.grad, torch.tensor([0.0, -1.0, 1 / 201 - 1]))


def test_robust_loss_is_the_formula_of_dros(sequence_models):
    torch.manual_seed(0)
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    counts, targets, beta = [7, 0, 2, 1, 4], [4, 0, 1], 0.4
    propensity = [((count + 1) / 19) ** 0.05 for count in counts]
    found = sequence_models.item_propensity(np.array(counts))
    assert found.tolist() == pytest.approx(propensity)
    expected = []
    for row, target in zip(scores, targets):
        terms = [torch.exp(propensity[j] * (row[j] - int(j == target)) ** 2 / beta) for j in range(5)]
        expected.append(torch.log(sum(terms)))
    loss = sequence_models.robust_loss(
        scores, torch.tensor(targets), torch.tensor(propensity, dtype=torch.float64), beta
    )
    torch.testing.assert_close(loss, torch.stack(expected))
    gradients = [torch.autograd.grad(values.sum(), scores)[0] for values in (loss, torch.stack(expected))]
    torch.testing.assert_close(*gradients)


def test_dros_is_trained_by_all_targets_and_items(sequence_models):
    options = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "max_epochs": 1, "num_negatives": 2}
    args = baselines.BaselineArguments(model="sasrec-dros", **options, dros_alpha=0.7, dros_beta=0.3)
    score, _ = sequence_models.train_transformer(args, [[5, 1, 2], [2, 1]], lambda score: 0.0)
    (model, items, *_) = score.args
    module, batch = model.lightning_model.eval(), next(iter(model.data_preparator.get_dataloader_train()))
    shares = {5: 2 / 8, 1: 3 / 8, 2: 3 / 8}
    expected = [shares[item] ** 0.05 for item in items.external_ids]
    assert module.propensity.tolist() == pytest.approx(expected)
    logits, targets = model.torch_model(batch=batch), batch["y"]
    drawn = torch.cat([targets.unsqueeze(-1), batch["negatives"]], dim=-1)
    bce = module._calc_bce_loss(logits.gather(-1, drawn), targets, batch["yw"])
    losses = []
    for row, place in (targets != 0).nonzero().tolist():
        errors = [(logits[row, place, item] - float(item == targets[row, place])) ** 2 for item in (1, 2, 3)]
        losses.append(torch.log(sum(torch.exp(p * error / 0.3) for p, error in zip(expected, errors))))
    assert len(losses) == 3
    loss = module._calc_custom_loss(batch, 0)
    torch.testing.assert_close(loss, bce + 0.7 * torch.stack(losses).mean())


def check_scores(folder, rankings):
    """The scores, falling, of each window's items, of which the first are the recommended ones."""
    assert len(pd.read_parquet(folder / "scores_validation.parquet")) == 40
    scores = pd.read_parquet(folder / "scores_test.parquet")
    assert len(scores) == 40 and len(scores["item_ids"][1]) == 0  # nothing is known of its history
    for row in range(2, 40):
        items, values = scores["item_ids"][row].tolist(), scores["scores"][row]
        assert len(items) == len(set(items)) == len(values) > 5 and (np.diff(values) <= 0).all()
        assert rankings["recommended"][row][: len(items)].tolist() == items[:10]


@pytest.mark.parametrize("name", MODELS)
def test_models_learn_what_follows(name, sequence_models, circle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics, rankings = run(circle, tmp_path / "out", "--model", name)
    assert {path.name for path in tmp_path.rglob("*")} == {"out", *FILES, "item_embeddings.safetensors"}
    assert metrics["num_rows"] == len(rankings) == 40
    assert (metrics["num_cold"], rankings["rank"][0]) == (1, -1)
    assert all(len(items) == 10 and str(COLD) not in items for items in rankings["recommended"])
    assert metrics["ndcg@10"] > 0.8
    assert metrics["ndcg@10"] == pytest.approx(metrics["validation_ndcg@10"], abs=0.1)
    assert metrics["arguments"]["model"] == name and metrics["arguments"]["data_dir"] == str(circle)
    assert metrics["num_parameters"] > NUM_ITEMS * 32 and metrics["epochs"] > 0
    check_scores(tmp_path / "out", rankings)
    catalog = ItemCatalog([str(item) for item in range(NUM_ITEMS + 1)], ["a title"] * (NUM_ITEMS + 1))
    vectors = read_item_vectors(tmp_path / "out" / "item_embeddings.safetensors", catalog)
    assert vectors.shape == (NUM_ITEMS + 1, 32)
    torch.testing.assert_close(vectors[COLD], vectors[:COLD].mean(dim=0))
    popular = run(circle, tmp_path / "popular", "--model", "popularity")[1]["recommended"]
    assert rankings["recommended"][1].tolist() == popular[1].tolist() != rankings["recommended"][2].tolist()


def test_popularity_counts_users(circle, tmp_path):
    metrics, rankings = run(circle, tmp_path, "--model", "popularity")
    windows = pd.read_csv(circle / "train.csv").head(360)  # of as many users
    counts = Counter(item for ids in windows["item_ids"] for item in set(json.loads(ids)))
    expected = sorted(range(NUM_ITEMS), key=lambda item: -counts[item])
    scores = pd.read_parquet(tmp_path / "scores_test.parquet")
    assert [int(item) for item in scores["item_ids"][1]] == expected
    assert scores["scores"][39].tolist() == [counts[item] for item in expected]
    assert {tuple(map(int, items)) for items in rankings["recommended"]} == {tuple(expected[:10])}
    assert metrics["ndcg@10"] < 0.3 and metrics["num_cold"] == 1


@pytest.mark.parametrize("model", ["title-knn", "hybrid-knn"])
def test_knn_by_titles(model, circle, tmp_path):
    """They also rank items that no training window has."""
    folder = tmp_path / "series"
    shutil.copytree(circle, folder)
    titles = {str(item): f"Series {item // 4}, volume {item % 4}" for item in range(NUM_ITEMS + 1)}
    titles[str(COLD)] = "Series 9: the end"  # 9 is the series of items 36 to 39
    (folder / "id2name4Rec.json").write_text(json.dumps(titles))
    settings = ("--neighbours", 12, "--decay", 0.9, "--title_weight", 0.3, "--new_title_weight", 1.5)
    metrics, rankings = run(folder, tmp_path / "out", "--model", model, *settings)
    windows = {name: pd.read_csv(folder / name)["item_ids"].map(json.loads) for name in ("train.csv", "test.csv")}
    histories = [window[:-1] for window in windows["test.csv"]]
    expected = dense_scores(title_neighbours(list(titles.values()), 12, 0.9), histories)
    if model == "hybrid-knn":
        by_users = ItemNeighbours.fit(windows["train.csv"][:360], range(360), NUM_ITEMS + 1, 12, decay=0.9)
        expected[:, :COLD] *= 0.3
        expected[:, COLD] *= 0.3 + 1.5
        expected += dense_scores(by_users, histories)
    scores = pd.read_parquet(tmp_path / "out" / "scores_test.parquet")
    for row, values in enumerate(expected):
        found = dict(zip(map(int, scores["item_ids"][row]), scores["scores"][row]))
        assert found == pytest.approx({item: values[item] for item in np.flatnonzero(values)})
    assert metrics["num_cold"] == 1 and any(str(COLD) in items for items in scores["item_ids"])
    with pytest.raises(ValueError, match="`title_weight` is -1.0: it must be a finite number, and at least 0"):
        run(folder, tmp_path, "--model", model, "--title_weight", -1)


def dense_scores(neighbours, histories):
    scores = np.zeros((len(histories), NUM_ITEMS + 1))
    found = neighbours.score(histories)
    for row, (items, values) in enumerate(zip(found.items, found.values)):
        scores[row, items] = values
    return scores


def test_item_knn(circle, tmp_path):
    """Its options are those of `ItemNeighbours`, and its scores are the ones there."""
    settings = {"neighbours": 7, "shrinkage": 1.5, "decay": 0.6}
    options = [part for name, value in settings.items() for part in (f"--{name}", value)]
    metrics, rankings = run(circle, tmp_path / "out", "--model", "item-knn", *options)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    check_scores(tmp_path / "out", rankings)
    windows = {name: pd.read_csv(circle / name)["item_ids"].map(json.loads) for name in ("train.csv", "test.csv")}
    neighbours = ItemNeighbours.fit(windows["train.csv"][:360], range(360), NUM_ITEMS + 1, 7, 1.5, 0.6)
    scores = pd.read_parquet(tmp_path / "out" / "scores_test.parquet")
    for row, values in enumerate(dense_scores(neighbours, [window[:-1] for window in windows["test.csv"]])):
        found = dict(zip(map(int, scores["item_ids"][row]), scores["scores"][row]))
        assert found == pytest.approx({item: values[item] for item in np.flatnonzero(values)})
    assert 0.3 < metrics["ndcg@10"] == pytest.approx(metrics["validation_ndcg@10"], abs=0.1)
    assert metrics["ndcg@10_warm"] == pytest.approx(metrics["ndcg@10"] * 40 / 39) and metrics["num_parameters"] == 0
    popular = run(circle, tmp_path / "popular", "--model", "popularity")[1]["recommended"]
    assert rankings["recommended"][1].tolist() == popular[1].tolist() != rankings["recommended"][2].tolist()
    with pytest.raises(ValueError, match="`decay` is 2.0: it must be above 0 and at most 1"):
        run(circle, tmp_path, "--model", "item-knn", "--decay", 2)


def test_the_seed_decides(sequence_models, circle, tmp_path):
    common = ["--model", "sasrec-sampled", "--max_epochs", 2]
    runs = [run(circle, tmp_path / str(i), *common, "--seed", seed) for i, seed in enumerate((0, 0, 1))]
    same, other = ([str(rankings) for _, rankings in pair] for pair in (runs[:2], runs[1:]))
    assert same[0] == same[1] and other[0] != other[1]


def test_the_best_epoch_is_kept_and_patience_ends_training(sequence_models):
    args = baselines.BaselineArguments(hidden_size=8, num_layers=1, num_heads=1, patience=2)
    ratings, states = iter([0.1, 0.4, 0.2, 0.3]), []

    def validate(score):
        (model, *_) = score.args
        states.append({name: weight.clone() for name, weight in model.torch_model.state_dict().items()})
        return next(ratings)

    score, chosen = sequence_models.train_transformer(args, [[0, 1, 2], [2, 1]], validate)
    (model, *_) = score.args
    assert len(states) == 4 and (chosen["epochs"], chosen["validation_ndcg@10"]) == (2, 0.4)
    for name, weight in model.torch_model.state_dict().items():
        assert torch.equal(weight, states[1][name])
    assert any(not torch.equal(states[1][name], states[3][name]) for name in states[1])
    known, embeddings = sequence_models.item_embeddings(model)
    rows = [model.data_preparator.item_id_map.to_internal[item] for item in known]
    assert sorted(known) == [0, 1, 2] and torch.equal(
        embeddings, model.torch_model.item_model.get_all_embeddings()[rows]
    )


def test_datasets(sequence_models):
    train = sequence_models.make_dataset([[3, 5, 5], [5, 3, 4]])
    assert len(train.interactions.df) == 6
    known = sequence_models.make_dataset([[9, 4], [9], [5, 3, 8]], train.item_id_map)
    assert known.get_raw_interactions()[["user_id", "item_id"]].values.tolist() == [[0, 4], [2, 5], [2, 3]]


def test_too_few_items_are_filled_up_with_popular_ones():
    ranked = [np.array(row, dtype=int) for row in ([], [1], [*range(20, 40)])]
    assert baselines.fill(ranked, np.array([2, 1, 3])).tolist() == [
        [2, 1, 3, *[-1] * 7], [1, 2, 3, *[-1] * 7], [*range(20, 30)],
    ]  # fmt: skip
    assert baselines.fill([np.arange(9)], np.arange(50))[0].tolist() == [*range(10)]


def test_launched_with_a_config(sequence_models, circle, tmp_path):
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
        ({"dros_beta": 0.0}, "`dros_beta` is 0.0: it must be above 0"),
        ({"dropout": 1.0}, "`dropout` is 1.0: it must be at least 0 and below 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        baselines.BaselineArguments(**options)


def test_what_cannot_be_trained(circle, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="invalid choice: 'sasrec'"):
        run(circle, tmp_path, "--model", "sasrec")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="`num_processes` is 2, but baselines train in one process"):
        baselines.main(baselines.BaselineArguments(), DataArguments())


def test_a_training_that_diverges(sequence_models):
    diverging = baselines.BaselineArguments(hidden_size=8, num_heads=1, learning_rate=1e30)
    with pytest.raises(ValueError, match="lower `learning_rate`, which is 1e\\+30"):
        sequence_models.train_transformer(diverging, [[0, 1, 2]] * 9, lambda score: 0.0)


def test_without_rectools_the_extra_is_named(circle, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "rectools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "trl_msl.scripts.sequence_models", raising=False)
    monkeypatch.setitem(sys.modules, "rectools", None)
    with pytest.raises(ImportError, match=r'pip install "trl_msl\[baselines\]"'):
        run(circle, tmp_path, "--model", "bert4rec")
