"""Chapter 17, taking it with you: a solution."""

import torch
from torch import Tensor


def quantize_q8_0(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers (rows, n) in int8 and scales (rows, n / 32) of a weight (rows, n)."""
    blocks = weight.unflatten(-1, (-1, 32))
    scales = blocks.abs().amax(-1) / 127

    # A block of zeros has no scale to divide by.
    divisors = scales.masked_fill(scales == 0, 1.0)
    numbers = (blocks / divisors[..., None]).round()
    return numbers.flatten(-2).to(torch.int8), scales


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """Return a query weight (heads * d, n) with the rows of each head in another order."""
    first, second = weight.unflatten(0, (heads, 2, -1)).unbind(1)  # (heads, d/2, n) each
    return torch.stack([first, second], dim=2).flatten(0, 2)
