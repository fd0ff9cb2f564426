"""Training rows: what every row format offers, which formats there are, and mixtures of them.

    rows = open_rows("rows.json", images="pictures")   # or a table, shards, a folder, a glob, an id
    rows.recognised              # "a JSON list"
    row = rows[7]                # {"id": ..., "image": ..., "conversations": [...]}
    media = rows.media(7, row)   # its pictures or videos, each a path or bytes
    rows.where(7)                # "rows.json:row 7 (id X)", for messages

A format finds raw rows in files, whatever they say (`forms.py` reads that). Which format a file has
is told by its content (kinds.py). Which files of a folder are meant is told by their names
(folders.py), and a Hugging Face id stands for a folder (hub.py). To add a format, say Arrow,
these places change:

    inputs/arrow_rows.py        the new file: a class ArrowRows(FileRows), see file_rows.py
    inputs/kinds.py             kind_of_rows returns "arrow" for its first bytes, ENDINGS has .arrow
    inputs/folders.py           NAMES has what it is called
    FORMATS, below              the entry: "arrow": ArrowRows
    tests/inputs/               test_containers.py fails until MATRIX opens the new format, too

A format whose rows are texts in files derives from `indexed_rows.IndexedRows` and needs one method,
`scan`. json_rows.JsonLines is the shortest example.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from config import UserError
from inputs import folders, hub
from inputs.caption_rows import CaptionRows
from inputs.file_rows import Blocks, FileSpan, unreadable
from inputs.folders import CAPTIONS, Found
from inputs.forms import Row, check_columns
from inputs.index import is_kept
from inputs.json_rows import JsonLines, JsonList
from inputs.media import Media
from inputs.parquet_rows import ParquetRows
from inputs.shards import Shards
from inputs.table_rows import Table

PER_BLOCK = 16  # rows that `in_few_blocks` takes of one

# By what kinds.kind_of_rows says of a file.
FORMATS = {
    "list": JsonList,
    "lines": JsonLines,
    "tar": Shards,
    "table": Table,
    "parquet": ParquetRows,
    CAPTIONS: CaptionRows,
}


@runtime_checkable
class Rows(Protocol):
    """What every format offers.

    Each data worker gets its own copy, by fork or pickle. So rows stay in their files, and a format
    holds little more than where they are.
    """

    file: Path | str  # what messages call the rows as a whole
    recognised: str  # what `data.py check` says they are
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


def open_rows(
    data: str | Path, images: str | Path = "", columns: dict[str, str] | None = None
) -> Rows:
    """Open rows: a file, a folder, a glob or a Hugging Face id. Raise UserError if it cannot be.

    `images` is the folder of the rows' media, by default that of the data. Shards hold their own.
    `columns` maps parts of a row to the names that they have in these rows (forms.py).
    """
    try:
        found = find(data)
    except OSError as e:
        raise unreadable(data, e) from None

    # A file of one object is no list: that format says so.
    row_format = FORMATS.get(found.kind, JsonList)
    rows = row_format(data, found.files, images, columns)
    rows.recognised = found.what + rows.details()
    if found.left_out:
        rows.recognised += f"; splits left out: {found.left_out}"
    check_columns(rows, columns or {})
    return rows


def find(data: str | Path) -> Found:
    """Return what is meant by the name of some data. Raise UserError or OSError."""
    if Path(data).is_dir():
        return folders.find(Path(data))
    files = [file for file in files_named(data) if not is_kept(file)]
    if files:
        return folders.of_files(files, data)
    if hub.parse_id(data):
        return hub.find(data)
    return folders.of_files([Path(data)], data)  # opening it says that it is missing


def files_named(data: str | Path) -> list[Path]:
    """Return the files of a name or a glob, in order; none if there are none."""
    return sorted(Path(name) for name in glob.glob(str(data)))


def is_here(data: str | Path) -> bool:
    """Say whether some data is on this machine: files, a folder, or an id that is in the cache."""
    if os.path.exists(data) or files_named(data):
        return True
    name = hub.parse_id(data)
    return name is not None and hub.cached(name.repo) is not None


# ------------------------------------------------------------------------------------------- blocks


def blocks_of_source(rows: Rows, i: int) -> tuple[int, Blocks | None]:
    """Return the first row of the source that row i is of, and the source's blocks if it has."""
    if not rows.parts:
        return 0, rows.blocks
    first = 0
    for part in rows.parts:
        if i < first + part.rows:
            break
        first += part.rows
    return first, part.blocks


def block_of(rows: Rows, i: int) -> range | None:
    """Return the rows that are read together with row i; None where each is read alone."""
    first, blocks = blocks_of_source(rows, i)
    if blocks is None:
        return None
    k = int(np.searchsorted(blocks.ends, i - first, side="right"))
    begin = 0
    if k > 0:
        begin = int(blocks.ends[k - 1])
    return range(first + begin, first + int(blocks.ends[k]))


def in_few_blocks(rows: Rows, picks: Iterable[int]) -> Iterator[int]:
    """Yield as many rows as `picks`, which are spread through all rows, and read few blocks.

    Where rows are read alone, the picks are what is yielded. Else up to PER_BLOCK that follow each
    other become rows of one block, evenly spaced in it.
    """
    source = 0  # by its first row
    block = range(0)
    others: list[int] = []  # rows of the block
    for pick in picks:
        first, blocks = blocks_of_source(rows, pick)
        if blocks is None:
            yield pick
        elif pick in block:
            if pick in others:
                others.remove(pick)
            yield pick
        elif others and source == first:
            yield others.pop()
        else:
            source = first
            block = block_of(rows, pick)
            step = max(1, len(block) // PER_BLOCK)
            others = list(block[::step])[1:PER_BLOCK]
            yield pick


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
        recognised = [f"{source.recognised} ({source.file})" for source in sources]
        self.recognised = ", and ".join(recognised)

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
