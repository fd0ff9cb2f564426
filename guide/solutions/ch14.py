"""Chapter 14, many GPUs: a solution."""

from collections.abc import Callable

import torch
from torch import Tensor

Send = Callable[[int, int, Tensor], Tensor]


def ring_all_reduce(tensors: list[Tensor], send: Send) -> list[Tensor]:
    """Return the sum of all tensors, once for each rank."""
    size = len(tensors)
    chunks = [list(tensor.clone().chunk(size)) for tensor in tensors]  # by rank

    # Reduce-scatter: in each round a rank hands on the chunk that it has added to last.
    for step in range(size - 1):
        received = []
        for rank in range(size):
            chunk = (rank - step) % size
            received.append((chunk, send(rank, (rank + 1) % size, chunks[rank][chunk])))
        for rank, (chunk, x) in enumerate(received):
            neighbour = (rank + 1) % size
            chunks[neighbour][chunk] = chunks[neighbour][chunk] + x

    # All-gather: rank r now has chunk r + 1 complete, and complete chunks go around.
    for step in range(size - 1):
        received = []
        for rank in range(size):
            chunk = (rank + 1 - step) % size
            received.append((chunk, send(rank, (rank + 1) % size, chunks[rank][chunk])))
        for rank, (chunk, x) in enumerate(received):
            chunks[(rank + 1) % size][chunk] = x
    return [torch.cat(parts) for parts in chunks]


def fair_gradient(means: list[Tensor], counts: list[int]) -> Tensor:
    """Return the gradient of the mean loss over all tokens of a step."""
    # A mean times its number of tokens is the sum, and sums may be added.
    total = torch.zeros_like(means[0])
    for mean, count in zip(means, counts, strict=True):
        if count > 0:
            total += count * mean
    return total / sum(counts)
