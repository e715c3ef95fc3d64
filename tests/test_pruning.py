# SPDX-License-Identifier: Apache-2.0
"""Where beam search loses items, against beam search written out over the model's own forwards."""

import json

import numpy as np
import pytest
import torch
from helpers import TITLES, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import run
from test_decoding import PROMPTS, SEED, TITLE, VOCAB_SIZE, small_model

from trl_msl import ItemCatalog, ItemTrie, RankingTask, Recommender, TrieDecoder, recommend
from trl_msl.decoding import Recommendations
from trl_msl.evaluation import beam_pruning
from trl_msl.scripts import evaluate


@torch.no_grad()
def lose_items(model, sequences, prompt, num_beams: int, normalize: str) -> list[int]:
    """At which token each item leaves both the beams and the finished items; 0 if it does not."""
    sequences = [tuple(sequence) for sequence in sequences]
    beams, finished, lost_at = {(): 0.0}, {}, [0] * len(sequences)
    for length in range(1, max(map(len, sequences)) + 1):
        candidates = {}
        for beam, score in beams.items():
            valid = sorted({sequence[length - 1] for sequence in sequences if sequence[: length - 1] == beam})
            log_probs = model(torch.tensor([prompt + list(beam)])).logits[0, -1].double().log_softmax(0)
            total = log_probs[valid].logsumexp(0) if normalize == "trie" else 0.0
            candidates |= {(*beam, token): score + float(log_probs[token] - total) for token in valid}
        best = sorted(candidates, key=candidates.get, reverse=True)
        finished |= {text: candidates[text] for text in best[:num_beams] if text in sequences}
        finished = dict(sorted(finished.items(), key=lambda pair: -pair[1])[:num_beams])
        beams = {text: candidates[text] for text in [text for text in best if text not in sequences][:num_beams]}
        for item, sequence in enumerate(sequences):
            if lost_at[item] == 0 and not any(sequence[: len(text)] == text for text in [*beams, *finished]):
                lost_at[item] = length
        if not beams or (len(finished) == num_beams and max(beams.values()) <= min(finished.values())):
            break
    return lost_at


@settings(max_examples=60, deadline=None)
@given(
    st.lists(TITLE, min_size=2, max_size=14), PROMPTS, SEED, st.integers(1, 5), st.sampled_from(["trie", "vocab"]),
    st.booleans(), st.integers(1, 3),
)  # fmt: skip
def test_lost_items_are_those_of_beams_written_out(
    sequences, prompts, seed, num_beams, normalize, one_start, batch_size
):
    sequences = [[9, 8, *sequence] for sequence in sequences] if one_start else sequences
    model = small_model(seed)
    decoder = TrieDecoder(model, ItemTrie.from_sequences(sequences, VOCAB_SIZE))
    top_k = min(num_beams, len(sequences))
    options = {"num_beams": num_beams, "normalize": normalize, "batch_size": batch_size}
    follow = torch.tensor([[-1, *range(len(sequences))]] * len(prompts))
    found = decoder.beam_search(prompts, top_k, follow=follow, **options)
    expected = [[0, *lose_items(model, sequences, prompt, num_beams, normalize)] for prompt in prompts]
    assert found.lost_at.tolist() == expected

    # What is lost of the true top K is what the beams did not find
    exact = decoder.search(prompts, top_k, vocab_weight=float(normalize == "vocab"))
    beams = decoder.beam_search(prompts, top_k, follow=exact.items, **options)
    for items, others, lost_at in zip(exact.items.tolist(), beams.items.tolist(), beams.lost_at.tolist()):
        texts = [sequences[item] for item in others if item >= 0]
        assert [sequences[item] not in texts for item in items if item >= 0] == [place > 0 for place in lost_at]


def test_a_loss_that_can_be_seen_by_hand():
    """Both words begin items with 1/2 each; one beam goes to the first, whose two items have 1/4 each."""
    sequences = [[0, 5, 11], [0, 6, 11], [1, 5, 11]]
    decoder = TrieDecoder(small_model(0, sharpness=0.0), ItemTrie.from_sequences(sequences, VOCAB_SIZE))
    found = decoder.beam_search([[4]], top_k=1, follow=decoder.search([[4]], top_k=3).items)
    assert decoder.search([[4]], top_k=3).items.tolist() == [[2, 0, 1]]
    assert (found.items.tolist(), found.lost_at.tolist()) == ([[0]], [[1, 0, 2]])


