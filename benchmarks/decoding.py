# SPDX-License-Identifier: Apache-2.0
"""
Ranking the Book catalogue for users of the test set by `TrieDecoder.search`, which is exact, against `model.generate`
with 10 beams and

- a `prefix_allowed_tokens_fn` over a marisa-trie of strings (`decode_vs_generate_marisa`), as in published code;
- our `TrieLogitsProcessor`, in place (`decode_vs_generate_processor`).

Same model, same prompts, same batch, in one run, on the GPU if there is one. The model is a small Llama with Llama 3's
vocabulary and random weights. How many nodes a search expands depends on how sure the model is, so its matrices are
doubled: then it expands as many as with the model trained on this data in `docs/results.md`. Also measured:

- `decode_vocab_exact_vs_generate`, `decode_vocab_exact_vs_beams`: exact search by the vocabulary's probability
  (`vocab_weight=1`) against the same `generate` with our processor, and against `TrieDecoder.beam_search`. A model to
  which no title is likely, such as one with random weights, gives no certain result, and then there is no ratio;
- `decode_bias_overhead`, `decode_user_bias_overhead`, `decode_sparse_bias_overhead`: time with an item bias over time
  without, for popularity, a table of all users and items, and 100 items of each user; and their expansions;
- `bias_range`: expansions by the range of a bias against the model, `-c · log P_valid(item | prompt of another user)`,
  the curve of `outputs/bench/decoding_bias.png`;
- `beam10_top10_right_share`: users whose ten best items a search with 10 beams finds, all of them, in any order;
- `schedule`: cost by the number of nodes that a round expands, for models of different sharpness, the curves of
  `outputs/bench/decoding_schedule.png`.
"""

import contextlib
import functools
import io
from collections.abc import Callable

import matplotlib
import torch
from catalogs import VOCAB_SIZE, Catalog, load_books, load_prompts
from models import small_llama
from processor import read_marisa_trie
from timing import OUTPUT_DIR, peak_memory, summarize, time_calls
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM, PrefixConstrainedLogitsProcessor

from trl_msl import ItemTrie, SparseBias, TrieDecoder, TrieLogitsProcessor
from trl_msl.decoding import DecodingOutput


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


BATCH_SIZE, NUM_USERS, TOP_K = 16, 256, 10
HIDDEN_SIZE, NUM_LAYERS = 256, 4
SHARPNESS = 2.0
NODES_PER_ROUND = [1, 2, 4, 8, 16, 32, 64]


def benchmark_decoding(rounds: int = 2) -> dict:
    """Users per second and memory of each way; see the module's docstring."""
    books = load_books()
    prompts = load_prompts(NUM_USERS)
    model = _make_model(SHARPNESS)
    decoder = TrieDecoder(model, books.trie)
    results = {
        "catalogue": books.source,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "users_per_batch": BATCH_SIZE,
        "prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "hidden_size": HIDDEN_SIZE,
        "num_layers": NUM_LAYERS,
        "vocab_size": VOCAB_SIZE,
    }
    results |= _describe_search(decoder, prompts)
    results |= _compare_biases(decoder, books, prompts[:BATCH_SIZE], rounds)
    results |= _compare_vocab(decoder, books, prompts[:BATCH_SIZE], rounds)
    results |= _compare(decoder, books, prompts[:BATCH_SIZE], rounds)
    results["schedule"] = _measure_schedule(books, prompts[: 4 * BATCH_SIZE], rounds)
    return results


def _make_model(sharpness: float) -> LlamaForCausalLM:
    return small_llama(HIDDEN_SIZE, NUM_LAYERS, sharpness).to("cuda" if torch.cuda.is_available() else "cpu")


def _describe_search(decoder: TrieDecoder, prompts: list[list[int]]) -> dict[str, float]:
    """How much work the exact search is, and how often a search with 10 beams would have done."""
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        exact = decoder.search(prompts, TOP_K, batch_size=BATCH_SIZE)
        beams = decoder.beam_search(prompts, TOP_K, batch_size=BATCH_SIZE)
    if not exact.exact.all():
        raise RuntimeError("a search was cut short by `max_expansions`, so there is nothing to compare with")
    is_found = (exact.items[:, :, None] == beams.items[:, None]).any(2)
    return {
        "beam10_top10_right_share": is_found.all(1).float().mean().item(),
        "beam10_items_found_share": is_found.float().mean().item(),
        "expansions_mean": exact.expansions.float().mean().item(),
        "expansions_max": exact.expansions.max().item(),
        "rounds_mean": exact.rounds.float().mean().item(),
    }


