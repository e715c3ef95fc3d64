# SPDX-License-Identifier: Apache-2.0
"""
Every loader of files, fed with files that are damaged, spliced and made up: the outcome is a value or a `ValueError`.

The parsers below are partly native code, where a defect ends the interpreter: pytest's exit code tells. A long run,
with counts and peak memory:

    FUZZ_EXAMPLES=12000 FUZZ_REPORT=fuzz.json python -m pytest -q tests/test_fuzz.py; echo $?
"""

import csv
import io
import json
import os
import resource
from collections import Counter, defaultdict
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from trl_msl import ItemCatalog, ItemTrie, RankingTask, read_interactions, read_windows
from trl_msl.data import read_items
from trl_msl.data.catalog import is_unicode
from trl_msl.trie.arrays import _checksum


FEW = 100
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", FEW))
COUNTS = defaultdict(Counter)


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    if path := os.environ.get("FUZZ_REPORT"):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        Path(path).write_text(json.dumps({"loaders": COUNTS, "peak_MiB": round(peak)}, indent=1))


def fuzz(test):
    quiet = list(HealthCheck)
    return settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES == FEW, suppress_health_check=quiet
    )(given(st.data())(test))


# ---------------------------------------------------------------------- values and files that are made up

TEXT = st.text(st.characters(exclude_categories=()), max_size=8) | st.sampled_from(
    [
        "",
        "1",
        "b0",
        "\ud800",
        "\0",
        "\n",
        '"',
        "'",
        ",",
        "{text}",
        "{history}",
        "nan",
        "None",
        "\u202e",
        "🚀",
        "x" * 999,
    ]
)
NUMBER = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, float("nan"), float("inf")])
)
TREE = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
DEEP = st.sampled_from(["[", '{"a":', "-", "(", "not ", "{", "1+"]).map(lambda token: token * 20_000)
LIST = st.lists(st.integers(-5, 99) | TEXT, max_size=4)
CELL = (
    TEXT
    | NUMBER.filter(lambda number: abs(number) < 10**300 or isinstance(number, float)).map(str)
    | LIST.map(str)
    | LIST.map(json.dumps)
    | TREE.map(json.dumps)
    | DEEP
    | st.sampled_from(["2020-01-01", "0001-01-01", "9" * 400, "9" * 5000, "1e999", "[1, 2]", '["b0", "b1"]', "b0"])
)
SANE = {
    "user_id": (["1", "007", "a b", "🚀"], pa.string()),
    "item_id": (["1", "2", "007", "b0"], pa.string()),
    "title": (["Dune", "Emma", 'She said "No"', ""], pa.string()),
    "timestamp": (["1", "2", "1.5", "-7"], pa.float64()),
    "item_ids": (["[1, 2]", "[3, 4, 5]", "['a', 'b']", '["b0", "b1"]'], pa.list_(pa.string())),
    "id": (["1", "2", "3", "b0"], pa.string()),
    "text": (["Dune", "Emma", "x", "🚀"], pa.string()),
}
COLUMNS = ["user_id", "item_id", "item_ids", "timestamp", "title", "id", "text", "exact", ""]


@st.composite
def csv_files(draw, columns):
    """Cells written as they are, or quoted where that is needed."""
    header = draw(st.just(columns) | st.lists(st.sampled_from(COLUMNS) | TEXT, max_size=5))
    width = draw(st.just(len(header)) | st.integers(0, 5))
    rows, wild = [header], draw(st.sampled_from([0, 5, 50]))  # percent of the cells
    for _ in range(draw(st.integers(0, 4))):
        kinds = [SANE.get(name, (["1"], None))[0] for name in header[:width]] + [["1"]] * (width - len(header))
        rows.append([draw(CELL if draw(st.integers(0, 99)) < wild else st.sampled_from(kind)) for kind in kinds])
    file = io.StringIO()
    if draw(st.booleans()):
        csv.writer(file, escapechar="\\").writerows(rows)
    else:
        file.write("\n".join(",".join(row) for row in rows))
    return file.getvalue().encode(errors=draw(st.sampled_from(["surrogatepass", "replace"])))


