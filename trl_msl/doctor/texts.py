# SPDX-License-Identifier: Apache-2.0
"""Checks of the items' texts."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator

from ..data import texts_with_special_tokens
from .findings import Case, Finding, note_if, shorten


def check_empty(case: Case) -> Iterator[Finding]:
    empty = [item for item, text in zip(case.catalog.ids, case.catalog.texts) if not text.strip()]
    advice = "`empty_texts='id'` writes the id instead; by default they are an error."
    yield from note_if("Empty titles", empty, len(case.catalog), advice)


def check_duplicates(case: Case) -> Iterator[Finding]:
    shared = [(text, count) for text, count in Counter(case.catalog.texts).items() if count > 1]
    if shared:
        total = sum(count for _, count in shared)
        yield Finding(
            "Duplicate titles", "note",
            f"{total - len(shared)} of {len(case.catalog)} repeat another's ({total} share theirs), such as "
            f"{shorten(shared[0][0])!r}",
            "They share a leaf and a score: count hits by text (`match='text'`), or make titles unique.",
        )  # fmt: skip


def check_html_entities(case: Case) -> Iterator[Finding]:
    entities = [text for text in case.catalog.texts if html.unescape(text) != text]
    advice = "Decode them: `html_entities='decode'`."
    yield from note_if("HTML entities in titles", entities, len(case.catalog), advice)


def check_control_characters(case: Case) -> Iterator[Finding]:
    control = [text for text in case.catalog.texts if any(ord(character) < 32 for character in text)]
    advice = "Remove them: the model has to write them."
    yield from note_if("Control characters in titles", control, len(case.catalog), advice)


def check_special_tokens(case: Case) -> Iterator[Finding]:
    special = texts_with_special_tokens(case.tokenizer, case.catalog.texts)
    advice = (
        "They are tokenised as text and have no effect here. Code that tokenises them as control tokens is open to "
        "prompt injection: find out where they come from."
    )
    yield from note_if("Special tokens in titles", special, len(case.catalog), advice)


TEXT_CHECKS = (check_empty, check_duplicates, check_html_entities, check_control_characters, check_special_tokens)
