"""Chapter 12, from formula to Triton: a solution."""

import torch
from torch import Tensor


def online_cross_entropy(logits: Tensor, target: int, block: int) -> Tensor:
    """Return the loss of one token, logsumexp(logits) - logits[target], as a tensor of no size."""
    largest = torch.tensor(float("-inf"))
    total = torch.tensor(0.0)
    picked = torch.tensor(0.0)
    for start in range(0, len(logits), block):
        one = logits[start : start + block]
        new = torch.maximum(largest, one.max())
        total = total * (largest - new).exp() + (one - new).exp().sum()
        largest = new

        # The target lies in one of the blocks.
        if start <= target < start + block:
            picked = one[target - start]
    return largest + total.log() - picked


def scores_that_show(version: str) -> Tensor | None:
    """Return finite scores (M,) on which a version of the kernel is wrong; None if there are none.

    one: missing keys have a score of 0, so the last block must not be full.
    two: the reference is the largest of the last block alone, which is right until a power
        overflows: a block whose scores lie far below those of the block before.
    three: missing values are 1, but their weight is 0. It is always right.
    four: the sum is not scaled, so the largest score must grow from one block to the next.
    five: the largest score begins at 0, which is right until all powers underflow: scores that are
        all far below 0.
    """
    if version == "one":
        return torch.zeros(20)
    if version == "two":
        return torch.cat([torch.zeros(32), torch.full((32,), -200.0)])
    if version == "three":
        return None
    if version == "four":
        return torch.linspace(0, 10, 64)
    return torch.full((32,), -200.0)
