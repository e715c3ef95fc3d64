# SPDX-License-Identifier: Apache-2.0
"""The commands that use a trained model: recommend, update-catalog, merge."""

import json
import os
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT
from helpers import make_model, make_windows
from hub_server import serve
from launching import launch, run
from peft import LoraConfig, get_peft_model
from test_bad_input import edit

from trl_msl import ItemCatalog, RankingTask, Recommender
from trl_msl.collaborative import FUSION_FILE, Fusion, ItemNeighbours, load_fusion
from trl_msl.data import DataArguments
from trl_msl.scripts import merge, recommend, update_catalog
from trl_msl.scripts.trained import write_options


@pytest.fixture
def model(tmp_path, tokenizer, task):
    """A recommender's folder."""
    Recommender(make_model(tokenizer), task).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def users(tmp_path, catalog):
    windows = make_windows(catalog.ids, 11)["item_ids"][:]
    pd.DataFrame({"user_id": range(11), "item_ids": windows}).to_parquet(tmp_path / "users.parquet")
    return tmp_path / "users.parquet"


@pytest.fixture
def fusion(model):
    """A fusion in the recommender's folder."""
    fusion = Fusion(torch.arange(12), ItemNeighbours.fit([[0, 4, 8], [3, 8]], ["a", "b"], 12), 0.0, 0.3, 2.0)
    fusion.save_pretrained(model)
    return fusion


def test_recommend_to_the_users_of_a_file(tmp_path, model, users):
    """On two processes; the parts of a killed run are used. User ids are strings, however they were stored."""
    arguments = ["--model_name_or_path", model, "--part_size", 4, "--top_k", 3, "--users", users, "--output"]
    launch("trl_msl.scripts.recommend", *arguments, tmp_path / "found.parquet", num_processes=2)
    found = pd.read_parquet(tmp_path / "found.parquet")
    expected = Recommender.from_pretrained(model).recommend(pd.read_parquet(users)["item_ids"].tolist(), k=3)
    assert [list(ids) for ids in found["recommended_ids"]] == expected.ids
    assert found["user_id"].tolist() == [str(user) for user in range(11)] and found["exact"].all()
    assert not (tmp_path / "found.parquet.parts").exists()

    # As left by a killed run: the second of three parts, marked here; and the parts of another run
    marked, parts = found.iloc[4:8].assign(user_id="marked"), tmp_path / "again.parquet.parts"
    parts.mkdir()
    (parts / "job.json").write_text("{}")
    with pytest.raises(ValueError, match="holds parts of a run that differs in users, user_column"):
        run(recommend, *arguments, tmp_path / "again.parquet")
    (parts / "job.json").unlink()
    marked.to_parquet(parts / "000000000004.parquet")
    run(recommend, *arguments, tmp_path / "again.parquet")
    again = pd.read_parquet(tmp_path / "again.parquet")
    assert again["user_id"].tolist() == [*"0123", *["marked"] * 4, "8", "9", "10"]
    assert again["recommended_ids"].map(list).tolist() == expected.ids


