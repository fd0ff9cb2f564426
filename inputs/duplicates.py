"""Rows that occur twice: what `python data.py check` names of them.

    print_duplicates(rows)    # rows with the pictures and the question of an earlier row

They are told by their content (content.py), whatever their files and names.
"""

from __future__ import annotations

import numpy as np

from config import printable
from inputs.content import row_keys
from inputs.rows import Rows

NAMED = 3  # pairs that are named; the others are counted


def print_duplicates(rows: Rows, workers: int = 0):
    """Print how many rows have the pictures and the question of an earlier row, and a few of them.

    Those with another answer are named by themselves.
    """
    keys = row_keys(rows, workers)
    same, differing = find_duplicates(keys)
    kinds = [
        (same, "the same pictures, question and answer as an earlier row"),
        (differing, "the same pictures and question as an earlier row, and another answer"),
    ]
    for pairs, what in kinds:
        if not len(pairs):
            continue
        print(f"  duplicates: {len(pairs)} rows have {what}")
        for row, earlier in pairs[:NAMED].tolist():
            later = printable(rows.where(row), 1000)
            print(f"    {later} has those of {printable(rows.where(earlier), 1000)}")


def find_duplicates(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs (row, the first row with its pictures and question): two (m, 2) arrays.

    The rows of the first array also have its answer, those of the second have another.
    keys: (n, 3) of content.row_keys.
    """
    # A row that cannot be read has no question, and is nobody's duplicate.
    readable = np.flatnonzero(keys[:, 1] != 0)
    asked = keys[readable, :2]
    _, first, group = np.unique(asked, axis=0, return_index=True, return_inverse=True)
    earlier = readable[first[group.reshape(-1)]]

    is_duplicate = earlier != readable
    pairs = np.stack([readable, earlier], 1)[is_duplicate]
    is_same = keys[pairs[:, 0], 2] == keys[pairs[:, 1], 2]
    return pairs[is_same], pairs[~is_same]