def _compare(decoder: TrieDecoder, books: Catalog, prompts: list[list[int]], rounds: int) -> dict:
    """Time and memory for one batch of users."""
    model, trie = decoder.model, books.trie
    longest, end_token = max(map(len, prompts)), int(trie.tokens(trie.item_nodes[0]))
    generate = _make_generate(model, trie, prompts)
    paths = trie.paths(trie.item_nodes)
    sequences = [trie.tokens(path[path >= 0]).tolist() for path in paths]
    allowed_tokens = read_marisa_trie(sequences, longest)
    marisa = PrefixConstrainedLogitsProcessor(
        lambda batch_id, row: allowed_tokens(batch_id, row) or [end_token],  # beams that only fill up may have ended
        TOP_K,
    )
    processor = TrieLogitsProcessor(trie, longest, normalize="vocab", inplace=True)

    functions = {
        "decode": lambda: decoder.search(prompts, TOP_K, batch_size=BATCH_SIZE),
        "generate_processor": lambda: generate(processor),
        "generate_marisa": lambda: generate(marisa),
    }
    # All three must do the same work: the same sequences by beams, whichever way
    beams = decoder.beam_search(prompts, TOP_K, normalize="vocab", batch_size=BATCH_SIZE)
    for name in ("generate_processor", "generate_marisa"):
        nodes = trie.reached(functions[name]()).view(len(prompts), TOP_K)
        ours = trie.item_nodes[beams.items]  # items with the same text may have pushed others out
        if not (ours[:, :, None] == nodes[:, None]).any(2).all():
            raise RuntimeError(f"{name} gives other items than `TrieDecoder.beam_search`")
    seconds = time_calls(functions, rounds, {"decode": 5}, warmup=0)
    results = summarize(seconds)
    for name in functions:
        results[f"{name}_users_per_s"] = len(prompts) / results[f"{name}_s"]
    for name in ("generate_marisa", "generate_processor"):
        results[f"decode_vs_{name}"] = results[f"{name}_s"] / results["decode_s"]
    peaks = {name: peak_memory(functions[name], model.device) for name in ("decode", "generate_processor")}
    if None not in peaks.values():
        results |= {f"{name}_peak_mb": peak / 1e6 for name, peak in peaks.items()}
        results["decode_memory_vs_generate"] = peaks["decode"] / peaks["generate_processor"]
    return results


def _make_generate(model: LlamaForCausalLM, trie: ItemTrie, prompts: list[list[int]]) -> Callable[..., Tensor]:
    """`model.generate` with 10 beams, as a function of a logits processor that returns what is written."""
    longest, end_token = max(map(len, prompts)), int(trie.tokens(trie.item_nodes[0]))
    padding = [longest - len(row) for row in prompts]
    inputs = {
        "input_ids": torch.tensor([[0] * pad + row for pad, row in zip(padding, prompts)]).to(model.device),
        "attention_mask": torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding]).to(model.device),
    }
    generation_config = GenerationConfig(
        num_beams=TOP_K,
        num_return_sequences=TOP_K,
        max_new_tokens=trie.depth,
        length_penalty=0.0,
        do_sample=False,
        eos_token_id=end_token,
        pad_token_id=end_token,
    )

    def generate(processor) -> Tensor:
        with torch.no_grad():
            output = model.generate(**inputs, generation_config=generation_config, logits_processor=[processor])
        return output[:, longest:].cpu()

    return generate


def _compare_biases(decoder: TrieDecoder, books: Catalog, prompts: list[list[int]], rounds: int) -> dict:
    """Time and expansions with item biases, for one batch of users."""
    num_items, generator = books.trie.num_items, torch.Generator().manual_seed(0)
    popularity = torch.bincount(books.targets, minlength=num_items).add(1).log()
    listed = [torch.randperm(num_items, generator=generator)[:100] for _ in prompts]
    biases = {
        "decode_unbiased": None,
        "decode_bias": decoder.prepare_item_bias(popularity),
        "decode_user_bias": popularity * torch.rand(len(prompts), 1, generator=generator),
        "decode_sparse_bias": SparseBias(listed, [popularity[row] for row in listed]),
    }
    functions = {
        name: functools.partial(decoder.search, prompts, TOP_K, item_bias=bias, batch_size=BATCH_SIZE)
        for name, bias in biases.items()
    }
    results = {
        f"{name}_expansions": function().expansions.float().mean().item() for name, function in functions.items()
    }
    results |= summarize(time_calls(functions, 5 * rounds, warmup=0))
    for name in list(functions)[1:]:
        results[f"{name}_overhead"] = results[f"{name}_s"] / results["decode_unbiased_s"]
    results["bias_range"] = _measure_bias_range(decoder, prompts)
    return results


