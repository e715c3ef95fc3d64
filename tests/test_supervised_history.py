# SPDX-License-Identifier: Apache-2.0
"""Histories tokenised item by item, every item of them a target, and items that are single tokens."""

import copy
from dataclasses import replace

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
    build_rows,
    evaluate_recommendations,
    masked_softmax_loss,
    tokenize_rows,
)
from trl_msl.data import encode_items, fit_prompts
from trl_msl.experiments.from_scratch import item_tokenizer
from trl_msl.training import add_sparse_lm_head


# What comes after a history is what stands between its items: a shorter history is the beginning of a longer one
TEMPLATE = PromptTemplate("Read: {history}; ", separator="; ", separate_items=True)


@pytest.fixture(scope="module")
def task(catalog, tokenizer):
    return RankingTask(catalog, tokenizer, TEMPLATE)


@pytest.fixture(scope="module")
def chat_task(catalog, tokenizer):
    return RankingTask(catalog, tokenizer, replace(TEMPLATE, conversational=True))


@pytest.fixture(scope="module")
def rows(catalog, task):
    return build_rows(make_windows(catalog.ids), task)


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("shortened", [False, True])
def test_labels_of_a_history(conversational, shortened, catalog, tokenizer, task, chat_task):
    """Read back from the right, by the texts alone."""
    max_length = None if not shortened else 60 if conversational else 40
    task = replace(chat_task if conversational else task, max_length=max_length)
    trie = task.trie
    rows = build_rows(make_windows(catalog.ids), task)
    encoded = tokenize_rows(rows[:], task, supervise_history=True)
    num_dropped = 0
    for row, ids, labels in zip(rows, encoded["input_ids"], encoded["labels"]):
        completion = catalog.completions[catalog.index_of_id[row["item_id"]]]
        (target,) = encode_items(tokenizer, [completion], conversational)
        assert trie.tokens(torch.tensor(labels[-len(target) :])).tolist() == target == ids[-len(target) :]
        expected = [-100] * (len(ids) - len(target))
        after = "; " if not conversational else "; <|im_end|>\n<|im_start|>assistant\n"
        place = len(expected) - len(tokenizer(after, add_special_tokens=False)["input_ids"])
        gap = len(tokenizer("; ", add_special_tokens=False)["input_ids"])
        histories = list(reversed(row["history"]))
        for number, text in enumerate(histories):
            written = tokenizer(text, add_special_tokens=False)["input_ids"]
            place -= len(written)
            assert ids[place : place + len(written)] == written
            before = tokenizer.decode(ids[:place], skip_special_tokens=False)
            if before.endswith("Read: "):  # the oldest one that is left has nothing to follow from
                num_dropped += len(histories) - 1 - number
                break
            (sequence,) = encode_items(tokenizer, [text], conversational)
            expected[place : place + len(sequence)] = trie.walk(torch.tensor(sequence)).tolist()
            place -= gap
        assert labels[: len(expected)] == expected
    assert (num_dropped > 0) == shortened


