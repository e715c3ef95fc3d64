# SPDX-License-Identifier: Apache-2.0
import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import make_model, make_windows, score_every_item
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_msl import PromptTemplate, Recommender, SoftmaxDPOConfig, SoftmaxDPOTrainer, build_rows
from trl_msl.data import encode_prompts
from trl_msl.softmax_dpo import DataCollatorForSoftmaxPreference, tokenize_preferences
from trl_msl.softmax_dpo.collator import segment_mask
from trl_msl.softmax_dpo.preferences import gather_rejected
from trl_msl.softmax_dpo.trainer import can_share
from trl_msl.training import softmax_dpo_loss
from trl_msl.trie import ItemTrie


COMMON = {
    "report_to": "none", "bf16": False, "use_cpu": True, "max_steps": 10, "logging_steps": 1, "learning_rate": 1e-3,
    "per_device_train_batch_size": 4, "gradient_checkpointing": False, "dataloader_pin_memory": False, "beta": 0.5,
    "save_strategy": "no",
}  # fmt: skip


def make_preferences(task, num_rejected=3, num_rows=40, ragged=False):
    """Rows with random other items rejected."""
    catalog = task.catalog
    rows = build_rows(make_windows(catalog.ids, num_rows), task)
    rng = random.Random(0)
    rejected = []
    for chosen in rows["completion"]:
        others = sorted({text for text in catalog.completions if text != chosen})
        rejected.append(rng.sample(others, rng.randint(1, num_rejected) if ragged else num_rejected))
    rows = rows.rename_column("completion", "chosen").add_column("rejected", rejected)
    return rows.select_columns(["prompt", "chosen", "rejected", "history"])


@pytest.mark.parametrize("num_rejected", [1, 3, 15])
def test_loss_and_gradient_as_written_out(num_rejected):
    torch.manual_seed(num_rejected)
    chosen = torch.randn(4, dtype=torch.float64, requires_grad=True)
    rejected = torch.randn(4, num_rejected, dtype=torch.float64, requires_grad=True)
    found = softmax_dpo_loss(chosen, rejected, beta=0.7)
    total = sum(torch.exp(0.7 * (rejected[:, i] - chosen)) for i in range(num_rejected))
    expected = -torch.log(torch.sigmoid(-torch.log(total)))
    torch.testing.assert_close(found, expected)
    for one, other in zip(*(torch.autograd.grad(loss.sum(), (chosen, rejected)) for loss in (found, expected))):
        torch.testing.assert_close(one, other)
    mask = torch.ones(4, num_rejected + 1, dtype=torch.bool)
    mask[:, -1] = False
    padded = torch.cat([rejected, torch.full((4, 1), 50.0)], dim=1)
    torch.testing.assert_close(softmax_dpo_loss(chosen, padded, 0.7, mask), found)
    assert softmax_dpo_loss(torch.zeros(1), torch.full((1, 2), 1e4), 1.0).isfinite()


def test_batches():
    trie = ItemTrie.from_sequences([[5, 6, 7], [5, 8], [9]])
    examples = [
        {"prompt_ids": [1, 2], "chosen_ids": [5, 6, 7], "rejected_ids": [[5, 8], [9]]},
        {"prompt_ids": [3], "chosen_ids": [9], "rejected_ids": [[5, 8]]},
    ]
    batch = DataCollatorForSoftmaxPreference(trie, pad_token_id=0)(examples)
    assert batch["input_ids"].tolist() == [[1, 2, 5, 6, 7, 2, 5, 8, 2, 9], [3, 9, 3, 5, 8, 0, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 1, 2, 3, 1, 2], [0, 1, 0, 1, 2, 0, 0, 0, 0, 0]]
    assert batch["segments"].tolist() == [[0, 1, 1, 1, 1, 2, 2, 2, 3, 3], [1, 1, 2, 2, 2, -1, -1, -1, -1, -1]]
    no = -100
    assert batch["labels"].tolist() == [[no, no, 1, 3, 5, no, 1, 4, no, 2], [no, 2, no, 1, 4, no, no, no, no, no]]
    assert batch["rejected_mask"].tolist() == [[True, True], [True, False]]
    batch = DataCollatorForSoftmaxPreference(trie, 0, share_prompt=False, skip_forced=True)(examples)
    assert batch["input_ids"].tolist() == [[1, 2, 5, 6], [1, 2, 5, 8], [1, 2, 9, 0], [3, 9, 0, 0], [3, 5, 8, 0]]
    assert batch["examples"].tolist() == [0, 0, 0, 1, 1]
    mask = segment_mask(torch.tensor([[0, 1, 1, 2, -1]]))[0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 1]]


