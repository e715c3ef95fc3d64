# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import TITLES, make_model, make_windows

from trl_msl import ItemCatalog, PromptTemplate
from trl_msl.doctor.diagnose import diagnose
from trl_msl.experiments.from_scratch import train_tokenizer


def make_splits(catalog, **changed):
    """Windows in three splits, in order of time; some of them replaced."""
    windows = {}
    for place, name in enumerate(("train", "validation", "test")):
        rows = make_windows(catalog.ids, 10, seed=place)
        windows[name] = rows.add_column("timestamp", [100 * place + row for row in range(10)])
    return DatasetDict({**windows, **changed})


def find(findings, what):
    found = [finding for finding in findings if finding.what == what]
    assert len(found) == 1, (what, [finding.what for finding in findings])
    return found[0]


@pytest.fixture(scope="module")
def findings(catalog, tokenizer, template):
    model = make_model(tokenizer)
    model.generation_config.update(repetition_penalty=1.2, top_k=20, max_new_tokens=3, eos_token_id=[5, 6])
    return diagnose(catalog, tokenizer, template, make_splits(catalog), model)


@pytest.mark.parametrize(
    ("what", "status", "seen"),
    [
        ("Items of the log in the catalogue", "ok", "all, in 30 windows"),
        ("Empty titles", "ok", "none of 12"),
        ("Duplicate titles", "note", "1 of 12, such as 'A History of Tea'"),
        ("HTML entities in titles", "ok", "none of 12"),
        ("Token that ends an item", "ok", "'<|eos|>'"),
        ("Closing characters of the template", "ok", "none of 12"),
        ("Where items begin to differ", "note", "after 1 token(s) that all share"),
        ("Tokens that are forced", "note", "of the targets' tokens"),
        ("First token where items differ", "note", "of the targets have"),
        ("Targets that never come to a choice", "ok", "0 of 10"),
        ("Longest item", "ok", "0 of 12 longer than 128"),
        ("Rows longer than 1024 tokens", "ok", "0 of 10"),
        ("Items that constrained generation can't write", "ok", "0 of 12; 0 steps without a constraint"),
        ("Splits", "ok", "train 10, validation 10, test 10"),
        ("Test windows before the end of train", "ok", "none of 10"),
        ("Test windows that are in train, too", "ok", "none of 10"),
        ("Targets that their history holds", "ok", "none of 30"),
        ("Items left to fill a top 10", "note", "at least 7 of 12"),
        ("LM head", "ok", "rows for a tokenizer of"),
        ("Exact decoding", "ok", "a tree of tokens"),
        ("Generation settings of the model", "note", '{"top_k": 20, "repetition_penalty": 1.2}'),
        ("End tokens of `generate`", "note", "[5, 6] lacks"),
        ("Length limit of `generate`", "note", "3 tokens, and the longest item has"),
    ],
)
def test_what_is_seen_on_small_data(what, status, seen, findings):
    found = find(findings, what)
    assert (found.status, seen in found.seen) == (status, True), found
    assert found.advice or status == "ok"


def test_logits_that_bf16_can_not_tell_apart(catalog, tokenizer, template):
    model = make_model(tokenizer)
    fine = find(diagnose(catalog, tokenizer, template, make_splits(catalog), model), "Logits in bf16")
    with torch.no_grad():  # all tokens nearly alike
        model.lm_head.weight.copy_(model.lm_head.weight[:1] + 1e-3 * model.lm_head.weight)
    close = find(diagnose(catalog, tokenizer, template, make_splits(catalog), model), "Logits in bf16")
    number = [int(found.seen.split(";")[1].split()[0]) for found in (fine, close)]
    assert close.status == "note" and number[1] > number[0]
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    assert (
        find(diagnose(catalog, tokenizer, template, make_splits(catalog), model), "Logits in bf16").status == "error"
    )


def test_interactions_that_spoil_a_result(catalog, tokenizer, template):
    splits = make_splits(catalog)
    rows = [{"user_id": "7", "item_ids": splits["train"][0]["item_ids"], "timestamp": 3}]
    rows += [{"user_id": "8", "item_ids": ["b1", "b2", "b1"], "timestamp": 900}]
    twice = Dataset.from_list([{**row, "user_id": "9"} for row in splits["validation"]])
    findings = diagnose(
        catalog, tokenizer, template, make_splits(catalog, test=Dataset.from_list(rows), validation=twice)
    )
    assert find(findings, "Test windows before the end of train").seen.startswith("1 of 2")
    assert find(findings, "Test windows that are in train, too").seen.startswith("1 of 2")
    assert find(findings, "Targets that their history holds").seen == "1 of 22, such as 'b1'"
    assert find(findings, "Users with several validation windows").seen == "1 of 1, such as '9'"

    unknown = Dataset.from_list([{"user_id": "1", "item_ids": ["b1", "b99", "b2"], "timestamp": 900}])
    findings = diagnose(catalog, tokenizer, template, make_splits(catalog, test=unknown))
    found = find(findings, "Items of the log in the catalogue")
    assert found.status == "error" and found.seen == "1 ids are not, such as 'b99', in 1 of 21 windows"
    assert find(findings, "Splits").status == "error"  # nothing is left of test


def test_data_that_is_hardly_there(catalog, tokenizer, template):
    strangers = DatasetDict({"train": Dataset.from_list([{"item_ids": ["x", "y"]}])})
    findings = diagnose(catalog, tokenizer, template, strangers)
    assert [finding.status for finding in findings] == ["error"]
    bare = make_splits(catalog).select_columns("item_ids")
    bare["train"] = Dataset.from_list([{"item_ids": ["b1", "b2"]}, {"item_ids": ["b3"]}])
    findings = diagnose(catalog, tokenizer, template, bare)
    assert find(findings, "Windows of a single item").seen == "1 of 22"
    assert find(findings, "Test windows that are in train, too").status == "ok"


