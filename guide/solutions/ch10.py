"""Chapter 10, looking inside: a solution."""

from collections.abc import Callable

import torch
from torch import Tensor


def rollout(attention: Tensor) -> Tensor:
    """Return how much of each token is in each token's state behind the last block, (T, T)."""
    same = torch.eye(attention.size(-1))
    total = same
    for of_block in attention:
        total = (0.5 * of_block + 0.5 * same) @ total
    return total


def occlusion_map(
    score: Callable[[Tensor], float], picture: Tensor, patch: int, cover: Tensor
) -> Tensor:
    """Return by how much a score falls where each patch is covered, (rows, columns)."""
    rows = picture.size(1) // patch
    columns = picture.size(2) // patch
    uncovered = score(picture)
    falls = torch.zeros(rows, columns)
    for row in range(rows):
        for column in range(columns):
            covered = picture.clone()
            down = slice(row * patch, (row + 1) * patch)
            across = slice(column * patch, (column + 1) * patch)
            covered[:, down, across] = cover[:, None, None]
            falls[row, column] = max(0.0, uncovered - score(covered))
    return falls
