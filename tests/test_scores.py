# SPDX-License-Identifier: Apache-2.0
"""Exact search by the vocabulary's probability and with item biases, against brute force over all items."""

import numpy as np
import pytest
import torch
from helpers import make_model, make_windows
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoding import CATALOG, PROMPTS, SEED, VOCAB_SIZE, check_ranking, small_model

from trl_msl import ItemTrie, SparseBias, TrieDecoder, build_rows


WEIGHTS = st.sampled_from([0.0, 0.3, 1.0, 2.5])
BIAS = st.sampled_from([-torch.inf, -3.0, -1.0, 0.0, 0.0, 0.5, 2.0]) | st.floats(-9, 9, width=32)


@torch.no_grad()
def score_every_item(model, trie, prompts, weight: float) -> np.ndarray:
    """`Σ log P_valid + weight · Σ log m` of every item after every prompt, token by token."""
    scores = np.zeros((len(prompts), trie.num_items))
    paths = trie.paths(trie.item_nodes)
    for user, prompt in enumerate(prompts):
        inputs = torch.cat([torch.tensor([prompt] * len(paths)), trie.tokens(paths.clamp(min=1))], dim=1)
        log_probs = model(inputs).logits[:, len(prompt) - 1 :].double().log_softmax(2)
        for item, path in enumerate(paths.tolist()):
            for row, node in zip(log_probs[item], path):
                if node >= 0:
                    siblings = torch.tensor(list(trie.children(int(trie.parents(torch.tensor(node))))))
                    mass = row[trie.tokens(siblings)].logsumexp(0)
                    scores[user, item] += row[trie.tokens(torch.tensor(node))] - mass + weight * mass
    return scores


@st.composite
def biases(draw, num_users, num_items):
    """A bias as users pass it, and the same as a matrix."""
    row = st.lists(BIAS, min_size=num_items, max_size=num_items)
    kind = draw(st.sampled_from(["none", "shared", "prepared", "users", "sparse"]))
    if kind == "none":
        return None, np.zeros((num_users, num_items))
    if kind in ("shared", "prepared"):
        values = draw(row)
        return (values if kind == "shared" else torch.tensor(values)), np.array([values] * num_users)
    if kind == "users":
        values = np.array(draw(st.lists(row, min_size=num_users, max_size=num_users)))
        return values, values
    defaults = draw(st.lists(st.sampled_from([-4.0, 0.0, 1.0]), min_size=num_users, max_size=num_users))
    items = st.lists(st.integers(0, num_items - 1), unique=True)
    listed = [draw(items) for _ in range(num_users)]
    values = [draw(st.lists(BIAS, min_size=len(some), max_size=len(some))) for some in listed]
    dense = np.repeat(np.array(defaults)[:, None], num_items, axis=1)
    for user_row, some, numbers in zip(dense, listed, values):
        user_row[some] = numbers
    return SparseBias(listed, values, defaults), dense


@st.composite
def requests(draw, num_users, num_items):
    """Arguments of a search, the biases as a matrix, and what users may get."""
    lists = st.lists(st.sampled_from(range(num_items)), max_size=num_items)
    of_users = st.lists(lists, min_size=num_users, max_size=num_users)
    exclude = draw(st.none() | of_users)
    allowed = draw(st.none() | st.lists(st.sampled_from(range(num_items)), min_size=1) | of_users)
    item_bias, dense = draw(biases(num_users, num_items))
    may_get = [set(np.flatnonzero(row > -np.inf).tolist()) for row in dense]
    for user in range(num_users):
        if allowed is not None:
            may_get[user] &= set(allowed if isinstance(allowed[0], int) else allowed[user])
        if exclude is not None:
            may_get[user] -= set(exclude[user])
    return {"exclude": exclude, "allowed": allowed, "item_bias": item_bias}, dense, may_get


def make_request(data, decoder, num_users):
    """The same, with biases prepared and items that are allowed prepared where that can be."""
    request, dense, may_get = data.draw(requests(num_users, decoder.trie.num_items), "request")
    if isinstance(request["item_bias"], torch.Tensor):
        request["item_bias"] = decoder.prepare_item_bias(request["item_bias"])
    if request["allowed"] is not None and isinstance(request["allowed"][0], int) and data.draw(st.booleans()):
        request["allowed"] = decoder.prepare_allowed(request["allowed"])
    return request, dense, may_get


@settings(max_examples=80, deadline=None)
@given(CATALOG, PROMPTS, SEED, WEIGHTS, st.integers(1, 16), st.sampled_from([1, 3, 16]), st.integers(1, 4), st.data())
def test_search_is_brute_force(sequences, prompts, seed, weight, top_k, nodes_per_round, batch_size, data):
    trie, model = ItemTrie.from_sequences(sequences, VOCAB_SIZE), small_model(seed, data.draw(st.sampled_from([0, 8])))
    decoder = TrieDecoder(model, trie)
    request, dense, may_get = make_request(data, decoder, len(prompts))
    found = decoder.search(
        prompts, top_k, vocab_weight=weight, nodes_per_round=nodes_per_round, batch_size=batch_size, **request
    )
    check_ranking(found, score_every_item(model, trie, prompts, weight) + dense, may_get, top_k, atol=1e-4)
    assert found.exact.all()


