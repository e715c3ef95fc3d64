# SPDX-License-Identifier: Apache-2.0
import contextlib
import errno
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import takewhile
from random import Random

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import TITLES, make_model, make_windows
from launching import run
from peft import LoraConfig
from transformers import MambaConfig
from trl import ModelConfig

from trl_msl import (
    ItemCatalog,
    ItemTrie,
    MSLConfig,
    MSLTrainer,
    PromptTemplate,
    RankingTask,
    Recommender,
    TrieDecoder,
    build_rows,
    recommend,
)
from trl_msl.collaborative import Fusion, ItemNeighbours
from trl_msl.data import TASK_FILES, encode_items
from trl_msl.experiments.from_scratch import train_tokenizer
from trl_msl.recommender import RecommendedItems
from trl_msl.scripts import merge
from trl_msl.scripts.dpo import load_policy
from trl_msl.scripts.loading import load_model
from trl_msl.softmax_dpo import SoftmaxDPOConfig
from trl_msl.trie import read_checksum


@pytest.fixture(scope="module")
def folder(tmp_path_factory, task):
    """What training leaves behind: an adapter on a base model in a folder, and the task."""
    path = tmp_path_factory.mktemp("trained")
    make_model(task.tokenizer).save_pretrained(path / "base")
    rows = build_rows(make_windows(task.catalog.ids), task)
    trainer = MSLTrainer(
        str(path / "base"),
        MSLConfig(
            path / "out", max_steps=2, save_steps=1, report_to="none", bf16=False, use_cpu=True, learning_rate=1e-2
        ),
        task=task,
        train_dataset=rows,
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    return path / "out"


HISTORIES = [["b0", "b3"], ["b8", "b4", "b10"], ["b5"]]


def check_same(found, expected):
    """Sums of floats depend on the number of threads, and on where in memory weights lie."""
    assert (found.ids, found.texts, found.exact) == (expected.ids, expected.texts, expected.exact)
    for scores, others in zip(found.scores, expected.scores):
        assert scores == pytest.approx(others, abs=1e-5)


def test_the_catalogue_lies_beside_every_model_saved(folder):
    for saved in (folder, folder / "checkpoint-1", folder / "checkpoint-2"):
        names = {path.name for path in saved.iterdir()}
        assert {"items.parquet", "trie.safetensors", "recommender.json"} <= names
        assert "adapter_model.safetensors" in names
        assert not [name for name in names if name.endswith((".tmp", ".pkl", ".npy"))]
    versions = json.loads((folder / "recommender.json").read_text())["versions"]
    assert set(versions) >= {"python", "trl_msl", "trl", "torch"}


def test_a_new_process_recommends_the_same(folder):
    expected = Recommender.from_pretrained(folder).recommend(HISTORIES, k=5)
    code = (
        "import json, sys; from trl_msl import Recommender; "
        "found = Recommender.from_pretrained(sys.argv[1]).recommend(json.loads(sys.argv[2]), k=5); "
        "print(json.dumps([found.ids, found.texts, found.scores, found.exact]))"
    )
    command = [sys.executable, "-c", code, str(folder), json.dumps(HISTORIES)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    check_same(RecommendedItems(*json.loads(output.splitlines()[-1])), expected)


def test_recommendations_are_those_of_the_engine(folder, task, catalog, template):
    recommender = Recommender.from_pretrained(folder)
    prompts = [template.render([catalog.completions[i] for i in catalog.indices(ids)]) for ids in HISTORIES]
    expected = recommend(recommender.model, task, prompts, top_k=12)
    found = recommender.recommend(HISTORIES, k=12, exclude_history=False)
    assert [catalog.indices(ids) for ids in found.ids] == expected.items.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    assert found.texts == [[catalog.texts[index] for index in row] for row in expected.items]
    assert all(found.exact)


def test_histories_by_text_and_without_what_the_user_has_had(folder, catalog):
    recommender = Recommender.from_pretrained(folder)
    by_id = recommender.recommend(HISTORIES, k=12)
    texts = [[catalog.texts[index] for index in catalog.indices(ids)] for ids in HISTORIES]
    assert recommender.recommend(texts, k=12) == by_id
    for ids, history in zip(by_id.ids, HISTORIES):
        assert not set(ids) & set(history)
    assert len(by_id.ids[2]) == 10  # "A History of Tea" is there twice, and the user has had one of them
    stock = recommender.recommend(HISTORIES, k=12, allowed=["b1", "b2", "b3"])
    assert [set(ids) for ids in stock.ids] == [{"b1", "b2"}, {"b1", "b2", "b3"}, {"b1", "b2", "b3"}]


def test_the_prompt_shows_as_many_items_as_in_training(folder, tmp_path, tokenizer):
    recommender = Recommender.from_pretrained(folder)
    short = replace(recommender.task, max_history=2)
    short.save_pretrained(tmp_path)
    assert RankingTask.from_pretrained(tmp_path, tokenizer).max_history == 2
    history = ["b0", "b3", "b8", "b4"]
    rows = build_rows(Dataset.from_list([{"item_ids": [*history, "b5"]}, {"item_ids": ["b1", "b2"]}]), short)
    assert rows["history_ids"][:] == [history, ["b1"]]
    assert [len(items) for items in rows["history"]] == [2, 1]
    found = Recommender(recommender.model, short).recommend([history], k=5)
    assert not set(found.ids[0]) & set(history)
    # The prompt has the last two, and the others are excluded all the same
    others = [item for item in short.catalog.ids if item not in history[:2]]
    check_same(found, recommender.recommend([history[2:]], k=5, allowed=others))
    with pytest.raises(ValueError, match="`max_history` is 0"):
        replace(short, max_history=0)


def test_save_merged_and_load(folder, tmp_path):
    recommender = Recommender.from_pretrained(folder)
    expected = recommender.recommend(HISTORIES, k=5)
    recommender.save_pretrained(tmp_path / "adapter")
    check_same(Recommender.from_pretrained(tmp_path / "adapter").recommend(HISTORIES, k=5), expected)
    from peft import AutoPeftModelForCausalLM

    merged = AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()
    Recommender(merged, recommender.task).save_pretrained(tmp_path / "merged")
    found = Recommender.from_pretrained(tmp_path / "merged").recommend(HISTORIES, k=5)
    assert found.ids == expected.ids
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)


@pytest.fixture
def moved(folder, tmp_path, monkeypatch):
    """The adapter as another machine has it: its base is named relative to where the training ran."""
    shutil.copytree(folder.parent, tmp_path / "moved")
    config = tmp_path / "moved" / "out" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "base"}))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "moved" / "out"


