# SPDX-License-Identifier: Apache-2.0
"""Exact top-K search, beam search and item scores over the trie. Token ids and nodes only, no text."""

from __future__ import annotations

import contextlib
import functools
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
    backbone,
    check_head,
    check_length,
    check_tree_attention,
    evaluating,
    head_projection,
    prefill_prefix,
)
from ..trie import CompressedTrie, ItemTrie
from .arguments import Items, common_length, read_allowed, read_followed, read_item_lists, read_prompts
from .batches import Project, beam_search_batch, score_batch, score_root, search_batch
from .beams import Beams
from .frontier import Frontier, RerankingFrontier
from .item_bias import Biases, ItemBias, read_item_bias
from .output import DecodingOutput
from .request import Request, check_beams, check_score
from .restriction import Allowed


class TrieDecoder:
    """
    Ranks the items of a catalogue by their log-probability under a model, restricted to the catalogue.

    Each prompt is run through the model once, and the beginning that all prompts share once for all of them. Nodes of
    the trie are appended to the same cache, many in one forward, and attend only to their own ancestors. A chain of
    forced tokens takes one forward, or none at the end of an item. Logits are computed in fp32, for the tokens that
    continue an expanded node. Memory depends on `batch_size`, not on the size of the catalogue.

    Making one takes time in proportion to the catalogue, a search does not: make one and keep it. Several threads may
    search with it at once.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, PEFT-wrapped or not, on the devices of one process.
        trie ([`ItemTrie`]):
            Trie of the catalogue, built with the model's tokenizer.

    Raises:
        `ValueError`: if the model can't run a tree of tokens in one forward pass, for example with recurrent layers or
            FlashAttention. A small tree is run, and its logits compared with those of the model's own forward.

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
        self.backbone = backbone(self.base)
        self.trie = trie.to(self.base.device)
        self.tree = CompressedTrie(self.trie)
        PartialState()  # made here, as two threads that make it at once would find it half made
        with evaluating(model):
            check_tree_attention(self.base)

    def search(
        self,
        prompts: Sequence[list[int]],
        top_k: int = 10,
        exclude: Sequence[Items] | None = None,
        allowed: Allowed | Items | Sequence[Items] | None = None,
        vocab_weight: float = 0.0,
        item_bias: Biases | None = None,
        num_candidates: int | None = None,
        max_expansions: int = 1024,
        nodes_per_round: int = 16,
        batch_size: int = 16,
    ) -> DecodingOutput:
        """
        Find the `top_k` items with the highest score

            Σ log P_valid + vocab_weight · Σ log m + item_bias

        with sums over an item's tokens, `P_valid` a token's probability among the valid tokens (Lemma 4.1 of the MSL
        paper) and `m` the valid tokens' share of the vocabulary's probability.

        Best-first search over the nodes at which there is a choice. Neither sum ever rises along a path, nor does the
        largest bias of the items that can still be reached, so the result is certain as soon as the K-th item found
        beats what any open node could lead to.

        Args:
            prompts (`Sequence[list[int]]`):
                Token ids of each user's prompt.
            top_k (`int`, *optional*, defaults to `10`):
                Number of items to find. Where a user may get fewer, the rest is `-1` with a score of `-inf`.
            exclude (`Sequence[Sequence[int]]`, *optional*):
                Item indices that each user must not get, such as the history, as lists, sets, arrays or tensors.
            allowed (`Sequence[int]`, `torch.Tensor`, [`Allowed`] or `Sequence[Sequence[int]]`, *optional*):
                Item indices that all users, or each of them, may get, such as what is in stock. The scores stay those
                of the whole catalogue. Prepare a large list for several searches with
                [`~TrieDecoder.prepare_allowed`].
            vocab_weight (`float`, *optional*, defaults to `0.0`):
                At 0 an item's score is its log-probability among the items, at 1 that which the language model gives
                its tokens; values between or above are allowed. Above 0 forced tokens have to be run, one at a time,
                and each takes the logits of the whole vocabulary.
            item_bias (`torch.Tensor` of shape `(num_items,)` or `(num_prompts, num_items)`, [`SparseBias`],
            [`ItemBias`] or function, *optional*):
                What is added to the score of each item, for all users or for each of them; `-inf` for what must not be
                found. The wider its range, the more nodes are expanded. Prepare one for several searches with
                [`~TrieDecoder.prepare_item_bias`]. A function is called for each batch with the positions of its
                prompts and returns their biases, so that memory is bounded by the batch.
            num_candidates (`int`, *optional*):
                Rank by the bias only this many items, the best without it: for biases with which an exact search takes
                too many expansions. Then `exact` is `True` only where no other item can be among the best.
            max_expansions (`int`, *optional*, defaults to `1024`):
                Number of nodes (with a `vocab_weight`, of tokens) that the search expands for a user before it stops,
                in which case `exact` may be `False`. If it has found fewer than `top_k` items by then, `top_k` beams
                continue from the best open nodes until there are enough, which expands at most `top_k` more nodes on
                each level.
            nodes_per_round (`int`, *optional*, defaults to `16`):
                Number of nodes of each user that one forward pass expands. A larger number needs fewer passes, but
                expands more nodes in vain.
            batch_size (`int`, *optional*, defaults to `16`):
                Number of prompts in a batch.

        Returns:
            [`DecodingOutput`]: The items of each prompt.

        Raises:
            `ValueError`: if an argument is out of range, or a prompt is longer than the model's sliding window.
        """
        limits = {"top_k": top_k, "max_expansions": max_expansions, "nodes_per_round": nodes_per_round}
        prompts = self._check_prompts(prompts, batch_size=batch_size, **limits)
        check_score(vocab_weight, item_bias, num_candidates, top_k)
        request = Request(self.tree, len(prompts), exclude, allowed, item_bias)
        output, steps = DecodingOutput.empty(len(prompts), top_k), self._item_steps if vocab_weight > 0 else None
        with self._ready(cast_head=vocab_weight > 0) as project:
            for users, cache in self._batches(prompts, batch_size):
                restriction, bias = request.of_batch(users.tolist())
                state = (self.tree, restriction, len(users), max_expansions, steps)
                if num_candidates is None:
                    frontier = Frontier(*state, top_k, bias)
                else:
                    frontier = RerankingFrontier(*state, num_candidates, top_k, bias)
                search_batch(project, output, users, cache, frontier, nodes_per_round, vocab_weight)
        return output

    def beam_search(
        self,
        prompts: Sequence[list[int]],
        top_k: int = 10,
        exclude: Sequence[Items] | None = None,
        allowed: Allowed | Items | Sequence[Items] | None = None,
        num_beams: int | None = None,
        normalize: str = "trie",
        length_penalty: float = 0.0,
        follow: Tensor | None = None,
        batch_size: int = 16,
    ) -> DecodingOutput:
        """
        Find the items that `model.generate` finds with `num_beams` beams and a [`TrieLogitsProcessor`], with the same
        scores, to compare with published results.

        Args:
            prompts, top_k, exclude, allowed, batch_size:
                As for [`~TrieDecoder.search`].
            num_beams (`int`, *optional*):
                Beam width, `top_k` by default.
            normalize (`str`, *optional*, defaults to `"trie"`):
                `"trie"`, log-probabilities among the valid tokens; or `"vocab"`, over the vocabulary, which takes a
                forward pass and all logits for every token, including forced ones.
            length_penalty (`float`, *optional*, defaults to `0.0`):
                Scores of finished items are divided by their number of tokens to this power, as `generate` does.
            follow (`torch.Tensor` of shape `(num_prompts, num_followed)`, *optional*):
                Item indices, `-1` for none. `lost_at` of the output says at which token the beams lost each.

        Returns:
            [`DecodingOutput`]: The items of each prompt, none of them certain.

        Raises:
            `ValueError`: if an argument is out of range, or an item is a strict prefix of another.
        """
        num_beams = top_k if num_beams is None else num_beams
        prompts = self._check_prompts(prompts, batch_size=batch_size, top_k=top_k)
        request = Request(self.tree, len(prompts), exclude, allowed)
        followed = read_followed(follow, len(prompts), self.trie.num_items)
        check_beams(num_beams, normalize, top_k)
        if not self._ends_at_leaves:
            raise ValueError(
                "`trie` has items that are the beginning of others, so beam search can't tell when one is finished: "
                "append an end token to every sequence, as `ItemCatalog.build_trie` does."
            )
        vocab_weight = float(normalize == "vocab")
        output = DecodingOutput.empty(len(prompts), top_k, followed.shape[1])
        with self._ready(cast_head=vocab_weight > 0) as project:
            for users, cache in self._batches(prompts, batch_size):
                restriction, _ = request.of_batch(users.tolist())
                root_scores = score_root(project, cache, vocab_weight)
                beams = Beams(self.tree, restriction, num_beams, length_penalty, root_scores, followed[users])
                beam_search_batch(project, output, users, cache, beams, vocab_weight)
        return output

    def score_items(
        self,
        prompts: Sequence[list[int]],
        items: Sequence[Items],
        batch_size: int = 16,
        items_per_pass: int = 128,
    ) -> list[Tensor]:
        """
        Log-probability `log P_valid` of given items, for reranking and diagnosis. Prefixes that items of a user share
        are computed once.

        Args:
            prompts (`Sequence[list[int]]`):
                Token ids of each user's prompt.
            items (`Sequence[Sequence[int]]`):
                Item indices to score for each prompt.
            batch_size (`int`, *optional*, defaults to `16`):
                Number of prompts in a batch.
            items_per_pass (`int`, *optional*, defaults to `128`):
                Number of items of a user that one forward pass scores, which bounds its memory.

        Returns:
            `list` of `torch.Tensor` of shape `(len(items[user]),)`, fp32, on the CPU.

        Raises:
            `ValueError`: if the numbers of prompts and of lists of items differ, or an item is not in the catalogue.
        """
        prompts = self._check_prompts(prompts, batch_size=batch_size, items_per_pass=items_per_pass)
        items = read_item_lists("items", items, len(prompts), self.trie.num_items)
        items = [row.to(self.tree.device) for row in items]
        scores = [torch.zeros(len(row)) for row in items]
        with self._ready() as project:
            for users, cache in self._batches(prompts, batch_size):
                # In the order of the leaves, so that the items of a pass have much in common
                orders = [self.tree.item_place[items[user]].argsort() for user in users]
                for start in range(0, max(map(len, orders)), items_per_pass):
                    parts = [order[start : start + items_per_pass] for order in orders]
                    found = score_batch(project, cache, [items[user][part] for user, part in zip(users, parts)])
                    for user, part, values in zip(users, parts, found):
                        scores[user][part.cpu()] = values
                    cache.clear()
        return scores

    def prepare_allowed(self, items: Items) -> Allowed:
        """
        Prepare items that all users may get, to be passed as `allowed` to any number of searches. This takes time in
        proportion to the number of items, which the searches then save.

        Args:
            items (`Sequence[int]`, `set[int]` or `torch.Tensor` of shape `(num_allowed,)`):
                Item indices.

        Returns:
            [`Allowed`]: The items, for this decoder only.

        Raises:
            `ValueError`: if `items` is empty, or holds an index that is not an item's.
        """
        found = read_allowed(items, 1, self.trie.num_items)
        if isinstance(found, list):
            raise ValueError("`items` holds lists: pass a single list of the items that all users may get.")
        return Allowed.from_items(self.tree, found)

    def prepare_item_bias(self, item_bias: Tensor | Sequence[float]) -> ItemBias:
        """
        Prepare a bias that all users have in common, to be passed as `item_bias` to any number of searches. This takes
        time in proportion to the size of the catalogue, which the searches then save.

        Args:
            item_bias (`torch.Tensor` of shape `(num_items,)`):
                Bias of each item; `-inf` for what must not be found.

        Returns:
            [`ItemBias`]: The biases, for this decoder only.

        Raises:
            `ValueError`: if `item_bias` has another shape, or holds anything but finite numbers and `-inf`.
        """
        bias = ItemBias.from_values(self.tree, read_item_bias(item_bias, None, self.trie.num_items))
        bias.restrict(None)  # looks up once which items it excludes
        return bias

    # ------------------------------------------------------------------ parts

    def _batches(self, prompts: Sequence[list[int]], batch_size: int) -> Iterator[tuple[Tensor, TreeCache]]:
        """Users of each batch and the cache of their prompts. Prompts of similar length share a batch."""
        order = sorted(range(len(prompts)), key=lambda user: -len(prompts[user]))
        shared = min(common_length(prompts), len(prompts[order[-1]]) - 1)  # each prompt keeps a token of its own
        prefix = prefill_prefix(self.backbone, prompts[0][:shared], self.tree.device)
        starts = range(0, len(order), batch_size)
        is_silent = len(starts) < 2 or not PartialState().is_local_main_process
        for start in tqdm(starts, desc="Decoding", disable=is_silent):
            users = order[start : start + batch_size]
            yield torch.tensor(users), TreeCache(self.backbone, self.tree, [prompts[user] for user in users], prefix)

    @contextlib.contextmanager
    def _ready(self, cast_head: bool = False) -> Iterator[Project]:
        """Evaluation mode without gradients, and the model's current head, in fp32 if all of it is used."""
        project = head_projection(self.base)
        if cast_head:
            project = functools.partial(project, weight=project.keywords["weight"].float())
        with evaluating(self.model):
            yield project

    @functools.cached_property
    def _ends_at_leaves(self) -> bool:
        """Whether no item is the beginning of another."""
        return bool(self.trie.is_leaf(self.trie.item_nodes.long()).all())

    @functools.cached_property
    def _item_steps(self) -> Tensor:
        """Index of each item's last token in its node's chain, int32 of shape `(num_items,)`."""
        return (self.trie.item_lengths - self.tree.depth[self.tree.item_nodes] - 1).int()

    def _check_prompts(self, prompts: Sequence[Sequence[int]], **counts: int) -> list[list[int]]:
        """Raise a `ValueError` for prompts or numbers out of range; return the prompts as lists."""
        prompts = read_prompts(prompts, self.base, **counts)
        check_length(self.backbone, max(map(len, prompts)), self.trie.depth)
        return prompts
