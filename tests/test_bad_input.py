# SPDX-License-Identifier: Apache-2.0
"""What comes from elsewhere, damaged, strange or hostile: a value, or an error that says what is wrong and where."""

import builtins
import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import make_model, make_windows
from hub_server import serve
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file

from trl_msl import (
    ItemCatalog,
    ItemTrie,
    PromptTemplate,
    RankingTask,
    Recommender,
    build_rows,
    read_interactions,
    read_windows,
    tokenize_rows,
)
from trl_msl.data import read_items


HALF = "\ud800"  # half a character, as JSON can hold it but UTF-8 can't
NOT_UTF8 = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff"))
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer, task):
    path = tmp_path_factory.mktemp("saved")
    Recommender(make_model(tokenizer), task).save_pretrained(path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    """A saved recommender to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


def write(path, content):
    """A file of a text, bytes or a table; its path."""
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---------------------------------------------------------------------- items


@pytest.mark.parametrize(
    ("ids", "texts", "message"),
    [
        ([None, "a"], ["x", "y"], "`ids` holds 1 of 2 ids that are neither .* such as None"),
        ([12.0, float("nan")], ["x", "y"], "`ids` holds 2 of 2 .* such as 12.0"),
        ([True], ["x"], "`ids` holds 1 of 1 .* such as True"),
        ([""], ["x"], "`ids` holds 1 of 1 .* such as ''"),
        ([[1]], ["x"], "`ids` holds 1 of 1"),
        ([HALF], ["x"], r"`ids` holds 1 of 1 .*\\ud800"),
        (["a", "b"], ["x", "y" + HALF], "`texts` holds 1 .* lone surrogate .* item 'b'"),
    ],
)
def test_ids_and_texts(ids, texts, message):
    with pytest.raises(ValueError, match=message):
        ItemCatalog(ids, texts)


@pytest.mark.parametrize("template", [None, 5, HALF + "{text}", "{text}{text}"])
def test_item_template(template):
    with pytest.raises(ValueError, match="`template` is .* must be a text that contains {text} exactly once"):
        ItemCatalog(["1"], ["x"], template=template)


@pytest.mark.parametrize("content", [DEEP, '{"a":' * 100_000, '{"1": %s}' % ("9" * 5000), ""])
def test_json_that_cannot_be_parsed(tmp_path, content):
    with pytest.raises(ValueError, match="items.json' is not a readable JSON file"):
        ItemCatalog.from_json(write(tmp_path / "items.json", content))


@pytest.mark.parametrize(
    "content", ['{"1": NaN}', '{"1": null}', '{"1": {"2": "x"}}', '{"1": ["x"]}', '{"1": "\\ud800"}']
)
def test_json_whose_values_are_not_texts(tmp_path, content):
    with pytest.raises(ValueError, match="`texts` holds 1 value.*item '1'"):
        ItemCatalog.from_json(write(tmp_path / "items.json", content))


def test_items_that_are_not_a_file(tmp_path):
    for path in (tmp_path, tmp_path / "none", "a\0b"):
        with pytest.raises(ValueError, match="is not a readable JSON file"):
            ItemCatalog.from_json(path)
    (tmp_path / "folder.csv").mkdir()
    for path in ("none.csv", "none.parquet", "folder.csv"):
        with pytest.raises(ValueError, match=f"{path} cannot be read"):
            read_items(str(tmp_path / path))


def test_bom_of_a_json_file(tmp_path):
    assert ItemCatalog.from_json(write(tmp_path / "items.json", b'\xef\xbb\xbf{"1": "x"}')).texts == ["x"]


def table(**columns):
    return pa.table(columns)


def suffix(content):
    return "parquet" if isinstance(content, pa.Table) or content[:4] == b"PAR1" else "csv"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        (b"item_id,title\n1,\xff\n", "cannot be read.*utf-8"),
        ('item_id,title\n1,"x\n', "cannot be read.*EOF inside string"),
        ("item_id,title\n1,x,y\n", "more cells than its header"),  # else item x, titled y
        ("item_id,title,title\n1,x,y\n", r"has the columns \['title'\] more than once"),
        (
            "id,title\n1,x\n",
            r"lacks the columns \['item_id'\] and has \['id', 'title'\]: pass their names, as in `item_column`,",
        ),
        ("item_id,title\n", "has no rows"),
        ("item_id,title\n,x\n", "`ids` holds 1 of 1 .* such as nan"),
        ("item_id,title\n1,\n2,x", "1 of 2 items have an empty text, such as item '1'"),
        (b"PAR1", "cannot be read"),
        (b"PAR1" + bytes(100) + b"PAR1", "cannot be read"),
        (table(item_id=[1], name=["x"]), "lacks the columns"),
        (table(item_id=pa.array([], pa.int64()), title=pa.array([], pa.string())), "has no rows"),
        (table(item_id=[1, None], title=["x", "y"]), "`ids` holds 2 of 2 .* such as 1.0"),
        (table(item_id=[[1]], title=["x"]), r"`ids` holds 1 of 1"),
        (table(item_id=[1], title=[b"x"]), "`texts` holds 1 value"),
        (table(item_id=[1], title=[2]), "`texts` holds 1 value"),
        (table(item_id=[1], title=pa.array([None], pa.string())), "1 of 1 items have an empty text"),
        (table(item_id=[1], title=NOT_UTF8), "cannot be read.*UTF8"),
        (pa.table([[1], ["x"], ["y"]], ["item_id", "title", "title"]), "more than once|Multiple matches|duplicate"),
    ],
)
def test_items_of_a_table(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_items(write(tmp_path / f"items.{suffix(content)}", content))


def test_items_of_a_table_keep_their_spelling(tmp_path):
    catalog = read_items(write(tmp_path / "items.csv", "item_id,title\n007,NA\n7,null\n"))
    assert (catalog.ids, catalog.texts) == (["007", "7"], ["NA", "null"])


# ---------------------------------------------------------------------- interaction logs and windows: more than in
# test_interactions.py


def log(**columns):
    return pa.table({"user_id": ["a"], "item_id": ["x"], "timestamp": [1], **columns})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user_id,item_id,timestamp,item_id\na,b,1,c\n", r"has the columns \['item_id'\] more than once"),
        ('user_id,item_id,timestamp\na,"b,1\n', "cannot be read.*EOF inside string"),
        ("user_id,item_id,timestamp\na,b,1e999\n", "'timestamp' must hold a number .* with '1e999'"),
        (
            f"user_id,item_id,timestamp\na,b,{'9' * 10_000}\n",
            r"'timestamp' must hold a number .* with '9{199}\): fix",
        ),
        (log(item_id=NOT_UTF8), "cannot be read.*UTF8"),
        (log(item_id=[["x"]]), "'item_id' has mixed ids"),
        (log(timestamp=[[1]]), "'timestamp' must hold a number"),
        (log(timestamp=pa.array([2**63 - 1], pa.timestamp("ms"))), "'timestamp' holds dates out of range"),
        (log(user_id=pa.array([None], pa.string())), "'user_id' must hold an id, but 1 of 1"),
    ],
)
def test_interaction_logs(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_interactions(write(tmp_path / f"log.{suffix(content)}", content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read: it must have lines"),
        (b"[1, 2]\n", "cannot be read: it must have lines, each a JSON object"),
        (b"{", "cannot be read"),
        (b'{"user_id": "\xff"}\n', "cannot be read.*utf-8"),
        (DEEP.encode(), "cannot be read"),
        (b'{"user_id": "a", "item_id": "x"}\n', r"lacks the columns \['timestamp'\]"),
        (b'{"user_id": "\\ud800", "item_id": "x", "timestamp": 1}\n', "cannot be read: a line holds half a char"),
        (b'{"user_id": 12.0, "item_id": "x", "timestamp": 1}\n', "'user_id' has floating ids"),
        (b'{"user_id": [1], "item_id": "x", "timestamp": 1}\n', "'user_id' has mixed ids"),
        (b'{"user_id": 7, "item_id": "x", "timestamp": 1}\n{"item_id": "x", "timestamp": 1}\n', "1 of 2 rows"),
    ],
)
def test_json_lines(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_interactions(write(tmp_path / "log.jsonl", content))


@pytest.mark.parametrize("name", ["log.csv.gz", "log.jsonl.gz", "log.tsv.bz2", "log.csv.xz", "log.csv.zst"])
def test_damaged_compressed_files(tmp_path, name):
    whole = write(tmp_path / "whole.csv.gz", gzip.compress(b"user_id,item_id,timestamp\na,x,1\n"))
    assert len(read_interactions(whole)) == 1
    for content in (b"", b"a,b", (tmp_path / "whole.csv.gz").read_bytes()[:-9]):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_interactions(write(tmp_path / name, content))


def test_interactions_long_ago(tmp_path):
    path = write(tmp_path / "log.csv", "user_id,item_id,timestamp\na,b,0001-01-01\n")
    if Version(pd.__version__) < Version("3"):  # whose dates end in 1677
        with pytest.raises(ValueError, match="must hold a number or an ISO 8601 date.*'0001-01-01'"):
            read_interactions(path)
    else:
        assert read_interactions(path)["timestamp"].tolist() == [-62135596800]


def test_what_pandas_notes_in_a_parquet_file_is_not_relied_on(tmp_path):
    column = {"name": "timestamp", "field_name": "timestamp", "pandas_type": "?", "numpy_type": "?", "metadata": None}
    notes = {"columns": [column], "index_columns": ["user_id"], "column_indexes": []}
    path = write(tmp_path / "log.parquet", log().replace_schema_metadata({"pandas": json.dumps(notes)}))
    assert read_interactions(path).to_dict("list") == {"user_id": ["a"], "item_id": ["x"], "timestamp": [1]}


def test_sources_that_are_not_a_log(tmp_path):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "log.csv", b"\xff")
    for source in (tmp_path / "folder", str(tmp_path / "folder"), "a\0b.csv", "a\nb"):
        with pytest.raises(ValueError, match="cannot be read"):
            read_interactions(source)
    frame = pd.DataFrame([["a", "b", "c", 1]], columns=["user_id", "user_id", "item_id", "timestamp"])
    with pytest.raises(ValueError, match="the DataFrame has the columns .'user_id'. more than once"):
        read_interactions(frame)


@pytest.mark.parametrize("cell", [DEEP, "-" * 100_000 + "1", r"['\ud800', 'a']", f"[{'9' * 5000}, 1]", "[1,\0 2]"])
def test_windows(tmp_path, cell):
    for name in ("train.csv", "test.csv"):
        write(tmp_path / name, f'user_id,item_ids,timestamp\n1,"{cell}",3\n')
    with pytest.raises(ValueError, match="row 0: item_ids must be a list of at least 2 ids") as caught:
        read_windows(tmp_path)
    assert len(str(caught.value)) < 1000  # not the whole cell


# ---------------------------------------------------------------------- texts and sizes, all the way through


def test_awkward_texts_are_recommended(tmp_path, tokenizer):
    long, family = "The Silent River " * 1_000, "👩‍👩‍👧‍👦 é"
    texts = [long, "\x00\x07\x1b[31m", "a\r\nb\t", "\u202eשלום", family, "\ufeff\uffff", "{history}{text}"]
    catalog = ItemCatalog([f"{text[:2]}{index}\0" for index, text in enumerate(texts)], texts, template='"{text}"')
    template = PromptTemplate("\u202eRead: {history}\0\nNext: ")
    task = RankingTask(catalog, tokenizer, template)
    short = catalog.ids[1:]
    rows = build_rows(make_windows(short, 5), task)
    tokenized = tokenize_rows(rows[:], task)
    for ids, labels, row in zip(*tokenized.values(), rows):
        title = tokenizer.decode([token for token, label in zip(ids, labels) if label >= 0], skip_special_tokens=True)
        assert title == row["completion"]
    Recommender(make_model(tokenizer), task).save_pretrained(tmp_path)
    found = Recommender.from_pretrained(tmp_path).recommend([short, short[::-1]], k=7, exclude_history=False)
    assert [sorted(ids) for ids in found.ids] == [sorted(catalog.ids)] * 2
    assert texts[0] in found.texts[0]


@pytest.mark.parametrize("texts", [["Dune"], ["Dune"] * 3], ids=["one item", "all alike"])
def test_catalogues_without_a_choice(texts, tokenizer, template, caplog):
    """One sequence, so no node of the trie branches. That it can't be trained on is tested with the trainer."""
    catalog = ItemCatalog(range(len(texts)), texts)
    recommender = Recommender(make_model(tokenizer), RankingTask(catalog, tokenizer, template))
    for mode in ("exact", "beam", "generate"):
        found = recommender.recommend([["0"]], k=len(texts), mode=mode, exclude_history=False)
        assert found.ids == [catalog.ids] and not np.any(found.scores)  # the probability of what is certain
    assert recommender.recommend([["0"]], k=1).ids == [
        []
    ]  # what the user has had is left out, and so is what is like it
    assert "1 of 1 users got fewer items than were asked for" in caplog.text


# ---------------------------------------------------------------------- what is asked of a recommender


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ([], "`histories` is empty: pass at least one"),
        ("b0", "`histories`: 2 of 2 are not lists"),
        (["b0", ["b1"]], "`histories`: 1 of 2 are not lists, the first that of user 0, 'b0'"),
        ([["b0"], None, 5, {"b0": 1}], "`histories`: 3 of 4 are not lists, the first that of user 1, None"),
        ([[None]], "1 different ids that are not in the catalogue .*'None'"),
        ([[HALF]], r"1 different ids that are not in the catalogue .*\\ud800"),
        ([[["b0"]]], "1 different ids that are not in the catalogue"),
    ],
)
def test_histories(histories, message, task):
    with pytest.raises(ValueError, match=message):
        Recommender(None, task).recommend(histories)


