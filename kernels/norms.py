"""Root mean square and layer normalisation, with the addition of the residual stream in front of it.

    s = x + r                            (with a residual; else s = x)
    RMS    y = s / sqrt(mean(s^2) + eps) * (w + o)                     o = 1 for Gemma, which stores w - 1, else 0
    Layer  y = (s - mean(s)) / sqrt(var(s) + eps) * w + b

Backward, with n the normalised s (before w), g = dy * (w + o), c = 1 / sqrt(...), means over the width:

    RMS    ds = c * (g - n * mean(g * n))               dw = sum over rows of dy * n
    Layer  ds = c * (g - mean(g) - n * mean(g * n))     dw the same, db = sum over rows of dy
    dx = dr = ds + the gradient that reaches s itself

T rows, D width. Bytes moved, forward: x (and r) in, y (and s) out: 2 T D elements (4 T D with the residual), where
separate operations move 6 T D and more. Backward: dy, s (and the gradient of s) in, ds out; 1/sqrt per row is kept.
Statistics are float32 in every dtype. Weight gradients are summed by each program over its rows, then over programs
in a fixed order: deterministic.

Zhang and Sennrich, Root Mean Square Layer Normalization, 2019; Ba, Kiros and Hinton, Layer Normalization, 2016.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Build, Case, Mutation, fused, processors, randn, tl, triton


def reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    out: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x, residual (..., D) -> (y in dtype `out`, s); kind is "rms", "rms1" (weight stored less 1) or "layer"."""
    s = x if residual is None else x + residual
    if kind == "layer":
        return F.layer_norm(s, (s.size(-1),), weight, bias, eps).to(out), s
    wide = s if s.dtype == torch.float64 else s.float()
    if kind == "rms1":
        return F.rms_norm(wide, (s.size(-1),), 1 + weight.to(wide.dtype), eps).to(out), s
    return (F.rms_norm(wide, (s.size(-1),), eps=eps).to(s.dtype) * weight).to(out), s