def test_an_adapter_whose_base_is_named_relative_to_another_folder(folder, moved, tmp_path, monkeypatch):
    """Also by the commands, and for an adapter without a task, which takes that of its base."""
    expected = Recommender.from_pretrained(folder).recommend(HISTORIES, k=5)
    check_same(Recommender.from_pretrained(moved).recommend(HISTORIES, k=5), expected)
    check_same(Recommender.from_pretrained("moved/out").recommend(HISTORIES, k=5), expected)
    Recommender.from_pretrained(moved).save_pretrained(tmp_path / "saved" / "elsewhere")
    check_same(Recommender.from_pretrained(tmp_path / "saved" / "elsewhere").recommend(HISTORIES, k=5), expected)
    (tmp_path / "base").mkdir()  # a folder of that name, but not a model
    task = Recommender.from_pretrained(moved).task
    model = load_model(ModelConfig(model_name_or_path="moved/out"))
    check_same(Recommender(model, task).recommend(HISTORIES, k=5), expected)
    config = SoftmaxDPOConfig("dpo", bf16=False, use_cpu=True)
    model = load_policy(ModelConfig(model_name_or_path="moved/out"), config, task.tokenizer)
    assert any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora" in name)
    assert model.peft_config["default"].base_model_name_or_path == str(moved.parent / "base")
    check_same(Recommender(model, task).recommend(HISTORIES, k=5), expected)
    run(merge, "--model_name_or_path", moved, "--output_dir", tmp_path / "merged")
    found = Recommender.from_pretrained(tmp_path / "merged").recommend(HISTORIES, k=5)
    assert found.ids == expected.ids
    for name in TASK_FILES:
        (moved / name).rename(moved.parent / "base" / name)
    check_same(Recommender.from_pretrained(moved).recommend(HISTORIES, k=5), expected)


