# SPDX-License-Identifier: Apache-2.0
"""BEAR's and IGD's weights against what the papers write, and a training that follows a plain loop."""

import math
import random

import pytest
import torch
from helpers import dense_positions, logged, make_model, make_windows
from test_losses import random_positions

from trl_msl import (
    ItemCatalog,
    ItemTrie,
    MSLConfig,
    MSLTrainer,
    PromptTemplate,
    RankingTask,
    build_rows,
    masked_softmax_loss,
    tokenize_rows,
)
from trl_msl.experiments.from_scratch import item_tokenizer
from trl_msl.training.losses import bear_weights
from trl_msl.training.target_trie import TargetTrie
from trl_msl.trie import subset


COMMON = {
    "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "max_steps": 4,
    "learning_rate": 1e-2, "lr_scheduler_type": "constant", "gradient_checkpointing": False, "disable_tqdm": True,
    "per_device_train_batch_size": 4,
}  # fmt: skip


def log_probabilities(logits, valid_mask, targets, num_beams, temperature):
    """Of the target and of the B-th most probable valid token, or of the least probable one where there are fewer."""
    pairs = []
    for row, mask, target in zip(logits, valid_mask, targets):
        log_p = torch.log_softmax(row[mask] / temperature, dim=0)
        log_p_target = log_p[mask[: target + 1].sum() - 1]
        pairs.append(torch.stack([log_p_target, log_p.sort(descending=True).values[:num_beams][-1]]))
    return torch.stack(pairs).unbind(dim=1)


# ---------------------------------------------------------------------- BEAR


@pytest.mark.parametrize(("num_beams", "temperature"), [(1, 1.0), (3, 0.5), (3, torch.tensor(2.0)), (50, 1.0)])
def test_bear_weights_are_the_equation(num_beams, temperature):
    logits, valid_mask, targets = random_positions(num_positions=20)
    log_p, log_p_best = log_probabilities(logits, valid_mask, targets, num_beams, temperature)
    weights = bear_weights(logits.requires_grad_(), valid_mask, targets, temperature, num_beams, scale=1.5, weight=0.7)
    torch.testing.assert_close(weights, 1 + 0.7 * torch.sigmoid((log_p - log_p_best) / 1.5).detach())
    assert not weights.requires_grad
    if num_beams == 1:
        assert (weights <= 1 + 0.7 / 2).all()
    if num_beams == 50:  # none is dropped
        assert (weights >= 1 + 0.7 / 2).all()
    assert bear_weights(logits[:0, :0], valid_mask[:0, :0], targets[:0]).shape == (0,)


def test_the_gradient_is_the_one_of_the_papers_regulariser():
    logits, valid_mask, targets = random_positions(num_positions=20)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    scale, weight = 1.5, 0.7
    losses = masked_softmax_loss(ours, valid_mask, targets)
    (bear_weights(ours, valid_mask, targets, 1.0, 3, scale, weight) * losses).sum().backward()
    log_p, log_p_best = log_probabilities(theirs, valid_mask, targets, 3, 1.0)
    regulariser = torch.nn.functional.logsigmoid((log_p_best.detach() - log_p) / scale)
    (-log_p + weight * scale * regulariser).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_negative_weight_favours_targets_that_a_beam_search_drops():
    logits, valid_mask, targets = random_positions(num_positions=20)
    log_p, log_p_best = log_probabilities(logits, valid_mask, targets, 2, 1.0)
    weights = bear_weights(logits, valid_mask, targets, num_beams=2, weight=-0.2)
    torch.testing.assert_close(weights, 0.8 * (1 + 0.25 * torch.sigmoid((log_p_best - log_p) / 2.75)))


# ---------------------------------------------------------------------- IGD


@pytest.mark.parametrize("seed", range(5))
def test_information_gain_is_the_difference_of_entropies(seed):
    rng = random.Random(seed)
    # Prefixes and duplicates; 3 is the end token
    sequences = [[*(rng.randrange(3) for _ in range(rng.randint(1, 5))), 3] for _ in range(25)]
    frequencies = {tuple(sequence): rng.choice([0, 0, 1, 4]) for sequence in sequences}
    frequencies[tuple(sequences[0])] = 2
    total = sum(frequencies.values())

    def entropy(prefix):
        below = [n / total for item, n in frequencies.items() if item[: len(prefix)] == prefix and n]
        return -math.fsum(p * math.log(p) for p in below)

    trie = ItemTrie.from_sequences(sequences)
    items = [index for index, sequence in enumerate(sequences) if frequencies[tuple(sequence)]]
    nodes = trie.paths(trie.item_nodes[items]).unique()
    nodes = nodes[nodes > 0]
    prefixes = [tuple(trie.tokens(trie.paths(node.view(1))[0]).tolist()) for node in nodes]
    gain = TargetTrie(*subset(trie, torch.tensor(items))).have_information_gain(nodes)
    assert gain.tolist() == [entropy(path[:-1]) - entropy(path) > 1e-9 for path in prefixes]
    assert 0 < gain.sum() < len(nodes)


