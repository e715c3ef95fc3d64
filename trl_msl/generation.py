# SPDX-License-Identifier: Apache-2.0
"""Recommending: ranked items for prompts, by beam search over the trie."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, is_peft_model
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .data import Prompt, encode_prompts
from .logits_process import TrieLogitsProcessor
from .trie import ItemTrie


logger = logging.getLogger(__name__)

_DEAD_BEAM = -1e8  # transformers gives -1e9 or -inf to beams that search made up


@dataclass
class Recommendations:
    """
    Ranked items of some users.

    Args:
        items (`numpy.ndarray` of shape `(num_users, top_k)`, int64):
            Item indices, best first; `-1` where there is none.
        scores (`numpy.ndarray` of shape `(num_users, top_k)`, float64):
            Log-probability of each item's text; `-inf` where there is none.
        num_invalid (`int`):
            Sequences that are no item. Constrained decoding makes none.
        num_sequences (`int`):
            Sequences decoded, valid or not.
    """

    items: np.ndarray
    scores: np.ndarray
    num_invalid: int
    num_sequences: int


def recommend(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trie: ItemTrie,
    prompts: Sequence[Prompt] | Sequence[list[int]],
    top_k: int = 10,
    num_beams: int | None = None,
    normalize: str = "trie",
    length_penalty: float = 0.0,
    batch_size: int = 16,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Recommendations:
    """
    Rank the catalogue's items for each prompt by beam search over the trie.

    Under `accelerate launch` each process takes a share of the prompts, and all get the whole result. Items with the
    same text share a score and follow each other in catalogue order.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, PEFT-wrapped or not. Its `generation_config` is not used.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer that the trie was built with.
        trie ([`ItemTrie`]):
            Trie of the catalogue.
        prompts (`Sequence`):
            Texts or lists of messages, as in the `prompt` column, or their token ids.
        top_k (`int`, *optional*, defaults to `10`):
            Number of items to rank.
        num_beams (`int`, *optional*):
            Beam width. Defaults to `top_k`.
        normalize (`str`, *optional*, defaults to `"trie"`):
            As for [`TrieLogitsProcessor`].
        length_penalty (`float`, *optional*, defaults to `0.0`):
            As for `generate`. Its own default of 1.0 favours long titles, whose last tokens are forced and free.
        batch_size (`int`, *optional*, defaults to `16`):
            Prompts per process at a time. `generate` keeps the scores of every step: reckon with
            `batch_size * num_beams * vocab_size * trie.depth * 4` bytes.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Passed to the chat template.

    Raises:
        `ValueError`: if `top_k` exceeds the number of items, `num_beams` is below `top_k`, or the trie's items do not
            end with an end token.
    """
    num_beams = num_beams or top_k
    if not 0 < top_k <= trie.num_items:
        raise ValueError(f"`top_k` is {top_k}: it must lie between 1 and the number of items, {trie.num_items}.")
    if num_beams < top_k:
        raise ValueError(f"`num_beams` is {num_beams}: it must be at least `top_k` = {top_k}.")
    if len(prompts) == 0:
        raise ValueError("`prompts` is empty: there is nobody to recommend to.")
    process, trie = PartialState(), trie.to("cpu")
    is_encoded = isinstance(prompts[0], list) and isinstance(prompts[0][0], int)
    encoded = prompts if is_encoded else encode_prompts(tokenizer, prompts, chat_template_kwargs)
    mine = range(process.process_index, len(encoded), process.num_processes)
    by_length = sorted(mine, key=lambda index: -len(encoded[index]))  # little padding, and the largest batch first
    pad_token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config = GenerationConfig(
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=trie.depth,
        length_penalty=length_penalty,
        do_sample=False,
        eos_token_id=_end_tokens(trie),
        pad_token_id=pad_token,
        return_dict_in_generate=True,
        output_scores=True,
    )
    results, num_invalid = [], 0
    starts = range(0, len(by_length), batch_size)
    with _ready_to_generate(model):
        for start in tqdm(starts, desc="Recommending", disable=len(starts) < 2 or not process.is_local_main_process):
            users = by_length[start : start + batch_size]
            sequences, scores = _generate(model, trie, [encoded[u] for u in users], pad_token, config, normalize)
            scores = scores.view(len(users), num_beams).cpu()
            nodes = trie.reached(sequences.cpu()).view(len(users), num_beams)
            is_item, alive = trie.is_leaf(nodes), scores > _DEAD_BEAM
            num_invalid += int((~is_item & alive).sum())
            ranked = _expand_leaves(trie, nodes.where(is_item & alive, -1), scores, top_k)
            results += [(user, *row) for user, row in zip(users, ranked)]
    if process.num_processes > 1:
        results = gather_object(results)
        num_invalid = sum(gather_object([num_invalid]))
    results.sort(key=lambda row: row[0])
    num_short = sum(items[-1] < 0 for _, items, _ in results)
    if num_short and process.is_main_process:
        logger.warning(
            "%d of %d users got fewer than top_k=%d items: raise `num_beams`.", num_short, len(results), top_k
        )
    return Recommendations(
        items=np.array([items for _, items, _ in results], dtype=np.int64),
        scores=np.array([scores for _, _, scores in results], dtype=np.float64),
        num_invalid=num_invalid,
        num_sequences=len(results) * num_beams,
    )


@contextlib.contextmanager
def _ready_to_generate(model: PreTrainedModel) -> Iterator[None]:
    """
    Evaluation mode, no gradient, a cache, and none of the model's own generation settings: `generate` takes from them
    whatever a config leaves unset, and a repetition penalty or top-k breaks constrained search silently.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    before = model.training, base.generation_config, model.generation_config
    base.generation_config = model.generation_config = GenerationConfig()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        training, base.generation_config, model.generation_config = before
        model.train(training)