def test_an_adapter_whose_base_is_nowhere(moved):
    (moved.parent / "base").rename(moved.parent / "elsewhere")
    with pytest.raises(ValueError, match="base model is where adapter_config.json says: correct it there, or merge"):
        Recommender.from_pretrained(moved)  # `base` could be a repository
    config = moved / "adapter_config.json"
    for name in ("./base", "/no/such/base", "outputs/scratch/base"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": name}))
        with pytest.raises(ValueError, match=f"names '{name}' as `base_model_name_or_path`, but there is no such"):
            Recommender.from_pretrained(moved)
        with pytest.raises(ValueError, match="but there is no such folder"):
            load_model(ModelConfig(model_name_or_path=str(moved)))


def test_bad_histories(folder):
    recommender = Recommender.from_pretrained(folder)
    with pytest.raises(ValueError, match="`histories`: 1 of 2 are empty, the first that of user 1"):
        recommender.recommend([["b1"], []])
    with pytest.raises(ValueError, match=r"`histories` hold 1 different ids that are not in the catalogue.*'b99'"):
        recommender.recommend([["b1", "b99", "b2"]])
    with pytest.raises(ValueError, match=r"1 different texts that are not in the catalogue.*'Ulysses'"):
        recommender.recommend([["Dune", "Emma", "Ulysses"]])


def test_another_tokenizer_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    other = train_tokenizer(TITLES, vocab_size=380)
    other.save_pretrained(tmp_path / "copy")
    with pytest.raises(ValueError, match="writes other tokens than the one"):
        Recommender.from_pretrained(tmp_path / "copy")


@pytest.mark.parametrize("name", ["items.parquet", "trie.safetensors", "recommender.json"])
def test_missing_and_damaged_files(name, folder, tmp_path, tokenizer):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / name
    content = path.read_bytes()
    for damaged in (content[:-3], content[:10], b"", b"[1]", content[::-1]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="does not hold a readable task"):
            RankingTask.from_pretrained(tmp_path / "copy", tokenizer)
    path.unlink()
    with pytest.raises(ValueError, match="does not hold a readable task|has no recommender.json"):
        Recommender.from_pretrained(tmp_path / "copy")


def test_awkward_texts_survive(tmp_path, tokenizer):
    texts = ["", "x" * 100_000, "\x00\x07\t\n", "\u202eשלום", "👩‍👩‍👧‍👦 é", "a\u0301", 'say "no"']
    catalog = ItemCatalog(range(7), texts, template="<{text}>", empty_texts="keep")
    catalog.save_pretrained(tmp_path)
    loaded = ItemCatalog.from_pretrained(tmp_path)
    assert (loaded.ids, loaded.texts, loaded.template) == (catalog.ids, texts, "<{text}>")
    texts[1] = "x" * 4_000  # a prompt and an item may be long, but not any length
    catalog = ItemCatalog(range(7), texts, template="<{text}>", empty_texts="keep")
    RankingTask(catalog, tokenizer, PromptTemplate("{history}")).save_pretrained(tmp_path)
    assert RankingTask.from_pretrained(tmp_path, tokenizer).catalog.completions == catalog.completions


def test_items_withdrawn_and_restored(folder, catalog, caplog):
    """The others keep their order and their scores; histories may still hold what was withdrawn."""
    recommender = Recommender.from_pretrained(folder)
    before = recommender.recommend(HISTORIES, k=12)
    updated = recommender.update(withdraw=["b3", "b7"])
    after = updated.recommend(HISTORIES, k=12)
    for user, ids in enumerate(before.ids):
        kept = [place for place, item in enumerate(ids) if item not in ("b3", "b7")]
        assert after.ids[user] == [ids[place] for place in kept]
        np.testing.assert_allclose(after.scores[user], [before.scores[user][place] for place in kept], atol=1e-5)
    assert updated.recommend(HISTORIES[:1], k=12, allowed=["b3", "b1"]).ids == [["b1"]]
    assert updated.update(restore=["b3", "b7"]).recommend(HISTORIES, k=12) == before
    assert updated.update(restore=["b3"], withdraw=["b1"]).task.withdrawn == {"b1", "b7"}
    with pytest.raises(ValueError, match="`restore` holds 1 .* not withdrawn, such as .'b1'"):
        updated.update(restore=["b1"])
    with pytest.raises(ValueError, match="`restore` holds 1 .* not withdrawn, such as .'b99'"):
        updated.update(restore=["b99"])
    with pytest.raises(ValueError, match=r"`withdraw` holds 1 id\(s\) of 1 that are not in the catalogue"):
        updated.update(withdraw=["b99"])
    with pytest.raises(ValueError, match=r"`allowed` holds 1 id\(s\) of 2 that are not in the catalogue"):
        updated.recommend(HISTORIES, allowed=["b99", "b1"])
    with pytest.raises(ValueError, match="`withdraw` is 'b1', whose characters could be ids"):
        updated.update(withdraw="b1")
    with pytest.raises(ValueError, match="`withdraw` and `restore` both hold 1 id.*'b3'"):
        updated.update(withdraw=["b3"], restore=["b3"])
    updated.update(withdraw=["b5"])
    assert "1 items have the same text as a withdrawn one, such as 'b6', and remain" in caplog.text
    with pytest.raises(ValueError, match="`withdrawn` holds all 12 items"):
        updated.update(withdraw=catalog.ids)


def test_items_added_without_training(folder, tmp_path, tokenizer, catalog):
    recommender = Recommender.from_pretrained(folder)
    new = ItemCatalog(["n0", "n1", "n2"], ["The Silent Wood", "Emma and Dune", "#42"])
    updated = recommender.update(add=new, withdraw=["b0"])
    assert updated.task.catalog.completions[-1] == '"#42"'  # the template of the catalogue, not of what was added
    shared = updated.task.shared_prefixes()
    assert list(shared) == ["n0", "n1", "n2"] and shared["n0"] > shared["n1"] > shared["n2"] == 0
    # Counted by hand: tokens shared with some trained item, less the quote with which all of them begin
    written = encode_items(tokenizer, catalog.completions)
    for item, tokens in zip(new.ids, encode_items(tokenizer, updated.task.catalog.completions[12:])):
        longest = max(sum(x == y for x, y in takewhile(lambda p: p[0] == p[1], zip(tokens, t))) for t in written)
        assert shared[item] == longest - 1

    updated.save_pretrained(tmp_path)
    loaded = Recommender.from_pretrained(tmp_path)
    found = loaded.recommend([["b3", "n1"], ["b1"]], k=12)
    assert found.ids == updated.recommend([["b3", "n1"], ["b1"]], k=12).ids
    assert {"n0", "n2"} <= set(found.ids[0]) and "b0" not in found.ids[1]
    # What is new stays new when more is added, and shares nothing with what is just as new
    again = loaded.update(add=ItemCatalog(["n3"], ["#42 again"])).task
    assert again.num_trained == 12 and again.shared_prefixes() == {**shared, "n3": 0}
    with pytest.raises(ValueError, match="1 id.* in the catalogue already, such as .'n1'"):
        loaded.update(add=ItemCatalog(["n1"], ["Another"]))


def test_decoding_settings_travel(folder, tmp_path):
    recommender = Recommender.from_pretrained(folder)
    task = replace(recommender.task, decoding={"mode": "beam", "num_beams": 12, "normalize": "vocab"})
    Recommender(recommender.model, task).save_pretrained(tmp_path)
    loaded = Recommender.from_pretrained(tmp_path)
    found = loaded.recommend(HISTORIES, k=3)
    assert not any(found.exact)
    check_same(found, recommender.recommend(HISTORIES, k=3, mode="beam", num_beams=12, normalize="vocab"))
    check_same(loaded.recommend(HISTORIES, k=3, mode="exact"), recommender.recommend(HISTORIES, k=3))
    for wrong in ({"temperature": 2}, {"mode": "generate"}, {"mode": "exact", "num_beams": 3}):
        with pytest.raises(ValueError, match="`decoding` has "):
            replace(task, decoding=wrong)


def test_a_task_needs_its_parts_to_fit(tokenizer, catalog, task, template):
    with pytest.raises(ValueError, match="`prompt_template` is a NoneType: pass a `PromptTemplate`"):
        RankingTask(catalog, tokenizer, None)
    with pytest.raises(ValueError, match="`trie` .* does not hold the items of `catalog`"):
        RankingTask(ItemCatalog(["0"], ["Dune"]), tokenizer, template, trie=task.trie)
    with pytest.raises(ValueError, match="`trie` .* does not hold the items of `catalog`"):
        RankingTask(catalog, tokenizer, replace(template, conversational=True), trie=task.trie)


@pytest.mark.parametrize("name", ["items.parquet", "trie.safetensors", "recommender.json"])
def test_a_full_disk_leaves_the_old_task(name, task, tokenizer, tmp_path, monkeypatch):
    task.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new = task.update(add=ItemCatalog(["n0"], ["Ulysses"]))

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = {
        "items.parquet": "pyarrow.parquet.write_table",
        "trie.safetensors": "trl_msl.trie.arrays.save_file",
        "recommender.json": "pathlib.Path.write_text",
    }
    monkeypatch.setattr(writer[name], fail)
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert RankingTask.from_pretrained(tmp_path, tokenizer).catalog.ids == task.catalog.ids
    for part in (new.catalog, new.trie) if name != "recommender.json" else ():  # alone, too
        with contextlib.suppress(OSError):
            part.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before.keys()
    monkeypatch.undo()
    new.save_pretrained(tmp_path)
    assert RankingTask.from_pretrained(tmp_path, tokenizer).catalog.ids == new.catalog.ids


def test_items_that_stand_in_each_others_places(tokenizer, template, tmp_path):
    """Two of 300, with checksums that fit: all items of a small catalogue are compared, not a sample."""
    catalog = ItemCatalog(range(300), [f"{index} rivers" for index in range(300)])
    task = RankingTask(catalog, tokenizer, template)
    nodes = task.trie.item_nodes.clone()
    nodes[[1, 2]] = nodes[[2, 1]]
    swapped = ItemTrie(task.trie.first_child, task.trie.edges, nodes, task.trie.vocab_size)
    with pytest.raises(ValueError, match="`trie` .* does not hold the items of `catalog`"):
        replace(task, trie=swapped)
    task.save_pretrained(tmp_path)
    swapped.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trie.safetensors is damaged, or does not belong to recommender.json"):
        RankingTask.from_pretrained(tmp_path, tokenizer)
    content = json.loads((tmp_path / "recommender.json").read_text())
    content["sha256"]["trie.safetensors"] = read_checksum(tmp_path)
    (tmp_path / "recommender.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="`trie` .* does not hold the items of `catalog`"):
        RankingTask.from_pretrained(tmp_path, tokenizer)


def test_a_sample_of_a_large_catalogue(catalog, tokenizer, template, monkeypatch):
    monkeypatch.setattr("trl_msl.data.task._MAX_COMPARED", 5)  # of 12: items 0, 3, 6 and 9
    task = RankingTask(catalog, tokenizer, template)
    for places, is_found in (([1, 2], False), ([0, 3], True)):
        nodes = task.trie.item_nodes.clone()
        nodes[places] = nodes[places[::-1]]
        trie = ItemTrie(task.trie.first_child, task.trie.edges, nodes, task.trie.vocab_size)
        with pytest.raises(ValueError, match="does not hold") if is_found else contextlib.nullcontext():
            replace(task, trie=trie)


# ---------------------------------------------------------------------- serving


def test_the_engine_is_made_once(folder, monkeypatch):
    made = []
    original = TrieDecoder.__init__
    monkeypatch.setattr(TrieDecoder, "__init__", lambda self, *args: made.append(args) or original(self, *args))
    recommender = Recommender.from_pretrained(folder)
    assert not made
    for _ in range(3):
        recommender.recommend(HISTORIES, k=3)
        recommender.recommend(HISTORIES, k=3, mode="beam")
    assert len(made) == 1
    with ThreadPoolExecutor(8) as pool:  # by one of those that come at once
        fresh = Recommender(recommender.model, recommender.task)
        list(pool.map(lambda _: fresh.recommend(HISTORIES, k=3), range(8)))
    assert len(made) == 2


def test_requests_from_several_threads(folder, catalog):
    loaded, neighbours = Recommender.from_pretrained(folder), ItemNeighbours.fit([[0, 4, 8], [3, 8]], ["a", "b"], 12)
    fusion = Fusion(torch.arange(12), neighbours, popularity_weight=0.5, neighbour_weight=2.0)
    recommender = Recommender(loaded.model, loaded.task, fusion).update(withdraw=["b7"])
    stock = recommender.prepare_allowed(catalog.ids[:9])
    random = Random(0)
    requests = [
        {
            "histories": [random.sample(catalog.ids, random.randint(0, 5)) for _ in range(random.randint(1, 3))],
            "popular_without_history": True,
            "k": random.randint(1, 12),
            **random.choice([{"mode": "exact"}, {"mode": "exact", "fused": False}, {"mode": "beam", "fused": False}]),
            "allowed": random.choice([None, stock, catalog.ids[3:]]),
        }
        for _ in range(60)
    ]
    expected = [recommender.recommend(**request) for request in requests]
    recommender.model.train()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda request: recommender.recommend(**request), requests))
    for one, other in zip(found, expected):
        check_same(one, other)
    assert recommender.model.training  # left as it was


