"""The kernels' section of PERFORMANCE.md: tables, and a picture per GPU.

    text = kernels_section({file: result}, page)    # also writes kernels.svg beside each file

A result is what bench/kernels.py writes: for each operation and shape a cell of numbers, or of a
reason, for every path. The file in order: the tables, the picture, the section.
"""

from __future__ import annotations

import math
import os
from html import escape
from pathlib import Path
from statistics import geometric_mean

from bench.common import OURS, name_versions
from bench.operations import shapes
from checkpoints.files import write_file

UNMEASURED = "not measured yet"
MODES = ("forward", "training")

# The picture, in pixels.
LEFT = 150
WIDTH = 560
ROW = 30
TOP = 62


def main_mode(shape: dict) -> str:
    """Return the mode that targets and the picture are about: training where there is one."""
    return "training" if "training" in shape else "forward"


# ---------------------------------------------------------------------- tables


def judged(value: float | None, target: float | None, form: str) -> str:
    """Return a number beside its target; a missed one is bold."""
    if value is None:
        return ""
    if target is None:
        return format(value, form)
    if value >= target:
        return f"{value:{form}} (≥ {target:{form}})"
    return f"**{value:{form}}** (≥ {target:{form}})"


class Notes:
    """The reasons for missing numbers, numbered, below a table."""

    def __init__(self):
        self.texts = []

    def refer(self, path: str, cell: dict) -> str:
        """Return "[1]", the number of a cell's reason."""
        text = f"{path}: {cell['reason']}"
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"

    def lines(self) -> list[str]:
        return [f"{i}. {escape(text, quote=False)}" for i, text in enumerate(self.texts, 1)]


def peers_of(measured: dict) -> list[str]:
    """Return the names of all peers of an operation, in order."""
    names = {}  # a dict keeps the order, and each name once
    for shape in measured.values():
        for mode in MODES:
            names.update(dict.fromkeys(shape.get(mode, {})))
    return [name for name in names if name != OURS]


def row(name: str, mode: str, shape: dict, peers: list[str], notes: Notes) -> str:
    """Return the row of one shape in one mode."""
    cells = shape[mode]
    targets = shape["targets"] if mode == main_mode(shape) else {}
    ours = cells.get(OURS)
    if ours is None:
        columns = [UNMEASURED, "", "", ""]
    elif "reason" in ours:
        columns = [notes.refer(OURS, ours), "", "", ""]
    else:
        columns = [
            f"{ours['ms']:.3f}",
            judged(ours["share"], targets.get("share"), ".0%"),
            judged(ours["megabytes"], None, ".0f"),
            judged(ours["error"], None, ".0e"),
        ]

    for peer in peers:  # a peer that has nothing to do with this shape leaves an empty cell
        cell = cells.get(peer, {})
        if "reason" in cell:
            columns.append(notes.refer(peer, cell))
        else:
            columns.append(judged(cell.get("ratio"), targets.get(peer), ".2f"))
    return "| " + " | ".join([name, mode, *columns]) + " |"


def table(measured: dict, names: list[str]) -> str:
    """Return one operation: a row per shape and mode, a column per peer, and the notes."""
    peers = peers_of(measured)
    notes = Notes()
    lines = [
        "| " + " | ".join(["shape", "", "ms", "share", "MB", "error", *peers]) + " |",
        "|---|---|" + "--:|" * (4 + len(peers)),
    ]
    for name in names:
        shape = measured.get(name, {"forward": {}, "targets": {}})
        for mode in MODES:
            if mode in shape:
                lines.append(row(name, mode, shape, peers, notes))
    return "\n".join([*lines, "", *notes.lines()]).rstrip()


# ---------------------------------------------------------------------- the picture


def fastest_peer(cells: dict) -> float | None:
    """Return the fastest peer's time over ours, if there is one.

    A bound does less work, and ours in another way is no peer.
    """
    ratios = []
    for name, cell in cells.items():
        is_peer = not name.startswith(OURS) and not name.endswith("(bound)")
        if is_peer and cell.get("ratio"):
            ratios.append(cell["ratio"])
    return min(ratios, default=None)


def ratios_of(operations: dict) -> dict[str, list[float]]:
    """Return the fastest peer's ratio of each shape, by operation."""
    found = {}
    for operation in shapes():
        found[operation] = []
        for shape in operations.get(operation, {"shapes": {}})["shapes"].values():
            ratio = fastest_peer(shape[main_mode(shape)])
            if ratio:
                found[operation].append(ratio)
    return found


