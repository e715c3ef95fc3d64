# SPDX-License-Identifier: Apache-2.0
"""Weights chosen on candidates, against a naive loop; and the command that fuses a model with neighbours."""

import dataclasses
import itertools
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import make_model
from launching import launch, run

from trl_msl import ItemCatalog, PromptTemplate, RankingTask, Recommender, SparseBias
from trl_msl.collaborative import Fusion, ItemNeighbours
from trl_msl.data import DataArguments, generate_catalog
from trl_msl.evaluation import Candidates, choose_weights, ranks_of_targets
from trl_msl.experiments.from_scratch import train_tokenizer
from trl_msl.scripts import evaluate, fuse, report, searches
from trl_msl.scripts.loading import load_data
from trl_msl.scripts.trained import write_options


# ---------------------------------------------------------------------- choosing


def make_candidates(seed: int, num_users: int = 30, num_items: int = 20, num_candidates: int = 9) -> Candidates:
    """Scores in quarters, so that many are equal, and users with fewer candidates than others."""
    rng = np.random.default_rng(seed)
    items = np.stack([rng.permutation(num_items)[:num_candidates] for _ in range(num_users)])
    items[rng.random(items.shape) < 0.2] = -1
    scores = np.where(items < 0, -np.inf, rng.integers(-8, 0, items.shape) / 4)
    return Candidates(items, scores, rng.integers(0, 4, (2, *items.shape)) / 4)


def naive_ndcg(candidates, targets, weights, k):
    """Each user's list sorted in full."""
    total = 0.0
    for user, target in enumerate(targets):
        ranked = []
        for place, item in enumerate(candidates.items[user]):
            if item >= 0:
                score = candidates.scores[user, place]
                for weight, part in zip(weights, candidates.parts):
                    score += weight * part[user, place]
                ranked.append((-score, item))
        ranked = [item for _, item in sorted(ranked)[:k]]
        total += 1 / math.log2(ranked.index(target) + 2) if target in ranked else 0.0
    return total / len(targets)


@pytest.mark.parametrize("seed", range(5))
def test_choosing_equals_a_naive_loop(seed):
    candidates = {0.0: make_candidates(seed), 0.5: make_candidates(seed + 100)}
    targets = np.random.default_rng(seed).integers(0, 20, 30)
    grids, k = [[0.25, 0.5], [-0.5, 1.0, 0.0]], 3
    points = list(itertools.product(candidates, [0.0, 0.25, 0.5], [-0.5, 0.0, 1.0]))
    ndcg = {(value, *weights): naive_ndcg(candidates[value], targets, weights, k) for value, *weights in points}
    chosen = choose_weights(candidates, targets, grids, k)
    assert chosen.ndcg == pytest.approx(max(ndcg.values()))
    best = [point for point in ndcg if ndcg[point] == pytest.approx(chosen.ndcg)]
    simplest = min(best, key=lambda point: (sum(map(bool, point)), sum(map(abs, point))))
    assert (chosen.vocab_weight, *chosen.weights) == simplest
    assert len(set(ndcg.values())) > 3  # else there was nothing to choose


def test_nothing_is_weighted_where_nothing_helps():
    candidates = make_candidates(0)
    chosen = choose_weights({0.0: candidates, 1.0: candidates}, np.full(30, 99), [[0.5], [2.0]])
    assert chosen == (0.0, (0.0, 0.0), 0.0)


def test_candidates_of_two_searches():
    one, other = make_candidates(1), make_candidates(2)
    # What both have found has one score and one value of each part
    values = np.random.default_rng(3).integers(-9, 9, (3, 20)) / 4
    one, other = (Candidates(c.items, values[0][c.items], values[1:, c.items]) for c in (one, other))
    joined = one.join(other)
    for user in range(30):
        found = [item for item in joined.items[user].tolist() if item >= 0]
        assert sorted(found) == sorted({*one.items[user].tolist(), *other.items[user].tolist()} - {-1})
    scores, *parts = np.tile(values[:, None], (1, 30, 1))
    every = Candidates(np.tile(np.arange(20), (30, 1)), scores, np.array(parts))
    every.items[[[item not in row for item in range(20)] for row in joined.items]] = -1
    targets = np.arange(30)
    assert joined.ranks(targets, (0.5, 2.0)).tolist() == every.ranks(targets, (0.5, 2.0)).tolist()


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def task():
    titles = generate_catalog()
    template = PromptTemplate.from_paper("book", "books", "read")
    tokenizer = train_tokenizer([*titles.values(), template.text], vocab_size=500)
    return RankingTask(ItemCatalog(list(titles), list(titles.values()), template='"{text}"'), tokenizer, template)


