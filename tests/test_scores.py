# SPDX-License-Identifier: Apache-2.0
"""Exact search by the vocabulary's probability and with item biases, against brute force over all items."""

import numpy as np
import pytest
import torch
from helpers import make_model, make_windows
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoding import CATALOG, END, FAMILIES, PROMPTS, SEED, VOCAB_SIZE, check_ranking, small_model

from trl_msl import ItemTrie, SparseBias, TrieDecoder, build_rows, evaluate_recommendations, recommend
from trl_msl.decoding import next_tokens
from trl_msl.decoding.item_bias import range_maxima
from trl_msl.model import head


WEIGHTS = st.sampled_from([0.0, 0.3, 1.0, 2.5])
BIAS = st.sampled_from([-torch.inf, -torch.inf, -3.0, -1.0, 0.0, 0.5, 2.0, 6.5])  # some are equal


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
    kind = draw(st.sampled_from(["none", "shared", "prepared", "users", "users", "sparse", "sparse", "function"]))
    if kind == "none":
        return None, np.zeros((num_users, num_items))
    if kind in ("shared", "prepared"):
        values = draw(row)
        return (values if kind == "shared" else torch.tensor(values)), np.array([values] * num_users)
    if kind in ("users", "function"):
        values = np.array(draw(st.lists(row, min_size=num_users, max_size=num_users)))
        return (values if kind == "users" else lambda users: values[users]), values
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
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "granite"])  # a cap, no head of its own, a scale
def test_the_vocabularys_probability_is_the_models_own(family, tokenizer, trie, prompts):
    config_class, kwargs = FAMILIES[family]
    model = make_model(tokenizer, config_class, **kwargs)
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


def test_items_that_share_a_text_are_ranked_by_their_bias():
    trie = ItemTrie.from_sequences([[1, END], [2, 3, END], [1, END], [1, END], [2, 3, END]], VOCAB_SIZE)
    decoder = TrieDecoder(small_model(0, sharpness=0.0), trie)  # both texts have a probability of 1/2
    bias = [0.5, 0.5, 2.0, 0.0, 0.5]
    found = decoder.search([[0]], top_k=5, item_bias=bias)
    assert found.items.tolist() == [[2, 0, 1, 4, 3]]
    torch.testing.assert_close(found.scores[0], torch.tensor(bias)[found.items[0]] + np.log(0.5), rtol=0, atol=1e-6)
    found = decoder.search([[0], [0]], top_k=2, item_bias=[bias, [0.0, 0.0, -torch.inf, 1.0, 1.0]], exclude=[[2], [4]])
    assert found.items.tolist() == [[0, 1], [3, 0]]


def test_minus_infinity_excludes_an_item():
    """Even where the search is cut short, so that beams must find what is left."""
    sequences = [[int(bit) for bit in f"{code:06b}"] for code in range(2**6)]
    decoder = TrieDecoder(small_model(0), ItemTrie.from_sequences(sequences, VOCAB_SIZE))
    bias = torch.full((64,), -torch.inf)
    bias[[7, 30, 31, 62]] = torch.tensor([0.0, 5.0, 9.0, -3.0])
    gone = bias.isinf().nonzero().squeeze(1)
    sparse = SparseBias([gone, gone], [bias[gone], bias[gone]], [5.0, 9.0])
    limits = ({}, {"max_expansions": 1}, {"num_candidates": 8}, {"vocab_weight": 1.0, "max_expansions": 1})
    for item_bias in (bias, decoder.prepare_item_bias(bias), bias.repeat(2, 1), sparse):
        for limit in limits:
            found = decoder.search([[0], [4]], 8, exclude=[[31], []], item_bias=item_bias, **limit)
            left = [[-1] * 5 + [7, 30, 62], [-1] * 4 + [7, 30, 31, 62]]
            assert [sorted(row) for row in found.items.tolist()] == left
            assert (found.scores.isinf() == (found.items < 0)).all()
            found = decoder.search([[0], [4]], 3, allowed=[30, 31, 32], item_bias=item_bias, **limit)
            assert [sorted(row) for row in found.items.tolist()] == [[-1, 30, 31]] * 2


def test_a_beginning_does_not_pay_for_the_rest():
    """`3` and `3 5 5` end in one chain."""
    trie = ItemTrie.from_sequences([[3, 5, 5], [3], [4]], VOCAB_SIZE)
    found = TrieDecoder(small_model(0, sharpness=0.0), trie).search([[0]], top_k=3, vocab_weight=1.0)
    assert found.items.tolist() == [[1, 2, 0]]
    expected = -np.log(VOCAB_SIZE) * torch.tensor([[1.0, 1.0, 3.0]])
    torch.testing.assert_close(found.scores, expected.float(), rtol=0, atol=1e-5)