@triton.jit
def forward_kernel(
    X, R, W, B, Y, S, C, M, D, eps,
    ADD: tl.constexpr, LAYER: tl.constexpr, BIAS: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row per program."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < D
    s = tl.load(X + row * D + at, inside, 0.0).to(tl.float32)
    if ADD:
        s = (s + tl.load(R + row * D + at, inside, 0.0).to(tl.float32)).to(S.dtype.element_ty)
        tl.store(S + row * D + at, s, inside)
        s = s.to(
            tl.float32
        )  # what is normalised is what the residual stream holds, rounding included
    if LAYER:
        mean = tl.sum(s, 0) / D
        s = tl.where(inside, s - mean, 0.0)
        tl.store(M + row, mean)
    c = 1.0 / tl.sqrt(tl.sum(s * s, 0) / D + eps)
    tl.store(C + row, c)
    w = tl.load(W + at, inside, 0.0).to(tl.float32) + OFFSET
    y = s * c * w
    if BIAS:
        y += tl.load(B + at, inside, 0.0).to(tl.float32)
    tl.store(Y + row * D + at, y.to(Y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["T", "rows"])
def backward_kernel(
    DY, DS, S, W, C, M, DX, DW, DB, T, D, rows,
    ADD: tl.constexpr, LAYER: tl.constexpr, BIAS: tl.constexpr, OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`rows` rows per program, so that weight gradients are summed in registers."""
    program, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < D
    w = tl.load(W + at, inside, 0.0).to(tl.float32) + OFFSET
    dw, db = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for row in range(program * rows, tl.minimum(program * rows + rows, T)):
        dy = tl.load(DY + row * D + at, inside, 0.0).to(tl.float32)
        n = tl.load(S + row * D + at, inside, 0.0).to(tl.float32)
        c = tl.load(C + row)
        if LAYER:
            n = tl.where(inside, n - tl.load(M + row), 0.0)
        n *= c
        g = dy * w
        ds = g - n * (tl.sum(g * n, 0) / D)
        if LAYER:
            ds -= tl.sum(g, 0) / D
        ds *= c
        if ADD:
            ds += tl.load(DS + row * D + at, inside, 0.0).to(tl.float32)
        tl.store(DX + row * D + at, ds.to(DX.dtype.element_ty), inside)
        dw += dy * n
        db += dy
    tl.store(DW + program * D + at, dw, inside)
    if BIAS:
        tl.store(DB + program * D + at, db, inside)


def _flags(kind: str, add: bool, bias: bool, width: int) -> dict:
    block = 1 << (width - 1).bit_length()
    return {"ADD": add, "LAYER": kind == "layer", "BIAS": bias, "OFFSET": float(kind == "rms1"), "BLOCK": block,
            "num_warps": min(16, max(1, block // 512))}  # fmt: skip


@torch.library.custom_op("barellava::norm", mutates_args=())
def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    out: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> y, s (empty without a residual: an operation may not return its input), 1 / sqrt per row, mean per row."""
    x = x.contiguous()
    width, rows = x.size(-1), x.numel() // x.size(-1)
    y, c = torch.empty_like(x, dtype=out), x.new_empty(rows, dtype=torch.float32)
    s = (
        x.new_empty(0)
        if residual is None
        else torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    )
    mean = torch.empty_like(c) if kind == "layer" else x.new_empty(0, dtype=torch.float32)
    if rows:
        r = x if residual is None else residual.contiguous()
        flags = _flags(kind, residual is not None, bias is not None, width)
        forward_kernel[(rows,)](
            x, r, weight, weight if bias is None else bias, y, s, c, mean, width, eps, **flags
        )
    return y, s, c, mean


@_norm.register_fake
def _(x, residual, weight, bias, eps, kind, out):
    x = x.contiguous()
    c = x.new_empty(x.numel() // x.size(-1), dtype=torch.float32)
    s = (
        x.new_empty(0)
        if residual is None
        else torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    )
    return (
        torch.empty_like(x, dtype=out),
        s,
        c,
        torch.empty_like(c) if kind == "layer" else c.new_empty(0),
    )


@torch.library.custom_op("barellava::norm_backward", mutates_args=())
def _norm_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor,
    c: Tensor,
    mean: Tensor,
    kind: str,
    bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dy, s = dy.contiguous(), s.contiguous()
    width, rows = s.size(-1), len(c)
    many = 4 * processors(s)
    each = max(1, -(-rows // many))
    programs = -(-rows // each)
    dx, dw = torch.empty_like(s), s.new_empty(programs, width, dtype=torch.float32)
    db = torch.empty_like(dw) if bias else dw.new_empty(0, width)
    if rows:
        extra = dy if ds is None else ds.contiguous()
        flags = _flags(kind, ds is not None, bias, width)
        backward_kernel[(programs,)](
            dy, extra, s, weight, c, mean, dx, dw, db, rows, width, each, **flags
        )
    return dx, dw.sum(0).to(weight.dtype), db.sum(0).to(weight.dtype)


@_norm_backward.register_fake
def _(dy, ds, s, weight, c, mean, kind, bias):
    return torch.empty_like(s), torch.empty_like(weight), torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, residual, weight, bias, _, kind, _ = inputs
    y, s, c, mean = output
    ctx.save_for_backward(x if residual is None else s, weight, c, mean)
    ctx.kind, ctx.add, ctx.bias = kind, residual is not None, bias is not None


def _gradients(ctx, dy, ds, dc, dmean):
    s, weight, c, mean = ctx.saved_tensors
    dy = torch.zeros_like(s) if dy is None else dy  # only the sum was used
    dx, dw, db = _norm_backward(dy, ds if ctx.add else None, s, weight, c, mean, ctx.kind, ctx.bias)
    return dx, dx if ctx.add else None, dw, db if ctx.bias else None, None, None, None


_norm.register_autograd(_gradients, setup_context=_save)


def triton_norm(x, residual, weight, bias, eps, kind, out):
    y, s, _, _ = _norm(x, residual, weight, bias, eps, kind, out)
    return y, x if residual is None else s


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: str,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x, residual (..., D); weight, bias (D,) -> (y, s): the normalised sum s = x + residual, and that sum.

    kind is "rms", "rms1" (the weight is stored less 1) or "layer". Any float dtype; statistics in float32. Under
    autocast y comes in its dtype (only products read it), while s keeps the residual stream's.
    """
    run, device = triton_norm if fused(x) else reference, x.device.type
    if not torch.is_autocast_enabled(device):
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        return run(x, residual, weight, bias, eps, kind, dtype)
    with torch.autocast(device, enabled=False):
        return run(x, residual, weight, bias, eps, kind, torch.get_autocast_dtype(device))


def _case(name: str, shape: tuple[int, ...], kind: str, add: bool, bias: bool = False) -> Case:
    def inputs(g):
        D = shape[-1]
        return (randn(g, *shape), randn(g, *shape) if add else None, 1 + 0.3 * randn(g, D),
                randn(g, D) if bias else None, 1e-5, kind)  # fmt: skip

    def same_dtype(function):
        return lambda *args: function(*args, args[0].dtype)

    grads = (0, *((1,) if add else ()), 2, *((3,) if bias else ()))
    return Case(name, same_dtype(triton_norm), same_dtype(reference), inputs, grads)


CASES = [
    _case("rms", (7, 96), "rms", False),
    _case("rms, one token", (1, 33), "rms", False),
    _case("rms, no token", (0, 16), "rms", False),
    _case("rms of heads", (5, 3, 18), "rms", False),
    _case("rms, residual", (129, 72), "rms", True),
    _case("gemma, residual", (6, 130), "rms1", True),
    _case("layer", (5, 80), "layer", False, True),
    _case("layer without bias, residual", (9, 40), "layer", True),
    _case("layer, residual", (129, 48), "layer", True, True),
]

_F = {"X": "*bf16", "R": "*bf16", "W": "*bf16", "B": "*bf16", "Y": "*bf16", "S": "*bf16", "C": "*fp32", "M": "*fp32",
      "D": "i32:16", "eps": "fp32"}  # fmt: skip
_B = {"DY": "*bf16", "DS": "*bf16", "S": "*bf16", "W": "*bf16", "C": "*fp32", "M": "*fp32", "DX": "*bf16",
      "DW": "*fp32", "DB": "*fp32", "T": "i32", "D": "i32:16", "rows": "i32"}  # fmt: skip
BUILDS = [
    Build(
        kernel,
        types,
        {"ADD": True, "LAYER": layer, "BIAS": layer, "OFFSET": 0.0, "BLOCK": block},
        block // 512,
    )
    for kernel, types in ((forward_kernel, _F), (backward_kernel, _B))
    for layer in (False, True)
    for block in (2048, 4096)
]
MUTATIONS = [
    Mutation("ds = g - n * (tl.sum(g * n, 0) / D)", "ds = g", "rms"),
    Mutation("ds -= tl.sum(g, 0) / D", "ds -= 0", "layer"),
    Mutation("s = tl.where(inside, s - mean, 0.0)", "s = s - mean", "layer"),
    Mutation("to(tl.float32) + OFFSET", "to(tl.float32)", "gemma, residual"),
]  # fmt: skip


if __name__ == "__main__":
    from bench.kernels import main

    main(["norms"])
