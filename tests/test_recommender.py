# SPDX-License-Identifier: Apache-2.0
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import takewhile

import numpy as np
import pytest
from helpers import TITLES, make_model, make_windows
from peft import LoraConfig

from trl_msl import (
    ItemCatalog,
    MSLConfig,
    MSLTrainer,
    PromptTemplate,
    RankingTask,
    RecommendedItems,
    Recommender,
    build_rows,
    encode_items,
    recommend,
)
from trl_msl.experiments.from_scratch import train_tokenizer


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
        with pytest.raises(ValueError, match="holds no readable catalogue"):
            RankingTask.from_pretrained(tmp_path / "copy", tokenizer)
    path.unlink()
    with pytest.raises(ValueError, match="holds no readable catalogue|has no recommender.json"):
        Recommender.from_pretrained(tmp_path / "copy")


def test_awkward_texts_survive(tmp_path, tokenizer):
    texts = ["", "x" * 100_000, "\x00\x07\t\n", "\u202eשלום", "👩‍👩‍👧‍👦 é", "a\u0301", 'say "no"']
    catalog = ItemCatalog(range(7), texts, template="<{text}>", empty_texts="keep")
    catalog.save_pretrained(tmp_path)
    loaded = ItemCatalog.from_pretrained(tmp_path)
    assert (loaded.ids, loaded.texts, loaded.template) == (catalog.ids, texts, "<{text}>")
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
    with pytest.raises(ValueError, match="1 id.* not in the catalogue"):
        updated.update(withdraw=["b99"])
    with pytest.raises(ValueError, match="`withdraw` is 'b1', whose characters could be ids"):
        updated.update(withdraw="b1")
    with pytest.raises(ValueError, match="`withdraw` and `restore` both hold 1 id.*'b3'"):
        updated.update(withdraw=["b3"], restore=["b3"])
    updated.update(withdraw=["b5"])
    assert "1 items are written like one that is withdrawn, such as 'b6', and stay" in caplog.text
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
