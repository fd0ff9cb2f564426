"""Write what was measured into PERFORMANCE.md.

    python bench/report.py                         # reads bench/results/*/*.json
    python bench/report.py --results DIR --page FILE

Each benchmark has a section of the page, between `<!-- NAME -->` and `<!-- end -->`. Only what
stands between the two is replaced. What has not been measured says so.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import command_line  # noqa: E402
import config  # noqa: E402
from bench import connectors, data, generate, load, nanovlm, training, video  # noqa: E402
from bench.common import RESULTS  # noqa: E402
from bench.kernels_page import UNMEASURED, kernels_section  # noqa: E402
from checkpoints.files import write_file  # noqa: E402


def training_section(results: dict[Path, dict], page: Path) -> str:
    """Return a table per machine."""
    if not results:
        return f"{UNMEASURED}."
    parts = []
    if all(result["machine"] == "cpu" for result in results.values()):
        parts.append(f"On a GPU: {UNMEASURED}.")
    for result in results.values():
        parts.append(f"### {result['machine']}\n\n{training.table(result)}")
    return "\n\n".join(parts)


def printed_section(script, results: dict[Path, dict], page: Path) -> str:
    """Return per machine what the benchmark itself prints."""
    if not results:
        return f"{UNMEASURED}."
    parts = []
    for file, result in results.items():
        parts.append(f"### {file.parent.name}\n\n```\n{script.table(result)}\n```")
    return "\n\n".join(parts)


SECTIONS = {
    "kernels": kernels_section,
    "training": training_section,
    "nanovlm": partial(printed_section, nanovlm),
    "connectors": partial(printed_section, connectors),
    "generate": partial(printed_section, generate),
    "load": partial(printed_section, load),
    "data": partial(printed_section, data),
    "video": partial(printed_section, video),
}


def replace_section(text: str, name: str, section: str, page: Path) -> str:
    """Return the page with a section replaced. Raise UserError if its two marks are not there."""
    before, mark, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not mark or not end:
        what = f"no <!-- {name} --> before an <!-- end -->"
        raise config.UserError(page, what, "put the two lines back")
    return f"{before}{mark}\n{section}\n\n{end}{after}"


def main(argv: list[str]):
    parser = command_line.parser(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="a folder per machine")
    parser.add_argument(
        "--page", type=Path, default=ROOT / "PERFORMANCE.md", help="the page with the marks"
    )
    args = parser.parse_args(argv)
    text = args.page.read_text()
    for name, write_section in SECTIONS.items():
        results = {}
        for file in sorted(args.results.glob(f"*/{name}.json")):
            # lab/ is no machine's folder: it has the laboratory's tables, which LAB.md shows.
            if file.parent.name != "lab":
                results[file] = json.loads(file.read_text())
        text = replace_section(text, name, write_section(results, args.page), args.page)
        print(f"{name}: {len(results)} files")
    write_file(args.page, text)


if __name__ == "__main__":
    command_line.cli(main, __doc__)
