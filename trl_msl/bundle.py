# SPDX-License-Identifier: Apache-2.0
"""What a trained model needs to recommend, in files beside its weights: items, trie, prompt, tokenizer fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import platform
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .catalog import ITEMS_FILE, ItemCatalog, encode_items
from .prompts import PromptTemplate, encode_prompts
from .trie import ItemTrie
from .trie_arrays import TRIE_FILE


logger = logging.getLogger(__name__)

BUNDLE_FILE = "recommender.json"
BUNDLE_FILES = [BUNDLE_FILE, ITEMS_FILE, TRIE_FILE]
_FORMAT = 2
_DECODING = ("mode", "max_expansions", "num_beams", "normalize", "length_penalty")
_PACKAGES = ("trl_msl", "trl", "transformers", "peft", "datasets", "torch", "marisa-trie")


@dataclass(frozen=True)
class Bundle:
    """
    What a trained model needs to recommend, besides its weights and its tokenizer.

    Args:
        catalog ([`ItemCatalog`]):
            The items.
        trie ([`ItemTrie`]):
            Their trie, built with the model's tokenizer.
        prompt_template ([`PromptTemplate`]):
            How a history becomes a prompt.
        max_length (`int`, *optional*):
            As in training: longer prompts lose their oldest items.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Passed to the chat template.
        decoding (`dict[str, Any]`, *optional*):
            Arguments of [`recommend`] that [`Recommender`] uses unless told otherwise: `mode` (`"exact"` or
            `"beam"`), `max_expansions`, `num_beams`, `normalize`, `length_penalty`.
        num_trained (`int`, *optional*):
            The model was trained with the first so many items, and has never seen those after them. Defaults to all.
        withdrawn (`frozenset[str]`, *optional*):
            Ids of items that histories may hold, but that are not to be recommended.

    Raises:
        `ValueError`: if these do not fit together.
    """

    catalog: ItemCatalog
    trie: ItemTrie
    prompt_template: PromptTemplate
    max_length: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    decoding: dict[str, Any] = field(default_factory=lambda: {"mode": "exact"})
    num_trained: int | None = None
    withdrawn: frozenset[str] = frozenset()

    def __post_init__(self):
        if len(self.catalog) != self.trie.num_items:
            raise ValueError(f"`catalog` ({self.catalog}) is not what `trie` ({self.trie}) was built from.")
        if self.max_length is not None and not _is_whole(self.max_length, 1, 1 << 31):
            raise ValueError(f"`max_length` is {self.max_length!r}: it must be a number of tokens, or `None`.")
        _check_decoding(self.decoding, len(self.catalog))
        if self.num_trained is not None and not 0 < self.num_trained <= len(self.catalog):
            raise ValueError(f"`num_trained` is {self.num_trained}, but there are {len(self.catalog)} items.")
        # As the catalogue has them: the number 5 would not be found among its ids, and item "5" be recommended
        object.__setattr__(self, "withdrawn", _ids("withdrawn", self.withdrawn))
        self.catalog.indices(self.withdrawn)
        if len(self.withdrawn) == len(self.catalog):
            raise ValueError(f"`withdrawn` holds all {len(self.catalog)} items, so there is nothing to recommend.")

    # ------------------------------------------------------------------ storage

    def save_pretrained(self, save_directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Write the bundle into a folder: `items.parquet`, `trie.safetensors`, and `recommender.json`, last, with the
        checksums of the others. Each file is written whole and then renamed.

        Args:
            save_directory (`str` or `Path`):
                Folder, usually that of the model.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer that the trie was built with, whose fingerprint is kept.
        """
        folder = Path(save_directory)
        self.catalog.save_pretrained(folder)
        self.trie.save_pretrained(folder)
        content = {
            "format": _FORMAT,
            "num_items": len(self.catalog),
            "prompt_template": dataclasses.asdict(self.prompt_template),
            "max_length": self.max_length,
            "chat_template_kwargs": self.chat_template_kwargs,
            "decoding": self.decoding,
            "num_trained": self.num_trained,
            "withdrawn": sorted(self.withdrawn),
            "tokenizer_fingerprint": self.fingerprint(tokenizer),
            "sha256": {name: _checksum(folder / name) for name in (ITEMS_FILE, TRIE_FILE)},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        }
        temporary = folder / f".{BUNDLE_FILE}.tmp"
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(folder / BUNDLE_FILE)

    @classmethod
    def from_pretrained(cls, save_directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> Bundle:
        """
        Read a bundle written by [`Bundle.save_pretrained`].

        Args:
            save_directory (`str` or `Path`):
                Its folder.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer to be used with it.

        Raises:
            `ValueError`: if there is none, a file is damaged, or the tokenizer is not the one that it was made with.
        """
        folder = Path(save_directory)
        try:
            content = json.loads((folder / BUNDLE_FILE).read_text(encoding="utf-8"))
            _check_types(content)
            for name in (ITEMS_FILE, TRIE_FILE):
                if content["sha256"].get(name) != _checksum(folder / name):
                    raise ValueError(f"{name} is damaged, or does not belong to {BUNDLE_FILE}")
            bundle = cls(
                ItemCatalog.from_pretrained(folder),
                ItemTrie.from_pretrained(folder),
                PromptTemplate(**content["prompt_template"]),
                withdrawn=frozenset(content["withdrawn"]),
                **{name: content[name] for name in ("max_length", "chat_template_kwargs", "decoding", "num_trained")},
            )
            if content["num_items"] != len(bundle.catalog):
                raise ValueError(f"it counts {content['num_items']} items, {ITEMS_FILE} holds {len(bundle.catalog)}")
        except (OSError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"`save_directory` = {str(save_directory)!r} holds no readable catalogue ({error}). Save it again, "
                "with `Recommender.save_pretrained` or by training with `catalog=`."
            ) from error
        try:
            fingerprint = bundle.fingerprint(tokenizer)
        except Exception as error:  # a chat template is a program: it may fail in any way
            raise ValueError(
                f"`tokenizer` ({tokenizer.name_or_path!r}) can't write the items and the prompt of "
                f"{str(save_directory)!r} ({type(error).__name__}: {error})."
            ) from error
        if fingerprint != content["tokenizer_fingerprint"]:
            raise ValueError(
                f"`tokenizer` ({tokenizer.name_or_path!r}) writes other tokens than the one that "
                f"{str(save_directory)!r} was made with: load the tokenizer that lies beside the model."
            )
        return bundle

    def fingerprint(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """
        SHA-256 of what matters of a tokenizer here: its vocabulary, and the tokens that it makes of up to 200 items
        and of a prompt, which stand for its normalisation, merges, special tokens and chat template.
        """
        items = self.catalog.completions[:: max(1, len(self.catalog) // 200)][:200]
        is_chat = self.prompt_template.conversational
        prompt = self.prompt_template.render(items[:5])
        made = {
            "vocabulary": sorted(tokenizer.get_vocab().items()),
            "items": encode_items(tokenizer, items, is_chat, self.chat_template_kwargs),
            "prompt": encode_prompts(tokenizer, [prompt], self.chat_template_kwargs),
        }
        return hashlib.sha256(json.dumps(made).encode()).hexdigest()

    # ------------------------------------------------------------------ a catalogue that changes

    def update(
        self,
        tokenizer: PreTrainedTokenizerBase,
        add: ItemCatalog | None = None,
        withdraw: Iterable[str] = (),
        restore: Iterable[str] = (),
    ) -> Bundle:
        """
        The bundle with items added and withdrawn, for the same model.

        An item that is withdrawn keeps its place in the catalogue and the trie: histories may hold it, and the scores
        and the order of the others stay. An item that is added shares the probability of the tokens before it, so
        scores of the others fall; see [`Bundle.shared_prefixes`] for what the model can know of it. An item that is
        written like one withdrawn stays, with a warning.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.
            add ([`ItemCatalog`], *optional*):
                New items. Their texts are written by the template of this bundle's catalogue.
            withdraw (`Iterable[str]`, *optional*):
                Ids of items that are no longer to be recommended.
            restore (`Iterable[str]`, *optional*):
                Ids of withdrawn items that may be recommended again.

        Raises:
            `ValueError`: if an id to add is there already, one to withdraw or restore is not, or one is in both.
        """
        catalog, trie = self.catalog, self.trie
        withdraw, restore = _ids("withdraw", withdraw), _ids("restore", restore)
        if both := withdraw & restore:
            raise ValueError(f"`withdraw` and `restore` both hold {len(both)} id(s), such as {min(both)!r}.")
        if strangers := restore - self.withdrawn:
            raise ValueError(f"`restore` holds {len(strangers)} id(s) not withdrawn, such as {sorted(strangers)[:3]}.")
        if add is not None:
            catalog = catalog.extend(add)
            trie = catalog.build_trie(tokenizer, self.prompt_template.conversational, self.chat_template_kwargs)
        num_trained = self.num_trained or len(self.catalog)
        withdrawn = (self.withdrawn - restore) | withdraw
        leaves = trie.item_nodes.tolist()
        gone = {leaves[index] for index in catalog.indices(withdraw)}
        twins = [item for item, leaf in zip(catalog.ids, leaves) if leaf in gone and item not in withdrawn]
        if twins:
            logger.warning(
                "%d items are written like one that is withdrawn, such as %r, and stay.", len(twins), twins[0]
            )
        return dataclasses.replace(self, catalog=catalog, trie=trie, num_trained=num_trained, withdrawn=withdrawn)

    def shared_prefixes(self) -> dict[str, int]:
        """
        For each item that the model was not trained with, how many of its first tokens it shares with an item that it
        was trained with, beyond those that all of these share (an opening quote, say).

        With none in common the item starts by a token that the model has never been asked to choose: how it is ranked
        then hangs on what the model knew of its title before.
        """
        num_trained = self.num_trained or len(self.catalog)
        trie = self.trie.to("cpu")
        is_trained = torch.zeros(trie.num_nodes, dtype=torch.bool)
        for nodes in trie.item_nodes[:num_trained].split(1 << 16):
            paths = trie.paths(nodes)
            is_trained[paths[paths >= 0]] = True
        num_common = 0  # levels at which all trained items are at one node
        for start, end in trie.levels[1:]:
            if int(is_trained[start:end].sum()) != 1:
                break
            num_common += 1
        shared = []
        for nodes in trie.item_nodes[num_trained:].split(1 << 16):
            paths = trie.paths(nodes)
            shared += ((paths >= 0) & is_trained[paths]).sum(dim=1).sub(num_common).clamp(min=0).tolist()
        return dict(zip(self.catalog.ids[num_trained:], shared))


def _ids(argument: str, ids: Iterable[Any]) -> frozenset[str]:
    if isinstance(ids, str):
        raise ValueError(f"`{argument}` is {ids!r}, whose characters could be ids: pass a list of ids.")
    return frozenset(map(str, ids))


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _check_types(content: Any) -> None:
    """Raise where a file from elsewhere has other keys or types than [`Bundle.save_pretrained`] writes."""
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise ValueError(f"its format is {reprlib.repr(found)}, this version reads {_FORMAT}")
    expected = {
        "num_items": int,
        "prompt_template": dict,
        "max_length": int | None,
        "chat_template_kwargs": dict | None,
        "decoding": dict,
        "num_trained": int | None,
        "withdrawn": list,
        "tokenizer_fingerprint": str,
        "sha256": dict,
    }
    if missing := expected.keys() - content.keys():
        raise ValueError(f"it lacks {sorted(missing)}")
    for name, kind in expected.items():
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            raise ValueError(f"its {name!r} is {reprlib.repr(content[name])}")
    if strange := [item for item in content["withdrawn"] if not isinstance(item, str)]:
        raise ValueError(f"its 'withdrawn' holds {len(strange)} that are no id, such as {reprlib.repr(strange[0])}")


def _check_decoding(decoding: dict[str, Any], num_items: int) -> None:
    """Raise where arguments of [`recommend`] are none that it takes, or would take memory without end."""
    if unknown := decoding.keys() - set(_DECODING):
        raise ValueError(f"`decoding` has {sorted(unknown)}: it may have {', '.join(_DECODING)}.")
    penalty = decoding.get("length_penalty", 0.0)
    is_valid = {
        "mode": decoding.get("mode", "exact") in ("exact", "beam"),  # `generate` leaves nobody's history out
        "normalize": decoding.get("normalize", "trie") in ("trie", "vocab"),
        "num_beams": decoding.get("num_beams") is None or _is_whole(decoding["num_beams"], 1, num_items),
        "max_expansions": _is_whole(decoding.get("max_expansions", 1), 1, 1 << 31),
        "length_penalty": isinstance(penalty, int | float) and abs(penalty) <= 10,
    }
    is_beam = decoding.get("mode") == "beam"
    for name in ("max_expansions",) if is_beam else ("num_beams", "normalize", "length_penalty"):
        is_valid[name] = is_valid[name] and name not in decoding
    for name, is_fine in is_valid.items():
        if not is_fine:
            raise ValueError(
                f"`decoding` has {reprlib.repr(decoding[name])} as {name!r}: pass what `recommend` takes with mode "
                f"'exact' or 'beam', and no more beams than the {num_items} items."
            )


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