def test_parts_that_cannot_be_resumed(tmp_path, model, users, task, caplog, monkeypatch):
    """A part that was cut off or is of other users is made again; changed weights are an error."""
    arguments = ["--model_name_or_path", model, "--part_size", 4, "--top_k", 3, "--users", users, "--output"]
    run(recommend, *arguments, tmp_path / "whole.parquet")
    whole, parts = pd.read_parquet(tmp_path / "whole.parquet"), tmp_path / "found.parquet.parts"
    unpatched = Recommender.recommend

    def killed_in_the_third_part(self, histories, *args, **kwargs):
        if len(histories) == 3:
            raise KeyboardInterrupt
        return unpatched(self, histories, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Recommender, "recommend", killed_in_the_third_part)
        run(recommend, *arguments, tmp_path / "found.parquet")
    first, second = sorted(parts.glob("*.parquet"))
    first.write_bytes(first.read_bytes()[:-50])
    pd.read_parquet(second).iloc[::-1].to_parquet(second)

    Recommender(make_model(task.tokenizer, seed=1), task).save_pretrained(model)
    with pytest.raises(ValueError, match="holds parts of a run that differs in weights_sha256: remove the folder"):
        run(recommend, *arguments, tmp_path / "found.parquet")
    Recommender(make_model(task.tokenizer), task.update(withdraw=["b3"])).save_pretrained(model)
    with pytest.raises(ValueError, match="holds parts of a run that differs in task_sha256: remove the folder"):
        run(recommend, *arguments, tmp_path / "found.parquet")

    Recommender(make_model(task.tokenizer), task).save_pretrained(model)
    run(recommend, *arguments, tmp_path / "found.parquet")
    assert "000000000000.parquet cannot be read and is made again" in caplog.text
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "found.parquet"), whole)


def test_recommend_by_a_fusion(tmp_path, model, fusion):
    """On two processes, to users without history, too; a changed fusion is an error."""
    histories = [["b0", "b4"], [], ["b3"], ["b8", "b4"], [], ["b1"], ["b2", "b5"]]
    pd.DataFrame({"item_ids": list(map(json.dumps, histories))}).to_csv(tmp_path / "users.csv", index=False)
    arguments = ["--model_name_or_path", model, "--users", tmp_path / "users.csv", "--top_k", 3, "--output"]
    with pytest.raises(ValueError, match="2 of 7 users have an empty history .* by popular_without_history=True"):
        run(recommend, *arguments, tmp_path / "found.parquet")
    arguments[:0] = ["--popular_without_history", "true"]
    launch("trl_msl.scripts.recommend", *arguments, tmp_path / "found.parquet", num_processes=2)
    found = pd.read_parquet(tmp_path / "found.parquet")
    loaded = Recommender.from_pretrained(model)
    expected = loaded.recommend(histories, k=3, popular_without_history=True)
    assert found["recommended_ids"].map(list).tolist() == expected.ids
    assert found["recommended_ids"][1].tolist() == ["b11", "b10", "b9"]
    assert expected.ids != loaded.recommend(histories, k=3, popular_without_history=True, fused=False).ids

    (tmp_path / "found.parquet.parts").mkdir()
    (tmp_path / "found.parquet.parts" / "job.json").write_text("{}")
    with pytest.raises(ValueError, match="fusion_sha256"):
        run(recommend, *arguments, tmp_path / "found.parquet")
    (model / FUSION_FILE).unlink()
    with pytest.raises(ValueError, match="`popular_without_history` is True, but the model has no fusion"):
        run(recommend, *arguments, tmp_path / "again.parquet")


def test_users_of_whom_nothing_is_known(tmp_path, model, fusion):
    """They have no item of the catalogue, or are not in the log."""
    arguments = ["--model_name_or_path", model, "--output", tmp_path / "found.jsonl", "--top_k", 2]
    arguments += ["--popular_without_history", "true", "--users", tmp_path / "users.csv"]
    pd.DataFrame({"user_id": ["u1", "u2"], "item_ids": ["b99", "b98 b11"]}).to_csv(tmp_path / "users.csv", index=False)
    with pytest.raises(ValueError, match="different ids that are not in the catalogue"):
        run(recommend, *arguments)
    run(recommend, *arguments, "--unknown_items", "drop")
    found = pd.read_json(tmp_path / "found.jsonl", lines=True)
    assert found["recommended_ids"][0] == ["b11", "b10"] and "b11" not in found["recommended_ids"][1]

    log = pd.DataFrame({"user_id": ["u2", "u2"], "item_id": ["b0", "b11"], "timestamp": [1, 2]})
    log.to_csv(tmp_path / "log.csv", index=False)
    pd.DataFrame({"user_id": ["u1", "u2"]}).to_csv(tmp_path / "users.csv", index=False)
    run(recommend, *arguments, "--interactions", tmp_path / "log.csv")
    found = pd.read_json(tmp_path / "found.jsonl", lines=True)
    assert found["item_ids"].tolist() == [[], ["b0", "b11"]]
    assert found["recommended_ids"][0] == ["b11", "b10"] and "b11" not in found["recommended_ids"][1]


