# SPDX-License-Identifier: Apache-2.0
"""Grounding: the model writes a title freely, and items are ranked by how near theirs are to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data import RankingTask, encode_prompts
from ..model import check_whole, evaluating, hidden_states
from .arguments import read_prompts
from .by_generate import end_tokens, pad_left, padding_token, ready_to_generate
from .recommendations import Recommendations


_TITLE = "\u2063title\u2063"  # stands for the title where an item is written to see what is around it


class Grounder:
    r"""
    Ranks the catalogue's items for some prompts by grounding, as BIGRec does (https://arxiv.org/abs/2308.08434), to
    compare the trie with. For each prompt the model writes a title with nothing to restrict it. Item \\( i \\) has the
    distance \\( D_i \\) between two hidden states: those of the last token of this title and of the item's, in the
    last layer, each text read by itself. Items are ranked, smallest first, by

        D'ᵢ / (1 + Pᵢ)^γ,    D'ᵢ = (Dᵢ − min D) / (max D − min D),    Pᵢ = (Nᵢ − min N) / (max N − min N)

    with \\( N_i \\) the number of users who have the item. The nearest item has \\( D' = 0 \\) and stays first,
    whatever γ is.

    As in the paper's code (https://github.com/SAI990323/BIGRec), the title is the best of four beams with a length
    penalty of 1, texts are read without the quotes around them, and at γ = 0 distances are ranked as they are. There
    are four differences. The code takes the states from the language model as it was before fine-tuning, this class
    from the model that writes. It writes up to 128 tokens; here a title has at most as many as the longest item. It
    reads \\( N \\) from a file of counts that is not published. Its other choice of \\( P \\), the scores of a
    collaborative model, is left out here.

    Titles are written, and all texts read, at the first ranking, and kept for further values of γ. Under `accelerate
    launch` each process takes a share of the work, and all get the whole result.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, PEFT-wrapped or not. Its `generation_config` is not used.
        task ([`RankingTask`]):
            The items and the model's tokenizer.
        prompts (`Sequence[list[int]]`):
            Token ids of each user's prompt.
        popularity (`torch.Tensor` of shape `(num_items,)`, *optional*):
            Number of users who have each item: see [`count_users`].
        num_beams (`int`, *optional*, defaults to `4`):
            Beam width.

    Raises:
        `ValueError`: if an argument is out of range, or the model is sharded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: RankingTask,
        prompts: Sequence[list[int]],
        popularity: Tensor | None = None,
        num_beams: int = 4,
    ):
        check_whole(model)
        if popularity is not None and popularity.shape != (len(task.catalog),):
            raise ValueError(
                f"`popularity` has the shape {list(popularity.shape)}: pass a count for each of the "
                f"{len(task.catalog)} items."
            )
        self.model, self.task, self.num_beams = model, task, num_beams
        self.prompts = read_prompts(prompts, model, num_beams=num_beams)
        self.popularity = popularity
        self.titles: list[str] | None = None  # that were written
        self.seconds = 0.0  # it took to write the titles, and to read all texts

    def __call__(
        self,
        top_k: int = 10,
        popularity_gamma: float = 0.0,
        allowed: Sequence[int] | Tensor | None = None,
        batch_size: int = 16,
    ) -> Recommendations:
        """
        Rank items for all prompts.

        Args:
            top_k (`int`, *optional*, defaults to `10`):
                Number of items to rank.
            popularity_gamma (`float`, *optional*, defaults to `0.0`):
                The exponent γ, at least 0.
            allowed (`Sequence[int]` or `torch.Tensor`, *optional*):
                Indices of the items to rank; distances are normalised over these. Defaults to all.
            batch_size (`int`, *optional*, defaults to `16`):
                Prompts, or texts, per process at a time.

        Returns:
            [`Recommendations`], with scores of -1 to 0; `invalid_rate` is the share of titles that no item has.

        Raises:
            `ValueError`: if `top_k` exceeds the number of items, or `popularity_gamma` is negative or lacks a
                `popularity`.
        """
        check_gamma(popularity_gamma)
        if popularity_gamma > 0 and self.popularity is None:
            raise ValueError(
                f"`popularity_gamma` is {popularity_gamma}, but `popularity` is None: pass the number of users of "
                "each item."
            )
        num_items = len(self.task.catalog)
        items = torch.arange(num_items) if allowed is None else torch.as_tensor(allowed).unique()
        if not 0 < top_k <= len(items):
            raise ValueError(f"`top_k` is {top_k}: it must lie between 1 and the number of items, {len(items)}.")
        if self.titles is None:
            self._write_and_read(batch_size)
        weights = torch.ones(num_items)
        if popularity_gamma > 0:
            weights = (1 + _normalize(self.popularity.double())).pow(-popularity_gamma).float()
        device = self.model.device
        states, weights = self._item_states[items].to(device), weights[items].to(device)

        def rank(users: list[int]) -> list[tuple[Tensor, Tensor]]:
            rows = []
            for start in range(0, len(users), batch_size):
                chosen = self._title_states[users[start : start + batch_size]].to(device)
                scores, order = (_normalize(distances(chosen, states)) * weights).sort(dim=1, stable=True)
                rows += zip(items[order[:, :top_k].cpu()], -scores[:, :top_k].cpu())
            return rows

        found = _in_shares(rank, list(range(len(self.prompts))))
        none = np.zeros(len(found), dtype=np.int64)
        known = set(self._item_texts)
        return Recommendations(
            items=torch.stack([row for row, _ in found]).numpy(),
            scores=torch.stack([row for _, row in found]).numpy(),
            exact=np.ones(len(found), dtype=bool),
            expansions=none,
            rounds=none,
            lost_at=np.zeros((len(found), 0), dtype=np.int64),
            invalid_rate=float(np.mean([title not in known for title in self.titles])),
        )

    @property
    def _item_texts(self) -> list[str]:
        return [text.strip() for text in self.task.catalog.texts]

    def _write_and_read(self, batch_size: int) -> None:
        started, model, task, texts = time.time(), self.model, self.task, self._item_texts
        self.titles = write_titles(model, task, self.prompts, self.num_beams, batch_size)
        # Each text once: a title that is an item's has exactly the same state
        place = {text: index for index, text in enumerate(dict.fromkeys([*texts, *self.titles]))}
        states = embed_texts(model, task.tokenizer, list(place), batch_size)
        self._item_states, self._title_states = (
            states[[place[text] for text in some]] for some in (texts, self.titles)
        )
        self.seconds = time.time() - started


