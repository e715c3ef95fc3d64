# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_msl import ItemTrie
from trl_msl.decoding.item_keys import item_keys, key_items, key_scores
from trl_msl.trie import CompressedTrie


SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=20)


def contract(sequences: list[list[int]]) -> dict[tuple, tuple]:
    """The slow way: each prefix after which there was a choice, with its forced tokens, children and items."""
    chains = {}

    def visit(prefix: tuple) -> None:
        chain = prefix
        while len(followers := {seq[len(chain)] for seq in sequences if seq[: len(chain)] == list(chain) != seq}) == 1:
            chain += tuple(followers)
        ends = [i for i, seq in enumerate(sequences) if len(prefix) <= len(seq) and list(chain[: len(seq)]) == seq]
        below = [i for i, seq in enumerate(sequences) if seq[: len(prefix)] == list(prefix)]
        chains[prefix] = chain[max(0, len(prefix) - 1) :], sorted(followers), ends, below
        for token in sorted(followers):
            visit((*chain, token))

    visit(())
    return chains


@settings(max_examples=200, deadline=None)
@given(SEQUENCES)
def test_chains_children_and_items_are_those_of_the_slow_way(sequences):
    tree = CompressedTrie(ItemTrie.from_sequences(sequences, vocab_size=4))
    expected = contract(sequences)
    assert tree.num_nodes == len(expected)
    prefixes = {0: ()}
    for node in range(tree.num_nodes):  # parents come before their children
        prefix = prefixes[node]
        chain, followers, ends, below = expected[prefix]
        start, end = tree.chain_start[node : node + 2].tolist()
        assert tuple(tree.chain_tokens[start:end].tolist()) == chain
        assert int(tree.chain_length(torch.tensor(node))) == len(chain)
        assert int(tree.depth[node]) == max(0, len(prefix) - 1)
        rows, children = tree.children(torch.tensor([node]))
        assert rows.tolist() == [0] * len(followers)
        if followers:
            assert tree.head_tokens(children).tolist() == followers
            assert tree.parent[children].tolist() == [node] * len(followers)
        for child, token in zip(children.tolist(), followers):
            prefixes[child] = (*prefix[: int(tree.depth[node])], *chain, token)
        first, last = int(tree.item_start[node]), int(tree.item_end[node])
        assert sorted(tree.item_order[first:last].tolist()) == below
        assert tree.item_order[first : first + int(tree.num_own_items[node])].tolist() == ends
        assert (tree.item_nodes[ends] == node).all()
    assert tree.item_order[tree.item_place].tolist() == list(range(len(sequences)))


@settings(max_examples=50, deadline=None)
@given(SEQUENCES)
def test_ranges_nest_if_and_only_if_one_node_is_an_ancestor_of_the_other(sequences):
    tree = CompressedTrie(ItemTrie.from_sequences(sequences, vocab_size=4))
    for node in range(tree.num_nodes):
        ancestors, above = set(), node
        while above >= 0:
            ancestors.add(above)
            above = int(tree.parent[above])
        nests = (tree.item_start <= tree.item_start[node]) & (tree.item_end >= tree.item_end[node])
        assert set(nests.nonzero().squeeze(1).tolist()) == ancestors


@given(st.lists(st.tuples(st.floats(width=32, allow_nan=False), st.integers(0, 2**31 - 2)), min_size=1))
def test_keys_sort_by_score_then_item(pairs):
    scores, items = (torch.tensor(values) for values in zip(*pairs))
    keys = item_keys(scores.float(), items)
    assert torch.equal(key_scores(keys), scores.float() + 0.0)
    assert torch.equal(key_items(keys), items)
    order = sorted(range(len(pairs)), key=lambda i: (-pairs[i][0], pairs[i][1]))
    assert keys[order].tolist() == sorted(keys.tolist())
