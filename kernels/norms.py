"""Root mean square and layer normalization, with the addition of the residual stream before it.

    s = x + r                            (with a residual; else s = x)
    RMS    y = s / sqrt(mean(s^2) + eps) * (w + o)
    Layer  y = (s - mean(s)) / sqrt(var(s) + eps) * w + b

where o is 1 for Gemma, which stores w - 1, and else 0.
Backward, with n the normalized s (before w), g = dy * (w + o), c = 1 / sqrt(...), means over the
width:

    RMS    ds = c * (g - n * mean(g * n))               dw = sum over rows of dy * n
    Layer  ds = c * (g - mean(g) - n * mean(g * n))     dw the same, db = sum over rows of dy
    dx = dr = ds + the gradient that reaches s itself

T rows (tokens, or heads of tokens), D width. Bytes moved, forward: x (and r) in, y (and s) out,
that is 2 T D elements (4 T D with the residual), where separate operations move 6 T D and more.
Backward: dy, s (and the gradient of s) in, ds out; c, one number per row, is kept.

Statistics are float32 in every dtype. Weight gradients are summed by each program over its rows,
then over the programs in a fixed order: they are deterministic.

Zhang and Sennrich, Root Mean Square Layer Normalization, 2019; Ba, Kiros and Hinton, Layer
Normalization, 2016.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import divide_up, fused, multiprocessors, operation, power_of_two, tl, triton


def reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    out: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return y in dtype `out`, and s; x and residual (..., D).

    kind is "rms", "rms1" (the weight is stored less 1, as Gemma does) or "layer".
    """
    s = x if residual is None else x + residual
    width = (s.size(-1),)
    if kind == "layer":
        return F.layer_norm(s, width, weight, bias, eps).to(out), s

    wide = s if s.dtype == torch.float64 else s.float()
    if kind == "rms1":
        # Gemma multiplies in float32, Llama after rounding to the stream's dtype.
        return F.rms_norm(wide, width, 1 + weight.to(wide.dtype), eps).to(out), s
    normed = F.rms_norm(wide, width, eps=eps).to(s.dtype)
    return (normed * weight).to(out), s


# ------------------------------------------------------------------ Triton


@triton.jit
def forward_kernel(
    X,  # (T, D)
    R,  # (T, D) if ADD
    W,  # (D,)
    B,  # (D,) if BIAS
    Y,  # (T, D)
    S,  # (T, D) if ADD
    C,  # (T,) float32: 1 / sqrt(...)
    M,  # (T,) float32 if LAYER: the mean
    D,
    eps,
    ADD: tl.constexpr,
    LAYER: tl.constexpr,
    BIAS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalize one row per program."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    s = tl.load(X + row * D + at, inside, 0.0).to(tl.float32)

    # What is normalized is what the residual stream holds, its rounding included.
    if ADD:
        s = (s + tl.load(R + row * D + at, inside, 0.0).to(tl.float32)).to(S.dtype.element_ty)
        tl.store(S + row * D + at, s, inside)
        s = s.to(tl.float32)

    # The columns beyond the width must stay 0, or they would count in the variance.
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
    DY,  # (T, D)
    DS,  # (T, D) if ADD: the gradient that reaches s itself
    S,  # (T, D)
    W,  # (D,)
    C,  # (T,)
    M,  # (T,) if LAYER
    DX,  # (T, D)
    DW,  # (programs, D) float32
    DB,  # (programs, D) float32 if BIAS
    T,
    D,
    rows,
    ADD: tl.constexpr,
    LAYER: tl.constexpr,
    BIAS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute dx of `rows` rows per program, and their sums for dw and db, kept in registers."""
    program = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    w = tl.load(W + at, inside, 0.0).to(tl.float32) + OFFSET
    dw = tl.zeros((BLOCK,), tl.float32)
    db = tl.zeros((BLOCK,), tl.float32)

    for row in range(program * rows, tl.minimum(program * rows + rows, T)):
        # Normalize s again: cheaper than to keep n.
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


def kernel_flags(kind: str, add: bool, bias: bool, width: int) -> dict:
    """Return the constants of both kernels. A block is a row; each thread has 16 of its numbers.

    A LayerNorm of more than 4096 numbers has 8 for each thread, or the sums of a float32 row would
    not fit in registers. (With a float32 stream beside bfloat16, 56 bytes do not fit even so.)
    """
    block = power_of_two(width)
    warps = min(16, max(1, block // 512))
    if kind == "layer" and block > 4096:
        warps = 32
    return {
        "ADD": add,
        "LAYER": kind == "layer",
        "BIAS": bias,
        "OFFSET": float(kind == "rms1"),
        "BLOCK": block,
        "num_warps": warps,
    }


# ------------------------------------------------------------------ the operation and its gradient


def _empty_outputs(
    x: Tensor, residual: Tensor | None, kind: str, out: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, s, c and mean of `_norm`, not filled."""
    rows = x.numel() // x.size(-1)
    y = torch.empty_like(x, dtype=out)
    c = x.new_empty(rows, dtype=torch.float32)

    # An operation may not return its input, so without a residual s is empty.
    s = x.new_empty(0)
    if residual is not None:
        s = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))

    mean = x.new_empty(0, dtype=torch.float32)
    if kind == "layer":
        mean = torch.empty_like(c)
    return y, s, c, mean