@pytest.mark.parametrize("supervise_history", [False, True])
def test_every_supervised_item_of_a_history_is_a_target(supervise_history, tmp_path, catalog):
    """Nothing separates the items of these histories, so that no label says where they end."""
    catalog = ItemCatalog(catalog.ids, catalog.ids)
    tokenizer = item_tokenizer(catalog.completions)
    task = RankingTask(catalog, tokenizer, PromptTemplate("{history}", separate_items=True))
    windows = make_windows(catalog.ids, num_rows=3)
    args = MSLConfig(
        str(tmp_path), **COMMON, position_weights="igd", normalize="vocab", temperature=1.0,
        supervise_history=supervise_history,
    )  # fmt: skip
    trainer = MSLTrainer(make_model(tokenizer), args, task=task, train_dataset=build_rows(windows, task))
    trainer.train()
    items = {item for ids in windows["item_ids"] for item in (ids[1:] if supervise_history else ids[-1:])}
    nodes = task.trie.item_nodes[catalog.indices(sorted(items))].long()
    targets = TargetTrie.from_rows(trainer.train_dataset, task.trie, torch.device("cpu"))
    assert targets.trie.num_items == len(items) < len(catalog)
    assert targets.have_information_gain(task.trie.parents(nodes)).all()  # the only token of each item
    assert not targets.have_information_gain(nodes).any()  # its end


# ---------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def rows(catalog, task):
    """Rows with a few items as targets, so that some tokens that the catalogue leaves open are certain in training."""
    rows = build_rows(make_windows(catalog.ids, num_rows=120), task)
    return rows.filter(lambda row: any(title in row["completion"] for title in ("Sea", "Salt", "Emma", "Messiah")))


@pytest.fixture
def train(tmp_path, rows, tokenizer, task):
    def run(rows=rows, **config):
        args = MSLConfig(str(tmp_path), **{**COMMON, **config})
        trainer = MSLTrainer(make_model(tokenizer), args, task=task, train_dataset=rows)
        trainer.train()
        return trainer

    return run


def all_weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def dense_mean(config, rows, task, trie, logits, labels):
    """Weighted mean loss of a batch, with a mask over the vocabulary and probabilities at each position."""
    flat = [(row[place - 1], node) for row, path in zip(logits, labels.tolist()) for place, node in enumerate(path)]
    flat = [(row, node) for row, node in flat if node != -100]
    if config.get("normalize") == "vocab":
        kept, nodes = torch.stack([row for row, _ in flat]), [node for _, node in flat]
        masks, targets = torch.ones_like(kept, dtype=torch.bool), trie.tokens(torch.tensor(nodes))
    else:
        kept, masks, targets = dense_positions(trie, logits, labels)
        nodes = [node for _, node in flat if trie.num_valid_tokens(torch.tensor(node)) > 1]
    temperature = config["temperature"]
    log_p, log_p_best = log_probabilities(kept, masks, targets, config.get("bear_beams", 10), temperature)
    if config["position_weights"] == "bear":
        weights = 1 + config["bear_weight"] * torch.sigmoid((log_p - log_p_best) / 2.75)
        return -temperature * (weights.detach() * log_p).mean()
    seen = [trie.item_nodes[task.catalog.completions.index(completion)] for completion in rows["completion"]]
    paths = [set(trie.paths(node.view(1))[0].tolist()) | {0} for node in seen]
    parents = trie.parents(torch.tensor(nodes)).tolist()
    certain = [all(node in path for path in paths if parent in path) for node, parent in zip(nodes, parents)]
    weights = torch.where(torch.tensor(certain), config["igd_weight"], 1.0)
    assert 0 < sum(certain) < len(certain)
    return -temperature * (weights * log_p).sum() / weights.sum()


