# SPDX-License-Identifier: Apache-2.0
"""The engine against brute force: every item of the catalogue teacher-forced after every prompt."""

import functools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_model, make_windows, score_every_item
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BertGenerationConfig,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
    RwkvConfig,
)

from trl_msl import ItemTrie, SparseBias, TrieDecoder, build_rows, recommend
from trl_msl.decoding import next_tokens
from trl_msl.decoding.by_generate import generate_items
from trl_msl.model import head_projection


VOCAB_SIZE, END = 12, 11


@functools.lru_cache
def small_model(seed: int, sharpness: float = 8.0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(sharpness)
    return model


TITLE = st.lists(st.integers(0, 3), max_size=5).map(lambda tokens: [*tokens, END])
CATALOG = st.one_of(
    st.lists(TITLE, min_size=1, max_size=14),
    st.lists(TITLE, min_size=1, max_size=14).map(
        lambda titles: [[9, 8, *title] for title in titles]
    ),  # one-child root
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=14),  # some begin others
)
PROMPTS = st.lists(st.lists(st.integers(0, END), min_size=1, max_size=6), min_size=1, max_size=4)
SEED = st.integers(0, 3)


def check_ranking(found, scores: np.ndarray, allowed: list[set[int]], top_k: int, atol: float = 2e-5) -> None:
    """Scores, order and completeness of what was found, where brute force gives `scores`."""
    for user, expected in enumerate(scores):
        items = [item for item in found.items[user].tolist() if item >= 0]
        assert len(items) == len(set(items)) == min(top_k, len(allowed[user]))
        assert set(items) <= allowed[user]
        np.testing.assert_allclose(found.scores[user, : len(items)], expected[items], atol=atol)
        assert (found.items[user, len(items) :] == -1).all()
        assert (found.scores[user, len(items) :] == -torch.inf).all()
        # Best first, ties by index; and nothing better was left out
        ranking = list(zip((-found.scores[user]).tolist(), items))
        assert ranking == sorted(ranking)
        best = sorted((expected[item] for item in allowed[user]), reverse=True)[: len(items)]
        np.testing.assert_allclose(expected[items], best, atol=atol)


@settings(max_examples=60, deadline=None)
@given(CATALOG, PROMPTS, SEED, st.integers(1, 16), st.sampled_from([1, 3, 16]), st.integers(1, 4), st.data())
def test_search_is_brute_force(sequences, prompts, seed, top_k, nodes_per_round, batch_size, data):
    trie, model = ItemTrie.from_sequences(sequences, VOCAB_SIZE), small_model(seed)
    items = range(trie.num_items)
    lists = st.lists(st.sampled_from(items), max_size=len(items))
    exclude = data.draw(st.none() | st.lists(lists, min_size=len(prompts), max_size=len(prompts)), "exclude")
    shared = st.lists(st.sampled_from(items), min_size=1)
    allowed = data.draw(st.none() | shared | st.lists(lists, min_size=len(prompts), max_size=len(prompts)), "allowed")
    found = TrieDecoder(model, trie).search(
        prompts, top_k, exclude, allowed, nodes_per_round=nodes_per_round, batch_size=batch_size
    )
    may_get = [set(items) for _ in prompts]
    for user in range(len(prompts)):
        if allowed is not None:
            may_get[user] &= set(allowed if isinstance(allowed[0], int) else allowed[user])
        if exclude is not None:
            may_get[user] -= set(exclude[user])
    check_ranking(found, score_every_item(model, trie, prompts), may_get, top_k)
    assert found.exact.all()


