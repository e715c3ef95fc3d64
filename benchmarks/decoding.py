# SPDX-License-Identifier: Apache-2.0
"""
Ranking the Book catalogue for users of the test set by `TrieDecoder.search`, which is exact, against `model.generate`
with 10 beams and

- a `prefix_allowed_tokens_fn` over a marisa-trie of strings (`decode_vs_generate_marisa`), as in published code;
- our `TrieLogitsProcessor`, in place (`decode_vs_generate_processor`).

Same model, same prompts, same batch, in one run, on the GPU if there is one. The model is a small Llama with Llama 3's
vocabulary, trained with MSL for a few steps with frozen embeddings, so that its scores are like a recommender's: they
decide how many nodes a search expands. `untrained_…` is the same model before. Also measured:

- `beam10_top10_right_share`: users whose ten best items a search with 10 beams finds, all of them, in any order;
- `schedule`: cost by the number of nodes that a round expands, the curve of `outputs/bench/decoding_schedule.png`.
"""

import contextlib
import io

import matplotlib
import torch
from catalogs import VOCAB_SIZE, Catalog, load_books, load_prompts
from processor import read_marisa_trie
from timing import OUTPUT_DIR, peak_memory, summarize, time_calls
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PrefixConstrainedLogitsProcessor

from trl_msl import TrieDecoder, TrieLogitsProcessor, add_sparse_lm_head, masked_softmax_loss


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


BATCH_SIZE, NUM_USERS, TOP_K = 16, 256, 10
HIDDEN_SIZE, NUM_LAYERS = 256, 4
TRAINING_STEPS = 150
NODES_PER_ROUND = [1, 2, 4, 8, 16, 32, 64, 128]


def benchmark_decoding(rounds: int = 2) -> dict:
    """Users per second and memory of each way; see the module's docstring."""
    books = load_books()
    train, test = load_prompts(books, TRAINING_STEPS * BATCH_SIZE // 2, NUM_USERS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=4 * HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).to(device)
    add_sparse_lm_head(model, books.trie)
    results = {
        "catalogue": books.source,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "users_per_batch": BATCH_SIZE,
        "prompt_tokens": sum(map(len, test)) / len(test),
        "hidden_size": HIDDEN_SIZE,
        "num_layers": NUM_LAYERS,
        "vocab_size": VOCAB_SIZE,
    }
    untrained = TrieDecoder(model.eval(), books.trie)
    results |= {f"untrained_{name}": value for name, value in _describe_search(untrained, test).items()}
    _train(model, books, train)
    decoder = TrieDecoder(model.eval(), books.trie)
    results |= _describe_search(decoder, test)
    results |= _compare(decoder, books, test[:BATCH_SIZE], rounds)
    results["schedule"] = _measure_schedule(decoder, test[: 4 * BATCH_SIZE], rounds)
    return results


def _describe_search(decoder: TrieDecoder, prompts: list[list[int]]) -> dict[str, float]:
    """How much work the exact search is, and how often a search with 10 beams would have done."""
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        exact = decoder.search(prompts, TOP_K, batch_size=BATCH_SIZE)
        beams = decoder.beam_search(prompts, TOP_K, batch_size=BATCH_SIZE)
    if not exact.exact.all():
        raise RuntimeError("a search was cut short by `max_expansions`, so there is nothing to compare with")
    is_right = exact.items.sort(dim=1).values == beams.items.sort(dim=1).values
    return {
        "beam10_top10_right_share": is_right.all(1).float().mean().item(),
        "beam10_items_found_share": (beams.items[:, :, None] == exact.items[:, None]).float().sum().item()
        / exact.items.numel(),
        "expansions_mean": exact.expansions.float().mean().item(),
        "expansions_max": exact.expansions.max().item(),
        "rounds_mean": exact.rounds.float().mean().item(),
    }


def _train(model: LlamaForCausalLM, books: Catalog, prompts: list[list[int]]) -> None:
    """A short MSL training at a temperature of 1, with frozen embeddings."""
    model.train()
    model.model.embed_tokens.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    paths = books.trie.paths(books.trie.item_nodes[books.targets[: len(prompts)]])
    size = BATCH_SIZE // 2
    for start in range(0, len(prompts), size):
        path, rows = paths[start : start + size], prompts[start : start + size]
        titles = [books.trie.tokens(nodes[nodes >= 0]).tolist() for nodes in path]
        length = max(len(row) + len(title) for row, title in zip(rows, titles))
        batch = {
            "input_ids": _pad([row + title for row, title in zip(rows, titles)], length, 0),
            "attention_mask": _pad([[1] * (len(row) + len(title)) for row, title in zip(rows, titles)], length, 0),
            "labels": _pad(
                [[-100] * len(row) + nodes[nodes >= 0].tolist() for row, nodes in zip(rows, path)], length, -100
            ),
        }
        output = model(**{name: values.to(model.device) for name, values in batch.items()}, sparse_lm_head=True)
        masked_softmax_loss(output.logits, output.valid_mask, output.targets).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _pad(rows: list[list[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])


def _compare(decoder: TrieDecoder, books: Catalog, prompts: list[list[int]], rounds: int) -> dict:
    """Time and memory for one batch of users."""
    model, trie = decoder.model, books.trie
    longest = max(map(len, prompts))
    end_token = int(trie.tokens(trie.item_nodes[0]))
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
    paths = trie.paths(trie.item_nodes)
    sequences = [trie.tokens(path[path >= 0]).tolist() for path in paths]
    allowed_tokens = read_marisa_trie(sequences, longest)
    marisa = PrefixConstrainedLogitsProcessor(
        lambda batch_id, row: allowed_tokens(batch_id, row) or [end_token],  # beams that only fill up may have ended
        TOP_K,
    )
    processor = TrieLogitsProcessor(trie, longest, normalize="vocab", inplace=True)

    def generate(processor) -> Tensor:
        with torch.no_grad():
            output = model.generate(**inputs, generation_config=generation_config, logits_processor=[processor])
        return output[:, longest:].cpu()

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


def _measure_schedule(decoder: TrieDecoder, prompts: list[list[int]], rounds: int) -> dict[str, list[float]]:
    """Cost of the exact search by the number of nodes that a round expands, and its plot."""

    def search(nodes_per_round: int):
        with contextlib.redirect_stderr(io.StringIO()):
            return decoder.search(prompts, TOP_K, nodes_per_round=nodes_per_round, batch_size=BATCH_SIZE)

    outputs = {number: search(number) for number in NODES_PER_ROUND}
    functions = {str(number): lambda number=number: search(number) for number in NODES_PER_ROUND}
    seconds = summarize(time_calls(functions, rounds + 1, warmup=0))
    schedule = {
        "nodes_per_round": NODES_PER_ROUND,
        "ms_per_user": [1000 * seconds[f"{number}_s"] / len(prompts) for number in NODES_PER_ROUND],
        "rounds": [output.rounds.float().mean().item() for output in outputs.values()],
        "expansions": [output.expansions.float().mean().item() for output in outputs.values()],
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), constrained_layout=True)
    for axis, name in zip(axes, ("ms_per_user", "rounds", "expansions")):
        axis.plot(NODES_PER_ROUND, schedule[name], marker="o")
        axis.set(xlabel="nodes per round", ylabel=name.replace("_", " "), xscale="log", ylim=(0, None))
        axis.set_xticks(NODES_PER_ROUND, NODES_PER_ROUND)
        axis.grid(alpha=0.3)
    OUTPUT_DIR.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUTPUT_DIR / "decoding_schedule.png", dpi=120)
    plt.close(figure)
    return schedule
