# SPDX-License-Identifier: Apache-2.0
"""Titles that force the awkward paths, tiny models, and the slow, obvious way of computing the loss."""

import random

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig


TITLES = [
    "The Silent River",
    "The Silent River: Book 2",  # the one before is a prefix of it
    "The Silent Sea",
    "The Silver Key",
    "A History of Salt",
    "A History of Tea",
    "A History of Tea",  # shares its leaf with the one before
    "Emma",
    'She said "No"',  # its closing quotes merge
    "Émile & Söhne 東京 🚀",
    "Dune",
    "Dune Messiah",
]


def make_windows(ids: list[str], num_rows: int = 40, seed: int = 0) -> Dataset:
    """Random windows of three to six items."""
    rng = random.Random(seed)
    return Dataset.from_list(
        [{"user_id": str(user), "item_ids": rng.sample(ids, rng.randint(3, 6))} for user in range(num_rows)]
    )


def make_model(tokenizer, config_class=LlamaConfig, seed: int = 0, **kwargs):
    """A causal LM of a few thousand parameters, with weights large enough for its choices to differ."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes["max_position_embeddings"] = 256
    config = config_class(
        vocab_size=len(tokenizer),
        intermediate_size=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{**sizes, **kwargs},
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
    return model.eval()


def dense_positions(trie, logits: torch.Tensor, labels: torch.Tensor):
    """
    Logits `[positions, vocab]`, dense masks `[positions, vocab]` and targets of the branching positions of a batch,
    token by token, as published code builds them.
    """
    rows, masks, targets = [], [], []
    for row, path in zip(logits, labels.tolist()):
        for position, node in enumerate(path):
            if position == 0 or node == -100:
                continue
            parent = int(trie.parents(torch.tensor(node)))
            siblings = trie.children(parent)
            if len(siblings) < 2:
                continue
            mask = torch.zeros(logits.shape[-1], dtype=torch.bool)
            for sibling in siblings:
                mask[int(trie.tokens(torch.tensor(sibling)))] = True
            rows.append(row[position - 1])
            masks.append(mask)
            targets.append(int(trie.tokens(torch.tensor(node))))
    return torch.stack(rows), torch.stack(masks), torch.tensor(targets)


def dense_loss(trie, logits, labels, temperature: float) -> torch.Tensor:
    """Masked softmax loss of each branching position, written out from Eq. 9."""
    rows, masks, targets = dense_positions(trie, logits, labels)
    exponentials = torch.exp(rows.double() / temperature) * masks
    chosen = exponentials[torch.arange(len(targets)), targets]
    return -temperature * torch.log(chosen / exponentials.sum(dim=-1))


@torch.no_grad()
def score_every_item(model, trie, prompts: list[list[int]]) -> np.ndarray:
    """Restricted log-probability of every item after every prompt, one teacher-forced forward each."""
    scores = np.zeros((len(prompts), trie.num_items))
    for user, prompt in enumerate(prompts):
        for item in range(trie.num_items):
            path = trie.paths(trie.item_nodes[item : item + 1])[0]
            tokens = trie.tokens(path).tolist()
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 :].float()
            for row, node in zip(logits, path.tolist()):
                parent = int(trie.parents(torch.tensor(node)))
                valid = trie.tokens(torch.tensor(list(trie.children(parent))))
                scores[user, item] += float(row[int(trie.tokens(torch.tensor(node)))] - row[valid].logsumexp(0))
    return scores


def logged(trainer, name):
    """What a trainer has logged under a name."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
