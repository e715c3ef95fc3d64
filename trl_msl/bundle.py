# SPDX-License-Identifier: Apache-2.0
"""What a trained model needs to recommend, in files beside its weights: items, trie, prompt, tokenizer fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .catalog import ITEMS_FILE, ItemCatalog, encode_items
from .data import PromptTemplate, encode_prompts
from .sequence_index import file_checksum
from .trie import ItemTrie


BUNDLE_FILE = "recommender.json"
_FORMAT = 1
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
    """

    catalog: ItemCatalog
    trie: ItemTrie
    prompt_template: PromptTemplate
    max_length: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def save_pretrained(self, save_directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Write the bundle into a folder: `items.parquet`, the trie's files, and `recommender.json`. No pickle. Each file
        is written whole and then renamed, `recommender.json` last: without it there is no bundle.

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
            "tokenizer_fingerprint": self.fingerprint(tokenizer),
            "sha256": {ITEMS_FILE: file_checksum(folder / ITEMS_FILE)},
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
            if content["format"] != _FORMAT:
                raise ValueError(f"its format is {content['format']}, this version reads {_FORMAT}")
            if content["sha256"][ITEMS_FILE] != file_checksum(folder / ITEMS_FILE):
                raise ValueError(f"{ITEMS_FILE} is damaged, or does not belong to {BUNDLE_FILE}")
            catalog, trie = ItemCatalog.from_pretrained(folder), ItemTrie.from_pretrained(folder)
            if not len(catalog) == trie.num_items == content["num_items"]:
                raise ValueError(f"{catalog} and {trie} do not belong together")
            template = PromptTemplate(**content["prompt_template"])
            bundle = cls(catalog, trie, template, content["max_length"], content["chat_template_kwargs"])
            expected = content["tokenizer_fingerprint"]
        except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"`save_directory` = {str(save_directory)!r} holds no readable catalogue ({error}). Save it again, "
                "with `Recommender.save_pretrained` or by training with `catalog=`."
            ) from error
        if bundle.fingerprint(tokenizer) != expected:
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
