# SPDX-License-Identifier: Apache-2.0
"""Training with `negatives="seen"`: items that are no training target are not trained down."""

import math

import pytest
import torch
from datasets import Dataset
from helpers import make_model, make_windows

from trl_msl import (
    ItemCatalog,
    MSLConfig,
    MSLTrainer,
    PromptTemplate,
    RankingTask,
    adaptive_temperature,
    build_rows,
    tokenize_rows,
)
from trl_msl.data import supervised_items
from trl_msl.experiments.from_scratch import item_tokenizer
from trl_msl.training import temperature_statistics


NEW = [1, 3, 6, 10]  # a longer title, a branch of its own, a repeated title, a prefix of another
COMMON = {
    "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
    "learning_rate": 1e-2, "lr_scheduler_type": "constant", "gradient_checkpointing": False, "disable_tqdm": True,
    "max_steps": 6, "per_device_train_batch_size": 4, "max_grad_norm": 0, "train_sampling_strategy": "sequential",
    "temperature_min": 0.1, "temperature_ema": 0.3,
    "adam_epsilon": 1e-3,  # or a gradient of nearly 0 would count by its sign alone
}  # fmt: skip


@pytest.fixture(scope="module")
def separate_task(catalog, tokenizer):
    return RankingTask(catalog, tokenizer, PromptTemplate("Read: {history}; ", separator="; ", separate_items=True))


@pytest.fixture(scope="module")
def windows(catalog):
    """New items stand at the beginning of histories only, so that they are not targets even there."""
    old = [item for index, item in enumerate(catalog.ids) if index not in NEW]
    new = [catalog.ids[index] for index in NEW]
    rows = [[new[number % len(new)], *window] for number, window in enumerate(make_windows(old)["item_ids"])]
    return Dataset.from_dict({"item_ids": rows})


def train(task, windows, tmp_path, rows=None, **config):
    trainer = MSLTrainer(
        make_model(task.tokenizer),
        MSLConfig(str(tmp_path), **{**COMMON, **config}),
        task=task,
        train_dataset=build_rows(windows, task) if rows is None else rows,
    )
    trainer.train()
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def positions_by_hand(task, seen, labels):
    """
    Each label where several of the `seen` items go on: its place, the number of tokens before it, the mask of the
    tokens by which they go on, and the right token. From the items' tokens alone.
    """
    sequences = task.encode_items([task.catalog.completions[item] for item in seen])
    found = []
    for place, node in enumerate(labels):
        if node == -100:
            continue
        *before, target = task.trie.tokens(task.trie.paths(torch.tensor([node]))[0]).tolist()
        mask = torch.zeros(len(task.tokenizer), dtype=torch.bool)
        mask[[tokens[len(before)] for tokens in sequences if tokens[: len(before)] == before]] = True
        assert mask[target]
        if mask.sum() > 1:
            found.append((place, len(before), mask, target))
    return found


