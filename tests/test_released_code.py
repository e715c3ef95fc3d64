# SPDX-License-Identifier: Apache-2.0
"""
How far training here departs from the code that the authors of MSL released, whose rules are written out below.

Run with `-s` to see the figures that docs/method.md quotes.
"""

import math

import pytest
import torch
from datasets import DatasetDict
from helpers import dense_loss, dense_positions, make_model

from trl_msl import (
    ItemCatalog,
    MSLConfig,
    MSLTrainer,
    PromptTemplate,
    RankingTask,
    tokenize_rows,
)
from trl_msl.data import build_rows
from trl_msl.data.generated import generate_catalog, generate_transitions, generate_windows
from trl_msl.experiments.from_scratch import train_tokenizer


NUM_STEPS, BATCH = 120, 16
ETA, EMA, INIT, MIN, MAX = 0.25, 0.05, 1.5, 0.5, 5.0


@pytest.fixture(scope="module")
def task() -> RankingTask:
    titles = generate_catalog(60)
    catalog = ItemCatalog.from_dict(titles, template='"{text}"')
    template = PromptTemplate("Read: {history}\nNext: ")
    return RankingTask(catalog, train_tokenizer([*catalog.completions, template.text], 500), template)


@pytest.fixture(scope="module")
def rows(task) -> DatasetDict:
    titles = dict(zip(task.catalog.ids, task.catalog.texts))
    windows = generate_windows(generate_transitions(titles), num_users=NUM_STEPS * BATCH * 10 // 8)
    return DatasetDict({split: build_rows(windows[split], task) for split in ("train", "test")})


def make_batch(encoded, start: int, size: int, pad: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    ids, labels = (encoded[name][start : start + size] for name in ("input_ids", "labels"))
    longest = max(map(len, ids))
    input_ids = torch.tensor([row + [pad] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    return {"input_ids": input_ids, "attention_mask": mask}, torch.tensor(
        [row + [-100] * (longest - len(row)) for row in labels]
    )


def released_course(rows, task, num_micro_batches=1, lag=False, unbiased=True) -> tuple[torch.Tensor, float]:
    """
    Temperatures, and the test loss at τ = 1, of the released rules: in each micro-batch τ is estimated from its own
    first tokens, with the sample variance of their valid logits, moved, and used at once; the loss is the mean of the
    micro-batches' means.
    """
    trie, pad = task.trie, task.tokenizer.pad_token_id
    model = make_model(task.tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    encoded = tokenize_rows(rows["train"][:], task)
    size = BATCH // num_micro_batches
    temperature, temperatures = INIT, []
    for start in range(0, NUM_STEPS * BATCH, size):
        inputs, nodes = make_batch(encoded, start, size, pad)
        logits = model(**inputs).logits
        scores, masks, targets = dense_positions(trie, logits.detach(), nodes)
        labelled = nodes[nodes != -100]
        first = trie.parents(labelled[trie.num_valid_tokens(labelled) > 1]) == trie.first_branching_node
        scores, masks, targets = scores[first], masks[first], targets[first]
        valid = scores[masks]
        difference = scores[torch.arange(len(targets)), targets].mean() - valid.mean()
        c = math.log(int(masks[0].sum()) * ETA)
        root = (difference.square() - 2 * valid.var(unbiased=unbiased) * c).clamp(min=0).sqrt()
        estimate = float(((difference + root) / (2 * c)).clamp(MIN, MAX))
        before, temperature = temperature, temperature + EMA * (estimate - temperature)
        temperatures.append(before if lag else temperature)
        (dense_loss(trie, logits, nodes, temperatures[-1]).mean() / num_micro_batches).backward()
        if (start + size) % BATCH == 0:
            optimizer.step()
            optimizer.zero_grad()
    return torch.tensor(temperatures[num_micro_batches - 1 :: num_micro_batches]), test_loss(model, rows, task)


def our_course(rows, task, folder, num_micro_batches=1) -> tuple[torch.Tensor, float]:
    config = MSLConfig(
        str(folder), use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1,
        learning_rate=1e-3, lr_scheduler_type="constant", gradient_checkpointing=False, max_steps=NUM_STEPS,
        per_device_train_batch_size=BATCH // num_micro_batches, gradient_accumulation_steps=num_micro_batches,
        max_grad_norm=0, train_sampling_strategy="sequential", temperature_min=MIN,
    )  # fmt: skip
    trainer = MSLTrainer(make_model(task.tokenizer), config, task=task, train_dataset=rows["train"])
    trainer.train()
    temperatures = [entry["temperature"] for entry in trainer.state.log_history if "temperature" in entry]
    return torch.tensor(temperatures), test_loss(trainer.model, rows, task)


@torch.no_grad()
def test_loss(model, rows, task) -> float:
    encoded = tokenize_rows(rows["test"][:], task)
    inputs, nodes = make_batch(encoded, 0, len(rows["test"]), task.tokenizer.pad_token_id)
    return float(dense_loss(task.trie, model.eval()(**inputs).logits, nodes, 1.0).mean())


test_loss.__test__ = False


def test_the_course_of_the_temperature(rows, task, tmp_path):
    ours, our_loss = our_course(rows, task, tmp_path)
    same, same_loss = released_course(rows, task, lag=True, unbiased=False)
    assert (ours - same).abs().max() < 1e-4  # the lag and the variance are the only differences
    assert our_loss == pytest.approx(same_loss, abs=1e-3)
    accumulated, accumulated_loss = our_course(rows, task, tmp_path, num_micro_batches=4)
    assert (accumulated - ours).abs().max() < 1e-4  # accumulation changes nothing
    released, released_loss = released_course(rows, task)
    parted, parted_loss = released_course(rows, task, num_micro_batches=4)
    apart, far = (ours - released).abs().max(), (accumulated - parted).abs().max()
    print(
        f"\nours: temperature {ours.min():.2f} to {ours.max():.2f}, test loss {our_loss:.3f}"
        f"\nreleased: temperature at most {apart:.3f} apart, test loss {released_loss:.3f}"
        f"\nreleased, four micro-batches: temperature at most {far:.3f} apart, test loss {parted_loss:.3f}"
    )
    assert 0 < apart < 0.1 < far
    assert accumulated_loss == pytest.approx(our_loss, abs=1e-3)
    assert released_loss == pytest.approx(our_loss, rel=0.01)