def test_the_engine_follows_the_model(folder):
    recommender = Recommender.from_pretrained(folder)
    before = recommender.recommend(HISTORIES, k=5)
    with torch.no_grad():
        for name, parameter in recommender.model.named_parameters():
            if "lora_B" in name or "lm_head" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    after = recommender.recommend(HISTORIES, k=5)
    assert after.scores != before.scores
    check_same(after, Recommender(recommender.model, recommender.task).recommend(HISTORIES, k=5))
    recommender.model = make_model(recommender.task.tokenizer, seed=5)
    check_same(
        recommender.recommend(HISTORIES, k=5),
        Recommender(recommender.model, recommender.task).recommend(HISTORIES, k=5),
    )


def test_a_model_replaced_during_a_request(folder, monkeypatch):
    """The request uses the model that it started with."""
    recommender = Recommender.from_pretrained(folder)
    expected = recommender.recommend(HISTORIES, k=5)
    prepare_allowed = recommender.prepare_allowed

    def replace_model(allowed):
        prepared = prepare_allowed(allowed)
        recommender.model = make_model(recommender.task.tokenizer, seed=5)
        return prepared

    monkeypatch.setattr(recommender, "prepare_allowed", replace_model)
    check_same(recommender.recommend(HISTORIES, k=5), expected)


