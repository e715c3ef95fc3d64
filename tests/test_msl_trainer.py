# SPDX-License-Identifier: Apache-2.0
import json
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from helpers import dense_loss, dense_positions, logged, make_model, make_windows
from peft import LoraConfig
from transformers import EarlyStoppingCallback, MixtralConfig
from trl import SFTConfig, SFTTrainer, TrlParser

from trl_msl import (
    ItemCatalog,
    MSLConfig,
    MSLTrainer,
    RankingTask,
    RecommendationCallback,
    adaptive_temperature,
    build_rows,
    tokenize_rows,
)
from trl_msl.data import DataArguments
from trl_msl.experiments.from_scratch import train_tokenizer
from trl_msl.training import temperature_statistics


COMMON = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def rows(catalog, task):
    return build_rows(make_windows(catalog.ids, num_rows=80), task)


@pytest.fixture
def train(tmp_path, rows, tokenizer, task):
    """Train a tiny model and return its trainer."""

    def run(
        model=None, rows=rows, task=task, resume=None, output_dir=tmp_path, peft_config=None, max_length=1024, **config
    ):
        trainer = MSLTrainer(
            model or make_model(tokenizer),
            MSLConfig(str(output_dir), **{**COMMON, **config}),
            task=replace(task, max_length=max_length),
            train_dataset=rows,
            peft_config=peft_config,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


# ---------------------------------------------------------------------- the same as written out


@pytest.mark.parametrize("positions", ["first", "all"])
def test_ten_steps_follow_a_plain_loop_with_dense_masks(positions, train, rows, tokenizer, task, trie):
    settings = {"temperature_init": 2.0, "temperature_min": 0.1, "temperature_ema": 0.3, "temperature_eta": 0.3}
    # in the order of the rows, so that the loop can follow
    trainer = train(
        max_steps=10, per_device_train_batch_size=4, max_grad_norm=0, temperature_positions=positions,
        train_sampling_strategy="sequential", **settings,
    )  # fmt: skip

    model = make_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    encoded = tokenize_rows(rows[:], task)
    temperature, losses, temperatures = 2.0, [], []
    for step in range(10):
        ids, labels = (encoded[name][4 * step : 4 * step + 4] for name in ("input_ids", "labels"))
        longest = max(map(len, ids))
        input_ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        nodes = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])
        logits = model(input_ids=input_ids, attention_mask=mask).logits
        loss = dense_loss(trie, logits, nodes, temperature).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        temperatures.append(temperature)
        logits, masks, targets = dense_positions(trie, logits.detach(), nodes)
        first = masks.sum(dim=1) == len(trie.children(trie.first_branching_node))
        if positions == "first":
            estimate = adaptive_temperature(temperature_statistics(logits[first], masks[first], targets[first]), 0.3)
        else:
            estimate = adaptive_temperature(temperature_statistics(logits, masks, targets), 0.3, int(first.sum()))
        temperature += 0.3 * (min(max(float(estimate), 0.1), 5.0) - temperature)

    assert len({round(t, 3) for t in temperatures}) > 5  # it does adapt
    assert logged(trainer, "temperature") == pytest.approx(temperatures, abs=1e-5)
    assert logged(trainer, "loss") == pytest.approx(losses, abs=1e-5)
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights(trainer), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", ["adaptive", 2.0])
def test_accumulation_of_eight_rows_is_a_batch_of_eight(temperature, train):
    config = {"max_steps": 5, "temperature": temperature, "temperature_min": 0.1, "temperature_ema": 0.3}
    accumulated = train(per_device_train_batch_size=1, gradient_accumulation_steps=8, **config)
    whole = train(per_device_train_batch_size=8, **config)
    assert accumulated.temperature == pytest.approx(whole.temperature, abs=1e-5)
    assert logged(accumulated, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)
    torch.testing.assert_close(weights(accumulated), weights(whole), rtol=1e-5, atol=1e-5)


