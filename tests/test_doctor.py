# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import TITLES, make_model, make_windows
from transformers import BloomConfig, GPT2Config, MistralConfig

from trl_msl import ItemCatalog, PromptTemplate, RankingTask, TrieDecoder, build_rows, read_windows, recommend
from trl_msl.data import DataArguments
from trl_msl.doctor import diagnose
from trl_msl.scripts import doctor


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


def names(findings):
    return [finding.what for finding in findings]


@pytest.fixture(scope="module")
def plain_task(tokenizer, template):
    """Items that no check has anything to say about."""
    letters = list("abcdefghijklmnop")
    return RankingTask(ItemCatalog(range(len(letters)), letters), tokenizer, template)


def test_data_and_a_model_with_nothing_to_do(plain_task):
    """Facts only: no row says that all is well."""
    model = make_model(plain_task.tokenizer)
    findings = diagnose(plain_task, make_splits(plain_task.catalog), model)
    assert {finding.status for finding in findings} == {"ok"}, findings
    assert names(findings) == [
        "An item as the model writes it", "Valid tokens (AVT)", "Valid first tokens", "Splits", "Exact decoding"
    ]  # fmt: skip
    assert find(findings, "Valid first tokens").seen == "16; 16 of them (100%) lead to a single item"
    assert find(findings, "An item as the model writes it").seen == "'a<|eos|>'"
    assert find(findings, "Splits").seen == "train 10, validation 10, test 10"
    assert not any(finding.advice for finding in findings)


@pytest.mark.parametrize(
    ("what", "status", "seen"),
    [
        ("Duplicate titles", "note", "1 of 12 repeat another's (2 share theirs), such as 'A History of Tea'"),
        ("An item as the model writes it", "ok", "'\"The Silent River\"<|eos|>'"),
        ("Forced tokens", "note", "of the targets' tokens"),
        ("First token where items differ", "note", "of the targets have"),
        ("Items left for a top 10", "note", "7 of 12"),
    ],
)
def test_what_is_seen_on_small_data(what, status, seen, task):
    found = find(diagnose(task, make_splits(task.catalog)), what)
    assert (found.status, seen in found.seen) == (status, True), found
    assert found.advice or status == "ok"


def test_shares_of_targets_counted_by_hand(task):
    """Of train and validation, and not of test."""
    findings = diagnose(task, splits := make_splits(task.catalog))
    targets = [ids[-1] for name in ("train", "validation") for ids in splits[name]["item_ids"]]
    nodes = task.trie.item_nodes[task.catalog.indices(targets)]
    assert f"{task.trie.average_valid_tokens(nodes):.2f} " in find(findings, "Valid tokens (AVT)").seen
    paths = [path[path >= 0] for path in task.trie.paths(nodes)]
    forced = sum(int((task.trie.num_valid_tokens(path) == 1).sum()) for path in paths)
    share = forced / sum(map(len, paths))
    assert find(findings, "Forced tokens").seen == f"{share:.0%} of the targets' tokens"
    place = [depth for depth in range(3) if len({int(path[depth]) for path in paths}) > 1][0]
    first = [task.tokenizer.decode(task.trie.tokens(path[place : place + 1]).tolist()) for path in paths]
    token = max(set(first), key=first.count)
    expected = f"{first.count(token) / 20:.0%} of the targets have {token!r}; {len(set(first))} different ones"
    assert find(findings, "First token where items differ").seen == expected


@pytest.mark.parametrize("marks", ['"{text}"', "An item: {text}", "{text}"])
def test_first_tokens_counted_by_hand(marks, tokenizer, template):
    catalog = ItemCatalog(range(len(TITLES)), TITLES, template=marks)
    task = RankingTask(catalog, tokenizer, template)
    sequences, start = task.encode_items(catalog.completions), []
    while True:
        first = Counter(tokens[len(start)] for tokens in sequences if tokens[: len(start)] == start)
        if max(first.values()) <= len(sequences) / 2:
            break
        start.append(first.most_common(1)[0][0])
    alone = sum(count == 1 for count in first.values())
    where = f" after {tokenizer.decode(start)!r}" if start else ""
    seen = find(diagnose(task, make_splits(catalog)), "Valid first tokens").seen
    assert seen == f"{len(first)}{where}; {alone} of them ({alone / len(first):.0%}) lead to a single item"
    assert bool(start) == (marks != "{text}")


