# SPDX-License-Identifier: Apache-2.0
"""The rooms of the package: which may import which, by their doors, without circles, and how long a module may be."""

import sys
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

import trl_msl


sys.path.insert(0, str(ROOT / "docs"))

from read_rooms import NO_DOOR, read_arrows, read_imports, read_modules, room_of  # noqa: E402


ALLOWED = {
    "trie": set(),
    "data": {"trie"},
    "model": {"trie"},
    "decoding": {"trie", "data", "model"},
    "collaborative": {"trie", "decoding"},
    "training": {"trie", "data", "model"},
    "softmax_dpo": {"trie", "data", "model", "training", "decoding"},
    "evaluation": {"trie", "data", "model", "decoding"},
    "doctor": {"trie", "data", "model", "decoding"},
    "recommender": {"trie", "data", "model", "decoding", "evaluation", "collaborative"},
}
ALLOWED["scripts"] = set(ALLOWED)
ALLOWED["experiments"] = set(ALLOWED)


def forbidden_arrows(arrows):
    return {(room, other) for room, others in arrows.items() for other in others - ALLOWED.get(room, set())}


def imports_past_a_door(imports):
    """Those of a module behind another room's door, or of one's own door."""
    past = {(m, t) for m, t in imports if room_of(m) != room_of(t) and "." in t and room_of(t) not in NO_DOOR}
    return past | {(module, target) for module, target in imports if "." in module and target == room_of(module)}


def circle(imports):
    graph = {}
    for module, target in imports:
        graph.setdefault(module, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_rooms_import_only_rooms_below():
    arrows = read_arrows()
    assert set(arrows) == set(ALLOWED)
    assert not forbidden_arrows(arrows)


def test_rooms_are_entered_by_their_doors():
    assert not imports_past_a_door(read_imports())


def test_there_is_no_circle():
    assert circle(read_imports()) is None


def test_softmax_dpo_takes_decoding_for_negatives_only():
    users = {module for module, target in read_imports() if room_of(module) == "softmax_dpo" and target == "decoding"}
    assert users <= {"softmax_dpo.negatives"}


@pytest.mark.parametrize("name", sorted(read_modules()))
def test_no_module_is_long(name):
    assert len(read_modules()[name].read_text(encoding="utf-8").splitlines()) <= 350


def test_public_names_are_sorted():
    assert list(trl_msl.__all__) == sorted(trl_msl.__all__)


def test_the_picture_is_drawn(tmp_path):
    from draw_rooms import draw

    draw(image=tmp_path / "rooms.png")
    assert (tmp_path / "rooms.png").stat().st_size > 10_000


# ---------------------------------------------------------------------- the scan itself


@pytest.mark.parametrize(
    ("code", "arrow", "is_forbidden", "is_past_a_door"),
    [
        ("from ..trie import ItemTrie", ("data.rows", "trie"), False, False),
        ("from ..trie.ragged import pad_rows", ("data.rows", "trie.ragged"), False, True),
        ("from ..trie import ragged", ("data.rows", "trie.ragged"), False, True),
        ("import trl_msl.trie.ragged", ("data.rows", "trie.ragged"), False, True),
        ("def f():\n    from ..decoding import recommend", ("data.rows", "decoding"), True, False),
        ("if 1:\n    from trl_msl.decoding import recommend", ("data.rows", "decoding"), True, False),
        ("from .. import decoding", ("data.rows", "decoding"), True, False),
        ("from .. import recommend", ("data.rows", ""), True, False),
        ("from ..decoding import recommend", ("data.rows", "decoding"), True, False),
        ("from . import prompts", ("data.rows", "data.prompts"), False, False),
        ("from . import PromptTemplate", ("data.rows", "data"), False, True),
        ("from .prompts import PromptTemplate", ("data.rows", "data.prompts"), False, False),
        ("import os, torch.nn", None, False, False),
    ],
)
def test_what_the_scan_sees(code, arrow, is_forbidden, is_past_a_door, tmp_path):
    package = tmp_path / "trl_msl"
    for name in ("", "trie", "data", "decoding"):
        (package / name).mkdir(exist_ok=True)
        (package / name / "__init__.py").touch()
    for name in ("trie/ragged", "data/prompts", "decoding/recommend"):
        (package / f"{name}.py").touch()
    (package / "decoding/__init__.py").write_text("from .recommend import recommend  # named like its module")
    (package / "data/rows.py").write_text(code)
    imports = read_imports(package)
    assert imports - {("decoding", "decoding.recommend")} == ({arrow} if arrow else set())
    assert bool(forbidden_arrows(read_arrows(package))) == is_forbidden
    assert bool(imports_past_a_door(imports)) == is_past_a_door


def test_a_circle_is_seen():
    assert circle({("a", "b"), ("b", "c"), ("a", "c")}) is None
    assert set(circle({("a", "b"), ("b", "c"), ("c", "a")})) == {"a", "b", "c"}
