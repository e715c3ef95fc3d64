# SPDX-License-Identifier: Apache-2.0
"""
Building a trie from token sequences, saving and loading it, against a trie of Python dicts.

The sequences are lists of ints, as a tokenizer gives them; `_array` is for a NumPy array of the same. They are made up
with the prefixes and branching of Book titles: see `catalogs.generate_sequences`. And the paper's own titles (Table 7)
where they are at hand.
"""

import tempfile

from catalogs import VOCAB_SIZE, generate_sequences, load_titles
from timing import summarize, time_calls

from trl_msl import ItemTrie


LENGTH = 12  # tokens, end token included; Book titles have 12.2 on average


def benchmark_trie_build() -> dict:
    """Time and size of tries of 23,000 and of 1,000,000 items; see the module's docstring."""
    results = {"tokens_per_item": LENGTH, "vocab_size": VOCAB_SIZE}
    for name, num_items, rounds in (("23k", 23_000, 9), ("1m", 1_000_000, 2)):
        array = generate_sequences(num_items, LENGTH)
        sequences = array.tolist()
        functions = {
            f"trie_build_{name}": lambda rows=sequences: ItemTrie.from_sequences(rows, VOCAB_SIZE),
            f"trie_build_{name}_array": lambda rows=array: ItemTrie.from_sequences(rows, VOCAB_SIZE),
        }
        if name == "23k":  # a million items would take gigabytes
            functions[f"trie_build_{name}_python"] = lambda rows=sequences: build_dict_trie(rows)
        results |= summarize(time_calls(functions, rounds))
        trie = ItemTrie.from_sequences(array, VOCAB_SIZE)
        results[f"trie_build_{name}_mb"] = sum(a.nbytes for a in (trie.first_child, trie.edges, trie.item_nodes)) / 1e6
        results[f"trie_{name}_nodes_per_item"] = trie.num_nodes / num_items
        results |= _benchmark_storage(sequences, name, rounds=1 if name == "1m" else 3)
    for name, sequences in load_titles().items():
        functions = {
            f"trie_build_{name}": lambda rows=sequences: ItemTrie.from_sequences(rows, VOCAB_SIZE),
            f"trie_build_{name}_python": lambda rows=sequences: build_dict_trie(rows),
        }
        results |= summarize(time_calls(functions, rounds=9))
    results["trie_build_23k_vs_python"] = results["trie_build_23k_python_s"] / results["trie_build_23k_s"]
    return results


def build_dict_trie(sequences: list[list[int]]) -> dict:
    """The usual trie: a dict per node, from token to child."""
    root = {}
    for sequence in sequences:
        node = root
        for token in sequence:
            node = node.setdefault(token, {})
    return root


def _benchmark_storage(sequences: list[list[int]], name: str, rounds: int) -> dict:
    """Looking all items up, saving and loading. The index behind them is made at first use, so each has a new trie."""
    tries = [ItemTrie.from_sequences(sequences, VOCAB_SIZE) for _ in range(rounds)]
    unused = iter(tries)
    with tempfile.TemporaryDirectory() as folder:
        functions = {
            f"trie_index_{name}": lambda: next(unused).find(sequences[:1]),
            f"trie_save_{name}": lambda: tries[0].save_pretrained(folder),
            f"trie_load_{name}": lambda: ItemTrie.from_pretrained(folder),
            f"trie_find_all_{name}": lambda: tries[0].find(sequences),
        }
        return summarize(time_calls(functions, rounds, warmup=0))