@pytest.mark.parametrize("supervise_history", [False, True])
@pytest.mark.parametrize("positions", ["first", "all"])
def test_six_steps_follow_a_plain_loop_with_dense_masks(
    positions, supervise_history, separate_task, windows, catalog, tmp_path
):
    task, seen = separate_task, [index for index in range(len(catalog)) if index not in NEW]
    trainer = train(
        task, windows, tmp_path, negatives="seen", supervise_history=supervise_history, temperature_positions=positions
    )
    encoded = tokenize_rows(build_rows(windows, task)[:], task, supervise_history=supervise_history)
    model = make_model(task.tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    temperature, losses, temperatures = 1.5, [], []
    for step in range(6):
        logits, found = [], []
        for ids, labels in zip(*(encoded[name][4 * step : 4 * step + 4] for name in ("input_ids", "labels"))):
            positions_of_row = positions_by_hand(task, seen, labels)
            logits.append(model(torch.tensor([ids])).logits[0][[place - 1 for place, *_ in positions_of_row]])
            found += positions_of_row
        _, depths, masks, targets = zip(*found)
        logits, masks, targets = torch.cat(logits), torch.stack(masks), torch.tensor(targets)
        restricted = (logits / temperature).masked_fill(~masks, -math.inf)
        loss = temperature * torch.nn.functional.cross_entropy(restricted, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        temperatures.append(temperature)
        first = torch.tensor(depths) == min(depths)
        if positions == "first":
            statistics = temperature_statistics(logits[first], masks[first], targets[first])
            estimate = adaptive_temperature(statistics)
        else:
            estimate = adaptive_temperature(temperature_statistics(logits, masks, targets), num_items=int(first.sum()))
        temperature += 0.3 * (min(max(float(estimate), 0.1), 5.0) - temperature)
    assert logged(trainer, "temperature") == pytest.approx(temperatures, abs=1e-5)
    assert logged(trainer, "loss") == pytest.approx(losses, abs=1e-5)
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(trainer), expected, rtol=1e-5, atol=1e-5)


def test_where_all_items_are_targets_nothing_changes(task, catalog, tmp_path):
    windows = make_windows(catalog.ids, num_rows=80)
    whole, seen = (train(task, windows, tmp_path, negatives=negatives) for negatives in ("all", "seen"))
    assert len(supervised_items(seen.train_dataset, task.trie)) == len(catalog)
    for name in ("loss", "temperature"):
        assert logged(seen, name) == logged(whole, name)
    assert torch.equal(weights(seen), weights(whole))


def test_an_unseen_item_is_not_trained_down(task, windows, catalog, tmp_path):
    """An LM head has no gradient at a token that only new items need; with all items as negatives it has one."""
    heads = {
        negatives: train(task, windows, tmp_path, negatives=negatives, max_steps=1).model.lm_head.weight
        for negatives in ("all", "seen")
    }
    before = make_model(task.tokenizer).lm_head.weight
    sequences = task.encode_items(catalog.completions)
    old = {token for index, tokens in enumerate(sequences) if index not in NEW for token in tokens}
    new = sorted({token for index in NEW for token in sequences[index]} - old)
    assert new
    moved = {negatives: (weight - before).abs().sum(dim=1)[new] > 0 for negatives, weight in heads.items()}
    assert moved["all"].any() and not moved["seen"].any()


def test_evaluation_and_what_is_saved_are_over_all_items(task, windows, catalog, tmp_path):
    rows = build_rows(make_windows(catalog.ids), task)  # new items are targets, too
    losses = {}
    for negatives in ("all", "seen"):
        trainer = train(task, windows, tmp_path / negatives, negatives=negatives, max_steps=1)
        trainer.model.load_state_dict(make_model(task.tokenizer).state_dict())
        losses[negatives] = trainer.evaluate(rows)["eval_loss"]
        trainer.save_model()
    assert losses["seen"] == losses["all"]
    saved = [RankingTask.from_pretrained(tmp_path / name, task.tokenizer).trie for name in ("all", "seen")]
    assert torch.equal(saved[0].edges, saved[1].edges)


@pytest.mark.parametrize(
    "config",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"padding_free": True},
    ],
)
def test_the_loss_is_the_mean_over_the_same_positions(config, task, windows, tmp_path):
    whole, other = (train(task, windows, tmp_path, negatives="seen", **options) for options in ({}, config))
    assert logged(other, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)
    assert other.temperature == pytest.approx(whole.temperature, abs=1e-5)
    torch.testing.assert_close(weights(other), weights(whole), rtol=1e-5, atol=1e-5)


def test_packed_rows_and_rows_that_the_user_tokenised(task, windows, tmp_path):
    rows, config = build_rows(windows, task), {"negatives": "seen", "max_steps": 1, "per_device_train_batch_size": 40}
    expected = logged(train(task, windows, tmp_path, **config), "loss")
    tokenized = rows.map(tokenize_rows, batched=True, remove_columns=rows.column_names, fn_kwargs={"task": task})
    assert logged(train(task, windows, tmp_path, tokenized, **config), "loss") == expected
    packed = train(task, windows, tmp_path, packing=True, **config)
    assert len(packed.train_dataset) < len(windows)
    assert logged(packed, "loss") == pytest.approx(expected, rel=1e-5)


