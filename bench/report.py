"""Writes what was measured into PERFORMANCE.md: tables, and a picture per GPU of every kernel beside its fastest peer.

    python bench/report.py                         # reads bench/results/*/*.json
    python bench/report.py --results DIR --page FILE

Only what stands between `<!-- NAME -->` and `<!-- end -->` is replaced; what has not been measured says so.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from html import escape
from math import ceil, floor, log2
from pathlib import Path
from statistics import geometric_mean

from checkpoints.files import write_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
from bench import data, generate, load, training, video  # noqa: E402
from bench.kernels import OURS  # noqa: E402
from bench.operations import shapes  # noqa: E402

UNMEASURED = "not measured yet"


def main_mode(shape: dict) -> str:
    return "training" if "training" in shape else "forward"


def judged(value: float | None, target: float | None, form: str) -> str:
    """A number beside its target; a missed one is bold."""
    if value is None or target is None:
        return "" if value is None else format(value, form)
    return (
        f"{value:{form}} (≥ {target:{form}})"
        if value >= target
        else f"**{value:{form}}** (≥ {target:{form}})"
    )


def table(measured: dict, names: list[str]) -> str:
    """One operation: a row per shape and mode, a column per peer, the reasons for missing numbers below."""
    both = [cells for m in measured.values() for cells in (m["forward"], m.get("training", {}))]
    peers, notes = [p for p in dict.fromkeys(p for cells in both for p in cells) if p != OURS], []
    lines = ["| " + " | ".join(["shape", "", "ms", "share", "MB", "error", *peers]) + " |"]
    lines.append("|---|---|" + "--:|" * (4 + len(peers)))

    def note(path: str, cell: dict) -> str:
        said = f"{path}: {cell['reason']}"
        notes.extend([said] if said not in notes else [])
        return f"[{notes.index(said) + 1}]"

    for name in names:
        shape = measured.get(name, {"forward": {}, "targets": {}})
        for mode in ("forward", "training")[: 1 + ("training" in shape)]:
            cells, goals = shape[mode], shape["targets"] if mode == main_mode(shape) else {}
            if "ms" in (ours := cells.get(OURS, {})):
                row = [f"{ours['ms']:.3f}", judged(ours["share"], goals.get("share"), ".0%"),
                       judged(ours["megabytes"], None, ".0f"), judged(ours["error"], None, ".0e")]  # fmt: skip
            else:
                row = [note(OURS, ours) if ours else UNMEASURED, "", "", ""]
            for peer in peers:  # one that has nothing to do with this shape leaves an empty cell
                cell = cells.get(peer, {})
                row.append(
                    note(peer, cell)
                    if "reason" in cell
                    else judged(cell.get("ratio"), goals.get(peer), ".2f")
                )
            lines.append("| " + " | ".join([name, mode, *row]) + " |")
    return "\n".join(
        [*lines, "", *(f"{i}. {escape(said, quote=False)}" for i, said in enumerate(notes, 1))]
    ).rstrip()


def best(cells: dict) -> float | None:
    """The fastest peer's time over ours; bounds do less work, and ours in another way is no peer."""
    ratios = [
        c.get("ratio")
        for p, c in cells.items()
        if not p.startswith(OURS) and not p.endswith("(bound)")
    ]
    return min((r for r in ratios if r), default=None)


