# SPDX-License-Identifier: Apache-2.0
"""
A training step of softmax DPO with 3 and with 15 rejected items, policy and reference, from token ids to gradients,
against S-DPO's way: each completion a full row of its own, through the full LM head, whose logits are built and kept.

Book titles and real prompts, Llama 3's tokenizer, LoRA on a small Llama, one prompt a step. `dpo_15_vs_published` is
the trainer's default, log-probabilities among the valid tokens; `dpo_15_vocab_vs_published` is the same loss as the
reference's, over the vocabulary.
"""

import logging

import torch
from catalogs import SHARED
from datasets import Dataset
from models import small_llama
from peft import LoraConfig
from timing import peak_memory, summarize, time_calls
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from trl_msl import (
    ItemCatalog,
    PromptTemplate,
    RankingTask,
    SoftmaxDPOConfig,
    SoftmaxDPOTrainer,
    build_preferences,
    build_rows,
    draw_negatives,
    read_windows,
)
from trl_msl.training import softmax_dpo_loss


HIDDEN_SIZE, NUM_LAYERS = 256, 4


def benchmark_softmax_dpo(rounds: int = 3) -> dict:
    """Time and peak memory of a step beside the reference's; see the module's docstring."""
    data, tokenizer = SHARED / "data" / "amazon_books", SHARED / "tokenizers" / "llama3"
    if not (data.is_dir() and tokenizer.is_dir()):
        return {"skipped": "no Book titles and no Llama 3 tokenizer at hand"}
    logging.getLogger("trl_msl").setLevel(logging.ERROR)  # it would report repeated titles
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    catalog = ItemCatalog.from_json(data / "id2name4Rec.json", template='"{text}"', empty_texts="keep")
    task = RankingTask(catalog, tokenizer, PromptTemplate.from_paper("book", "books", "read"))
    windows = read_windows(data, train_file="train_10000.csv")["train"].select(range(8))
    rows = build_rows(windows, task)
    results: dict = {"hidden_size": HIDDEN_SIZE, "num_layers": NUM_LAYERS}
    for num_rejected in (3, 15):
        preferences = build_preferences(rows, task, draw_negatives(rows, task, "uniform", num_rejected))
        ours, ours_vocab = (_make_trainer(preferences, task, kind) for kind in ("trie", "vocab"))
        examples = [ours.train_dataset[0]]
        steps = {
            f"dpo_{num_rejected}": lambda trainer=ours, batch=examples: _our_step(trainer, batch),
            f"dpo_{num_rejected}_vocab": lambda trainer=ours_vocab, batch=examples: _our_step(trainer, batch),
            f"published_{num_rejected}": lambda trainer=ours_vocab, batch=examples: _published_step(trainer, batch),
        }
        same, published = (steps[name]() for name in list(steps)[1:])
        torch.testing.assert_close(same, published, rtol=1e-3, atol=1e-4)
        results |= summarize(time_calls(steps, rounds))
        memory = {name: peak_memory(step) for name, step in steps.items()}
        for name in (f"dpo_{num_rejected}", f"dpo_{num_rejected}_vocab"):
            results[f"{name}_vs_published"] = results[f"published_{num_rejected}_s"] / results[f"{name}_s"]
            if memory[name] is not None:
                results[f"{name}_memory_vs_published"] = memory[name] / memory[f"published_{num_rejected}"]
        results |= {f"{name}_peak_mb": value / 1e6 for name, value in memory.items() if value is not None}
    return results


def _make_trainer(preferences: Dataset, task: RankingTask, normalize: str) -> SoftmaxDPOTrainer:
    config = SoftmaxDPOConfig(
        "outputs/bench/softmax_dpo", normalize=normalize, report_to="none", bf16=False, gradient_checkpointing=False,
        save_strategy="no",
    )  # fmt: skip
    adapter = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    return SoftmaxDPOTrainer(
        small_llama(HIDDEN_SIZE, NUM_LAYERS), args=config, task=task, train_dataset=preferences, peft_config=adapter,
    )  # fmt: skip


def _our_step(trainer: SoftmaxDPOTrainer, examples: list[dict]) -> Tensor:
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    loss.backward()
    return loss.detach()


def _published_step(trainer: SoftmaxDPOTrainer, examples: list[dict]) -> Tensor:
    """As S-DPO's code does it: one batch of whole rows, logits of all of them, their log-softmax, the labels' part."""
    model = trainer.model.train()
    model.zero_grad()
    rows = [(e["prompt_ids"], ids) for e in examples for ids in (e["chosen_ids"], *e["rejected_ids"])]
    input_ids = pad_sequence([torch.tensor(prompt + ids) for prompt, ids in rows], batch_first=True)
    labels = [torch.tensor([-100] * len(prompt) + ids) for prompt, ids in rows]
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)[:, 1:]
    attention_mask = pad_sequence(
        [torch.ones(len(p) + len(ids), dtype=torch.long) for p, ids in rows], batch_first=True
    )

    def log_probs() -> Tensor:
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        per_token = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (per_token * (labels != -100)).sum(dim=1).view(len(examples), -1)

    with torch.no_grad(), model.disable_adapter():
        reference = log_probs()
    ratios = log_probs() - reference
    loss = softmax_dpo_loss(ratios[:, 0], ratios[:, 1:], trainer.beta).mean()
    loss.backward()
    return loss.detach()
