"""Exercises of chapter 3: the way back from pixel shuffle, and a connector of your own."""

from torch import Tensor, nn


def unshuffle(tokens: Tensor, factor: int, rows: int, columns: int) -> Tensor:
    """Return the grid (M, h, w, C) of pixel-shuffled tokens (M, rows * columns, r * r * C).

    It is the inverse of connectors.cut_squares(x, factor).flatten(3).flatten(1, 2), with
    r = factor, h = rows * r and w = columns * r.
    """
    raise NotImplementedError


class Average(nn.Module):
    """A connector: the mean of every k tokens that follow each other, then an MLP.

    It has the signature of an entry of connectors.CONNECTORS: built with the two widths and its
    options, called with (N, n, C). `self.proj` is connectors.mlp(vision_dim, text_dim).
    """

    def __init__(self, vision_dim: int, text_dim: int, every: int):
        super().__init__()
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, n // every, D) of (N, n, C); tokens that are left over are dropped."""
        raise NotImplementedError


def one_of_every(n: int, every: int) -> int:
    """Return how many tokens Average makes of n."""
    raise NotImplementedError