def test_items_that_most_users_get(tokenizer, template, monkeypatch):
    texts, what = [f"{title}, {number}" for number in range(10) for title in TITLES], "Items that most users get"
    task, model = RankingTask(ItemCatalog(range(120), texts), tokenizer, template), make_model(tokenizer)
    splits = make_splits(task.catalog)
    lists = recommend(model, task, build_rows(splits["train"], task)["prompt"][:], top_k=10).items.tolist()
    counts = Counter(item for items in lists for item in items)
    usual = [item for item, count in counts.items() if count >= len(lists) / 2]
    first = min(usual, key=lambda item: (-counts[item], item))
    common = [len({*one} & {*other}) / 10 for one, other in itertools.combinations(lists, 2)]
    found = find(diagnose(task, splits, model), what)
    assert found.status == "note" and found.seen.startswith(f"{len(usual)}, such as {texts[first]!r}")
    assert found.seen.endswith(f"two of 10 users have {sum(common) / 45:.0%} of their 10 best items in common")
    assert "`vocab_weight=1`" in found.advice and 0 < sum(common) < 45

    # Ten lists with nothing in common, and then an item that half of the users get: it is in 10 of the 45 pairs
    lists = torch.arange(100).view(10, 10)
    monkeypatch.setattr(TrieDecoder, "search", lambda *args, **kwargs: SimpleNamespace(items=lists))
    found = find(diagnose(task, splits, model), what)
    assert (found.status, found.seen) == ("ok", "none; two of 10 users have 0% of their 10 best items in common")
    lists[5:, 3] = 119
    found = find(diagnose(task, splits, model), what)
    assert found.seen == "1, such as 'Dune Messiah, 9'; two of 10 users have 2% of their 10 best items in common"
    few = RankingTask(ItemCatalog(range(99), texts[:99]), tokenizer, template)  # a list is a tenth of them
    assert what not in names(diagnose(few, make_splits(few.catalog), model))


@pytest.mark.parametrize(("name", "expected"), [("amazon_books", 70.90), ("amazon_office", 8.97)])
def test_average_valid_tokens_of_the_papers_data(shared, name, expected):
    """Table 4 of the MSL paper counts all of the train file: the split `train` alone gives another number."""
    from transformers import AutoTokenizer

    folder = shared / "data" / name
    catalog = ItemCatalog.from_json(folder / "id2name4Rec.json", template='"{text}"', empty_texts="keep")
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/llama3")
    task = RankingTask(catalog, tokenizer, PromptTemplate("{history}"))
    findings = diagnose(task, read_windows(folder, train_file="train_10000.csv"), max_rows=10)
    assert find(findings, "Valid tokens (AVT)").seen.startswith(f"{expected:.2f} at")


def test_settings_of_generate(plain_task):
    what, splits = "Generation settings of the model", make_splits(plain_task.catalog)
    model = make_model(plain_task.tokenizer)
    model.generation_config.update(repetition_penalty=1.2, top_k=20, max_new_tokens=1, eos_token_id=[5, 6])
    found = find(diagnose(plain_task, splits, model), what)
    assert json.loads(found.seen) == {
        "top_k": 20, "repetition_penalty": 1.2, "eos_token_id": [5, 6], "max_new_tokens": 1
    }  # fmt: skip
    end, depth = plain_task.tokenizer.eos_token_id, plain_task.trie.depth
    for remedy in ("reset them", f"pass `eos_token_id=[{end}]`", f"pass `max_new_tokens={depth}`"):
        assert remedy in found.advice
    model.generation_config.update(repetition_penalty=1.0, top_k=50, max_new_tokens=depth, eos_token_id=[5, end])
    assert what not in names(diagnose(plain_task, splits, model))


def test_logits_that_bf16_cannot_tell_apart(task):
    splits, model = make_splits(task.catalog), make_model(task.tokenizer)
    with torch.no_grad():  # all tokens nearly alike
        model.lm_head.weight.copy_(model.lm_head.weight[:1] + 1e-3 * model.lm_head.weight)
    close = find(diagnose(task, splits, model), "Logits in bf16")
    assert close.status == "note" and int(close.seen.split(";")[1].split()[0]) > 0
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    assert find(diagnose(task, splits, model), "Logits").status == "error"


def test_a_model_stored_in_bf16(task):
    """Its own logits are bf16, and could not differ from bf16."""
    model = make_model(task.tokenizer)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight[:1] + 1e-2 * model.lm_head.weight)
    for one in (model, model.bfloat16()):
        assert find(diagnose(task, make_splits(task.catalog), one), "Logits in bf16").status == "note"