def test_users_with_unknown_items(tmp_path, model, caplog):
    """All users are checked before the first is served."""
    # "Dune" is a title, but not an id
    strange = pd.DataFrame({"item_ids": ['["b0", "b4"]', '["b0", "no such item", "Dune"]', '["nor this"]', "[]"]})
    strange.to_csv(tmp_path / "users.csv", index=False)
    arguments = ["--model_name_or_path", model, "--users", tmp_path / "users.csv", "--part_size", 1]
    arguments += ["--output", tmp_path / "found.parquet"]
    with pytest.raises(ValueError, match=r"1 of 4 users have an empty history .the first rows: \[3\]"):
        run(recommend, *arguments)
    strange.iloc[:3].to_csv(tmp_path / "users.csv", index=False)
    with pytest.raises(ValueError, match="of 2 of 3 users hold 3 different ids .* such as .'Dune', 'no such"):
        run(recommend, *arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "users.csv"}
    strange.to_csv(tmp_path / "users.csv", index=False)
    with caplog.at_level("INFO", "trl_msl"):
        run(recommend, *arguments, "--unknown_items", "drop")
    assert "2 users, 12 items (3 unknown items were dropped, and 2 users without any other)" in caplog.text
    assert len(pd.read_parquet(tmp_path / "found.parquet")) == 2

    strange.iloc[2:].to_csv(tmp_path / "users.csv", index=False)
    with pytest.raises(ValueError, match=r"='drop' leaves none of the 2 users: .* such as \['nor this'\]"):
        run(recommend, *arguments, "--unknown_items", "drop")


def test_histories_as_tools_write_them(tmp_path, model, catalog):
    """Lists as pandas writes them, JSON, and ids alone; titles only in lists, so that none is torn apart."""
    path, arguments = tmp_path / "users.csv", ["--model_name_or_path", model, "--top_k", 3]
    arguments += ["--users", path, "--output", tmp_path / "found.jsonl"]
    expected = Recommender.from_pretrained(model).recommend([["b0", "b10"]] * 5, k=3)
    titles = [catalog.texts[0], catalog.texts[10]]
    for cells in (["['b0', 'b10']", '["b0", "b10"]', "b0,b10", "b0, b10", "b0 b10"], [titles, json.dumps(titles)]):
        pd.DataFrame({"item_ids": cells}).to_csv(path, index=False)
        run(recommend, *arguments)
        found = pd.read_json(tmp_path / "found.jsonl", lines=True)
        assert found["recommended_ids"].tolist() == expected.ids[: len(cells)]
    # "Emma" and "Dune" are titles: "Emma, Dune" could be another
    for cell in ("Emma, Dune", "Dune"):
        pd.DataFrame({"item_ids": [cell]}).to_csv(path, index=False)
        with pytest.raises(ValueError, match="different ids that are not .*'Dune'.* holds ids; write titles as a"):
            run(recommend, *arguments)


