# SPDX-License-Identifier: Apache-2.0
"""Ranked items for prompts, by exact search, beam search, or `generate`."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from ..data import Prompt, RankingTask
from ..model import check_whole
from .arguments import Items, read_allowed, read_followed, read_item_lists, read_prompts
from .by_generate import generate_items
from .decoder import TrieDecoder
from .item_bias import Biases, read_item_bias, select_users
from .output import DecodingOutput
from .request import check_score
from .restriction import Allowed


logger = logging.getLogger(__name__)

MODES = ("exact", "beam", "generate")


@dataclass
class Recommendations:
    """
    Ranked items of some users.

    Args:
        items, scores, exact, expansions, rounds, lost_at (`numpy.ndarray`):
            As in [`DecodingOutput`]. `expansions` and `rounds` are 0 from `generate`.
        invalid_rate (`float`):
            Share of decoded sequences that are not items; 0 with constrained decoding.
        target_ranks (`numpy.ndarray` of shape `(num_users,)`, int64, *optional*):
            From [`evaluate_recommendations`]: rank of each target, as [`ranks_of_targets`] gives it.
        is_cold (`numpy.ndarray` of shape `(num_users,)`, bool, *optional*):
            From [`evaluate_recommendations`] with `seen_items`: whether training has not seen the target.
    """

    items: np.ndarray
    scores: np.ndarray
    exact: np.ndarray
    expansions: np.ndarray
    rounds: np.ndarray
    lost_at: np.ndarray
    invalid_rate: float = 0.0
    target_ranks: np.ndarray | None = None
    is_cold: np.ndarray | None = None


def recommend(
    model: PreTrainedModel,
    task: RankingTask,
    prompts: Sequence[Prompt] | Sequence[list[int]],
    top_k: int = 10,
    mode: str = "exact",
    exclude: Sequence[Items] | None = None,
    allowed: Allowed | Items | Sequence[Items] | None = None,
    vocab_weight: float = 0.0,
    item_bias: Biases | None = None,
    num_candidates: int | None = None,
    max_expansions: int = 1024,
    num_beams: int | None = None,
    normalize: str = "trie",
    length_penalty: float = 0.0,
    follow: np.ndarray | None = None,
    batch_size: int = 16,
    decoder: TrieDecoder | None = None,
) -> Recommendations:
    """
    Rank the catalogue's items for each prompt.

    Under `accelerate launch` each process takes a share of the prompts, and all get the whole result. Items with the
    same text share a score and follow each other in catalogue order. For repeated calls, make a [`TrieDecoder`] once
    and pass it: making it checks the model, and takes time in proportion to the catalogue.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, PEFT-wrapped or not. Its `generation_config` is not used.
        task ([`RankingTask`]):
            The items and the model's tokenizer.
        prompts (`Sequence`):
            Texts or lists of messages, as in the `prompt` column, or their token ids.
        top_k (`int`, *optional*, defaults to `10`):
            Number of items to rank.
        mode (`str`, *optional*, defaults to `"exact"`):
            `"exact"`, the best items, by [`TrieDecoder.search`]; `"beam"`, those of beam search, by
            [`TrieDecoder.beam_search`]; or `"generate"`, the same by `model.generate`, which is slow, for models that
            [`TrieDecoder`] can't run.
        exclude, allowed (*optional*):
            Item indices that users must not get or may get, as for [`TrieDecoder.search`]. Not with `"generate"`.
        vocab_weight, item_bias, num_candidates, max_expansions (*optional*):
            With `"exact"`, what the score is made of, and limits of the search, as for [`TrieDecoder.search`].
        num_beams (`int`, *optional*):
            With beams, their number. Defaults to `top_k`.
        normalize (`str`, *optional*, defaults to `"trie"`):
            With beams, as for [`TrieLogitsProcessor`].
        length_penalty (`float`, *optional*, defaults to `0.0`):
            With beams, as for `generate`, whose default of 1.0 favours long titles: their last tokens are forced and
            cost nothing.
        follow (*optional*):
            With `"beam"`, items for which `lost_at` says where the beams lost them, as for
            [`TrieDecoder.beam_search`].
        batch_size (`int`, *optional*, defaults to `16`):
            Prompts per process at a time.
        decoder ([`TrieDecoder`], *optional*):
            Decoder made before from this model and the task's trie. `"generate"` uses none.

    Raises:
        `ValueError`: if `top_k` exceeds the number of items, an argument has no meaning with `mode`, `decoder` has
            another model or trie, or the model or the trie can't be used with `mode`.
    """
    trie = task.trie
    beam_arguments = {"num_beams": num_beams, "normalize": normalize, "length_penalty": length_penalty}
    score = {"vocab_weight": vocab_weight, "item_bias": item_bias, "num_candidates": num_candidates}
    exact_arguments = score | {"max_expansions": max_expansions}
    _check_mode(mode, beam_arguments, exact_arguments, exclude, allowed)
    if follow is not None and mode != "beam":
        raise ValueError(f"`follow` is {reprlib.repr(follow)}, but only beam search has it: pass mode='beam'.")
    if not 0 < top_k <= trie.num_items:
        raise ValueError(f"`top_k` is {top_k}: it must lie between 1 and the number of items, {trie.num_items}.")
    if isinstance(prompts, str):  # whose characters would be taken for prompts
        raise ValueError(f"`prompts` is a text, {reprlib.repr(prompts)}: pass a list of prompts.")
    if len(prompts) == 0:
        raise ValueError("`prompts` is empty: pass at least one.")
    if decoder is not None and not (decoder.model is model and decoder.trie is trie.to(decoder.trie.device)):
        raise ValueError("`decoder` has another model or trie: make it with `TrieDecoder(model, task.trie)`.")
    # All processes read everything, so that they all raise the same errors
    check_score(vocab_weight, item_bias, num_candidates, top_k)
    follow = read_followed(follow, len(prompts), trie.num_items)
    if exclude is not None:
        exclude = read_item_lists("exclude", exclude, len(prompts), trie.num_items)
    if allowed is not None and not isinstance(allowed, Allowed):
        allowed = read_allowed(allowed, len(prompts), trie.num_items)
    if item_bias is not None:
        item_bias = read_item_bias(item_bias, len(prompts), trie.num_items)
    process = PartialState()
    is_encoded = not isinstance(prompts[0], str) and not (len(prompts[0]) > 0 and isinstance(prompts[0][0], dict))
    encoded = prompts if is_encoded else task.encode_prompts(prompts)
    encoded = read_prompts(encoded, model, batch_size=batch_size)
    mine = range(process.process_index, len(encoded), process.num_processes)
    arguments = {"prompts": [encoded[user] for user in mine], "top_k": top_k, "batch_size": batch_size}
    restrictions = {
        "exclude": None if exclude is None else [exclude[user] for user in mine],
        "allowed": [allowed[user] for user in mine] if isinstance(allowed, list) else allowed,
    }
    exact_arguments["item_bias"] = None if item_bias is None else select_users(item_bias, mine)
    num_invalid = 0
    if mode == "generate":
        check_whole(model)
    elif decoder is None:
        decoder = TrieDecoder(model, trie)
    if len(mine) == 0:  # more processes than prompts
        found = DecodingOutput.empty(0, top_k, follow.shape[1])
    elif mode == "generate":
        found, num_invalid = generate_items(model, task.tokenizer, trie, **arguments, **beam_arguments)
    elif mode == "exact":
        found = decoder.search(**exact_arguments, **restrictions, **arguments)
    else:
        found = decoder.beam_search(**beam_arguments, **restrictions, **arguments, follow=follow[list(mine)])
    results = {name: getattr(found, name).numpy() for name in DecodingOutput.__annotations__}
    if process.num_processes > 1:
        shares = gather_object([results])
        users = np.concatenate([np.arange(rank, len(encoded), len(shares)) for rank in range(len(shares))])
        results = {name: np.concatenate([share[name] for share in shares])[users.argsort()] for name in results}
        num_invalid = sum(gather_object([num_invalid]))
    recommendations = Recommendations(**results, invalid_rate=num_invalid / (len(encoded) * (num_beams or top_k)))
    if process.is_main_process:
        _report(recommendations, mode)
    return recommendations


def _check_mode(mode: str, beam_arguments: dict[str, Any], exact_arguments: dict[str, Any], exclude, allowed) -> None:
    if mode not in MODES:
        raise ValueError(f"`mode` is {mode!r}: it must be one of {', '.join(map(repr, MODES))}.")
    defaults = {"normalize": "trie", "length_penalty": 0.0, "vocab_weight": 0.0, "max_expansions": 1024}
    for name, value in (beam_arguments if mode == "exact" else exact_arguments).items():
        if value is None or (np.isscalar(value) and value == defaults.get(name)):
            continue
        if mode == "exact":
            raise ValueError(f"`{name}` is {value!r}, but exact search has none: pass mode='beam'.")
        remedy = "leave it out, or pass mode='exact'"
        raise ValueError(f"`{name}` is {reprlib.repr(value)}, but only exact search has it: {remedy}.")
    if mode == "generate" and not (exclude is None and allowed is None):
        raise ValueError("`exclude` and `allowed` have no effect on `generate`: pass mode='exact' or mode='beam'.")


def _report(found: Recommendations, mode: str) -> None:
    """Warn if some users got too few items, or items that may not be the best."""
    num_short, num_inexact = int((found.items[:, -1] < 0).sum()), int((~found.exact).sum())
    if num_short:
        reason = "no others were left" if mode == "exact" else "raise `num_beams`"
        logger.warning("%d of %d users got fewer items than were asked for: %s.", num_short, len(found.items), reason)
    if mode == "exact" and num_inexact:
        logger.warning(
            "%d of %d users reached `max_expansions` before their items were certain to be the best: raise it.",
            num_inexact, len(found.items),
        )  # fmt: skip
