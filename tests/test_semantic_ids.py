# SPDX-License-Identifier: Apache-2.0
"""Items as semantic ids: their codes, the model's new tokens, and a training on them, from titles to new items."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from helpers import TITLES, make_model, score_every_item
from launching import FEW_STEPS, PROMPT, run
from safetensors.torch import load_file, save_file
from test_decoding import check_ranking
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from trl_msl import (
    RankingTask,
    Recommender,
    SoftmaxDPOConfig,
    SoftmaxDPOTrainer,
    TrieDecoder,
    build_rows,
    tokenize_rows,
)
from trl_msl.data import DataArguments, SemanticIds, add_rows
from trl_msl.model import add_embeddings, embed_titles, embedding_names
from trl_msl.recommender import load_adapter
from trl_msl.scripts import semantic_ids, train, update_catalog
from trl_msl.scripts.loading import TRAINABLE_TOKENS_FILE, read_trainable_tokens
from trl_msl.scripts.semantic_ids import code_new_items, split_titles
from trl_msl.scripts.trained import load_trained


NEW_TITLE = "The Silver Sea"
SIZES = ["--num_levels", 2, "--codebook_size", 4]


def make_quantizer(num_levels=3, size=5, dim=6):
    generator = torch.Generator().manual_seed(0)
    codebooks = torch.randn(num_levels, size, dim, generator=generator)
    return SemanticIds(codebooks, torch.randn(9, generator=generator), torch.randn(9, dim, generator=generator))


def split(text):
    return text.replace("><", "> <").split(" ")


def nearest_centroids(quantizer, vectors):
    """Codes vector by vector and level by level."""
    codes = []
    for vector in ((vectors - quantizer.mean).double() @ quantizer.projection.double()).numpy():
        codes.append([])
        vector = vector / np.linalg.norm(vector)
        for centroids in quantizer.codebooks.double().numpy():
            codes[-1].append(int(np.argmin([np.sum((vector - centroid) ** 2) for centroid in centroids])))
            vector = vector - centroids[codes[-1][-1]]
    return codes


def test_codes_are_the_nearest_centroids_of_what_is_left():
    quantizer, vectors = make_quantizer(), torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    codes = quantizer.encode(vectors)
    assert codes.tolist() == nearest_centroids(quantizer, vectors)
    assert torch.equal(quantizer.encode(vectors[7:8]), codes[7:8])
    with pytest.raises(ValueError, match="fitted to vectors of 9 numbers"):
        quantizer.encode(vectors[:, :5])


def test_fitted_codebooks():
    pytest.importorskip("faiss", reason='needs pip install "trl_msl[semantic]"')
    vectors = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    vectors[:, 0] *= 100  # would decide all codes
    first, again, other = (SemanticIds.fit(vectors, 3, 8, seed) for seed in (0, 0, 1))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    codes = first.encode(vectors)
    assert codes.tolist() == nearest_centroids(first, vectors)
    residual, lost = (vectors - first.mean) @ first.projection, [200.0]
    torch.testing.assert_close(residual.T @ residual / 200, torch.eye(6), atol=1e-3, rtol=0)
    residual = residual / residual.norm(dim=1, keepdim=True)
    for level, centroids in enumerate(first.codebooks):
        residual = residual - centroids[codes[:, level]]
        lost.append(float(residual.square().sum()))
    assert all(after < 0.75 * before for before, after in zip(lost, lost[1:]))
    with pytest.raises(ValueError, match="`vectors` are all the same"):
        SemanticIds.fit(vectors[:1].expand(8, 6), codebook_size=8)
    with pytest.raises(ValueError, match="`codebook_size` is 6: it must be a power of two, from 2 to .* 200"):
        SemanticIds.fit(vectors, codebook_size=6)


def test_items_with_the_same_codes_are_told_apart():
    quantizer = make_quantizer(num_levels=2, size=3)
    codes = torch.tensor([[0, 1], [0, 1], [2, 2], [0, 1], [0, 1], [0, 1]])
    texts = quantizer.write(codes)
    ids = ["<a_0><b_1>", "<a_0><b_1><c_0>", "<a_2><b_2>", "<a_0><b_1><c_1>", "<a_0><b_1><c_2>", "<a_0><b_1><c_2>"]
    assert texts == ids  # the last two share: there is no fourth token
    assert quantizer.write(codes[2:3], taken=texts) == ["<a_2><b_2><c_0>"]
    assert quantizer.write(codes[:1], taken=texts[:2]) == ["<a_0><b_1><c_1>"]
    assert set("".join(texts).replace("><", "> <").replace("><", "> <").split(" ")) <= set(
        " ".join(quantizer.tokens).split()
    )
    assert all(map(quantizer.has_written, texts))
    assert not any(map(quantizer.has_written, ["Dune", "<a_0>", "<b_0><a_1>", "<a_0><b_1> ", texts[1] + "<d_0>"]))
    assert len(quantizer.tokens) == len(set(quantizer.tokens)) == 9


def test_a_quantiser_is_read_as_it_was_written(tmp_path):
    quantizer = make_quantizer()
    quantizer.save_pretrained(tmp_path)
    found = SemanticIds.from_pretrained(tmp_path)
    assert all(torch.equal(getattr(found, name), tensor) for name, tensor in vars(quantizer).items())
    path = tmp_path / "semantic_ids.safetensors"
    tensors = load_file(path)
    for damage in ({"mean": tensors["mean"] + 1}, {"mean": tensors["mean"] * np.inf}, {"projection": torch.ones(2)}):
        save_file(tensors | damage, path, {"format": "1", "sha256": quantizer.fingerprint()})
        with pytest.raises(ValueError, match="does not hold a readable semantic_ids.safetensors"):
            SemanticIds.from_pretrained(tmp_path)


def test_embeddings_of_titles_are_means_of_their_own_states(tokenizer):
    model, (titles, first) = make_model(tokenizer), split_titles(tokenizer, [*TITLES, ""])
    assert first == [tokenizer.bos_token_id] and titles[-1] == []
    vectors = embed_titles(model, titles, first, batch_size=5)
    for title, vector in zip(titles[:-1], vectors):
        states = model.model(torch.tensor([first + title])).last_hidden_state[0]
        torch.testing.assert_close(vector, states[1:].mean(dim=0))
    assert not vectors[-1].any()


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_begin_as_the_titles_of_their_items(tied, tokenizer):
    model, (titles, _) = make_model(tokenizer, tie_word_embeddings=tied), split_titles(tokenizer, ["Dune", "Emma", ""])
    size = len(tokenizer)
    before = [module.weight.clone() for module in (model.model.embed_tokens, model.lm_head)]
    add_embeddings(model, list(range(size, size + 4)), titles, torch.tensor([[0, 2], [1, 2], [1, 2]]))
    assert embedding_names(model) == ["embed_tokens", "lm_head"][: 2 - tied]
    for old, module in zip(before, (model.model.embed_tokens, model.lm_head)):
        assert torch.equal(module.weight[:size], old) and len(module.weight) == size + 4
        dune, emma, nothing = old[titles[0]].mean(0), old[titles[1]].mean(0), old.mean(0)
        expected = [dune, (emma + nothing) / 2, (dune + emma + nothing) / 3, nothing]
        torch.testing.assert_close(module.weight[size:], torch.stack(expected))


@pytest.mark.parametrize("is_chat", [False, True])
def test_further_rows(is_chat, task, chat_task):
    task = chat_task if is_chat else task
    rows = build_rows(Dataset.from_dict({"item_ids": [["b0", "b1", "b2"]]}), task)
    further = pd.DataFrame({"prompt": ["A book by Herbert: "], "completion": ['"Dune"']})
    found = add_rows(rows, further, task)
    assert len(found) == 2 and found[0]["prompt"] == rows[0]["prompt"]
    ids, labels = (values[1] for values in tokenize_rows(found[:], task).values())
    item = task.encode_items(['"Dune"'])[0]
    assert ids[-len(item) :] == item and "Herbert" in task.tokenizer.decode(ids[: -len(item)])
    assert task.trie.tokens(torch.tensor(labels[-len(item) :])).tolist() == item
    with pytest.raises(ValueError, match="1 of the 2 rows read are not items"):
        tokenize_rows(add_rows(rows, further.assign(completion="x"), task)[:], task)
    with pytest.raises(ValueError, match="`extra_rows` has 1 rows without a prompt or a completion"):
        add_rows(rows, further.assign(prompt=None), task)
    with pytest.raises(ValueError, match="1 of the 2 rows read are too long and can't be shortened"):
        tokenize_rows(add_rows(rows, further.assign(prompt="Dune " * 1000), task)[:], replace(task, max_length=100))


@pytest.fixture(scope="module")
def semantic(tmp_path_factory, tokenizer, folder):
    """What `semantic-ids` wrote for a model with a tied head."""
    pytest.importorskip("faiss", reason='needs pip install "trl_msl[semantic]"')
    path = tmp_path_factory.mktemp("semantic")
    make_model(tokenizer, tie_word_embeddings=True).save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    options = ["--model_name_or_path", path / "base", "--items", folder / "id2name4Rec.json", *SIZES]
    run(semantic_ids, *options, "--output_dir", path / "ids")
    return path / "ids"


@pytest.fixture(scope="module")
def trained(semantic, folder):
    """An adapter trained by the recipe."""
    output, config = semantic.parent / "trained", ROOT / "recipes" / "configs" / "semantic_ids.yaml"
    files = ["--items", semantic / "items.json", "--extra_rows", semantic / "title_rows.jsonl"]
    options = ["--model_name_or_path", semantic, "--data_dir", folder, "--output_dir", output, "--dtype", "float32"]
    run(train, "--config", config, *options, *files, *PROMPT, *FEW_STEPS, "--warmup_steps", 0)
    return output


def test_a_model_and_items_with_codes(semantic, tokenizer, folder):
    quantizer, titles = SemanticIds.from_pretrained(semantic), json.loads((folder / "id2name4Rec.json").read_text())
    items, base = json.loads((semantic / "items.json").read_text()), semantic.parent / "base"
    model = AutoModelForCausalLM.from_pretrained(base)
    vectors = embed_titles(model, *split_titles(tokenizer, list(titles.values())))
    assert list(items.values()) == quantizer.write(torch.tensor(nearest_centroids(quantizer, vectors)))
    assert list(items) == list(titles) and len(set(items.values())) == len(items)  # also those with the same title
    extended = AutoTokenizer.from_pretrained(semantic)
    assert extended.encode(items["0"], add_special_tokens=False) == extended.convert_tokens_to_ids(
        items["0"].replace("><", "> <").split(" ")
    )
    assert read_trainable_tokens(ModelConfig(str(semantic))) == {
        "embed_tokens": [*range(len(tokenizer), len(extended))]
    }
    assert read_trainable_tokens(ModelConfig(str(base))) is None
    rows = pd.read_json(semantic / "title_rows.jsonl", lines=True)
    assert rows["completion"].tolist() == list(items.values()) and "Dune Messiah" in rows["prompt"].iloc[-1]
    with pytest.raises(ValueError, match="has 12 of the tokens already"):
        run(semantic_ids, "--model_name_or_path", semantic, "--items", folder / "id2name4Rec.json", *SIZES,
            "--output_dir", semantic.parent / "twice")  # fmt: skip


def test_vectors_from_a_file(semantic, folder, tmp_path):
    vectors = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    save_file({"vectors": vectors}, tmp_path / "vectors.safetensors")
    options = ["--model_name_or_path", semantic.parent / "base", "--items", folder / "id2name4Rec.json", *SIZES]
    run(semantic_ids, *options, "--item_vectors", tmp_path / "vectors.safetensors", "--output_dir", tmp_path / "ids")
    expected = SemanticIds.fit(vectors, 2, 4)
    items = json.loads((tmp_path / "ids" / "items.json").read_text())
    assert list(items.values()) == expected.write(expected.encode(vectors))


def test_only_rows_of_new_tokens_are_trained(semantic, trained):
    tokenizer, before = AutoTokenizer.from_pretrained(semantic), load_file(semantic / "model.safetensors")
    (new,) = json.loads((semantic / TRAINABLE_TOKENS_FILE).read_text()).values()
    adapter = load_file(trained / "adapter_model.safetensors")
    (rows,) = (tensor for name, tensor in adapter.items() if "trainable_tokens_delta" in name)
    assert not any("embed_tokens.weight" in name or "lm_head.weight" in name for name in adapter)
    model = load_adapter(trained, tokenizer).merge_and_unload()
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        assert torch.equal(weight[new], rows)
        assert torch.equal(weight[: new[0]], before["model.embed_tokens.weight"][: new[0]])
    texts = json.loads((semantic / "items.json").read_text()).values()
    used = set(tokenizer.convert_tokens_to_ids([token for text in texts for token in split(text)]))
    moved = (rows != before["model.embed_tokens.weight"][new]).any(dim=1)
    assert {token for token, has_moved in zip(new, moved) if has_moved} == used


def test_decoding_is_brute_force(semantic, trained):
    recommender = Recommender.from_pretrained(trained)
    trie = recommender.task.trie
    assert trie.num_items == 12 and trie.depth <= 4  # two codes, one that tells items apart, and the end
    prompts = recommender.task.encode_prompts([recommender.task.prompt_template.render(["<a_0><b_1>"]), "Next: "])
    scores = score_every_item(recommender.model, trie, prompts)
    check_ranking(TrieDecoder(recommender.model, trie).search(prompts, 12), scores, [set(range(12))] * 2, 12)
    merged = load_adapter(trained, recommender.task.tokenizer).merge_and_unload().eval()
    np.testing.assert_allclose(score_every_item(merged, trie, prompts), scores, atol=1e-5)


def test_a_new_item_gets_codes_of_the_same_quantiser(semantic, trained, tmp_path):
    (tmp_path / "new.json").write_text(json.dumps({"new": NEW_TITLE, "same": TITLES[0]}))
    run(update_catalog, "--model_name_or_path", trained, "--add", tmp_path / "new.json", "--semantic_ids", semantic,
        "--output_dir", tmp_path / "updated")  # fmt: skip
    task = RankingTask.from_pretrained(tmp_path / "updated", AutoTokenizer.from_pretrained(trained))
    items, quantizer = json.loads((semantic / "items.json").read_text()), SemanticIds.from_pretrained(semantic)
    titles, first = split_titles(task.tokenizer, [NEW_TITLE, TITLES[0]])
    vectors = embed_titles(AutoModelForCausalLM.from_pretrained(semantic), titles, first)
    assert task.catalog.texts[:12] == list(items.values())
    assert task.catalog.texts[12:] == quantizer.write(
        torch.tensor(nearest_centroids(quantizer, vectors)), items.values()
    )
    assert task.catalog.texts[13].startswith(items["0"]) and len(set(task.catalog.texts)) == 14
    shutil.copytree(semantic, tmp_path / "other")
    (tmp_path / "other" / "items.json").write_text(json.dumps({"x": "<a_3><b_3><c_3>"}))
    with pytest.raises(ValueError, match="1 of its ids, such as '<a_3><b_3><c_3>', are not in the model's catalogue"):
        code_new_items(task.catalog, str(tmp_path / "other"), None, list(items.values()))


def test_softmax_dpo_starts_from_the_trained_rows(trained, tmp_path):
    task = RankingTask.from_pretrained(trained, AutoTokenizer.from_pretrained(trained))
    model = load_adapter(trained, task.tokenizer, is_trainable=True)
    chosen, rejected = ([task.catalog.completions[item]] for item in (0, 5))
    rows = Dataset.from_dict({"prompt": ["Next: "], "chosen": chosen, "rejected": [rejected]})
    args = SoftmaxDPOConfig(tmp_path, use_cpu=True, bf16=False, report_to="none")
    trainer = SoftmaxDPOTrainer(model, args=args, task=task, train_dataset=rows)
    deltas = [m.trainable_tokens_delta for m in trainer.model.modules() if hasattr(m, "trainable_tokens_delta")]
    assert deltas and all(torch.equal(rows["ref"], rows["default"]) for rows in deltas)


def test_a_model_is_evaluated_on_the_folder_of_its_training(trained, folder):
    data, task = load_trained(ModelConfig(str(trained)), DataArguments(data_dir=str(folder)))
    assert len(data.windows["test"]) and data.catalog.texts[0].startswith("<a_")


def test_options_that_would_have_no_effect(semantic, tokenizer, task, tmp_path):
    Recommender(make_model(tokenizer), task).save_pretrained(tmp_path / "titles")
    (tmp_path / "new.json").write_text(json.dumps({"new": NEW_TITLE}))
    options = ["--model_name_or_path", tmp_path / "titles", "--output_dir", tmp_path / "updated"]
    with pytest.raises(ValueError, match="`semantic_ids` has no effect without `add`"):
        run(update_catalog, *options, "--semantic_ids", semantic)
    with pytest.raises(ValueError, match="12 items with other texts, such as 'The Silent River'"):
        run(update_catalog, *options, "--semantic_ids", semantic, "--add", tmp_path / "new.json")