def make_trainer(tmp_path, model, rows, task, **kwargs):
    names = ("normalize", "precompute_ref_log_probs", "max_steps", "per_device_train_batch_size",
             "learning_rate")  # fmt: skip
    config = SoftmaxDPOConfig(tmp_path, **{**COMMON, **{k: kwargs.pop(k) for k in names if k in kwargs}})
    return SoftmaxDPOTrainer(model, args=config, train_dataset=rows, task=task, **kwargs)


def first_batch(trainer):
    examples = [trainer.train_dataset[index] for index in range(5)]
    return trainer.data_collator(examples)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("normalize", ["trie", "vocab"])
def test_log_probs_are_those_of_each_completion_alone(normalize, attention, tmp_path, task, tokenizer, catalog, trie):
    rows = make_preferences(task, ragged=True)
    model = make_model(tokenizer)
    model.set_attn_implementation(attention)
    trainer = make_trainer(tmp_path, model, rows, task, normalize=normalize, ref_model=make_model(tokenizer))
    assert trainer.data_collator.share_prompt
    with torch.no_grad():
        shared = trainer._log_probs(model, first_batch(trainer))
        trainer.data_collator.share_prompt = False
        alone = trainer._log_probs(model, first_batch(trainer))
    torch.testing.assert_close(shared, alone, atol=1e-4, rtol=1e-4)

    prompts = encode_prompts(tokenizer, rows["prompt"][:5])
    expected = score_every_item(model, trie, prompts) if normalize == "trie" else np.zeros((5, len(catalog)))
    if normalize == "vocab":
        for user, prompt in enumerate(prompts):
            for item, node in enumerate(trie.item_nodes):
                path = trie.paths(node[None])[0]
                tokens = trie.tokens(path).tolist()
                logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                expected[user, item] = logits[range(len(tokens)), tokens].sum().item()
    for user in range(5):
        completions = [rows["chosen"][user], *rows["rejected"][user]]
        items = [catalog.completions.index(text) for text in completions]
        np.testing.assert_allclose(shared[user, : len(items)], expected[user, items], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("normalize", ["trie", "vocab"])
def test_gradients_of_shared_prompts(normalize, tmp_path, task, tokenizer):
    rows = make_preferences(task, ragged=True)
    gradients = []
    for share_prompt in (True, False):
        model = make_model(tokenizer)
        trainer = make_trainer(
            tmp_path, model, rows, task, normalize=normalize, ref_model=make_model(tokenizer, seed=1)
        )
        trainer.data_collator.share_prompt = share_prompt
        trainer.compute_loss(model.train(), first_batch(trainer)).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


class Losses(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(logs)


@pytest.mark.parametrize("kind", ["full", "precomputed", "new adapter", "old adapter"])
def test_one_rejected_item_is_dpo(kind, tmp_path, task, tokenizer):
    """Ten steps follow TRL's trainer: losses, rewards, and weights in the end."""
    task = replace(task, prompt_template=PromptTemplate("Read: {history}\n"))  # whose tokens do not merge with items
    rows = make_preferences(task, num_rejected=1)
    pairs = rows.map(lambda row: {"rejected": row["rejected"][0]})
    make_model(tokenizer).save_pretrained(tmp_path / "base")
    weights, logs = [], []
    for trainer_class in (DPOTrainer, SoftmaxDPOTrainer):
        model, kwargs = str(tmp_path / "base"), {}
        if kind == "new adapter":
            kwargs["peft_config"] = LoraConfig(task_type="CAUSAL_LM")
        elif kind == "old adapter":
            torch.manual_seed(0)
            config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
            model = get_peft_model(make_model(tokenizer), config)
        options = {**COMMON, "precompute_ref_log_probs": kind == "precomputed", "disable_dropout": True}
        callback = Losses()
        if trainer_class is DPOTrainer:
            torch.manual_seed(0)
            trainer = DPOTrainer(
                model, args=DPOConfig(tmp_path / "dpo", **options), train_dataset=pairs, processing_class=tokenizer,
                callbacks=[callback], **kwargs,
            )  # fmt: skip
        else:
            torch.manual_seed(0)
            trainer = SoftmaxDPOTrainer(
                model, args=SoftmaxDPOConfig(tmp_path / "ours", normalize="vocab", **options), train_dataset=rows,
                task=task, callbacks=[callback], **kwargs,
            )  # fmt: skip
        trainer.train()
        logs.append([entry for entry in callback.logs if "loss" in entry])
        weights.append({name: value.detach() for name, value in trainer.model.named_parameters() if "ref" not in name})
    assert len(logs[0]) == len(logs[1]) == 10
    for step, (theirs, ours) in enumerate(zip(*logs)):
        if step > 0:  # before the first update rewards are 0, but for rounding
            assert ours["rewards/accuracies"] == theirs["rewards/accuracies"]
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=1e-5), name
        for name in ("logps/chosen", "logps/rejected", "grad_norm"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-4), name
    assert float(logs[0][-1]["loss"]) != pytest.approx(float(logs[0][0]["loss"]), abs=1e-2)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-4, rtol=1e-3)