class Picture:
    """An SVG whose x axis is a ratio, logarithmic."""

    def __init__(self, ratios: list[float]):
        logarithms = [math.log2(ratio) for ratio in ratios]
        self.low = math.floor(min([-1.0, *logarithms]))
        self.high = math.ceil(max([1.0, *logarithms]))
        self.parts = ['<rect width="100%" height="100%" fill="#fff"/>']

    def x(self, ratio: float) -> float:
        return LEFT + WIDTH * (math.log2(ratio) - self.low) / (self.high - self.low)

    def text(self, x: float, y: float, words: str, more: str = ""):
        self.parts.append(f'<text x="{x:.1f}" y="{y}" {more}>{escape(words)}</text>')

    def axis(self, bottom: int):
        """Draw a line at each power of two."""
        for power in range(self.low, self.high + 1):
            ratio = 2.0**power
            colour = "#1c2430" if power == 0 else "#dde2e8"
            x = f"{self.x(ratio):.1f}"
            self.parts.append(f'<line x1="{x}" x2="{x}" y1="56" y2="{bottom}" stroke="{colour}"/>')
            self.text(
                self.x(ratio), bottom + 18, f"{ratio:g}", 'text-anchor="middle" fill="#5d6876"'
            )

    def bar(self, y: int, ratios: list[float]):
        """Draw a bar from 1 to the geometric mean, and a dot for each ratio."""
        one = self.x(1)
        if not ratios:
            self.text(one + 8, y + 17, UNMEASURED)
            return
        mean = geometric_mean(ratios)
        end = self.x(mean)
        colour = "#6aa9ee" if mean >= 1 else "#eb8f52"
        place = f'x="{min(one, end):.1f}" y="{y + 4}" width="{abs(end - one):.1f}" height="18"'
        self.parts.append(f'<rect {place} fill="{colour}"/>')
        for ratio in ratios:
            place = f'cx="{self.x(ratio):.1f}" cy="{y + 13}"'
            self.parts.append(f'<circle {place} r="3.5" fill-opacity="0.6"/>')
        self.text(LEFT + WIDTH + 20, y + 17, f"{mean:.2f} x")

    def svg(self, bottom: int) -> str:
        size = f'width="{LEFT + WIDTH + 90}" height="{bottom + 34}"'
        font = 'font-family="DejaVu Sans, sans-serif" font-size="13"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>'
        return "\n".join([head, *self.parts, "</svg>\n"])


def draw(gpu: str, operations: dict) -> str:
    """Return the picture of a GPU: a bar for each operation."""
    ratios = ratios_of(operations)
    bottom = TOP + ROW * len(ratios)
    picture = Picture([ratio for some in ratios.values() for ratio in some])
    picture.text(16, 24, f"{gpu}: time of the fastest peer / ours", 'font-size="15"')
    explanation = "right of 1 ours is faster; bar: mean of the shapes, dot: one shape"
    picture.text(16, 43, explanation, 'fill="#5d6876"')
    picture.axis(bottom)
    for number, (operation, some) in enumerate(ratios.items()):
        y = TOP + ROW * number
        picture.text(LEFT - 12, y + 17, operation, 'text-anchor="end"')
        picture.bar(y, some)
    return picture.svg(bottom)


# ---------------------------------------------------------------------- the section


def unmeasured_table() -> str:
    """Return the list of operations that nothing is known of."""
    lines = ["| on a GPU | shapes | |", "|---|--:|---|"]
    for operation, made in shapes().items():
        lines.append(f"| {operation} | {len(made)} | {UNMEASURED} |")
    return "\n".join(lines)


def kernels_section(results: dict[Path, dict], page: Path) -> str:
    """Return the tables of each GPU and write its picture beside its result."""
    if not results:
        return unmeasured_table()

    parts = []
    for file, result in results.items():
        image = file.with_name("kernels.svg")
        write_file(image, draw(result["gpu"], result["operations"]))
        link = os.path.relpath(image, page.parent)
        parts.append(f"### {result['gpu']}, {result['dtype']}")
        parts.append(f"![each kernel beside its fastest peer]({link})")
        for operation, made in shapes().items():
            parts.append(f"#### {operation}")
            measured = result["operations"].get(operation)
            if measured is None:
                parts.append(UNMEASURED)
                continue
            facts = [measured["date"], *name_versions(measured["versions"])]
            for what, value in measured.get("ceilings", {}).items():
                facts.append(f"{what} {value:.3g}")
            parts.append(", ".join(facts))
            if measured["shapes"]:
                parts.append(table(measured["shapes"], list(made)))
    return "\n\n".join(parts)