def test_a_model_stored_in_bf16(catalog, tokenizer, template):
    """Its own logits are bf16, and could not differ from bf16."""
    model = make_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight[:1] + 1e-2 * model.lm_head.weight)
    seen = [
        find(diagnose(catalog, tokenizer, template, make_splits(catalog), one), "Logits in bf16")
        for one in (model, model.bfloat16())
    ]
    assert [finding.status for finding in seen] == ["note", "note"]


def test_texts_and_lengths(tokenizer):
    texts = ["", "Tom &amp; Jerry", "a\tb", "long " * 200, *TITLES]
    catalog = ItemCatalog(range(len(texts)), texts, empty_texts="keep")
    template = PromptTemplate("{history}")
    findings = diagnose(catalog, tokenizer, template, make_splits(catalog), max_length=60)
    for what, seen in (
        ("Empty titles", "1 of 16, such as '0'"),
        ("HTML entities in titles", "1 of 16, such as 'Tom &amp; Jerry'"),
        ("Control characters in titles", "1 of 16, such as 'a\\tb'"),
        ("Longest item", "1 of 16 longer than 128, such as 'long long"),
    ):
        found = find(findings, what)
        assert found.status == "note" and seen in found.seen, found
    assert find(findings, "Rows longer than 60 tokens").status == "error"
    assert find(findings, "Closing characters of the template").seen == "none"
    one = ItemCatalog(["0", "1"], ["Emma", "Emma"])
    splits = DatasetDict({"train": Dataset.from_list([{"item_ids": ["0", "1"]}])})
    assert find(diagnose(one, tokenizer, template, splits), "Where items begin to differ").status == "error"
    ended = ItemCatalog(["0", "1"], ["Emma", f"Emma{tokenizer.eos_token}"])
    assert "must hold the end token" in find(diagnose(ended, tokenizer, template, splits), "Tokens of the items").seen


def test_tokens_that_merge(template):
    """Across the prompt's end, and across the end of a title, with a tokenizer that has seen them together."""
    titles = ["Help", "Help!", "Stop!"]
    tokenizer = train_tokenizer(["Next: Help!!", "Next: Stop!!", "Next: Stop", "::", "!!"] * 20, vocab_size=400)
    catalog = ItemCatalog(["0", "1", "2"], titles, template=":{text}!")
    windows = DatasetDict({"train": Dataset.from_list([{"item_ids": ["0", "1"]}, {"item_ids": ["1", "2"]}])})
    findings = diagnose(catalog, tokenizer, PromptTemplate("{history} Next:"), windows)
    assert find(findings, "Tokens across the prompt's end").seen == "2 of 2, such as ':Help!!'"
    assert find(findings, "Closing characters of the template").seen == "2 of 3, such as ':Help!!'"
    plain = ItemCatalog(["0", "1", "2"], titles)
    seen = find(diagnose(plain, tokenizer, template, windows), "Token that ends an item").seen
    assert seen == "'<|eos|>'; 1 items begin another one, such as 'Help', and only it can end them"


def test_chat_template(catalog, tokenizer):
    findings = diagnose(catalog, tokenizer, PromptTemplate("{history}", conversational=True), make_splits(catalog))
    assert find(findings, "Tokens across the prompt's end").seen == "the chat template parts prompt and item"
    assert find(findings, "Token that ends an item").seen == "'<|im_end|>'"


def test_a_model_that_does_not_fit(catalog, tokenizer, template):
    small = make_model(tokenizer)
    small.resize_token_embeddings(len(tokenizer) - 5)
    found = find(diagnose(catalog, tokenizer, template, make_splits(catalog), small), "LM head")
    assert found.status == "error"


def run(*arguments):
    command = [sys.executable, "-m", "trl_msl.scripts.doctor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_on_the_command_line(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    make_model(tokenizer).save_pretrained(tmp_path / "model")
    ids = [str(index) for index in range(len(TITLES))]
    (tmp_path / "id2name4Rec.json").write_text(json.dumps(dict(zip(ids, TITLES))))
    for name, rows, seed in (("train.csv", 30, 0), ("test.csv", 5, 1)):
        windows = make_windows(ids, rows, seed)["item_ids"]
        cells = [str([int(item) for item in window]) for window in windows]
        frame = pd.DataFrame(
            {"user_id": range(rows), "item_ids": cells, "timestamp": range(40 * seed, 40 * seed + rows)}
        )
        frame.to_csv(tmp_path / name, index=False)
    result = run("--data_dir", tmp_path, "--model_name_or_path", tmp_path / "model", "--load_model", "true")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "WHAT TO DO" in result.stdout and " checks: 0 errors, " in result.stdout
    assert "Exact decoding" in result.stdout

    (tmp_path / "id2name4Rec.json").write_text(json.dumps({**dict(zip(ids, TITLES)), "99": " "}))
    result = run("--data_dir", tmp_path, "--model_name_or_path", tmp_path / "model")
    assert result.returncode == 1
    assert "ERROR Reading the data" in result.stdout and "Empty titles" in result.stdout
    result = run("--data_dir", tmp_path / "nowhere", "--model_name_or_path", tmp_path / "model")
    assert result.returncode == 1 and "ERROR Reading the data" in result.stdout