@settings(max_examples=40, deadline=None)
@given(CATALOG, PROMPTS, SEED, WEIGHTS, st.integers(1, 8), st.integers(1, 6), st.data())
def test_whatever_the_bound_there_are_k_items(sequences, prompts, seed, weight, top_k, max_expansions, data):
    trie, model = ItemTrie.from_sequences(sequences, VOCAB_SIZE), small_model(seed)
    decoder = TrieDecoder(model, trie)
    request, dense, may_get = make_request(data, decoder, len(prompts))
    request |= {"vocab_weight": weight, "nodes_per_round": 2}
    found = decoder.search(prompts, top_k, max_expansions=max_expansions, **request)
    whole = decoder.search(prompts, top_k, **request)
    for user, allowed in enumerate(may_get):
        got = [item for item in found.items[user].tolist() if item >= 0]
        assert len(got) == len(set(got)) == min(top_k, len(allowed))
        assert set(got) <= allowed
    # A certificate is never wrong, and missing only where the bound was reached
    torch.testing.assert_close(found.scores[found.exact], whole.scores[found.exact], rtol=0, atol=1e-4)
    assert (found.exact | (whole.expansions > max_expansions)).all()
    assert (found.expansions <= max_expansions + top_k * trie.depth).all()


@settings(max_examples=40, deadline=None)
@given(CATALOG, PROMPTS, SEED, WEIGHTS, st.integers(1, 5), st.integers(0, 8), st.data())
def test_reranking_candidates_is_brute_force(sequences, prompts, seed, weight, top_k, more, data):
    trie, model = ItemTrie.from_sequences(sequences, VOCAB_SIZE), small_model(seed)
    decoder = TrieDecoder(model, trie)
    request, dense, may_get = make_request(data, decoder, len(prompts))
    whole = decoder.search(prompts, top_k, vocab_weight=weight, **request)
    if request["item_bias"] is None:
        return
    found = decoder.search(prompts, top_k, vocab_weight=weight, num_candidates=top_k + more, **request)
    rest = [sorted(set(range(trie.num_items)) - allowed) for allowed in may_get]
    candidates = decoder.search(prompts, top_k + more, exclude=rest, vocab_weight=weight)
    for user, (items, scores) in enumerate(zip(candidates.items.tolist(), candidates.scores.tolist())):
        totals = sorted(-score - dense[user, item] for item, score in zip(items, scores) if item >= 0)
        totals = (totals + [np.inf] * top_k)[:top_k]
        np.testing.assert_allclose(found.scores[user], [-total for total in totals], atol=1e-4)
        if len(may_get[user]) <= top_k + more:
            assert found.exact[user]
    torch.testing.assert_close(found.scores[found.exact], whole.scores[found.exact], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def prompts(task, catalog) -> list[list[int]]:
    return task.encode_prompts(build_rows(make_windows(catalog.ids, num_rows=5), task)["prompt"][:])


@torch.no_grad()
def test_the_vocabularys_probability_is_the_models_own(tokenizer, trie, prompts):
    model = make_model(tokenizer)
    found = TrieDecoder(model, trie).search(prompts, top_k=12, vocab_weight=1.0, batch_size=2)
    assert found.exact.all()
    for prompt, items, scores in zip(prompts, found.items.tolist(), found.scores.tolist()):
        assert sorted(items) == list(range(12))
        for item, score in zip(items, scores):
            title = trie.tokens(trie.paths(trie.item_nodes[item : item + 1])[0]).tolist()
            labels = torch.tensor([[-100] * len(prompt) + title])
            loss = model(torch.tensor([prompt + title]), labels=labels).loss  # the mean over the title's tokens
            assert score == pytest.approx(-loss.item() * len(title), abs=1e-4)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_bias_of_zero_changes_nothing(weight, tokenizer, trie, prompts):
    decoder = TrieDecoder(make_model(tokenizer), trie)
    for limits in ({}, {"max_expansions": 2}):
        plain = decoder.search(prompts, 4, vocab_weight=weight, **limits)
        for bias in (
            torch.zeros(12),
            torch.zeros(5, 12),
            SparseBias([[1], [], [2], [3], [4]], [[0.0], [], *[[0]] * 3]),
        ):
            found = decoder.search(prompts, 4, vocab_weight=weight, item_bias=bias, **limits)
            for name in ("items", "scores", "exact", "expansions", "rounds"):
                assert torch.equal(getattr(found, name), getattr(plain, name))
