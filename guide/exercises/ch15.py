"""Chapter 15, video and tiles: fill in both functions, then run

python -m pytest guide/exercises/test_ch15.py -o addopts=""
"""

from torch import Tensor


def middle_frames(frames: int, n: int) -> list[int]:
    """Return the numbers of n frames of a film that has `frames`, counted from 0.

    The film is cut into n stretches of equal length, frames / n, which need not be whole. Of each
    the frame is taken that is shown in its middle: frame i is shown from time i to time i + 1. A
    middle between two frames belongs to the later one. A film of fewer than n frames gives some of
    them several times. (Wang et al., 2016)
    """
    raise NotImplementedError


def join_tiles(tiles: Tensor, rows: int, columns: int, newline: Tensor) -> Tensor:
    """Return the features of tiles as those of one large picture, (m, D), row by row.

    tiles (rows * columns, side, side, D): the grid of features of each tile, tiles in reading
    order. newline (D,) stands behind each row, so m is (rows * side) * (columns * side + 1).
    """
    raise NotImplementedError