@operation("barellava::norm")
def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    out: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> y, s (empty without a residual), 1 / sqrt(...) per row, mean per row."""
    x = x.contiguous()
    width = x.size(-1)
    y, s, c, mean = _empty_outputs(x, residual, kind, out)
    if len(c):
        forward_kernel[(len(c),)](
            x,
            x if residual is None else residual.contiguous(),
            weight,
            weight if bias is None else bias,
            y,
            s,
            c,
            mean,
            width,
            eps,
            **kernel_flags(kind, residual is not None, bias is not None, width),
        )
    return y, s, c, mean


@_norm.register_fake
def _(x, residual, weight, bias, eps, kind, out):
    return _empty_outputs(x.contiguous(), residual, kind, out)


@operation("barellava::norm_backward")
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
    """-> dx, dw, db (empty without a bias)."""
    dy = dy.contiguous()
    s = s.contiguous()
    width = s.size(-1)
    rows = len(c)

    # Four programs per multiprocessor, each with equally many rows and a row of dw and of db.
    rows_each = max(1, divide_up(rows, 4 * multiprocessors(s)))
    programs = divide_up(rows, rows_each)
    dx = torch.empty_like(s)
    dw = s.new_empty(programs, width, dtype=torch.float32)
    db = torch.empty_like(dw) if bias else weight.new_empty(0)
    if rows:
        backward_kernel[(programs,)](
            dy,
            dy if ds is None else ds.contiguous(),
            s,
            weight,
            c,
            mean,
            dx,
            dw,
            db,
            rows,
            width,
            rows_each,
            **kernel_flags(kind, ds is not None, bias, width),
        )
    if bias:
        db = db.sum(0).to(weight.dtype)
    return dx, dw.sum(0).to(weight.dtype), db


@_norm_backward.register_fake
def _(dy, ds, s, weight, c, mean, kind, bias):
    db = torch.empty_like(weight) if bias else weight.new_empty(0)
    return torch.empty_like(s), torch.empty_like(weight), db


def _save(ctx, inputs, output):
    x, residual, weight, bias, _, kind, _ = inputs
    _, s, c, mean = output
    ctx.save_for_backward(x if residual is None else s, weight, c, mean)
    ctx.kind = kind
    ctx.add = residual is not None
    ctx.bias = bias is not None


def _gradients(compute, ctx, dy, ds, dc, dmean):
    s, weight, c, mean = ctx.saved_tensors
    if dy is None:  # only the sum was used
        dy = torch.zeros_like(s)
    dx, dw, db = compute(dy, ds, s, weight, c, mean, ctx.kind, ctx.bias)

    dresidual = dx if ctx.add else None
    dbias = db if ctx.bias else None
    return dx, dresidual, dw, dbias, None, None, None


_norm.register_gradient(_save, _gradients, _norm_backward)


# ------------------------------------------------------------------ public


def triton_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    out: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return what `reference` does, by Triton on any device (the interpreter, on a CPU)."""
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
    """Return (y, s): the normalized sum s = x + residual, and that sum.

    x, residual (..., D); weight, bias (D,). kind is "rms", "rms1" (the weight is stored less 1) or
    "layer". Any float dtype; statistics in float32. Under autocast y comes in its dtype, as only
    products read it, while s keeps the residual stream's.
    """
    run = triton_norm if fused(x) else reference
    device = x.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return run(x, residual, weight, bias, eps, kind, torch.get_autocast_dtype(device))

    dtype = x.dtype
    if residual is not None:
        dtype = torch.promote_types(x.dtype, residual.dtype)
    return run(x, residual, weight, bias, eps, kind, dtype)