def test_it_learns_and_its_adapter_carries_the_catalogue(tmp_path, task, tokenizer):
    rows = make_preferences(task, num_rows=8)
    make_model(tokenizer).save_pretrained(tmp_path / "base")
    callback = Losses()
    trainer = make_trainer(
        tmp_path / "out", str(tmp_path / "base"), rows, task, max_steps=30, per_device_train_batch_size=8,
        learning_rate=5e-3,
        callbacks=[callback], peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=64),
        precompute_ref_log_probs=True,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in callback.logs if "loss" in entry]
    assert losses[0] == pytest.approx(np.log(4), abs=1e-3)  # policy and reference are alike: one of four
    assert losses[-1] < 0.5 * losses[0]
    assert callback.logs[-2]["rewards/accuracies"] > 0.9
    found = Recommender.from_pretrained(tmp_path / "out").recommend([["b0", "b3"]], k=3)
    assert all(found.exact)
    trainer.create_model_card()
    assert "2406.09215" in (tmp_path / "out" / "README.md").read_text()


def test_columns_of_the_papers_data_and_pairs(task, catalog):
    rows = make_preferences(task, num_rejected=10)
    columns = rows.map(lambda row: {f"rejected{i + 1}": text for i, text in enumerate(row["rejected"])})
    gathered = gather_rejected(columns.remove_columns("rejected"))
    assert gathered["rejected"][:] == rows["rejected"][:]  # rejected10 comes after rejected9
    kwargs = {
        "batched": True,
        "fn_kwargs": {"task": task},
        "remove_columns": rows.column_names,
    }
    assert gathered.map(tokenize_preferences, **kwargs)[:] == rows.map(tokenize_preferences, **kwargs)[:]
    pair = rows.map(lambda row: {"rejected": row["rejected"][0]}).map(tokenize_preferences, **kwargs)
    assert [ids[0] for ids in pair["rejected_ids"]] == [
        ids[0] for ids in rows.map(tokenize_preferences, **kwargs)["rejected_ids"]
    ]


def test_conversational_rows(catalog, chat_task, chat_trie):
    def message(text):
        return [{"role": "assistant", "content": text}]

    batch = {"prompt": [[{"role": "user", "content": "Hi"}]], "chosen": [message(catalog.completions[0])]}
    several = tokenize_preferences(
        {**batch, "rejected": [[message(text) for text in catalog.completions[1:4]]]}, chat_task
    )
    assert chat_trie.find(several["rejected_ids"][0]).tolist() == chat_trie.item_nodes[1:4].tolist()
    single = tokenize_preferences({**batch, "rejected": [message(catalog.completions[1])]}, chat_task)
    assert single["rejected_ids"] == [several["rejected_ids"][0][:1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": [["Ulysses"]]}, "1 of the 2 completions read are not items of the catalogue, such as .'Uly"),
        ({"rejected": [[]]}, "1 of the 1 rows read have no rejected"),
        ({"rejected": [['"Dune"']]}, "1 of the 1 rows read reject their chosen item"),
    ],
)
def test_bad_rows(change, message, task):
    batch = {"prompt": ["Next: "], "chosen": ['"Dune"'], "rejected": [['"Emma"']], **change}
    with pytest.raises(ValueError, match=message):
        tokenize_preferences(batch, task)
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['rejected'\]"):
        tokenize_preferences({"prompt": ["Next: "], "chosen": ['"Dune"']}, task)
    with pytest.raises(ValueError, match="`max_length`: 1 of the 1 rows"):
        tokenize_preferences({**batch, "rejected": [['"Emma"']]}, replace(task, max_length=5))


@pytest.mark.parametrize(
    "options",
    [{"loss_type": ["hinge"]}, {"label_smoothing": 0.1}, {"normalize": "all"}, {"beta": 0.0}, {"padding_free": True}],
)
def test_bad_options(options, tmp_path):
    with pytest.raises(ValueError, match=next(iter(options))):
        SoftmaxDPOConfig(tmp_path, report_to="none", bf16=False, use_cpu=True, **options)