def test_the_task_stays(folder):
    """What was prepared for it would not fit another."""
    recommender = Recommender.from_pretrained(folder)
    with pytest.raises(AttributeError):
        recommender.task = recommender.task.update(add=ItemCatalog(["n0"], ["Ulysses"]))


def test_allowed_items_are_prepared_once(folder, catalog):
    recommender = Recommender.from_pretrained(folder).update(withdraw=["b1"])
    stock = recommender.prepare_allowed(["b1", "b2", "b3"])
    for mode in ("exact", "beam"):
        found = recommender.recommend(HISTORIES, k=12, allowed=stock, mode=mode)
        assert found == recommender.recommend(HISTORIES, k=12, allowed=["b1", "b2", "b3"], mode=mode)
        assert {item for ids in found.ids for item in ids} == {"b2", "b3"}


def test_no_request_reads_the_whole_catalogue(folder):
    """Lists and dictionaries of the catalogue are looked up, but not iterated over, once the engine is made."""

    class Lookup(list):
        def __iter__(self):
            raise AssertionError("a request went through the whole catalogue")

    class Keys(dict):
        __iter__ = keys = items = values = Lookup.__iter__

    recommender = Recommender.from_pretrained(folder).update(withdraw=["b7"])
    texts = [[recommender.task.catalog.texts[int(item[1:])] for item in history] for history in HISTORIES]
    expected = recommender.recommend(HISTORIES, k=5)
    assert recommender.recommend(texts, k=5) == expected
    catalog = recommender.task.catalog
    for name in ("ids", "texts", "completions"):
        setattr(catalog, name, Lookup(getattr(catalog, name)))
    for owner, name in ((catalog, "index_of_id"), (recommender, "_indices_of_text")):
        owner.__dict__[name] = Keys(getattr(owner, name))
    assert recommender.recommend(HISTORIES, k=5) == recommender.recommend(texts, k=5) == expected