def test_one_forward_gives_the_losses_of_all_shorter_histories(catalog, tokenizer, task):
    model = make_model(tokenizer)
    add_sparse_lm_head(model, task.trie)

    def loss(rows, **kwargs):
        encoded = tokenize_rows(rows, task, **kwargs)
        total = 0.0
        for ids, labels in zip(encoded["input_ids"], encoded["labels"]):
            output = model(torch.tensor([ids]), labels=torch.tensor([labels]), sparse_lm_head=True)
            total = total + masked_softmax_loss(output.logits, output.valid_mask, output.targets).sum()
        return total

    windows = make_windows(catalog.ids, num_rows=6)
    at_once = loss(build_rows(windows, task)[:], supervise_history=True)
    prefixes = [window["item_ids"][:end] for window in windows for end in range(2, len(window["item_ids"]) + 1)]
    one_by_one = loss(build_rows(type(windows).from_dict({"item_ids": prefixes}), task)[:])
    torch.testing.assert_close(at_once, one_by_one)
    gradients = [torch.autograd.grad(value, list(model.parameters())) for value in (at_once, one_by_one)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_labels_as_tokens(rows, task):
    trie = task.trie
    nodes, tokens = (
        tokenize_rows(rows[:], task, labels=form, supervise_history=True)["labels"] for form in ("nodes", "tokens")
    )
    for row, other in zip(nodes, tokens):
        assert [node == -100 for node in row] == [token == -100 for token in other]
        assert [int(trie.tokens(torch.tensor(node))) for node in row if node != -100] == [
            t for t in other if t != -100
        ]


def test_trainer(tmp_path, rows, tokenizer, task):
    trainer = MSLTrainer(
        make_model(tokenizer),
        MSLConfig(
            str(tmp_path), supervise_history=True, temperature=1.0, max_steps=100, learning_rate=1e-2, use_cpu=True,
            per_device_train_batch_size=8, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        ),
        task=task, train_dataset=rows,
    )  # fmt: skip
    trainer.train()
    # learned by heart, and recommended from prompts that are tokenised in the same way
    metrics = evaluate_recommendations(trainer.model, task, rows, (1,))
    assert metrics["hr@1"] > 0.5

    def make(train_dataset):
        return MSLTrainer(make_model(tokenizer), trainer.args, task=task, train_dataset=train_dataset)

    # rows that the user tokenised, where an end stands over another token
    assert make(trainer.train_dataset).train_dataset[:] == trainer.train_dataset[:]
    last_items = rows.map(tokenize_rows, batched=True, remove_columns=rows.column_names, fn_kwargs={"task": task})
    kwargs = {"train_dataset": rows, "eval_dataset": {"train": rows}}
    evaluated = MSLTrainer(make_model(tokenizer), trainer.args, task=task, **kwargs).eval_dataset["train"]
    assert evaluated["labels"][:] == last_items["labels"][:]  # whatever its name
    with pytest.raises(ValueError, match="the 40 tokenised rows .* have only 40 targets, their last items"):
        make(last_items)
    with pytest.raises(ValueError, match="has 40 label.* that are not nodes of their tokens in the task's trie"):
        make(trainer.train_dataset.map(lambda row: {"input_ids": row["input_ids"][:-1] + [0]}))


@pytest.mark.parametrize("conversational", [False, True])
def test_trainer_with_histories_of_one_item(tmp_path, conversational, catalog, tokenizer, task, chat_task):
    """There is nothing more to supervise, so that tokenised rows of both kinds are the same, and right."""
    task = chat_task if conversational else task

    def make(windows):
        rows = build_rows(windows, task)
        tokenized = rows.map(tokenize_rows, batched=True, remove_columns=rows.column_names, fn_kwargs={"task": task})
        args = MSLConfig(
            str(tmp_path), supervise_history=True, use_cpu=True, bf16=False, report_to="none",
            per_device_train_batch_size=8, max_steps=1,
        )  # fmt: skip
        return MSLTrainer(make_model(tokenizer), args, task=task, train_dataset=tokenized)

    windows = make_windows(catalog.ids)
    short = windows.map(lambda window: {"item_ids": window["item_ids"][:2]})
    assert len(make(short).train_dataset) == len(short)
    one_longer = [*short["item_ids"][:-1], windows[-1]["item_ids"]]
    with pytest.raises(ValueError, match="the 40 tokenised rows of the train dataset have only 40 targets"):
        make(Dataset.from_dict({"item_ids": one_longer}))


def test_items_as_tokens(catalog):
    """A trie of depth one: then MSL is the full softmax over items."""
    catalog = ItemCatalog(catalog.ids, catalog.ids)
    tokenizer = item_tokenizer(catalog.completions)
    task = RankingTask(catalog, tokenizer, PromptTemplate("{history}", separate_items=True))
    trie = task.trie
    assert trie.num_nodes == 1 + 2 * len(catalog)  # an item, and the end that is forced
    rows = build_rows(make_windows(catalog.ids), task)
    encoded = tokenize_rows(rows[:], task, supervise_history=True)
    for row, ids, labels in zip(rows, encoded["input_ids"], encoded["labels"]):
        items = [*row["history_ids"], row["item_id"]]
        assert tokenizer.convert_ids_to_tokens(ids) == ["<|bos|>", *items, "<|eos|>"]
        assert trie.tokens(torch.tensor(labels[2:])).tolist() == ids[2:]
        assert labels[:2] == [-100, -100]
    model = make_model(tokenizer)
    add_sparse_lm_head(model, trie)
    ids, labels = (torch.tensor([encoded[name][0]]) for name in ("input_ids", "labels"))
    output = model(ids, labels=labels, sparse_lm_head=True)
    losses = masked_softmax_loss(output.logits, output.valid_mask, output.targets)
    items = torch.tensor(tokenizer.convert_tokens_to_ids(catalog.ids))
    logits = model(ids).logits[0, 1:-2][:, items]
    targets = torch.searchsorted(items, ids[0, 2:-1])
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))


# ---------------------------------------------------------------------- bad input


def test_templates_that_do_not_fit(rows, catalog, template, task):
    plain = replace(task, prompt_template=template)
    with pytest.raises(ValueError, match="`supervise_history` needs .* `separate_items=True`"):
        tokenize_rows(build_rows(make_windows(catalog.ids), plain)[:], plain, supervise_history=True)
    with pytest.raises(ValueError, match="`separate_items` needs rows with a `history` column"):
        tokenize_rows({k: v for k, v in rows[:].items() if k != "history"}, task)
    other = replace(task, prompt_template=PromptTemplate("{history}", separate_items=True))
    with pytest.raises(ValueError, match="`prompt_template` must be the one that the rows were made with"):
        tokenize_rows(rows[:], other)
    with pytest.raises(ValueError, match="`separate_items` is 1: it must be `True` or `False`"):
        PromptTemplate("{history}", separate_items=1)


def test_histories_of_nothing(rows, task):
    batch = {name: values[:2] for name, values in rows[:].items()}
    batch |= {"history": [[], []], "prompt": [TEMPLATE.render([])] * 2}
    assert tokenize_rows(batch, task, supervise_history=True) == tokenize_rows(batch, task)


def test_chat_templates_without_the_users_message(catalog, tokenizer, chat_task):
    silent = copy.deepcopy(tokenizer)
    silent.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    chat_rows = build_rows(make_windows(catalog.ids), chat_task)
    with pytest.raises(ValueError, match="writes a user's message 0 times, but .* exactly once"):
        fit_prompts(silent, chat_rows[:], [100] * len(chat_rows), chat_task.prompt_template)


def test_items_with_commas_are_not_tokens():
    with pytest.raises(
        ValueError, match="`items` holds 1 with a comma, which separates items, such as 'a, b': use ids"
    ):
        item_tokenizer(["a", "a, b"])


def test_histories_off_the_catalogue(rows, task):
    batch = rows[:]
    batch["history"][0] = ['"Ulysses"', '"Dune"']
    batch["prompt"][0] = TEMPLATE.render(batch["history"][0])
    with pytest.raises(
        ValueError, match=r"`history` holds 1 text\(s\) that are not items of the trie, such as .*Ulysses"
    ):
        tokenize_rows(batch, task, supervise_history=True)