def _measure_bias_range(decoder: TrieDecoder, prompts: list[list[int]]) -> dict[str, list[float]]:
    """Expansions by the range of a bias that is against the model, and the plot. A search may have been cut short."""
    [log_probs] = decoder.score_items(prompts[-1:], [range(decoder.trie.num_items)])
    curve = {"share": [0.0, 0.1, 0.2, 0.4], "range": [], "expansions": [], "exact": []}
    for share in curve["share"]:
        found = decoder.search(prompts[:-1], TOP_K, item_bias=-share * log_probs, batch_size=BATCH_SIZE)
        curve["range"].append(share * (log_probs.max() - log_probs.min()).item())
        curve["expansions"].append(found.expansions.float().mean().item())
        curve["exact"].append(found.exact.float().mean().item())
    figure, axis = plt.subplots(figsize=(5, 3.4), constrained_layout=True)
    axis.plot(curve["range"], curve["expansions"], marker="o")
    for place, expansions, exact in zip(curve["range"], curve["expansions"], curve["exact"]):
        if exact < 1:
            label = f"{exact:.0%} certain"
            axis.annotate(label, (place, expansions), xytext=(-8, -3), textcoords="offset points", ha="right")
    axis.set(xlabel="range of the bias, largest minus smallest", ylabel="expansions of a user", ylim=(0, None))
    axis.grid(alpha=0.3)
    _save(figure, "decoding_bias.png")
    return curve


def _compare_vocab(decoder: TrieDecoder, books: Catalog, prompts: list[list[int]], rounds: int) -> dict:
    """Work of the exact search by the vocabulary's probability, and its time against that of ten beams."""
    search = functools.partial(decoder.search, prompts, TOP_K, vocab_weight=1.0, batch_size=BATCH_SIZE)
    beams = functools.partial(decoder.beam_search, prompts, TOP_K, normalize="vocab", batch_size=BATCH_SIZE)
    processor = TrieLogitsProcessor(books.trie, max(map(len, prompts)), normalize="vocab", inplace=True)
    generate = functools.partial(_make_generate(decoder.model, books.trie, prompts), processor)
    exact = search()
    is_found = (exact.items[:, :, None] == beams().items[:, None]).any(2)
    results = {
        "decode_vocab_expansions": exact.expansions.float().mean().item(),
        "decode_vocab_exact_share": exact.exact.float().mean().item(),
        "beam10_vocab_top10_right_share": is_found.all(1).float().mean().item(),
    }
    if exact.exact.all():
        functions = {"decode_vocab": search, "beams_vocab": beams, "generate_vocab": generate}
        results |= summarize(time_calls(functions, rounds, warmup=0))
        for name in ("beams", "generate"):
            results[f"decode_vocab_exact_vs_{name}"] = results[f"{name}_vocab_s"] / results["decode_vocab_s"]
    return results


def _measure_schedule(books: Catalog, prompts: list[list[int]], rounds: int) -> dict[str, dict]:
    """Cost of the exact search by the number of nodes that a round expands, and its plot."""
    schedule = {}
    for sharpness in (1.0, SHARPNESS, 6.0):
        decoder = TrieDecoder(_make_model(sharpness), books.trie)

        def search(nodes_per_round: int, decoder: TrieDecoder = decoder) -> DecodingOutput:
            with contextlib.redirect_stderr(io.StringIO()):
                return decoder.search(prompts, TOP_K, nodes_per_round=nodes_per_round, batch_size=BATCH_SIZE)

        outputs = [search(number) for number in NODES_PER_ROUND]
        functions = {str(number): functools.partial(search, number) for number in NODES_PER_ROUND}
        seconds = summarize(time_calls(functions, rounds, warmup=0))
        schedule[f"weights times {sharpness:g}"] = {
            "nodes_per_round": NODES_PER_ROUND,
            "ms_per_user": [1000 * seconds[f"{number}_s"] / len(prompts) for number in NODES_PER_ROUND],
            "rounds": [output.rounds.float().mean().item() for output in outputs],
            "expansions": [output.expansions.float().mean().item() for output in outputs],
        }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), constrained_layout=True)
    for axis, name in zip(axes, ("ms_per_user", "rounds", "expansions")):
        for label, curve in schedule.items():
            axis.plot(NODES_PER_ROUND, curve[name], marker="o", label=label)
        axis.set(xlabel="nodes per round", ylabel=name.replace("_", " "), xscale="log", ylim=(0, None))
        axis.minorticks_off()
        axis.set_xticks(NODES_PER_ROUND, NODES_PER_ROUND)
        axis.grid(alpha=0.3)
    axes[0].legend()
    _save(figure, "decoding_schedule.png")
    return schedule


def _save(figure: plt.Figure, name: str) -> None:
    OUTPUT_DIR.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUTPUT_DIR / name, dpi=120)
    plt.close(figure)