def test_a_metric_that_only_trl_measures(tmp_path, task, tokenizer):
    args = SoftmaxDPOConfig(tmp_path, **COMMON, metric_for_best_model="eval_mean_token_accuracy")
    with pytest.raises(
        ValueError, match="'eval_mean_token_accuracy' is not measured .* use 'eval_rewards/accuracies'"
    ):
        SoftmaxDPOTrainer(make_model(tokenizer), args=args, task=task, train_dataset=make_preferences(task))


def test_a_model_that_can_not_run_a_tree(tmp_path, task, tokenizer, caplog):
    """ALiBi, recurrent, FlashAttention...: completions get a prompt of their own each, and a warning says so."""
    from transformers import BloomConfig, BloomForCausalLM

    rows = make_preferences(task)
    torch.manual_seed(0)
    model, reference = (
        BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)) for _ in range(2)
    )
    trainer = make_trainer(tmp_path, model, rows, task, max_steps=1, ref_model=reference)
    assert not trainer.data_collator.share_prompt
    assert "Each completion is run with a prompt of its own" in caplog.text
    for tried, shares in ((make_model(tokenizer), True), (model, False)):
        tried.train().base_model.get_input_embeddings().eval()
        assert can_share(tried, max_length=None) == shares
        assert tried.training and not tried.base_model.get_input_embeddings().training


def test_learned_positions(tmp_path, task, tokenizer):
    rows = make_preferences(task)
    model, reference = (make_model(tokenizer, GPT2Config, n_embd=32, n_layer=1, n_head=4, seed=s) for s in (0, 1))
    trainer = make_trainer(tmp_path, model, rows, task, ref_model=reference, max_steps=1)
    with torch.no_grad():
        shared = trainer._log_probs(model, first_batch(trainer))
        trainer.data_collator.share_prompt = False
        torch.testing.assert_close(shared, trainer._log_probs(model, first_batch(trainer)), atol=1e-4, rtol=1e-4)


def test_another_dataset_is_no_preference_data(tmp_path, task, tokenizer):
    rows = Dataset.from_list([{"prompt": "Next: ", "completion": '"Dune"'}])
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['chosen', 'rejected'\]"):
        make_trainer(tmp_path, make_model(tokenizer), rows, task)