@pytest.mark.parametrize(
    "config",
    [
        {"position_weights": "bear", "bear_beams": 2, "bear_weight": 2.0, "temperature": 1.5},
        {"position_weights": "igd", "igd_weight": 0.1, "temperature": 1.5},
        {"position_weights": "igd", "igd_weight": 0.0, "temperature": 1.0, "num_negatives": 50},
        {"position_weights": "igd", "igd_weight": 0.3, "temperature": 1.0, "normalize": "vocab"},
    ],
    ids=["bear", "igd", "igd, few negatives", "igd, vocabulary"],
)
def test_training_follows_a_plain_loop(config, train, rows, tokenizer, task, trie):
    trainer = train(train_sampling_strategy="sequential", max_grad_norm=0, **config)
    model = make_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    encoded, losses = tokenize_rows(rows[:], task), []
    for step in range(4):
        ids, labels = (encoded[name][4 * step : 4 * step + 4] for name in ("input_ids", "labels"))
        longest = max(map(len, ids))
        input_ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        nodes = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])
        logits = model(input_ids=input_ids, attention_mask=mask).logits
        loss = dense_mean(config, rows, task, trie, logits, nodes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert logged(trainer, "loss") == pytest.approx(losses, abs=1e-5)
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(all_weights(trainer), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"position_weights": "bear", "bear_beams": 2, "temperature_min": 0.1, "temperature_ema": 0.3},
        {"position_weights": "igd", "temperature_min": 0.1, "temperature_ema": 0.3},
        {"position_weights": "igd", "temperature": 1.0, "normalize": "vocab"},
    ],
    ids=["bear", "igd", "igd, vocabulary"],
)
def test_accumulation_is_one_batch(config, train):
    config = {**config, "optim": "sgd"}  # Adam would turn rounding errors of small gradients into whole steps
    whole = train(**config)
    accumulated = train(**{**config, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4})
    assert logged(accumulated, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)
    torch.testing.assert_close(all_weights(accumulated), all_weights(whole), rtol=1e-5, atol=1e-5)


def test_weights_change_the_training_loss_and_not_the_evaluation(train, rows):
    plain, bear, igd, packed = (
        train(learning_rate=0.0, max_steps=1, temperature=1.0, train_sampling_strategy="sequential", **config)
        for config in (
            {},
            {"position_weights": "bear", "bear_beams": 2},
            {"position_weights": "igd"},
            {"position_weights": "igd", "padding_free": True},
        )
    )
    assert len({round(logged(trainer, "loss")[0], 4) for trainer in (plain, bear, igd)}) == 3
    assert logged(packed, "loss") == pytest.approx(logged(igd, "loss"), abs=1e-5)
    evaluated = [trainer.evaluate(trainer.train_dataset)["eval_loss"] for trainer in (plain, bear, igd)]
    assert evaluated == pytest.approx([evaluated[0]] * 3, abs=1e-6)
    assert (bear.record["position_weights"], bear.record["bear_beams"]) == ("bear", 2)


def test_equal_weights_are_no_weights_however_small(train, rows):
    one_item = rows.filter(lambda row: "Emma" in row["completion"])  # no token rules anything out
    config = {"max_steps": 1, "learning_rate": 0.0, "temperature": 1.0, "per_device_train_batch_size": 1}
    plain, small, zero = (
        logged(train(rows=one_item, train_sampling_strategy="sequential", **config, **options), "loss")[0]
        for options in ({}, *({"position_weights": "igd", "igd_weight": weight} for weight in (1e-3, 0.0)))
    )
    assert small == pytest.approx(plain, rel=1e-4)
    assert zero == 0 < plain


# ---------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_weights": "cft"}, "`position_weights` is 'cft': it must be 'bear', 'igd' or `None`"),
        ({"bear_beams": 0}, "`bear_beams` is 0: it must be a whole number above 0"),
        ({"bear_scale": 0.0}, "`bear_scale` is 0.0: it must be a positive number"),
        ({"bear_weight": -1.0}, "`bear_weight` is -1.0: it must be a number above -1"),
        ({"igd_weight": 1.5}, "`igd_weight` is 1.5: it must lie between 0 and 1"),
        ({"position_weights": "bear", "normalize": "vocab", "temperature": 1.0}, "'bear' compares .* 'trie'"),
        ({"position_weights": "igd", "negatives": "seen"}, "'igd' has no effect with `negatives` = 'seen'"),
        ({"position_weights": "bear", "num_negatives": 2, "temperature": 1.0}, "'bear' .* no `num_negatives`"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MSLConfig("out", use_cpu=True, bf16=False, **options)


def test_igd_needs_the_rows_beforehand(tmp_path, rows, tokenizer, task):
    args = MSLConfig(str(tmp_path), position_weights="igd", **COMMON)
    with pytest.raises(ValueError, match="`position_weights` = 'igd' .* is a stream: pass a `Dataset`"):
        MSLTrainer(make_model(tokenizer), args, task=task, train_dataset=rows.to_iterable_dataset())