@pytest.fixture(scope="module")
def model(task, tmp_path_factory):
    """A model that has learned nothing, on the quickstart's generated data."""
    folder = tmp_path_factory.mktemp("fuse") / "model"
    Recommender(make_model(task.tokenizer), task).save_pretrained(folder)
    write_options(DataArguments(max_validation_users=40, max_test_users=12), folder)
    return folder


SYSTEMS = ["model", "vocab-weight", "with-popularity", "fused", "popularity", "neighbours"]
OPTIONS = ["--num_candidates", 20, "--vocab_weights", 0.2, "--decays", 0.5, 1.0, "--shrinkages", 0.0, 2.0]


@pytest.fixture(scope="module")
def fused(model):
    """The folder that the command writes."""
    run(fuse, "--model_name_or_path", model, "--output_dir", model.parent / "fused", *OPTIONS)
    return model.parent / "fused"


def read(folder):
    return json.loads((folder / "metrics.json").read_text())


def histories_of(split, catalog):
    windows = load_data(DataArguments(max_validation_users=40, max_test_users=12)).windows[split]
    return [catalog.indices(ids)[:-1] for ids in windows["item_ids"][:]], [ids[-1] for ids in windows["item_ids"][:]]


def test_the_folder_recommends_what_was_reported(fused, task):
    recommender = Recommender.from_pretrained(fused)
    histories, targets = histories_of("test", task.catalog)
    ids = [[task.catalog.ids[item] for item in history] for history in histories]
    found = recommender.recommend(ids, k=10, exclude_history=False)
    rankings = pd.read_parquet(fused / "rankings.parquet")
    assert [list(row) for row in rankings["recommended"]] == found.ids
    assert rankings["item_id"].tolist() == targets and all(found.exact)
    chosen = read(fused)["chosen"]
    assert chosen["neighbour_weight"] == recommender.fusion.neighbour_weight > 0
    assert chosen["decay"] == recommender.fusion.neighbours.decay
    alone = [list(row) for row in pd.read_parquet(fused / "model" / "rankings.parquet")["recommended"]]
    assert alone == recommender.recommend(ids, k=10, exclude_history=False, fused=False).ids != found.ids


def test_the_best_is_chosen_on_validation(fused):
    metrics = read(fused)
    assert list(metrics["validation"]) == SYSTEMS
    ndcg = {name: row["ndcg@10"] for name, row in metrics["validation"].items()}
    # Of a model that has learned nothing
    assert ndcg["fused"] > ndcg["with-popularity"] >= ndcg["vocab-weight"] >= ndcg["model"]
    assert ndcg["neighbours"] > ndcg["popularity"]
    for name in ndcg:
        place = fused if name == "fused" else fused / name
        assert read(place)["validation_ndcg@10"] == ndcg[name]
        assert read(place)["ndcg@10"] == metrics["test"][name]["ndcg@10"]


def test_the_report_compares_the_parts(fused, capsys):
    run(report, "--runs", fused, "--reference", "fused", "--output_dir", fused.parent / "report")
    systems = json.loads((fused.parent / "report" / "report.json").read_text())["systems"]
    assert systems.keys() == set(SYSTEMS)
    assert all(system["users_per_second"] > 0 for system in systems.values())


