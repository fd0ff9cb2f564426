"""Chapter 11, LoRA and 4 bits: a solution."""

import torch
from torch import Tensor


def best_adapter(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, K) and B (N, rank) whose product B A is the nearest to a change (N, K)."""
    # The singular values come in falling order, so the first ones matter most.
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    B = left[:, :rank] * values[:rank]
    A = right[:rank]
    return A, B


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight (N, K) in 8 bits, (N, K) int8, and the scale of each row, (N,) float32."""
    scale = weight.abs().amax(dim=1)

    # Any divisor leaves a row of zeros as it is.
    divisor = scale.masked_fill(scale == 0, 1.0)
    codes = (weight * (127 / divisor)[:, None]).round()
    return codes.to(torch.int8), scale
