"""Training rows: what every row format offers, which formats there are, and mixtures of them.

    rows = open_rows("rows.json", images="pictures")   # or .jsonl, tar shards, a folder, a glob
    row = rows[7]                # {"id": ..., "image": ..., "conversations": [...]}
    media = rows.media(7, row)   # its pictures or videos, each a path or bytes
    rows.where(7)                # "rows.json:row 7 (id X)", for messages

To add a row format, say .parquet, three places change:

    inputs/parquet_rows.py      the new file: a class ParquetRows with the methods of `Rows`, made
                                by ParquetRows(data, images), which raises UserError if it cannot
    FORMATS, below              the entry: ".parquet": ParquetRows
    tests/inputs/test_rows.py   test_every_format_offers_what_rows_promises_and_the_same_rows fails
                                until it opens the new format, too

A format whose rows are JSON texts in files derives from `indexed_rows.IndexedRows` and needs two
methods, `scan` and `media`. json_rows.JsonLines is the shortest example.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from config import UserError
from inputs.forms import Row
from inputs.indexed_rows import FileSpan, files
from inputs.json_rows import JsonLines, JsonList
from inputs.media import Media
from inputs.shards import Shards

# By the ending of the file's name. A file with any other ending is read as a JSON list.
FORMATS = {
    ".json": JsonList,
    ".jsonl": JsonLines,
    ".tar": Shards,
}


@runtime_checkable
class Rows(Protocol):
    """What every format offers.

    Each data worker gets its own copy, by fork or pickle. So rows stay in their files, and a format
    holds little more than where they are.
    """

    file: Path | str  # what messages call the rows as a whole
    parts: tuple[Part, ...]  # the sources of a mixture; () for a single source
    blocks: Blocks | None  # where reading a row costs reading its block: how rows lie in blocks

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Row:
        """Return row i as a LLaVA row (forms.py). Raise UserError that names it if it is none."""

    def where(self, i: int, row: Row | None = None) -> str:
        """Return what messages call row i. Its id is part of that: give the row if it is read."""

    def media(self, i: int, row: Row) -> list[Media]:
        """Return the pictures or videos of row i, which is `row`. Raise UserError that names it."""

    def file_spans(self) -> list[FileSpan]:
        """Return which rows lie in which file, in order. Token counts are kept beside the files."""


class Blocks(NamedTuple):
    """Blocks of rows that are read together, as the row groups of a parquet file are.

    A worker holds `at_once` of them in memory. data.Order lets a run go through all rows of so many
    blocks before it comes to others.
    """

    ends: np.ndarray  # block k has the rows from ends[k - 1] to ends[k] - 1
    at_once: int


def open_rows(
    data: str | Path, images: str | Path = "", columns: dict[str, str] | None = None
) -> Rows:
    """Open a file of rows, a folder of shards, or a glob. Raise UserError if it cannot be read.

    `images` is the folder of the rows' media, by default that of the data. Shards hold their own.
    `columns` maps parts of a row to the names that they have in these rows (forms.py).
    """
    found = files(data)
    if not found and Path(data).is_dir():
        fix = "name a .json or .jsonl file of rows, or shards"
        raise UserError(data, "a folder without .tar shards", fix)

    # A file that is not there has an ending as well: its format says that it is missing.
    endings = {file.suffix for file in found or [Path(data)]}
    if len(endings) > 1:
        names = ", ".join(sorted(endings))
        raise UserError(data, f"files of several formats ({names})", "make a mixture of them")
    row_format = FORMATS.get(endings.pop(), JsonList)
    return row_format(data, images, columns)


# ----------------------------------------------------------------------------------------- mixtures


class Part(NamedTuple):
    """A source of a mixture: how many rows it has, and how many of them an epoch takes."""

    rows: int
    per_epoch: int
    blocks: Blocks | None = None


class RowMixture:
    """Several sources as one, of which an epoch takes weight x len(source) rows of each.

    A weight below 1 takes other rows in each epoch until all were taken. A weight above 1 takes all
    rows, and some or all of them again. data.Order draws them; as `Rows`, a mixture has every row
    of every source once, one source after the other.
    """

    def __init__(self, sources: list[Rows], weights: list[float]):
        """Raise UserError for a weight that takes no row."""
        self.sources = sources
        self.blocks = None  # those of its sources are in its parts
        self.file = ", ".join(str(source.file) for source in sources)

        # Source k has the rows from ends[k - 1] to ends[k] - 1 of the mixture.
        self.ends = np.cumsum([len(source) for source in sources])

        parts = []
        for source, weight in zip(sources, weights, strict=True):
            part = Part(len(source), round(weight * len(source)), source.blocks)
            if part.per_epoch < 1:
                what = f"weight {weight} takes none of {part.rows} rows"
                raise UserError(source.file, what, "raise it, or leave it out")
            parts.append(part)
        self.parts = tuple(parts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> Row:
        source, j = self._find(i)
        return source[j]

    def where(self, i: int, row: Row | None = None) -> str:
        source, j = self._find(i)
        return source.where(j, row)

    def media(self, i: int, row: Row) -> list[Media]:
        source, j = self._find(i)
        return source.media(j, row)

    def file_spans(self) -> list[FileSpan]:
        spans = []
        first = 0  # the source's first row in the mixture
        for source in self.sources:
            for file, begin, end in source.file_spans():
                spans.append(FileSpan(file, first + begin, first + end))
            first += len(source)
        return spans

    def _find(self, i: int) -> tuple[Rows, int]:
        """Return the source of row i, and the row's number there."""
        k = int(np.searchsorted(self.ends, i, side="right"))
        if k == 0:
            return self.sources[0], i
        return self.sources[k], i - int(self.ends[k - 1])