def test_two_processes_choose_the_same_without_the_test_windows(fused, model, tmp_path):
    """On a third of them, which must not change what is chosen."""
    options = ["--model_name_or_path", model, "--output_dir", tmp_path / "out", *OPTIONS, "--max_test_users", 4]
    output = launch("fuse.py", *options, num_processes=2)
    one, two = read(fused), read(tmp_path / "out")
    assert two["chosen"] == one["chosen"]
    assert two["validation"]["fused"]["ndcg@10"] == pytest.approx(one["validation"]["fused"]["ndcg@10"])
    rankings = [
        pd.read_parquet(folder / "rankings.parquet")["recommended"][:4] for folder in (fused, tmp_path / "out")
    ]
    assert [list(row) for row in rankings[0]] == [list(row) for row in rankings[1]]
    assert "Chosen on 40 validation users" in output and output.count("Test, 4 users") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_killed_run_resumes(fused, model, tmp_path, monkeypatch, task):
    recommend, made = searches.recommend, []

    def killed_at_the_fourth(*args, **kwargs):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(kwargs["vocab_weight"])
        return recommend(*args, **kwargs)

    options = ["--model_name_or_path", model, "--output_dir", tmp_path / "out", *OPTIONS]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(searches, "recommend", killed_at_the_fourth)
        run(fuse, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["out.parts"]
    with pytest.raises(ValueError, match="out.parts holds parts of a run that differs in popularity_weights"):
        run(fuse, *options, "--popularity_weights", 3)

    again = []
    monkeypatch.setattr(searches, "recommend", lambda *a, **k: again.append(k["vocab_weight"]) or recommend(*a, **k))
    run(fuse, *options)
    assert made == [0.0, 0.0, 0.2] and again[0] == 0.2
    before, after = read(fused), read(tmp_path / "out")
    assert before["chosen"] == after["chosen"] and before["differences"] == after["differences"]
    with pytest.raises(ValueError, match="`output_dir` = .* exists already"):
        run(fuse, *options)


def test_weights_that_do_not_help(model, tmp_path, capsys):
    options = ["--vocab_weights", 0, "--popularity_weights", 0, "--neighbour_weights", 0, "--max_validation_users", 9]
    run(fuse, "--model_name_or_path", model, "--output_dir", tmp_path / "out", *options, "--num_candidates", 10)
    output = capsys.readouterr().out
    assert "neighbour_weight is 0: no other weight was better on validation." in output
    metrics = read(tmp_path / "out")
    assert metrics["differences"]["fused - neighbours"]["ndcg@10"] < 0
    assert metrics["differences"]["fused - model"]["same_items"] == 1
    assert metrics["test"]["fused"] == metrics["test"]["model"]


def test_weights_of_an_earlier_run(fused, model, tmp_path, capsys):
    """Nothing is chosen: the same model gets the same items, of more training windows there are other neighbours."""
    options = ["--model_name_or_path", model, "--weights_from", fused]
    run(fuse, *options, "--output_dir", tmp_path / "same")
    output, before, after = capsys.readouterr().out, read(fused), read(tmp_path / "same")
    assert f"From {fused}: vocab_weight" in output and "Validation," not in output and "validation" not in after
    assert after["chosen"] == before["chosen"] and before["chosen"]["title_weight"] >= 0
    for name in ("ndcg@10", "coverage", "expansions_mean"):
        assert after["test"]["fused"][name] == before["test"]["fused"][name]
    run(fuse, *options, "--output_dir", tmp_path / "all", "--train_period", 0, 1)
    one, other = (Recommender.from_pretrained(folder).fusion for folder in (fused, tmp_path / "all"))
    assert other.neighbour_weight == one.neighbour_weight and other.popularity.sum() > one.popularity.sum()
    with pytest.raises(ValueError, match="`weights_from` = .* has no metrics.json with weights"):
        run(fuse, *options[:3], model, "--output_dir", tmp_path / "none")
    with pytest.raises(ValueError, match="`weights_from` and `scores` are both given"):
        run(fuse, *options, "--output_dir", tmp_path / "none", "--scores", fused)


def test_neighbours_by_title(model, tmp_path):
    """Who bought one volume buys the next, which nobody has bought yet: only its title tells."""
    folder, log = tmp_path / "model", tmp_path / "log.csv"
    shutil.copytree(model, folder)
    catalog = Recommender.from_pretrained(folder).task.catalog
    titles = [set(text.lower().split()) for text in catalog.texts]
    pairs = [(i, max((j for j in range(130, 150)), key=lambda j: len(titles[i] & titles[j]))) for i in range(60)]
    old = [(f"u{user}", item, user) for user in range(43) for item in (3 * user, 3 * user + 1, 3 * user + 2)]
    new = [(f"v{user}", item, 100 + user) for user, pair in enumerate(pairs[:11]) for item in pair]
    pd.DataFrame(old + new, columns=["user_id", "item_id", "timestamp"]).to_csv(log, index=False)
    write_options(DataArguments(interactions=str(log), min_interactions=1), folder)
    options = ["--model_name_or_path", folder, "--num_candidates", 10, "--vocab_weights", 0]
    options += ["--popularity_weights", 0, "--new_item_weights", 0]
    run(fuse, *options, "--output_dir", tmp_path / "out")
    run(fuse, *options, "--output_dir", tmp_path / "users", "--title_weights", 0, "--new_title_weights", 0)
    chosen = read(tmp_path / "out")["chosen"]
    assert chosen["title_weight"] + chosen["new_title_weight"] > 0
    found, without = (read(tmp_path / name)["test"]["neighbours"]["ndcg@10"] for name in ("out", "users"))
    assert found > without


def test_what_is_noted():
    args = fuse.FuseArguments(output_dir="out", popularity_weights=[-1.0, 2.0])
    tested = {name: fuse.Ranking(None, None, {"exact_rate": 0.75}) for name in ("beam-vocab", "fused")}
    chosen = {**dict.fromkeys(searches.WEIGHTS, 1.0), "vocab_weight": 0.0, "popularity_weight": -1.0}
    lines = fuse.describe(args, chosen, 9, tested)
    assert lines[1:] == [
        "vocab_weight is 0: no other weight was better on validation.",
        "popularity_weight is at the end of the values tried: try others beyond it by --popularity_weights.",
        "fused: 25.0% of the test searches ended early: raise --max_expansions.",
    ]


def test_the_vocabularys_probability_exactly_and_by_beams(model, tmp_path, capsys):
    options = ["--compare_vocab", "true", "--vocab_weights", 0, "--popularity_weights", 0, "--neighbour_weights", 0]
    options += ["--num_candidates", 10, "--max_validation_users", 9, "--output_dir", tmp_path / "out"]
    run(fuse, "--model_name_or_path", model, *options)
    output, tested = capsys.readouterr().out, read(tmp_path / "out")["test"]
    assert list(tested)[:4] == ["model", "beam-vocab", "vocab", "vocab-weight"]
    options = ["--decoding", "beam-vocab", "exact", "--vocab_weight", 1, "--output_dir", tmp_path / "evaluate"]
    run(evaluate, "--model_name_or_path", model, *options)
    evaluated = read(tmp_path / "evaluate")
    for name, other in (("beam-vocab", "beam-vocab"), ("vocab", "exact-1")):
        for key in ("ndcg@10", "coverage", "expansions_mean"):
            assert tested[name][key] == evaluated[other][key]
    assert tested["vocab"]["exact_rate"] == 1 and tested["beam-vocab"]["exact_rate"] == 0
    assert "users_per_second" in output and "fused - beam-vocab" in output


def test_new_items_are_brought_back(model, tmp_path):
    """The last users take only items that nobody had before: 20 of 150."""
    folder, log = tmp_path / "model", tmp_path / "log.csv"
    shutil.copytree(model, folder)
    old = [(f"u{user}", 3 * user + item, user) for user in range(43) for item in range(3)] + [("u0", 129, 0)]
    new = [(f"v{user}", item, 100 + user) for user in range(11) for item in (5, 130 + user)]
    pd.DataFrame(old + new, columns=["user_id", "item_id", "timestamp"]).to_csv(log, index=False)
    write_options(DataArguments(interactions=str(log), min_interactions=1), folder)
    options = ["--model_name_or_path", folder, "--output_dir", tmp_path / "out", "--num_candidates", 10]
    options += ["--vocab_weights", 0, "--popularity_weights", 0, "--neighbour_weights", 0, "--new_item_weights", 99]
    run(fuse, *options)
    metrics, fusion = read(tmp_path / "out"), Recommender.from_pretrained(tmp_path / "out").fusion
    assert metrics["chosen"]["new_item_weight"] == fusion.new_item_weight == 99
    assert fusion.is_new.nonzero().squeeze(1).tolist() == list(range(130, 150))
    for split in ("validation", "test"):
        assert metrics[split]["with-new-items"]["ndcg@10_cold"] > 0.1 > metrics[split]["model"]["ndcg@10_cold"]


def test_a_model_whose_training_data_are_gone(model, tmp_path):
    """Nobody can tell which targets are cold for it."""
    folder, log = tmp_path / "model", tmp_path / "log.csv"
    shutil.copytree(model, folder)
    write_options(DataArguments(data_dir=str(tmp_path / "gone")), folder)
    windows = load_data(DataArguments()).windows["test"].select(range(60)).to_pandas()
    rows = windows.assign(timestamp=range(60), item_id=windows["item_ids"].str[:3]).explode("item_id")
    rows[["user_id", "item_id", "timestamp"]].to_csv(log, index=False)
    options = ["--model_name_or_path", folder, "--output_dir", tmp_path / "out", "--interactions", log]
    run(fuse, *options, "--min_interactions", 1, "--vocab_weights", 0, "--num_candidates", 10)
    assert "ndcg@10" in read(tmp_path / "out") and "num_cold" not in read(tmp_path / "out")


def test_scores_of_another_model(model, tmp_path, task, capsys):
    """Of one that knows the target."""
    folder = tmp_path / "oracle"
    folder.mkdir()
    for split in ("validation", "test"):
        _, targets = histories_of(split, task.catalog)
        rows = {"item_ids": [[target, "0" if target != "0" else "1"] for target in targets]}
        table = pd.DataFrame({**rows, "scores": [[-3.0, -7.5]] * len(targets)})
        table.to_parquet(folder / f"scores_{split}.parquet")
    pd.DataFrame({"item_id": targets}).to_parquet(folder / "rankings.parquet")
    options = ["--model_name_or_path", model, "--output_dir", tmp_path / "out", "--scores", folder]
    options += ["--vocab_weights", 0, "--popularity_weights", 0, "--neighbour_weights", 500, "--num_candidates", 10]
    run(fuse, *options)
    metrics = read(tmp_path / "out")
    for split in ("validation", "test"):
        assert metrics[split]["scores"]["ndcg@10"] == metrics[split]["fused"]["ndcg@10"] == 1
    assert not list((tmp_path / "out").glob("*.safetensors"))
    pd.DataFrame({"item_id": targets[::-1]}).to_parquet(folder / "rankings.parquet")
    with pytest.raises(ValueError, match="scores_test.parquet has scores of other windows than the 12 of the test"):
        run(fuse, *options[:3], tmp_path / "again", *options[4:])
    table.to_parquet(folder / "scores_validation.parquet")
    with pytest.raises(ValueError, match="scores_validation.parquet has scores of other windows than the 40 of the"):
        run(fuse, *options[:3], tmp_path / "once more", *options[4:])


# ---------------------------------------------------------------------- its parts


def test_reranked_candidates_are_the_searched_items(task, tmp_path):
    """With all items as candidates, of any weights."""
    data = load_data(DataArguments(max_validation_users=12))
    split = searches.Split.from_data(data, "validation", task)
    rng = np.random.default_rng(0)
    windows = [rng.choice(150, 5, replace=False).tolist() for _ in range(60)]
    neighbours = ItemNeighbours.fit(windows, range(60), 150)
    fusion = Fusion(torch.from_numpy(rng.integers(0, 9, 150)), neighbours, 0.3, 0.5, 2.0)
    one = searches.Searches(make_model(task.tokenizer), task, tmp_path, max_expansions=5000, batch_size=4)
    candidates = one.candidates(split, fusion, 150)
    for weights in ((0.0, 0.0, 0.0), (0.5, 2.0, 0.0), (-1.0, 8.0, 3.0)):
        other = dataclasses.replace(fusion, **dict(zip(searches.WEIGHTS[1:], weights)))
        found = one.find(split, other, 75)
        found_ranks = ranks_of_targets(found.items, split.targets)
        assert found.exact.all() and (found_ranks >= 0).any()
        ranks = candidates.ranks(split.targets, weights)
        assert np.where(ranks < 75, ranks, -1).tolist() == found_ranks.tolist()
    assert np.isfinite(candidates.parts).all() and candidates.parts.any(axis=(1, 2)).all()


def test_withdrawn_items_are_not_found(task, tmp_path):
    task = task.update(withdraw=["3", "5"])
    split = searches.Split.from_data(load_data(DataArguments(max_validation_users=6)), "validation", task)
    neighbours = ItemNeighbours.fit([[3, 5, 7, 8], [5, 9]] * 3, range(6), 150)
    fusion = Fusion(torch.tensor([9 - item % 9 for item in range(150)]), neighbours, 0.0, 1.0, 4.0)
    one = searches.Searches(make_model(task.tokenizer), task, tmp_path, max_expansions=5000, batch_size=4)
    assert not np.isin(one.find(split, fusion, 148).items, [3, 5]).any()
    ranked = searches.rank_without_model(fusion, [[7], [9], []], one.available)
    # The neighbours of 7 but for 3 and 5, and none of 9; then the most popular ones
    assert ranked[:, :4].tolist() == [[8, 0, 9, 18], [0, 9, 18, 27], [0, 9, 18, 27]]


def test_values_of_items():
    items = np.array([[4, 2, -1], [7, 0, 2], [1, 2, 3]])
    sparse = SparseBias([torch.tensor([9, 2]), torch.tensor([7]), []], [torch.tensor([0.5, 0.25]), [2.0], []])
    assert searches.values_of(sparse, items, num_items=10).tolist() == [[0, 0.25, 0], [2, 0, 0], [0, 0, 0]]
