# SPDX-License-Identifier: Apache-2.0
"""The files of a task: written whole or not at all, and checked when read, as they may come from anyone."""

from __future__ import annotations

import hashlib
import json
import platform
import reprlib
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..trie import TRIE_FILE, ItemTrie, check_regular, read_checksum
from .catalog import ItemCatalog
from .item_tokens import encode_items
from .items_file import ITEMS_FILE
from .prompts import PromptTemplate, encode_prompts


TASK_FILE = "recommender.json"
TASK_FILES = [TASK_FILE, ITEMS_FILE, TRIE_FILE]
_FORMAT = 3
_SETTINGS = ("max_length", "max_history", "chat_template_kwargs", "decoding", "num_trained")
_PACKAGES = ("trl_msl", "trl", "transformers", "peft", "datasets", "torch", "marisa-trie")


def write_task(folder: Path, arguments: dict[str, Any], fingerprint: str) -> None:
    """
    Write the three files of a task, given by the `arguments` that [`read_task`] returns. All are written before any
    replaces an old one, so that a full disk leaves the old ones. `recommender.json` comes last: its checksums tell
    whether the others belong to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".task-") as name:
        temporary = Path(name)
        arguments["catalog"].save_pretrained(temporary)
        arguments["trie"].save_pretrained(temporary)
        content = {
            "format": _FORMAT,
            "num_items": len(arguments["catalog"]),
            "prompt_template": asdict(arguments["prompt_template"]),
            **{name: arguments[name] for name in _SETTINGS},
            "withdrawn": sorted(arguments["withdrawn"]),
            "tokenizer_fingerprint": fingerprint,
            "sha256": _checksums(temporary),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        }
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (temporary / TASK_FILE).write_text(text, encoding="utf-8")
        for name in (ITEMS_FILE, TRIE_FILE, TASK_FILE):
            (temporary / name).replace(folder / name)


def read_task(folder: Path) -> tuple[dict[str, Any], str]:
    """
    Arguments of the [`RankingTask`] that `write_task` wrote, all but the tokenizer, and the tokenizer's fingerprint.

    Raises:
        `ValueError`: if a file is missing, damaged, or does not belong to the others.
    """
    try:
        check_regular(folder / TASK_FILE)
        content = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
        _check_types(content)
        for name, checksum in _checksums(folder).items():
            if content["sha256"].get(name) != checksum:
                raise ValueError(f"{name} is damaged, or does not belong to {TASK_FILE}")
        arguments = {
            "catalog": ItemCatalog.from_pretrained(folder),
            "prompt_template": PromptTemplate(**content["prompt_template"]),
            "trie": ItemTrie.from_pretrained(folder),
            "withdrawn": frozenset(content["withdrawn"]),
            **{name: content[name] for name in _SETTINGS},
        }
        if content["num_items"] != len(arguments["catalog"]):
            raise ValueError(f"it counts {content['num_items']} items, {ITEMS_FILE} holds {len(arguments['catalog'])}")
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise unreadable(folder, error) from error
    return arguments, content["tokenizer_fingerprint"]


def unreadable(folder: Path, error: Exception) -> ValueError:
    """The error for a folder whose files are not those of a task."""
    return ValueError(
        f"`save_directory` = {str(folder)!r} does not hold a readable task ({error}). Save it again, with "
        "`Recommender.save_pretrained`, or train again."
    )


def _checksums(folder: Path) -> dict[str, str | None]:
    """Of the files beside `recommender.json`. The trie's file holds its own, which is checked when it is read."""
    check_regular(folder / ITEMS_FILE)
    with open(folder / ITEMS_FILE, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {ITEMS_FILE: digest.hexdigest(), TRIE_FILE: read_checksum(folder)}


def _check_types(content: Any) -> None:
    """Raise a `ValueError` where a file has other keys or types than those that `write_task` writes."""
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise ValueError(f"its format is {reprlib.repr(found)}, this version reads {_FORMAT}")
    expected = {
        "num_items": int,
        "prompt_template": dict,
        "max_length": int | None,
        "max_history": int | None,
        "chat_template_kwargs": dict | None,
        "decoding": dict,
        "num_trained": int | None,
        "withdrawn": list,
        "tokenizer_fingerprint": str,
        "sha256": dict,
    }
    content.setdefault("max_history", None)  # absent from files of earlier versions
    if missing := expected.keys() - content.keys():
        raise ValueError(f"it lacks {sorted(missing)}")
    for name, kind in expected.items():
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            raise ValueError(f"its {name!r} is {reprlib.repr(content[name])}")
    if strange := [item for item in content["withdrawn"] if not isinstance(item, str)]:
        raise ValueError(f"its 'withdrawn' holds {len(strange)} that are not ids, such as {reprlib.repr(strange[0])}")


def tokenizer_fingerprint(
    tokenizer: PreTrainedTokenizerBase,
    catalog: ItemCatalog,
    prompt_template: PromptTemplate,
    chat_template_kwargs: dict[str, Any] | None,
    **_: Any,  # what else a task holds
) -> str:
    """
    SHA-256 of what a task depends on in its tokenizer: the vocabulary, and the tokens of up to 200 items and of a
    prompt, which stand for its normalisation, merges, special tokens and chat template.
    """
    items = catalog.completions[:: max(1, len(catalog) // 200)][:200]
    prompt = prompt_template.render(items[:5])
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "items": encode_items(tokenizer, items, prompt_template.conversational, chat_template_kwargs),
        "prompt": encode_prompts(tokenizer, [prompt], chat_template_kwargs),
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def check_decoding(decoding: dict[str, Any], num_items: int) -> None:
    """Raise a `ValueError` for what [`recommend`] does not accept, or would take unbounded memory for."""
    is_beam = decoding.get("mode") == "beam"
    is_valid = {
        "mode": lambda value: value in ("exact", "beam"),  # `generate` can't leave a history out
        "max_expansions": lambda value: not is_beam and is_whole(value, 1, 1 << 31),
        "num_beams": lambda value: is_beam and (value is None or is_whole(value, 1, num_items)),
        "normalize": lambda value: is_beam and value in ("trie", "vocab"),
        "length_penalty": lambda value: is_beam and isinstance(value, int | float) and abs(value) <= 10,
    }
    if unknown := decoding.keys() - is_valid.keys():
        raise ValueError(f"`decoding` has {sorted(unknown)}: it may have {', '.join(is_valid)}.")
    for name, value in decoding.items():
        if not is_valid[name](value):
            raise ValueError(
                f"`decoding` has {reprlib.repr(value)} as {name!r}: pass what `recommend` accepts with mode "
                f"'exact' or 'beam', and no more beams than the {num_items} items."
            )


def is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
