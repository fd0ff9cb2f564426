"""Rows that lie in files, one file after the other: the base of all formats.

A format says how many rows each file has, and returns a row:

    class ArrowRows(FileRows):
        def open_files(self): ...           # [rows of the first file, rows of the second, ...]
        def __getitem__(self, i): ...       # with find_row(i): its file, and its number there

indexed_rows.py is such a format, of texts that are found by byte offsets, and parquet_rows.py is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import UserError, printable
from inputs.forms import Row
from inputs.media import Media, media_of_row
from inputs.sniff import reason


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


class FileRows:
    """The rows of some files; see rows.Rows for what its methods promise."""

    recognised = ""  # open_rows says
    parts = ()  # only a mixture has some
    blocks = None  # any row is read as fast as any other
    holds_media = False  # whether the files themselves hold all pictures and videos

    def __init__(
        self,
        data: str | Path,
        files: list[Path],
        images: str | Path = "",
        columns: dict[str, str] | None = None,
    ):
        """Open the files that `data` stands for, in their order.

        images: the folder of pictures and videos that rows name, by default each file's own.
        columns: what rows call their parts, as forms.read_row takes it.

        Raise UserError if a file cannot be read, or if there is no such folder.
        """
        self.given = (data, files, images, columns)
        self.columns = columns
        self.file = Path(data)
        self.files = files
        try:
            lengths = self.open_files()
            self.states = {file: file_state(file.stat()) for file in self.files}
        except OSError as e:
            raise unreadable(data, e) from None

        # File k has the rows from ends[k - 1] to ends[k] - 1.
        self.ends = np.cumsum(lengths)

        if not self.holds_media:
            self.has_folder = bool(images)
            own_folders = {self.own_folder(file) for file in self.files}
            self.images = Path(images or os.path.commonpath(own_folders))
            if not self.images.is_dir():
                fix = "set the stage's images, or --images"
                raise UserError(self.images, "no such folder of images", fix)

    # ---- What a format defines, and may define.

    def open_files(self) -> list[int]:
        """Find the rows of self.files. Return how many each has. Raise UserError or OSError."""
        raise NotImplementedError

    def __getitem__(self, i: int) -> Row:
        raise NotImplementedError

    def media(self, i: int, row: Row) -> list[Media]:
        k, _ = self.find_row(i)
        return media_of_row(row, self.media_folder(k), self.where(i, row))

    def place(self, k: int, number: int) -> str:
        """Return what messages call the row with this number in file k, without its id."""
        return f"{self.files[k]}:row {number}"

    def own_folder(self, file: Path) -> Path:
        """Return the folder in which the pictures of a file lie, if no other is given."""
        return file.parent

    def details(self) -> str:
        """Return what else `recognised` says, behind what the files are."""
        return ""

    # ---- What every format gets.

    def __len__(self) -> int:
        return int(self.ends[-1])

    def where(self, i: int, row: Row | None = None) -> str:
        if row is None:
            row = self[i]
        return named(self.place(*self.find_row(i)), row)

    def file_spans(self) -> list[FileSpan]:
        spans = []
        begin = 0
        for file, end in zip(self.files, self.ends.tolist(), strict=True):
            spans.append(FileSpan(file, begin, end))
            begin = end
        return spans

    def find_row(self, i: int) -> tuple[int, int]:
        """Return (k, number): row i is that of file k with this number; -1 is the last row.

        Raise IndexError.
        """
        i = range(len(self))[i]
        k = int(np.searchsorted(self.ends, i, side="right"))
        if k > 0:
            i -= int(self.ends[k - 1])
        return k, i

    def media_folder(self, k: int) -> Path:
        """Return the folder to which names of pictures in file k are relative."""
        if self.has_folder:
            return self.images
        return self.own_folder(self.files[k])

    def __reduce__(self):
        """Pickle what was given: a spawned worker opens the files again, and maps the same index.

        Sent as a pickle, the index of a large file would be copied for each worker.
        """
        return type(self), self.given


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