def make_results(items, exact, lost_at, ranks) -> Recommendations:
    items = np.array(items)
    rest = {name: np.zeros(len(items)) for name in ("scores", "expansions", "rounds")}
    return Recommendations(
        items, exact=np.array(exact), lost_at=np.array(lost_at), target_ranks=np.array(ranks), **rest
    )


def test_shares_counted_by_hand():
    """The third user's items are not certain, and the fourth has only one."""
    exact = make_results([[3, 1], [0, 2], [5, 6], [4, -1]], [True, True, False, True], np.zeros((4, 0)), [1, 0, 0, -1])
    beams = make_results(
        [[3, 0], [0, 2], [7, 8], [4, -1]], [False] * 4, [[0, 2], [0, 0], [1, 1], [0, 0]], [-1, 0, 0, 0]
    )
    assert beam_pruning(exact, beams) == {
        "num_users": 3, "num_targets": 2, "pruned_users": 1 / 3, "pruned_items": 1 / 5, "pruned_targets": 1 / 2,
        "pruned_by_token": [0.0, 1 / 5],
    }  # fmt: skip
    exact.exact[:] = False
    assert beam_pruning(exact, beams) == {"num_users": 0, "num_targets": 0, "pruned_by_token": []}
    with pytest.raises(
        ValueError, match=r"followed items of shape \(4, 0\), but `exact` has \(4, 2\): .*follow=exact.items"
    ):
        beam_pruning(exact, exact)


def test_what_cannot_be_followed(task):
    model, prompts = make_model(task.tokenizer), [[1, 2], [3]]
    for follow, problem in (
        ([[0, 1]], r"has shape \(1, 2\) and dtype torch.int64: pass item indices, a row for each of the 2 prompts"),
        ([0, 1], r"has shape \(2,\)"),
        ([[0.5], [1.0]], "torch.float32"),
        ([[12], [0]], "holds 0 to 12: pass item indices from 0 to 11, and -1"),
        ([[-2], [0]], "holds -2 to 0"),
    ):
        with pytest.raises(ValueError, match=f"`follow` .*{problem}"):
            recommend(model, task, prompts, top_k=2, mode="beam", follow=follow)
    for mode in ("exact", "generate"):
        with pytest.raises(ValueError, match="`follow` is .*, but only beam search has it"):
            recommend(model, task, prompts, top_k=2, mode=mode, follow=[[0], [1]])


def test_on_the_command_line(tmp_path, folder, tokenizer, template, capsys):
    """In whatever order; with a length penalty the scores are others, and nothing is compared."""
    task = RankingTask(ItemCatalog(range(len(TITLES)), TITLES, template='"{text}"'), tokenizer, template)
    model = make_model(tokenizer, seed=3)
    Recommender(model, task).save_pretrained(tmp_path / "model")
    options = ["--model_name_or_path", tmp_path / "model", "--data_dir", folder, "--output_dir", tmp_path / "out"]
    options += ["--top_k", 2]
    for decodings in (["exact", "beam"], ["beam", "exact"]):
        run(evaluate, *options, "--decoding", *decodings)
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        assert list(metrics)[:2] == decodings
        found, differences = metrics["pruning"]["beam"], metrics["differences"]
        assert found["num_users"] == 6 and sum(found["pruned_by_token"]) == pytest.approx(found["pruned_items"])
        same = next(iter(differences.values()))["same_items"]
        assert found["pruned_users"] == pytest.approx(1 - same) and same < 1
        shown = capsys.readouterr().out
        assert "What beams lose of the true top 2" in shown and "by the token at which they are pruned: 0." in shown
    run(evaluate, *options, "--decoding", "exact", "beam-vocab", "--vocab_weight", 1, "--max_expansions", 9999)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    same = metrics["differences"]["beam-vocab - exact-1"]["same_items"]
    assert metrics["pruning"]["beam-vocab"]["pruned_users"] == pytest.approx(1 - same)
    capsys.readouterr()
    for more in (["--decoding", "beam"], ["--decoding", "exact", "beam", "--length_penalty", 1.0]):
        run(evaluate, *options, *more)
        assert json.loads((tmp_path / "out" / "metrics.json").read_text())["pruning"] == {}
        assert "What beams lose" not in capsys.readouterr().out
