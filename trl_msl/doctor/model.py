# SPDX-License-Identifier: Apache-2.0
"""Checks of the model against tokenizer and trie."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from ..decoding import TrieDecoder
from ..model import backbone, check_head, check_length, head_projection
from .findings import Case, Finding, shorten


_NUM_BEST, _NUM_PROMPTS = 10, 8
_NUM_LISTS = 16  # one batch: seconds on a CPU, even for a model of 100M parameters
_DEFAULTS = {
    "do_sample": False, "top_k": 50, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0
}  # fmt: skip


def check_model_head(case: Case) -> Iterator[Finding]:
    try:
        check_head(case.model, case.trie)
    except ValueError as error:
        yield Finding("LM head", "error", str(error))
        return
    rows, size = case.model.get_output_embeddings().weight.shape[0], len(case.tokenizer)
    if size > rows:
        yield Finding(
            "LM head", "error", f"{rows} rows for a tokenizer of {size} tokens",
            "Tokens were added: remove them, as an adapter does not save resized embeddings.",
        )  # fmt: skip


def check_exact_decoding(case: Case) -> Iterator[Finding]:
    try:
        TrieDecoder(case.model, case.trie)
    except ValueError as error:
        yield Finding("Exact decoding", "note", str(error))
    else:
        yield Finding("Exact decoding", "ok", "supported: a tree of tokens gives the logits of its paths")


def check_generation_config(case: Case) -> Iterator[Finding]:
    """Settings that `generate` takes from the model, and that silently break constrained beams."""
    config = case.model.generation_config
    given = {name: getattr(config, name, None) for name in _DEFAULTS}
    given = {name: value for name, value in given.items() if value not in (None, _DEFAULTS[name])}
    remedies = ["reset them"] if given else []
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if missing := sorted(set(case.trie.tokens(case.trie.item_nodes.long()).tolist()) - set(ends)):
        given["eos_token_id"] = ends
        remedies.append(f"pass `eos_token_id={missing}`, by which items end")
    most = config.max_new_tokens or config.max_length
    if most is not None and most < case.trie.depth:
        given["max_new_tokens"] = most
        remedies.append(f"pass `max_new_tokens={case.trie.depth}`, the longest item")
    if given:
        advice = f"`recommend` overrides them. Where you call `generate` yourself, {'; '.join(remedies)}."
        yield Finding("Generation settings of the model", "note", json.dumps(given), advice)


@torch.no_grad()
def check_precision(case: Case) -> Iterator[Finding]:
    """How many of the ten best first tokens of each prompt differ in fp32 but not in bf16."""
    first = case.trie.first_branching_node
    if first < 0:
        return
    start = case.trie.tokens(case.trie.paths(torch.tensor([first]))[0]).tolist() if first else []
    valid = case.trie.valid_tokens(torch.tensor([first]))[1]
    num_ties, largest = 0, torch.tensor(0.0)
    base = _base(case)
    project = head_projection(base)  # in fp32, also for a model in bf16
    prompts = case.prompts(case.rows.select(range(min(_NUM_PROMPTS, len(case.rows)))))
    for prompt in prompts:
        input_ids = torch.tensor([(prompt + start)[-_num_positions(case) :]], device=case.model.device)
        hidden = backbone(base)(input_ids=input_ids, use_cache=False).last_hidden_state[0, -1:]
        logits = project(hidden, rows=valid)[0].cpu()
        best = logits.topk(min(_NUM_BEST, len(logits))).values
        num_ties += len(best.unique()) - len(best.bfloat16().unique())
        largest = torch.maximum(largest, logits.abs().max())  # nan stays nan
    if not largest.isfinite():
        yield Finding("Logits", "error", f"the largest is {largest}", "Load the model in another dtype.")
    elif num_ties:
        seen = f"up to {largest:.1f}; {num_ties} ties among the {_NUM_BEST} best of {len(prompts)} prompts"
        advice = (
            "Loss and exact decoding compute logits in fp32, which tells them apart. Where you call `generate` "
            "yourself, load the model in fp32."
        )
        yield Finding("Logits in bf16", "note", seen, advice)


def check_positions(case: Case) -> Iterator[Finding]:
    """Rows that are longer than the model's positions, within `max_length`."""
    positions, most = _num_positions(case), case.task.max_length or sys.maxsize
    num_long = sum(min(sum(lengths), most) > positions for lengths in case.lengths)
    if not num_long:
        return
    try:
        check_length(backbone(_base(case)), positions, 1)
    except ValueError:  # learned positions
        status, advice = "error", "They stop the training"
    else:
        status, advice = "note", "The model was not made for them"
    what = f"Rows longer than the model's {positions} positions"
    yield Finding(what, status, f"{num_long} of {len(case.lengths)}", f"{advice}: set `max_length` to {positions}.")


def check_label_bias(case: Case) -> Iterator[Finding]:
    """Items that most users get, whatever their history, and how much two users' lists have in common."""
    what, every = "Items that most users get", max(len(case.rows) // _NUM_LISTS, 1)
    rows = case.rows.select(range(0, len(case.rows), every)[:_NUM_LISTS])
    if len(case.catalog) < 10 * _NUM_BEST or len(rows) < 2:
        return  # lists of much of the catalogue have much in common anyway
    try:
        prompts = case.task.ranking_prompts(rows[:])
        found = TrieDecoder(case.model, case.trie).search(prompts, top_k=_NUM_BEST, batch_size=_NUM_LISTS)
    except ValueError as error:
        yield Finding(what, "note", f"unknown, as there is no exact search: {error}")
        return
    items, counts = found.items.unique(return_counts=True)
    common = int((counts * (counts - 1)).sum()) / (len(rows) * (len(rows) - 1) * _NUM_BEST)
    seen = f"two of {len(rows)} users have {common:.0%} of their {_NUM_BEST} best items in common"
    counts, order = counts.sort(descending=True, stable=True)
    if usual := items[order][counts >= len(rows) / 2].tolist():
        texts = ", ".join(repr(shorten(case.catalog.texts[item])) for item in usual[:3])
        yield Finding(
            what, "note", f"{len(usual)}, such as {texts}; {seen}",
            "A model that has not learnt the items prefers those with a rare beginning, whatever the history: few "
            "valid tokens share the probability after it (label bias). Training with MSL corrects this. To rank with "
            "the model as it is, pass `vocab_weight=1`.",
        )  # fmt: skip
    else:
        yield Finding(what, "ok", f"none; {seen}")


def _base(case: Case) -> PreTrainedModel:
    return case.model.get_base_model() if is_peft_model(case.model) else case.model


def _num_positions(case: Case) -> int:
    return getattr(case.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


MODEL_CHECKS = (
    check_model_head,
    check_exact_decoding,
    check_generation_config,
    check_precision,
    check_positions,
    check_label_bias,
)