def test_users_of_a_log(tmp_path, model):
    """All of them, or those of a file; what they have had, in the order of time."""
    log = [("u2", "b1", 30), ("u10", "b4", 5), ("u2", "b0", 10), ("u10", "b3", 6), ("u2", "b8", 20)]
    pd.DataFrame(log, columns=["reader", "book", "time"]).to_csv(tmp_path / "log.csv", index=False)
    arguments = ["--model_name_or_path", model, "--top_k", 3, "--interactions", tmp_path / "log.csv", "--user_column"]
    arguments += ["reader", "--item_column", "book", "--timestamp_column", "time", "--output", tmp_path / "found.csv"]
    run(recommend, *arguments)
    found = pd.read_csv(tmp_path / "found.csv")
    histories = {"u10": ["b4", "b3"], "u2": ["b0", "b8", "b1"]}
    assert found["reader"].tolist() == list(histories)
    assert found["item_ids"].map(json.loads).tolist() == list(histories.values())
    expected = Recommender.from_pretrained(model).recommend(list(histories.values()), k=3)
    assert found["recommended_ids"].map(json.loads).tolist() == expected.ids

    pd.DataFrame({"reader": ["u2"], "segment": ["new"]}).to_csv(tmp_path / "users.csv", index=False)
    arguments += ["--users", tmp_path / "users.csv"]
    run(recommend, *arguments)
    found = pd.read_csv(tmp_path / "found.csv")
    assert found[["reader", "segment"]].values.tolist() == [["u2", "new"]]
    assert json.loads(found["recommended_ids"][0]) == expected.ids[1]
    pd.DataFrame({"reader": ["u2", "u3"]}).to_csv(tmp_path / "users.csv", index=False)
    with pytest.raises(ValueError, match="1 user.s. of 2 without interactions .* such as .'u3'"):
        run(recommend, *arguments)
    pd.DataFrame({"reader": ["u2"], "item_ids": ["b0"]}).to_csv(tmp_path / "users.csv", index=False)
    with pytest.raises(ValueError, match="a column 'item_ids', but histories come from `interactions`"):
        run(recommend, *arguments)


@pytest.mark.parametrize("name", ["found.csv", "found.jsonl", "found.parquet"])
def test_the_output_is_in_the_format_of_its_name(name, tmp_path, model, users):
    table = pd.read_parquet(users).assign(user_id=range(7, 18), name='Ann, "B"', age=30, tags=[["x", 1]] * 11)
    table["tags"] = table["tags"].map(lambda tags: [tags[0]])
    table["sessions"] = [[["b0"], ["b1", "b2"]]] * 11
    table.to_parquet(users)
    run(recommend, "--model_name_or_path", model, "--top_k", 3, "--users", users, "--output", tmp_path / name)
    lists = ["item_ids", "tags", "sessions", "recommended_ids", "recommended_texts", "scores"]
    if name.endswith(".csv"):
        found = pd.read_csv(tmp_path / name, dtype={"user_id": str})
        found[lists] = found[lists].map(json.loads)
    elif name.endswith(".jsonl"):
        found = pd.DataFrame([json.loads(line) for line in (tmp_path / name).read_text().splitlines()])
    else:
        found = pd.read_parquet(tmp_path / name)
    expected = Recommender.from_pretrained(model).recommend(table["item_ids"].tolist(), k=3)
    assert list(found.columns) == [*table.columns, "recommended_ids", "recommended_texts", "scores", "exact"]
    assert found["user_id"].tolist() == [str(user) for user in range(7, 18)]
    assert found["name"].tolist() == ['Ann, "B"'] * 11 and found["age"].tolist() == [30] * 11
    assert found["tags"].map(list).tolist() == [["x"]] * 11
    assert [list(map(list, sessions)) for sessions in found["sessions"]] == [[["b0"], ["b1", "b2"]]] * 11
    assert found["recommended_ids"].map(list).tolist() == expected.ids
    assert found["recommended_texts"].map(list).tolist() == expected.texts
    assert found["scores"][0][0] == pytest.approx(expected.scores[0][0], abs=1e-6)
    assert found["exact"].all()


