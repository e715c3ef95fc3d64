# SPDX-License-Identifier: Apache-2.0
"""Item vectors in prompts: what they change, what they leave alone, and that they survive."""

import copy
import random
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from helpers import make_model, make_windows
from launching import FEW_STEPS, run
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trl_msl import (
    ItemCatalog,
    MSLConfig,
    MSLTrainer,
    PromptTemplate,
    RankingTask,
    Recommender,
    SoftmaxDPOConfig,
    SoftmaxDPOTrainer,
    TrieDecoder,
    build_preferences,
    build_rows,
    draw_negatives,
    masked_softmax_loss,
    tokenize_rows,
)
from trl_msl.data import read_item_vectors, write_item_vectors
from trl_msl.model import add_item_vectors, get_item_vectors, load_item_vectors, save_item_vectors
from trl_msl.scripts import dpo, evaluate, merge, train, update_catalog
from trl_msl.training import ItemVectorCurriculum, add_sparse_lm_head
from trl_msl.trie import FIRST_VECTOR_TOKEN


TEMPLATE = PromptTemplate("Read: {history}; ", separator="; ", separate_items=True, vector_tokens=True)


@pytest.fixture(scope="module")
def task(catalog, tokenizer):
    return RankingTask(catalog, tokenizer, TEMPLATE)


@pytest.fixture(scope="module")
def vectors(catalog):
    return torch.randn(len(catalog), 6, generator=torch.Generator().manual_seed(0)) * 0.01


def encode(task, num_rows=8, **kwargs):
    return tokenize_rows(build_rows(make_windows(task.catalog.ids, num_rows), task)[:], task, **kwargs)


def test_prompts(catalog, tokenizer, task):
    rows = build_rows(make_windows(catalog.ids, 8), task)
    plain = replace(task, prompt_template=replace(TEMPLATE, vector_tokens=False))
    first = [catalog.texts.index(text) for text in catalog.texts]  # of items with the same text
    for row, with_vectors, without in zip(rows, task.ranking_prompts(rows[:]), plain.ranking_prompts(rows[:])):
        assert [token for token in with_vectors if token < FIRST_VECTOR_TOKEN] == without
        history = [first[index] for index in catalog.indices(row["history_ids"])]
        assert [token - FIRST_VECTOR_TOKEN for token in with_vectors if token not in without] == history
        for index, text in zip(history, row["history"]):
            title = tokenizer(text, add_special_tokens=False)["input_ids"]
            place = with_vectors.index(FIRST_VECTOR_TOKEN + index)
            assert with_vectors[place - len(title) : place] == title
    with pytest.raises(ValueError, match="`prompts` are without their items' vectors"):
        task.encode_prompts(rows["prompt"][:])
    with pytest.raises(ValueError, match="`vector_tokens` needs `separate_items=True`"):
        PromptTemplate("{history}; ", vector_tokens=True)


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_a_vector_changes_what_follows_it_and_nothing_else(tie_word_embeddings, tokenizer, task, vectors):
    model = make_model(tokenizer, tie_word_embeddings=tie_word_embeddings)
    ids = torch.tensor([encode(task, 1)["input_ids"][0]])
    text = ids[ids < FIRST_VECTOR_TOKEN][None]
    before = model(text).logits
    names = list(model.state_dict())
    module = add_item_vectors(model, vectors)
    assert torch.equal(model(text).logits, before) and list(model.state_dict()) == names
    assert model.load_state_dict(model.state_dict()).missing_keys == []
    logits = model(ids).logits
    place = int((ids[0] >= FIRST_VECTOR_TOKEN).nonzero()[1])
    other = copy.deepcopy(model)
    get_item_vectors(other).table[ids[0, place] - FIRST_VECTOR_TOKEN] += 1
    changed = other(ids).logits
    assert torch.equal(changed[:, :place], logits[:, :place])
    assert (changed[:, place:] != logits[:, place:]).any(dim=-1).all()
    assert torch.equal(model(ids).logits, logits)  # the copy has vectors of its own
    embedded = model.get_input_embeddings()
    assert module(torch.arange(12) + FIRST_VECTOR_TOKEN).std().item() == pytest.approx(
        embedded(torch.arange(300)).std().item(), rel=0.1
    )
    new = module(torch.tensor([FIRST_VECTOR_TOKEN + len(vectors)]))
    module.table[3] = vectors.mean(dim=0)
    torch.testing.assert_close(module(torch.tensor([FIRST_VECTOR_TOKEN + 3])), new)  # the declared default