ARROW = [
    *(pa.int8(), pa.int64(), pa.uint64(), pa.float32(), pa.float64(), pa.bool_(), pa.null(), pa.date32(), pa.date64()),
    *(pa.timestamp("s"), pa.timestamp("ms"), pa.timestamp("ns", "UTC"), pa.time64("us"), pa.duration("ms")),
    *(pa.string(), pa.large_string(), pa.binary(), pa.binary(3), pa.decimal128(38, 3)),
    *(pa.list_(pa.string()), pa.list_(pa.int64()), pa.list_(pa.float64()), pa.list_(pa.list_(pa.string()))),
    *(pa.struct([("a", pa.int64())]), pa.map_(pa.string(), pa.int64()), pa.dictionary(pa.int32(), pa.string())),
]


@st.composite
def arrow_arrays(draw, length, column):
    """Values of the usual or a random type, some of them missing, texts that are not UTF-8 among them."""
    sane, kind = SANE.get(column, (["1"], pa.string()))
    if draw(st.integers(0, 3)):
        texts = draw(st.lists(st.sampled_from(sane), min_size=length, max_size=length))
        if kind == pa.string():
            return pa.array(texts)
        return pa.array([float(text) for text in texts] if kind == pa.float64() else [["b0", "b1"]] * length, kind)
    kind = draw(st.sampled_from(ARROW))
    name = str(kind)
    if name in ("string", "large_string") and draw(st.booleans()):
        offsets = np.arange(length + 1, dtype=np.int32)
        data = draw(st.binary(min_size=length, max_size=length))
        return pa.StringArray.from_buffers(length, pa.py_buffer(offsets), pa.py_buffer(data))
    value = st.none() | st.integers(-3, 3) | NUMBER | TEXT | st.binary(max_size=4) | LIST | st.dates()
    values = draw(st.lists(value | st.just("b0") | st.just(["b0", "b1"]), min_size=length, max_size=length))
    array = []
    for one in values:
        try:
            pa.array([one], kind)
            array.append(one)
        except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
            array.append(None)
    return pa.array(array, kind)


@st.composite
def parquet_files(draw, columns):
    """A table of random types and with random options, which may have the `columns` that are looked for."""
    length = draw(st.integers(0, 4))
    names = draw(st.just(columns) | st.lists(st.sampled_from(COLUMNS), max_size=5))
    table = pa.table([draw(arrow_arrays(length, name)) for name in names], names)
    table = table.replace_schema_metadata(
        draw(st.sampled_from([None, {"trl_msl_template": "{text}"}, {"pandas": "{}"}]))
    )
    file = io.BytesIO()
    try:
        pq.write_table(
            table, file, compression=draw(st.sampled_from(["none", "snappy", "zstd", "gzip"])),
            use_dictionary=draw(st.booleans()), version=draw(st.sampled_from(["1.0", "2.6"])),
            data_page_version=draw(st.sampled_from(["1.0", "2.0"])), store_schema=draw(st.booleans()),
        )  # fmt: skip
    except (pa.ArrowException, ValueError):  # of nothing, or of types that Parquet has no name for
        return b""
    return file.getvalue()


@st.composite
def json_files(draw, content):
    """`content` with a value somewhere in it replaced or removed, or another tree."""
    tree = json.loads(content)
    if not isinstance(tree, dict) or draw(st.integers(0, 3)) == 0:
        return json.dumps(draw(TREE)).encode()
    for _ in range(draw(st.integers(1, 3))):
        place = tree
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys)) if keys else None
            if key is None or not isinstance(place[key], dict | list) or draw(st.booleans()):
                break
            place = place[key]
        if key is not None and draw(st.booleans()):
            del place[key]
        elif isinstance(place, dict):
            place[draw(TEXT) if key is None else key] = draw(TREE)
        else:
            place.append(draw(TREE))
    return json.dumps(tree).encode()


