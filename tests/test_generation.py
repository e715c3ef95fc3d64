# SPDX-License-Identifier: Apache-2.0
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import make_model, make_windows, score_every_item
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, MambaConfig

from trl_msl import ItemTrie, TrieDecoder, build_rows, recommend
from trl_msl.decoding.by_generate import generate_items


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture(scope="module")
def prompts(task, catalog):
    return build_rows(make_windows(catalog.ids, num_rows=9), task)["prompt"][:]


@pytest.mark.parametrize("mode", ["exact", "beam", "generate"])
def test_the_whole_ranking_is_that_of_brute_force(mode, model, task, trie, prompts):
    found = recommend(model, task, prompts, top_k=trie.num_items, mode=mode, batch_size=4)
    scores = score_every_item(model, trie, task.encode_prompts(prompts))
    for user in range(len(prompts)):
        order = sorted(range(trie.num_items), key=lambda item: (-round(scores[user, item], 4), item))
        assert found.items[user].tolist() == order
        np.testing.assert_allclose(found.scores[user], scores[user, order], atol=1e-4)
    assert found.invalid_rate == 0
    assert found.exact.all() == (mode == "exact")


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("normalize", ["trie", "vocab"])
@pytest.mark.parametrize("num_beams", [2, 4, 20])
def test_our_beams_are_those_of_generate(num_beams, normalize, length_penalty, model, task, prompts):
    settings = {"num_beams": num_beams, "normalize": normalize, "length_penalty": length_penalty, "top_k": 2}
    ours = recommend(model, task, prompts, mode="beam", **settings)
    theirs = recommend(model, task, prompts, mode="generate", **settings)
    assert np.array_equal(ours.items, theirs.items)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
    assert (ours.expansions > 0).all()


@pytest.mark.parametrize("normalize", ["trie", "vocab"])
def test_greedy_search_is_a_beam_of_one(normalize, model, task, prompts):
    ours = recommend(model, task, prompts, top_k=1, mode="beam", normalize=normalize)
    theirs = recommend(model, task, prompts, top_k=1, mode="generate", normalize=normalize)
    assert np.array_equal(ours.items, theirs.items)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)


def test_beams_when_all_items_begin_alike(model, task, tokenizer, prompts):
    """The tokens before the first choice count in the vocabulary's score, and as length."""
    trie = ItemTrie.from_sequences([[7, 8, 9, 3], [7, 8, 10, 11, 3], [7, 8, 10, 12, 3]], len(tokenizer))
    settings = {"top_k": 3, "normalize": "vocab", "length_penalty": 1.0}
    encoded = task.encode_prompts(prompts)
    ours = TrieDecoder(model, trie).beam_search(encoded, **settings)
    theirs, _ = generate_items(model, tokenizer, trie, encoded, **settings)
    assert torch.equal(ours.items, theirs.items)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("short", [7, 8, 9])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, 10.0, -1.0, -2.0])
def test_beams_beyond_the_catalogue_are_not_items(length_penalty, short, model, tokenizer):
    """With fewer items than beams, `generate` fills up with beams that it gives scores of about -1e9 / length."""
    forced = list(range(20, 34))
    sequences = [[first, 3] if first == short else [first, *forced, 3] for first in (7, 8, 9)]
    trie = ItemTrie.from_sequences(sequences, len(tokenizer))
    prompts = [[5, 6], [6, 5, 4]]
    found, num_invalid = generate_items(
        model, tokenizer, trie, prompts, top_k=3, num_beams=12, length_penalty=length_penalty
    )
    assert found.items.sort(dim=1).values.tolist() == [[0, 1, 2]] * 2
    assert num_invalid == 0
    expected = score_every_item(model, trie, prompts) / (trie.item_lengths.numpy() ** length_penalty)
    np.testing.assert_allclose(found.scores, np.take_along_axis(expected, found.items.numpy(), axis=1), rtol=1e-3)


@pytest.mark.parametrize("mode", ["exact", "generate"])
def test_batches_prompts_lengths_and_wrapping_do_not_matter(mode, model, task, tokenizer, prompts):
    whole = recommend(model, task, prompts, top_k=4, mode=mode, batch_size=16)
    single = recommend(model, task, prompts, top_k=4, mode=mode, batch_size=1)
    wrapped = get_peft_model(make_model(tokenizer), LoraConfig(task_type="CAUSAL_LM"))
    adapter = recommend(wrapped, task, prompts, top_k=4, mode=mode)  # a new adapter changes nothing
    encoded = [np.array(ids) for ids in task.encode_prompts(prompts)]
    ids = recommend(model, task, encoded, top_k=4, mode=mode)
    for other in (single, adapter, ids):
        assert np.array_equal(whole.items, other.items)
        np.testing.assert_allclose(whole.scores, other.scores, atol=1e-4)


@pytest.mark.parametrize("mode", ["exact", "generate"])
def test_the_models_own_generation_settings_are_not_used_and_not_lost(mode, task, tokenizer, prompts):
    model = make_model(tokenizer).train()
    expected = recommend(model, task, prompts, top_k=4, mode=mode)
    model.generation_config = GenerationConfig(repetition_penalty=5.0, do_sample=True, top_k=1, max_new_tokens=2)
    found = recommend(model, task, prompts, top_k=4, mode=mode)
    assert np.array_equal(found.items, expected.items)
    assert model.training
    assert model.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("mode", ["exact", "beam"])
