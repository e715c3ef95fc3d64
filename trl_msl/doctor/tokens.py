# SPDX-License-Identifier: Apache-2.0
"""Checks of the items' tokens, their trie, and the lengths of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..trie import CompressedTrie
from .findings import Case, Finding, shorten


_LONG_ITEM = 128  # tokens; a common limit of new tokens in published code


def check_written_form(case: Case) -> Iterator[Finding]:
    path = case.trie.paths(case.trie.item_nodes[:1])[0]
    text = case.tokenizer.decode(case.trie.tokens(path).tolist())
    yield Finding("An item as the model writes it", "ok", repr(text))


def check_branching(case: Case) -> Iterator[Finding]:
    """Where items begin to differ, and how many valid tokens there are at the targets' tokens."""
    trie, first = case.trie, case.trie.first_branching_node
    if first < 0:
        seen = f"nowhere: all {len(case.catalog)} have the same text"
        yield Finding("Where items begin to differ", "error", seen, "There is nothing to rank: check the text column.")
        return
    # For each item that is a target: the number of valid tokens along its path
    targets = case.target_counts.nonzero().squeeze(1)
    counts, paths = case.target_counts[targets], trie.paths(trie.item_nodes[targets])
    num_valid = trie.num_valid_tokens(paths.clamp(min=0)).where(paths >= 0, 0)
    num_tokens = int(((paths >= 0).sum(dim=1) * counts).sum())
    average = int((num_valid.sum(dim=1) * counts).sum()) / num_tokens
    seen = f"{average:.2f} at a target's token on average, of {trie.vocab_size}"
    yield Finding("Valid tokens (AVT)", "ok", seen)

    forced = int(((num_valid == 1).sum(dim=1) * counts).sum()) / num_tokens
    if forced > 0.5:
        yield Finding(
            "Forced tokens", "note", f"{forced:.0%} of the targets' tokens",
            "They cost nothing, so `length_penalty` 1.0, the default of `generate`, favours long titles: pass 0.0.",
        )  # fmt: skip
    # Every path leads through the first branching node
    first_tokens = trie.tokens(paths[trie.parents(paths.clamp(min=0)).eq(first) & (paths >= 0)])
    share = torch.bincount(first_tokens, counts.double()) / counts.sum()
    if share.max() > 0.25:
        yield Finding(
            "First token where items differ", "note",
            f"{share.max():.0%} of the targets have {case.tokenizer.decode([int(share.argmax())])!r}; "
            f"{int((share > 0).sum())} different ones",
            "With `temperature_positions='first'` the adaptive temperature runs to its upper bound: use 'all'.",
        )  # fmt: skip


def check_first_tokens(case: Case) -> Iterator[Finding]:
    """
    The valid tokens after what more than half of the items begin with, such as a quotation mark. An item that is alone
    after one of them gets all of that token's probability.
    """
    tree, node = CompressedTrie(case.trie.to("cpu")), 0
    while (children := tree.children(torch.tensor([node]))[1]).numel():
        counts = tree.item_end[children] - tree.item_start[children]
        if counts.max() <= len(case.catalog) / 2:
            break
        node = int(children[counts.argmax()])
    else:  # most items have the same text
        return
    tokens = case.trie.tokens(case.trie.paths(case.trie.item_nodes[tree.item_order[tree.item_start[node]]][None])[0])
    start = case.tokenizer.decode(tokens[: int(tree.depth[node] + tree.chain_length(node))].tolist())
    alone = int((counts == 1).sum())
    where = f" after {start!r}" if start else ""
    seen = f"{len(counts)}{where}; {alone} of them ({alone / len(counts):.0%}) lead to a single item"
    yield Finding("Valid first tokens", "ok", seen)


def check_item_lengths(case: Case) -> Iterator[Finding]:
    longer = (case.trie.item_lengths > _LONG_ITEM).nonzero().squeeze(1).tolist()
    if longer:
        yield Finding(
            "Long items", "note",
            f"{len(longer)} of {len(case.catalog)} have more than {_LONG_ITEM} tokens, up to {case.trie.depth}, such "
            f"as {shorten(case.catalog.texts[longer[0]])!r}",
            "Shorten them if you can. Where you call `generate` yourself, pass `max_new_tokens=trie.depth`.",
        )  # fmt: skip


def check_row_lengths(case: Case) -> Iterator[Finding]:
    if case.task.max_length is None:
        return
    room = [case.task.max_length - item for _, item in case.lengths]
    num_long = sum(prompt > most for (prompt, _), most in zip(case.lengths, room))
    if not num_long:
        return
    what, seen = f"Rows longer than {case.task.max_length} tokens", f"{num_long} of {len(room)}"
    try:
        case.task.fit_prompts(case.rows[:], room)
    except ValueError as error:
        yield Finding(what, "error", f"{seen}: {error}", "Raise `max_length`.")
    else:
        yield Finding(what, "note", seen, "They lose their oldest items: raise `max_length` to keep them.")


TOKEN_CHECKS = (check_written_form, check_branching, check_first_tokens, check_item_lengths, check_row_lengths)
