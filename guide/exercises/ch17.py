"""Chapter 17, taking it with you: fill in both functions, then run

python -m pytest guide/exercises/test_ch17.py -o addopts=""
"""

from torch import Tensor


def quantize_q8_0(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers (rows, n) in int8 and scales (rows, n / 32) of a weight (rows, n).

    Each 32 neighbours of a row share a scale, with which the largest of them becomes 127 or -127.
    A weight is about its whole number times its scale. Blocks of zeros have scale 0 and zeros.
    """
    raise NotImplementedError


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """Return a query weight (heads * d, n) with the rows of each head in another order.

    Before, the rows i and i + d/2 of a head turn together; after, the rows 2i and 2i + 1 do.
    """
    raise NotImplementedError
