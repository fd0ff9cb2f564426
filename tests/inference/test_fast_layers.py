"""The products of decoding: other kernels, the same numbers within a rounding."""

import pytest
import torch
from torch import nn

import lora
from inference.fast_layers import fast_linears
from kernels import int8
from tests.tools.decoding_models import build


@pytest.mark.parametrize("kind", ["bf16", "int8", "nf4"])
def test_fast_products_are_those_of_the_modules(kind):
    """In bfloat16 and quantized; for few rows and many."""
    lm = build("phi").bfloat16().language_model
    for m in lm.modules():
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.bias)
    if kind != "bf16":
        lora.quantize(lm, kind)
    fast = fast_linears(lm)
    linears = [m for m in lm.modules() if isinstance(m, (nn.Linear, lora.Quantized))]
    assert set(fast) == set(linears) and len(linears) == 2 * 6 + 1
    for m in linears:
        for rows in (1, 3, 40):
            x = torch.randn(rows, 64 if m is lm.lm_head else m.in_features).bfloat16()
            want = m(x).double()
            assert (
                fast[m](x).double() - want
            ).norm() <= 6e-3 * want.norm()  # each is within a rounding of bfloat16


def test_int8_products_on_a_cpu_are_as_exact_as_unpacking():
    for rows, N, K in ((1, 64, 128), (16, 192, 64), (17, 64, 64), (2, 33, 17), (0, 64, 64)):
        g = torch.Generator().manual_seed(rows)
        x, q = (
            torch.randn(rows, K, generator=g).bfloat16(),
            int8.quantize(torch.randn(N, K, generator=g)),
        )
        exact = x.double() @ (q.weight.double() * q.SCB.double()[:, None] / 127).T
        ours, plain = (
            (f(x, q).double() - exact).norm() for f in (int8.matmul, int8.reference_matmul)
        )
        assert int8.matmul(x, q).shape == (rows, N) and ours <= 1.1 * plain