def test_lml_parts_are_the_loss_of_sft_and_the_masked_loss(train, tmp_path, rows, tokenizer, task):
    """`lml` is the loss that TRL's `SFTTrainer` reports for the very same tokens, and LML = LML1 + LML2 (Eq. 2)."""
    kwargs = {"fn_kwargs": {"task": task, "labels": "tokens"}}
    tokens = rows.map(tokenize_rows, batched=True, remove_columns=rows.column_names, **kwargs)
    config = {**COMMON, "per_device_eval_batch_size": 80}
    sft = SFTTrainer(
        make_model(tokenizer), SFTConfig(str(tmp_path), **config), train_dataset=tokens, eval_dataset=tokens,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer = train(max_steps=1, log_lml_parts=True, temperature=1.0, learning_rate=0.0, per_device_eval_batch_size=80)
    metrics = trainer.evaluate(rows)
    assert metrics["eval_loss"] > 0
    entry = next(e for e in trainer.state.log_history if "eval_lml" in e)
    assert entry["eval_lml"] == pytest.approx(sft.evaluate()["eval_loss"], rel=1e-4)
    assert entry["eval_lml"] == pytest.approx(entry["eval_lml1"] + entry["eval_lml2"], rel=1e-5)
    num_tokens = sum(label != -100 for labels in tokens["labels"] for label in labels)
    branching = trainer._get_num_items_in_batch(
        [{"labels": torch.tensor([node])[None]} for row in trainer.train_dataset["labels"] for node in [[-100, *row]]],
        torch.device("cpu"),
    )
    assert entry["eval_lml2"] == pytest.approx(metrics["eval_loss"] * int(branching) / num_tokens, rel=1e-4)


# ---------------------------------------------------------------------- what TRL offers


LORA_KWARGS = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 16, "lora_alpha": 16}
LORA = LoraConfig(**LORA_KWARGS)
VARIANTS = {
    "full": {},
    "lora": {"peft_config": LORA},
    "lora with a trainable head": {"peft_config": LoraConfig(**LORA_KWARGS, modules_to_save=["lm_head"])},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "lora, bf16, gradient checkpointing": {
        "peft_config": LORA, "bf16": True, "gradient_checkpointing": True,
    },
    "fixed temperature": {"temperature": 1.0},
    "padding-free": {"padding_free": True},
    "packing": {"packing": True, "max_length": 128},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_it_learns_a_few_rows_by_heart(name, train, rows):
    config = {"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 1e-3, **VARIANTS[name]}
    trainer = train(rows=rows.select(range(8)), **config)
    assert all(map(math.isfinite, logged(trainer, "loss")))
    probabilities = logged(trainer, "target_probability")
    assert probabilities[0] < 0.5
    assert probabilities[-1] > 0.75
    if "trainable head" in name:
        head = trainer.model.get_base_model().lm_head
        assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)


@pytest.mark.parametrize("variant", ["padding-free", "gradient checkpointing"])
def test_first_loss_does_not_depend_on_how_it_is_computed(variant, train):
    config = {"max_steps": 1, "per_device_train_batch_size": 8, "train_sampling_strategy": "sequential"}
    expected = logged(train(**config), "loss")
    assert logged(train(**config, **VARIANTS[variant]), "loss") == pytest.approx(expected, rel=1e-5)


def test_packed_documents_give_the_same_loss_as_rows(train):
    """All rows in one packed batch: the mean over the same positions."""
    rows = train(max_steps=1, per_device_train_batch_size=80)
    packed = train(max_steps=1, per_device_train_batch_size=80, packing=True, max_length=128)
    assert logged(packed, "loss") == pytest.approx(logged(rows, "loss"), rel=1e-5)


def test_conversational_rows(train, catalog, chat_task):
    rows = build_rows(make_windows(catalog.ids, num_rows=8), chat_task)
    config = {"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
    probabilities = logged(train(rows=rows, task=chat_task, **config), "target_probability")
    assert probabilities[-1] > 0.75 > 0.5 > probabilities[0]


def test_streams_and_rows_that_the_user_tokenised(train, rows, task):
    config = {"max_steps": 2, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    expected = logged(train(**config), "loss")
    tokenized = rows.map(tokenize_rows, batched=True, remove_columns=rows.column_names, fn_kwargs={"task": task})
    assert logged(train(rows=tokenized, **config), "loss") == expected
    assert logged(train(rows=rows.to_iterable_dataset(), **config), "loss") == expected


def test_mixture_of_experts(train, tokenizer):
    config = {"max_steps": 1, "per_device_train_batch_size": 8, "train_sampling_strategy": "sequential"}
    model = {"config_class": MixtralConfig, "num_local_experts": 4, "router_aux_loss_coef": 0.5}
    with_aux = train(make_model(tokenizer, **model, output_router_logits=True), **config)
    without = train(make_model(tokenizer, **model), router_aux_loss_coef=0.0, **config)
    assert logged(with_aux, "loss")[0] > logged(without, "loss")[0] + 0.4  # the balancing loss is at least 1
    assert logged(with_aux, "loss")[0] == pytest.approx(
        logged(without, "loss")[0] + 0.5 * logged(with_aux, "aux_loss")[0], rel=1e-4
    )
    evaluated = with_aux.evaluate(with_aux.train_dataset)
    assert evaluated["eval_loss"] > without.evaluate(without.train_dataset)["eval_loss"] + 0.4
    assert evaluated["eval_aux_loss"] >= 1 and not logged(without, "aux_loss")


def test_eval_loss_does_not_depend_on_the_batch_size(train, rows):
    trainer = train(max_steps=1)
    losses = {}
    for size in (1, 5, 7, 80):
        trainer.args.per_device_eval_batch_size = size
        losses[size] = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    assert list(losses.values()) == pytest.approx([losses[80]] * 4, rel=1e-5)


def test_the_loss_of_a_batch_outside_an_evaluation(train):
    trainer = train(max_steps=1, per_device_train_batch_size=8, train_sampling_strategy="sequential", temperature=1.0)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    trainer.model.eval().load_state_dict(make_model(trainer.processing_class).state_dict())
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(logged(trainer, "loss")[0], rel=1e-5)


@pytest.mark.parametrize("normalize", ["trie", "vocab"])
def test_a_diverged_model_says_so(normalize, train, tokenizer, caplog):
    model = make_model(tokenizer)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    trainer = train(model, max_steps=2, normalize=normalize, temperature=1.0)
    assert all(map(math.isnan, logged(trainer, "loss")))
    assert caplog.text.count("the training has diverged") == 1


def test_a_finished_run_that_is_resumed_takes_no_further_step(train, tmp_path, tokenizer):
    config = {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    whole = train(**config)
    resumed = train(make_model(tokenizer, seed=1), resume=str(tmp_path / "checkpoint-3"), **config)
    assert resumed.state.global_step == 3
    assert torch.equal(weights(resumed), weights(whole))
    assert not (tmp_path / "checkpoint-4").exists()


def test_best_checkpoint_by_ndcg(tmp_path, rows, tokenizer, task):
    config = MSLConfig(
        str(tmp_path), **{**COMMON, "save_strategy": "steps"}, max_steps=6, save_steps=2, eval_strategy="steps",
        eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_ndcg@10", greater_is_better=True,
    )  # fmt: skip
    trainer = MSLTrainer(make_model(tokenizer), config, task=task, train_dataset=rows, eval_dataset=rows)
    trainer.add_callback(RecommendationCallback(trainer, rows.select(range(12)), ks=(10,)))
    trainer.train()
    values = logged(trainer, "eval_ndcg@10")
    assert len(values) == 3
    assert trainer.state.best_metric == max(values)


def test_callback_runs_before_those_that_read_its_metrics_and_only_on_evaluations(tmp_path, rows, tokenizer, task):
    config = MSLConfig(
        str(tmp_path),
        **{**COMMON, "save_strategy": "steps", "save_steps": 1},
        max_steps=5,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ndcg@5",
    )
    few = rows.select(range(4))
    trainer = MSLTrainer(
        make_model(tokenizer),
        config,
        task=task,
        train_dataset=rows,
        eval_dataset={"a": few, "b": few},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=1.0)],
    )
    trainer.add_callback(RecommendationCallback(trainer, few, ks=(5,)))
    trainer.train()
    # nothing improves by 1.0 after the first: stopped by the metric that the callback adds
    assert trainer.state.global_step == 2
    assert len(logged(trainer, "eval_ndcg@5")) == 2  # once a step, not once a dataset
    assert "eval_ndcg@5" not in trainer.evaluate(few, metric_key_prefix="test")
    with pytest.raises(ValueError, match="`predict` is not supported"):
        trainer.predict(few)


# ---------------------------------------------------------------------- temperature


def test_resumed_training_ends_as_if_undisturbed(train, tmp_path):
    config = {
        "max_steps": 6, "per_device_train_batch_size": 4, "temperature_min": 0.1, "temperature_ema": 0.3,
        "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip
    whole = train(output_dir=tmp_path / "whole", **config)
    state = json.loads((tmp_path / "whole/checkpoint-3/trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["TemperatureCallback"]["attributes"]["value"]
    assert saved != 1.5
    for extra in ({}, {"restore_callback_states_from_checkpoint": True}):
        resumed = train(
            output_dir=tmp_path / "resumed", resume=str(tmp_path / "whole/checkpoint-3"), **config, **extra
        )
        assert resumed.temperature == whole.temperature
        assert torch.equal(weights(resumed), weights(whole))


def test_warm_up_clamp_and_fixed_temperature(train):
    assert logged(train(max_steps=4, temperature_warmup_steps=2, temperature_min=4.0), "temperature") == pytest.approx(
        [1.5, 1.5, 1.5, 1.5 + 0.05 * 2.5]
    )
    assert logged(train(max_steps=2, temperature=3.0), "temperature") == [3.0, 3.0]


# ---------------------------------------------------------------------- configuration


def test_config_from_yaml_and_command_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("temperature: 2.5\noutput_dir: out\ntemperature_eta: 0.3\n")
    (from_yaml,) = TrlParser(MSLConfig).parse_args_and_config(["--config", str(path), "--use_cpu"])
    assert (from_yaml.temperature, from_yaml.temperature_eta) == (2.5, 0.3)
    parser = TrlParser(MSLConfig)
    (from_flags,) = parser.parse_args_and_config(["--output_dir", "out", "--temperature", "1.25", "--use_cpu"])
    assert from_flags.temperature == 1.25
    (adaptive,) = parser.parse_args_and_config(["--output_dir", "out", "--temperature", "adaptive", "--use_cpu"])
    assert adaptive.temperature == "adaptive"
    kwargs = ["--chat_template_kwargs", '{"enable_thinking": false}']
    (chat,) = TrlParser(DataArguments).parse_args_and_config(kwargs)
    assert chat.chat_template_kwargs == {"enable_thinking": False}


def test_every_parameter_is_documented():
    own = set(MSLConfig.__dataclass_fields__) - set(SFTConfig.__dataclass_fields__)
    for name in own:
        assert f"{name} (`" in MSLConfig.__doc__
        assert MSLConfig.__dataclass_fields__[name].metadata["help"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": 0}, "`temperature` is 0: it must be a positive number or 'adaptive'"),
        ({"temperature": "auto"}, "`temperature` is 'auto'"),
        ({"temperature": None}, "`temperature` is None"),
        ({"temperature_init": -1.0}, "`temperature_init` is -1.0"),
        ({"temperature_min": 9.0}, "`temperature_min` = 9.0 is above `temperature_max` = 5.0"),
        ({"temperature_eta": 1.0}, "`temperature_eta` is 1.0"),
        ({"temperature_positions": "last"}, "`temperature_positions` is 'last'"),
        ({"loss_type": "dft"}, "`loss_type` = 'dft' is not supported"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` = 0.1 is not supported"),
        ({"completion_only_loss": False}, "`completion_only_loss` = False is not supported"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "`dataset_kwargs` = .* is not supported"),
        ({"packing": True, "packing_strategy": "wrapped"}, "`packing_strategy` = 'wrapped' .* use 'bfd'"),
        ({"assistant_only_loss": True}, "`assistant_only_loss` = True is not supported"),
    ],
)
def test_bad_config(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MSLConfig(str(tmp_path), **{**COMMON, **config})


def test_bad_arguments_are_found_before_training(tmp_path, rows, tokenizer, task):
    def trainer(**kwargs):
        given = {"args": MSLConfig(str(tmp_path), **COMMON), "task": task, "train_dataset": rows, **kwargs}
        return MSLTrainer(make_model(tokenizer), **given)

    with pytest.raises(ValueError, match="`args` is a `SFTConfig`: pass a `MSLConfig`"):
        trainer(args=SFTConfig(str(tmp_path), **COMMON))
    with pytest.raises(ValueError, match="`task` is a NoneType"):
        trainer(task=None)
    with pytest.raises(ValueError, match="`task` has only items with the same text"):
        trainer(task=RankingTask(ItemCatalog(["a", "b"], ["Dune", "Dune"]), tokenizer, task.prompt_template))
    with pytest.raises(ValueError, match="`processing_class` has another vocabulary"):
        trainer(processing_class=train_tokenizer(["Dune"], vocab_size=300))
    with pytest.raises(ValueError, match="`max_length` is 30 in `args` and 1024 in `task`"):
        trainer(args=MSLConfig(str(tmp_path), max_length=30, **COMMON))
    best = {"metric_for_best_model": "eval_mean_token_accuracy"}
    with pytest.raises(ValueError, match="`metric_for_best_model` = 'eval_mean_token_accuracy' .* use 'eval_valid_"):
        trainer(args=MSLConfig(str(tmp_path), **COMMON, **best))
    with pytest.raises(ValueError, match="`compute_metrics` is not supported"):
        trainer(compute_metrics=lambda prediction: {})
    with pytest.raises(ValueError, match="1 of the 80 rows read are not items"):
        trainer(train_dataset=Dataset.from_list([{**rows[0], "completion": "Ulysses"}, *rows.to_list()[1:]]))
    with pytest.raises(ValueError, match="The train dataset is empty: pass at least one row"):
        trainer(train_dataset=rows.select([]))
    with pytest.raises(ValueError, match="The eval dataset is empty: pass at least one row"):
        trainer(eval_dataset=rows.map(tokenize_rows, batched=True, fn_kwargs={"task": task}).select([]))
    with pytest.raises(ValueError, match="`input_ids` but no `labels`"):
        trainer(train_dataset=Dataset.from_list([{"input_ids": [1, 2]}]))
    kwargs = {"batched": True, "remove_columns": rows.column_names}
    tokens = rows.map(tokenize_rows, fn_kwargs={"task": task, "labels": "tokens"}, **kwargs)
    with pytest.raises(ValueError, match=r"\d+ label\(s\) that are not nodes of their tokens in the task's trie"):
        trainer(train_dataset=tokens)
    with pytest.raises(ValueError, match="that are not nodes of their tokens in the task's trie"):
        trainer(
            train_dataset=tokens.to_iterable_dataset(), args=MSLConfig(str(tmp_path), max_steps=1, **COMMON)
        ).train()
    nodes = rows.map(tokenize_rows, fn_kwargs={"task": task}, **kwargs)
    with pytest.raises(ValueError, match=r"`max_length` = 30: \d+ row\(s\) of the train dataset are longer"):
        trainer(train_dataset=nodes, task=replace(task, max_length=30))


# ---------------------------------------------------------------------- the usual loss, and drawn negatives


def test_over_the_vocabulary_it_is_the_usual_loss(train, tmp_path, rows, tokenizer, task):
    config = {**COMMON, "max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    ours = train(normalize="vocab", temperature=1.0, **config)
    encoded = rows.map(
        tokenize_rows, batched=True, remove_columns=rows.column_names,
        fn_kwargs={"task": task, "labels": "tokens"},
    )  # fmt: skip
    theirs = SFTTrainer(
        make_model(tokenizer), SFTConfig(str(tmp_path), **config), train_dataset=encoded, processing_class=tokenizer
    )
    theirs.train()
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-4)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-3, atol=1e-4)
    assert 0 < logged(ours, "valid_token_accuracy")[-1] <= 1


def test_drawn_negatives_train_and_evaluate_over_all(train, rows, tokenizer):
    config = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "temperature": 1.0,
        "train_sampling_strategy": "sequential",
    }
    few, scaled, whole = (
        train(num_negatives=number, negative_scale=scale, **config)
        for number, scale in ((1, 1.0), (1, 4.0), (None, 1.0))
    )
    # the first losses are of the same model
    assert logged(few, "loss")[0] < logged(whole, "loss")[0]
    assert logged(few, "loss")[0] < logged(scaled, "loss")[0]
    for trainer in (few, scaled, whole):
        trainer.model.load_state_dict(make_model(tokenizer).state_dict())
    assert (
        len({round(trainer.evaluate(trainer.train_dataset)["eval_loss"], 5) for trainer in (few, scaled, whole)}) == 1
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "vocab"}, "`temperature` = 'adaptive' .* `normalize` = 'vocab' .* pass a number"),
        ({"num_negatives": 5}, "`temperature` = 'adaptive' .* `num_negatives` = 5 .* pass a number"),
        ({"normalize": "items"}, "`normalize` is 'items'"),
        ({"num_negatives": 0, "temperature": 1.0}, "`num_negatives` is 0: it must be a whole number above 0"),
        ({"negative_scale": 2.0, "temperature": 1.0}, "`negative_scale` = 2.0 is for drawn negatives"),
        ({"negative_scale": -1, "num_negatives": 2, "temperature": 1.0}, "`negative_scale` is -1"),
        ({"normalize": "vocab", "temperature": 1.0, "num_negatives": 2}, "takes no `num_negatives`"),
        ({"normalize": "vocab", "temperature": 2.0, "log_lml_parts": True}, "only with `temperature` = 1"),
        ({"num_negatives": 2.5, "temperature": 1.0}, "`num_negatives` is 2.5"),
        ({"num_negatives": 2, "temperature": 1.0, "log_lml_parts": True}, "`log_lml_parts` needs all valid tokens"),
    ],
)
def test_losses_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        MSLConfig("out", use_cpu=True, bf16=False, **options)
