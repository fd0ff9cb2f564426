"""The files of a benchmark: find them, read their rows, and name the row that is wrong.

    for where, row in read_rows(find_first(data_dir, "data/questions.json", "questions.json")):
        with errors_at(where):
            prompt = row.text("question")
            choices = row.texts("choices")

A `Row` is checkpoints/fields.py's typed reader: each value is asked for with its kind and range, so
nothing is computed from a value that cannot be. Everything that is wrong with a file is a UserError
that begins with the file, or with "file:row", and names the key. Rows are counted from 0.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import csv
import json
import math
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from checkpoints.fields import REQUIRED, Fields
from checkpoints.files import parse_json, write_file
from config import UserError, is_unicode, printable

MEND_FILE = "mend it, or fetch it again"
MEND_ROW = "mend the row, or fetch the file again"

MOST_OPTIONS = 26  # an option has a letter
LARGEST_ID = 2**63 - 1  # of a question or a picture
LONGEST_PATH = 4096  # characters, the most that a system opens
LONGEST_CELL = 2**27  # characters of a cell of a table: a large picture in base64
LONGEST_LIST = 10_000  # characters of a list that is written as Python's
ROWS_AT_ONCE = 64  # of a parquet file, whose rows may hold pictures

# ------------------------------------------------------------------------------------------- files


def find_first(data_dir: str | Path, *names: str) -> Path:
    """Return the first of these files or folders that `data_dir` has.

    Raise UserError if it has none of them.
    """
    for name in names:
        path = Path(data_dir) / name
        if exists(path):
            return path

    missing = Path(data_dir) / names[0]
    fix = f"--data: a folder with {' or '.join(names)}"
    raise UserError(missing, "no such file or folder", fix)


def exists(path: Path) -> bool:
    """Return whether there is such a file or folder; False for a name that no system takes."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file, without a byte order mark. Raise UserError."""
    check_file(file)
    try:
        return file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from None


def check_file(file: Path):
    """Raise UserError for what is no file: a FIFO or a device would be waited for."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise _unreadable(file, error) from None
    if not stat.S_ISREG(mode):
        raise UserError(file, "not a file", MEND_FILE)


def _unreadable(file: Path | str, error: Exception) -> UserError:
    return UserError(file, f"cannot be read: {_describe(error)}", MEND_FILE)


def _describe(error: Exception) -> str:
    """Return what an error says, on one line."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return " ".join(str(error).split())


# -------------------------------------------------------------------------------------------- rows


class Row(Fields):
    """The fields of one row. Each getter raises UserError that names "file:row" and the key."""

    def __init__(self, values, where: str, path: str = "", fix: str = MEND_ROW):
        if not isinstance(values, dict):
            what = f"not as published: {printable(repr(values), 60)} is not an object"
            raise UserError(where, what, fix)
        super().__init__(values, where, path, fix)

    def identifier(self, key: str) -> str | int:
        """Return what a question or a picture is known by: a text, or a whole number."""
        value = self._get(key, REQUIRED)
        if isinstance(value, str) and 0 < len(value) <= LONGEST_PATH and is_unicode(value):
            return value
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if is_number and abs(value) <= LARGEST_ID:
            return value
        raise self.refuse(key, "not a text or a whole number")

    def words(self, key: str, default=REQUIRED) -> str:
        """Return a text; a number, as some files have it in the place of one, as a text."""
        return as_text(self._get(key, default), self, key)

    def texts(self, key: str, least: int = 0, most: int = 100_000) -> list[str]:
        """Return a list of `least` to `most` texts, likewise."""
        values = self._get(key, REQUIRED)
        if not isinstance(values, list) or not least <= len(values) <= most:
            raise self.refuse(key, f"not a list of {least} to {most} texts")
        return [as_text(value, self, key) for value in values]

    def options(self, key: str, least: int = 1) -> list[str]:
        """Return the options of a question, to each of which belongs a letter."""
        return self.texts(key, least, MOST_OPTIONS)

    def lettered(self, key: str) -> dict[str, str]:
        """Return the options of a question that is written as {letter: option}."""
        values = self._get(key, REQUIRED)
        if not isinstance(values, dict) or not 1 <= len(values) <= MOST_OPTIONS:
            raise self.refuse(key, f"not an object of 1 to {MOST_OPTIONS} options")
        return {letter: as_text(value, self, key) for letter, value in values.items()}

    def file(self, key: str, default=REQUIRED) -> str | None:
        """Return the name of a picture or a clip."""
        value = self.text(key, default=default, most=LONGEST_PATH)
        if value is not None and (not value or "\0" in value):
            raise self.refuse(key, "not the name of a file")
        return value

    def picture(self, key: str) -> bytes:
        """Return a picture that is in the row: its bytes, {"bytes": them}, or base64 of them."""
        value = self._get(key, REQUIRED)
        if isinstance(value, dict):
            value = value.get("bytes")
        if isinstance(value, str):
            try:
                value = base64.b64decode(value, validate=True)
            except ValueError:
                value = None
        if not isinstance(value, bytes) or not value:
            raise self.refuse(key, "not a picture")
        return value

    def rows(self, key: str, least: int = 0) -> list[Row]:
        """Return the rows of a list in this row."""
        values = self.list(key, dict)
        if len(values) < least:
            raise self.refuse(key, f"not a list of at least {least}")
        return [Row(value, self.where, f"{key}[{i}]") for i, value in enumerate(values)]

    def table(self, key: str, optional: bool = False) -> Row:
        """Return the row in this row; an empty one, if optional and absent."""
        value = self._get(key, {} if optional else REQUIRED)
        if not isinstance(value, dict):
            raise self.refuse(key, "not an object")
        return Row(value, self.where, self._dotted(key))

    def refuse(self, key: str, why: str) -> UserError:
        """Return the error for a field: its value, and why that cannot be."""
        value = printable(repr(self.values.get(key)), 60)
        what = f"not as published: its {self._dotted(key)}, {value}, is {why}"
        return UserError(self.where, what, self.fix)

    def _get(self, key: str, default):
        """Return the raw value of a field; its default if it is absent or null."""
        value = self.values.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            what = f"not as published: it has no {self._dotted(key)!r}"
            raise UserError(self.where, what, self.fix)
        return default

    def _dotted(self, key: str) -> str:
        if self.path:
            return f"{self.path}.{key}"
        return key


