"""The files of a benchmark: find them, read their rows, and name the row that is wrong.

    for where, row in read_rows(find_first(data_dir, "data/questions.json", "questions.json")):
        with errors_at(where):
            prompt = row["question"]

Everything that is wrong with a file is a UserError that begins with the file, or with "file:row".
Rows are counted from 0.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from checkpoints.files import write_file
from config import UserError

MEND_FILE = "mend it, or fetch it again"


def find_first(data_dir: str | Path, *names: str) -> Path:
    """Return the first of these files or folders that `data_dir` has.

    Raise UserError if it has none of them.
    """
    for name in names:
        path = Path(data_dir) / name
        if path.exists():
            return path

    missing = Path(data_dir) / names[0]
    fix = f"--data: a folder with {' or '.join(names)}"
    raise UserError(missing, "no such file or folder", fix)


def read_rows(file: Path, lines: bool = False, part: str | None = None) -> list[tuple[str, dict]]:
    """Return [("file:row", row)] of a JSON file; the arguments are those of `read_table`."""
    table = read_table(file, lines, part)
    return [(f"{file}:{key}", row) for key, row in table.items()]


def read_table(file: Path, lines: bool = False, part: str | None = None) -> dict:
    """Return {number or key: row} of a JSON file whose value is a list or an object.

    lines: the file has one JSON value a line, as every .jsonl file has, whatever its name.
    part: take only the value under this key of the file's object.
    Raise UserError if it cannot be read.
    """
    file = Path(file)
    try:
        text = file.read_text(encoding="utf-8")
        if lines or file.suffix == ".jsonl":
            return _parse_lines(file, text)

        value = json.loads(text)
        if part:
            value = value[part]
        if isinstance(value, dict):
            return value
        return dict(enumerate(value))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(file, f"cannot be read: {_describe(error)}", MEND_FILE) from None


def _parse_lines(file: Path, text: str) -> dict:
    # Not splitlines(): a text may hold other line breaks, such as U+2028, which JSON allows.
    rows = {}
    for number, line in enumerate(text.rstrip("\n").split("\n")):
        try:
            rows[number] = json.loads(line)
        except ValueError as error:
            where = f"{file}:{number}"
            raise UserError(where, f"cannot be read: {_describe(error)}", MEND_FILE) from None
    return rows


def read_parquet(file: Path) -> list[tuple[str, dict]]:
    """Return [("file:row", row)] of a .parquet file.

    Raise UserError if it cannot be read, or if pyarrow is not installed.
    """
    # Only two benchmarks need it, so it is no requirement of the project.
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UserError("pyarrow", f"reads {file}, not installed", "pip install pyarrow") from None

    try:
        rows = parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(file, f"cannot be read: {_describe(error)}", MEND_FILE) from None
    return [(f"{file}:{number}", row) for number, row in enumerate(rows)]


@contextlib.contextmanager
def errors_at(where: str):
    """Turn whatever fails inside into a UserError that says the row at `where` is not as published.

    The code inside can read a row without checking it: a key that is missing or a value of a wrong
    type fails on its own.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"not as published: {_describe(error)}"
        raise UserError(where, what, "mend the row, or fetch the file again") from None


def _describe(error: Exception) -> str:
    """Return what an error says, on one line."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return " ".join(str(error).split())


def write_json_lines(file: Path, rows: Iterable[dict]):
    """Write a row a line."""
    write_file(file, "".join(_json_lines(rows)))


def _json_lines(rows: Iterable[dict]) -> Iterator[str]:
    for row in rows:
        yield json.dumps(row) + "\n"
