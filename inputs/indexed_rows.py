"""Rows that are texts in files, found by byte offsets: what JSON, tables and tar files share.

Of large files only the offsets are held (index.py); a row is read when it is asked for. A format
is a subclass that says how a file is scanned:

    class JsonLines(IndexedRows):
        def scan(self, file): ...       # where each row of a file is: an index, see index.py

Pictures lie in a folder, unless the format says otherwise. Read `IndexedRows` first; the functions
above it parse rows.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints.files import open_regular, parse_json
from config import UserError, printable
from inputs import index
from inputs.file_rows import FileRows, file_state, named
from inputs.forms import Row, read_row
from inputs.sniff import HEAD, looks_like, reason


def parse_row(raw: bytes, where: str, byte: int = 0) -> Any:
    """Return the value of a JSON text, which starts at this byte of its file. Raise UserError."""
    try:
        return parse_json(raw, one_of_each)
    except ValueError as e:
        raise json_error(e, raw, where, byte) from None


def one_of_each(pairs: list[tuple[str, Any]]) -> dict:
    """Return the pairs of a JSON object as a dict. Raise ValueError if one would hide another."""
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if values[key] != value:
                raise ValueError(f"two values under {printable(key, 60)!r}")
    return values


def json_error(error: ValueError, raw: bytes, where: str, byte: int) -> UserError:
    """Return the error for a text that is no JSON, or more than is read."""
    other = looks_like(raw[:HEAD])
    if other:
        what = other
        fix = "mend it there"
        if "UTF-16" in other:
            fix = "save it as UTF-8"
    elif isinstance(error, UnicodeDecodeError):
        what = f"not UTF-8 at byte {byte + error.start}"
        fix = "save it as UTF-8"
    elif hasattr(error, "lineno"):
        place = f"line {error.lineno} column {error.colno}, from byte {byte}"
        what = f"not JSON at {place}: {error.msg}"
        fix = json_fix(error.msg)
    else:
        what = f"from byte {byte}: {too_much(error)}"
        fix = "mend it there"
    return UserError(where, what, fix)


def too_much(error: ValueError) -> str:
    """Return what is wrong with a text that is JSON, and more than a reader can take."""
    if "int_max_str_digits" in str(error):
        return "a number of thousands of digits"
    return str(error)


def json_fix(message: str) -> str:
    """Return what to do about a text that is no JSON, as the parser's message says."""
    if message == "Extra data":
        return "one row per line belongs into a .jsonl file"
    return "mend it there"


class Location(NamedTuple):
    """Where a row is."""

    file: Path
    entries: np.ndarray  # (1 + media, 3): its entries of the index, first the row's own
    place: str  # what messages call the row, without its id


class IndexedRows(FileRows):
    """The base of these formats; see rows.Rows for what its methods promise."""

    keeps_small_index = False  # whether small files get an index, too

    def open_files(self) -> list[int]:
        self.indexes = [self._load_index(file) for file in self.files]
        self.content = self._read_small()

        # For each file: where the entries of row j begin in its index. They end where those of row
        # j + 1 begin.
        self.firsts = [self.first_entries(entries) for entries in self.indexes]
        return [len(firsts) - 1 for firsts in self.firsts]

    # ---- What a format defines: scan, and the others if it differs there.

    def scan(self, file: Path) -> np.ndarray:
        """Return the index of a file, an (m, 3) int64 array. Raise UserError or OSError."""
        raise NotImplementedError

    def first_entries(self, entries: np.ndarray) -> np.ndarray | range:
        """Return where each row's entries begin in an index, and as the last one len(entries)."""
        return range(len(entries) + 1)

    def raw_row(self, location: Location) -> Any:
        """Return what a row's text holds: a raw row for forms.py, if it is one. Raise UserError."""
        start = int(location.entries[0, 0])
        return parse_row(self._read(location, 0), location.place, byte=start)

    # ---- What every format gets.

    def __getitem__(self, i: int) -> Row:
        location = self._find(i)
        row = self.raw_row(location)
        if not isinstance(row, dict):
            what = f"a JSON {type(row).__name__}, not a row"
            raise UserError(location.place, what, "write {...}, or remove it")
        return read_row(row, named(location.place, row), self.columns)

    def _is_scanned_anew(self, file: Path) -> bool:
        """Say whether a file is scanned anew by each process. Raise OSError."""
        return index.is_small(file) and not self.keeps_small_index

    def _load_index(self, file: Path) -> np.ndarray:
        """Return the index of a file, an (m, 3) int64 array. Raise UserError or OSError."""
        if self._is_scanned_anew(file):
            return self.scan(file)
        return index.cached_array(file, "index", lambda: self.scan(file))

    def _read_small(self) -> bytes:
        """Return all of a single small file, so that no row needs the disk; b"" for others."""
        if len(self.files) == 1 and self._is_scanned_anew(self.files[0]):
            with open_regular(self.files[0]) as file:
                return file.read()
        return b""

    def _find(self, i: int) -> Location:
        """Return where row i is; -1 is the last row. Raise IndexError."""
        k, number = self.find_row(i)
        first = self.firsts[k][number]
        end = self.firsts[k][number + 1]
        entries = self.indexes[k][first:end]
        return Location(self.files[k], entries, self.place(k, number))

    def _read(self, location: Location, entry: int) -> bytes:
        """Return the bytes of one of a row's entries. Raise UserError if the file has changed."""
        start = int(location.entries[entry, 0])
        end = int(location.entries[entry, 1])
        if self.content:
            return self.content[start:end]

        # Opened each time: forked workers would share the position of a file that stays open.
        try:
            with open_regular(location.file) as file:
                # The offsets hold for the file as it was when it was opened.
                state = file_state(os.fstat(file.fileno()))
                if state != self.states[location.file]:
                    raise UserError(location.file, "has changed since it was opened", "start again")

                # An index from elsewhere may say anything.
                size, _ = state
                if not 0 <= start <= end <= size:
                    index_file = f"{location.file}.index"
                    raise UserError(index_file, "not the index of this file", "remove it")
                file.seek(start)
                return file.read(end - start)
        except OSError as e:
            what = f"cannot be read: {reason(e)}"
            raise UserError(location.file, what, "make it readable, and start again") from None