def test_forced_tokens_are_run_only_where_they_matter(monkeypatch):
    trie = ItemTrie.from_sequences([[0, 5, 6, END], [1, 7, 8, END], [2, 0, END], [2, 3, 4, END]], VOCAB_SIZE)
    model = small_model(0)
    decoder = TrieDecoder(model, trie)
    sizes, forward = [], model.model.forward

    def count_tokens(input_ids, **kwargs):
        sizes.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.model, "forward", count_tokens)
    bias = [100.0, 0.0, 0.0, 0.0]
    found = decoder.search([[4, 4]], top_k=1, vocab_weight=1.0, item_bias=bias, nodes_per_round=1)
    assert found.items.tolist() == [[0]]
    # The prompt, and `0 5 6`: no other node, and not the end token, which nothing follows
    assert (sizes, found.expansions.tolist(), found.rounds.tolist()) == ([(1, 2), (1, 1), (1, 1), (1, 1)], [4], [4])


def test_logits_of_the_vocabulary(monkeypatch, tokenizer, trie, prompts):
    """None at a weight of 0, and never more than some rows at once."""
    monkeypatch.setattr(next_tokens, "_VOCAB_ROWS", 3)
    model = make_model(tokenizer)
    expected = TrieDecoder(model, trie).search(prompts, top_k=12, vocab_weight=1.0)
    shapes, project = [], head._project

    def note_shape(*args, **kwargs):
        logits = project(*args, **kwargs)
        shapes.append(tuple(logits.shape))
        return logits

    decoder = TrieDecoder(model, trie)
    monkeypatch.setattr(head, "_project", note_shape)
    decoder.search(prompts, top_k=12, item_bias=torch.arange(12.0))
    assert all(rows < 30 for _, rows in shapes)
    shapes.clear()
    found = decoder.search(prompts, top_k=12, vocab_weight=1.0)
    assert shapes and all(rows == len(tokenizer) and positions <= 3 for positions, rows in shapes)
    assert torch.equal(found.items, expected.items)


def test_a_bias_against_the_model_takes_more_expansions():
    rng = np.random.default_rng(0)
    sequences = [[*rng.integers(0, 9, 4).tolist(), END] for _ in range(400)]
    decoder = TrieDecoder(small_model(0, sharpness=3.0), ItemTrie.from_sequences(sequences, VOCAB_SIZE))
    [scores] = decoder.score_items([[4, 5]], [range(400)])
    expansions = [decoder.search([[4, 5]], item_bias=-part * scores).expansions.item() for part in (0, 0.5, 0.95)]
    assert expansions[0] < expansions[1] < expansions[2]
    found = decoder.search([[4, 5]], item_bias=-0.95 * scores, num_candidates=50)
    assert found.expansions.item() < expansions[2] and not found.exact.item()


@given(st.lists(st.lists(BIAS, min_size=9, max_size=9), min_size=1, max_size=3), st.data())
def test_range_maxima(rows, data):
    ranges = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted)))
    start, end = torch.tensor(ranges, dtype=torch.int64).view(-1, 2).unbind(1)
    expected = [[max(row[first:last], default=-np.inf) for first, last in ranges] for row in rows]
    found = range_maxima(torch.tensor(rows, dtype=torch.float32), start, end)
    assert found.tolist() == torch.tensor(expected, dtype=torch.float32).view(len(rows), -1).tolist()


