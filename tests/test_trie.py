# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from trl_msl import ItemTrie
from trl_msl.trie import subset
from trl_msl.trie.arrays import _checksum


VOCAB_SIZE = 7
END = VOCAB_SIZE  # one more than the tokens of the texts
sequences_with_end = st.lists(
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6).map(lambda s: [*s, END]), min_size=1, max_size=30
)
any_sequences = st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=6), min_size=1, max_size=30)


class DictTrie:
    """The slow, obvious trie: nested dictionaries."""

    def __init__(self, sequences):
        self.root = {}
        for sequence in sequences:
            node = self.root
            for token in sequence:
                node = node.setdefault(token, {})

    def valid_tokens(self, prefix):
        node = self.root
        for token in prefix:
            node = node[token]
        return sorted(node)


@given(any_sequences)
def test_valid_tokens_equal_those_of_a_dict_trie(sequences):
    trie, reference = ItemTrie.from_sequences(sequences), DictTrie(sequences)
    for sequence in sequences:
        nodes = [0, *trie.walk(torch.tensor(sequence)).tolist()]
        assert min(nodes) >= 0
        rows, tokens = trie.valid_tokens(torch.tensor(nodes))
        for place in range(len(nodes)):
            assert tokens[rows == place].tolist() == reference.valid_tokens(sequence[:place])
            assert [int(trie.tokens(torch.tensor(c))) for c in trie.children(nodes[place])] == reference.valid_tokens(
                sequence[:place]
            )


@given(any_sequences)
def test_nodes_are_numbered_breadth_first_with_siblings_by_token(sequences):
    trie = ItemTrie.from_sequences(sequences)
    prefixes = {tuple(s[:n]) for s in sequences for n in range(1, len(s) + 1)}
    expected = sorted(prefixes, key=lambda p: (len(p), p))
    assert trie.num_nodes == len(expected) + 1
    for node, prefix in enumerate(expected, start=1):
        assert trie.walk(torch.tensor(prefix))[-1] == node
        path = trie.paths(torch.tensor([node]))[0]
        assert trie.tokens(path).tolist() == list(prefix)
        assert trie.num_valid_tokens(torch.tensor(node)) == len({p for p in prefixes if p[:-1] == prefix[:-1]} - {()})


@given(any_sequences, st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6), max_size=10))
def test_find_gives_the_node_of_whole_items_only(sequences, others):
    trie = ItemTrie.from_sequences(sequences)
    assert torch.equal(trie.find(sequences), trie.item_nodes.long())
    for other, node in zip(others, trie.find(others).tolist()):
        items = [index for index, sequence in enumerate(sequences) if sequence == other]
        assert (node >= 0) == bool(items)
        if items:
            assert trie.items(node) == items


@given(sequences_with_end)
def test_items_are_leaves_when_sequences_end_with_an_end_token(sequences):
    trie = ItemTrie.from_sequences(sequences)
    assert trie.is_leaf(trie.item_nodes.long()).all()
    assert trie.depth == max(map(len, sequences))
    assert trie.item_lengths.tolist() == list(map(len, sequences))
    padded = torch.full((len(sequences), trie.depth + 2), END)  # padding by the end token, as where pad == eos
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = torch.tensor(sequence)
    assert torch.equal(trie.reached(padded), trie.item_nodes.long())


@given(any_sequences)
def test_dense_mask_and_average_valid_tokens(sequences):
    trie, reference = ItemTrie.from_sequences(sequences, vocab_size=10), DictTrie(sequences)
    counts = [len(reference.valid_tokens(s[:place])) for s in sequences for place in range(len(s))]
    assert math.isclose(trie.average_valid_tokens(trie.item_nodes), sum(counts) / len(counts))
    nodes = torch.arange(-1, trie.num_nodes)
    mask = trie.valid_mask(nodes)
    assert mask.shape == (len(nodes), 10)
    assert not mask[0].any()  # off the trie
    assert torch.equal(mask.sum(dim=1)[1:], trie.num_children(nodes[1:]).long())


def test_statistics():
    trie = ItemTrie.from_sequences([[1, 2, 9], [1, 3, 9], [1, 9]])
    assert trie.statistics() == [
        {"depth": 0, "nodes": 1, "branching_nodes": 0, "items": 0, "mean_children": 1.0, "max_children": 1},
        {"depth": 1, "nodes": 1, "branching_nodes": 1, "items": 0, "mean_children": 3.0, "max_children": 3},
        {"depth": 2, "nodes": 3, "branching_nodes": 0, "items": 1, "mean_children": 2 / 3, "max_children": 1},
        {"depth": 3, "nodes": 2, "branching_nodes": 0, "items": 2, "mean_children": 0.0, "max_children": 0},
    ]
    assert trie.first_branching_node == 1  # the root has one child, as where every title begins with a quote


