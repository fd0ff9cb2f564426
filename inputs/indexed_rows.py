"""Rows that are JSON texts in files, found by byte offsets: what the JSON and tar formats share.

Of large files only the offsets are held (index.py); a row is read when it is asked for. A format
is a subclass that says how a file is scanned and where the media of a row are.
"""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import UserError
from inputs import index
from inputs.media import Media
from inputs.sniff import HEAD, looks_like


def files(data: str | Path) -> list[Path]:
    """Return the files that are meant by a folder of shards, a glob or a file's name, in order.

    The list is empty if there are none.
    """
    if Path(data).is_dir():
        return sorted(Path(data).glob("*.tar"))
    return sorted(Path(name) for name in glob.glob(str(data)))


def parse(raw: bytes, where: str, byte: int = 0) -> Any:
    """Return the value of a JSON text, which starts at this byte of its file. Raise UserError."""
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise UserError(where, f"not UTF-8 at byte {byte + e.start}", "save it as UTF-8") from None
    except json.JSONDecodeError as e:
        what = looks_like(raw[:HEAD])
        if not what:
            what = f"not JSON at line {e.lineno} column {e.colno}, from byte {byte}: {e.msg}"
        raise UserError(where, what, json_fix(e)) from None


def json_fix(error: json.JSONDecodeError) -> str:
    """Return what to do about a text that is no JSON."""
    if error.msg == "Extra data":
        return "one row per line belongs into a .jsonl file"
    return "mend it there"


class FileSpan(NamedTuple):
    """The rows begin, ..., end - 1 of a data set lie in this file."""

    file: Path
    begin: int
    end: int


class Found(NamedTuple):
    """Where a row is."""

    file: Path
    entries: np.ndarray  # its rows of the index: (start, end, number), first the row's own
    place: str  # its name in messages, without its id


class IndexedRows:
    """The base of the formats that index.py serves; see rows.Rows for what its methods promise."""

    parts = ()  # only a Mixture has some
    keeps_small_index = False  # whether a small file gets an index, too

    def __init__(self, data: str | Path, images: str | Path = ""):
        """Open `data`, a file, a glob or a folder of shards. Raise UserError if that fails."""
        self.given = (data, images)
        self.file = Path(data)
        self.files = files(data) or [self.file]
        try:
            self.tables = [self._index(file) for file in self.files]
            self.states = {file: file_state(file.stat()) for file in self.files}
            self.content = self._read_small()
        except OSError as e:
            fix = "name a .json or .jsonl file of rows, or shards"
            raise UserError(e.filename, e.strerror.lower(), fix) from None

        # The entries of row j of a file end where those of row j + 1 begin.
        self.firsts = [self.first_entries(table) for table in self.tables]
        self.ends = np.cumsum([len(firsts) - 1 for firsts in self.firsts])

    # What a format defines.

    def scan(self, file: Path) -> np.ndarray:
        """Return the index of a file, an (m, 3) int64 array. Raise UserError, OSError."""
        raise NotImplementedError

    def first_entries(self, table: np.ndarray) -> np.ndarray | range:
        """Return the number of each row's first entry in an index, and at the end len(table)."""
        return range(len(table) + 1)

    def place(self, file: Path, number: int, entries: np.ndarray) -> str:
        """Return the name in messages of the row with this number in its file."""
        return f"{file}:row {number}"

    def media(self, i: int, row: dict) -> list[Media]:
        raise NotImplementedError

    # What follows from that.

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> dict:
        found = self._find(i)
        row = parse(self._read(found, 0), found.place, byte=int(found.entries[0, 0]))
        if not isinstance(row, dict):
            what = f"a JSON {type(row).__name__}, not a row"
            raise UserError(found.place, what, "write {...}, or remove it")
        return row

    def where(self, i: int, row: dict | None = None) -> str:
        if row is None:
            row = self[i]
        place = self._find(i).place
        if row.get("id") is None:
            return place
        return f"{place} (id {row['id']})"

    def file_spans(self) -> list[FileSpan]:
        begins = [0, *self.ends[:-1]]
        spans = zip(self.files, begins, self.ends, strict=True)
        return [FileSpan(file, int(begin), int(end)) for file, begin, end in spans]

    def __reduce__(self):
        """Pickle as names of files: a spawned worker maps the index again, it is not sent."""
        return type(self), self.given

    def _index(self, file: Path) -> np.ndarray:
        if index.is_small(file) and not self.keeps_small_index:
            return self.scan(file)
        return index.cached_array(file, "index", lambda: self.scan(file))

    def _read_small(self) -> bytes:
        """Return all of a single small file, so that no row needs the disk; b"" for others."""
        if len(self.files) == 1 and index.is_small(self.files[0]) and not self.keeps_small_index:
            return self.files[0].read_bytes()
        return b""

    def _find(self, i: int) -> Found:
        i = range(len(self))[i]  # counts from the end if negative, raises IndexError
        k = int(np.searchsorted(self.ends, i, side="right"))
        if k > 0:
            number = i - int(self.ends[k - 1])
        else:
            number = i

        firsts = self.firsts[k]
        entries = self.tables[k][firsts[number] : firsts[number + 1]]
        return Found(self.files[k], entries, self.place(self.files[k], number, entries))

    def _read(self, found: Found, entry: int) -> bytes:
        """Return the bytes of one of a row's entries. Raise UserError if the file has changed."""
        start, end = (int(byte) for byte in found.entries[entry, :2])
        if self.content:
            return self.content[start:end]

        # Opened each time: forked workers would share the position of a file that stays open.
        with open(found.file, "rb", buffering=0) as file:
            if file_state(os.fstat(file.fileno())) != self.states[found.file]:
                raise UserError(found.file, "has changed since it was opened", "start again")
            file.seek(start)
            return file.read(end - start)


def file_state(stat: os.stat_result) -> tuple[int, int]:
    """Return the size and time of a file, which tell whether it has changed."""
    return stat.st_size, stat.st_mtime_ns
