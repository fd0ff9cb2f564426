"""The layers of decoding: other kernels, the same numbers within a rounding."""

import pytest
import torch
from torch import nn

import lora
from inference import cpu
from inference.fast_layers import fast_layers, fast_linears, replaced
from kernels import int8
from packing import packed_attention
from tests.tools.decoding_models import build


@pytest.fixture(params=["compiled", "no compiler"])
def compiler(request, monkeypatch):
    """With what a C++ compiler makes, where there is one, and without."""
    if request.param == "no compiler":
        monkeypatch.setattr(cpu, "library", lambda: None)
    elif cpu.library() is None:
        pytest.skip("needs a C++ compiler and AVX2")
    return request.param


@pytest.mark.parametrize("kind", ["bf16", "int8", "nf4"])
def test_fast_products_are_those_of_the_modules(kind, compiler):
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


@pytest.mark.parametrize("family", ["gemma3_text", "stablelm", "smollm3"])
def test_fast_layers_take_their_places_for_a_while(family, compiler):
    """Products, norms and rotations of a step are compiled; afterwards all is as it was."""
    lm = build(family).language_model
    before = [dict(m.__dict__) for m in lm.modules()]
    fast = fast_layers(lm)
    names = {r.name for r in fast}
    assert names == ({"forward", "add", "rotate"} if compiler == "compiled" else {"forward"})

    x = torch.randn(3, 64)
    positions = torch.tensor([0, 5, 9])

    def run():
        attend = packed_attention(torch.tensor([0, 1, 2, 3], dtype=torch.int32), 1)
        return lm.lm_head(lm.model(x, positions, attend))

    with torch.inference_mode():
        want = run()
        with replaced(fast):
            assert all(r.module.__dict__[r.name] is r.function for r in fast)
            got = run()
    assert (got - want).norm() <= 1e-5 * want.norm()
    assert [m.__dict__ for m in lm.modules()] == before


def test_autocast_has_the_products_that_it_has_without(compiler):
    lm = build("stablelm").language_model
    x, positions = torch.randn(3, 64), torch.tensor([0, 5, 9])
    attend = packed_attention(torch.tensor([0, 1, 2, 3], dtype=torch.int32), 1)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        want = lm.lm_head(lm.model(x, positions, attend))
        with replaced(fast_layers(lm)):
            assert torch.equal(lm.lm_head(lm.model(x, positions, attend)), want)


def test_few_rows_go_to_what_is_compiled_and_many_do_not(monkeypatch):
    if cpu.library() is None:
        pytest.skip("needs a C++ compiler and AVX2")
    rows = []
    product = cpu.product

    def counted(x, *rest):
        rows.append(x.size(0))
        return product(x, *rest)

    monkeypatch.setattr(cpu, "product", counted)
    model = build()
    prompts = torch.randint(3, 61, (2, 20))
    model.generate(prompts, max_new_tokens=3)
    # Two steps of seven products in each of two layers, and a head, which the prefill has too.
    assert rows == [2] * (1 + 2 * (2 * 7 + 1))


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
