# SPDX-License-Identifier: Apache-2.0
"""Popularity and item-kNN with their weights, which are added to a model's scores: one file beside the model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..decoding import Biases, SparseBias, sum_biases
from ..trie import check_regular, replacing
from .item_neighbours import ItemNeighbours


FUSION_FILE = "fusion.safetensors"
_FORMAT = 1
WEIGHTS = ("vocab_weight", "popularity_weight", "neighbour_weight", "new_item_weight")
_NEIGHBOURS = ("offsets", "neighbours", "similarities")


@dataclass(frozen=True, eq=False)
class Fusion:
    """
    A model's score fused with popularity and item-kNN. Items are ranked by

        Σ log P_valid + vocab_weight · Σ log m
            + popularity_weight · log(1 + count) + neighbour_weight · s / max s + new_item_weight · [count = 0]

    with the sums of [`TrieDecoder.search`], `count` the number of users who have the item, `s` its score by
    [`ItemNeighbours`] for the whole history, and `max s` the user's largest. Training has pushed new items down, as
    they were wrong in every row, and nobody has them: `new_item_weight` brings them back, and the model and
    [`add_titles`] tell them apart by their titles.

    Args:
        popularity (`torch.Tensor` of shape `(num_items,)`, int64):
            Number of users who have each item: see [`count_users`].
        neighbours ([`ItemNeighbours`], *optional*):
            Neighbours of the same items.
        vocab_weight, popularity_weight, neighbour_weight, new_item_weight (`float`, *optional*, default to `0.0`):
            Weights of the parts; `vocab_weight` is at least 0.

    Raises:
        `ValueError`: if an argument is out of range, or the arguments do not fit together.
    """

    popularity: Tensor
    neighbours: ItemNeighbours | None = None
    vocab_weight: float = 0.0
    popularity_weight: float = 0.0
    neighbour_weight: float = 0.0
    new_item_weight: float = 0.0

    def __post_init__(self):
        counts = self.popularity
        if counts.dtype != torch.int64 or counts.ndim != 1 or (counts < 0).any():
            raise ValueError(
                f"`popularity` is {counts.dtype}{list(counts.shape)}: pass a count for each item, int64, at least 0."
            )
        for name in WEIGHTS:
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"`{name}` is {getattr(self, name)}: it must be a finite number.")
        if self.vocab_weight < 0:
            raise ValueError(f"`vocab_weight` is {self.vocab_weight}: it must be at least 0.")
        if self.neighbours is None and self.neighbour_weight != 0:
            raise ValueError(f"`neighbour_weight` is {self.neighbour_weight}, but `neighbours` is None: pass them.")
        if self.neighbours is not None and self.neighbours.num_items != self.num_items:
            raise ValueError(
                f"`neighbours` has {self.neighbours.num_items} items, `popularity` has {self.num_items}: pass both "
                "for the same catalogue."
            )

    def __repr__(self) -> str:
        weights = ", ".join(f"{name}={getattr(self, name)}" for name in WEIGHTS)
        return f"Fusion({self.num_items} items, {weights}, {self.neighbours})"

    @property
    def num_items(self) -> int:
        """Number of items in the catalogue."""
        return len(self.popularity)

    @functools.cached_property
    def log_popularity(self) -> Tensor:
        """`log(1 + count)` of each item, fp32."""
        return self.popularity.float().log1p()

    @property
    def is_new(self) -> Tensor:
        """1 for the items that nobody has, else 0, fp32."""
        return (self.popularity == 0).float()

    def neighbour_scores(self, histories: Sequence[Sequence[int]]) -> SparseBias:
        """What `neighbour_weight` weights: the scores of [`ItemNeighbours.score`] divided by each user's largest."""
        scores = self.neighbours.score(histories)
        # All of them are 0 where only very old items have neighbours
        rows = [row / row.max().clamp(min=torch.finfo(row.dtype).tiny) if len(row) else row for row in scores.values]
        return dataclasses.replace(scores, values=rows)

    def arguments(self, histories: Sequence[Sequence[int]], item_bias: Biases | None = None) -> dict[str, Any]:
        """
        Keyword arguments of [`recommend`], [`TrieDecoder.search`] or [`evaluate_recommendations`] for some users.

        Args:
            histories (`Sequence[Sequence[int]]`):
                Item indices of each user, oldest first, in the order of the prompts.
            item_bias (*optional*):
                What else to add, as for [`TrieDecoder.search`].

        Returns:
            `dict`: `vocab_weight` and `item_bias`, which is a function where users have different ones, so that they
            are made batch by batch.
        """
        biases = [] if item_bias is None else [item_bias]
        if self.popularity_weight != 0 or self.new_item_weight != 0:
            biases.append(self.popularity_weight * self.log_popularity + self.new_item_weight * self.is_new)
        if self.neighbour_weight != 0:
            biases.append(functools.partial(self._neighbour_bias, histories))
        return {"vocab_weight": self.vocab_weight, "item_bias": sum_biases(biases, len(histories), self.num_items)}

    def _neighbour_bias(self, histories: Sequence[Sequence[int]], users: Sequence[int]) -> SparseBias:
        scores = self.neighbour_scores([histories[user] for user in users])
        return dataclasses.replace(scores, values=[self.neighbour_weight * row for row in scores.values])

    def most_popular(
        self, k: int, allowed: Sequence[int] | None = None, item_bias: Tensor | None = None
    ) -> tuple[list[int], list[float]]:
        """
        The `k` items that most users have, for users without history, and their scores: the logarithm of an item's
        share of all counts, each of which is raised by 1.

        Args:
            k (`int`):
                Number of items; there may be fewer in `allowed`.
            allowed (`Sequence[int]`, *optional*):
                Item indices to choose from. Defaults to all.
            item_bias (`torch.Tensor` of shape `(num_items,)`, *optional*):
                What to add to the scores; `-inf` for items that must not be found.
        """
        scores = self.log_popularity - math.log(float(self.popularity.double().sum()) + self.num_items)
        scores = scores if item_bias is None else scores + item_bias
        items = torch.arange(self.num_items) if allowed is None else torch.tensor(allowed).unique()
        items = items[scores[items] > -torch.inf]
        items = items[scores[items].argsort(descending=True, stable=True)[:k]]
        return items.tolist(), scores[items].tolist()

    def extend(self, num_items: int) -> Fusion:
        """The same for a catalogue that has grown to `num_items`: nobody has the new items, which are the last."""
        popularity = torch.cat([self.popularity, self.popularity.new_zeros(num_items - self.num_items)])
        neighbours = None if self.neighbours is None else self.neighbours.extend(num_items)
        return dataclasses.replace(self, popularity=popularity, neighbours=neighbours)

    # ------------------------------------------------------------------ storage

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `fusion.safetensors` with a checksum into a folder, whole or not at all."""
        tensors, header = self._content()
        with replacing(Path(save_directory) / FUSION_FILE) as temporary:
            save_file(tensors, temporary, metadata=header | {"sha256": self.fingerprint()})

    @classmethod
    def from_pretrained(cls, save_directory: str | Path, num_items: int) -> Fusion:
        """
        Read what [`Fusion.save_pretrained`] wrote for a catalogue of `num_items`.

        Raises:
            `ValueError`: if the file is missing or damaged, or belongs to another catalogue.
        """
        path = Path(save_directory) / FUSION_FILE
        try:
            check_regular(path)
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            if header.get("format") != str(_FORMAT):
                raise ValueError(f"its format is {header.get('format')}, this version reads {_FORMAT}")
            neighbours = None
            if "decay" in header:
                neighbours = ItemNeighbours(*(tensors[name] for name in _NEIGHBOURS), decay=float(header["decay"]))
            found = cls(tensors["popularity"], neighbours, **{name: float(header[name]) for name in WEIGHTS})
            if header.get("sha256") != found.fingerprint():
                raise ValueError("its checksum differs")
            if found.num_items != num_items:
                raise ValueError(f"it has {found.num_items} items, the catalogue has {num_items}")
        except (OSError, KeyError, TypeError, ValueError, OverflowError, SafetensorError) as error:
            raise ValueError(
                f"`save_directory` = {str(save_directory)!r} does not hold a readable {FUSION_FILE} ({error}). Choose "
                "the weights again, or remove it to rank without it."
            ) from error
        return found

    def _content(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        # As floats, which they are when they are read
        header = {name: repr(float(getattr(self, name))) for name in WEIGHTS}
        tensors = {"popularity": self.popularity}
        if self.neighbours is not None:
            tensors |= {name: getattr(self.neighbours, name) for name in _NEIGHBOURS}
            header["decay"] = repr(float(self.neighbours.decay))
        return {name: tensor.contiguous() for name, tensor in tensors.items()}, header | {"format": str(_FORMAT)}

    def fingerprint(self) -> str:
        """SHA-256 of everything that the scores depend on."""
        tensors, header = self._content()
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(tensors[name].numpy().data)
        return digest.hexdigest()


def load_fusion(folder: Path, num_items: int) -> Fusion | None:
    """The fusion in a model's folder, for a catalogue of `num_items`; `None` if there is none."""
    return Fusion.from_pretrained(folder, num_items) if (folder / FUSION_FILE).exists() else None