@settings(max_examples=60, deadline=None)
@given(CATALOG, PROMPTS, SEED, st.integers(1, 8), st.integers(1, 6), st.booleans(), st.data())
def test_whatever_the_bound_there_are_k_items(sequences, prompts, seed, top_k, max_expansions, is_restricted, data):
    trie, model = ItemTrie.from_sequences(sequences, VOCAB_SIZE), small_model(seed)
    items = range(trie.num_items)
    lists = st.lists(st.sampled_from(items), max_size=len(items))
    exclude = data.draw(st.lists(lists, min_size=len(prompts), max_size=len(prompts))) if is_restricted else None
    decoder = TrieDecoder(model, trie)
    settings = {"exclude": exclude, "nodes_per_round": 2}
    found = decoder.search(prompts, top_k, max_expansions=max_expansions, **settings)
    whole = decoder.search(prompts, top_k, **settings)
    scores = decoder.score_items(prompts, [items] * len(prompts))
    for user in range(len(prompts)):
        may_get = set(items) - set(exclude[user] if is_restricted else [])
        got = [item for item in found.items[user].tolist() if item >= 0]
        assert len(got) == len(set(got)) == min(top_k, len(may_get))
        assert set(got) <= may_get
        torch.testing.assert_close(found.scores[user, : len(got)], scores[user][got], rtol=0, atol=2e-5)
        ranking = list(zip((-found.scores[user]).tolist(), got))
        assert ranking == sorted(ranking)
    # A certificate is never wrong, and missing only where the bound was reached
    torch.testing.assert_close(found.scores[found.exact], whole.scores[found.exact], rtol=0, atol=2e-5)
    assert (found.exact | (whole.expansions > max_expansions)).all()
    within = whole.expansions <= max_expansions
    assert torch.equal(found.expansions[within], whole.expansions[within])
    assert (found.expansions <= max_expansions + top_k * trie.depth).all()


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 8.0])
def test_an_exhausted_search_goes_down_from_where_it_is(sharpness):
    """Codes of 12 bits, of which no model can rule out many: best-first search alone does not get to any."""
    sequences = [[int(bit) for bit in f"{code:012b}"] for code in range(2**12)]
    trie, model = ItemTrie.from_sequences(sequences, VOCAB_SIZE), small_model(0, sharpness)
    decoder, prompts = TrieDecoder(model, trie), [[4, 5, 6], [7], [4, 4]]
    odd = range(1, 2**12, 2)
    for max_expansions, allowed in ((1, None), (40, None), (40, odd)):
        found = decoder.search(prompts, top_k=10, max_expansions=max_expansions, allowed=allowed)
        assert (found.items >= 0).all()
        assert set(found.items.flatten().tolist()) <= set(allowed or range(2**12))
        assert all(len(set(row)) == 10 for row in found.items.tolist())
        for items, scores, expected in zip(found.items, found.scores, decoder.score_items(prompts, found.items)):
            torch.testing.assert_close(scores, expected, rtol=0, atol=2e-5)
            assert list(zip((-scores).tolist(), items.tolist())) == sorted(zip((-scores).tolist(), items.tolist()))
        assert not found.exact.any()
        assert (max_expansions < found.expansions).all()
        assert (found.expansions <= max_expansions + 10 * 12).all()
        for user, prompt in enumerate(prompts):  # whoever else is in the batch
            alone = decoder.search([prompt], top_k=10, max_expansions=max_expansions, allowed=allowed)
            assert torch.equal(alone.items[0], found.items[user])
            assert torch.equal(alone.expansions[0], found.expansions[user])


@settings(max_examples=30, deadline=None)
@given(CATALOG, PROMPTS, SEED, st.integers(1, 3), st.integers(1, 5), st.data())
def test_item_scores_are_those_of_brute_force(sequences, prompts, seed, batch_size, items_per_pass, data):
    trie, model = ItemTrie.from_sequences(sequences, VOCAB_SIZE), small_model(seed)
    lists = st.lists(st.integers(0, trie.num_items - 1))
    items = data.draw(st.lists(lists, min_size=len(prompts), max_size=len(prompts)))
    found = TrieDecoder(model, trie).score_items(prompts, items, batch_size, items_per_pass)
    for row, expected, wanted in zip(found, score_every_item(model, trie, prompts), items):
        np.testing.assert_allclose(row, expected[wanted], atol=2e-5)


