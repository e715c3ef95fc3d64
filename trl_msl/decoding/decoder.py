# SPDX-License-Identifier: Apache-2.0
"""Exact top-K search, beam search and item scores over the trie. Token ids and nodes only, no text."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..model import (
    USE_GENERATE,
    TreeCache,
    check_head,
    check_length,
    check_tree_attention,
    evaluating,
    head_projection,
    prefill_prefix,
)
from ..trie import CompressedTrie, ItemTrie, pad_rows
from .beams import Beams
from .frontier import Frontier
from .item_keys import key_items, key_scores
from .next_tokens import next_token_log_probs
from .output import DecodingOutput
from .restriction import Restriction, check_items, check_restrictions, is_shared


class TrieDecoder:
    """
    Ranks the items of a catalogue by their log-probability under a model, restricted to the catalogue.

    A prompt is run through the model once, and what all prompts begin with once for all of them. Nodes of the trie are
    appended to the same cache, many in one forward, each of which sees its own ancestors only. Chains of forced tokens
    take one forward, or none at the end of an item. Logits are computed for the tokens that continue some expanded
    node, in fp32. Memory is bounded by `batch_size`, whatever the size of the catalogue.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, PEFT-wrapped or not, on the devices of one process.
        trie ([`ItemTrie`]):
            Trie of the catalogue, built with the model's tokenizer.

    Raises:
        `ValueError`: if the model can't run a tree of tokens in one forward pass. A small tree is tried: recurrent
            layers, FlashAttention, or whatever else makes its logits differ from those of the model's own forward, is
            found there.

    Example:

    ```python
    decoder = TrieDecoder(model, trie)
    found = decoder.search([[1, 5, 7], [1, 9]], top_k=10)  # prompts as token ids
    ```
    """

    def __init__(self, model: PreTrainedModel, trie: ItemTrie):
        if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"`model` has a {model.active_peft_config.peft_type.value} adapter, whose virtual tokens the decoder "
                f"would leave out: {USE_GENERATE}."
            )
        self.model = model
        self.base = model.get_base_model() if is_peft_model(model) else model
        check_head(self.base, trie)
        self.backbone = self.base.base_model
        self.trie = trie.to(self.base.device)
        self.tree = CompressedTrie(self.trie)
        with evaluating(model):
            check_tree_attention(self.base)

    def search(
        self,
        prompts: Sequence[list[int]],
        top_k: int = 10,
        exclude: Sequence[Sequence[int]] | None = None,
        allowed: Sequence[int] | Tensor | Sequence[Sequence[int]] | None = None,
        max_expansions: int = 1024,
        nodes_per_round: int = 16,
        batch_size: int = 16,
    ) -> DecodingOutput:
        """
        Find the `top_k` items with the highest log-probability `log P_valid`, the sum over an item's tokens of their
        log-probabilities among the valid tokens (Lemma 4.1 of the MSL paper).

        Best-first search over the nodes at which there is a choice. Log-probabilities never rise along a path, so the
        result is certain as soon as the K-th item found beats every open node.

        Args:
            prompts (`Sequence[list[int]]`):
                Token ids of each user's prompt.
            top_k (`int`, *optional*, defaults to `10`):
                Number of items to find. Where a user may get fewer, the rest is `-1` with a score of `-inf`.
            exclude (`Sequence[Sequence[int]]`, *optional*):
                Item indices that each user must not get, such as the history.
            allowed (`Sequence[int]`, `torch.Tensor` or `Sequence[Sequence[int]]`, *optional*):
                Item indices that all users, or each of them, may get, such as what is in stock. The scores stay those
                of the whole catalogue.
            max_expansions (`int`, *optional*, defaults to `1024`):
                Number of nodes to expand for a user at most. If it is reached first, `exact` may be `False`.
            nodes_per_round (`int`, *optional*, defaults to `16`):
                Number of nodes of each user that one forward pass expands. More need fewer passes, but expand nodes in
                vain.
            batch_size (`int`, *optional*, defaults to `16`):
                Number of prompts at a time.

        Returns:
            [`DecodingOutput`]: The items of each prompt.

        Raises:
            `ValueError`: if an argument is out of range, or a prompt is longer than the model's sliding window.
        """
        limits = {"top_k": top_k, "max_expansions": max_expansions, "nodes_per_round": nodes_per_round}
        prompts = self._check_arguments(prompts, exclude, allowed, batch_size=batch_size, **limits)
        output = DecodingOutput.empty(len(prompts), top_k)
        with self._ready():
            for users, cache in self._batches(prompts, batch_size):
                restriction = self._restriction(users, exclude, allowed)
                frontier = Frontier(self.tree, restriction, len(users), top_k, max_expansions)
                self._search(output, users, cache, frontier, nodes_per_round)
        return output

    def beam_search(
        self,
        prompts: Sequence[list[int]],
        top_k: int = 10,
        exclude: Sequence[Sequence[int]] | None = None,
        allowed: Sequence[int] | Tensor | Sequence[Sequence[int]] | None = None,
        num_beams: int | None = None,
        normalize: str = "trie",
        length_penalty: float = 0.0,
        batch_size: int = 16,
    ) -> DecodingOutput:
        """
        The items that `model.generate` finds with `num_beams` beams and a [`TrieLogitsProcessor`], with the same
        scores: for comparison with published numbers, which come from there.

        Args:
            prompts, top_k, exclude, allowed, batch_size:
                As for [`~TrieDecoder.search`].
            num_beams (`int`, *optional*):
                Beam width, `top_k` by default.
            normalize (`str`, *optional*, defaults to `"trie"`):
                `"trie"`, log-probabilities among the valid tokens; or `"vocab"`, over the vocabulary, which takes a
                forward pass and all logits for every token, forced ones too.
            length_penalty (`float`, *optional*, defaults to `0.0`):
                Scores of finished items are divided by their number of tokens to this power, as `generate` does.

        Returns:
            [`DecodingOutput`]: The items of each prompt, none of them certain.

        Raises:
            `ValueError`: if an argument is out of range, or an item is a strict prefix of another.
        """
        num_beams = top_k if num_beams is None else num_beams
        prompts = self._check_arguments(prompts, exclude, allowed, batch_size=batch_size, top_k=top_k)
        if num_beams < top_k:
            raise ValueError(f"`num_beams` is {num_beams}: it must be at least `top_k` = {top_k}.")
        if normalize not in ("trie", "vocab"):
            raise ValueError(f"`normalize` is {normalize!r}: it must be 'trie' or 'vocab'.")
        if not self.trie.is_leaf(self.trie.item_nodes.long()).all():
            raise ValueError(
                "`trie` has items that are the beginning of others, so beams can't know when one is finished: append "
                "an end token to every sequence, as `ItemCatalog.build_trie` does."
            )
        output = DecodingOutput.empty(len(prompts), top_k)
        with self._ready(cast_head=normalize == "vocab"):
            for users, cache in self._batches(prompts, batch_size):
                restriction = self._restriction(users, exclude, allowed)
                root_scores = self._score_root(cache, normalize)
                beams = Beams(self.tree, restriction, num_beams, length_penalty, root_scores)
                self._beam_search(output, users, cache, beams, normalize)
        return output

    def score_items(
        self,
        prompts: Sequence[list[int]],
        items: Sequence[Sequence[int]],
        batch_size: int = 16,
        items_per_pass: int = 128,
    ) -> list[Tensor]:
        """
        Log-probability `log P_valid` of given items, for reranking and diagnosis. What the items of a user have in
        common is computed once.

        Args:
            prompts (`Sequence[list[int]]`):
                Token ids of each user's prompt.
            items (`Sequence[Sequence[int]]`):
                Item indices to score for each prompt.
            batch_size (`int`, *optional*, defaults to `16`):
                Number of prompts at a time.
            items_per_pass (`int`, *optional*, defaults to `128`):
                Number of items of a user that one forward pass scores, which bounds its memory.

        Returns:
            `list` of `torch.Tensor` of shape `(len(items[user]),)`, fp32, on the CPU.

        Raises:
            `ValueError`: if there are not as many lists of items as prompts, or an item is not in the catalogue.
        """
        prompts = self._check_arguments(prompts, batch_size=batch_size, items_per_pass=items_per_pass)
        check_items("items", items, len(prompts), self.trie.num_items)
        items = [torch.as_tensor(row, dtype=torch.int64, device="cpu") for row in items]
        scores = [torch.zeros(len(row)) for row in items]
        item_place = self.tree.item_place.cpu()
        with self._ready():
            for users, cache in self._batches(prompts, batch_size):
                # In the order of the leaves, so that the items of a pass have much in common
                orders = [item_place[items[user]].argsort() for user in users]
                for start in range(0, max(map(len, orders)), items_per_pass):
                    parts = [order[start : start + items_per_pass] for order in orders]
                    found = self._score(cache, [items[user][part] for user, part in zip(users, parts)])
                    for user, part, values in zip(users, parts, found):
                        scores[user][part] = values
                    cache.clear()
        return scores

    # ------------------------------------------------------------------ one batch

    def _search(
        self, output: DecodingOutput, users: Tensor, cache: TreeCache, frontier: Frontier, nodes_per_round: int
    ) -> None:
        """Exact search for a batch of `users`, whose results go into their rows of `output`."""
        for rounds in itertools.count(start=1):
            nodes, scores = frontier.take(nodes_per_round)
            is_done = (nodes < 0).all(1)
            if is_done.any():
                _write(output, users, frontier, is_done)
                if is_done.all():
                    return
                frontier.select(~is_done)
                cache.select(~is_done)
                nodes, scores = nodes[~is_done], scores[~is_done]
            # The prompt's last token stands for the root
            hidden = cache.root_hidden[:, -1] if rounds == 1 else cache.append(nodes)
            row, column = (nodes >= 0).nonzero(as_tuple=True)
            parents, children = self.tree.children(nodes[row, column])
            log_probs = next_token_log_probs(self.project, hidden, parents, self.tree.head_tokens(children))
            frontier.add(row[parents], children, scores[row, column][parents] + log_probs)

    def _beam_search(
        self, output: DecodingOutput, users: Tensor, cache: TreeCache, beams: Beams, normalize: str
    ) -> None:
        """Beam search for a batch of `users`, whose results go into their rows of `output`."""
        for rounds in itertools.count(start=1):
            is_done = beams.is_done
            if is_done.any():
                _write(output, users, beams, is_done)
                if is_done.all():
                    return
                beams.select(~is_done)
                cache.select(~is_done)
            rows, nodes, steps = beams.continuations()
            log_probs = torch.zeros(len(rows), device=rows.device)
            # A forced token has a probability of 1 among the valid ones, but not in the vocabulary
            read = beams.is_choosing if normalize == "trie" else beams.is_alive
            if read.any():
                if rounds == 1:
                    hidden = cache.root_hidden[:, -1]
                elif normalize == "trie":
                    hidden = cache.append(torch.where(read, beams.nodes, -1))
                else:
                    hidden = cache.append(torch.where(read, beams.nodes, -1), beams.steps, beams.steps + 1)
                state = read.reshape(-1).cumsum(0) - 1
                is_read = read.reshape(-1)[rows]
                tokens = self.tree.chain_tokens[self.tree.chain_start[nodes] + steps]
                log_probs[is_read] = next_token_log_probs(
                    self.project, hidden, state[rows[is_read]], tokens[is_read], normalize
                )
                beams.count_expansions(read)
            beams.advance(rows, nodes, steps, log_probs)

    def _score(self, cache: TreeCache, items: list[Tensor]) -> list[Tensor]:
        """Scores of items of each user of a batch, in one forward pass."""
        tree, counts = self.tree, torch.tensor([len(row) for row in items])
        users = torch.repeat_interleave(counts).to(tree.device)
        leaves = tree.item_nodes[torch.cat(items).to(tree.device)].long()
        levels = [leaves]
        while (levels[-1] > 0).any():
            levels.append(tree.parent[levels[-1]].long().clamp(min=0))
        # Every node at which some item of a user takes a choice, by user and from the root down
        keys = torch.cat([users[:0], *(users * tree.num_nodes + nodes for nodes in levels[1:])]).unique()
        row, nodes = keys // tree.num_nodes, keys % tree.num_nodes
        hidden = cache.root_hidden.new_empty(len(keys), cache.root_hidden.shape[-1])
        hidden[nodes == 0] = cache.root_hidden[row[nodes == 0], -1]
        if (nodes > 0).any():
            hidden[nodes > 0] = cache.append(pad_rows(row[nodes > 0], nodes[nodes > 0], len(items), fill=-1))
        parents, children = tree.children(nodes)
        log_probs = next_token_log_probs(self.project, hidden, parents, tree.head_tokens(children))
        first = torch.searchsorted(parents, torch.arange(len(keys), device=tree.device))
        scores = torch.zeros(len(leaves), device=tree.device)
        for above, below in zip(levels[1:], levels):
            place = first[torch.searchsorted(keys, users * tree.num_nodes + above)] + below - tree.first_child[above]
            scores += torch.where(below > 0, log_probs[place.clamp(max=len(log_probs) - 1)], 0.0)
        return scores.cpu().split(counts.tolist())

    # ------------------------------------------------------------------ parts

    def _batches(self, prompts: Sequence[list[int]], batch_size: int) -> Iterator[tuple[Tensor, TreeCache]]:
        """Users and the cache of their prompts, a batch at a time, prompts of similar length together."""
        order = sorted(range(len(prompts)), key=lambda user: -len(prompts[user]))
        shared = _common_length(min(prompts), max(prompts)) if len(prompts) > 1 else 0
        shared = min(shared, len(prompts[order[-1]]) - 1)  # each prompt keeps a token to read on from
        prefix = prefill_prefix(self.backbone, prompts[0][:shared], self.tree.device)
        starts = range(0, len(order), batch_size)
        is_silent = len(starts) < 2 or not PartialState().is_local_main_process
        for start in tqdm(starts, desc="Decoding", disable=is_silent):
            users = order[start : start + batch_size]
            yield torch.tensor(users), TreeCache(self.backbone, self.tree, [prompts[user] for user in users], prefix)

    @contextlib.contextmanager
    def _ready(self, cast_head: bool = False) -> Iterator[None]:
        """Evaluation mode, no gradient, and the head that the model has now; in fp32 if all of it is used often."""
        self.project = head_projection(self.base)
        if cast_head:
            self.project = functools.partial(self.project, weight=self.project.keywords["weight"].float())
        try:
            with evaluating(self.model):
                yield
        finally:
            del self.project

    def _score_root(self, cache: TreeCache, normalize: str) -> Tensor:
        """Log-probability of the tokens that all items begin with, fp32 of shape `(num_users,)`."""
        num_users, num_forced = len(cache.root_hidden), cache.root_hidden.shape[1] - 1
        if normalize == "trie" or num_forced == 0:
            return torch.zeros(num_users, device=self.tree.device)
        rows = torch.arange(num_users * num_forced, device=self.tree.device)
        tokens = self.tree.chain_tokens[:num_forced].repeat(num_users)
        hidden = cache.root_hidden[:, :-1].flatten(0, 1)
        log_probs = next_token_log_probs(self.project, hidden, rows, tokens, normalize)
        return log_probs.view(num_users, num_forced).sum(1)

    def _restriction(self, users: Tensor, exclude, allowed) -> Restriction:
        """What the users of a batch may get."""
        if exclude is not None:
            exclude = [exclude[user] for user in users]
        if allowed is not None:
            allowed = torch.as_tensor(allowed) if is_shared(allowed) else [allowed[user] for user in users]
        return Restriction(self.tree, exclude, allowed)

    # ------------------------------------------------------------------ checks

    def _check_arguments(
        self, prompts: Sequence[Sequence[int]], exclude=None, allowed=None, **counts: int
    ) -> list[list[int]]:
        """Raise a `ValueError` for arguments out of range; return the prompts as lists."""
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"`{name}` is {value}: it must be at least 1.")
        if len(prompts) == 0:
            raise ValueError("`prompts` is empty: there is nobody to recommend to.")
        prompts = [[int(token) for token in prompt] for prompt in prompts]
        lengths = list(map(len, prompts))
        if min(lengths) == 0:
            raise ValueError(f"`prompts` has no token for user {lengths.index(0)}: an item must come after something.")
        check_length(self.backbone, max(lengths), self.trie.depth)
        check_restrictions(len(prompts), self.trie.num_items, exclude, allowed)
        return prompts


def _write(output: DecodingOutput, users: Tensor, state: Frontier | Beams, is_done: Tensor) -> None:
    """Write what has been found for the users that are done into their rows of `output`."""
    done = users[state.users[is_done].cpu()]
    keys = state.best_items(output.items.shape[1])[is_done]
    output.items[done] = key_items(keys).cpu()
    output.scores[done] = key_scores(keys).cpu()
    output.exact[done] = state.is_exact[is_done].cpu()
    output.expansions[done] = state.expansions[is_done].cpu()
    output.rounds[done] = state.rounds[is_done].cpu()


def _common_length(first: list[int], last: list[int]) -> int:
    """Length of the common beginning of the first and the last of some sorted prompts, and so of all of them."""
    return next((i for i, (one, other) in enumerate(zip(first, last)) if one != other), len(first))
