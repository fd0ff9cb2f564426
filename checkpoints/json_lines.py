"""Files with a JSON object a line, to which programs append until somebody kills them.

    for line in read_lines(Path("log.jsonl"), parse): ...     # line.raw, line.row

Half a line may be left at a kill, and zeros after a power cut. Such a line comes with the row None.
What follows from it is up to the reader: training/run_log.py, evals/kept.py, evals/judge.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from checkpoints.files import open_regular, parse_json
from config import UserError

LONGEST_LINE = 2**26  # bytes: a longer line is damage, and comes in pieces


class Line(NamedTuple):
    """A line of a file."""

    raw: bytes  # with its line break
    row: dict | None  # None: it is damaged


def read_lines(file: Path, parse: Callable[[bytes], dict | None]) -> Iterator[Line]:
    """Yield the lines of a file; none if there is no file.

    parse: returns the row of a line, or None, as `parse_row` does. Raises UserError for what is no
    file, or cannot be read.
    """
    try:
        with open_regular(file) as lines:
            while raw := lines.readline(LONGEST_LINE):
                yield Line(raw, parse(raw))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as e:
        what = f"not a file that can be read ({e.strerror})"
        raise UserError(file, what, "allow reading it, or put it elsewhere") from None


def parse_row(line: bytes, texts: tuple[str, ...]) -> dict | None:
    """Return the JSON object of a line; None if it is none, or has no text under these keys."""
    try:
        row = parse_json(line)
        for key in texts:
            row[key].encode()  # fails for what is no text, or cannot be written as one
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return row
