# SPDX-License-Identifier: Apache-2.0
"""The catalogue: the items that can be recommended."""

from __future__ import annotations

import html
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..trie import ItemTrie
from .item_tokens import encode_items
from .items_file import ITEMS_FILE, read_items_file, write_items


logger = logging.getLogger(__name__)


class ItemCatalog:
    """
    Items that can be recommended: an id and a text each. An item's *index* is its place in the catalogue.

    Two items with the same text are the same token sequence, so no model can tell them apart: they share a leaf of the
    trie, are recommended together in index order, and a warning says how many there are.

    Args:
        ids (`Sequence`):
            Item ids, strings or integers, unique. Kept as strings.
        texts (`Sequence[str]`):
            What the model reads and writes for each item, usually its title.
        template (`str`, *optional*, defaults to `"{text}"`):
            How a text is written into prompts and completions; the MSL paper quotes titles: `'"{text}"'`. It is
            formatted before tokenisation, as closing quotes merge with the characters before them.
        empty_texts (`str`, *optional*, defaults to `"error"`):
            What to do with items whose text is empty or blank: `"error"`, `"keep"`, or `"id"` (use the item's id).
        duplicate_texts (`str`, *optional*, defaults to `"share"`):
            What to do with texts that occur several times: `"share"` (with a warning) or `"error"`.
        html_entities (`str`, *optional*, defaults to `"keep"`):
            What to do with entities such as `&amp;`: `"keep"` (with a warning) or `"decode"`. It applies to items
            added later too.

    Raises:
        `ValueError`: if there are no items, an id is neither string nor integer, ids repeat, a text is not a string or
            can't be encoded, or a policy is `"error"` and finds something.

    Example:

    ```python
    >>> from trl_msl import ItemCatalog

    >>> catalog = ItemCatalog.from_dict({"0": "Dune", "1": "Emma"}, template='"{text}"')
    >>> catalog.completions
    ['"Dune"', '"Emma"']
    >>> catalog.indices(["1"])
    [1]

    ```
    """

    def __init__(
        self,
        ids: Sequence[Any],
        texts: Sequence[str],
        *,
        template: str = "{text}",
        empty_texts: str = "error",
        duplicate_texts: str = "share",
        html_entities: str = "keep",
        _level: int = logging.WARNING,
    ):
        _check_choice("empty_texts", empty_texts, ("error", "keep", "id"))
        _check_choice("duplicate_texts", duplicate_texts, ("share", "error"))
        _check_choice("html_entities", html_entities, ("keep", "decode"))
        if not (isinstance(template, str) and template.count("{text}") == 1 and is_unicode(template)):
            raise ValueError(f"`template` is {template!r}: it must be a text that contains {{text}} exactly once.")
        if len(ids) != len(texts) or len(ids) == 0:
            raise ValueError(
                f"`ids` and `texts` have {len(ids)} and {len(texts)} entries: pass the same number of each, not 0."
            )
        # Not floats: str(12.0) is another id than str(12), and a missing id must not become "nan" or "None"
        not_ids = [item for item in ids if not _is_id(item)]
        if not_ids:
            raise ValueError(
                f"`ids` holds {len(not_ids)} of {len(ids)} ids that are neither strings nor integers, such as "
                f"{not_ids[0]!r}. Fix them, or leave these items out."
            )
        self.template = template
        self.ids = [str(item) for item in ids]
        if len(self.index_of_id) < len(self.ids):
            repeated = [item for item, count in Counter(self.ids).items() if count > 1]
            raise ValueError(
                f"`ids` holds {len(repeated)} repeated id(s), such as {repeated[:3]}: ids must be unique."
            )
        not_text = [item for item, text in zip(self.ids, texts) if not isinstance(text, str)]
        if not_text:
            raise ValueError(
                f"`texts` holds {len(not_text)} value(s) that are not strings, such as item {not_text[0]!r}."
            )
        broken = [item for item, text in zip(self.ids, texts) if not is_unicode(text)]
        if broken:
            raise ValueError(
                f"`texts` holds {len(broken)} value(s) with a lone surrogate (half a character), such as item "
                f"{broken[0]!r}. Fix them, by text.encode(errors='replace').decode() for example."
            )
        self.html_entities = html_entities
        self.texts = self._with_empty_texts(self._with_html_entities(texts, _level), empty_texts, _level)
        self._report_duplicates(duplicate_texts, _level)

    # ------------------------------------------------------------------ reading

    @classmethod
    def from_dict(cls, items: Mapping[Any, str], **kwargs: Any) -> ItemCatalog:
        """Catalogue from a mapping of ids to texts; `kwargs` as for [`ItemCatalog`]."""
        return cls(list(items.keys()), list(items.values()), **kwargs)

    @classmethod
    def from_json(cls, path: str | Path, **kwargs: Any) -> ItemCatalog:
        """Catalogue from a JSON file that maps ids to texts; `kwargs` as for [`ItemCatalog`]."""
        try:
            pairs = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=list)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"`path` = {str(path)!r} is not a readable JSON file ({error}).") from error
        if not (isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs)):
            raise ValueError(f"`path` = {str(path)!r} must hold one JSON object that maps item ids to texts.")
        return cls([item for item, _ in pairs], [text for _, text in pairs], **kwargs)

    @classmethod
    def from_dataset(
        cls, dataset: Dataset, id_column: str = "item_id", text_column: str = "title", **kwargs: Any
    ) -> ItemCatalog:
        """Catalogue from two columns of a [`~datasets.Dataset`]; `kwargs` as for [`ItemCatalog`]."""
        for argument, column in (("id_column", id_column), ("text_column", text_column)):
            if column not in dataset.column_names:
                raise ValueError(f"`{argument}` = {column!r} is not a column of the dataset: {dataset.column_names}.")
        return cls(dataset[id_column][:], dataset[text_column][:], **kwargs)

    def extend(self, items: ItemCatalog) -> ItemCatalog:
        """
        This catalogue with further items after its own, in its own template, and with HTML entities decoded if its
        own are.

        Raises:
            `ValueError`: if an id is there already.
        """
        if known := [item for item in items.ids if item in self.index_of_id]:
            raise ValueError(
                f"`items` holds {len(known)} id(s) that are in the catalogue already, such as {known[:3]}: an id "
                "stands for one text. Leave them out, or give a changed item a new id."
            )
        decode = self.html_entities == "decode" != items.html_entities  # once: `&amp;lt;` is meant to become `&lt;`
        texts = self.texts + ([html.unescape(text) for text in items.texts] if decode else items.texts)
        extended = ItemCatalog(self.ids + items.ids, texts, template=self.template, empty_texts="keep")
        extended.html_entities = self.html_entities
        return extended

    # ------------------------------------------------------------------ storage

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `items.parquet`, whole or not at all; the template and `html_entities` are its metadata."""
        write_items(Path(save_directory), self.ids, self.texts, self.template, self.html_entities)

    @classmethod
    def from_pretrained(cls, save_directory: str | Path) -> ItemCatalog:
        """
        Read a catalogue written by [`ItemCatalog.save_pretrained`].

        Raises:
            `ValueError`: if the file is missing or can't be read.
        """
        try:
            ids, texts, template, html_entities = read_items_file(Path(save_directory))
            _check_choice("html_entities", html_entities, ("keep", "decode"))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ValueError(
                f"`save_directory` = {str(save_directory)!r} does not hold a readable {ITEMS_FILE} ({error}). Save it "
                "again with `ItemCatalog.save_pretrained`."
            ) from error
        # What there is to warn of was said when the catalogue was made
        catalog = cls(ids, texts, template=template, empty_texts="keep", _level=logging.DEBUG)
        catalog.html_entities = html_entities  # not applied again
        return catalog

    # ------------------------------------------------------------------ items

    def __getstate__(self) -> dict[str, Any]:
        # Without derived values, so that the fingerprint of a `datasets` map depends on the catalogue alone
        derived = ("index_of_id", "completions", "counts")
        return {name: value for name, value in self.__dict__.items() if name not in derived}

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"ItemCatalog(num_items={len(self)}, template={self.template!r})"

    @cached_property
    def index_of_id(self) -> dict[str, int]:
        return {item: index for index, item in enumerate(self.ids)}

    @cached_property
    def completions(self) -> list[str]:
        """Each item as it is written into prompts and completions: its text in the template."""
        before, after = self.template.split("{text}")
        return [before + text + after for text in self.texts]

    @cached_property
    def counts(self) -> dict[str, int]:
        """Numbers of items, empty texts, items that repeat an earlier item's text, and texts with HTML entities."""
        return {
            "items": len(self),
            "empty_texts": self._num_empty,
            "duplicate_texts": len(self) - len(set(self.texts)),
            "html_entities": self._num_entities,
        }

    def indices(self, ids: Iterable[Any], argument: str = "ids") -> list[int]:
        """
        Indices of items by id. An error names them `argument`.

        Raises:
            `ValueError`: if ids are not in the catalogue. The message has their number and the first ones.
        """
        if isinstance(ids, str):  # its characters could be ids
            raise ValueError(f"`{argument}` is the text {ids!r}: it must be a list of ids.")
        ids = [str(item) for item in ids]
        unknown = [item for item in ids if item not in self.index_of_id]
        if unknown:
            raise ValueError(
                f"`{argument}` holds {len(unknown)} id(s) of {len(ids)} that are not in the catalogue of {len(self)} "
                f"items, such as {list(dict.fromkeys(unknown))[:5]}. Add these items, or leave these ids out."
            )
        return [self.index_of_id[item] for item in ids]

    def build_trie(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversational: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> ItemTrie:
        """
        Trie of all items' token sequences, end token included.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model to train.
            conversational (`bool`, *optional*, defaults to `False`):
                Whether rows are conversational: see [`encode_items`].
            chat_template_kwargs (`dict[str, Any]`, *optional*):
                Passed to the chat template, e.g. `{"enable_thinking": False}`.
        """
        sequences = encode_items(tokenizer, self.completions, conversational, chat_template_kwargs)
        return ItemTrie.from_sequences(sequences, vocab_size=max(len(tokenizer), max(map(max, sequences)) + 1))

    # ------------------------------------------------------------------ policies

    def _with_html_entities(self, texts: Sequence[str], level: int) -> list[str]:
        decoded = [html.unescape(text) for text in texts]
        self._num_entities = sum(before != after for before, after in zip(texts, decoded))
        if self._num_entities:
            done = "decoded" if self.html_entities == "decode" else "kept as they are: consider html_entities='decode'"
            logger.log(level, "%d of %d texts hold HTML entities (%s).", self._num_entities, len(self), done)
        return decoded if self.html_entities == "decode" else list(texts)

    def _with_empty_texts(self, texts: list[str], policy: str, level: int) -> list[str]:
        empty = [item for item, text in zip(self.ids, texts) if not text.strip()]
        self._num_empty = len(empty)
        if not empty:
            return texts
        found = f"{len(empty)} of {len(self)} items have an empty text, such as item {empty[0]!r}"
        if policy == "error":
            raise ValueError(
                f"`texts`: {found}. Fix them, or pass empty_texts='id' to use the id as the text, or 'keep'."
            )
        logger.log(level, "%s (empty_texts=%r).", found, policy)
        return texts if policy == "keep" else [text if text.strip() else item for item, text in zip(self.ids, texts)]

    def _report_duplicates(self, policy: str, level: int) -> None:
        count = self.counts["duplicate_texts"]
        if count == 0:
            return
        texts = Counter(self.texts)
        shared, example = sum(number for number in texts.values() if number > 1), texts.most_common(1)[0][0]
        found = f"{count} of {len(self)} items repeat another item's text ({shared} share theirs), such as {example!r}"
        if policy == "error":
            raise ValueError(f"`texts`: {found}. Make texts unique, or pass duplicate_texts='share'.")
        logger.log(level, "%s: they share a leaf and are recommended together.", found)


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: one with a lone surrogate, as JSON's `"\\ud800"` gives, can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_id(item: Any) -> bool:
    if isinstance(item, str):
        return item != "" and is_unicode(item)
    return isinstance(item, Integral) and not isinstance(item, bool)


def _check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{argument}` is {value!r}: it must be one of {', '.join(map(repr, choices))}.")