def test_equal_scores_are_in_the_order_of_the_items():
    model = small_model(0, sharpness=0.0)  # all tokens are equally likely
    trie = ItemTrie.from_sequences([[7, END], [3, 1, END], [5, END], [3, 2, END], [1, END], [5, END]], VOCAB_SIZE)
    found = TrieDecoder(model, trie).search([[0]], top_k=6)
    assert found.items.tolist() == [[0, 2, 4, 5, 1, 3]]
    found = TrieDecoder(model, trie).search([[0]], top_k=2, exclude=[[2]])
    assert found.items.tolist() == [[0, 4]]
    for branches in ((0, 1), (1, 0)):  # whichever branch is expanded first, the other one ties and has lower indices
        trie = ItemTrie.from_sequences([[branch, leaf, END] for branch in branches for leaf in (2, 3)], VOCAB_SIZE)
        found = TrieDecoder(model, trie).search([[0]], top_k=1, nodes_per_round=1)
        assert (found.items.tolist(), found.expansions.tolist()) == ([[0]], [3])


def test_a_large_search(monkeypatch):
    """Several hundred slots in the cache, many equal texts, and logits in several groups of rows."""
    rng = np.random.default_rng(0)
    sequences = [[*rng.integers(0, 9, rng.integers(2, 5)).tolist(), END] for _ in range(300)] + [[1, 2, END]] * 50
    trie, model = ItemTrie.from_sequences(sequences, VOCAB_SIZE), small_model(0, sharpness=3.0)
    prompts = [rng.integers(0, 12, 40).tolist(), rng.integers(0, 12, 33).tolist()]
    expected = score_every_item(model, trie, prompts)
    for max_logits in (1 << 23, 100, 1):
        monkeypatch.setattr(next_tokens, "_MAX_LOGITS", max_logits)
        decoder = TrieDecoder(model, trie)
        found = decoder.search(prompts, top_k=200, exclude=[[300, 303], []], nodes_per_round=7)
        check_ranking(found, expected, [set(range(350)) - {300, 303}, set(range(350))], top_k=200)
        assert (found.expansions > 80).all()
        for scores, user in zip(decoder.score_items(prompts, [range(350)] * 2), expected):
            np.testing.assert_allclose(scores, user, atol=2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(tokenizer, trie, prompts):
    model = make_model(tokenizer)
    expected = score_every_item(model, trie, prompts)
    decoder = TrieDecoder(model.cuda(), trie)
    in_stock = torch.tensor([0, 2, 4, 6, 8, 10])
    for method in (decoder.search, functools.partial(decoder.beam_search, num_beams=12)):
        found = method(prompts, top_k=4, exclude=[[2]] * 5, allowed=in_stock.cuda())
        check_ranking(found, expected, [{0, 4, 6, 8, 10}] * 5, top_k=4)
    for scores, user in zip(decoder.score_items(prompts, [in_stock.cuda()] * 5), expected):
        np.testing.assert_allclose(scores, user[in_stock], atol=1e-4)


def test_expansions_and_rounds_of_a_known_search():
    trie = ItemTrie.from_sequences([[0, 0, END], [0, 1, END], [1, 2, 3, END], [2, 0, END], [2, 1, END]], VOCAB_SIZE)
    model = small_model(0, sharpness=0.0)
    found = TrieDecoder(model, trie).search([[4, 5]], top_k=1)
    # The root's children have 1/3 each; that of item 2 is a forced tail, the others may tie with it for all we know
    assert (found.items.item(), found.expansions.item(), found.rounds.item()) == (2, 3, 2)
    assert found.scores.item() == pytest.approx(np.log(1 / 3))
    found = TrieDecoder(model, trie).search([[4, 5]], top_k=1, max_expansions=1)
    assert (found.items.item(), found.exact.item()) == (2, False)
    found = TrieDecoder(model, trie).search([[4, 5]], top_k=1, allowed=[3])  # nothing is looked for where it can't be
    assert (found.items.item(), found.expansions.item(), found.rounds.item()) == (3, 2, 2)
    one = ItemTrie.from_sequences([[1, 2, END]], VOCAB_SIZE)
    found = TrieDecoder(model, one).search([[4, 5]], top_k=2)
    assert (found.items.tolist(), found.scores.tolist()) == ([[0, -1]], [[0.0, -torch.inf]])
    assert (found.exact.item(), found.expansions.item()) == (True, 0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(TITLE, min_size=2, max_size=14), PROMPTS, SEED, st.integers(1, 5), st.sampled_from(["trie", "vocab"]),
    st.sampled_from([0.0, 1.0, -1.0]),
)  # fmt: skip
def test_our_beams_are_those_of_generate(sequences, prompts, seed, num_beams, normalize, length_penalty):
    trie = ItemTrie.from_sequences(sequences, VOCAB_SIZE)
    settings = {"num_beams": num_beams, "normalize": normalize, "length_penalty": length_penalty}
    settings["top_k"] = min(num_beams, trie.num_items)
    ours = TrieDecoder(small_model(seed), trie).beam_search(prompts, **settings)
    theirs, _ = generate_items(small_model(seed), SimpleNamespace(pad_token_id=0), trie, prompts, **settings)
    if num_beams == 1:  # greedy search knows no length penalty
        assert torch.equal(ours.items, theirs.items)
        return
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
    differs = ours.items != theirs.items
    assert not differs.any() or np.ptp(ours.scores[differs].numpy()) < 1e-4  # only items that tie


def test_each_token_is_run_once(monkeypatch):
    trie = ItemTrie.from_sequences([[0, 5, 6, 0, END], [0, 5, 6, 1, 7, 8, END], [1, 2, 3, END]], VOCAB_SIZE)
    model = small_model(0)
    decoder = TrieDecoder(model, trie)
    sizes, forward = [], model.model.forward

    def count_tokens(input_ids, **kwargs):
        sizes.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.model, "forward", count_tokens)
    decoder.search([[4, 4, 4, 4, 1], [4, 4, 4, 4, 2, 3], [4, 4, 4, 4, 2]], top_k=3)
    # What the prompts share; the rest of each; the chain 0, 5, 6 as one step. Forced tails are not run at all
    assert sizes == [(1, 4), (3, 2), (3, 3)]


FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama-eager": (LlamaConfig, {"attn_implementation": "eager"}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "mistral": (MistralConfig, {}),  # its window of 4,096 is longer than the prompts
    "gemma": (GemmaConfig, {"head_dim": 8}),
    "gemma2": (Gemma2Config, {"head_dim": 8}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "granite": (GraniteConfig, {"logits_scaling": 8.0}),
}


@pytest.fixture(scope="module")
def prompts(task, catalog) -> list[list[int]]:
    rows = build_rows(make_windows(catalog.ids, num_rows=5), task)
    return task.encode_prompts(rows["prompt"][:])


@pytest.mark.parametrize("family", FAMILIES)
def test_model_families(family, tokenizer, trie, prompts):
    config_class, kwargs = FAMILIES[family]
    model = make_model(tokenizer, config_class, **kwargs)
    found = TrieDecoder(model, trie).search(prompts, top_k=5, batch_size=3)
    check_ranking(found, score_every_item(model, trie, prompts), [set(range(12))] * 5, top_k=5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_bf16(family, tokenizer, trie, prompts):
    config_class, kwargs = FAMILIES[family]
    model = make_model(tokenizer, config_class, **kwargs)
    reference = score_every_item(model, trie, prompts)
    model = model.bfloat16()
    found = TrieDecoder(model, trie).search(prompts, top_k=12)
    ours = np.stack([scores[items.argsort()] for items, scores in zip(found.items, found.scores.numpy())])
    # No further from fp32 than what the model's own forward gives in bf16
    own_error = np.abs(score_every_item(model, trie, prompts) - reference).max()
    assert np.abs(ours - reference).max() <= 1.5 * own_error + 1e-3


def test_lora(tokenizer, trie, prompts):
    model = get_peft_model(make_model(tokenizer), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    plain = TrieDecoder(make_model(tokenizer), trie).search(prompts, top_k=12)
    found = TrieDecoder(model, trie).search(prompts, top_k=12)
    check_ranking(found, score_every_item(model, trie, prompts), [set(range(12))] * 5, top_k=12)
    assert not torch.allclose(found.scores, plain.scores)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"]),
    ],
)
def test_an_adapter_on_the_head_is_not_left_out(config, tokenizer, trie, prompts):
    model = get_peft_model(make_model(tokenizer), config)
    with pytest.raises(ValueError, match="adapter on its LM head.*`merge_and_unload"):
        TrieDecoder(model, trie)
    merged = model.merge_and_unload()
    found = TrieDecoder(merged, trie).search(prompts, top_k=12)
    check_ranking(found, score_every_item(merged, trie, prompts), [set(range(12))] * 5, top_k=12)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_with_trained_rows_is_the_adapters(tied, tokenizer, trie, prompts):
    tokens = trie.tokens(torch.tensor(list(trie.children(0)))).tolist()[:2]
    rows = dict.fromkeys(["embed_tokens", "lm_head"][: 2 - tied], tokens)  # PEFT keeps a tied head in step
    config = LoraConfig(task_type="CAUSAL_LM", trainable_token_indices=rows)
    model = get_peft_model(make_model(tokenizer, tie_word_embeddings=tied), config)
    plain = TrieDecoder(model, trie).search(prompts, top_k=12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.mul_(-1.0)
    found = TrieDecoder(model, trie).search(prompts, top_k=12)
    check_ranking(found, score_every_item(model, trie, prompts), [set(range(12))] * 5, top_k=12)
    assert not torch.allclose(found.scores, plain.scores)


def test_a_head_that_is_trained_as_a_whole_is_the_adapters(tokenizer, trie, prompts):
    model = get_peft_model(make_model(tokenizer), LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(-1.0)
    found = TrieDecoder(model, trie).search(prompts, top_k=12)
    check_ranking(found, score_every_item(model, trie, prompts), [set(range(12))] * 5, top_k=12)


def test_virtual_tokens_are_not_left_out(tokenizer, trie):
    model = get_peft_model(make_model(tokenizer), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="PROMPT_TUNING adapter, whose virtual tokens.*mode='generate'"):
        TrieDecoder(model, trie)


def test_a_replaced_head_is_seen(tokenizer, trie, prompts):
    model = make_model(tokenizer)
    decoder = TrieDecoder(model, trie)
    model.set_output_embeddings(torch.nn.Linear(32, len(tokenizer), bias=True))
    found = decoder.search(prompts, top_k=12)
    check_ranking(found, score_every_item(model, trie, prompts), [set(range(12))] * 5, top_k=12)


def test_under_autocast_logits_stay_in_fp32(tokenizer, trie, prompts):
    model = make_model(tokenizer)
    hidden = torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head_projection(model)(hidden, rows=slice(None))
    assert torch.equal(logits, hidden @ model.lm_head.weight.T)


SMALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("config_class", "kwargs"),
    [
        (MambaConfig, {}),  # recurrent
        (Qwen3NextConfig, {"head_dim": 8, "shared_expert_intermediate_size": 16, **SMALL_EXPERTS}),  # hybrid
        (BloomConfig, {"n_layer": 2, "n_head": 4}),  # positions come from the mask
    ],
)
def test_models_that_cannot_see_a_tree_are_recognised(config_class, kwargs, tokenizer, trie):
    model = make_model(tokenizer, config_class, **kwargs)
    with pytest.raises(ValueError, match="can't run a tree of tokens.*`TrieLogitsProcessor`"):
        TrieDecoder(model, trie)


def test_attention_that_cannot_see_a_tree_is_recognised(tokenizer, trie, prompts):
    model = make_model(tokenizer)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2' attention.*set_attn_implementation\('sdpa'\)"):
        TrieDecoder(model, trie)
    for config_class in (MistralConfig, Gemma3TextConfig):
        model = make_model(tokenizer, config_class, sliding_window=16, head_dim=8)
        with pytest.raises(ValueError, match="`prompts` of up to .* don't fit the model's sliding window of 16"):
            TrieDecoder(model, trie).search(prompts)
    with pytest.raises(ValueError, match="GPTNeoForCausalLM, has local attention"):
        kwargs = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4}
        TrieDecoder(make_model(tokenizer, GPTNeoConfig, **kwargs), trie)


