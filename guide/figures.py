"""Draw the figures of the guide into guide/images/, which is committed.

    python -m guide.figures        # all
    python -m guide.figures 1 12   # those of chapters 1 and 12

guide/drawings/chNN.py has the functions that draw, each from tensors that it computes.
"""

import importlib
import math
import re
from collections.abc import Callable

import command_line
from config import UserError
from guide.blocks import GUIDE, NUMBER

IMAGES = GUIDE / "images"
HEX = re.compile("#([0-9a-f]{2})([0-9a-f]{2})([0-9a-f]{2})")
WORDS = re.compile(">([^<]+)<")  # what is read in the picture
WHOLE = re.compile(r"(?<![\d.])\d+(?![\d.])")

# How far numbers of two drawings of one figure may be apart: machines round differently.
RELATIVE = 0.02
ABSOLUTE = 0.05  # of a length
COLOUR_STEPS = 3  # of 255


def drawings() -> list[str]:
    """Return the chapters that have figures, as "ch01"."""
    return sorted(path.stem for path in (GUIDE / "drawings").glob("ch[0-9][0-9].py"))


def figures_of(chapter: str) -> dict[str, Callable[[], str]]:
    """Return the figures of a chapter: file name -> the function that draws it."""
    return importlib.import_module(f"guide.drawings.{chapter}").FIGURES


def of_trained_model(chapter: str, name: str) -> bool:
    """Say whether a figure shows a model that the chapter trains."""
    return name in getattr(importlib.import_module(f"guide.drawings.{chapter}"), "TRAINED", ())


def same_figure(a: str, b: str, trained: bool = False) -> bool:
    """Say whether two SVG texts differ in nothing but roundings.

    trained: they show a model that was trained for them. Roundings grow in training, so another
    processor makes another model: its numbers and colours are not compared, its shapes and words
    are.
    """
    if trained:
        return shapes_and_words(a) == shapes_and_words(b)

    lines_a = a.splitlines()
    lines_b = b.splitlines()
    if len(lines_a) != len(lines_b):
        return False
    for x, y in zip(lines_a, lines_b, strict=True):
        colours = zip(colour_parts(x), colour_parts(y), strict=False)
        if any(abs(p - q) > COLOUR_STEPS for p, q in colours):
            return False
        if not same_numbers(HEX.sub("#", x), HEX.sub("#", y)):
            return False
        if whole_numbers(x) != whole_numbers(y):
            return False
    return True


def shapes_and_words(svg: str) -> str:
    """Return an SVG text without its numbers and colours."""
    return NUMBER.sub("0", HEX.sub("#", svg))


def whole_numbers(line: str) -> list[str]:
    """Return the whole numbers that are read in a line: counts and ids, which nothing rounds."""
    return [number for words in WORDS.findall(line) for number in WHOLE.findall(words)]


def same_numbers(a: str, b: str) -> bool:
    """Say whether two lines without colours differ in nothing but roundings."""
    parts_a = NUMBER.split(a)
    parts_b = NUMBER.split(b)
    if len(parts_a) != len(parts_b) or parts_a[::2] != parts_b[::2]:
        return False
    for x, y in zip(parts_a[1::2], parts_b[1::2], strict=True):
        if not math.isclose(float(x), float(y), rel_tol=RELATIVE, abs_tol=ABSOLUTE):
            return False
    return True


def colour_parts(line: str) -> list[int]:
    """Return red, green and blue of all colours in a line."""
    return [int(part, 16) for colour in HEX.findall(line) for part in colour]


def main(argv: list[str]):
    parser = command_line.parser(__doc__)
    parser.prog = "-m guide.figures"
    parser.add_argument("chapters", nargs="*", type=int, metavar="CHAPTER", help="its number")
    options = parser.parse_args(argv)

    chosen = [f"ch{number:02d}" for number in options.chapters] or drawings()
    for chapter in chosen:
        if chapter not in drawings():
            raise UserError("command line", f"{chapter} has no figures", "name another chapter")
        for name, draw in figures_of(chapter).items():
            file = IMAGES / name
            drawn = draw()
            # A figure that is the same but for roundings stays, so that nothing is committed twice.
            trained = of_trained_model(chapter, name)
            if file.exists() and same_figure(file.read_text(), drawn, trained):
                print(f"{name} holds")
            else:
                IMAGES.mkdir(exist_ok=True)
                file.write_text(drawn)
                print(f"{name} written")


if __name__ == "__main__":
    command_line.cli(main, __doc__)