@pytest.mark.parametrize("max_length", [20, 1024])
def test_rows_longer_than_the_models_positions(max_length, tokenizer, template, catalog):
    """They are cut before the model gets them; training would give it whole ones."""
    task = RankingTask(catalog, tokenizer, template, max_length=max_length)
    config = {"n_layer": 2, "n_head": 4, "max_position_embeddings": 20}  # learned ones: an IndexError beyond
    findings = diagnose(task, make_splits(catalog), make_model(tokenizer, GPT2Config, **config))
    what = "Rows longer than the model's 20 positions"
    if max_length == 20:
        assert what not in names(findings)
    else:
        found = find(findings, what)
        assert (found.status, found.seen) == ("error", "10 of 10") and "`max_length` to 20" in found.advice


def test_interactions_that_distort_a_result(task):
    catalog, splits = task.catalog, make_splits(task.catalog)
    rows = [{"user_id": "7", "item_ids": splits["train"][0]["item_ids"], "timestamp": 3}]
    rows += [{"user_id": "8", "item_ids": ["b1", "b2", "b1"], "timestamp": 900}]
    twice = Dataset.from_list([{**row, "user_id": "9"} for row in splits["validation"]])
    findings = diagnose(task, make_splits(catalog, test=Dataset.from_list(rows), validation=twice))
    assert find(findings, "Test windows before the end of train").seen.startswith("1 of 2")
    assert find(findings, "Test windows that are also in train").seen.startswith("1 of 2")
    assert find(findings, "Targets that are in their history").seen == "1 of 22, such as 'b1'"
    assert find(findings, "Users with several validation windows").seen == "1 of 1, such as '9'"

    unknown = Dataset.from_list([{"user_id": "1", "item_ids": ["b1", "b99", "b2"], "timestamp": 900}])
    findings = diagnose(task, make_splits(catalog, test=unknown))
    found = find(findings, "Items that the catalogue lacks")
    assert found.status == "error" and found.seen == "1 ids, such as 'b99', in 1 of 21 windows"
    assert find(findings, "Splits").status == "error"  # nothing is left of test


def test_data_with_almost_nothing_usable(task):
    strangers = DatasetDict({"train": Dataset.from_list([{"item_ids": ["x", "y"]}])})
    assert [finding.status for finding in diagnose(task, strangers)] == ["error"]
    bare = make_splits(task.catalog).select_columns("item_ids")
    bare["train"] = Dataset.from_list([{"item_ids": ["b1", "b2"]}, {"item_ids": ["b3"]}])
    findings = diagnose(task, bare)
    assert find(findings, "Windows of a single item").seen == "1 of 22"
    only_test = DatasetDict({"test": bare["test"]})
    assert find(diagnose(task, only_test), "Splits").seen == "test 10; no train and no validation"


def test_texts_and_lengths(tokenizer):
    special = tokenizer.eos_token
    texts = ["", "Tom &amp; Jerry", "a\tb", "long " * 200, f"Buy {special} me", *TITLES]
    catalog = ItemCatalog(range(len(texts)), texts, empty_texts="keep")
    task = RankingTask(catalog, tokenizer, PromptTemplate("{history}"), max_length=60)
    findings = diagnose(task, make_splits(catalog))
    for what, seen in (
        ("Empty titles", "1 of 17, such as '0'"),
        ("HTML entities in titles", "1 of 17, such as 'Tom &amp; Jerry'"),
        ("Control characters in titles", "1 of 17, such as 'a\\tb'"),
        ("Special tokens in titles", f"1 of 17, such as 'Buy {special} me'"),
        ("Long items", f"1 of 17 have more than 128 tokens, up to {task.trie.depth}, such as 'long long"),
    ):
        found = find(findings, what)
        assert found.status == "note" and seen in found.seen and found.advice, found
    assert find(findings, "Rows longer than 60 tokens").status == "error"

    short = RankingTask(task.catalog, tokenizer, PromptTemplate("{history}"), max_length=1200)
    windows = DatasetDict({"train": Dataset.from_list([{"item_ids": ["3", "4", "5"]}, {"item_ids": ["5", "6"]}])})
    assert "Rows longer than 1200 tokens" not in names(diagnose(short, windows))
    longest = max(map(len, short.encode_prompts(["".join(texts[3]) + ", " + texts[4]])))
    short = RankingTask(task.catalog, tokenizer, PromptTemplate("{history}"), max_length=longest)
    found = find(diagnose(short, windows), f"Rows longer than {longest} tokens")
    assert (found.status, found.seen) == ("note", "1 of 2")


def test_items_that_are_written_alike(tokenizer, template):
    task = RankingTask(ItemCatalog(["0", "1"], ["Emma", "Emma"]), tokenizer, template)
    splits = DatasetDict({"train": Dataset.from_list([{"item_ids": ["0", "1"]}])})
    findings = diagnose(task, splits, make_model(tokenizer))
    assert find(findings, "Where items begin to differ").status == "error"
    assert find(findings, "Exact decoding").status == "ok"  # an error in the data does not stop the model's checks