def test_options_that_cannot_be_followed(tmp_path, model, users):
    """Found before any work."""
    arguments = ["--model_name_or_path", model, "--users", users, "--output", tmp_path / "found.parquet"]
    for wrong, message in (
        (["--output", "found.xlsx"], "`output` is 'found.xlsx': its name must end in .csv, .jsonl, .parquet"),
        (["--output", "found"], "`output` is 'found': its name must end in"),
        (["--top_k", 0], "`top_k` is 0: it must be at least 1"),
        (["--top_k", 13], "`top_k` is 13: it must lie between 1 and the number of items, 12"),
        (["--batch_size", 0], "`batch_size` is 0: it must be at least 1"),
        (["--max_expansions", 0], "`max_expansions` is 0: it must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            run(recommend, *arguments, *wrong)
    with pytest.raises(ValueError, match="`users` and `interactions` are both missing"):
        run(recommend, *arguments[:2])
    assert {path.name for path in tmp_path.iterdir()} == {"model", "users.parquet"}


def test_what_is_missing_is_reported_once(tmp_path, model, users, caplog):
    arguments = ["--model_name_or_path", model, "--users", users, "--output", tmp_path / "found.parquet"]
    for top_k, expected in ((12, "fewer than `top_k` items: no oth"), (2, "reached `max_expansions` before their")):
        caplog.clear()
        run(recommend, *arguments, "--part_size", 2, "--top_k", top_k, "--max_expansions", 1)
        messages = [record.message for record in caplog.records if "users" in record.message]
        assert len(messages) == 1, messages
        assert re.match(rf"\d+ of 11 users .*{expected}", messages[0])


CARD = """---
library_name: transformers
license: mit
model-index:
- name: trained
  results:
  - task:
      type: recommendation
    dataset:
      type: interactions
      name: interactions
    metrics:
    - type: ndcg@10
      value: 0.5
---

# Model Card for trained

This is the recommender of our shop.

## Quick start

```python
recommender = Recommender.from_pretrained('outputs/trained')
```

## Data

Trained with 12 items.

## Evaluation

On 6 test rows:

| ndcg@10 | 0.5 |
"""


def test_update_the_catalogue_of_a_trained_model(tmp_path, model, fusion, capsys):
    recommender = Recommender.from_pretrained(model)
    (model / "checkpoint-1").mkdir()
    write_options(DataArguments(), model)
    stale = ("metrics.json", "rankings.parquet", "recommendations.txt", "log_history.json", "training.png")
    for name in stale:
        (model / name).write_text("of the catalogue before")
    (model / "README.md").write_text(CARD)
    (tmp_path / "new.json").write_text(json.dumps({"n0": "The Silent Wood", "n1": "#42"}))
    arguments = ["--model_name_or_path", model, "--output_dir", tmp_path / "updated"]
    arguments += ["--add", tmp_path / "new.json", "--withdraw", "b7", "b3"]
    run(update_catalog, *arguments)
    output = capsys.readouterr().out
    summary = "14 items: 12 that the model was trained with, 2 added since, 2 withdrawn."
    assert summary in output
    assert "1 share no token with an item of the training, such as ['n1']" in output
    assert pd.read_csv(tmp_path / "updated" / "new_items.csv")["shared_tokens"].tolist()[1] == 0
    names = {path.name for path in (tmp_path / "updated").iterdir()}
    assert not names & {*stale, "checkpoint-1"} and {"model.safetensors", "data.json"} <= names
    new = ItemCatalog(["n0", "n1"], ["The Silent Wood", "#42"])
    expected = recommender.update(add=new, withdraw=["b3", "b7"]).recommend([["b3", "n0"]], k=14)
    found = Recommender.from_pretrained(tmp_path / "updated").recommend([["b3", "n0"]], k=14)
    assert found.ids == expected.ids and found.scores[0] == pytest.approx(expected.scores[0], abs=1e-5)
    assert load_fusion(tmp_path / "updated", 14).fingerprint() == fusion.extend(14).fingerprint()
    with pytest.raises(ValueError, match="exists already: name another"):
        run(update_catalog, *arguments)

    run(update_catalog, *arguments[:1], tmp_path / "updated", "--restore", "b7", "--output_dir", tmp_path / "again")
    for name, count in (("updated", "2 withdrawn."), ("again", "1 withdrawn.")):
        card = (tmp_path / name / "README.md").read_text()
        assert f"from_pretrained('{tmp_path / name}')" in card and "outputs/trained" not in card
        assert card.count("It holds 14 items") == 1 and count in card and "Trained with 12 items." in card
        assert card.count("## Evaluation\n\n*Measured before the catalogue was changed.*\n") == 1
        assert "model-index" not in card and "license: mit" in card


def test_items_are_added_as_those_of_the_training_were(tmp_path, tokenizer, template):
    """HTML entities are decoded if they were; else they are kept."""
    for policy, text in (("decode", "Pride & Prejudice"), ("keep", "Pride &amp; Prejudice")):
        catalog = ItemCatalog(["0", "1"], ["Sense &amp; Sensibility", "Emma"], html_entities=policy)
        model = tmp_path / policy
        Recommender(make_model(tokenizer), RankingTask(catalog, tokenizer, template)).save_pretrained(model)
        (tmp_path / "new.json").write_text(json.dumps({"2": "Pride &amp; Prejudice"}))
        arguments = ["--model_name_or_path", model, "--add", tmp_path / "new.json"]
        run(update_catalog, *arguments, "--output_dir", tmp_path / f"{policy}_updated")
        assert Recommender.from_pretrained(tmp_path / f"{policy}_updated").task.catalog.texts[2] == text


@pytest.fixture
def adapter(tmp_path, tokenizer, task):
    """An adapter and its base model, named as from the folder above both."""
    make_model(tokenizer).save_pretrained(tmp_path / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=str(tmp_path / "base"), init_lora_weights=False)
    Recommender(get_peft_model(make_model(tokenizer), lora), task).save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="base")
    return tmp_path / "adapter"


def test_adapters_that_are_saved_again_name_their_base_absolutely(tmp_path, adapter):
    Recommender.from_pretrained(adapter).save_pretrained(tmp_path / "saved")
    updated = tmp_path / "elsewhere" / "updated"
    run(update_catalog, "--model_name_or_path", adapter, "--withdraw", "b3", "--output_dir", updated)
    for folder in (tmp_path / "saved", updated):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "base")
        assert Recommender.from_pretrained(folder).recommend([["b0"]], k=3).ids


