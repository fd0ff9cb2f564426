"""Rows of a table, CSV or TSV: one record a row, whose cells the first line names.

    image,caption
    a.jpg,A cat on a mat.
    b.jpg,"A sign: ""Stop, please"", and
    a car."

The file is UTF-8, with a byte order mark or without. Cells are parted by commas, tabs or semicolons
as the first line is, and may stand in quotes, as the csv module reads them: then they may hold
separators, doubled quotes and line breaks. A cell is text and is taken as it is; an empty one is
missing. forms.py knows the columns image and caption, or image, question and answer; `columns` maps
others. An image cell holds one file name.

Messages count lines from 1, as editors do, and call a record by its first line.
"""

from __future__ import annotations

import csv
import io
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkpoints.files import open_regular
from config import UserError, printable
from inputs.forms import is_known
from inputs.indexed_rows import IndexedRows, Location

SEPARATORS = ",\t;"
BOM = b"\xef\xbb\xbf"
LONGEST_CELL = 1 << 30  # characters; the csv module's own limit is below that of a small picture

HEADER_FIX = "begin it with a line such as image,caption or image,question,answer"


class Header(NamedTuple):
    """What the first line of a table says."""

    names: list[str]  # of the columns; "" is passed over, as the numbers that pandas writes first
    separator: str


class Table(IndexedRows):
    """The rows of a table, or of several, each with a first line of its own."""

    def open_files(self) -> list[int]:
        """Raise UserError, also if no column of a table is known or mapped."""
        self.headers = {file: read_header(file) for file in self.files}
        mapped = (self.columns or {}).values()
        for file, header in self.headers.items():
            if not any(is_known(name) or name in mapped for name in header.names):
                named = printable(", ".join(header.names), 80)
                what = f"a table of {named}: none of these columns is known"
                raise UserError(file, what, f"{HEADER_FIX}, or map its columns")
        return super().open_files()

    def details(self) -> str:
        names = [name for name in self.headers[self.files[0]].names if name]
        return f" of {printable(', '.join(names), 200)}"

    def scan(self, file: Path) -> np.ndarray:
        """Return (start, end, line) of each record but the first; blank lines are passed over."""
        separator = self.headers[file].separator.encode()
        blank = b" \t\r\n" + separator  # a spreadsheet writes lines of separators only
        entries = array("q")
        start = end = 0
        first_line = 1
        in_quotes = False
        with open_regular(file) as lines:
            for number, line in enumerate(lines, 1):
                if not in_quotes:
                    start = end
                    first_line = number
                end += len(line)
                if in_quotes or b'"' in line:
                    content = line
                    if number == 1:
                        content = line.removeprefix(BOM)
                    in_quotes = ends_in_quotes(content, separator, in_quotes)
                if not in_quotes and (first_line < number or line.strip(blank)):
                    entries.extend((start, end, first_line))

        if in_quotes:
            what = "a cell begins with a quote, and none ends it"
            raise UserError(f"{file}:line {first_line}", what, "end it, or double the quote")
        if len(entries) <= 3:
            raise UserError(file, "no rows below the names of the columns", "write the rows again")
        return np.array(entries).reshape(-1, 3)[1:]

    def place(self, k: int, number: int) -> str:
        line = self.indexes[k][number, 2]
        return f"{self.files[k]}:line {line}"

    def raw_row(self, location: Location) -> dict:
        """Return a record as {column: text}. Raise UserError if it has other cells than columns."""
        names, separator = self.headers[location.file]
        content = self._read(location, 0)
        try:
            cells = read_record(content, separator)
        except UnicodeDecodeError as e:
            byte = int(location.entries[0, 0]) + e.start
            raise UserError(
                location.place, f"not UTF-8 at byte {byte}", "save it as UTF-8"
            ) from None
        except ValueError as e:
            raise UserError(location.place, f"no record of a table: {e}", "mend it there") from None

        # A spreadsheet writes as many cells as its widest row has.
        while len(cells) > len(names) and not cells[-1]:
            cells.pop()
        if len(cells) != len(names):
            what = f"{len(cells)} cells, and the first line names {len(names)} columns"
            fix = "mend the line; a cell with a separator or a line break in it stands in quotes"
            raise UserError(location.place, what, fix)
        row = dict(zip(names, cells, strict=True))
        row.pop("", None)
        return row


def read_header(file: Path) -> Header:
    """Return the first line of a table. Raise UserError if it names no columns."""
    first = b""
    with open_regular(file) as lines:
        for line in lines:
            first += line
            if first.removeprefix(BOM).strip() and first.count(b'"') % 2 == 0:
                break
    try:
        return header_of(first)
    except ValueError as e:
        raise UserError(file, str(e), HEADER_FIX) from None


def header_of(text: bytes) -> Header:
    """Return what the first record of a text names. Raise ValueError if that is no header.

    The separator is the one by which the record has the most known names, and else the most names.
    """
    text = text.removeprefix(BOM).lstrip(b"\r\n")
    if not text:
        raise ValueError("empty file")
    best = Header([], "")
    best_score = (0, 0)
    for separator in SEPARATORS:
        end = 0
        in_quotes = False
        for line in io.BytesIO(text):
            in_quotes = ends_in_quotes(line, separator.encode(), in_quotes)
            end += len(line)
            if not in_quotes:
                break
        try:
            names = [name.strip() for name in read_record(text[:end], separator)]
        except ValueError:
            continue
        known = [name for name in names if is_known(name)]
        score = (len(known), len(names))
        if score > best_score:
            best, best_score = Header(names, separator), score

    names = best.names
    while names and not names[-1]:
        names.pop()  # as a spreadsheet's empty columns
    if not any(names):
        raise ValueError("no line that names columns")
    for name in names:
        if name and names.count(name) > 1:
            raise ValueError(f"two columns named {printable(name, 60)!r}")
    return best


def ends_in_quotes(line: bytes, separator: bytes, in_quotes: bool) -> bool:
    """Say whether the line after this one goes on with a cell in quotes, as the csv module would.

    in_quotes: whether this line itself begins within such a cell.
    """
    at = 0
    while True:
        if not in_quotes:
            # The beginning of a cell. A quote elsewhere in it is a character like others.
            if line[at : at + 1] == b'"':
                in_quotes = True
                at += 1
            else:
                at = line.find(separator, at) + 1
                if at == 0:
                    return False
                continue

        # In quotes: up to the quote that ends them, which is one that is not doubled.
        at = line.find(b'"', at)
        if at < 0:
            return True
        if line[at + 1 : at + 2] == b'"':
            at += 2
            continue
        in_quotes = False
        at = line.find(separator, at + 1) + 1
        if at == 0:
            return False


def read_record(content: bytes, separator: str) -> list[str]:
    """Return the cells of a record. Raise ValueError, as UnicodeDecodeError is, if it is none."""
    text = content.decode("utf-8-sig")
    if "\0" in text:
        raise ValueError("a zero byte")
    csv.field_size_limit(LONGEST_CELL)
    try:
        records = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    except csv.Error as e:
        raise ValueError(str(e)) from None
    if len(records) != 1:
        raise ValueError("a line break that is none for other programs")
    return records[0]