def test_labels_are_never_vectors_and_never_follow_from_their_own(tokenizer, task, vectors):
    """The losses of a history's items are those of the shorter histories, one by one."""
    model = make_model(tokenizer)
    add_item_vectors(model, vectors)
    add_sparse_lm_head(model, task.trie)

    def loss(rows, **kwargs):
        encoded = tokenize_rows(rows, task, **kwargs)
        total = 0.0
        for ids, labels in zip(encoded["input_ids"], encoded["labels"]):
            output = model(torch.tensor([ids]), labels=torch.tensor([labels]), sparse_lm_head=True)
            total = total + masked_softmax_loss(output.logits, output.valid_mask, output.targets).sum()
        return total

    windows = make_windows(task.catalog.ids, num_rows=5)
    at_once = loss(build_rows(windows, task)[:], supervise_history=True)
    prefixes = [window["item_ids"][:end] for window in windows for end in range(2, len(window["item_ids"]) + 1)]
    one_by_one = loss(build_rows(Dataset.from_dict({"item_ids": prefixes}), task)[:])
    torch.testing.assert_close(at_once, one_by_one)
    assert all(
        label < task.trie.num_nodes for labels in encode(task, supervise_history=True)["labels"] for label in labels
    )


def test_exact_decoding_equals_scores_of_all_items(tokenizer, task, vectors):
    model = make_model(tokenizer)
    add_item_vectors(model, vectors)
    prompts = task.ranking_prompts(build_rows(make_windows(task.catalog.ids, 3), task)[:])
    found = TrieDecoder(model, task.trie).search(prompts, top_k=len(task.catalog))
    sequences, trie = task.encode_items(task.catalog.completions), task.trie
    for prompt, items, scores in zip(prompts, found.items.tolist(), found.scores.tolist()):
        for item, score in zip(items, scores):
            log_probs = model(torch.tensor([prompt + sequences[item]])).logits[0].detach().log_softmax(dim=-1)
            expected, node = 0.0, torch.tensor(0)
            for place, token in enumerate(sequences[item]):
                row = log_probs[len(prompt) - 1 + place]
                valid = trie.tokens(torch.tensor(trie.children(int(node))))
                expected += float(row[token] - row[valid].logsumexp(dim=0))
                node = trie.child(node, torch.tensor(token))
            assert score == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="`prompts` has vectors of items, but `model` has none"):
        TrieDecoder(make_model(tokenizer), task.trie).search(prompts, top_k=1)


@pytest.mark.parametrize("adapted", [False, True])
def test_training_resuming_saving_and_loading(adapted, tmp_path, tokenizer, base_model, task, vectors):
    rows = build_rows(make_windows(task.catalog.ids), task)

    def make(folder, **kwargs):
        options = {"max_steps": 4, "save_steps": 2, "use_cpu": True, "bf16": False, "report_to": "none", **kwargs}
        trainer = MSLTrainer(
            str(base_model),
            MSLConfig(str(folder), per_device_train_batch_size=4, learning_rate=1e-2, **options),
            task=task,
            train_dataset=rows,
            peft_config=LoraConfig(r=2, target_modules="all-linear") if adapted else None,
        )
        trainer.processing_class.save_pretrained(folder)
        return trainer

    with pytest.raises(ValueError, match="call `add_item_vectors"):
        make(tmp_path / "none").train()
    preferences = build_preferences(rows, task, draw_negatives(rows, task, num_negatives=2))
    with pytest.raises(ValueError, match="call `load_item_vectors"):
        config = SoftmaxDPOConfig(str(tmp_path / "none"), use_cpu=True, bf16=False)
        SoftmaxDPOTrainer(str(base_model), args=config, task=task, train_dataset=preferences)
    trainer = make(tmp_path / "whole")
    module = add_item_vectors(trainer.model, vectors)
    trainer.add_callback(ItemVectorCurriculum())
    start = {name: tensor.clone() for name, tensor in module.tensors().items()}
    embeddings = trainer.model.get_input_embeddings().weight.clone()
    trainer.train()
    trainer.save_model()
    trained = module.tensors()
    assert torch.equal(trained["vectors"], vectors) and torch.equal(start["vectors"], vectors)
    assert all(not torch.equal(trained[name], start[name]) for name in start if name != "vectors")
    assert torch.equal(trainer.model.get_input_embeddings().weight, embeddings) == adapted

    resumed = make(tmp_path / "whole")
    others = add_item_vectors(resumed.model, vectors)
    resumed.add_callback(ItemVectorCurriculum())
    with torch.no_grad():
        others.first_weight.zero_()
    resumed.train(str(tmp_path / "whole" / "checkpoint-2"))
    strangers = make(tmp_path / "whole")
    add_item_vectors(strangers.model, vectors + 1)
    with pytest.raises(ValueError, match="was trained with `item_vectors`"):
        strangers.train(str(tmp_path / "whole" / "checkpoint-2"))

    recommender = Recommender.from_pretrained(tmp_path / "whole")
    recommender.save_pretrained(tmp_path / "again")
    again = Recommender.from_pretrained(tmp_path / "again")
    for other in (others, get_item_vectors(recommender.model), get_item_vectors(again.model)):
        assert all(torch.equal(trained[name], tensor) for name, tensor in other.tensors().items())
    histories = [["b0", "b3"], ["b9"]]
    found, expected = (
        Recommender(model, task).recommend(histories, k=5) for model in (again.model, trainer.model.eval())
    )
    assert found.ids == expected.ids
    assert not any("item_vectors" in name for name in load_file(next((tmp_path / "whole").glob("*model.safetensors"))))