def test_a_text_is_not_a_list_of_ids(catalog):
    with pytest.raises(ValueError, match="`ids` is the text 'b0': it must be a list"):
        catalog.indices("b0")


# ---------------------------------------------------------------------- files of a hostile author


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[({name: value}, f"its '{name}' is") for name in ("prompt_template", "decoding", "sha256")
          for value in (None, True, "x", [1], 1.5, 10**400)],
        *[({"withdrawn": value}, "its 'withdrawn' is") for value in (None, True, "b1", {"b1": 1}, 5)],
        *[({"num_trained": value}, "num_trained.? is") for value in (True, "x", [1], 1.5, 10**400, 0, -5)],
        *[({"max_length": value}, "max_length.? is") for value in (True, "x", [1], 1.5, 10**400, 0, -5)],
        *[({"chat_template_kwargs": value}, "its 'chat_template_kwargs' is") for value in (True, "x", [1], 5)],
        *[({"num_items": value}, "its 'num_items' is|it counts 5 items") for value in (None, True, "12", 5)],
        *[({"format": value}, "its format is .*, this version reads 3") for value in (None, 1, "2", [2], {"a": {}})],
        ({"tokenizer_fingerprint": 5}, "its 'tokenizer_fingerprint' is 5"),
        ({"tokenizer_fingerprint": HALF}, "writes other tokens"),
        ({"sha256": {"items.parquet": [5]}}, "items.parquet is damaged"),
        ({"withdrawn": [5]}, "its 'withdrawn' holds 1 that are not ids, such as 5"),
        ({"withdrawn": [["b1"], None]}, "its 'withdrawn' holds 2 that are not ids"),
        ({"withdrawn": ["b1", "b99"]}, "1 id.s. of 2 that are not in the catalogue .*'b99'"),
        *[({"prompt_template": value}, message) for value, message in (
            ({}, "text"), ({"text": "{history}", "evil": 1}, "evil"), ({"text": "Next: "}, "exactly once"),
            ({"text": 5}, "must be texts"), ({"text": "{history}", "separator": None}, "must be texts"),
            ({"text": "{history}" + HALF}, "must be texts"),
            ({"text": "{history}", "conversational": "no"}, "`conversational` is 'no'"),
        )],
        *[({"decoding": {name: value}}, f"`decoding` has .* as '{name}'") for name, value in (
            ("mode", "x"), ("mode", None), ("mode", ["exact"]), ("num_beams", "5"), ("num_beams", 10**9),
            ("num_beams", True), ("num_beams", 0), ("num_beams", 1.5), ("normalize", "all"), ("normalize", {}),
            ("length_penalty", "x"), ("length_penalty", float("nan")), ("length_penalty", 1e308),
            ("length_penalty", 10**400), ("max_expansions", "x"), ("max_expansions", 0), ("max_expansions", 10**30),
            ("max_expansions", True), ("max_expansions", 0.5),
        )],
        ({"decoding": {"model": "x"}}, r"`decoding` has \['model'\]: it may have mode"),
        *[({"prompt_template": {"text": "{history}", "conversational": True}, "chat_template_kwargs": value}, message)
          for value, message in (
            ({"tokenize": True}, "multiple values"), ({"conversation": []}, "multiple values"),
            ({"chat_template": "{{ 1 / 0 }}"}, "."), ({"chat_template": "{{ ''.__class__.__mro__ }}{{ x.y }}"}, "."),
            ({"chat_template": "{% if %}"}, "."), ({"chat_template": HALF}, "."),
        )],
    ],
)  # fmt: skip
def test_recommender_json(changes, message, folder, tokenizer):
    edit(folder / "recommender.json", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        RankingTask.from_pretrained(folder, tokenizer)
    assert len(str(caught.value)) < 2000


def test_recommender_json_of_other_shapes(folder, tokenizer):
    path = folder / "recommender.json"
    content = json.loads(path.read_text())
    for name in content.keys() - {"versions"}:
        path.write_text(json.dumps({key: value for key, value in content.items() if key != name}))
        if name == "max_history":  # earlier versions did not write it
            assert RankingTask.from_pretrained(folder, tokenizer).max_history is None
            continue
        with pytest.raises(ValueError, match=f"it lacks .'{name}'" if name != "format" else "its format is None"):
            RankingTask.from_pretrained(folder, tokenizer)
    whole = json.dumps(content)[:-1]
    for text in (f'{whole}, "x": {DEEP}', f'{whole}, "x": {"9" * 5000}}}', "[]", '"format"', "null"):
        path.write_text(text)
        with pytest.raises(ValueError, match="does not hold a readable task"):
            RankingTask.from_pretrained(folder, tokenizer)


@pytest.mark.parametrize("given", [None, "some/model"])
def test_names_in_place_of_a_tokenizer(given, folder):
    with pytest.raises(ValueError, match=f"`tokenizer` is a {type(given).__name__}: pass the model's tokenizer"):
        RankingTask.from_pretrained(folder, given)


def test_withdrawn_numbers_are_ids(tokenizer, template):
    """Else the number would be looked for among strings, and the item be recommended all the same."""
    catalog = ItemCatalog([4, 5, 6], ["Dune", "Emma", "Ulysses"])
    task = RankingTask(catalog, tokenizer, template, withdrawn=frozenset([5]))
    found = Recommender(make_model(tokenizer), task).recommend([["6"]], k=3)
    assert found.ids == [["4"]]


METADATA = {b"trl_msl_template": b"{text}"}


@pytest.mark.parametrize(
    ("content", "metadata", "message"),
    [
        (table(id=["1"], text=["x"]), None, "it has no template"),
        (table(id=["1"], text=["x"]), {b"trl_msl_template": b"\xff"}, "does not hold a readable"),
        (table(id=["1"], text=["x"]), {b"trl_msl_template": b"{item}"}, "exactly once"),
        (table(id=["1"], text=["x"]), {**METADATA, b"trl_msl_html_entities": b"?"}, "`html_entities` is '.'"),
        (table(id=["1"], title=["x"]), METADATA, "text"),
        (table(id=[1], text=["x"]), METADATA, "both strings, but has id: int64"),
        (table(id=[["1"]], text=["x"]), METADATA, "both strings"),
        (table(id=["1"], text=[b"x"]), METADATA, "both strings"),
        (table(id=["1", None], text=["x", "y"]), METADATA, "`ids` holds 1 of 2 .* such as None"),
        (table(id=["1", "2"], text=["x", None]), METADATA, "`texts` holds 1 value.*item '2'"),
        (table(id=["1"], text=NOT_UTF8), METADATA, "UTF8"),
        (table(id=pa.array([], pa.string()), text=pa.array([], pa.string())), METADATA, "0 and 0 entries"),
        (pa.table([["1"], ["x"], ["y"]], ["id", "text", "text"]), METADATA, "text|duplicate"),
    ],
)
def test_items_parquet(tmp_path, content, metadata, message):
    write(tmp_path / "items.parquet", content.replace_schema_metadata(metadata))
    with pytest.raises(ValueError, match=message):
        ItemCatalog.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("num_rows", "ids", "texts"),
    [
        (1000, [f"{index}" for index in range(1000)], ["x" * 1_000_000]),  # one text, in a dictionary
        (20, [f"{index}" for index in range(20)], [f"{index}" * 5_000_000 for index in range(20)]),
        (30_000_000, ["1"], ["x"]),
    ],
    ids=["one text", "zeros", "rows"],
)
def test_items_that_unpack_to_gigabytes(num_rows, ids, texts, tmp_path):
    """A small file is refused before it takes the memory."""
    columns = []
    for values in (ids, texts):
        indices = pa.array(np.minimum(np.arange(num_rows), len(values) - 1).astype(np.int32))
        columns.append(pa.DictionaryArray.from_arrays(indices, values))
    table = pa.table(columns, ["id", "text"]).replace_schema_metadata(METADATA)
    pq.write_table(table, tmp_path / "items.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "items.parquet").stat().st_size < 1_000_000
    run = subprocess.run([sys.executable, "-c", READ_ITEMS, str(tmp_path)], capture_output=True, text=True)
    *message, grown = run.stdout.splitlines()
    assert "does not hold a readable items.parquet" in message[-1] and "unpack" in message[-1]
    assert int(grown) < 300 << 20


READ_ITEMS = """
import resource, sys
from trl_msl import ItemCatalog

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(ItemCatalog.from_pretrained(sys.argv[1]))
except ValueError as error:
    print(error)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_items_of_thousands_of_tokens(tokenizer, template, tmp_path):
    """Memory grows with the square of an item's length, so a trie may not be as deep as its author likes."""
    with pytest.raises(ValueError, match=r"item 'b' takes 44[0-9]{2} tokens, but an item may take at most 4096"):
        RankingTask(ItemCatalog(["a", "b"], ["Dune", "Dune " * 2200]), tokenizer, template)
    ItemTrie.from_sequences([[1] * 60_000]).save_pretrained(tmp_path)
    ItemCatalog(["a"], ["Dune"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes 60000 tokens, but an item may take at most 4096"):
        RankingTask(ItemCatalog(["a"], ["Dune"]), tokenizer, template, trie=ItemTrie.from_pretrained(tmp_path))


def test_files_that_are_pipes_or_devices(saved, tmp_path):
    """A pipe has no end as long as nobody writes to it, and /dev/zero has none at all. Links to files are fine."""
    names = ["items.parquet", "trie.safetensors", "recommender.json", "model.safetensors", "adapter_config.json"]
    folders = []
    for name in names:
        for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
            folder = tmp_path / str(len(folders))
            folder.mkdir()
            for path in saved.iterdir():
                (folder / path.name).symlink_to(path)
            (folder / name).unlink(missing_ok=True)
            make(folder / name)
            folders.append((str(folder), name))
    command = [sys.executable, "-c", READ_ALL, json.dumps(folders)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    outcomes = json.loads(run.stdout.splitlines()[-1])
    assert len(outcomes) == 2 * (5 + 3 + 1 + 1)
    for name, outcome in outcomes:
        assert f"{name} is not a regular file" in outcome


READ_ALL = """
import json, sys
from trl_msl import ItemCatalog, ItemTrie, RankingTask, Recommender

outcomes = []
for folder, name in json.loads(sys.argv[1]):
    readers = [Recommender.from_pretrained]
    if "model" not in name and "adapter" not in name:
        readers.append(lambda path: RankingTask.from_pretrained(path, None))
    own = {"items.parquet": ItemCatalog, "trie.safetensors": ItemTrie}
    readers += [own[name].from_pretrained] if name in own else []
    for read in readers:
        try:
            outcomes.append([name, str(read(folder))])
        except ValueError as error:
            outcomes.append([name, str(error)])
print(json.dumps(outcomes))
"""


def test_links_to_files_are_followed(folder, tmp_path):
    """The Hub's cache consists of them."""
    (tmp_path / "snapshot").mkdir()
    for path in folder.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert Recommender.from_pretrained(tmp_path / "snapshot").recommend([["b0"]], k=1).ids


# ---------------------------------------------------------------------- paths


@pytest.mark.parametrize("where", ["../outside.safetensors", "{}/outside.safetensors", "sub/outside.safetensors"])
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_weights_outside_the_folder_are_not_read(where, name, folder, tmp_path, tokenizer, task):
    names = list(load_file(folder / "model.safetensors"))
    (folder / "sub").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "sub" / "outside.safetensors")
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, where.format(tmp_path))}
    (folder / name).write_text(json.dumps(index))
    adapter = make_adapter(tmp_path / "adapter", folder, tokenizer, task)
    for path in (folder, adapter):
        with pytest.raises(ValueError, match="names weights outside its folder, such as '.*outside.safetensors'"):
            Recommender.from_pretrained(path, variant="fp16" if "fp16" in name else None)


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "a/../../b", "a/..", "/etc/passwd", "/no/such", "no/such", "a\0b", "a\nb", "x" * 300, "~"],
)
def test_names_that_are_not_a_recommender(name):
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` = .* is not a folder, and can't be loaded"):
        Recommender.from_pretrained(name)


LOAD_ALL = """
import json, sys
from trl_msl import Recommender

outcomes = {}
for repo in sys.argv[1:]:
    try:
        outcomes[repo] = str(type(Recommender.from_pretrained(repo).model))
    except ValueError as error:
        outcomes[repo] = str(error)
print(json.dumps(outcomes))
"""


def test_a_repository_writes_nothing_outside_the_cache(tmp_path, saved):
    """It lists files by names that lead elsewhere, which `huggingface_hub` refuses."""
    outside = tmp_path / "evil"
    names = ["../../evil", f"{'../' * 30}{str(outside)[1:]}", str(outside), "sub/../../../../evil", "..\\evil"]
    good = {path.name: path.read_bytes() for path in saved.iterdir()}
    with serve() as hub:
        hub.repos = {f"some/evil{index}": {**good, name: b"evil"} for index, name in enumerate(names)}
        hub.repos["some/good"] = good
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
            "HF_HOME": str(tmp_path / "home"),
        }  # fmt: skip
        command = [sys.executable, "-c", LOAD_ALL, *hub.repos]
        run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    outcomes = json.loads(run.stdout.splitlines()[-1])
    assert "LlamaForCausalLM" in outcomes.pop("some/good")
    for outcome in outcomes.values():
        assert "can't be loaded from the Hub" in outcome and "evil" in outcome
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    found = [path for path in tmp_path.rglob("*evil*") if not path.is_dir()]
    assert all((tmp_path / "home" / "hub") in path.parents for path in found)


# ---------------------------------------------------------------------- code that comes with a model


@pytest.fixture
def no_questions(monkeypatch):
    """transformers asks at the terminal, for 15 seconds, where `trust_remote_code` is left out."""
    asked = []

    def answer(question=""):
        asked.append(question)
        return "no"

    monkeypatch.setattr(builtins, "input", answer)
    return asked


@pytest.fixture
def marker(tmp_path):
    """A file that hostile code would make."""
    return tmp_path / "marker"


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def add_code(folder, marker, name, model_type):
    """Let config.json or tokenizer_config.json name classes of a file that runs when it is imported."""
    classes = "LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nfrom transformers import {classes}\n")
    tokenizer = {"AutoTokenizer": ["evil.T", "evil.T"]}
    changes = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", **tokenizer}}
    if name == "config.json":
        changes["model_type"] = model_type
    else:
        known = "PreTrainedTokenizerFast"
        changes |= {"auto_map": tokenizer, "tokenizer_class": "T" if model_type == "evil" else known}
    edit(folder / name, **changes)


def make_adapter(path, base, tokenizer, task):
    model = get_peft_model(make_model(tokenizer), LoraConfig(task_type="CAUSAL_LM"))
    Recommender(model, task).save_pretrained(path)
    edit(path / "adapter_config.json", base_model_name_or_path=str(base))
    return path


@pytest.mark.parametrize("model_type", ["llama", "evil"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_model_is_not_run(name, model_type, folder, marker, no_questions):
    add_code(folder, marker, name, model_type)
    if model_type == "evil":  # a model or tokenizer that transformers does not know
        with pytest.raises(ValueError, match="contains custom code which must be executed"):
            Recommender.from_pretrained(folder)
    else:
        assert Recommender.from_pretrained(folder).recommend([["b0"]], k=1).ids
    assert not marker.exists() and not no_questions


def test_code_beside_the_base_model_of_an_adapter_is_not_run(folder, tmp_path, tokenizer, task, marker, no_questions):
    add_code(folder, marker, "config.json", "evil")
    adapter = make_adapter(tmp_path / "adapter", folder, tokenizer, task)
    with pytest.raises(ValueError, match="contains custom code which must be executed"):
        Recommender.from_pretrained(adapter)
    assert not marker.exists() and not no_questions


def test_code_is_run_where_it_is_asked_for(folder, marker):
    """So the tests above can fail. In a process of its own, as transformers remembers classes of such code."""
    add_code(folder, marker, "config.json", "evil")
    code = "import sys; from trl_msl import Recommender as R; R.from_pretrained(sys.argv[1], trust_remote_code=True)"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True, timeout=200)
    assert marker.exists()


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_pickles_are_not_run(save, folder, tmp_path, marker, tokenizer, task):
    adapter = make_adapter(tmp_path / "adapter", shutil.copytree(folder, tmp_path / "base"), tokenizer, task)
    for path, weights in ((folder, "model"), (adapter, "adapter_model")):
        (path / f"{weights}.safetensors").unlink()
        save(Hostile(marker), path / "pytorch_model.bin")
        save(Hostile(marker), path / "adapter_model.bin")
        with pytest.raises(ValueError, match="AutoModelForCausalLM can't load"):
            Recommender.from_pretrained(path)
        save(Hostile(marker), path / f"{weights}.safetensors")
        with pytest.raises(ValueError, match="AutoModelForCausalLM can't load .*SafetensorError"):
            Recommender.from_pretrained(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists()  # it would have been


def test_pickles_in_a_parquet_file_are_not_run(tmp_path, marker):
    """By an extension type of Arrow, which old versions unpickled."""
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    extension[b"ARROW:extension:metadata"] = pickle.dumps(Hostile(marker))
    field = pa.field("item_id", pa.string(), metadata=extension)
    content = pa.table([["1"], ["x"]], schema=pa.schema([field, ("title", pa.string())]))
    assert read_items(write(tmp_path / "items.parquet", content)).texts == ["x"]
    assert not marker.exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", DEEP.encode()])
def test_damaged_files_of_the_model(name, content, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="can't load .* Check that its files are complete"):
        Recommender.from_pretrained(folder)


def test_models_that_cannot_be_made(folder):
    """transformers raises an ImportError for a quantisation that is not installed, a RuntimeError for other sizes."""
    content = (folder / "config.json").read_text()
    edit(folder / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ValueError, match="AutoModelForCausalLM can't load .*ImportError"):
        Recommender.from_pretrained(folder)
    (folder / "config.json").write_text(content)
    edit(folder / "config.json", vocab_size=77)
    with pytest.raises(ValueError, match="AutoModelForCausalLM can't load .*RuntimeError"):
        Recommender.from_pretrained(folder)


def test_an_adapter_without_its_base_model(tmp_path, tokenizer, task):
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "gone", tokenizer, task)
    with pytest.raises(ValueError, match="adapter_config.json names '.*gone' as .* there is no such folder .* merge"):
        Recommender.from_pretrained(adapter)
