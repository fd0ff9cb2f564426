"""What a chapter of the guide holds: blocks of code, quotes of our code, names, links, pictures.

    for block in read_blocks(Path("guide/01-labels.md")): ...

A chapter is Markdown. The info string of a fence says what its block is, its first word the
language:

    python                        runs; all python blocks of a chapter share their names
    python raises=ValueError      runs, and must end with this error
    python source=packing.py:bin_pack
                                  quotes lines of a function or class and is not run; `...` stands
                                  for lines left out
    sh                            a command, typed in the repository's folder
    sh fails                      a command that must end with an error
    output, output tolerance=0.05 what the block directly above it prints; a line `...` stands for
                                  any lines

The words `demo` and `slow` behind `python` or `sh` are tags: the block needs the trained model in
out/demo, or takes more than ten seconds. Fences of any other language are only shown.
"""

import ast
import math
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from config import UserError

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "guide"

RUNNABLE = ("python", "sh")
TAGS = ("demo", "slow")
OPTIONS = ("raises", "source", "tolerance")
WORDS = (*TAGS, "fails")

# Relative, for numbers with a decimal point or an exponent. Whole numbers must be equal.
TOLERANCE = 1e-3

# Where both numbers are as small as this they are the same: float32 noise around zero.
NOISE = 1e-6

NUMBER = re.compile(r"(?<![\w.])([-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)")


class Fence(NamedTuple):
    """A fenced block as it stands in the file; line numbers count from 1."""

    info: list[str]
    text: str
    first: int  # the line of the opening fence
    last: int  # the line of the closing fence


@dataclass
class Block:
    """A block that is run or quoted, with the output that stands below it."""

    chapter: Path
    language: str
    words: set[str]  # tags, and "fails"
    options: dict[str, str]
    text: str
    first: int
    last: int
    output: Fence | None = None

    @property
    def where(self) -> str:
        """Return "guide/01-labels.md:42"."""
        return f"{self.chapter.relative_to(ROOT)}:{self.first}"

    @property
    def tags(self) -> set[str]:
        """Return what the block needs: of TAGS."""
        return self.words & set(TAGS)

    @property
    def source(self) -> str | None:
        """Return what a quote quotes, "file.py:name"; None for a block that is run."""
        return self.options.get("source")


def chapters() -> list[Path]:
    """Return the files of all chapters, in order."""
    return sorted(GUIDE.glob("[0-9][0-9]-*.md"))


def parse_markdown(text: str) -> list:
    """Return the tokens of Markdown. Raise UserError where markdown-it-py is not installed."""
    return markdown_parser().parse(text)


def markdown_parser():
    """Return a CommonMark parser with tables. Raise UserError where it is not installed."""
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        fix = "pip install '.[guide]'"
        raise UserError("guide", "markdown-it-py is not installed", fix) from None
    return MarkdownIt("commonmark").enable("table")


# ---------------------------------------------------------------------------------------- reading


def read_fences(text: str) -> list[Fence]:
    """Return all fenced blocks of a chapter's text."""
    fences = []
    for token in parse_markdown(text):
        if token.type == "fence":
            start, end = token.map
            fences.append(Fence(token.info.split(), token.content, start + 1, end))
    return fences


def read_blocks(chapter: Path, text: str | None = None) -> list[Block]:
    """Return the blocks of a chapter that are run or quoted. Raise UserError for a wrong fence."""
    if text is None:
        text = chapter.read_text()
    lines = text.splitlines()

    blocks = []
    for fence in read_fences(text):
        language = fence.info[0] if fence.info else ""
        where = f"{chapter.name}:{fence.first}"
        words, options = read_info(fence.info[1:], where)

        if language in RUNNABLE:
            block = Block(chapter, language, words, options, fence.text, fence.first, fence.last)
            blocks.append(block)
        elif language == "output":
            # It belongs to the block above it, with nothing but empty lines between them.
            above = blocks[-1] if blocks else None
            follows = above is not None and not any(lines[above.last : fence.first - 1])
            if not follows or above.output is not None:
                raise UserError(where, "an output below no block", "put it below its block")
            above.output = fence
    return blocks


def read_info(words: list[str], where: str) -> tuple[set[str], dict[str, str]]:
    """Return the words and the options of an info string, without its language."""
    plain = set()
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in OPTIONS:
            options[key] = value
        elif not equals and key in WORDS:
            plain.add(key)
        else:
            known = ", ".join([*WORDS, *OPTIONS])
            raise UserError(where, f"{word!r} is unknown in a fence", f"use one of {known}")
    return plain, options


# --------------------------------------------------------------------------------------- outputs


def same_output(shown: str, printed: str, tolerance: float | None = None) -> bool:
    """Say whether what a block printed is what the chapter shows. tolerance: relative."""
    return _same_lines(_lines(shown), _lines(printed), tolerance)


