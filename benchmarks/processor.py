# SPDX-License-Identifier: Apache-2.0
"""
One step of constrained beam search: `TrieLogitsProcessor` against transformers' `PrefixConstrainedLogitsProcessor`,
whose `prefix_allowed_tokens_fn` reads the tokens allowed after a prefix from

- a marisa-trie over strings, one character per token, whose keys below the prefix are listed, with the tokens of the
  first position cached (`processor_vs_transformers`): the way of GENRE, and so of the MSL paper's inference code;
- a trie of Python dicts that is walked from its root (`processor_vs_transformers_dict`): the way of its training code.

32 prompts of 200 tokens with 10 beams each, in the middle of real titles. Times are means over the steps 0 to 11.
Ours is measured as it is by default, and with `inplace=True` (`processor_inplace`), as the library's own evaluation
uses it. `processor_floor_s` is the time to make one tensor of the size of the scores, which no processor that leaves
its input as it is can do without; transformers' makes three.
"""

import statistics
from collections.abc import Callable

import marisa_trie
import torch
from catalogs import VOCAB_SIZE, Catalog, load_books
from timing import time_calls
from torch import Tensor
from transformers import PrefixConstrainedLogitsProcessor
from trie_build import build_dict_trie

from trl_msl import TrieLogitsProcessor


NUM_PROMPTS, NUM_BEAMS, PROMPT_LENGTH, NUM_STEPS = 32, 10, 200, 12
AllowedTokens = Callable[[int, Tensor], list[int]]


def benchmark_processor(rounds: int = 2) -> dict:
    """Time of a step of each processor; see the module's docstring."""
    books = load_books()
    paths = books.trie.paths(books.trie.item_nodes)
    sequences = [books.trie.tokens(path[path >= 0]).tolist() for path in paths]
    scores = torch.randn(NUM_PROMPTS * NUM_BEAMS, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    scores = scores.log_softmax(dim=-1)
    processors = {
        "processor": TrieLogitsProcessor(books.trie, PROMPT_LENGTH, normalize="vocab"),
        "processor_normalizing": TrieLogitsProcessor(books.trie, PROMPT_LENGTH, normalize="trie"),
        "processor_inplace": TrieLogitsProcessor(books.trie, PROMPT_LENGTH, normalize="vocab", inplace=True),
        "transformers_marisa": PrefixConstrainedLogitsProcessor(read_marisa_trie(sequences), NUM_BEAMS),
        "transformers_dict": PrefixConstrainedLogitsProcessor(read_dict_trie(sequences), NUM_BEAMS),
    }
    overwritten = scores.clone()
    seconds = {name: [] for name in [*processors, "processor_floor"]}
    calls = {name: 5 for name in seconds if name.startswith("processor")}
    for depth in range(NUM_STEPS):
        input_ids = _beams(books, depth)
        _check_equal(processors, input_ids, scores)
        functions = {name: lambda p=processor, i=input_ids: p(i, scores) for name, processor in processors.items()}
        functions["processor_inplace"] = lambda i=input_ids: processors["processor_inplace"](i, overwritten)
        functions["processor_floor"] = lambda: torch.full_like(scores, -torch.inf)
        for name, times in time_calls(functions, rounds, calls).items():
            seconds[name].append(statistics.median(times))
    results = {
        "catalogue": books.source,
        "rows": len(scores),
        "vocab_size": VOCAB_SIZE,
        "seconds_by_step": seconds,
    }
    results |= {f"{name}_s": statistics.mean(times) for name, times in seconds.items()}
    for ours in ("processor", "processor_inplace"):
        for suffix, reference in (("", "marisa"), ("_dict", "dict")):
            ratio = results[f"transformers_{reference}_s"] / results[f"{ours}_s"]
            results[f"{ours}_vs_transformers{suffix}"] = ratio
    return results


def read_marisa_trie(sequences: list[list[int]], prompt_length: int = PROMPT_LENGTH) -> AllowedTokens:
    """Allowed tokens from a marisa-trie of strings, found by listing all keys below the prefix."""
    # A character per token, past the surrogates, which no string may hold
    character = [chr(token if token < 0xD800 else token + 0x800) for token in range(VOCAB_SIZE)]
    token_of = {char: token for token, char in enumerate(character)}
    trie = marisa_trie.Trie("".join(character[token] for token in sequence) for sequence in sequences)
    first_tokens = sorted({sequence[0] for sequence in sequences})

    def allowed_tokens(batch_id: int, input_ids: Tensor) -> list[int]:
        prefix = "".join(character[token] for token in input_ids[prompt_length:].tolist())
        if not prefix:
            return first_tokens
        return [token_of[char] for char in {key[len(prefix)] for key in trie.keys(prefix) if len(key) > len(prefix)}]

    return allowed_tokens


def read_dict_trie(sequences: list[list[int]]) -> AllowedTokens:
    """Allowed tokens from a trie of dicts, found by walking down from the root."""
    root = build_dict_trie(sequences)

    def allowed_tokens(batch_id: int, input_ids: Tensor) -> list[int]:
        node = root
        for token in input_ids[PROMPT_LENGTH:].tolist():
            node = node[token]
        return list(node)

    return allowed_tokens


def _beams(books: Catalog, depth: int) -> Tensor:
    """
    What search has written after `depth` steps: prompts, and below each of them different beginnings of real titles,
    drawn as often as training targets have them. Titles that have ended are left out, as finished beams leave the
    search; at step 0 all beams stand at the root.

    Returns:
        `torch.Tensor` of shape `(NUM_PROMPTS * NUM_BEAMS, PROMPT_LENGTH + depth)`, int64.
    """
    prompts = torch.zeros(NUM_PROMPTS * NUM_BEAMS, PROMPT_LENGTH, dtype=torch.int64)
    if depth == 0:
        return prompts
    nodes = books.trie.paths(books.trie.item_nodes[books.targets])[:, depth - 1]
    nodes, counts = nodes[(nodes >= 0) & ~books.trie.is_leaf(nodes)].unique(return_counts=True)
    generator = torch.Generator().manual_seed(depth)
    drawn = torch.multinomial(counts.expand(NUM_PROMPTS, -1).float(), NUM_BEAMS, generator=generator)
    titles = books.trie.tokens(books.trie.paths(nodes[drawn.reshape(-1)]))
    return torch.cat([prompts, titles], dim=1)


def _check_equal(processors: dict, input_ids: Tensor, scores: Tensor) -> None:
    """All but the normalising one must give the same scores."""
    expected = processors["processor"](input_ids, scores)
    for name in ("processor_inplace", "transformers_marisa", "transformers_dict"):
        torch.testing.assert_close(processors[name](input_ids, scores.clone()), expected, rtol=0.0, atol=0.0)