def _generate(
    model: PreTrainedModel,
    trie: ItemTrie,
    prompts: list[list[int]],
    pad_token: int,
    config: GenerationConfig,
    normalize: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens written for left-padded prompts, `(rows, length)`, and their scores, `(rows,)`."""
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[pad_token] * (longest - len(p)) + p for p in prompts], device=model.device)
    attention_mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        generation_config=config,
        logits_processor=[TrieLogitsProcessor(trie, longest, normalize, inplace=True)],
    )
    written = output.sequences[:, longest:]
    if config.num_beams > 1:
        return written, output.sequences_scores
    steps = torch.stack(output.scores, dim=1).gather(-1, written.unsqueeze(-1)).squeeze(-1)
    return written, steps.nan_to_num(neginf=0.0).sum(dim=1)  # greedy search: its padding has no score


def _expand_leaves(
    trie: ItemTrie, nodes: torch.Tensor, scores: torch.Tensor, top_k: int
) -> Iterator[tuple[list[int], list[float]]]:
    """Per user, the items at the leaves found, best first, ties and shared leaves by index; filled up by -1, -inf."""
    for user_nodes, user_scores in zip(nodes.tolist(), scores.tolist()):
        items = [(-s, item) for node, s in zip(user_nodes, user_scores) if node >= 0 for item in trie.items(node)]
        items = sorted(items)[:top_k]
        items += [(float("inf"), -1)] * (top_k - len(items))
        yield [item for _, item in items], [-score for score, _ in items]


def _end_tokens(trie: ItemTrie) -> list[int]:
    """Tokens that end items, by which `generate` knows that a beam is finished."""
    end_tokens = trie.tokens(trie.item_nodes).unique()
    inner_nodes = torch.arange(1, trie.num_nodes)[~trie.is_leaf(torch.arange(1, trie.num_nodes))]
    if not trie.is_leaf(trie.item_nodes.long()).all() or torch.isin(trie.tokens(inner_nodes), end_tokens).any():
        raise ValueError(
            "`trie` has items that do not end with a token of their own, so `generate` can't know when one is "
            "finished: append an end token to every sequence, as `ItemCatalog.build_trie` does."
        )
    return end_tokens.tolist()
