# SPDX-License-Identifier: Apache-2.0
"""The rooms of the package and what they import, read from its files: for the picture and for the test."""

import ast
from pathlib import Path


PACKAGE = Path(__file__).resolve().parents[1] / "trl_msl"
FRONT = {"", "api"}  # the package's own `__init__.py` and what it exports: it is imported by users, not by rooms
NO_DOOR = {"experiments", "scripts"}  # rooms of modules that are run, each imported by its own name


def read_modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Files by dotted name without the package's: `"trie"` is a room's door, `"trie.ragged"` a module behind it."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def read_imports(package: Path = PACKAGE) -> set[tuple[str, str]]:
    """Which module imports which, anywhere in its file: pairs of names as those of [`read_modules`]."""
    modules = read_modules(package)
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules.items()}
    imports = set()
    for name, tree in trees.items():
        here = [package.name, *filter(None, name.split("."))]
        here = here if modules[name].name == "__init__.py" else here[:-1]  # the package that dots start from
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imports |= {(name, alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                start = here[: len(here) - node.level + 1] if node.level else []
                source = ".".join([*start, *filter(None, [node.module])])
                held = _names(trees.get(_inside(source, package)))
                # What a package's `__init__.py` holds is that, even where a module has the same name
                imports |= {(name, source if a.name in held else f"{source}.{a.name}") for a in node.names}
    found = {(name, _inside(target, package)) for name, target in imports if target.split(".")[0] == package.name}
    return {(name, target if target in modules else target.rpartition(".")[0]) for name, target in found}


def _inside(target: str, package: Path) -> str:
    return target.removeprefix(package.name).removeprefix(".")


def _names(tree: ast.Module | None) -> set[str]:
    """What a module imports by name at its top."""
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom)] if tree else []
    return {alias.asname or alias.name for node in nodes for alias in node.names}


def room_of(module: str) -> str:
    return module.split(".")[0]


def read_arrows(package: Path = PACKAGE) -> dict[str, set[str]]:
    """The rooms that each room imports."""
    arrows = {room_of(module): set() for module in read_modules(package) if module not in FRONT}
    for module, target in read_imports(package):
        if module not in FRONT and room_of(module) != room_of(target):
            arrows[room_of(module)].add(room_of(target))
    return arrows


def floors(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Rooms, each above all that it imports."""

    def height(room: str) -> int:
        return max((height(other) + 1 for other in arrows[room]), default=0)

    heights = {room: height(room) for room in arrows}
    return [sorted(room for room in arrows if heights[room] == level) for level in range(max(heights.values()) + 1)]


def drawn_arrows(arrows: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Arrows that do not follow from others."""

    def below(room: str) -> set[str]:
        return arrows[room].union(*(below(other) for other in arrows[room]))

    return [
        (room, other)
        for room, others in arrows.items()
        for other in sorted(others)
        if not any(other in below(third) for third in others)
    ]