def test_precomputed_references_of_one_form_are_not_taken_for_another(tmp_path, task, tokenizer):
    """TRL caches them beside the files of the data, by rows and model."""
    make_preferences(task, ragged=True).to_parquet(tmp_path / "rows.parquet")
    make_model(tokenizer).save_pretrained(tmp_path / "base")
    for normalize in ("trie", "vocab"):
        rows = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
        trainer = make_trainer(
            tmp_path / "out", str(tmp_path / "base"), rows, task, normalize=normalize,
            precompute_ref_log_probs=True,
        )  # fmt: skip
        batch = first_batch(trainer)
        with torch.no_grad():
            now = trainer._log_probs(trainer.model.eval(), batch)
        torch.testing.assert_close(batch["ref_chosen_logps"], now[:, 0], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(batch["ref_rejected_logps"], now[:, 1:], atol=1e-3, rtol=1e-4)
    # Rows with more rejected items come along, and the training goes on with its own
    trainer.evaluate(make_preferences(task, num_rejected=6, num_rows=8), metric_key_prefix="other")
    trainer.train()


def test_a_reference_with_an_adapter(tmp_path, task, tokenizer):
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    reference, rows, found = get_peft_model(make_model(tokenizer), config), make_preferences(task), []
    for ref_model in (copy.deepcopy(reference).merge_and_unload(), reference):
        trainer = make_trainer(tmp_path, make_model(tokenizer), rows, task, ref_model=ref_model)
        found.append(trainer.compute_ref_log_probs(trainer.ref_model, first_batch(trainer))[1])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_policy_and_reference_of_other_attention(tmp_path, task, tokenizer):
    rows = make_preferences(task)
    model, reference = make_model(tokenizer), make_model(tokenizer)
    reference.set_attn_implementation("eager")
    trainer = make_trainer(tmp_path, model, rows, task, ref_model=reference)
    batch = first_batch(trainer)
    with torch.no_grad():
        ours = trainer._log_probs(model, batch)
    torch.testing.assert_close(trainer.compute_ref_log_probs(reference, batch)[0], ours[:, 0], atol=1e-4, rtol=1e-4)


def test_rows_that_the_user_tokenised(tmp_path, task, tokenizer):
    rows = make_preferences(task)
    kwargs = {
        "fn_kwargs": {"task": task},
        "remove_columns": rows.column_names,
        "batched": True,
    }
    tokenized = rows.map(tokenize_preferences, **kwargs)
    trainer = make_trainer(tmp_path, make_model(tokenizer), tokenized, task, ref_model=make_model(tokenizer))
    assert trainer.train_dataset[0] == tokenized[0]
    with pytest.raises(ValueError, match="`predict` is not supported"):
        trainer.predict(tokenized)
    cut = tokenized.map(lambda row: {"chosen_ids": row["chosen_ids"][:-1]})
    none = tokenized.map(lambda row, index: {"rejected_ids": row["rejected_ids"][: 1 - index % 2]}, with_indices=True)
    flat = tokenized.map(lambda row: {"rejected_ids": row["rejected_ids"][0]})
    for wrong, message, other_task in (
        (cut, r"has 40 completion\(s\) that are not items of the task", task),
        (flat, "but not in each row `chosen_ids`, a list of tokens, and `rejected_ids`", task),
        (none, "but not in each row `chosen_ids`, a list of tokens, and `rejected_ids`", task),
        (tokenized, r"`max_length` = 20: 40 row\(s\) of the train dataset are longer", replace(task, max_length=20)),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, make_model(tokenizer), wrong, other_task)


def test_columns_with_gaps_and_too_many():
    rows = Dataset.from_list([{"rejected1": "a", "rejected2": None}, {"rejected1": "a", "rejected2": "b"}])
    assert gather_rejected(rows)["rejected"][:] == [["a"], ["a", "b"]]
    with pytest.raises(ValueError, match="has a column 'rejected' and .'rejected2'."):
        gather_rejected(Dataset.from_list([{"rejected": "a", "rejected2": "b"}]))


def test_virtual_tokens_and_padding(tmp_path, task, tokenizer, trie):
    from peft import PromptTuningConfig

    rows = make_preferences(task)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = make_trainer(tmp_path, make_model(tokenizer), rows, task, max_steps=1, peft_config=config)
    assert not trainer.data_collator.share_prompt
    trainer.train()
    collator = DataCollatorForSoftmaxPreference(trie, 0, pad_to_multiple_of=64)
    batch = collator([trainer.train_dataset[0]])
    assert batch["input_ids"].shape[1] % 64 == 0 and batch["segments"][0, -1] == -1


@pytest.mark.parametrize("is_tokenized", [False, True])
def test_empty_datasets(is_tokenized, tmp_path, task, tokenizer):
    rows = make_preferences(task, num_rows=4)
    if is_tokenized:
        rows = rows.map(tokenize_preferences, batched=True, fn_kwargs={"task": task}, remove_columns=rows.column_names)
    model, reference = make_model(tokenizer), make_model(tokenizer)
    for empty in (rows.select([]), rows.to_iterable_dataset().take(0)):
        with pytest.raises(ValueError, match="The train dataset is empty: pass at least one row"):
            make_trainer(tmp_path, model, empty, task, ref_model=reference)
        with pytest.raises(ValueError, match="The other dataset is empty: pass at least one row"):
            make_trainer(tmp_path, model, rows, task, ref_model=reference, eval_dataset={"other": empty})
    trainer = make_trainer(tmp_path, model, rows, task, ref_model=reference)
    with pytest.raises(ValueError, match="The eval dataset is empty: pass at least one row"):
        trainer.evaluate(rows.select([]))


def test_a_stream_of_rows(tmp_path, task, tokenizer):
    """Trained on like the same rows in memory."""
    rows, losses = make_preferences(task), []
    for train_dataset in (rows, rows.to_iterable_dataset()):
        models = (make_model(tokenizer, seed=seed) for seed in (0, 1))
        trainer = make_trainer(tmp_path, next(models), train_dataset, task, ref_model=next(models), max_steps=1)
        losses.append(trainer.evaluate(train_dataset)["eval_loss"])
        trainer.train()
    assert losses[1] == pytest.approx(losses[0])


def test_a_diverged_model_says_so(tmp_path, task, tokenizer, caplog):
    model, rows = make_model(tokenizer), make_preferences(task)
    trainer = make_trainer(tmp_path, model, rows, task, ref_model=make_model(tokenizer), max_steps=2)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    trainer.train()
    assert caplog.text.count("the training has diverged") == 1
    assert np.isnan(float(trainer.state.log_history[0]["loss"]))