@pytest.mark.parametrize(
    ("config_class", "kwargs"),
    [(RwkvConfig, {}), (BertGenerationConfig, {})],  # recurrent, and seeing what comes later
)
def test_other_logits_are_noticed(config_class, kwargs, tokenizer, trie):
    with pytest.raises(ValueError, match="gives other logits for a tree of tokens than for its paths"):
        TrieDecoder(make_model(tokenizer, config_class, **kwargs), trie)


def test_too_long_for_learned_positions(tokenizer, trie, prompts):
    longest = max(map(len, prompts))
    model = make_model(tokenizer, GPT2Config, n_embd=32, n_layer=2, n_head=4, max_position_embeddings=longest)
    with pytest.raises(ValueError, match=f"exceed the model's {longest} positions"):
        TrieDecoder(model, trie).search(prompts)


def test_the_check_notices_a_model_that_ignores_the_mask(tokenizer, trie, monkeypatch):
    model = make_model(tokenizer)
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **kwargs: forward(**{**kwargs, "attention_mask": None}))
    with pytest.raises(ValueError, match="gives other logits for a tree of tokens"):
        TrieDecoder(model, trie)


def test_batch_is_single(tokenizer, trie, prompts):
    decoder = TrieDecoder(make_model(tokenizer), trie)
    items = [[0, 3], [5], [], [11, 10, 9], [1]]
    scores = decoder.score_items(prompts, items)
    for method in (decoder.search, decoder.beam_search, functools.partial(decoder.beam_search, normalize="vocab")):
        whole = method(prompts, top_k=4)
        for user, prompt in enumerate(prompts):
            alone = method([prompt], top_k=4)
            assert alone.items[0].tolist() == whole.items[user].tolist()
            torch.testing.assert_close(alone.scores[0], whole.scores[user], rtol=0, atol=1e-4)
            torch.testing.assert_close(decoder.score_items([prompt], [items[user]])[0], scores[user])


