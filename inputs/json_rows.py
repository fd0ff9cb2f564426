"""Rows of a JSON list, and of one JSON text a line, with their media in a folder.

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
from inputs.indexed_rows import IndexedRows
from inputs.json_list import scan_list


class JsonList(IndexedRows):
    """The rows of a JSON list: [{...}, {...}]."""

    def scan(self, file: Path) -> np.ndarray:
        return scan_list(file)


class JsonLines(IndexedRows):
    """The rows of a file with one row a line. Blank lines are passed over."""

    def scan(self, file: Path) -> np.ndarray:
        """Return (start, end, line) of each row. Nothing is parsed: a bad line is one bad row."""
        # One flat array of integers: a tuple for each row would take several times the memory.
        entries = array("q")
        end = 0
        with open_regular(file) as lines:
            for number, line in enumerate(lines, 1):
                start = end
                end += len(line)
                if line.strip():
                    entries.extend((start, end, number))

        if not entries:
            raise UserError(file, "empty file", "write the rows again")
        return np.array(entries).reshape(-1, 3)

    def place(self, k: int, number: int) -> str:
        line = self.indexes[k][number, 2]
        return f"{self.files[k]}:line {line}"
