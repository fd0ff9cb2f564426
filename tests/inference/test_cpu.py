"""The compiled step of a CPU: its numbers are plain torch's, and nothing needs it."""

import pytest
import torch

from inference import cpu
from kernels import nf4, norms, rope
from tests.tools.compiler import needs_compiler

CLOSE = {torch.float32: 1e-6, torch.bfloat16: 3e-3}  # a rounding of each


def distance(y: torch.Tensor, want: torch.Tensor) -> float:
    """Return the norm of the difference, as a share."""
    return float((y.double() - want.double()).norm() / want.double().norm())


def reference(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, factor: float
) -> torch.Tensor:
    """Return what cpu.product does, in plain torch."""
    y = x.float() @ weight.float().T
    if scales is not None:
        y = y * scales
    return (y * factor).to(x.dtype)


@needs_compiler
@pytest.mark.parametrize("dtypes", sorted(cpu.DTYPES, key=str), ids=str)
def test_products_are_torchs_and_a_row_has_no_company(dtypes):
    """Of 1 to 17 rows, and weights whose rows are no multiple of what is done at a time."""
    of_x, of_weight = dtypes
    for rows in range(1, 18):
        for N, K in ((1, 32), (7, 64), (33, 96), (64, 768)):
            g = torch.Generator().manual_seed(rows)
            weight = (30 * torch.randn(N, K, generator=g)).to(of_weight)
            x = torch.randn(rows, K, generator=g).to(of_x)
            scales = torch.rand(N, generator=g)
            assert cpu.fits(of_x, weight)
            y = cpu.product(x, weight, scales, 0.5)
            assert distance(y, reference(x, weight, scales, 0.5)) < CLOSE[of_x]
            for i in (0, rows - 1):
                assert torch.equal(cpu.product(x[i : i + 1], weight, scales, 0.5), y[i : i + 1])
    plain = cpu.product(x, weight)
    assert plain.dtype == of_x and distance(plain, reference(x, weight, None, 1)) < CLOSE[of_x]


@needs_compiler
@pytest.mark.parametrize("dtype", cpu.WIDTHS)
@pytest.mark.parametrize("double", [True, False])
def test_products_with_codes_are_those_with_the_numbers(double, dtype):
    if not cpu.fits_nf4(64, 64):
        pytest.skip("needs AVX512")
    for rows in (1, 2, 5):
        for N, K in ((1, 64), (7, 192), (64, 768)):
            weight = nf4.quantize(torch.randn(N, K), double)
            x = torch.randn(rows, K).to(dtype)
            scales = nf4.block_scales(weight)
            y = cpu.nf4(x, weight.packed, scales, weight.quant_map, N)
            numbers = nf4.reference(weight, torch.float32)
            assert distance(y, reference(x, numbers, None, 1)) < CLOSE[dtype]
    assert not cpu.fits_nf4(96, 64) and not cpu.fits_nf4(128, 128)


@needs_compiler
def test_threads_share_the_rows_of_a_weight():
    x, weight, before = torch.randn(2, 64), torch.randn(501, 64), torch.get_num_threads()
    one = cpu.product(x, weight)
    torch.set_num_threads(3)
    try:
        assert torch.equal(cpu.product(x, weight), one)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_what_does_not_fit_is_not_taken():
    weight = torch.randn(8, 64)
    assert cpu.fits(torch.float32, weight)
    assert not cpu.fits(torch.bfloat16, weight)
    assert not cpu.fits(torch.float32, weight.T)
    assert not cpu.fits(torch.float32, weight[:, :33].contiguous())


@needs_compiler
@pytest.mark.parametrize("dtype", cpu.WIDTHS)
@pytest.mark.parametrize("kind", cpu.KINDS)
def test_norms_are_torchs(kind, dtype):
    for shape in ((1, 64), (5, 100), (3, 2, 16)):
        x, residual = torch.randn(2, *shape).to(dtype)
        weight = torch.randn(shape[-1]).to(dtype)
        bias = torch.randn(shape[-1]).to(dtype) if kind == "layer" else None
        for r in (None, residual):
            y, s = cpu.norm(x, r, weight, bias, 1e-5, kind)
            want, total = norms.norm(x, weight, bias, eps=1e-5, kind=kind, residual=r)
            assert torch.equal(s, total) and distance(y, want) < CLOSE[dtype]


@needs_compiler
@pytest.mark.parametrize("dtype", cpu.WIDTHS)
def test_rotations_are_torchs(dtype):
    for width, rotary in ((64, 64), (32, 12), (10, 2)):
        x = torch.randn(3, 5, width).to(dtype)
        angle = torch.randn(3, 1, rotary // 2).repeat(1, 1, 2)
        want, _ = rope.reference(x, x, angle.cos(), angle.sin())
        assert distance(cpu.turn(x, angle.cos(), angle.sin()), want) < CLOSE[dtype]


@needs_compiler
def test_it_is_compiled_once_and_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for said in ("compiling inference/cpu.cpp for this machine, once\n", ""):
        assert cpu.library.__wrapped__() is not None
        assert capfd.readouterr().err == said
    (file,) = (tmp_path / "barellava").iterdir()
    assert file.suffix == ".so" and b"libgomp" not in file.read_bytes()  # it takes torch's


@pytest.mark.parametrize("trouble", ["no compiler", "it fails", "no folder", "an older CPU"])
def test_without_it_there_is_none(trouble, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if trouble == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif trouble == "it fails":
        monkeypatch.setenv("CXX", "false")
    elif trouble == "no folder":
        (tmp_path / "barellava").write_text("a file")
    else:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert cpu.library.__wrapped__() is None
    monkeypatch.setattr(cpu, "library", cpu.library.__wrapped__)
    assert not cpu.fits(torch.float32, torch.randn(8, 64))