def _lines(text: str) -> list[str]:
    """Return lines with single spaces, without empty lines around them."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    while lines and not lines[0]:
        lines.pop(0)
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _same_lines(shown: list[str], printed: list[str], tolerance: float | None) -> bool:
    """Compare lines; `...` stands for any number of them."""
    if not shown:
        return not printed
    if shown[0] == "...":
        rests = range(len(printed) + 1)
        return any(_same_lines(shown[1:], printed[rest:], tolerance) for rest in rests)
    if not printed or not same_line(shown[0], printed[0], tolerance):
        return False
    return _same_lines(shown[1:], printed[1:], tolerance)


def same_line(a: str, b: str, tolerance: float | None = None) -> bool:
    """Say whether two lines differ in nothing but numbers that are close.

    tolerance: relative, and for whole numbers, too. None: TOLERANCE, and whole numbers are equal.
    """
    # The pattern has one group, so numbers stand at odd places and the text between at even ones.
    parts_a = NUMBER.split(a)
    parts_b = NUMBER.split(b)
    if len(parts_a) != len(parts_b) or parts_a[::2] != parts_b[::2]:
        return False
    pairs = zip(parts_a[1::2], parts_b[1::2], strict=True)
    return all(same_number(x, y, tolerance) for x, y in pairs)


def same_number(a: str, b: str, tolerance: float | None = None) -> bool:
    """Say whether two numbers are close, see `same_line`."""
    if a == b:
        return True
    whole = re.fullmatch(r"[-+]?\d+", a) and re.fullmatch(r"[-+]?\d+", b)
    if whole and tolerance is None:
        return int(a) == int(b)
    if tolerance is None:
        tolerance = TOLERANCE
    return math.isclose(float(a), float(b), rel_tol=tolerance, abs_tol=NOISE)


# ----------------------------------------------------------------------------------------- quotes


def find_source(source: str, name: str) -> str | None:
    """Return the text of what is called `name` in a Python source; None if there is no such thing.

    name: a function, a class, a constant, or "Class.method"; "" for the whole source.
    """
    if not name:
        return source
    body = ast.parse(source).body
    found = None
    for part in name.split("."):
        found = _named(body, part)
        if found is None:
            return None
        body = getattr(found, "body", [])

    first = found.lineno
    for decorator in getattr(found, "decorator_list", []):
        first = min(first, decorator.lineno)
    return "\n".join(source.splitlines()[first - 1 : found.end_lineno])


def _named(body: list[ast.stmt], name: str) -> ast.stmt | None:
    """Return the statement in a body that defines a name."""
    for node in body:
        if getattr(node, "name", None) == name:
            return node
        targets = getattr(node, "targets", [])
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if any(getattr(target, "id", None) == name for target in targets):
            return node
    return None


def source_problem(reference: str) -> str | None:
    """Return what is wrong with "file.py:name"; None if the file has that name."""
    file, _, name = reference.partition(":")
    path = ROOT / file
    if not path.is_file():
        return f"{file}: no such file"
    if find_source(path.read_text(), name) is None:
        return f"{file}: nothing in it is called {name}"
    return None


def quote_problem(quote: str, source: str) -> str | None:
    """Return the first line of a quote that is not in a source in this order; None if all are.

    Lines that follow each other in the quote do so in the source, but for empty ones; `...` stands
    for lines left out. Only the indentation of the whole quote may differ.
    """
    wanted = _without_empty(textwrap.dedent(quote))
    there = _without_empty(textwrap.dedent(source))
    shortest = len(wanted)
    problem = None

    # The quote may be of an inner block: it is dedented, so try each depth that the source has.
    for depth in sorted({len(line) - len(line.lstrip()) for line in there}):
        left = _quote_rest([_indent(line, depth) for line in wanted], there)
        if not left:
            return None
        if problem is None or len(left) < shortest:
            shortest = len(left)
            problem = left[0]
    return problem.strip() if problem else "the source is empty"


def _without_empty(text: str) -> list[str]:
    """Return the lines of a text that are not empty."""
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def _indent(line: str, depth: int) -> str:
    """Return a line moved to the right."""
    return " " * depth + line


def _quote_rest(wanted: list[str], there: list[str]) -> list[str]:
    """Return what is left of the quote when its longest beginning was found; [] if all was."""
    if not wanted:
        return []
    if wanted[0].strip() == "...":
        return _quote_rest(wanted[1:], there)

    # Take the lines up to the next `...`, and every place where they stand.
    run = []
    for line in wanted:
        if line.strip() == "...":
            break
        run.append(line)
    rest = wanted
    for start in range(len(there)):
        same = 0
        while same < len(run) and there[start + same : start + same + 1] == [run[same]]:
            same += 1
        left = wanted[same:]
        if same == len(run):
            left = _quote_rest(wanted[same:], there[start + same :])
        if len(left) < len(rest):
            rest = left
    return rest