def as_text(value, row: Row, key: str) -> str:
    """Return a value that is a text or a finite number as a text. Raise row.refuse(key) if not."""
    if isinstance(value, str) and is_unicode(value):
        return value
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if is_number or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    raise row.refuse(key, "not a text")


def read_rows(file: Path, lines: bool = False, part: str | None = None) -> list[tuple[str, Row]]:
    """Return [("file:row", Row)] of a JSON file; the arguments are those of `read_values`."""
    return [(row.where, row) for row in read_table(file, lines, part).values()]


def read_table(file: Path, lines: bool = False, part: str | None = None) -> dict[str | int, Row]:
    """Return {number or key: Row} of a JSON file; the arguments are those of `read_values`."""
    table = {}
    for key, value in read_values(file, lines, part).items():
        table[key] = Row(value, f"{file}:{key}")
    return table


def read_values(file: Path, lines: bool = False, part: str | None = None) -> dict:
    """Return {number or key: value} of a JSON file that holds a list or an object.

    lines: the file has one JSON value a line, as every .jsonl file has, whatever its name.
    part: take only the value under this key of the file's object.
    Raise UserError if it cannot be read.
    """
    file = Path(file)
    text = read_text(file)
    if lines or file.suffix == ".jsonl":
        return _parse_lines(file, text)

    try:
        value = parse_json(text)
    except ValueError as error:
        raise _unreadable(file, error) from None
    if part is not None:
        if not isinstance(value, dict) or part not in value:
            raise UserError(file, f"cannot be read: it has no {part!r}", MEND_FILE)
        value = value[part]
    if isinstance(value, dict):
        return value
    if isinstance(value, list):
        return dict(enumerate(value))
    raise UserError(file, "cannot be read: not a list or an object", MEND_FILE)


def _parse_lines(file: Path, text: str) -> dict:
    # Not splitlines(): a text may hold other line breaks, such as U+2028, which JSON allows.
    rows = {}
    for number, line in enumerate(text.rstrip().split("\n")):
        try:
            rows[number] = parse_json(line)
        except ValueError as error:
            raise _unreadable(f"{file}:{number}", error) from None
    return rows


def read_tsv(file: Path) -> Iterator[Row]:
    """Yield the rows of a table whose cells are parted by tabs and whose first line names them.

    Every row has a text in every column. Raise UserError.
    """
    check_file(file)
    csv.field_size_limit(LONGEST_CELL)
    number = 0
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines, delimiter="\t")
            for number, cells in enumerate(table):
                where = f"{file}:{number}"
                if None in cells or None in cells.values():
                    what = f"not as published: not {len(table.fieldnames)} cells, as the first line"
                    raise UserError(where, what, MEND_ROW)
                yield Row(cells, where)
    except (csv.Error, OSError, UnicodeDecodeError) as error:
        raise _unreadable(f"{file}:{number}", error) from None


def read_parquet(file: Path, columns: list[str] | None = None) -> Iterator[tuple[str, Row]]:
    """Yield ("file:row", Row) of a .parquet file, a few rows in memory at a time.

    columns: read only these; one that the file does not have is left out. None = all.
    Raise UserError if the file cannot be read, or if pyarrow is not installed.
    """
    # Only some benchmarks need it, so it is no requirement of the project.
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UserError("pyarrow", f"reads {file}, not installed", "pip install pyarrow") from None

    check_file(file)
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
                for values in batch.to_pylist():
                    where = f"{file}:{number}"
                    yield where, Row(values, where)
                    number += 1
    except UserError:
        raise
    except Exception as error:  # pyarrow has errors of many kinds, not all of them its own
        raise _unreadable(file, error) from None


def parse_list(text: str) -> list:
    """Return a list that is written as Python writes it. Raise ValueError, and nothing else."""
    if len(text) > LONGEST_LIST:
        raise ValueError(f"a list of more than {LONGEST_LIST} characters")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list):
        raise ValueError(f"{printable(text, 60)!r} is not a list")
    return value


@contextlib.contextmanager
def errors_at(where: str):
    """Turn whatever fails inside into a UserError that says the row at `where` is not as published.

    A Row says itself what is wrong with a value. This is for what is looked up with values: a
    question of another file, a subject, a letter.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(where, f"not as published: {_describe(error)}", MEND_ROW) from None


def write_json_lines(file: Path, rows: Iterable[dict]):
    """Write a row a line."""
    write_file(file, "".join(_json_lines(rows)))


def _json_lines(rows: Iterable[dict]) -> Iterator[str]:
    for row in rows:
        yield json.dumps(row) + "\n"