def test_the_curriculum_gives_the_logits_of_prompts_without_vectors(tokenizer, task, vectors):
    model = make_model(tokenizer)
    add_item_vectors(model, vectors)
    first, second = (torch.tensor([row]) for row in encode(task, 2)["input_ids"])
    curriculum = ItemVectorCurriculum()
    config = MSLConfig("unused", use_cpu=True, bf16=False)
    curriculum.on_train_begin(config, None, None, model=model)
    curriculum.on_train_begin(config, None, None, model=model)  # as after a training that was broken off
    expected = model(first).logits
    model.train()
    texts = [ids < FIRST_VECTOR_TOKEN for ids in (first, second)]
    for share in (0.0, 1.0):
        curriculum.share = share
        logits = model(input_ids=first).logits
        if share:
            torch.testing.assert_close(logits, expected)
        else:
            torch.testing.assert_close(logits[texts[0]], model(input_ids=first[texts[0]][None]).logits[0])
    curriculum.on_train_end(config, None, None)
    curriculum.share = 0.0
    torch.testing.assert_close(model(input_ids=first).logits, expected)  # in training mode, without a hook
    with pytest.raises(ValueError, match="`packing` and `padding_free`"):
        curriculum.on_train_begin(MSLConfig("unused", use_cpu=True, bf16=False, packing=True), None, None, model=model)


def test_a_model_learns_what_only_vectors_tell(tmp_path, tokenizer):
    """The titles are meaningless, and those of the histories to test are in no training row."""
    rng = random.Random(0)
    titles = ["".join(rng.choices("abcdefgh", k=4)) for _ in range(36)]
    catalog = ItemCatalog([str(index) for index in range(36)], titles)
    groups = torch.arange(36) % 4  # what follows an item is the item, one of the first four, that its group tells
    vectors = torch.nn.functional.one_hot(groups, 6) + 0.1 * torch.randn(
        36, 6, generator=torch.Generator().manual_seed(0)
    )
    windows = [{"item_ids": [str(index), str(index % 4)]} for index in range(4, 36)]
    task, accuracy = RankingTask(catalog, tokenizer, TEMPLATE), {}
    for kind, table in (("vectors", vectors), ("constant", torch.ones(36, 6))):
        trainer = MSLTrainer(
            AutoModelForCausalLM.from_config(make_model(tokenizer).config),
            MSLConfig(
                str(tmp_path), max_steps=60, per_device_train_batch_size=24, learning_rate=3e-3, warmup_steps=5,
                save_strategy="no", use_cpu=True, bf16=False, report_to="none", temperature=1.0,
                gradient_checkpointing=False,
            ),
            task=task,
            train_dataset=build_rows(Dataset.from_list(windows[:24]), task),
        )  # fmt: skip
        add_item_vectors(trainer.model, table)
        trainer.train()
        histories = [window["item_ids"][:1] for window in windows[24:]]
        best = Recommender(trainer.model, task).recommend(histories, k=1).ids
        accuracy[kind] = sum(ids[0] == window["item_ids"][1] for ids, window in zip(best, windows[24:])) / 8
    assert accuracy["vectors"] >= 0.75 and accuracy["constant"] <= 0.5, accuracy


