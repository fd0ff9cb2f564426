"""Chapter 11: the nearest adapter of a rank, and eight bits."""

import torch

from guide.exercises import chosen
from kernels import int8

ch = chosen("ch11")


def test_best_adapter():
    torch.manual_seed(0)
    change = torch.randn(20, 12)
    values = torch.linalg.svdvals(change)
    for rank in (1, 3, 12):
        A, B = ch.best_adapter(change, rank)
        assert A.shape == (rank, 12) and B.shape == (20, rank)

        # What is left is made of the other singular values, and cannot be less.
        left = (change - B @ A).square().sum()
        torch.testing.assert_close(left, values[rank:].square().sum(), rtol=1e-4, atol=1e-8)


def test_quantize_rows_is_ours():
    torch.manual_seed(0)
    weight = torch.randn(6, 40).half().float()  # bitsandbytes rounds to float16 first
    weight[2] = 0
    codes, scale = ch.quantize_rows(weight)
    ours = int8.quantize(weight)
    assert codes.dtype == torch.int8
    torch.testing.assert_close(codes, ours.weight)
    torch.testing.assert_close(scale, ours.SCB)
    assert codes[2].count_nonzero() == 0
