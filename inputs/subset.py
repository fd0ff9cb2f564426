"""Rows chosen of others by their numbers: those to train on, those held out, those rated well.

    chosen = RowSubset(rows, np.array([0, 3, 4]))
    chosen[1]            # row 3 of `rows`
    chosen.where(1)      # "rows.json:row 3 (id X)": messages keep the place in the file

holdout.py decides which rows they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from inputs.file_rows import Blocks, FileSpan
from inputs.forms import Row
from inputs.media import Media

if TYPE_CHECKING:
    from inputs.rows import Rows


class RowSubset:
    """Some rows of a single source; see rows.Rows for what its methods promise.

    A mixture has none of its own: it is made of subsets of its sources.
    """

    parts = ()

    def __init__(self, rows: Rows, chosen: np.ndarray):
        """Choose by (n,) numbers of rows, in ascending order, each once."""
        self.rows = rows
        self.chosen = chosen
        self.file = rows.file
        self.recognised = rows.recognised
        self.blocks = blocks_of(rows.blocks, chosen)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> Row:
        return self.rows[self._number(i)]

    def where(self, i: int, row: Row | None = None) -> str:
        return self.rows.where(self._number(i), row)

    def media(self, i: int, row: Row) -> list[Media]:
        return self.rows.media(self._number(i), row)

    def file_spans(self) -> list[FileSpan]:
        spans = []
        for file, begin, end in self.rows.file_spans():
            first, last = np.searchsorted(self.chosen, [begin, end])
            if first < last:
                spans.append(FileSpan(file, int(first), int(last)))
        return spans

    def _number(self, i: int) -> int:
        """Return which of all rows is row i of these; -1 is the last one. Raise IndexError."""
        return int(self.chosen[i])


def blocks_of(blocks: Blocks | None, chosen: np.ndarray) -> Blocks | None:
    """Return how chosen rows lie in the blocks of all rows."""
    if blocks is None:
        return None

    # A block ends after as many chosen rows as have smaller numbers than its end. Where none of a
    # block is chosen, two ends are equal, or the first one is 0.
    ends = np.unique(np.searchsorted(chosen, blocks.ends))
    return blocks._replace(ends=ends[ends > 0])