def test_the_model_is_left_as_it_was(tokenizer, trie, prompts):
    model = make_model(tokenizer, attention_dropout=0.5).train()
    model.model.norm.eval()
    decoder = TrieDecoder(model, trie)
    first, second = decoder.search(prompts), decoder.search(prompts)
    assert torch.equal(first.scores, second.scores)  # no dropout
    assert model.training
    assert not model.model.norm.training
    assert not first.scores.requires_grad


def test_beams_with_restrictions_find_what_is_left(tokenizer, trie, prompts):
    decoder = TrieDecoder(make_model(tokenizer), trie)
    expected = decoder.search(prompts, top_k=12, exclude=[[1, 2]] * 5, allowed=[0, 1, 5, 6, 7])
    found = decoder.beam_search(prompts, top_k=12, exclude=[[1, 2]] * 5, allowed=[0, 1, 5, 6, 7])
    assert found.items.tolist() == expected.items.tolist()
    torch.testing.assert_close(found.scores, expected.scores)
    assert not found.exact.any()


def test_items_may_come_in_any_kind_of_list(tokenizer, trie, prompts):
    decoder = TrieDecoder(make_model(tokenizer), trie)
    history, stock = [1, 2], [0, 1, 3, 4, 5, 6]
    expected = decoder.search(prompts, top_k=3, exclude=[history] * 5, allowed=stock)
    for kind in (set, frozenset, tuple, np.array, np.uint32, torch.tensor, torch.IntTensor):
        given = kind(stock)
        for allowed in (given, [given] * 5, decoder.prepare_allowed(given)):
            found = decoder.search(prompts, top_k=3, exclude=[kind(history)] * 5, allowed=allowed)
            assert torch.equal(found.items, expected.items)
            beams = decoder.beam_search(prompts, 3, [kind(history)] * 5, allowed, num_beams=12)
            assert torch.equal(beams.items, expected.items)
    expected = decoder.search(prompts, top_k=3, exclude=[[3, 4, 5]] * 5, allowed=[2, 3, 4, 5, 6, 7])
    found = decoder.search(prompts, top_k=3, exclude=[range(3, 6)] * 5, allowed=range(2, 8))
    assert torch.equal(found.items, expected.items)


