"""Files with a JSON object a line, to which programs append until somebody kills them.

    for line, row in read_lines(Path("log.jsonl"), parse): ...

Half a line may be left at a kill, and zeros after a power cut. Such a line comes with the row None.
What follows from it is up to the reader: training/run_log.py, evals/kept.py, evals/judge.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from checkpoints.files import open_regular, parse_json
from config import UserError

# Returns the row of a line, or None for a damaged one, as `parse_row` does.
Parser = Callable[[bytes], dict | None]

LONGEST_LINE = 2**26  # bytes: a longer line is damage, and comes in pieces


def read_lines(file: Path, parse: Parser) -> Iterator[tuple[bytes, dict | None]]:
    """Yield each line of a file with its line break, and what `parse` makes of it.

    No file is a file without lines. Raises UserError for what cannot be read as a file.
    """
    try:
        with open_regular(file) as lines:
            while line := lines.readline(LONGEST_LINE):
                yield line, parse(line)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as e:
        what = f"not a file that can be read ({e.strerror})"
        raise UserError(file, what, "allow reading it, or put it elsewhere") from None


def parse_row(line: bytes | str, texts: tuple[str, ...]) -> dict | None:
    """Return the JSON object of a line; None if it is none, or has no text under these keys."""
    try:
        row = parse_json(line)
        for key in texts:
            row[key].encode()  # fails for what is no text, or cannot be written as one
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return row