def test_tables_of_vectors(tmp_path, catalog):
    vectors, path = torch.randn(len(catalog), 3), tmp_path / "vectors.safetensors"
    save_file({"any name": vectors}, path)
    assert torch.equal(read_item_vectors(path, catalog), vectors)
    write_item_vectors(path, vectors[:3], ["b5", "sold no more", "b2"])
    table = read_item_vectors(path, catalog)
    assert torch.equal(table[[5, 2]], vectors[[0, 2]])
    assert torch.equal(table[0], vectors[[0, 2]].mean(dim=0)) and torch.equal(table[11], table[0])
    for broken, message in (
        ({"vectors": vectors[:3]}, "3 vectors for 12 items"),
        ({"vectors": vectors / 0}, "or not finite"),
        ({"vectors": vectors.long()}, "torch.int64"),
        ({}, "can't be used"),
        ({"users": vectors, "items": vectors + 1}, "name one of them `vectors`"),
        ({"vectors": vectors.to(torch.float8_e4m3fn)}, "isfinite"),
    ):
        save_file(broken, path)
        with pytest.raises(ValueError, match=message):
            read_item_vectors(path, catalog)
    write_item_vectors(path, vectors[:2], ["b1", "b1"])
    with pytest.raises(ValueError, match="are there twice"):
        read_item_vectors(path, catalog)
    write_item_vectors(path, vectors[:1], ["another shop's"])
    with pytest.raises(ValueError, match="none of its items"):
        read_item_vectors(path, catalog)
    with pytest.raises(ValueError, match="is missing"):
        read_item_vectors(tmp_path / "none", catalog)


def test_saved_vectors_are_checked(tmp_path, tokenizer, vectors):
    model, path = make_model(tokenizer), tmp_path / "item_vectors.safetensors"
    assert load_item_vectors(model, tmp_path) is None
    tensors = add_item_vectors(make_model(tokenizer, hidden_size=16), vectors).tensors()
    for broken in (tensors, {"vectors": vectors}, {**tensors, "vectors": vectors / 0}):
        save_file({name: tensor.contiguous() for name, tensor in broken.items()}, path)
        with pytest.raises(ValueError, match="does not hold item vectors of this model"):
            load_item_vectors(model, tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="does not hold item vectors of this model"):
        load_item_vectors(model, tmp_path)
    assert get_item_vectors(model) is None
    exact = add_item_vectors(model, vectors).fingerprint()
    model.to(torch.bfloat16)  # casts all but the vectors
    save_item_vectors(model, tmp_path)
    assert load_item_vectors(make_model(tokenizer), tmp_path).fingerprint() == exact


def test_commands(tmp_path, tokenizer, folder, base_model, vectors):
    """LLaRA, and all that is made of it, without another option."""
    write_item_vectors(tmp_path / "sasrec.safetensors", vectors, [str(index) for index in range(len(vectors))])
    config = ROOT / "recipes" / "configs" / "llara.yaml"
    small = ["--dtype", "float32", "--save_steps", 2, *FEW_STEPS, "--data_dir", folder, "--use_cpu"]
    small += ["--max_validation_users", 4, "--item_vectors", tmp_path / "sasrec.safetensors"]
    run(train, "--config", config, "--model_name_or_path", base_model, "--output_dir", tmp_path / "llara", *small)
    saved = load_file(tmp_path / "llara" / "item_vectors.safetensors")
    assert torch.equal(saved["vectors"], vectors)

    assert not torch.equal(saved["first_weight"], add_item_vectors(make_model(tokenizer), vectors).first_weight)
    expected = pd.read_parquet(tmp_path / "llara" / "rankings.parquet")

    def name_model(name, output):
        return ["--model_name_or_path", tmp_path / name, "--output_dir", tmp_path / output]

    items = tmp_path / "new.csv"
    items.write_text("item_id,title\nnew,A New Book\n")
    run(merge, *name_model("llara", "merged"))
    run(update_catalog, *name_model("merged", "updated"), "--add", items, "--withdraw", 1)
    for name in ("llara", "merged"):
        run(evaluate, *name_model(name, "evaluated"), "--decoding", "exact", "generate")
        pd.testing.assert_frame_equal(
            pd.read_parquet(next(tmp_path.glob("evaluated/exact*/rankings.parquet"))), expected
        )
        run(dpo, *name_model(name, f"{name}-dpo"), "--num_negatives", 2, *FEW_STEPS, "--learning_rate", 1e-3)
    run(
        train, *name_model("llara-dpo", "further"), "--data_dir", folder, *FEW_STEPS
    )  # the projector, too, which DPO has not changed
    for name in ("merged", "updated", "llara-dpo", "merged-dpo", "further"):
        other = load_file(tmp_path / name / "item_vectors.safetensors")
        same = [torch.equal(saved[part], other[part]) for part in saved]
        assert all(same) == (name != "further") and torch.equal(other["vectors"], vectors)
    updated = Recommender.from_pretrained(tmp_path / "updated")
    found = updated.recommend([["new", "4"]], k=5).ids[0]
    assert "1" not in found and "new" not in found