@given(any_sequences, st.data())
def test_a_subset_is_the_trie_of_its_items(sequences, data):
    trie = ItemTrie.from_sequences(sequences, VOCAB_SIZE)
    items = data.draw(st.lists(st.integers(0, len(sequences) - 1), min_size=1, unique=True))
    part, nodes = subset(trie, torch.tensor(items))
    expected = ItemTrie.from_sequences([sequences[item] for item in items], VOCAB_SIZE)
    for name in ("first_child", "edges", "item_nodes"):
        assert torch.equal(getattr(part, name), getattr(expected, name))
    assert nodes[0] == 0
    for sequence in sequences:  # every node by its path
        assert nodes[trie.walk(torch.tensor(sequence))].tolist() == part.walk(torch.tensor(sequence)).tolist()


def test_a_subset_needs_an_item():
    with pytest.raises(ValueError, match="`items` is empty: a trie needs at least one item"):
        subset(ItemTrie.from_sequences([[1]]), torch.tensor([], dtype=torch.int64))


def test_single_item_has_no_branching_node():
    assert ItemTrie.from_sequences([[3, 4]]).first_branching_node == -1


def test_child_of_unknown_tokens_and_nodes_is_minus_one():
    trie = ItemTrie.from_sequences([[1, 2], [1, 3]], vocab_size=4)
    nodes, tokens = torch.tensor([0, 0, 1, 1, -1, 1, 3]), torch.tensor([1, 0, 3, 4, 1, -1, 0])
    assert trie.child(nodes, tokens).tolist() == [1, -1, 3, -1, -1, -1, -1]


def test_vocabulary_of_a_million_and_an_array_of_sequences():
    array = np.array([[999_999, 0], [999_999, 5]])
    trie = ItemTrie.from_sequences(array, vocab_size=1_000_000)
    assert trie.tokens(trie.paths(trie.item_nodes)).tolist() == array.tolist()
    assert trie.find(array.tolist()).tolist() == trie.item_nodes.tolist()


@settings(deadline=None)
@given(any_sequences)
def test_save_and_load(tmp_path_factory, sequences):
    folder = tmp_path_factory.mktemp("trie")
    trie = ItemTrie.from_sequences(sequences, vocab_size=123)
    trie.save_pretrained(folder)
    loaded = ItemTrie.from_pretrained(folder)
    for name in ("first_child", "edges", "item_nodes"):
        assert torch.equal(getattr(loaded, name), getattr(trie, name))
    assert loaded.vocab_size == 123
    assert [path.name for path in folder.iterdir()] == ["trie.safetensors"]
    assert trie.find(sequences).tolist() == loaded.find(sequences).tolist()


def test_copies_and_pickles_hold_the_trie_and_nothing_derived():
    import pickle

    from datasets.fingerprint import Hasher

    trie = ItemTrie.from_sequences([[1, 2], [3]])
    before = Hasher.hash(trie)
    trie.find([[3]]), trie.depth, trie.items(2)
    meta = trie.to("meta")
    assert meta is trie.to("meta")
    assert meta.to("cpu") is trie.to("cpu:0") is trie
    assert Hasher.hash(trie) == before
    assert torch.equal(pickle.loads(pickle.dumps(trie)).edges, trie.edges)


