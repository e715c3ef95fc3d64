# SPDX-License-Identifier: Apache-2.0
"""Distillation: its loss against the formula written out, a student that learns its teacher, and the command."""

import importlib
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import make_model
from launching import run
from trl import ModelConfig

from trl_msl import ItemCatalog, PromptTemplate, RankingTask, Recommender
from trl_msl.data import DataArguments, generate_catalog
from trl_msl.decoding import embed_texts, recommend
from trl_msl.experiments.from_scratch import train_tokenizer
from trl_msl.scripts import distill, report, teacher
from trl_msl.scripts.baselines import BaselineArguments
from trl_msl.scripts.distillation_loss import distillation_loss, importance_weights
from trl_msl.scripts.searches import ScoredWindows, Split
from trl_msl.scripts.trained import load_trained, write_options


WEIGHTS = {"rank_weight": 0.3, "confidence_weight": 0.5, "consistency_weight": 0.1}


def naive_weights(log_probs, items, best):
    """Of one user, with `None` where there is no item."""
    ranks = {place for place, item in enumerate(items) if item is not None}
    by_rank = {place: math.exp(-(place + 1)) for place in ranks}
    by_confidence = {place: math.exp(log_probs[place]) for place in ranks}
    weights = {
        place: 0.3 * by_rank[place] / sum(by_rank.values())
        + 0.5 * by_confidence[place] / sum(by_confidence.values())
        + 0.1 * (items[place] in best)
        for place in ranks
    }
    return {place: weight / sum(weights.values()) for place, weight in weights.items()}


