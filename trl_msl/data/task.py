# SPDX-License-Identifier: Apache-2.0
"""What must fit together to train and to rank: catalogue, tokenizer, trie, prompt. Saved beside the model."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..trie import ItemTrie
from .catalog import ItemCatalog
from .fit_prompts import fit_prompts
from .item_tokens import encode_items
from .prompts import Prompt, PromptTemplate, encode_prompts
from .separate_items import make_vector_tokens
from .task_files import check_decoding, is_whole, read_task, tokenizer_fingerprint, unreadable, write_task


logger = logging.getLogger(__name__)

_MAX_ITEM_LENGTH = 4096  # as memory grows with the square of an item's length. A title takes some ten tokens
_MAX_COMPARED = 10_000


@dataclass(frozen=True, eq=False)
class RankingTask:
    """
    What is ranked and how a model is asked to rank it: all that must fit together besides the model's weights. It is
    made and checked once, passed to everything that trains, ranks or evaluates, and saved beside the model.

    Args:
        catalog ([`ItemCatalog`]):
            The items.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            The model's tokenizer, or its processor.
        prompt_template ([`PromptTemplate`]):
            How a history becomes a prompt.
        max_length (`int`, *optional*, defaults to `1024`):
            Maximum number of tokens of a prompt and an item together; longer prompts lose the oldest items of their
            history. `None` for no limit.
        max_history (`int`, *optional*):
            Maximum number of history items in a prompt, the most recent ones. The training commands set it to the
            longest history in training, so that serving prompts are like those the model was trained on.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Passed to the chat template, e.g. `{"enable_thinking": False}`.
        decoding (`dict[str, Any]`, *optional*):
            Arguments of [`recommend`] that [`Recommender`] uses unless told otherwise: `mode` (`"exact"` or
            `"beam"`), `max_expansions`, `num_beams`, `normalize`, `length_penalty`.
        num_trained (`int`, *optional*):
            Number of items that the model was trained with, the first of the catalogue. Defaults to all.
        withdrawn (`frozenset[str]`, *optional*):
            Ids of items that histories may hold, but that are not to be recommended.
        trie ([`ItemTrie`], *optional*):
            The items' trie, if it has been built already. By default it is built from the catalogue.

    Attributes:
        vector_tokens (`dict[str, int]`, *optional*):
            With a prompt template that has `vector_tokens`, the token of each item's vector, by the item's text.

    Raises:
        `ValueError`: if an argument is not valid, or they do not fit together.

    Example:

    ```python
    task = RankingTask(catalog, tokenizer, PromptTemplate.from_paper("book", "books", "read"), max_length=512)
    rows = build_rows(windows, task)
    trainer = MSLTrainer("Qwen/Qwen3-0.6B", task=task, train_dataset=rows)
    ```
    """

    catalog: ItemCatalog
    tokenizer: PreTrainedTokenizerBase
    prompt_template: PromptTemplate
    max_length: int | None = 1024
    max_history: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    decoding: dict[str, Any] = field(default_factory=lambda: {"mode": "exact"})
    num_trained: int | None = None
    withdrawn: frozenset[str] = frozenset()
    trie: ItemTrie | None = None

    def __post_init__(self):
        object.__setattr__(self, "tokenizer", _tokenizer(self.tokenizer))
        for name, kind in (("catalog", ItemCatalog), ("prompt_template", PromptTemplate), ("decoding", dict)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"`{name}` is a {type(getattr(self, name)).__name__}: pass a `{kind.__name__}`.")
        try:  # now, not when the task is saved after training
            json.dumps({} if self.chat_template_kwargs is None else {**self.chat_template_kwargs})
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`chat_template_kwargs` is {self.chat_template_kwargs!r}: it must be a dictionary of JSON values."
            ) from error
        if self.max_length is not None and not is_whole(self.max_length, 1, 1 << 31):
            raise ValueError(f"`max_length` is {self.max_length!r}: it must be a number of tokens, or `None`.")
        if self.max_history is not None and not is_whole(self.max_history, 1, 1 << 31):
            raise ValueError(f"`max_history` is {self.max_history!r}: it must be a number of items, or `None`.")
        is_built = self.trie is None
        if is_built:
            trie = self.catalog.build_trie(self.tokenizer, self.conversational, self.chat_template_kwargs)
            object.__setattr__(self, "trie", trie)
        lengths = self.trie.item_lengths
        longest = int(lengths.argmax())
        if lengths[longest] > _MAX_ITEM_LENGTH:
            item = f"item {self.catalog.ids[longest]!r}" if longest < len(self.catalog) else "an item"
            raise ValueError(
                f"`catalog`: {item} takes {lengths[longest]} tokens, but an item may take at most {_MAX_ITEM_LENGTH}: "
                "shorten its text."
            )
        if not is_built:
            self._check_trie()
        # Once, not in each request. Not a cached property, which would change how `datasets` fingerprints the task
        object.__setattr__(self, "_mean_item_length", int(lengths.double().mean()))
        tokens = make_vector_tokens(self.catalog.completions) if self.prompt_template.vector_tokens else None
        object.__setattr__(self, "vector_tokens", tokens)
        check_decoding(self.decoding, len(self.catalog))
        if self.num_trained is not None and not is_whole(self.num_trained, 1, len(self.catalog)):
            raise ValueError(
                f"`num_trained` is {self.num_trained!r}: it must be from 1 to the {len(self.catalog)} items there are."
            )
        # As strings, like the catalogue's ids: else item "5" could be recommended though the number 5 is withdrawn
        object.__setattr__(self, "withdrawn", _ids("withdrawn", self.withdrawn))
        self.catalog.indices(self.withdrawn, "withdrawn")
        if len(self.withdrawn) == len(self.catalog):
            raise ValueError(f"`withdrawn` holds all {len(self.catalog)} items, so there is nothing to recommend.")

    def __repr__(self) -> str:
        return f"RankingTask({self.catalog}, {self.trie}, max_length={self.max_length})"

    @property
    def conversational(self) -> bool:
        """Whether prompts are messages for the tokenizer's chat template."""
        return self.prompt_template.conversational

    # ------------------------------------------------------------------ tokens

    def _check_trie(self) -> None:
        """Raise if the trie does not hold all items (of many: an even sample) in the tokenizer's tokens."""
        if len(self.catalog) == self.trie.num_items:
            sample = slice(None, None, -(-len(self.catalog) // _MAX_COMPARED))
            texts = self.catalog.completions[sample]
            sequences = encode_items(self.tokenizer, texts, self.conversational, self.chat_template_kwargs)
            trie, lengths = self.trie.to("cpu"), torch.tensor([len(sequence) for sequence in sequences])
            tokens, starts = torch.tensor(list(chain.from_iterable(sequences))), lengths.cumsum(0) - lengths
            nodes = torch.zeros(len(lengths), dtype=torch.int64)
            for depth in range(int(lengths.max())):
                going_on = (lengths > depth).nonzero().squeeze(1)
                nodes[going_on] = trie.child(nodes[going_on], tokens[starts[going_on] + depth])
            if torch.equal(nodes, trie.item_nodes[sample].long()):
                return
        raise ValueError(
            f"`trie` ({self.trie}) does not hold the items of `catalog` ({self.catalog}) in the tokens of this "
            f"`tokenizer` with conversational={self.conversational}: leave it out, and it is built."
        )

    def encode_items(self, completions: Sequence[str]) -> list[list[int]]:
        """
        Token ids that the model has to write for each item, end token included: see [`encode_items`].

        Raises:
            `ValueError`: if the tokenizer ends items with another token than when the task was made.
        """
        sequences = encode_items(self.tokenizer, completions, self.conversational, self.chat_template_kwargs)
        expected = int(self.trie.tokens(self.trie.item_nodes[0]))
        if sequences and sequences[0][-1] != expected:
            end, expected = (self.tokenizer.decode([token]) for token in (sequences[0][-1], expected))
            raise ValueError(
                f"`tokenizer` ends items with {end!r}, but with {expected!r} when the task was made: its `eos_token` "
                "or chat template has been changed since. Make the `RankingTask` again."
            )
        return sequences

    def shown(self, history: list[Any]) -> list[Any]:
        """The items of a history that a prompt shows, at most `max_history`."""
        return history if self.max_history is None else history[-self.max_history :]

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """
        Token ids of prompts of any length, up to where the item begins: see [`encode_prompts`].

        Raises:
            `ValueError`: if prompts are texts and the template is conversational, or the other way round.
        """
        if any(isinstance(prompt, str) == self.conversational for prompt in prompts):
            expected = "lists of messages" if self.conversational else "texts"
            raise ValueError(f"`prompts` must be {expected}, as `prompt_template` renders them: make them with it.")
        return encode_prompts(self.tokenizer, prompts, self.chat_template_kwargs, self.prompt_template)

    def fit_prompts(self, rows: dict[str, list], room: Sequence[float]) -> list[list[int]]:
        """Token ids of the prompts of `rows`, shortened to `room` tokens each: see [`fit_prompts`]."""
        template, kwargs = self.prompt_template, self.chat_template_kwargs
        return fit_prompts(self.tokenizer, rows, room, template, kwargs, self.vector_tokens)

    def ranking_prompts(self, rows: dict[str, list]) -> list[list[int]]:
        """
        Token ids of prompts to rank items for. Prompts that leave no room within `max_length` for an item of average
        length lose the oldest items of their history.

        Args:
            rows (`dict[str, list]`):
                `prompt`, and `history` where a prompt is to be shortened, as [`build_rows`] makes them.
        """
        limit = float("inf") if self.max_length is None else self.max_length
        room = [limit - self._mean_item_length] * len(rows["prompt"])
        return self.fit_prompts(rows, room)

    # ------------------------------------------------------------------ storage

    def save_pretrained(self, save_directory: str | Path) -> None:
        """
        Write the task into a folder, usually that of the model: `items.parquet`, `trie.safetensors`, and
        `recommender.json` with their checksums and the tokenizer's fingerprint. If writing fails, the old files stay.
        The tokenizer itself is saved by the trainers and by [`Recommender`].
        """
        write_task(Path(save_directory), vars(self), self.fingerprint())

    @classmethod
    def from_pretrained(cls, save_directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> RankingTask:
        """
        Read a task written by [`RankingTask.save_pretrained`].

        Args:
            save_directory (`str` or `Path`):
                Its folder.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
                The model's tokenizer, or its processor.

        Raises:
            `ValueError`: if there is none, a file is damaged, or the tokenizer is not the one that it was made with.
        """
        folder = Path(save_directory)
        arguments, fingerprint = read_task(folder)
        tokenizer = _tokenizer(tokenizer)
        try:
            found = tokenizer_fingerprint(tokenizer, **arguments)
        except Exception as error:  # a chat template is a program: it may fail in any way
            raise ValueError(
                f"`tokenizer` ({tokenizer.name_or_path!r}) can't write the items and the prompt of "
                f"{str(save_directory)!r} ({type(error).__name__}: {error})."
            ) from error
        if found != fingerprint:
            raise ValueError(
                f"`tokenizer` ({tokenizer.name_or_path!r}) writes other tokens than the one that "
                f"{str(save_directory)!r} was made with: load the tokenizer saved beside the model."
            )
        try:
            return cls(tokenizer=tokenizer, **arguments)
        except (TypeError, ValueError, OverflowError) as error:
            raise unreadable(folder, error) from error

    def fingerprint(self) -> str:
        """SHA-256 of what the task depends on in the tokenizer: see [`tokenizer_fingerprint`]."""
        return tokenizer_fingerprint(**vars(self))

    # ------------------------------------------------------------------ a catalogue that changes

    def update(
        self, add: ItemCatalog | None = None, withdraw: Iterable[str] = (), restore: Iterable[str] = ()
    ) -> RankingTask:
        """
        The task with items added and withdrawn, for the same model.

        A withdrawn item keeps its place in the catalogue and the trie: histories may hold it, and the other items'
        scores and order do not change. An added item takes a share of the probability of the tokens before it, so
        other scores fall; see [`RankingTask.shared_prefixes`] for what the model can know of it. An item with the same
        text as a withdrawn one remains available, with a warning.

        Args:
            add ([`ItemCatalog`], *optional*):
                New items. Their texts are written in the template of this task's catalogue.
            withdraw (`Iterable[str]`, *optional*):
                Ids of items that are no longer to be recommended.
            restore (`Iterable[str]`, *optional*):
                Ids of withdrawn items that may be recommended again.

        Raises:
            `ValueError`: if an id to add is there already, one to withdraw or restore is not, or one is in both.
        """
        withdraw, restore = _ids("withdraw", withdraw), _ids("restore", restore)
        if both := withdraw & restore:
            raise ValueError(f"`withdraw` and `restore` both hold {len(both)} id(s), such as {min(both)!r}.")
        if strangers := restore - self.withdrawn:
            raise ValueError(f"`restore` holds {len(strangers)} id(s) not withdrawn, such as {sorted(strangers)[:3]}.")
        catalog = self.catalog if add is None else self.catalog.extend(add)
        withdrawn_indices = catalog.indices(withdraw, "withdraw")
        updated = dataclasses.replace(
            self,
            catalog=catalog,
            trie=self.trie if add is None else None,
            num_trained=self.num_trained or len(self.catalog),
            withdrawn=(self.withdrawn - restore) | withdraw,
        )
        catalog, withdrawn, leaves = updated.catalog, updated.withdrawn, updated.trie.item_nodes.tolist()
        gone = {leaves[index] for index in withdrawn_indices}
        twins = [item for item, leaf in zip(catalog.ids, leaves) if leaf in gone and item not in withdrawn]
        if twins:
            logger.warning(
                "%d items have the same text as a withdrawn one, such as %r, and remain.", len(twins), twins[0]
            )
        return updated

    def shared_prefixes(self) -> dict[str, int]:
        """
        For each item that the model was not trained with, how many of its first tokens it shares with some trained
        item, beyond those that all trained items share (an opening quote, say).

        An item that shares none starts with a token that the model has never been trained to choose: its rank then
        depends on what the model knew of its title before.
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


def _tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    """A tokenizer, or that of a processor."""
    found = getattr(tokenizer, "tokenizer", tokenizer)
    if not isinstance(found, PreTrainedTokenizerBase):
        raise ValueError(f"`tokenizer` is a {type(found).__name__}: pass the model's tokenizer.")
    return found


def _ids(argument: str, ids: Iterable[Any]) -> frozenset[str]:
    if isinstance(ids, str):
        raise ValueError(f"`{argument}` is {ids!r}, whose characters could be ids: pass a list of ids.")
    return frozenset(map(str, ids))
