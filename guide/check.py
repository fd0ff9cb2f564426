"""What is wrong with a chapter before any of its blocks runs: quotes, names, pictures, links.

- Lines quoted with source=file.py:name stand there, in this order.
- A name in running text, written as `packing.py:bin_pack`, is a name in that file.
- Every picture exists and has a text alternative.
- Every link leads to a file, and to a heading of it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from guide.blocks import ROOT, find_source, parse_markdown, quote_problem, read_blocks
from guide.blocks import source_problem as name_problem

NAME = re.compile(r"[\w/]+\.py:[\w.]+")


class Problem(NamedTuple):
    """Something in a chapter that does not hold."""

    where: str  # "guide/01-labels.md:42"
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def check_chapter(chapter: Path) -> list[Problem]:
    """Return what is wrong with the quotes, names, pictures and links of a chapter."""
    problems = []
    for block in read_blocks(chapter):
        if block.source:
            wrong = name_problem(block.source)
            if wrong is None:
                file, _, name = block.source.partition(":")
                source = find_source((ROOT / file).read_text(), name)
                line = quote_problem(block.text, source)
                if line is not None:
                    wrong = f"in {block.source} this line does not stand there: {line}"
            if wrong is not None:
                problems.append(Problem(block.where, wrong))

    for line, token in inline_tokens(chapter.read_text()):
        wrong = None
        if token.type == "code_inline" and NAME.fullmatch(token.content):
            wrong = name_problem(token.content)
        elif token.type == "image":
            wrong = picture_problem(chapter, token.attrs["src"], token.content)
        elif token.type == "link_open":
            wrong = link_problem(chapter, token.attrs["href"])
        if wrong is not None:
            problems.append(Problem(f"{chapter.relative_to(ROOT)}:{line}", wrong))
    return problems


def inline_tokens(text: str) -> Iterator[tuple[int, object]]:
    """Yield (line of the paragraph, token) for what stands inside the lines of Markdown."""
    for token in parse_markdown(text):
        if token.type == "inline":
            line = token.map[0] + 1
            for child in token.children:
                yield line, child


def picture_problem(chapter: Path, source: str, alternative: str) -> str | None:
    """Return what is wrong with a picture, or None."""
    if not (chapter.parent / source).is_file():
        return f"{source}: no such picture"
    if len(alternative.split()) < 4:
        return f"{source}: its text alternative does not say what is seen"
    return None


def link_problem(chapter: Path, target: str) -> str | None:
    """Return what is wrong with a link, or None. What lies on the web is not looked up."""
    if re.match(r"\w+:", target):
        return None
    name, _, anchor = target.partition("#")
    file = chapter
    if name:
        file = chapter.parent / name
    if not file.exists():
        return f"{target}: no such file"
    if anchor and file.suffix == ".md" and anchor not in anchors(file.read_text()):
        return f"{target}: no such heading"
    return None


def anchors(text: str) -> list[str]:
    """Return the anchors that GitHub gives to the headings of Markdown."""
    found = []
    tokens = parse_markdown(text)
    for token, content in zip(tokens, tokens[1:], strict=False):
        if token.type == "heading_open":
            found.append(anchor_of(content))
    return found


def anchor_of(heading) -> str:
    """Return the anchor of a heading, of its inline token: small letters, and - for spaces."""
    text = "".join(child.content for child in heading.children)
    kept = re.sub(r"[^\w\- ]", "", text.lower())
    return kept.replace(" ", "-")