def test_negatives_are_drawn_from_seen_items(task, windows, tmp_path):
    """So many draws that each seen item is drawn: the loss is that over all of them."""
    config = {"negatives": "seen", "temperature": 1.0, "max_steps": 1}
    drawn = train(task, windows, tmp_path, num_negatives=3, **config)
    whole = train(task, windows, tmp_path, **config)
    assert logged(drawn, "loss")[0] < logged(whole, "loss")[0]
    enough = train(task, windows, tmp_path, num_negatives=100, **config)
    assert logged(enough, "loss") == logged(whole, "loss")


@pytest.mark.parametrize("supervise_history", [False, True])
@pytest.mark.parametrize("end", ["; ", ""])
def test_supervised_items(end, supervise_history, tokenizer, catalog, windows):
    """Also where nothing follows a history's items, so that no label says that they end."""
    if end:
        template = PromptTemplate("Read: {history}; ", separator="; ", separate_items=True)
    else:
        catalog = ItemCatalog(catalog.ids, catalog.ids)
        tokenizer, template = item_tokenizer(catalog.completions), PromptTemplate("{history}", separate_items=True)
    task = RankingTask(catalog, tokenizer, template)
    windows = windows.select(range(3))
    encoded = tokenize_rows(build_rows(windows, task)[:], task, supervise_history=supervise_history)
    targets = {item for ids in windows["item_ids"] for item in (ids[1:] if supervise_history else ids[-1:])}
    texts = {catalog.completions[index] for index in catalog.indices(targets)}
    expected = [index for index, text in enumerate(catalog.completions) if text in texts]
    assert supervised_items(Dataset.from_dict(encoded), task.trie).tolist() == expected
    assert len(expected) < len(catalog)


def test_a_resumed_run_has_the_same_negatives(task, windows, tmp_path):
    config = {"save_strategy": "steps", "save_steps": 3}
    whole = train(task, windows, tmp_path, negatives="seen", **config)
    args = MSLConfig(str(tmp_path), **{**COMMON, **config}, negatives="seen")
    rows = build_rows(windows, task)
    resumed = MSLTrainer(make_model(task.tokenizer, seed=1), args, task=task, train_dataset=rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(resumed), weights(whole))
    args.negatives = "all"
    other = MSLTrainer(make_model(task.tokenizer), args, task=task, train_dataset=rows)
    with pytest.raises(ValueError, match=r"was trained with `negatives` 'seen' \(here 'all'\)"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_rows_may_be_replaced_before_another_training(task, windows, catalog, tmp_path):
    trainer = train(task, windows, tmp_path, negatives="seen", max_steps=1)
    first = logged(trainer, "loss")
    other = train(task, make_windows(catalog.ids), tmp_path, negatives="seen", max_steps=1)
    trainer.model.load_state_dict(make_model(task.tokenizer).state_dict())
    trainer.train_dataset = other.train_dataset
    trainer.train()
    assert logged(trainer, "loss") == logged(other, "loss") != first


def test_what_has_no_meaning(task, windows, tmp_path):
    with pytest.raises(ValueError, match="`negatives` is 'new': it must be 'all' or 'seen'"):
        MSLConfig(str(tmp_path), **COMMON, negatives="new")
    with pytest.raises(ValueError, match="`negatives` = 'seen' has no meaning with `normalize` = 'vocab'"):
        MSLConfig(str(tmp_path), **COMMON, negatives="seen", normalize="vocab", temperature=1.0)
    stream = build_rows(windows, task).to_iterable_dataset()
    with pytest.raises(ValueError, match="`negatives` = 'seen' needs all training targets .* is a stream"):
        train(task, windows, tmp_path, rows=stream, negatives="seen")
    same = windows.select([0, 0, 0, 0])
    with pytest.raises(ValueError, match="`negatives` = 'seen' leaves no wrong token, since all rows"):
        train(task, same, tmp_path, negatives="seen")