def test_models_that_the_engine_cannot_run(task):
    model = make_model(task.tokenizer, MambaConfig, state_size=4)
    recommender = Recommender(model, task)
    with pytest.raises(ValueError, match="mode='generate'"):
        recommender.recommend(HISTORIES, k=3, exclude_history=False)
    with pytest.raises(ValueError, match="`exclude_history` is True, but mode='generate' can't .*: pass False"):
        recommender.recommend(HISTORIES, k=3, mode="generate")
    found = recommender.recommend(HISTORIES, k=3, exclude_history=False, mode="generate")
    assert all(len(ids) == 3 for ids in found.ids)


def test_nothing_left_to_recommend(folder):
    recommender = Recommender.from_pretrained(folder).update(withdraw=["b1", "b2"])
    for allowed in (["b1"], ["b1", "b2"]):
        with pytest.raises(ValueError, match="`allowed` holds .* withdrawn.* or restore") as caught:
            recommender.recommend(HISTORIES, allowed=allowed)
        assert "leave it out" not in str(caught.value)
    with pytest.raises(ValueError, match="`allowed` is empty"):
        recommender.recommend(HISTORIES, allowed=[])


@pytest.mark.parametrize("k", [-1, 0, 13, 1000])
def test_more_or_fewer_items_asked_for_than_there_are(k, folder):
    with pytest.raises(ValueError, match=f"`k` is {k}: it must lie between 1 and the number of items, 12"):
        Recommender.from_pretrained(folder).recommend(HISTORIES, k=k)


def test_fewer_items_left_than_asked_for(folder, caplog):
    recommender = Recommender.from_pretrained(folder)
    assert [len(ids) for ids in recommender.recommend(HISTORIES, k=12).ids] == [10, 9, 10]
    assert "3 of 3 users got fewer items than were asked for: no others were left" in caplog.text
    assert "top_k" not in caplog.text


def test_how_a_recommender_presents_itself(folder):
    text = repr(Recommender.from_pretrained(folder))
    assert text.startswith("Recommender(LlamaForCausalLM(dtype=torch.float32, device='cpu'), RankingTask(")
    assert "num_items=12" in text