def test_recommending_and_evaluating(tokenizer, task, prompts, catalog):
    model = make_model(tokenizer)
    decoder, rows = TrieDecoder(model, task.trie), build_rows(make_windows(catalog.ids, num_rows=5), task)
    for bias in (
        torch.arange(12.0),
        torch.randn(5, 12),
        SparseBias([[1], [2], [], [3], [4]], [[5], [5], [], [5], [5]]),
        lambda users: SparseBias([[user] for user in users], [[5.0]] * len(users)),
        lambda users: torch.arange(12.0),
    ):
        score = {"vocab_weight": 0.5, "item_bias": bias}
        found = recommend(model, task, rows["prompt"][:], 4, **score)
        expected = decoder.search(prompts, 4, **score)
        assert torch.equal(torch.from_numpy(found.items), expected.items)
        metrics, evaluated = evaluate_recommendations(model, task, rows, ks=[4], return_recommendations=True, **score)
        assert np.array_equal(evaluated.items, found.items) and metrics["exact_rate"] == 1.0
    targets = torch.full((5, 12), -9.0)
    targets[range(5), catalog.indices(rows["item_id"])] = 900.0
    for match in ("id", "text"):  # of two items with the same text the one that has the bias
        assert evaluate_recommendations(model, task, rows, ks=[1], match=match, item_bias=targets)["hr@1"] == 1.0
    for name, value in (("vocab_weight", 1.0), ("item_bias", [0.0] * 12), ("num_candidates", 9)):
        for mode in ("beam", "generate"):
            with pytest.raises(ValueError, match=f"`{name}` is .*only exact search has it: leave it out"):
                recommend(model, task, prompts, 4, mode, **{name: value})
    recommend(model, task, prompts, 4, "beam", vocab_weight=0)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_a_function_is_called_for_each_batch(batch_size, tokenizer, trie, prompts):
    decoder, dense, batches = TrieDecoder(make_model(tokenizer), trie), torch.randn(5, 12), []

    def item_bias(users):
        batches.append(users)
        return dense[users]

    found = decoder.search(prompts, 12, item_bias=item_bias, batch_size=batch_size)
    assert torch.equal(found.items, decoder.search(prompts, 12, item_bias=dense, batch_size=batch_size).items)
    assert sorted(user for users in batches for user in users) == list(range(5))
    assert max(map(len, batches)) == min(batch_size, 5)


def test_bad_arguments(tokenizer, trie, prompts):
    decoder = TrieDecoder(make_model(tokenizer), trie)
    for weight in (-0.1, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="`vocab_weight` is .*at least 0"):
            decoder.search(prompts, vocab_weight=weight)
    for shape in ((11,), (4, 12), (5, 12, 1), ()):
        with pytest.raises(ValueError, match=r"`item_bias` has shape .*pass \(12,\), a number .*\(5, 12\)"):
            decoder.search(prompts, item_bias=torch.zeros(shape))
    for value in (torch.nan, torch.inf, 1e60):
        with pytest.raises(ValueError, match="`item_bias` holds NaN or inf"):
            decoder.search(prompts, item_bias=[value] * 12)
    for strange in (["a"] * 12, [[0.0], [0.0, 1.0]], {1: 2.0}, "abc"):
        with pytest.raises(ValueError, match="`item_bias` must hold numbers"):
            decoder.search(prompts, item_bias=strange)
    lists, values = [[1], [2], [3], [4], [5, 6]], [[0.0]] * 4 + [[0.0, 1.0]]
    for bias, error in (
        (SparseBias(lists[:4], values[:4]), "`item_bias.items` has 4 lists for 5 prompts"),
        (SparseBias([[12], *lists[1:]], values), "`item_bias.items` holds item 12"),
        (SparseBias(lists, values[:4]), "`item_bias.values` has other lengths"),
        (SparseBias(lists, [*values[:4], [0.0]]), "`item_bias.values` has other lengths"),
        (SparseBias(lists, [0.0] * 5), "`item_bias.values` has other lengths"),
        (SparseBias([*lists[:4], [5, 5]], values), r"`item_bias.items` has an item twice \(list 4\)"),
        (SparseBias(lists, values, -torch.inf), "`item_bias.default` is -inf: pass a finite .*`allowed`"),
        (SparseBias(lists, values, [0.0]), "`item_bias.default` is"),
    ):
        with pytest.raises(ValueError, match=error):
            decoder.search(prompts, item_bias=bias)
    for values, error in (
        (torch.zeros(4, 12), r"`item_bias` has shape \(4, 12\): pass \(12,\), .*\(5, 12\)"),
        (SparseBias([[1]], [[0.0]]), "`item_bias.items` has 1 lists for 5 prompts"),
        (decoder.prepare_item_bias([0.0] * 12), "`item_bias` is a function that returns `ItemBias`: return numbers"),
        (None, "`item_bias` must hold numbers"),
    ):
        with pytest.raises(ValueError, match=error):
            decoder.search(prompts, item_bias=lambda users, values=values: values)
    other = TrieDecoder(make_model(tokenizer), trie)
    with pytest.raises(ValueError, match="`item_bias` was prepared by another `TrieDecoder`"):
        decoder.search(prompts, item_bias=other.prepare_item_bias([0.0] * 12))
    for several in (torch.zeros(5, 12), SparseBias(lists, values)):
        with pytest.raises(ValueError, match="`item_bias`"):
            decoder.prepare_item_bias(several)
    with pytest.raises(ValueError, match="`num_candidates` is 20, but only `item_bias` ranks candidates"):
        decoder.search(prompts, num_candidates=20)
    with pytest.raises(ValueError, match="`num_candidates` is 2: it must be at least `top_k` = 3"):
        decoder.search(prompts, 3, item_bias=[0.0] * 12, num_candidates=2)
