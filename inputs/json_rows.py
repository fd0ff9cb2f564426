"""Rows of a JSON list (.json), and of one JSON text a line (.jsonl), with their media in a folder.

    rows.json     [{"id": 0, "image": "a.jpg", "conversations": [...]}, {...}, ...]
    rows.jsonl    {"id": 0, "image": "a.jpg", "conversations": [...]}
                  {...}

Messages count the rows of a list from 0, as json.load(file)[i] does, and lines from 1, as editors
do.
"""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np

from checkpoints.files import open_regular
from config import UserError
from inputs.forms import Row
from inputs.indexed_rows import IndexedRows
from inputs.json_list import check_is_text, scan_list
from inputs.media import Media, media_of_row


class JsonRows(IndexedRows):
    """What the two formats below share: their media are files of a folder."""

    def __init__(
        self,
        data: str | Path,
        images: str | Path = "",
        columns: dict[str, str] | None = None,
    ):
        """Open `data`, with its media in the folder `images`, by default in its own folder.

        Raise UserError if it cannot be read or there is no such folder.
        """
        super().__init__(data, images, columns)
        self.images = self.file.parent
        if images:
            self.images = Path(images)
        if not self.images.is_dir():
            fix = "set the stage's images, or --images"
            raise UserError(self.images, "no such folder of images", fix)

    def media(self, i: int, row: Row) -> list[Media]:
        return media_of_row(row, self.images, self.where(i, row))


class JsonList(JsonRows):
    """The rows of a JSON list: [{...}, {...}]."""

    def scan(self, file: Path) -> np.ndarray:
        return scan_list(file)


class JsonLines(JsonRows):
    """The rows of a file with one row a line. Blank lines are passed over."""

    def scan(self, file: Path) -> np.ndarray:
        """Return (start, end, line) of each row. Nothing is parsed: a bad line is one bad row."""
        # One flat array of integers: a tuple for each row would take several times the memory.
        entries = array("q")
        end = 0
        with open_regular(file) as lines:
            check_is_text(lines, file)
            for number, line in enumerate(lines, 1):
                start = end
                end += len(line)
                if line.strip():
                    entries.extend((start, end, number))

        if not entries:
            raise UserError(file, "empty file", "write the rows again")
        return np.array(entries).reshape(-1, 3)

    def place(self, file: Path, number: int, entries: np.ndarray) -> str:
        line = entries[0, 2]
        return f"{file}:line {line}"
