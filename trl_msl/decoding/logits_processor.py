# SPDX-License-Identifier: Apache-2.0
"""Trie-constrained generation with `model.generate`."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..trie import ItemTrie, logsumexp_by_row


class TrieLogitsProcessor(LogitsProcessor):
    r"""
    [`~transformers.LogitsProcessor`] that restricts `model.generate` to the items of the catalogue.

    Works with greedy search, sampling and beam search, on all rows at once, and keeps no state: a row's node in the
    trie is read from `input_ids`, so it can be reused and beams may be reordered.

    Once a row has written a whole item, only its end token is allowed again. A row off the trie (a beam that fills up
    where there are fewer items than beams) gets `-inf` everywhere.

    Args:
        trie ([`ItemTrie`]):
            Trie of the catalogue.
        prompt_length (`int`):
            Length of the prompts, padding included: `inputs["input_ids"].shape[1]`. Pad on the left.
        normalize (`str`, *optional*, defaults to `"trie"`):
            What the scores of valid tokens become: `"trie"`, log-probabilities among the valid tokens, whose sum is
            the restricted score that MSL trains (Lemma 4.1 of the paper); or `"vocab"`, unchanged, so that beam search
            sums log-probabilities over the whole vocabulary, as transformers' `PrefixConstrainedLogitsProcessor` does.
        inplace (`bool`, *optional*, defaults to `False`):
            Whether to overwrite the scores instead of making new ones, which takes most of the time with a large
            vocabulary. Safe with `generate`, except with `output_logits=True` in greedy search or sampling.

    Example:

    ```python
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    processor = TrieLogitsProcessor(trie, prompt_length=inputs["input_ids"].shape[1])
    model.generate(
        **inputs, num_beams=10, num_return_sequences=10, max_new_tokens=trie.depth, logits_processor=[processor]
    )
    ```
    """

    def __init__(self, trie: ItemTrie, prompt_length: int, normalize: str = "trie", inplace: bool = False):
        if normalize not in ("trie", "vocab"):
            raise ValueError(f"`normalize` is {normalize!r}: it must be 'trie' or 'vocab'.")
        if prompt_length < 0:
            raise ValueError(f"`prompt_length` is {prompt_length}: it must not be negative.")
        self.trie = trie
        self.prompt_length = prompt_length
        self.normalize = normalize
        self.inplace = inplace

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(num_rows, length)`):
                Prompts and what has been written so far; a row per sequence or beam.
            scores (`torch.Tensor` of shape `(num_rows, vocab_size)`):
                Logits or log-probabilities of the next token.

        Returns:
            `torch.Tensor` of shape `(num_rows, vocab_size)`: `-inf` except at valid tokens.

        Raises:
            `ValueError`: if no row is on the trie, which means that `prompt_length` is wrong.
        """
        trie = self.trie.to(scores.device)
        nodes = self._nodes(trie, input_ids)
        rows, tokens = trie.valid_tokens(nodes)
        valid_scores = scores[rows, tokens]
        if self.normalize == "trie":
            valid_scores = valid_scores - logsumexp_by_row(valid_scores, rows, len(scores))[rows]
        processed = scores.fill_(-torch.inf) if self.inplace else torch.full_like(scores, -torch.inf)
        processed[rows, tokens] = valid_scores.to(scores.dtype)
        finished = trie.is_leaf(nodes)  # it may only repeat its end token, which changes no score
        processed[finished, trie.tokens(nodes[finished])] = 0.0
        return processed

    def _nodes(self, trie: ItemTrie, input_ids: Tensor) -> Tensor:
        """Node that each row has reached: the leaf if it has passed one, `-1` off the trie."""
        if input_ids.shape[1] < self.prompt_length:
            raise ValueError(
                f"`prompt_length` is {self.prompt_length}, but the sequences have {input_ids.shape[1]} tokens: pass "
                "the length of the padded prompts."
            )
        nodes = trie.reached(input_ids[:, self.prompt_length :])
        if (nodes < 0).all():
            raise ValueError(
                f"`prompt_length` = {self.prompt_length}: none of the {len(nodes)} rows has written the beginning of "
                "an item after it. Pass the length of the padded prompts, and pad on the left."
            )
        return nodes
