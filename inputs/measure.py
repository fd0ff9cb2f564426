"""Three numbers of every row, measured once by worker processes and kept beside the rows' files.

    lengths = measure_rows(rows, lambda rows: "a1b2.counts", measure, workers=4, doing="...")
    lengths     (len(rows), 3) int64: what measure(rows, i) returns for each row i

data.token_counts and content.row_keys are such numbers. They are kept for whole files. Of chosen
rows (subset.py) they are taken from those of their file, so that another choice costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # comes with tokenizers

from config import printable
from inputs.index import cached_array
from inputs.rows import RowMixture, Rows
from inputs.subset import RowSubset

Measure = Callable[[Rows, int], tuple[int, int, int]]


def measure_rows(
    rows: Rows, kind_of: Callable[[Rows], str], measure: Measure, workers: int, doing: str
) -> np.ndarray:
    """Return (len(rows), 3) int64: what `measure` returns for each row.

    kind_of: from a single source to the kind of its array, as index.cached_array takes it: the
    array is kept beside each file as FILE.kind. "" = it is not kept. doing: for the progress.
    """
    if isinstance(rows, RowSubset):
        return measure_rows(rows.rows, kind_of, measure, workers, doing)[rows.chosen]
    if isinstance(rows, RowMixture):
        of_sources = []
        for source in rows.sources:
            of_sources.append(measure_rows(source, kind_of, measure, workers, doing))
        return np.concatenate(of_sources)

    kind = kind_of(rows)
    of_files = []
    for file, begin, end in rows.file_spans():
        chunks = Chunks(rows, measure, begin, end)
        if kind:
            make = partial(measure_chunks, chunks, workers, f"{printable(file, 1000)}: {doing}")
            of_files.append(cached_array(Path(file), kind, make))
        else:
            of_files.append(measure_chunks(chunks, workers))

    # That of a single file stays a memory map, which ranks and workers share.
    if len(of_files) == 1:
        return of_files[0]
    return np.concatenate(of_files)


class Chunks(Dataset):
    """`chunks[i]` measures the i-th chunk of the rows begin, ..., end - 1."""

    CHUNK = 256  # rows

    def __init__(self, rows: Rows, measure: Measure, begin: int, end: int):
        self.rows = rows
        self.measure = measure
        self.begin = begin
        self.end = end

    def __len__(self) -> int:
        """Return how many chunks there are."""
        return math.ceil((self.end - self.begin) / self.CHUNK)

    def __getitem__(self, i: int) -> np.ndarray:
        """Return (rows of the chunk, 3) int64."""
        first = self.begin + i * self.CHUNK
        last = min(first + self.CHUNK, self.end)
        measured = [self.measure(self.rows, row) for row in range(first, last)]
        return np.array(measured, np.int64)


def measure_chunks(chunks: Chunks, workers: int, doing: str = "") -> np.ndarray:
    """Return what all chunks measure, joined. Print what is being done, and show the progress."""
    if doing:
        print(f"{doing}, once", flush=True)
    loaded = DataLoader(
        chunks,
        batch_size=None,
        num_workers=min(workers, len(chunks) // 4),  # each takes a moment to start
        # A DataLoader draws a seed when it starts. It must not come from dropout's generator.
        generator=torch.Generator(),
    )
    progress = tqdm(loaded, unit="chunk", disable=None, leave=False)
    return np.concatenate(list(progress))
