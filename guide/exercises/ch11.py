"""Chapter 11, LoRA and 4 bits: fill in both functions, then run

python -m pytest guide/exercises/test_ch11.py -o addopts=""
"""

from torch import Tensor


def best_adapter(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (rank, K) and B (N, rank) whose product B A is the nearest to a change (N, K).

    Nearest means: no other matrix of this rank has a smaller sum of squared differences (Eckart
    and Young, 1936). torch.linalg.svd has all that it takes.
    """
    raise NotImplementedError


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight (N, K) in 8 bits, (N, K) int8, and the scale of each row, (N,) float32.

    The scale of a row is its largest magnitude. A number w becomes the whole number nearest to
    127 w / scale. A row of zeros stays zeros.
    """
    raise NotImplementedError
