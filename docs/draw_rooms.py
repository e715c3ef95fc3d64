# SPDX-License-Identifier: Apache-2.0
"""
Draw the rooms of the package, their modules, and which room imports which, into `docs/images/rooms.png`.

```shell
python docs/draw_rooms.py
```

A room stands above all that it imports. An arrow is left out where others lead to the same room; the last line of a
box names all rooms that it imports.
"""

import ast
import textwrap
from pathlib import Path

import matplotlib
from read_rooms import PACKAGE, drawn_arrows, floors, read_arrows, read_modules


matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402


IMAGE = Path(__file__).resolve().parent / "images" / "rooms.png"
COLORS = ["#dbe5ee", "#e3ebe0", "#f5efdf", "#ede6ef", "#eeeeee", "#e0ecec"]  # of floors, from the lowest
INK, GREY = "#26323d", "#66727d"
# Inches
WIDTH, GAP, FLOOR_GAP, MARGIN = 12.0, 0.35, 0.75, 0.15
COLUMN, LINE = 1.6, 0.19


class Box:
    """A room: title, purpose, modules in columns, and what it imports."""

    def __init__(self, room: str, arrows: dict[str, set[str]], modules: dict[str, Path]):
        self.room = room
        self.names = [name.partition(".")[2] for name in modules if name.startswith(f"{room}.")]
        self.doc = ast.get_docstring(ast.parse(modules[room].read_text(encoding="utf-8"))).split("\n")[0]
        self.imports = ", ".join(sorted(arrows[room])) or "no other room"
        self.weight = 1 + len(self.names) // 5

    def place(self, left: float, width: float) -> float:
        """Sets where it stands in its floor; returns the height that it needs."""
        self.left, self.width = left, width
        self.num_columns = max(1, int((width - 0.2) / COLUMN))
        self.doc_lines = textwrap.wrap(self.doc, int((width - 0.3) / 0.072))
        self.import_lines = textwrap.wrap(f"imports {self.imports}", int((width - 0.3) / 0.065))
        self.num_rows = -(-len(self.names) // self.num_columns)
        return 0.5 + LINE * (len(self.doc_lines) + self.num_rows + len(self.import_lines)) + 0.3

    def draw(self, axes: plt.Axes, bottom: float, height: float, color: str) -> None:
        self.bottom, self.top, left = bottom, bottom + height, self.left + 0.15
        style = {"boxstyle": "round,pad=0,rounding_size=0.08", "edgecolor": "#8894a0", "linewidth": 1.0}
        axes.add_patch(FancyBboxPatch((self.left, bottom), self.width, height, facecolor=color, zorder=3, **style))
        text = {"va": "center", "zorder": 4, "color": INK}
        axes.text(left, self.top - 0.26, self.room, weight="bold", size=13, **text)
        y = self.top - 0.55
        for line in self.doc_lines:
            axes.text(left, y, line, size=9, **text)
            y -= LINE
        for place, name in enumerate(self.names):
            column, row = divmod(place, self.num_rows)
            axes.text(left + COLUMN * column, y - 0.07 - LINE * row, name, size=9, family="monospace", **text)
        for row, line in enumerate(reversed(self.import_lines)):
            axes.text(left, bottom + 0.16 + LINE * row, line, size=8.5, style="italic", **{**text, "color": GREY})

    @property
    def middle(self) -> float:
        return self.left + self.width / 2


def draw_arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    line = {"arrowstyle": "-|>", "mutation_scale": 13, "color": GREY, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, zorder=2, **line))


def draw_arrows(axes: plt.Axes, arrows: list[tuple[str, str]], boxes: dict[str, Box], levels: dict[str, int]) -> None:
    for room, other in arrows:
        box, target = boxes[room], boxes[other]
        incoming = sorted((r for r, o in arrows if o == other), key=lambda r: boxes[r].middle)
        end = target.left + target.width * (incoming.index(room) + 1) / (len(incoming) + 1)
        if levels[room] - levels[other] > 1:  # around the floors between them
            x, y, start = WIDTH + 0.25, target.top + FLOOR_GAP / 3, (box.bottom + box.top) / 2
            axes.plot([WIDTH, x, x, end], [start, start, y, y], color=GREY, linewidth=1.3, zorder=2)
            draw_arrow(axes, (end, y), (end, target.top))
            continue
        below = [other for r, other in arrows if r == room and levels[room] - levels[other] == 1]
        outgoing = sorted(below, key=lambda other: boxes[other].middle)
        x = box.left + box.width * (outgoing.index(other) + 1) / (len(outgoing) + 1)
        draw_arrow(axes, (x, box.bottom), (end, target.top))


def draw(package: Path = PACKAGE, image: Path = IMAGE) -> None:
    arrows, modules = read_arrows(package), read_modules(package)
    boxes = {room: Box(room, arrows, modules) for room in arrows}
    figure = plt.figure()
    axes = figure.add_axes((0, 0, 1, 1))
    bottom, levels = 0.0, {}
    for level, rooms in enumerate(floors(arrows)):
        free = WIDTH - GAP * (len(rooms) - 1)
        left, height = 0.0, 0.0
        for room in rooms:
            width = free * boxes[room].weight / sum(boxes[other].weight for other in rooms)
            height = max(height, boxes[room].place(left, width))
            left += width + GAP
        for room in rooms:
            boxes[room].draw(axes, bottom, height, COLORS[level % len(COLORS)])
        levels |= dict.fromkeys(rooms, level)
        bottom += height + FLOOR_GAP
    draw_arrows(axes, drawn_arrows(arrows), boxes, levels)
    size = WIDTH + 0.5 + 2 * MARGIN, bottom - FLOOR_GAP + 2 * MARGIN
    figure.set_size_inches(size)
    axes.set(xlim=(-MARGIN, size[0] - MARGIN), ylim=(-MARGIN, size[1] - MARGIN))
    axes.axis("off")
    figure.savefig(image, dpi=110)


if __name__ == "__main__":
    draw()
