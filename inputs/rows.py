"""Training rows: what every row format offers, which formats there are, and mixtures of them.

    rows = open_rows("rows.json", images="pictures")   # or .jsonl, tar shards, a folder, a glob
    row = rows[7]                # {"id": ..., "image": ..., "conversations": [...]}
    media = rows.media(7, row)   # its pictures or videos, each a path or bytes
    rows.where(7)                # "rows.json:row 7 (id X)", for messages

A new format is a file with a class that offers what `Rows` lists, an entry in FORMATS, and a test.
One whose rows lie in files as JSON texts derives from `indexed_rows.IndexedRows`, as json_rows.py
and shards.py show.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from config import Stage, UserError
from inputs.indexed_rows import FileSpan, files
from inputs.json_rows import JsonLines, JsonList
from inputs.media import Media
from inputs.shards import Shards

# By the ending of the file's name; a file with any other ending is read as a JSON list.
FORMATS = {".json": JsonList, ".jsonl": JsonLines, ".tar": Shards}


class Part(NamedTuple):
    """A source of a mixture: how many rows it has, and how many of them an epoch takes."""

    rows: int
    per_epoch: int


@runtime_checkable
class Rows(Protocol):
    """Training rows in any format. Each worker gets a copy by pickle or fork: keep it small."""

    file: Path | str  # what messages about all rows call them
    parts: tuple[Part, ...]  # of a mixture; () for a single source

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict:
        """Return row i as a LLaVA row. Raise UserError that names it if it is none."""

    def where(self, i: int, row: dict | None = None) -> str:
        """Return what messages call row i. It is read for its id unless it is given."""

    def media(self, i: int, row: dict) -> list[Media]:
        """Return the pictures or videos of row i, which is `row`. Raise UserError that names it."""

    def file_spans(self) -> list[FileSpan]:
        """Return which rows lie in which file, in order. Token counts are kept beside the files."""


def open_rows(data: str | Path, images: str | Path = "") -> Rows:
    """Open a file of rows, a folder of shards, or a glob. Raise UserError if it cannot be read.

    `images` is the folder of the rows' media, by default that of the data. Shards hold their own.
    """
    fix = "name a .json or .jsonl file of rows, or shards"
    found = files(data) or [Path(data)]
    if found[0] == Path(data) and found[0].is_dir():
        raise UserError(data, "a folder without .tar shards", fix)

    endings = {file.suffix for file in found}
    if len(endings) > 1:
        names = ", ".join(sorted(endings))
        raise UserError(data, f"files of several formats ({names})", "make a mixture of them")
    row_format = FORMATS.get(found[0].suffix, JsonList)
    return row_format(data, images)


class Mixture:
    """Several sources as one, of which an epoch takes weight x len(source) rows of each.

    A weight below 1 takes other rows in each epoch until all were taken, a weight above 1 takes all
    of them again. As Rows it has every row of every source once, one source after the other.
    """

    def __init__(self, sources: list[Rows], weights: list[float]):
        """Raise UserError for a weight that takes no row."""
        self.sources = sources
        self.ends = np.cumsum([len(source) for source in sources])
        self.file = ", ".join(str(source.file) for source in sources)

        parts = []
        for source, weight in zip(sources, weights, strict=True):
            part = Part(len(source), per_epoch=round(weight * len(source)))
            if part.per_epoch < 1:
                what = f"weight {weight} takes none of {part.rows} rows"
                raise UserError(source.file, what, "raise it, or leave it out")
            parts.append(part)
        self.parts = tuple(parts)

    @classmethod
    def of(cls, stage: Stage, where: str) -> Rows:
        """Open what a stage of a recipe trains on: its data, or its mixture. Raise UserError."""
        if bool(stage.data) == bool(stage.mixture):
            what = "set beside a mixture" if stage.data else "not set"
            fix = "name a .json or .jsonl file of rows, or sources of a mixture"
            raise UserError(f"{where}.data", what, fix)
        if stage.data:
            return open_rows(stage.data, stage.images)

        sources = stage.mixture.values()
        opened = [open_rows(source.data, source.images) for source in sources]
        return cls(opened, [source.weight for source in sources])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> dict:
        source, j = self._find(i)
        return source[j]

    def where(self, i: int, row: dict | None = None) -> str:
        source, j = self._find(i)
        return source.where(j, row)

    def media(self, i: int, row: dict) -> list[Media]:
        source, j = self._find(i)
        return source.media(j, row)

    def file_spans(self) -> list[FileSpan]:
        spans = []
        first = 0
        for source in self.sources:
            for file, begin, end in source.file_spans():
                spans.append(FileSpan(file, first + begin, first + end))
            first += len(source)
        return spans

    def _find(self, i: int) -> tuple[Rows, int]:
        """Return the source of row i, and its number there."""
        k = int(np.searchsorted(self.ends, i, side="right"))
        if k == 0:
            return self.sources[0], i
        return self.sources[k], i - int(self.ends[k - 1])
