"""Chapter 14, many GPUs: fill in both functions, then run

python -m pytest guide/exercises/test_ch14.py -o addopts=""
"""

from collections.abc import Callable

from torch import Tensor

Send = Callable[[int, int, Tensor], Tensor]


def ring_all_reduce(tensors: list[Tensor], send: Send) -> list[Tensor]:
    """Return the sum of all tensors, once for each rank.

    tensors: one (n,) for each of N ranks, n a multiple of N. send(a, b, x) sends x from rank a to
    rank b and returns what b receives. A rank may use what it has or has received, and sends to its
    neighbour alone: rank r to rank (r + 1) % N. In all, a rank sends 2 (N - 1) / N n numbers.
    """
    raise NotImplementedError


def fair_gradient(means: list[Tensor], counts: list[int]) -> Tensor:
    """Return the gradient of the mean loss over all tokens of a step.

    means: for each rank the gradient of the mean loss over its own tokens. counts: how many tokens
    those are. A rank without any (0) has a mean of NaN.
    """
    raise NotImplementedError
