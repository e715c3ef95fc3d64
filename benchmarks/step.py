# SPDX-License-Identifier: Apache-2.0
"""
A whole training step, from token ids to gradients, with the sparse LM head and the masked softmax loss, against
forward and backward of its backbone alone: what head and loss add to the work that every loss needs.

The model is a small Llama with Llama 3's vocabulary. `step_vs_backbone` trains LoRA adapters with the settings of the
MSL paper (rank 8, query and value projections), as that is how the method is used. Under full fine-tuning
(`step_vs_backbone_full`) the head is trained too, so a gradient as large as the head has to be filled with zeros,
which takes long relative to a backbone this small.
"""

import statistics

import torch
from catalogs import VOCAB_SIZE, Catalog, load_books
from models import small_llama
from peft import LoraConfig, get_peft_model
from timing import summarize, time_calls
from torch import Tensor, nn

from trl_msl import masked_softmax_loss
from trl_msl.training import add_sparse_lm_head


BATCH_SIZE, PROMPT_LENGTH = 8, 200
HIDDEN_SIZE, NUM_LAYERS = 256, 4


def benchmark_step(rounds: int = 24) -> dict:
    """Time of a training step relative to that of its backbone; see the module's docstring."""
    books = load_books()
    batch = _make_batch(books)
    results = {
        "catalogue": books.source,
        "tokens": batch["input_ids"].numel(),
        "hidden_size": HIDDEN_SIZE,
        "num_layers": NUM_LAYERS,
        "vocab_size": VOCAB_SIZE,
    }
    for suffix, num_rounds in (("", rounds), ("_full", max(rounds // 2, 1))):
        base_model = small_llama(HIDDEN_SIZE, NUM_LAYERS).train()
        add_sparse_lm_head(base_model, books.trie)
        model = base_model
        if not suffix:
            model = get_peft_model(base_model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        results |= _compare(model, base_model.model, batch, suffix, num_rounds)
    return results


def _make_batch(books: Catalog) -> dict[str, Tensor]:
    """Random prompts with real titles, padded on the right as TRL does."""
    paths = books.paths(BATCH_SIZE, seed=0)
    on_path = paths >= 0
    prompts = torch.randint(VOCAB_SIZE, (BATCH_SIZE, PROMPT_LENGTH), generator=torch.Generator().manual_seed(0))
    titles = books.trie.tokens(paths.clamp(min=0)) * on_path
    return {
        "input_ids": torch.cat([prompts, titles], dim=1),
        "attention_mask": torch.cat([torch.ones_like(prompts), on_path.long()], dim=1),
        "labels": torch.cat([torch.full_like(prompts, -100), torch.where(on_path, paths, -100)], dim=1),
    }


def _compare(model: nn.Module, backbone: nn.Module, batch: dict[str, Tensor], suffix: str, rounds: int) -> dict:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def step() -> None:
        model.zero_grad()
        output = model(**batch, sparse_lm_head=True)
        masked_softmax_loss(output.logits, output.valid_mask, output.targets).mean().backward()

    gradient = torch.randn(*batch["input_ids"].shape, HIDDEN_SIZE)

    def backbone_only() -> None:
        model.zero_grad()
        backbone(**inputs, use_cache=False).last_hidden_state.backward(gradient)

    names = f"step{suffix}", f"backbone{suffix}"
    seconds = time_calls(dict(zip(names, (step, backbone_only))), rounds, warmup=2)
    # Other jobs slow neighbouring runs alike, so the median of their ratios is steadier than the ratio of medians
    ratios = [one / other for one, other in zip(*(seconds[name] for name in names))]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return summarize(seconds) | {
        f"step_vs_backbone{suffix}": quartiles[1],
        f"step_vs_backbone{suffix}_quartiles": [quartiles[0], quartiles[2]],
    }