def test_nothing_to_load(tmp_path):
    with pytest.raises(ValueError, match="does not hold a readable trie.safetensors .*is missing"):
        ItemTrie.from_pretrained(tmp_path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_files_are_an_error(tmp_path_factory, data):
    """Cut, with a bit flipped, or replaced: never a crash, never another trie than the one saved."""
    folder = tmp_path_factory.mktemp("trie")
    trie = ItemTrie.from_sequences([[1, 2], [3], [1, 4, 5]])
    trie.save_pretrained(folder)
    path = folder / "trie.safetensors"
    content = bytearray(path.read_bytes())
    damage = data.draw(st.sampled_from(["cut", "flip", "replace"]))
    if damage == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif damage == "flip":
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        content = data.draw(st.binary(max_size=200))
    path.write_bytes(content)
    try:
        loaded = ItemTrie.from_pretrained(folder)
    except ValueError as error:
        assert "does not hold a readable trie.safetensors" in str(error)
    else:  # a flip may only touch how the header is written
        assert torch.equal(loaded.edges, trie.edges) and torch.equal(loaded.item_nodes, trie.item_nodes)


@settings(max_examples=300, deadline=None)
@given(any_sequences, st.data())
def test_arrays_of_an_adversary_are_a_trie_or_an_error(tmp_path_factory, sequences, data):
    """Numbers changed, and the checksum made to fit: what is read is a trie all the same, or an error."""
    folder = tmp_path_factory.mktemp("trie")
    ItemTrie.from_sequences(sequences).save_pretrained(folder)
    path = folder / "trie.safetensors"
    arrays = load_file(path)
    for _ in range(data.draw(st.integers(1, 3))):
        array = arrays[data.draw(st.sampled_from(sorted(arrays)))]
        value = data.draw(st.integers(-3, 60) | st.integers(0, 2**27) | st.sampled_from([1 << 24, 1 << 25, 3 << 24]))
        array[data.draw(st.integers(0, len(array) - 1))] = np.int64(value).astype(array.dtype)
    vocab_size = data.draw(st.sampled_from([-1, 0, 1, 50, 123, 2**24, 2**40]))
    header = {"format": "3", "vocab_size": str(vocab_size), "sha256": _checksum(arrays, vocab_size)}
    save_file(arrays, path, metadata=header)
    try:
        loaded = ItemTrie.from_pretrained(folder)
    except ValueError as error:
        assert "does not hold a readable trie.safetensors" in str(error)
    else:
        paths = loaded.paths(loaded.item_nodes)
        sequences = [loaded.tokens(path[path >= 0]).tolist() for path in paths]
        rebuilt = ItemTrie.from_sequences(sequences, vocab_size=loaded.vocab_size)
        for name in ("first_child", "edges", "item_nodes"):
            assert torch.equal(getattr(loaded, name), getattr(rebuilt, name))


ONE_ITEM = np.array([1 << 24, 1 << 25], np.uint32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"nodes": np.zeros(3, np.int64), "item_nodes": np.ones(1, np.int32)}, "`nodes` is int64"),
        ({"nodes": np.zeros((3, 3), np.uint32), "item_nodes": np.ones(1, np.int32)}, "`nodes` is uint32"),
        ({"nodes": np.zeros(3, np.uint32)}, "item_nodes"),
        ({"nodes": np.zeros(3, np.uint32), "item_nodes": np.ones(1, np.int32)}, "`nodes` are not a trie"),
        ({"nodes": ONE_ITEM, "item_nodes": np.ones(0, np.int32)}, "`item_nodes` is int32"),
        ({"nodes": ONE_ITEM, "item_nodes": np.full(1, 2, np.int32)}, "outside the trie"),
    ],
)
def test_foreign_arrays(arrays, message, tmp_path):
    header = {"format": "3", "vocab_size": "9", "sha256": _checksum(arrays, 9)}
    save_file(arrays, tmp_path / "trie.safetensors", metadata=header)
    with pytest.raises(ValueError, match=message):
        ItemTrie.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("sequences", "vocab_size", "message"),
    [
        ([], None, "`sequences` is empty"),
        ([[1], [], [2]], None, "1 empty sequence.*index 1"),
        ([[1, -2]], None, "token ids from -2 to 1"),
        ([[1, 8]], 8, "token ids from 1 to 8.*`vocab_size` - 1 = 7"),
    ],
)
def test_bad_sequences(sequences, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        ItemTrie.from_sequences(sequences, vocab_size)


@pytest.mark.parametrize(("name", "expected"), [("amazon_books", 70.90), ("amazon_office", 8.97)])
def test_average_valid_tokens_of_the_papers_data(shared, name, expected):
    """Table 4 of the MSL paper: Llama-3 tokenizer, `"title"` and EOS, targets of train_10000."""
    from transformers import AutoTokenizer

    from trl_msl import ItemCatalog, read_windows

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/llama3")
    folder = shared / "data" / name
    catalog = ItemCatalog.from_json(folder / "id2name4Rec.json", template='"{text}"', empty_texts="keep")
    trie = catalog.build_trie(tokenizer)
    windows = read_windows(folder, train_file="train_10000.csv")
    targets = [ids[-1] for split in ("train", "validation") for ids in windows[split]["item_ids"]]
    assert len(targets) == 10_000
    assert round(trie.average_valid_tokens(trie.item_nodes[catalog.indices(targets)]), 2) == expected


def test_find_of_tokens_off_the_vocabulary_and_of_nothing():
    trie = ItemTrie.from_sequences([[1, 2**24 - 1], [3]])
    assert trie.find([[1, 2**24], [1, -1], [3], [], [1, 2**24 - 1]]).tolist() == [-1, -1, *trie.find([[3]]), -1, 2 + 1]
    assert trie.find([]).tolist() == []