@st.composite
def damaged(draw, content, others):
    """Bytes cut, flipped, repeated, overwritten, or replaced by those of a file of another format."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        start, end = sorted(draw(st.integers(0, len(content))) for _ in range(2))
        how = draw(st.sampled_from(["cut", "keep", "flip", "flip", "number", "splice", "repeat", "bytes"]))
        if how == "flip" and content:
            content[min(start, len(content) - 1)] ^= 1 << draw(st.integers(0, 7))
        elif how == "number":
            value = draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]))
            content[start : start + 8] = value.to_bytes(8, "little")
        elif how == "splice":
            other = draw(st.sampled_from(others))
            low, high = sorted(draw(st.integers(0, len(other))) for _ in range(2))
            content[start:end] = other[low:high]
        elif how == "bytes":
            content[start:end] = draw(st.binary(max_size=64))
        else:
            part = content[start:end]
            content = {"cut": content[:start] + content[end:], "keep": part, "repeat": content + part * 3}.get(
                how, content
            )
    return bytes(content)


# ---------------------------------------------------------------------- seeds: one whole file of each kind


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, tokenizer, catalog, template):
    folder = tmp_path_factory.mktemp("seeds")
    RankingTask(catalog, tokenizer, template, withdrawn=frozenset(["b1"])).save_pretrained(folder)
    (folder / "items.json").write_text(json.dumps(dict(zip(catalog.ids, catalog.texts))))
    items = pd.DataFrame({"item_id": catalog.ids, "title": catalog.texts})
    log = pd.DataFrame({"user_id": range(6), "item_id": catalog.ids[:6], "timestamp": range(6)})
    users = pd.DataFrame({"user_id": range(3), "item_ids": [["b0", "b1"], ["b2"], ["b3", "b4", "b5"]]})
    windows = pd.DataFrame({"user_id": range(4), "item_ids": ["[1, 2, 3]", "['a', 'b']"] * 2, "timestamp": range(4)})
    for name, table in (("items", items), ("log", log), ("users", users), ("windows", windows)):
        table.to_parquet(folder / f"table_{name}.parquet")
        if name == "users":
            table["item_ids"] = table["item_ids"].map(json.dumps)
        table.to_csv(folder / f"{name}.csv", index=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed")


def outcome(loader, load, *arguments):
    """What `load` returns, `None` where it raises a `ValueError`; anything else that it raises is a defect."""
    try:
        value = load(*arguments)
    except ValueError as error:
        stopped = any(text in str(error) for text in ("checksum differs", "is damaged, or does not belong"))
        COUNTS[loader]["ValueError, by a checksum" if stopped else "ValueError"] += 1
        return None
    COUNTS[loader]["value"] += 1
    return value


def check_catalog(catalog):
    assert len(catalog.ids) == len(catalog.texts) == len(set(catalog.ids)) > 0
    assert all(isinstance(text, str) and is_unicode(text) for text in catalog.ids + catalog.texts + [catalog.template])


def check_trie(trie):
    assert trie.is_leaf(trie.item_nodes.long()).any() and trie.paths(trie.item_nodes).shape[1] == trie.depth


def check_table(table):
    assert len(table) and all(isinstance(text, str) and text for text in [*table["user_id"], *table["item_id"]])
    assert np.isfinite(table["timestamp"]).all() and table["user_id"].is_monotonic_increasing


def read_users(path):
    from trl_msl.scripts import users

    return users.read_users(users.UserArguments(path))[0]


def check_users(users):
    assert len(users) and all(isinstance(item, str) for items in users["item_ids"] for item in items)


# ---------------------------------------------------------------------- the loaders


TABLES = {
    "read_items": ("items", ["item_id", "title"], read_items, check_catalog),
    "read_interactions": ("log", ["user_id", "item_id", "timestamp"], read_interactions, check_table),
    "read_users": ("users", ["user_id", "item_ids"], read_users, check_users),
}


@pytest.mark.parametrize("loader", TABLES)
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@fuzz
def test_tables(loader, suffix, seeds, folder, data):
    name, columns, load_table, check = TABLES[loader]
    make = csv_files if suffix == "csv" else parquet_files
    content = seeds[f"{name}.csv" if suffix == "csv" else f"table_{name}.parquet"]
    if data.draw(st.booleans()):
        content = data.draw(make(columns))
    if data.draw(st.booleans()) or content in seeds.values():
        content = data.draw(damaged(content, list(seeds.values())))
    path = folder / f"{name}.{suffix}"
    path.write_bytes(content)
    found = outcome(f"{loader} {suffix}", load_table, str(path))
    if found is not None:
        check(found)


@fuzz
def test_windows(seeds, folder, data):
    for name in ("train", "test"):
        content = data.draw(
            csv_files(["user_id", "item_ids", "timestamp"]) | damaged(seeds["windows.csv"], [*seeds.values()])
        )
        (folder / f"{name}.csv").write_bytes(content)
        (folder / "whole.csv").write_bytes(seeds["windows.csv"])
        files = {"train_file": "whole.csv", "test_file": "whole.csv"} | {f"{name}_file": f"{name}.csv"}
        windows = outcome("read_windows", lambda files=files: read_windows(folder, validation_fraction=0.5, **files))
        for split in windows or ():
            assert all(len(items) > 1 for items in windows[split][:]["item_ids"])


@fuzz
def test_json_items(seeds, folder, data):
    whole = seeds["items.json"]
    content = data.draw(json_files(whole) | damaged(whole, list(seeds.values())) | DEEP.map(str.encode))
    (folder / "items.json").write_bytes(content)
    for loader, load_items in (("ItemCatalog.from_json", ItemCatalog.from_json), ("read_items json", read_items)):
        found = outcome(loader, load_items, str(folder / "items.json"))
        if found is not None:
            check_catalog(found)


@fuzz
def test_stored_items(seeds, folder, data):
    content = data.draw(damaged(seeds["items.parquet"], list(seeds.values())) | parquet_files(["id", "text"]))
    (folder / "items.parquet").write_bytes(content)
    found = outcome("ItemCatalog.from_pretrained", ItemCatalog.from_pretrained, folder)
    if found is not None:
        check_catalog(found)


@st.composite
def tries(draw, content):
    """The arrays of a trie with bytes changed, of other types and lengths, with the checksum that they should have."""
    arrays = dict(sorted(load(content).items()))
    for name in draw(st.lists(st.sampled_from(list(arrays)), max_size=2, unique=True)):
        raw = draw(damaged(arrays[name].tobytes(), [array.tobytes() for array in arrays.values()]))
        kind = draw(
            st.sampled_from([arrays[name].dtype] * 8 + [np.dtype(other) for other in ("u1", "<i8", "<f4", "<i4")])
        )
        arrays[name] = np.frombuffer(raw[: len(raw) // kind.itemsize * kind.itemsize], kind)
    vocab_size = draw(st.sampled_from([400, 400, 400, 2**24, 0, -1, 2**63, 10**30]))
    header = {"format": "3", "vocab_size": str(vocab_size), "sha256": _checksum(arrays, vocab_size)}
    if draw(st.integers(0, 9)) == 0:
        header[draw(st.sampled_from(sorted(header)))] = draw(TEXT.filter(is_unicode))
    return save(arrays, header)


@fuzz
def test_tries(seeds, folder, data):
    whole = seeds["trie.safetensors"]
    content = data.draw(damaged(whole, list(seeds.values())) | tries(whole) | tries(whole))
    (folder / "trie.safetensors").write_bytes(content)
    found = outcome("ItemTrie.from_pretrained", ItemTrie.from_pretrained, folder)
    if found is not None:
        check_trie(found)


def trie_checksum(content):
    """What the header of a trie's file says of its content."""
    length = int.from_bytes(content[:8], "little")
    try:
        return json.loads(content[8 : 8 + length])["__metadata__"]["sha256"]
    except (KeyError, TypeError, ValueError):
        return None


