"""Chapter 15, video and tiles: a solution."""

import torch
from torch import Tensor


def middle_frames(frames: int, n: int) -> list[int]:
    """Return the numbers of n frames of a film that has `frames`, counted from 0."""
    # Stretch i ends where stretch i + 1 begins; the middle is at i + 1/2. In whole numbers, since
    # a float may round a middle down to the frame before it.
    return [(2 * i + 1) * frames // (2 * n) for i in range(n)]


def join_tiles(tiles: Tensor, rows: int, columns: int, newline: Tensor) -> Tensor:
    """Return the features of tiles as those of one large picture, (m, D), row by row."""
    side, width = tiles.size(1), tiles.size(3)
    large = tiles.view(rows, columns, side, side, width)
    large = large.transpose(1, 2)  # (rows, side, columns, side, D)
    large = large.reshape(rows * side, columns * side, width)
    ends = newline.expand(rows * side, 1, width)
    return torch.cat([large, ends], dim=1).flatten(0, 1)