def test_the_loss_is_its_formula():
    torch.manual_seed(0)
    scores = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    items = torch.tensor([[3, 1, 7], [0, -1, 2], [-1, -1, -1], [8, 5, -1]])
    log_probs = torch.tensor([[-0.5, -1, -4], [-2, -2, -2], [-1, -2, -3], [-700, -701, -math.inf]]).double()
    losses = distillation_loss(scores, items, log_probs)
    expected, num_common = [], 0
    for row in range(4):
        best = sorted(range(9), key=lambda item: -scores[row, item].item())[:3]
        known = [None if item < 0 else item for item in items[row].tolist()]
        num_common += len({*best} & {*known})
        shifted = (log_probs[row] - log_probs[row].max()).tolist()  # the same shares, without underflow
        loss = scores.new_zeros(())
        for place, weight in naive_weights(shifted, known, best).items():
            loss = loss - weight * torch.log(scores[row, known[place]].exp() / scores[row].exp().sum())
        expected.append(loss)
    assert 0 < num_common < 7  # both values of the consistency
    torch.testing.assert_close(losses, torch.stack(expected))
    factors = torch.rand(4, dtype=torch.float64)
    gradients = [torch.autograd.grad(factors @ values, scores)[0] for values in (losses, torch.stack(expected))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_weight_alone(name):
    log_probs = torch.tensor([[0.6, 0.1, 0.1]]).log()
    alone = dict.fromkeys(WEIGHTS, 0.0) | {name: 2.0}
    expected = {
        "rank_weight": torch.softmax(-torch.arange(3.0), 0),
        "confidence_weight": torch.tensor([0.75, 0.125, 0.125]),
        "consistency_weight": torch.tensor([0, 0.5, 0.5]),
    }
    weights = importance_weights(log_probs, torch.tensor([[False, True, True]]), **alone)
    torch.testing.assert_close(weights[0], expected[name])


# ---------------------------------------------------------------------- the student


@pytest.fixture(scope="module")
def sasrec():
    for module in ("rectools", "pytorch_lightning"):
        pytest.importorskip(module, reason='needs pip install "trl_msl[baselines]"')
    return importlib.import_module("trl_msl.scripts.distilled_sasrec")


def test_a_student_learns_its_teacher(sasrec):
    """Windows of random items; the teacher ranks the ten that follow the last one on a circle."""
    from trl_msl.scripts.sequence_models import train_transformer

    rng = np.random.default_rng(0)
    windows = [rng.integers(40, size=5).tolist() for _ in range(400)] + [[0, 40, 3]]
    histories, unseen = [window[:-1] for window in windows], [rng.integers(40, size=4).tolist() for _ in range(50)]

    def best(history):
        return [(history[-1] + step) % 40 for step in range(1, 11)]

    items = np.array([best(history) for history in histories])
    items[:, 9] = 55  # an item that no window holds
    items[5, 3:] = -1
    log_probs = np.where(items < 0, -np.inf, -np.arange(10.0) / 4).astype(np.float32)
    settings = {"hidden_size": 32, "num_layers": 1, "learning_rate": 1e-2, "batch_size": 64, "max_epochs": 25}
    args, overlaps = BaselineArguments(model="sasrec-softmax", dropout=0.1, **settings), {}
    student = sasrec.student_options(histories, items, log_probs, 0.8, WEIGHTS, 0.2)
    features = sasrec.title_features(torch.randn(56, 16, generator=torch.Generator().manual_seed(0)))
    for name, options in (("plain", {}), ("student", {"features": features, **student})):
        torch.manual_seed(0)
        ratings = itertools.count()  # the last epoch is the best
        score, _ = train_transformer(args, windows, lambda score: next(ratings), **options)  # noqa: B023
        found = score(unseen, 10)[0]
        overlaps[name] = np.mean([len({*row.tolist()} & {*best(history)}) / 10 for row, history in zip(found, unseen)])
    assert overlaps["student"] > 0.7 and overlaps["plain"] < 0.4, overlaps


# ---------------------------------------------------------------------- the command


SMALL = ["--hidden_size", 16, "--num_layers", 1, "--max_epochs", 1, "--batch_size", 64, "--learning_rate", 1e-2]
SCORES = {"scores_validation.parquet", "scores_test.parquet"}
FILES = {"metrics.json", "rankings.parquet", "item_embeddings.safetensors", *SCORES}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that has learned nothing, on the quickstart's generated data."""
    titles, template = generate_catalog(), PromptTemplate.from_paper("book", "books", "read")
    tokenizer = train_tokenizer([*titles.values(), template.text], vocab_size=500)
    task = RankingTask(ItemCatalog(list(titles), list(titles.values()), template='"{text}"'), tokenizer, template)
    folder = tmp_path_factory.mktemp("distill") / "model"
    Recommender(make_model(task.tokenizer), task).save_pretrained(folder)
    write_options(DataArguments(max_validation_users=10, max_test_users=12), folder)
    return folder


def run_distill(model, *options):
    output_dir = model.parent / "distilled"
    run(distill, "--model_name_or_path", model, "--output_dir", output_dir, "--part_size", 8, *SMALL, *options)
    return output_dir


def test_the_command(sasrec, model, monkeypatch, capsys):
    searched = []

    def counted(model, task, prompts, *args, **kwargs):
        searched.append(len(prompts))
        return recommend(model, task, prompts, *args, **kwargs)

    monkeypatch.setattr(teacher, "recommend", counted)
    output_dir = run_distill(model, "--max_teacher_windows", 20)
    assert searched == [8, 8, 4, 8, 4]
    names = (".", "plain", "teacher")
    student, plain, _ = found = [json.loads((output_dir / name / "metrics.json").read_text()) for name in names]
    assert all(row["users_per_second"] > 0 and row["num_rows"] == 12 for row in found)
    assert student["teacher_windows"] == 20 and student["num_parameters"] > plain["num_parameters"]
    for folder in (output_dir, output_dir / "plain"):
        assert {path.name for path in folder.iterdir() if path.is_file()} == FILES
    trained = Recommender.from_pretrained(model)
    titles = [text.strip() for text in trained.task.catalog.texts]
    kept = teacher.load_file(output_dir / "teacher_rankings" / "titles.safetensors")["titles"]
    torch.testing.assert_close(kept, embed_texts(trained.model, trained.task.tokenizer, titles))
    # The same again, after a part is lost, and with more windows: only these are searched
    capsys.readouterr()
    next((output_dir / "teacher_rankings").glob("test-*-000000008.parquet")).unlink()
    searched.clear()
    run_distill(model, "--max_teacher_windows", 24, "--embedding_weight", 0)
    assert searched == [8, 4]
    run_distill(model, "--max_teacher_windows", 20, "--max_test_users", 9)  # of part 3 some, and other test histories
    assert searched == [8, 4, 8, 1]
    run_distill(model, "--max_teacher_windows", 24, "--embedding_weight", 0)
    assert searched == [8, 4, 8, 1]
    shown = capsys.readouterr().out.split("Test, 12 users")[1]
    assert all(name in shown for name in ("teacher", "plain", "student", "users_per_second"))
    # What other commands read
    data, task = load_trained(ModelConfig(str(model)), DataArguments())
    splits = [Split.from_data(data, name, task) for name in ("validation", "test")]
    scores = ScoredWindows(output_dir, splits, task.catalog).score(splits[1].histories)
    assert all(len(items) > 10 for items in scores.items)
    table = pd.read_parquet(output_dir / "teacher" / "rankings.parquet")
    best = recommend(trained.model, task, splits[1].prompts, 10).items
    assert table["recommended"].map(list).tolist() == [[task.catalog.ids[item] for item in row] for row in best]
    run(report, "--runs", output_dir, "--reference", "plain", "--output_dir", model.parent / "report")
    systems = json.loads((model.parent / "report" / "report.json").read_text())["systems"]
    assert set(systems) == {"distilled", "plain", "teacher"}
    with pytest.raises(ValueError, match="holds the results of a training"):
        (model / "log_history.json").touch()
        run(distill, "--model_name_or_path", model, "--output_dir", model)
    with pytest.raises(ValueError, match="teacher_rankings holds parts of a run that differs in max_expansions"):
        run_distill(model, "--max_expansions", 99)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"part_size": 0}, "`part_size` is 0: it must be at least 1"),
        ({"teacher_top_k": 9}, "`teacher_top_k` is 9: it must be at least 10"),
        ({"embedding_weight": -1.0}, "`embedding_weight` is -1.0: it must be a finite number, and at least 0"),
        (dict.fromkeys(WEIGHTS, 0.0), "are all 0: one must be above"),
        ({"patience": 0}, "`patience` is 0: it must be above 0"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ValueError, match=message):
        distill.DistillArguments(output_dir="out", **option)
