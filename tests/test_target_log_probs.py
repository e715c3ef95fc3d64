# SPDX-License-Identifier: Apache-2.0
"""The log-probability of the target, against the decoder and token by token; and its calibration."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import dense_loss, make_model, make_windows
from peft import PromptTuningConfig, get_peft_model
from test_decoding import FAMILIES

from trl_msl import TrieDecoder, build_rows
from trl_msl.evaluation import calibrate, mean_by_group, target_log_probs


@pytest.fixture(scope="module")
def rows(catalog, task):
    return build_rows(make_windows(catalog.ids, num_rows=7), task)


@torch.no_grad()
def token_by_token(model, task, rows, temperature):
    """Of each row, without padding: among the valid tokens, and over the vocabulary at τ = 1."""
    found, trie = [], task.trie
    for prompt, item in zip(task.ranking_prompts(rows[:]), task.catalog.indices(rows["item_id"])):
        path, before = trie.paths(trie.item_nodes[[item]]), torch.tensor([prompt])
        tokens = trie.tokens(path)
        logits = model(torch.cat([before, tokens], dim=1)).logits
        labels = torch.cat([torch.full_like(before, -100), path], dim=1)
        restricted = -dense_loss(trie, logits, labels, temperature).sum() / temperature
        over_all = logits[0, len(prompt) - 1 : -1].log_softmax(1).gather(1, tokens.T).sum()
        found.append((float(restricted), float(over_all)))
    return np.array(found).T


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])  # a cap, learned positions
def test_is_the_slow_way(family, tokenizer, task, rows):
    config_class, kwargs = FAMILIES[family]
    model = make_model(tokenizer, config_class, **kwargs)
    temperatures = (0.5, 1, 3.7)
    by_temperature, vocab = target_log_probs(model, task, rows, temperatures, batch_size=3)
    for column, temperature in enumerate(temperatures):
        expected = token_by_token(model, task, rows, temperature)
        np.testing.assert_allclose(by_temperature[:, column], expected[0], atol=1e-4)
        np.testing.assert_allclose(vocab, expected[1], atol=1e-4)
    targets = [[item] for item in task.catalog.indices(rows["item_id"])]
    scores = TrieDecoder(model, task.trie).score_items(task.ranking_prompts(rows[:]), targets)
    np.testing.assert_allclose(by_temperature[:, 1], torch.cat(scores), atol=1e-4)
    assert (vocab < by_temperature[:, 1]).all()


def test_processes_share_the_rows(tokenizer, task, rows, monkeypatch):
    model = make_model(tokenizer)
    expected = target_log_probs(model, task, rows, [2.0])
    shares = []
    for rank in range(2):
        process = SimpleNamespace(process_index=rank, num_processes=2, is_local_main_process=False)
        monkeypatch.setitem(target_log_probs.__globals__, "PartialState", lambda process=process: process)
        monkeypatch.setitem(target_log_probs.__globals__, "gather_object", lambda share: share)
        shares.append(target_log_probs(model, task, rows, [2.0]))
    for whole, parts in zip(expected, zip(*shares)):
        assert [(part != 0).sum() for part in parts] == [4, 3]
        np.testing.assert_allclose(sum(parts), whole, atol=1e-4)


def test_a_model_with_virtual_tokens(tokenizer, task, rows):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="`model` has a PROMPT_TUNING adapter, whose virtual tokens"):
        target_log_probs(get_peft_model(make_model(tokenizer), config), task, rows)


class TestCalibration:
    def test_finds_the_temperature_of_the_targets(self):
        """Targets are drawn from softmax(logits); the model gives 3 · logits."""
        rng, temperatures = np.random.default_rng(0), (1.0, 2.0, 3.0, 4.5)
        logits = torch.from_numpy(rng.normal(size=(2000, 8)))
        targets = torch.from_numpy(np.array([rng.choice(8, p=row) for row in logits.softmax(1).numpy()]))
        columns = [(3 * logits / t).log_softmax(1).gather(1, targets[:, None]) for t in temperatures]
        values, chosen = calibrate(torch.cat(columns, dim=1).numpy(), temperatures)
        assert chosen == (3.0, 3.0) and np.array_equal(values, columns[2].squeeze(1).numpy())

    def test_no_row_chooses_its_own(self):
        values, chosen = calibrate(np.array([[0.0, -1.0], [-3.0, -1.0]]), (1.0, 2.0))
        assert values.tolist() == [-1, -3] and chosen == (2, 1)
        with pytest.raises(ValueError, match="`log_probs` has 1 rows"):
            calibrate(np.zeros((1, 2)), (1.0, 2.0))


def test_means_of_warm_and_cold_targets():
    values, is_cold = np.array([-1.0, -2.0, -6.0]), np.array([False, False, True])
    means = mean_by_group(values, is_cold)
    assert (means["mean"], means["mean_warm"], means["mean_cold"]) == (-3, -1.5, -6)
    assert (means["num_warm"], means["num_cold"], means["mean_cold_low"]) == (2, 1, -6)
    assert means["mean_low"] < -3 < means["mean_high"]
    assert "mean_cold" not in mean_by_group(values, np.zeros(3, dtype=bool))
    assert set(mean_by_group(values)) == {"mean", "mean_low", "mean_high"}
