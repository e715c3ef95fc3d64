# SPDX-License-Identifier: Apache-2.0
"""Damaged or hostile files, as the commands read them: see test_bad_input.py."""

import builtins

import numpy as np
import pyarrow as pa
import pytest
from helpers import make_model
from test_bad_input import DEEP, NOT_UTF8, add_code, suffix, table, write
from trl import ModelConfig

from trl_msl import MSLConfig, Recommender
from trl_msl.data import DataArguments
from trl_msl.scripts import evaluate, recommend, train, update_catalog
from trl_msl.scripts.train_and_evaluate import DecodingArguments
from trl_msl.scripts.users import UserArguments, parse_history, read_users


# ---------------------------------------------------------------------- users to recommend to


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        ('["007", 7]', ["007", "7"]),
        ("[]", []),
        ("[1]", ["1"]),
        ('["Dune, or: \\"sand\\"", "\U0001f600"]', ['Dune, or: "sand"', "\U0001f600"]),
        *[(cell, None) for cell in ("[null]", "[NaN]", "[1.5]", "[1e999]", "[true]", '[["1"], "2"]', '{"1": "2"}')],
        *[(cell, None) for cell in ('"ab"', "[1", DEEP, f"[{'9' * 5000}]", b"[1]", {"1": 2}, 1.0, 12)],
        *[(cell, []) for cell in ("", "  ", None, np.nan)],
        ("['a', \"b's\", 7]", ["a", "b's", "7"]),  # a Python list, as pandas writes it
        *[(cell, None) for cell in ("['a' 'b']", "['a''b', 'c']", "[1 2]", "[]()", "['a', None]", "('a', 'b')")],
        ("['a \" \" b']", ['a " " b']),
        ("12", ["12"]),
        *[(cell, ["007", "b-1", "c"]) for cell in ("007 b-1  c", "007,b-1,c", " 007, b-1 ,c ")],
        *[(cell, None) for cell in ("Crime, and Punishment", "a,,b", "a,b,", ",", "a, b c", "'a', 'b'", "a]")],
        *[(cell, None) for cell in (np.array([1.0, np.nan]), np.array([["1"]]), np.array(["a", None], object))],
        (np.array(["a", "b"], object), ["a", "b"]),
        (np.array([1, 2]), ["1", "2"]),
    ],
)
def test_histories_of_users(cell, items):
    assert parse_history(cell) == items


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        (b"item_ids\n\xff\n", "cannot be read"),
        ("item_ids\n[1,2]\n", "more cells than its header"),
        ("user_id,item_ids\n1,[1]\n2,\n3,[]\n", r"2 of 3 users have an empty history .*rows: \[1, 2\].*'drop'"),
        ("user_id,item_ids\n1,[1]\n2,[\n", r"`item_ids` must hold lists .* 1 of 2 rows .*\[1\], with '\['"),
        ("user_id,item_ids\n,[1]\n", "'user_id' must hold an id, but 1 of 1 rows"),
        (table(user_id=[1.0, 2.5], item_ids=[[1], [2]]), "'user_id' has floating ids"),
        ("item_ids,item_ids\n[1],[2]\n", "more than once"),
        ("items\n[1]\n", r"lacks the columns \['item_ids'\] and has \['items'\]: rename them"),
        ("item_ids,exact\n[1],2\n", r"has the columns \['exact'\], which this command adds"),
        (b"PAR1", "cannot be read"),
        (table(item_ids=pa.array([], pa.list_(pa.string()))), "has no rows"),
        (table(item_ids=[[1, None]]), "1 of 1 rows"),
        (table(item_ids=["[1]"], name=NOT_UTF8), "cannot be read.*UTF8"),
    ],
)
def test_files_of_users(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_users(UserArguments(write(tmp_path / f"users.{suffix(content)}", content)))


def test_users_that_are_not_a_file_or_have_no_history(tmp_path):
    for name, message in (("none.csv", "cannot be read"), ("none.parquet", "cannot be"), ("users", "cannot be")):
        with pytest.raises(ValueError, match=message):
            read_users(UserArguments(str(tmp_path / name)))
    path = write(tmp_path / "users.csv", 'user_id,item_ids\n007,"[1, ""2""]"\nNA,[]\n')
    users, only_ids = read_users(UserArguments(path, unknown_items="drop"))
    assert not only_ids
    assert users.to_dict("list") == {"user_id": ["007", "NA"], "item_ids": [["1", "2"], []]}
    path = write(tmp_path / "users.parquet", table(item_ids=['["Dune"]', ""]))  # an empty cell is not an id
    assert not read_users(UserArguments(path, unknown_items="drop"))[1]


# ---------------------------------------------------------------------- code that comes with a model


def test_commands_run_no_code_unasked(task, folder, tmp_path, monkeypatch):
    model_folder, marker, asked = tmp_path / "model", tmp_path / "marker", []
    monkeypatch.setattr(builtins, "input", lambda question="": asked.append(question) or "no")
    Recommender(make_model(task.tokenizer), task).save_pretrained(model_folder)
    add_code(model_folder, marker, "config.json", "evil")
    add_code(model_folder, marker, "tokenizer_config.json", "evil")
    model = ModelConfig(model_name_or_path=str(model_folder))
    users = write(tmp_path / "users.csv", 'user_id,item_ids\n1,"[""b0""]"\n')
    prompt = "The user has read: {history}\nNext: "  # that of the task
    data = DataArguments(data_dir=str(folder), prompt_text=prompt, max_validation_users=1, max_test_users=1)
    config = MSLConfig(str(tmp_path / "out"), report_to="none", bf16=False, use_cpu=True)
    for call in (
        lambda: recommend.main(recommend.RecommendArguments(users), model),
        lambda: train.main(DecodingArguments(), data, config, model),
        lambda: evaluate.main(evaluate.EvaluationArguments(), data, model),
        lambda: update_catalog.main(update_catalog.UpdateArguments(str(model_folder), str(tmp_path / "updated"))),
    ):
        with pytest.raises(ValueError, match="contains custom code which must be executed"):
            call()
        assert not marker.exists() and not asked