def test_merge_and_push(tmp_path, adapter, model, fusion):
    """Another one loads it by the card's example, without the base model; a fusion goes with it."""
    fusion.save_pretrained(adapter)
    (adapter / "README.md").write_text(CARD)
    (adapter / "metrics.json").write_text("{}")
    expected = Recommender.from_pretrained(adapter).recommend([["b0", "b4"]], k=5)
    arguments = ["--model_name_or_path", adapter, "--output_dir", tmp_path / "merged", "--push_to_hub"]
    with serve() as hub:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1",
            "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        command = [sys.executable, "-m", "trl_msl.scripts.merge", *arguments, "--hub_model_id", "somebody/merged"]
        subprocess.run(list(map(str, command)), env=environment, check=True, timeout=280)
    for name, content in hub.repos["somebody/merged"].items():
        assert (tmp_path / "merged" / name).read_bytes() == content
    assert {"model.safetensors", FUSION_FILE} <= hub.repos["somebody/merged"].keys()
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "# Model Card for merged\n\nThis is the adapter `adapter`, merged into its base model.\n" in card
    assert "This is the recommender of our shop." in card
    assert "from_pretrained('somebody/merged')" in card and "| ndcg@10 | 0.5 |" in card and "model-index" in card
    (tmp_path / "base").rename(tmp_path / "gone")
    found = Recommender.from_pretrained(tmp_path / "merged").recommend([["b0", "b4"]], k=5)
    assert found.ids == expected.ids
    with pytest.raises(ValueError, match="holds no adapter .adapter_config.json.: it is a whole model already"):
        run(merge, "--model_name_or_path", model, "--output_dir", tmp_path / "again")
