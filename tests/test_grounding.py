# SPDX-License-Identifier: Apache-2.0
"""Grounding against distances computed one by one, and as a way of decoding of `trl-msl evaluate`."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from helpers import TITLES, make_model, make_windows
from launching import run

from trl_msl import Recommender, build_rows, evaluate_recommendations
from trl_msl.decoding import Grounder, grounding
from trl_msl.scripts import evaluate


POPULARITY = torch.tensor([4, 0, 9, 1, 1, 2, 5, 0, 3, 1, 7, 2])


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture(scope="module")
def rows(task, catalog):
    return build_rows(make_windows(catalog.ids, num_rows=5), task)


@pytest.fixture(scope="module")
def grounder(model, task, rows):
    return Grounder(model, task, task.encode_prompts(rows["prompt"][:]), POPULARITY)


def last_state(model, tokenizer, text):
    return model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states[-1][0, -1]


@torch.no_grad()
@pytest.mark.parametrize("gamma", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("allowed", [None, [2, 4, 7, 9, 11]])
def test_is_brute_force(gamma, allowed, model, tokenizer, grounder):
    ranked = allowed or range(len(TITLES))
    found = grounder(len(ranked), gamma, allowed, batch_size=3)
    states = [last_state(model, tokenizer, text) for text in TITLES]
    for user, title in enumerate(grounder.titles):
        written = last_state(model, tokenizer, title)
        distance = {item: sum((states[item] - written) ** 2).item() ** 0.5 for item in ranked}
        least, largest = min(distance.values()), max(distance.values())
        score = {
            item: -(distance[item] - least) / (largest - least) / (1 + POPULARITY[item].item() / 9) ** gamma
            for item in ranked
        }
        order = sorted(ranked, key=lambda item: (-score[item], item))
        assert found.items[user].tolist() == order
        assert found.scores[user].tolist() == pytest.approx([score[item] for item in order], abs=1e-5)
    if gamma == 30 and allowed is None:
        assert (found.items[:, 1:3] == 2).any(axis=1).all()  # the most popular one, if it isn't the nearest


@torch.no_grad()
def test_titles_are_those_of_generate(model, tokenizer, task, grounder):
    for prompt, title in zip(grounder.prompts, grounding.write_titles(model, task, grounder.prompts, batch_size=2)):
        written = model.generate(
            torch.tensor([prompt]), num_beams=4, max_new_tokens=task.trie.depth, do_sample=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        text = tokenizer.decode(written[0, len(prompt) :]).split(tokenizer.eos_token)[0]
        assert title == text.strip().removeprefix('"').removesuffix('"').strip()


@pytest.mark.parametrize("kind", ["task", "chat_task"])
def test_written_items_come_first(kind, request, model, tokenizer, rows, monkeypatch):
    """Without quotes, end token or padding, also where a chat template surrounds them; those with the text follow."""
    task = request.getfixturevalue(kind)
    items = task.encode_items([f'"{TITLES[6]}"', ' "Ulysses"', f'"{TITLES[9]}"'])

    def generate(input_ids, **_):
        longest = max(map(len, items))
        written = torch.tensor([item + [tokenizer.pad_token_id] * (longest - len(item)) for item in items])
        return torch.cat([input_ids, written], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    grounder = Grounder(model, task, [[5, 6, 7]] * 3)
    found = grounder(2)
    assert grounder.titles == [TITLES[6], "Ulysses", TITLES[9]]
    assert found.items[0].tolist() == [5, 6] and found.scores[0].tolist() == [0, 0]  # share their text
    assert found.items[2, 0] == 9 and found.invalid_rate == pytest.approx(1 / 3)


def test_states_do_not_depend_on_the_batch(model, tokenizer):
    texts = [*TITLES, "", "The user has read: "]
    alone, together = (grounding.embed_texts(model, tokenizer, texts, batch_size) for batch_size in (1, 16))
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_share_the_work(rank, monkeypatch):
    def gather(share):
        shares = [[0, 20, 40], [10, 30]]
        assert share == [shares[rank]]
        return shares

    monkeypatch.setattr(grounding, "PartialState", lambda: SimpleNamespace(process_index=rank, num_processes=2))
    monkeypatch.setattr(grounding, "gather_object", gather)
    assert grounding._in_shares(lambda share: [10 * value for value in share], [0, 1, 2, 3, 4]) == [0, 10, 20, 30, 40]


def test_bad_arguments(model, task, grounder):
    with pytest.raises(ValueError, match="`top_k` is 13: it must lie between 1 and the number of items, 12"):
        grounder(13)
    with pytest.raises(ValueError, match="`popularity_gamma` is -1.0: it must lie between 0 and 100"):
        grounder(3, -1.0)
    with pytest.raises(ValueError, match="`popularity_gamma` is 1.0, but `popularity` is None"):
        Grounder(model, task, [[5]])(3, 1.0)
    with pytest.raises(ValueError, match=r"`popularity` has the shape \[3\]: pass a count for each of the 12 items"):
        Grounder(model, task, [[5]], POPULARITY[:3])


class TestCommand:
    @pytest.fixture
    def trained(self, tmp_path, model, task):
        Recommender(model, task).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    @pytest.fixture
    def data(self, tmp_path, catalog):
        for name, seed in (("train", 0), ("test", 1)):
            windows = make_windows(catalog.ids, 9, seed)["item_ids"]
            table = {"user_id": range(9), "item_ids": [json.dumps(ids) for ids in windows], "timestamp": range(9)}
            pd.DataFrame(table).to_csv(tmp_path / f"{name}.csv", index=False)
        return tmp_path

    def test_writes_a_row_for_each_exponent(self, trained, data, monkeypatch):
        written = []
        monkeypatch.setattr(
            grounding, "write_titles", lambda model, task, prompts, *_: written.append(1) or TITLES[: len(prompts)]
        )
        options = ["--model_name_or_path", trained, "--data_dir", data, "--output_dir", data / "out"]
        run(evaluate, *options, "--decoding", "exact", "grounding", "--popularity_gamma", 0, 2)
        assert len(written) == 1
        metrics = json.loads((data / "out" / "metrics.json").read_text())
        assert list(metrics)[:4] == ["exact", "grounding", "grounding-2", "differences"]
        for name in ("grounding", "grounding-2"):
            assert metrics[name]["invalid_rate"] == 0 and metrics[name]["num_warm"] == 9
            rankings = pd.read_parquet(data / "out" / name / "rankings.parquet")
            assert len(rankings) == 9
        assert "grounding - exact" in metrics["differences"]

    def test_bad_options(self, trained, data):
        for options, message in (
            (["--decoding", "grounding", "--popularity_gamma", -1], "`popularity_gamma` is -1.0: it must lie"),
            (["--popularity_gamma", 1], "`popularity_gamma` has an effect on grounding only"),
            (["--decoding", "grounding", "--length_penalty", 1], "the latter none on grounding"),
            (["--decoding", "grounding", "--top_k", 13], "the catalogue has 12 items: pass smaller cut-offs"),
        ):
            with pytest.raises(ValueError, match=message):
                run(evaluate, "--model_name_or_path", trained, "--data_dir", data, *options)
        (data / "train.csv").unlink()
        options = ["--decoding", "grounding", "--popularity_gamma", 1]
        with pytest.raises(ValueError, match="the data has no training windows"):
            run(evaluate, "--model_name_or_path", trained, "--data_dir", data, *options)


def test_withdrawn_items_and_equal_texts(model, task, rows):
    smaller = task.update(withdraw=["b2", "b5"])
    grounder = Grounder(model, smaller, smaller.ranking_prompts(rows[:]))
    metrics, found = evaluate_recommendations(
        model, smaller, rows, ks=(9,), match="text", return_recommendations=True, rank=grounder
    )
    assert not {2, 5} & set(found.items.ravel().tolist()) and metrics["hr@9"] > 0