def test_chat_template(chat_task):
    findings = diagnose(chat_task, make_splits(chat_task.catalog))
    assert find(findings, "An item as the model writes it").seen.endswith("The Silent River\"<|im_end|>'")


def test_a_model_that_does_not_fit(task):
    small = make_model(task.tokenizer)
    small.resize_token_embeddings(len(task.tokenizer) - 5)
    findings = diagnose(task, make_splits(task.catalog), small)
    assert find(findings, "LM head").status == "error"
    assert findings[-1].what == "LM head"  # the model is not run


def test_a_model_without_a_head(plain_task):
    model = make_model(plain_task.tokenizer)
    model.get_output_embeddings = lambda: None
    found = find(diagnose(plain_task, make_splits(plain_task.catalog), model), "LM head")
    assert found.status == "error" and "has no LM head with a weight" in found.seen


def test_a_model_that_cannot_decode_exactly(plain_task):
    model = make_model(plain_task.tokenizer, BloomConfig, n_layer=2, n_head=4)
    found = find(diagnose(plain_task, make_splits(plain_task.catalog), model), "Exact decoding")
    assert found.status == "note" and "can't run a tree of tokens" in found.seen


def test_prompts_longer_than_a_sliding_window(tokenizer, template):
    """The model can't rank for such users, which must not stop the doctor."""
    catalog = ItemCatalog(range(120), [f"{title}, {number}" for number in range(10) for title in TITLES])
    task, model = RankingTask(catalog, tokenizer, template), make_model(tokenizer, MistralConfig, sliding_window=16)
    findings = diagnose(task, make_splits(catalog), model)
    found = find(findings, "Items that most users get")
    assert found.status == "note" and "sliding window of 16" in found.seen


def run(*arguments):
    command = [sys.executable, "-m", "trl_msl.scripts.doctor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_on_the_command_line(tmp_path, folder, base_model):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    result = run("--data_dir", data, "--model_name_or_path", base_model, "--load_model", "true")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "WHAT TO DO" in result.stdout and " 0 errors, " in result.stdout
    assert "Exact decoding" in result.stdout
    assert "Filter" not in result.stderr and "Building rows" not in result.stderr  # progress bars

    titles = json.loads((data / "id2name4Rec.json").read_text())
    (data / "id2name4Rec.json").write_text(json.dumps({**titles, "99": " "}))
    result = run("--data_dir", data, "--model_name_or_path", base_model)
    assert result.returncode == 1
    assert "ERROR Reading the data" in result.stdout and "Empty titles" in result.stdout
    result = run("--data_dir", tmp_path / "nowhere", "--model_name_or_path", base_model)
    assert result.returncode == 1 and "ERROR Reading the data" in result.stdout


def test_interactions_on_the_command_line(tmp_path, base_model, capsys):
    """What cleaning finds is in the table and counted; unknown items do not keep the doctor from the other checks."""
    rows = [(user, (user + 2 * step) % 12, 10 * step + user) for user in range(24) for step in range(6)]
    rows += [*rows[:3], (0, 99, 5), (" 1 ", 2, 3)]
    pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).to_csv(tmp_path / "log.csv", index=False)
    titles = ["", *TITLES[1:]]
    pd.DataFrame({"item_id": range(12), "title": titles}).to_json(
        tmp_path / "items.jsonl", orient="records", lines=True
    )
    args = DataArguments(interactions=str(tmp_path / "log.csv"), items=str(tmp_path / "items.jsonl"), max_test_users=2)
    assert doctor.main(doctor.DoctorArguments(str(base_model)), args) == 1
    _, findings = doctor.read(args)
    shown = capsys.readouterr().out
    errors = [finding.seen for finding in findings if finding.status == "error"]
    notes = [finding.seen for finding in findings if finding.status == "note"]
    assert [error.split(",")[0] for error in errors] == ["`texts`: 1 of 12 items have an empty text", "1 item id(s)"]
    assert len(notes) == 2 and "' 1 '" in notes[0] and "repeat" in notes[1]  # unknown items stop it: none is left out
    assert f" {len(errors)} errors" in shown and "train 19, validation 3, test 2" in shown
    assert shown.count("Interactions and ids") == 2 and "--drop_duplicates true" in " ".join(shown.split())
    assert "--empty_texts id" in shown and "--unknown_items drop" in " ".join(shown.split())
    assert (
        doctor.main(doctor.DoctorArguments(str(base_model)), replace(args, empty_texts="id", unknown_items="drop"))
        == 0
    )
    assert "They are dropped." in " ".join(capsys.readouterr().out.split())
