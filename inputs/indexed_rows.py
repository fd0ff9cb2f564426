"""Rows that are texts in files, found by byte offsets: what JSON, tables and tar files share.

Of large files only the offsets are held (index.py); a row is read when it is asked for. A format
is a subclass that says how a file is scanned, and where the media of a row are:

    class JsonLines(TextRows):
        def scan(self, file): ...       # where each row of a file is: an index, see index.py

Read `IndexedRows` first. The functions above it find files and parse rows. `TextRows` below it are
those whose pictures lie in a folder.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints.files import open_regular, parse_json
from config import UserError, printable
from inputs import index
from inputs.forms import Row, read_row
from inputs.media import Media, media_of_row
from inputs.sniff import HEAD, looks_like, reason


def files(data: str | Path) -> list[Path]:
    """Return the files that are meant by a folder of shards, a glob or a file's name, in order.

    The list is empty if there are none.
    """
    if Path(data).is_dir():
        return sorted(Path(data).glob("*.tar")) or sorted(Path(data).rglob("*.parquet"))
    return sorted(Path(name) for name in glob.glob(str(data)))


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
        fix = "save it as UTF-8" if "UTF-16" in other else "mend it there"
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


class FileSpan(NamedTuple):
    """Which rows of a data set lie in a file: begin, ..., end - 1."""

    file: Path
    begin: int
    end: int


class Blocks(NamedTuple):
    """Blocks of rows that are read together, as the row groups of a parquet file are.

    A worker holds `at_once` of them in memory. data.Order lets a run go through all rows of so many
    blocks before it comes to others.
    """

    ends: np.ndarray  # block k has the rows from ends[k - 1] to ends[k] - 1
    at_once: int


class Location(NamedTuple):
    """Where a row is."""

    file: Path
    entries: np.ndarray  # (1 + media, 3): its entries of the index, first the row's own
    place: str  # what messages call the row, without its id


class IndexedRows:
    """The base of these formats; see rows.Rows for what its methods promise."""

    recognised = ""  # open_rows says
    parts = ()  # only a mixture has some
    blocks = None  # any row is read as fast as any other
    keeps_small_index = False  # whether small files get an index, too

    def __init__(
        self,
        data: str | Path,
        images: str | Path = "",
        columns: dict[str, str] | None = None,
        found: list[Path] | None = None,
    ):
        """Open `data`, a file, a glob or a folder of shards. Raise UserError if that fails.

        columns: what rows call their parts, as forms.read_row takes it. found: the files that
        `data` means, where somebody has looked.
        """
        self.given = (data, images, columns, found)
        self.columns = columns
        self.file = Path(data)
        self.files = found or files(data) or [self.file]
        try:
            self.indexes = [self._load_index(file) for file in self.files]
            self.states = {file: file_state(file.stat()) for file in self.files}
            self.content = self._read_small()
        except OSError as e:
            raise unreadable(data, e) from None

        # For each file: where the entries of row j begin in its index. They end where those of row
        # j + 1 begin.
        self.firsts = [self.first_entries(entries) for entries in self.indexes]

        # File k has the rows from ends[k - 1] to ends[k] - 1.
        self.ends = np.cumsum([len(firsts) - 1 for firsts in self.firsts])

    # ---- What a format defines: scan and media, and the three between if it differs there.

    def scan(self, file: Path) -> np.ndarray:
        """Return the index of a file, an (m, 3) int64 array. Raise UserError or OSError."""
        raise NotImplementedError

    def first_entries(self, entries: np.ndarray) -> np.ndarray | range:
        """Return where each row's entries begin in an index, and as the last one len(entries)."""
        return range(len(entries) + 1)

    def place(self, file: Path, number: int, entries: np.ndarray) -> str:
        """Return what messages call the row with this number in its file, without its id."""
        return f"{file}:row {number}"

    def raw_row(self, location: Location) -> Any:
        """Return what a row's text holds: a raw row for forms.py, if it is one. Raise UserError."""
        start = int(location.entries[0, 0])
        return parse_row(self._read(location, 0), location.place, byte=start)

    def media(self, i: int, row: Row) -> list[Media]:
        """Return the pictures or videos of row i, which is `row`. Raise UserError that names it."""
        raise NotImplementedError

    # ---- What every format gets.

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> Row:
        location = self._find(i)
        row = self.raw_row(location)
        if not isinstance(row, dict):
            what = f"a JSON {type(row).__name__}, not a row"
            raise UserError(location.place, what, "write {...}, or remove it")
        return read_row(row, named(location.place, row), self.columns)

    def where(self, i: int, row: dict | None = None) -> str:
        if row is None:
            row = self[i]
        return named(self._find(i).place, row)

    def file_spans(self) -> list[FileSpan]:
        spans = []
        begin = 0
        for file, end in zip(self.files, self.ends.tolist(), strict=True):
            spans.append(FileSpan(file, begin, end))
            begin = end
        return spans

    def __reduce__(self):
        """Pickle what was given: a spawned worker opens the files again, and maps the same index.

        Sent as a pickle, the index of a large file would be copied for each worker.
        """
        return type(self), self.given

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
        i = range(len(self))[i]

        # The file it is in, and its number there.
        k = int(np.searchsorted(self.ends, i, side="right"))
        number = i
        if k > 0:
            number -= int(self.ends[k - 1])

        first = self.firsts[k][number]
        end = self.firsts[k][number + 1]
        entries = self.indexes[k][first:end]
        place = self.place(self.files[k], number, entries)
        return Location(self.files[k], entries, place)

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


class TextRows(IndexedRows):
    """Rows whose pictures and videos are files of a folder."""

    def __init__(
        self,
        data: str | Path,
        images: str | Path = "",
        columns: dict[str, str] | None = None,
        found: list[Path] | None = None,
    ):
        """Open `data`, with its media in the folder `images`, by default each file's own folder.

        Raise UserError if it cannot be read or there is no such folder.
        """
        super().__init__(data, images, columns, found)
        self.has_folder = bool(images)
        if images:
            self.images = Path(images)
        else:
            folders = {file.parent for file in self.files}
            self.images = Path(os.path.commonpath(folders))
        if not self.images.is_dir():
            fix = "set the stage's images, or --images"
            raise UserError(self.images, "no such folder of images", fix)

    def media(self, i: int, row: Row) -> list[Media]:
        location = self._find(i)
        folder = self.images
        if not self.has_folder:
            folder = location.file.parent
        return media_of_row(row, folder, named(location.place, row))


def unreadable(data: str | Path, error: OSError) -> UserError:
    """Return the error for rows that cannot be opened."""
    fix = "name a file of rows (JSON, JSON lines, CSV, parquet, tar), a folder or a glob of them"
    return UserError(error.filename or data, reason(error), fix)


def named(place: str, row: dict) -> str:
    """Return what messages call a row: its place, and its id if it has one."""
    if row.get("id") is None:
        return place
    return f"{place} (id {printable(row['id'], 100)})"


def file_state(stat: os.stat_result) -> tuple[int, int]:
    """Return the size and time of a file, which tell whether it has changed."""
    return stat.st_size, stat.st_mtime_ns