def test_allowed_items_that_are_all_excluded(tokenizer, trie, prompts):
    decoder = TrieDecoder(make_model(tokenizer), trie)
    for method in (decoder.search, decoder.beam_search):
        found = method(prompts, top_k=2, exclude=[[5], [], [5], [], []], allowed=[5])
        assert found.items.tolist() == [[-1, -1], [5, -1], [-1, -1], [5, -1], [5, -1]]


class LargeTensors(TorchDispatchMode):
    """Notes the operations that read or make a tensor of some size or more."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.read, self.made = size, set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for values, seen in (((args, kwargs), self.read), (result, self.made)):
            tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
            if any(tensor.numel() >= self.size for tensor in tensors):
                seen.add(func.overloadpacket.__name__)
        return result


def test_a_request_does_no_work_in_proportion_to_the_catalogue():
    rng = np.random.default_rng(0)
    sequences = np.concatenate([rng.integers(0, 4, (20_000, 10)), np.full((20_000, 1), END)], axis=1)
    model, trie = small_model(0), ItemTrie.from_sequences(sequences, VOCAB_SIZE)
    decoder = TrieDecoder(model, trie)
    task = SimpleNamespace(trie=trie, tokenizer=None)
    allowed = decoder.prepare_allowed(set(range(20_000)) - {17})
    prompts = [[4, 5, 6], [7, 8]]
    decoder.beam_search(prompts)  # what is derived from the trie once, at first use
    decoder.search(prompts, vocab_weight=1.0, max_expansions=1)
    modes = [("exact", {}), ("beam", {}), ("exact", {"vocab_weight": 0.01})]
    modes += [("exact", {"item_bias": decoder.prepare_item_bias(0.01 * torch.randn(20_000))})]
    modes += [("exact", {"item_bias": SparseBias([[1, 2, 3], [4]], [[0.1, 0.0, -torch.inf], [0.2]])})]
    for arguments in ({}, {"exclude": [[1, 2], {3}], "allowed": allowed}):
        for mode, score in modes:
            with LargeTensors(20_000) as large:
                found = recommend(model, task, prompts, 3, mode, decoder=decoder, **arguments, **score)
            assert (found.items >= 0).all()
            assert large.made <= {"slice"}  # a view
            assert large.read <= {"slice", "select", "index", "searchsorted"}  # lookups
    with LargeTensors(10_000) as large:
        decoder.search(prompts, allowed=range(20_000))  # the test notices it
    assert "arange" in large.made


def test_threads_get_what_each_gets_alone(tokenizer, task, prompts):
    model, tree = make_model(tokenizer), task.trie
    decoder = TrieDecoder(model, tree)
    stock = decoder.prepare_allowed([0, 2, 4, 5, 6, 8, 10])
    calls = [
        lambda: decoder.search(prompts, top_k=5, batch_size=2),
        lambda: decoder.search(prompts[:2], top_k=3, allowed=stock, exclude=[[0], [2]]),
        lambda: decoder.beam_search(prompts[1:], top_k=4),
        lambda: decoder.beam_search(prompts[:3], top_k=4, normalize="vocab", length_penalty=1.0),
        lambda: decoder.search(prompts, top_k=12, max_expansions=2),
        lambda: decoder.search(prompts, top_k=4, vocab_weight=1.0, item_bias=torch.arange(12) % 5),
        lambda: SimpleNamespace(scores=torch.cat(decoder.score_items(prompts, [[1, 2], [3], [], [4], range(12)]))),
        lambda: recommend(model, task, prompts, top_k=5, decoder=decoder),
        lambda: recommend(model, task, prompts[:2], top_k=3, mode="generate"),
    ]
    expected = [call() for call in calls]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            found = [(index, pool.submit(calls[index])) for index in range(len(calls)) for _ in range(2)]
            for index, future in found:
                assert np.array_equal(future.result().scores, expected[index].scores)
                if hasattr(expected[index], "items"):
                    assert np.array_equal(future.result().items, expected[index].items)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_bad_arguments(tokenizer, trie, prompts):
    decoder = TrieDecoder(make_model(tokenizer), trie)
    for name in ("top_k", "max_expansions", "nodes_per_round", "batch_size"):
        with pytest.raises(ValueError, match=f"`{name}` is 0: it must be at least 1"):
            decoder.search(prompts, **{name: 0})
    with pytest.raises(ValueError, match="`prompts` is empty"):
        decoder.search([])
    with pytest.raises(ValueError, match="`prompts` has no token for user 1"):
        decoder.search([[1], []])
    with pytest.raises(ValueError, match="`exclude` has 1 lists for 5 prompts"):
        decoder.search(prompts, exclude=[[1]])
    with pytest.raises(ValueError, match="`exclude` holds item 12 .list 4., but the catalogue has items 0 to 11"):
        decoder.search(prompts, exclude=[[], [], [], [], [3, 12]])
    with pytest.raises(ValueError, match="`allowed` holds item -1"):
        decoder.search(prompts, allowed=torch.tensor([-1]))
    for nothing in ([], set(), range(0), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(ValueError, match="`allowed` is empty.*pass at least one item"):
            decoder.search(prompts, allowed=nothing)
    with pytest.raises(ValueError, match=r"`exclude` holds 1 instead of a list of items .prompt 0.*list of lists"):
        decoder.search(prompts[:3], exclude=[1, 2, 3])
    for flat in (torch.tensor([1, 2, 3]), np.array([1, 2, 3]), range(3), [[1], 2, [3]]):
        with pytest.raises(ValueError, match="`exclude` holds .* instead of a list of items"):
            decoder.search(prompts[:3], exclude=flat)
    for strange in ({1, 2, 3}, {"a": [1]}, "abc", 3, torch.tensor(3)):
        with pytest.raises(ValueError, match="`exclude` is .*pass a list that holds a list of items for each prompt"):
            decoder.search(prompts[:3], exclude=strange)
    with pytest.raises(ValueError, match="`allowed` is 3: pass a list of items"):
        decoder.search(prompts, allowed=3)
    with pytest.raises(ValueError, match=r"`exclude` holds \['b1'\] \(list 1\), but must hold item indices"):
        decoder.search(prompts[:2], exclude=[[], ["b1"]])
    with pytest.raises(ValueError, match="`allowed` holds item 12"):
        decoder.prepare_allowed(range(13))
    with pytest.raises(ValueError, match="`items` holds lists"):
        decoder.prepare_allowed([[1]])
    other = TrieDecoder(make_model(tokenizer), trie)
    with pytest.raises(ValueError, match="`allowed` was prepared by another `TrieDecoder`"):
        decoder.search(prompts, allowed=other.prepare_allowed([1]))
    mask = torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"`allowed` holds torch.bool \(list 0\).*`mask.nonzero\(\).squeeze\(1\)`"):
        decoder.search(prompts, allowed=mask)
    with pytest.raises(ValueError, match="`items` holds torch.float"):
        decoder.score_items(prompts, [[1.5], [], [], [], []])
    with pytest.raises(ValueError, match="`items` has 1 lists for 5 prompts"):
        decoder.score_items(prompts, [[1]])
    with pytest.raises(ValueError, match="`num_beams` is 3: it must be at least `top_k` = 5"):
        decoder.beam_search(prompts, top_k=5, num_beams=3)
    with pytest.raises(ValueError, match="`normalize` is 'none'"):
        decoder.beam_search(prompts, normalize="none")
    prefixes = ItemTrie.from_sequences([[5], [5, 6]], len(tokenizer))
    with pytest.raises(ValueError, match="append an end token"):
        TrieDecoder(make_model(tokenizer), prefixes).beam_search(prompts, top_k=1)
    foreign = ItemTrie.from_sequences([[len(tokenizer)]])
    with pytest.raises(ValueError, match="Was the trie built with another tokenizer"):
        TrieDecoder(make_model(tokenizer), foreign)


def test_nan_is_an_error(tokenizer, trie, prompts):
    model = make_model(tokenizer)
    decoder = TrieDecoder(model, trie)
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(ValueError, match="`model` gives NaN"):
        decoder.search(prompts)