def picture(gpu: str, operations: dict) -> str:
    """SVG: a bar to the geometric mean over an operation's shapes, a dot for each shape; the axis is logarithmic."""
    left, width, step, out = 150, 560, 30, ['<rect width="100%" height="100%" fill="#fff"/>']
    measured = {name: operations.get(name, {"shapes": {}})["shapes"].values() for name in shapes()}
    ratios = {
        name: [r for m in found if (r := best(m[main_mode(m)]))] for name, found in measured.items()
    }
    seen = [log2(r) for found in ratios.values() for r in found]
    low, high, bottom = floor(min([-1.0, *seen])), ceil(max([1.0, *seen])), 62 + step * len(ratios)

    def x(ratio: float) -> float:
        return left + width * (log2(ratio) - low) / (high - low)

    def text(x: float, y: float, words: str, more: str = ""):
        out.append(f'<text x="{x:.1f}" y="{y}" {more}>{escape(words)}</text>')

    text(16, 24, f"{gpu}: time of the fastest peer / ours", 'font-size="15"')
    text(
        16,
        43,
        "right of 1 ours is faster; bar: mean of the shapes, dot: one shape",
        'fill="#5d6876"',
    )
    for tick in range(low, high + 1):
        colour, at = "#dde2e8" if tick else "#1c2430", x(2**tick)
        out.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="56" y2="{bottom}" stroke="{colour}"/>')
        text(at, bottom + 18, f"{2**tick:g}", 'text-anchor="middle" fill="#5d6876"')
    for y, (name, found) in zip(range(62, bottom, step), ratios.items(), strict=True):
        text(left - 12, y + 17, name, 'text-anchor="end"')
        mean = geometric_mean(found) if found else 1.0
        text(
            *(
                (left + width + 20, y + 17, f"{mean:.2f} x")
                if found
                else (x(1) + 8, y + 17, UNMEASURED)
            )
        )
        place = f'x="{min(x(1), x(mean)):.1f}" y="{y + 4}" width="{abs(x(mean) - x(1)):.1f}" height="18"'
        out.append(f'<rect {place} fill="{"#6aa9ee" if mean >= 1 else "#eb8f52"}"/>')
        out += [
            f'<circle cx="{x(r):.1f}" cy="{y + 13}" r="3.5" fill-opacity="0.6"/>' for r in found
        ]
    size = f'width="{left + width + 90}" height="{bottom + 34}" font-family="DejaVu Sans, sans-serif" font-size="13"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', *out, "</svg>\n"])


def kernels_section(results: dict[Path, dict], page: Path) -> str:
    parts, every = [], {operation: list(made) for operation, made in shapes().items()}
    if all(r["gpu"] == "CPU" for r in results.values()):
        lines = [
            f"| {operation} | {len(names)} | {UNMEASURED} |" for operation, names in every.items()
        ]
        parts.append("\n".join(["| on a GPU | shapes | |", "|---|--:|---|", *lines]))
    for file, result in results.items():
        image, cut = file.with_name("kernels.svg"), result["cut"]
        write_file(image, picture(result["gpu"], result["operations"]))
        of = (
            ""
            if cut == 1
            else f" (1/{cut} of the tokens, batches and vocabularies that the names say)"
        )
        parts.append(f"### {result['gpu']}, {result['dtype']}{of}")
        parts.append(
            f"![each kernel beside its fastest peer]({os.path.relpath(image, page.parent)})"
        )
        for operation, names in every.items():
            one = result["operations"].get(
                operation, {"date": UNMEASURED, "versions": {}, "shapes": {}}
            )
            told = [one["date"], *(f"{k} {v}" for k, v in one["versions"].items() if v)]
            told += [f"{k} {v:.3g}" for k, v in one.get("ceilings", {}).items()]
            parts += [
                f"#### {operation}",
                ", ".join(told),
                *([table(one["shapes"], names)] if one["shapes"] else []),
            ]
    return "\n\n".join(parts)


def training_section(results: dict[Path, dict], page: Path) -> str:
    parts = (
        [] if any(r["machine"] != "cpu" for r in results.values()) else [f"On a GPU: {UNMEASURED}."]
    )
    parts += [f"### {result['machine']}\n\n{training.table(result)}" for result in results.values()]
    return "\n\n".join(parts if results else [f"{UNMEASURED}."])


def printed_section(script, results: dict[Path, dict], page: Path) -> str:
    parts = [
        f"### {file.parent.name}\n\n```\n{script.table(result)}\n```"
        for file, result in results.items()
    ]
    return "\n\n".join(parts or [f"{UNMEASURED}."])


SECTIONS = {"kernels": kernels_section, "training": training_section}
SECTIONS |= {
    s.__name__.removeprefix("bench."): partial(printed_section, s)
    for s in (generate, load, data, video)
}


def main(argv: list[str]):
    parser = config.parser(__doc__)
    parser.add_argument(
        "--results", type=Path, default=ROOT / "bench" / "results", help="a folder per machine"
    )
    parser.add_argument(
        "--page", type=Path, default=ROOT / "PERFORMANCE.md", help="the page with the marks"
    )
    args = parser.parse_args(argv)
    text = args.page.read_text()
    for name, section in SECTIONS.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not mark or not end:
            raise config.UserError(
                args.page, f"no <!-- {name} --> before an <!-- end -->", "put the two lines back"
            )
        results = {
            file: json.loads(file.read_text())
            for file in sorted(args.results.glob(f"*/{name}.json"))
        }
        text = f"{before}{mark}\n{section(results, args.page)}\n\n{end}{after}"
        print(f"{name}: {len(results)} files")
    write_file(args.page, text)


if __name__ == "__main__":
    config.cli(main, __doc__)
