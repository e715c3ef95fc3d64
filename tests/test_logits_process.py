# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from helpers import make_model
from transformers import PrefixConstrainedLogitsProcessor

from trl_msl import TrieLogitsProcessor


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture(scope="module")
def inputs(tokenizer):
    prompts = ["The user has read: Dune\nNext: ", "Next: "]
    return tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")


def generate(model, inputs, processor, trie, tokenizer, **kwargs):
    return model.generate(
        **inputs,
        logits_processor=[processor],
        max_new_tokens=trie.depth,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_scores=True,
        **kwargs,
    )


def written_items(sequences, prompt_length, tokenizer):
    return tokenizer.batch_decode(sequences[:, prompt_length:], skip_special_tokens=True)


MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 8},
    "beam": {"num_beams": 4, "num_return_sequences": 4, "do_sample": False},
    "beam sampling": {"num_beams": 4, "num_return_sequences": 4, "do_sample": True},
}


@pytest.mark.parametrize("normalize", ["trie", "vocab"])
@pytest.mark.parametrize("mode", MODES)
def test_only_items_are_written(mode, normalize, model, inputs, trie, tokenizer, catalog):
    torch.manual_seed(0)
    length = inputs["input_ids"].shape[1]
    processor = TrieLogitsProcessor(trie, length, normalize)
    output = generate(model, inputs, processor, trie, tokenizer, **MODES[mode])
    texts = written_items(output.sequences, length, tokenizer)
    assert set(texts) <= set(catalog.completions)
    if mode == "beam":
        assert len(set(texts[:4])) == len(set(texts[4:])) == 4


@pytest.mark.parametrize("num_beams", [1, 4])
def test_equal_to_transformers_processor(num_beams, model, inputs, trie, tokenizer):
    length = inputs["input_ids"].shape[1]

    def allowed(_, sequence):
        node = int(trie.reached(sequence[None, length:])[0])
        tokens = [int(trie.tokens(torch.tensor(child))) for child in trie.children(node)] if node >= 0 else []
        return tokens or [tokenizer.eos_token_id]

    reference = PrefixConstrainedLogitsProcessor(allowed, num_beams)
    kwargs = {"num_beams": num_beams, "num_return_sequences": num_beams, "do_sample": False}
    expected = generate(model, inputs, reference, trie, tokenizer, **kwargs)
    output = generate(model, inputs, TrieLogitsProcessor(trie, length, "vocab"), trie, tokenizer, **kwargs)
    assert torch.equal(output.sequences, expected.sequences)
    if num_beams > 1:
        torch.testing.assert_close(output.sequences_scores, expected.sequences_scores)


def test_beam_scores_are_restricted_log_probabilities(model, inputs, trie, tokenizer):
    """Each beam's score is the sum over its tokens of the log-softmax among the valid tokens alone."""
    length = inputs["input_ids"].shape[1]
    processor = TrieLogitsProcessor(trie, length, "trie")
    output = generate(
        model,
        inputs,
        processor,
        trie,
        tokenizer,
        num_beams=3,
        num_return_sequences=3,
        length_penalty=0.0,
        do_sample=False,
    )
    mask = torch.cat(
        [inputs["attention_mask"].repeat_interleave(3, 0), torch.ones_like(output.sequences[:, length:])], 1
    )
    logits = model(output.sequences, attention_mask=mask).logits.detach()
    for row, sequence in enumerate(output.sequences):
        node, score = 0, 0.0
        for position in range(length, len(sequence)):
            children = list(trie.children(node))
            if not children:
                break
            tokens = trie.tokens(torch.tensor(children))
            log_probabilities = logits[row, position - 1, tokens].log_softmax(dim=0)
            place = tokens.tolist().index(int(sequence[position]))
            node, score = children[place], score + float(log_probabilities[place])
        assert abs(score - float(output.sequences_scores[row])) < 1e-4


def test_state_is_read_from_the_sequences(trie, tokenizer):
    """One processor serves sequences of any length, in any order, at any time."""
    processor = TrieLogitsProcessor(trie, prompt_length=2)
    torch.manual_seed(0)
    paths = trie.tokens(trie.paths(trie.item_nodes))
    rows = torch.cat([torch.zeros(len(paths), 2, dtype=torch.int64), paths[:, :3]], dim=1)
    scores = torch.randn(len(rows), len(tokenizer))
    once = processor(rows, scores)
    processor(rows[:1, :2], scores[:1])
    overwritten = scores.clone()
    assert TrieLogitsProcessor(trie, prompt_length=2, inplace=True)(rows, overwritten) is overwritten
    assert torch.equal(overwritten, once)
    order = torch.randperm(len(rows))
    assert torch.equal(processor(rows[order], scores[order]), once[order])
    torch.testing.assert_close(processor(rows, scores.bfloat16()).float(), once, rtol=0.02, atol=0.02)
    for row in range(len(rows)):
        assert torch.equal(processor(rows[row : row + 1], scores[row : row + 1])[0], once[row])


def test_more_beams_than_items(model, inputs, trie, tokenizer, catalog):
    """What search makes up beyond the catalogue stays far below any item's score."""
    length = inputs["input_ids"].shape[1]
    num_beams = len(catalog) + 5
    output = generate(
        model, inputs, TrieLogitsProcessor(trie, length), trie, tokenizer, num_beams=num_beams,
        num_return_sequences=num_beams, do_sample=False,
    )  # fmt: skip
    texts = written_items(output.sequences, length, tokenizer)
    alive = (output.sequences_scores > -1e8).tolist()
    assert {t for t, a in zip(texts, alive) if a} == set(catalog.completions)
    assert sum(alive) == 2 * len(set(catalog.completions))


def test_bad_arguments(trie):
    with pytest.raises(ValueError, match="`normalize` is 'none'"):
        TrieLogitsProcessor(trie, 3, normalize="none")
    with pytest.raises(ValueError, match="`prompt_length` is -1"):
        TrieLogitsProcessor(trie, -1)
    scores = torch.zeros(1, 1000)
    with pytest.raises(ValueError, match="`prompt_length` is 3, but the sequences have 2 tokens"):
        TrieLogitsProcessor(trie, 3)(torch.zeros(1, 2, dtype=torch.int64), scores)
    with pytest.raises(ValueError, match="none of the 1 rows has written the beginning of an item"):
        TrieLogitsProcessor(trie, 1)(torch.tensor([[0, 0, 0]]), scores)