def check_gamma(popularity_gamma: float) -> None:
    """Raise a `ValueError` if the exponent of the popularity is out of range."""
    if not 0 <= popularity_gamma <= 100:  # above, scores would be too small for fp32
        raise ValueError(f"`popularity_gamma` is {popularity_gamma}: it must lie between 0 and 100.")


def distances(states: Tensor, item_states: Tensor) -> Tensor:
    """
    Euclidean distances of shape `(num_states, num_items)`. They are not made from a matrix product, which is faster
    but too inexact for states that are close to each other.
    """
    return torch.cdist(states, item_states, compute_mode="donot_use_mm_for_euclid_dist")


def write_titles(
    model: PreTrainedModel, task: RankingTask, prompts: Sequence[list[int]], num_beams: int = 4, batch_size: int = 16
) -> list[str]:
    """The title that beam search without a trie finds for each prompt, without the item template around it."""
    tokenizer, ends = task.tokenizer, end_tokens(task.trie.to("cpu"))
    config = GenerationConfig(
        num_beams=num_beams,
        max_new_tokens=task.trie.depth,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=padding_token(tokenizer),
    )
    whole = task.encode_items([task.catalog.template.replace("{text}", _TITLE)])[0][:-1]
    before, _, after = _decode(tokenizer, whole).strip().partition(_TITLE)

    def write(prompts: list[list[int]]) -> list[str]:
        def write_batch(batch: list[list[int]]) -> list[str]:
            inputs = pad_left(batch, config.pad_token_id, model.device)
            written = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :].tolist()
            rows = [row[: next((i for i, token in enumerate(row) if token in ends), None)] for row in written]
            texts = [_decode(tokenizer, row).strip() for row in rows]  # untrained models begin with white space
            return [text.removeprefix(before).removesuffix(after).strip() for text in texts]

        with ready_to_generate(model):
            return _by_length(write_batch, prompts, batch_size, "Writing titles")

    return _in_shares(write, list(prompts))


def embed_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 16
) -> Tensor:
    """Last hidden state of each text's last token: fp32 of shape `(num_texts, hidden_size)`, on the CPU."""
    encoded = [ids or [padding_token(tokenizer)] for ids in encode_prompts(tokenizer, texts)]

    def embed_batch(batch: list[list[int]]) -> list[Tensor]:
        return [states[-1] for states in hidden_states(model, batch)]

    def embed(share: list[list[int]]) -> list[Tensor]:
        with evaluating(model):
            return _by_length(embed_batch, share, batch_size, "Reading titles")

    return torch.stack(_in_shares(embed, encoded))


def _normalize(values: Tensor) -> Tensor:
    """Values of each row between 0 and 1; all 0 where they are equal."""
    least = values.amin(dim=-1, keepdim=True)
    largest = (values - least).amax(dim=-1, keepdim=True)
    return (values - least) / largest.clamp(min=torch.finfo(values.dtype).tiny)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _by_length(function: Callable, sequences: list[list[int]], batch_size: int, description: str) -> list[Any]:
    """A function's results for batches of sequences of similar length, longest first, in the order of `sequences`."""
    order = sorted(range(len(sequences)), key=lambda place: -len(sequences[place]))
    starts, found = range(0, len(order), batch_size), {}
    is_silent = len(starts) < 2 or not PartialState().is_local_main_process
    for start in tqdm(starts, desc=description, disable=is_silent):
        batch = order[start : start + batch_size]
        found |= zip(batch, function([sequences[place] for place in batch]))
    return [found[place] for place in range(len(sequences))]


def _in_shares(function: Callable[[list], list], inputs: list) -> list:
    """A function's results for `inputs`, of which each process computes a share."""
    process = PartialState()
    shares = gather_object([function(inputs[process.process_index :: process.num_processes])])
    return [shares[place % len(shares)][place // len(shares)] for place in range(len(inputs))]