@fuzz
def test_tasks(seeds, tmp_path_factory, tokenizer, folder, data):
    """Any of the three files changed; most often with the checksums made to fit, so that they protect nothing."""
    files = {name: seeds[name] for name in ("items.parquet", "trie.safetensors", "recommender.json")}
    for name in data.draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=2, unique=True)):
        makers = {"items.parquet": parquet_files(["id", "text"]), "trie.safetensors": tries(files["trie.safetensors"])}
        make = makers.get(name, json_files(files["recommender.json"]))
        files[name] = data.draw(make | make | damaged(files[name], list(seeds.values())))
    if data.draw(st.integers(0, 4)):
        try:
            content = json.loads(files["recommender.json"])
            content["sha256"] = {"items.parquet": sha256(files["items.parquet"]).hexdigest()}
            content["sha256"]["trie.safetensors"] = trie_checksum(files["trie.safetensors"])
            files["recommender.json"] = json.dumps(content).encode()
        except (TypeError, ValueError):  # it is not an object
            pass
    for name, content in files.items():
        (folder / name).write_bytes(content)
    found = outcome("RankingTask.from_pretrained", RankingTask.from_pretrained, folder, tokenizer)
    if found is not None:
        check_catalog(found.catalog)
        check_trie(found.trie)
        assert found.withdrawn <= set(found.catalog.ids) and found.trie.num_items == len(found.catalog)