def test_exclude_the_history_and_allow_a_category(mode, model, task, prompts):
    full = recommend(model, task, prompts, top_k=12)
    history = [row[:3].tolist() for row in full.items]
    in_stock = torch.tensor([0, 2, 4, 6, 8, 10])
    settings = {"top_k": 3, "mode": mode, "exclude": history, "num_beams": 12 if mode == "beam" else None}
    found = recommend(model, task, prompts, allowed=in_stock, **settings)
    for row, ranking, excluded in zip(found.items, full.items.tolist(), history):
        assert row.tolist() == [item for item in ranking if item in in_stock and item not in excluded][:3]
    per_user = recommend(model, task, prompts, allowed=[in_stock.tolist()] * 9, **settings)
    assert np.array_equal(found.items, per_user.items)


def test_what_is_missing_is_reported(model, task, prompts, caplog):
    with caplog.at_level(logging.WARNING, "trl_msl"):
        found = recommend(model, task, prompts, top_k=3, allowed=[5, 6])
        assert "9 of 9 users got fewer items than were asked for: no others were left" in caplog.text
        assert (found.items[:, 2] == -1).all()
        caplog.clear()
        found = recommend(model, task, prompts, top_k=2, max_expansions=1)
        assert "9 of 9 users reached `max_expansions`" in caplog.text
        assert "fewer than" not in caplog.text
        assert (found.items >= 0).all()
        assert "raise `num_beams`" not in caplog.text
        recommend(model, task, prompts, top_k=12, mode="beam", allowed=[5, 6])
        assert "raise `num_beams`" in caplog.text


def test_a_decoder_made_before_is_used(model, task, tokenizer, prompts, monkeypatch):
    expected = recommend(model, task, prompts, top_k=3, allowed=[0, 2, 4, 6])
    decoder = TrieDecoder(model, task.trie)
    monkeypatch.setattr(TrieDecoder, "__init__", None)  # none can be made now
    for allowed in ([0, 2, 4, 6], {0, 2, 4, 6}, decoder.prepare_allowed([0, 2, 4, 6])):
        found = recommend(model, task, prompts, top_k=3, allowed=allowed, decoder=decoder)
        assert np.array_equal(found.items, expected.items)
        assert np.array_equal(found.scores, expected.scores)
    for other in ({"model": make_model(tokenizer), "task": task}, {"model": model, "task": replace(task, trie=None)}):
        with pytest.raises(ValueError, match="`decoder` has another model or trie"):
            recommend(**other, prompts=prompts, decoder=decoder)


def test_models_that_the_engine_cannot_run_are_sent_to_generate(task, tokenizer, prompts):
    model = make_model(tokenizer, MambaConfig)
    with pytest.raises(ValueError, match="mode='generate'"):
        recommend(model, task, prompts)
    found = recommend(model, task, prompts, mode="generate")
    assert (found.items >= 0).all()


def test_bad_arguments(model, task, tokenizer, prompts):
    with pytest.raises(ValueError, match="`top_k` is 13: it must lie between 1 and the number of items, 12"):
        recommend(model, task, prompts, top_k=13)
    with pytest.raises(ValueError, match="`prompts` is empty"):
        recommend(model, task, [])
    with pytest.raises(ValueError, match="`prompts` is a text, .*: pass a list of prompts"):
        recommend(model, task, prompts[0])
    with pytest.raises(ValueError, match="`mode` is 'greedy': it must be one of 'exact', 'beam', 'generate'"):
        recommend(model, task, prompts, mode="greedy")
    with pytest.raises(ValueError, match="`num_beams` is 20, but exact search has none: pass mode='beam'"):
        recommend(model, task, prompts, num_beams=20)
    with pytest.raises(ValueError, match="`normalize` is 'vocab', but exact search"):
        recommend(model, task, prompts, normalize="vocab")
    with pytest.raises(ValueError, match="`exclude` and `allowed` have no effect on `generate`"):
        recommend(model, task, prompts, mode="generate", allowed=[1])
    with pytest.raises(ValueError, match="`exclude` has 10 lists for 9 prompts"):
        recommend(model, task, prompts, exclude=[[1]] * 10)
    with pytest.raises(ValueError, match="`allowed` has 2 lists for 9 prompts"):
        recommend(model, task, prompts, allowed=[[1], [2]])
    with pytest.raises(ValueError, match="`allowed` is empty"):
        recommend(model, task, prompts, allowed=[])
    for mode in ("exact", "generate"):
        with pytest.raises(ValueError, match="`prompts` has no token for user 0"):
            recommend(model, task, [[], [1]], mode=mode)
        with pytest.raises(ValueError, match="`batch_size` is 0: it must be at least 1"):
            recommend(model, task, prompts, mode=mode, batch_size=0)
        for token in (-1, model.config.vocab_size):
            with pytest.raises(ValueError, match=f"`prompts` has token {token} for user 1, but `model` has tokens 0"):
                recommend(model, task, [[1], [2, token]], mode=mode)
    for mode in ("beam", "generate"):
        with pytest.raises(ValueError, match="`max_expansions` is 5, but only exact search"):
            recommend(model, task, prompts, mode=mode, max_expansions=5)
        with pytest.raises(ValueError, match="`num_beams` is 3: it must be at least `top_k` = 5"):
            recommend(model, task, prompts, top_k=5, mode=mode, num_beams=3)
    for sequences in ([[5, 6], [6, 5]], [[5], [5, 6]]):
        trie = ItemTrie.from_sequences(sequences)
        with pytest.raises(ValueError, match="append an end token"):
            generate_items(model, tokenizer, trie, [[1]], top_k=1)
