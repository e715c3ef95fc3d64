# SPDX-License-Identifier: Apache-2.0
"""Beam search by `model.generate`, for models that the engine can't run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitNormalization, PreTrainedModel, PreTrainedTokenizerBase

from ..model import evaluating
from ..trie import ItemTrie
from .logits_processor import TrieLogitsProcessor
from .output import DecodingOutput
from .request import check_beams


_GENERATING = threading.Lock()


def generate_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trie: ItemTrie,
    prompts: list[list[int]],
    top_k: int,
    num_beams: int | None = None,
    normalize: str = "trie",
    length_penalty: float = 0.0,
    batch_size: int = 16,
) -> tuple[DecodingOutput, int]:
    """
    Find items by beam search with `model.generate`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, PEFT-wrapped or not.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer, for the padding token.
        trie ([`ItemTrie`]):
            Trie of the catalogue.
        prompts (`list[list[int]]`):
            Token ids of each user's prompt.
        top_k, num_beams, normalize, length_penalty, batch_size:
            As for [`TrieDecoder.beam_search`].

    Returns:
        `tuple` of the [`DecodingOutput`], and the number of decoded sequences that are not items.

    Raises:
        `ValueError`: if there are fewer beams than `top_k`, or items without an end token of their own.
    """
    num_beams = num_beams or top_k
    check_beams(num_beams, normalize, top_k)
    trie = trie.to("cpu")
    by_length = sorted(range(len(prompts)), key=lambda user: -len(prompts[user]))
    pad_token = padding_token(tokenizer)
    config = GenerationConfig(
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=trie.depth,
        length_penalty=length_penalty,
        do_sample=False,
        eos_token_id=end_tokens(trie),
        pad_token_id=pad_token,
        return_dict_in_generate=True,
        output_scores=True,
    )
    output, num_invalid = DecodingOutput.empty(len(prompts), top_k), 0
    starts = range(0, len(by_length), batch_size)
    is_silent = len(starts) < 2 or not PartialState().is_local_main_process
    with ready_to_generate(model):
        for start in tqdm(starts, desc="Recommending", disable=is_silent):
            users = by_length[start : start + batch_size]
            found = _generate(model, trie, [prompts[u] for u in users], pad_token, config, normalize)
            sequences, scores, is_alive = (values.cpu() for values in found)
            nodes = trie.reached(sequences)
            is_item = trie.is_leaf(nodes)
            num_invalid += int((~is_item & is_alive).sum())
            nodes, scores = nodes.where(is_item & is_alive, -1).view(len(users), -1), scores.view(len(users), -1)
            ranked = _expand_leaves(trie, nodes, scores, top_k)
            for user, (user_items, user_scores) in zip(users, ranked):
                output.items[user], output.scores[user] = torch.tensor(user_items), torch.tensor(user_scores)
    return output, num_invalid


@contextlib.contextmanager
def ready_to_generate(model: PreTrainedModel) -> Iterator[None]:
    """
    Evaluation mode, no gradient, a cache, and none of the model's generation settings: `generate` takes from them what
    a config leaves unset, and a repetition penalty or top-k silently breaks constrained search. One thread at a time,
    as another one would take the empty settings for the model's own.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    with _GENERATING:
        before = base.generation_config, model.generation_config
        base.generation_config = model.generation_config = GenerationConfig()
        try:
            with evaluating(model):
                yield
        finally:
            base.generation_config, model.generation_config = before


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding token or, if it has none, its EOS."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def pad_left(prompts: list[list[int]], pad_token: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of prompts that are padded on the left, as `generate` wants them."""
    longest = max(map(len, prompts))
    input_ids = [[pad_token] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(input_ids).to(device), "attention_mask": torch.tensor(mask).to(device)}


def _generate(
    model: PreTrainedModel,
    trie: ItemTrie,
    prompts: list[list[int]],
    pad_token: int,
    config: GenerationConfig,
    normalize: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Generate from left-padded prompts.

    Returns:
        `tuple` of three `torch.Tensor`: the tokens written, int64 of shape `(rows, length)`; the score of each row,
        fp32 of shape `(rows,)`; and whether it is a beam of the search, bool of shape `(rows,)`: where there are fewer
        items than beams, `generate` adds repeats and unfinished rows.
    """
    longest = max(map(len, prompts))
    processors = [TrieLogitsProcessor(trie, longest, normalize, inplace=True)]
    if config.num_beams == 1:  # greedy search passes logits, beam search log-probabilities
        processors.insert(0, LogitNormalization())
    inputs = pad_left(prompts, pad_token, model.device)
    output = model.generate(**inputs, generation_config=config, logits_processor=processors)
    written = output.sequences[:, longest:]
    if config.num_beams == 1:
        steps = torch.stack(output.scores, dim=1).gather(-1, written.unsqueeze(-1)).squeeze(-1)
        scores = steps.nan_to_num(neginf=0.0).sum(dim=1)  # its padding has no score
        return written, scores, torch.ones_like(scores, dtype=torch.bool)
    # The added rows have -1e9 in their score, before or after it is divided by the length, so no threshold tells them
    # apart. But a beam's score is the sum of its tokens' log-probabilities
    beams = output.beam_indices  # -1 past the end of a row
    steps = [log_probs[beam, token] for log_probs, beam, token in zip(output.scores, beams.T, written.T)]
    expected = torch.stack(steps, dim=1).masked_fill(beams < 0, 0.0).sum(dim=1)
    length = (beams >= 0).sum(dim=1).clamp(min=1)
    total = output.sequences_scores * length**config.length_penalty
    return written, output.sequences_scores, (total - expected).abs() <= 1e-2 + 1e-4 * expected.abs()


def _expand_leaves(
    trie: ItemTrie, nodes: torch.Tensor, scores: torch.Tensor, top_k: int
) -> Iterator[tuple[list[int], list[float]]]:
    """Each user's items at the leaves found, best first, ties and shared leaves by index; padded with -1 and -inf."""
    for user_nodes, user_scores in zip(nodes.tolist(), scores.tolist()):
        items = [(-s, item) for node, s in zip(user_nodes, user_scores) if node >= 0 for item in trie.items(node)]
        items = sorted(items)[:top_k]
        items += [(float("inf"), -1)] * (top_k - len(items))
        yield [item for _, item in items], [-score for score, _ in items]


def end_tokens(trie: ItemTrie) -> list[int]:
    """Tokens that end items, by which `generate` knows that a beam is finished."""
    found = trie.tokens(trie.item_nodes).unique()
    inner_nodes = torch.arange(1, trie.num_nodes)[~trie.is_leaf(torch.arange(1, trie.num_nodes))]
    if not trie.is_leaf(trie.item_nodes.long()).all() or torch.isin(trie.tokens(inner_nodes), found).any():
        raise ValueError(
            "`trie` has items without an end token of their own, so `generate` can't tell when one is finished: "
            "append an end token to every sequence, as `ItemCatalog.build_trie` does."
        )
    return found.tolist()
