"""Activations: SwiGLU and GeGLU for the language models, GELU in three kinds for the encoders.

    y = a(x) * u        gated (`glu`)
    y = a(x)            plain (`gelu`)

Every activation here is its input times a soft step, a(x) = x s(x), where s goes from 0 to 1. With
sigma the logistic function:

    silu         s = sigma(x)                                       s' = s (1 - s)
    quick_gelu   s = sigma(1.702 x)                                 s' = 1.702 s (1 - s)
    gelu_tanh    s = sigma(2 z), z = sqrt(2/pi) (x + 0.044715 x^3)  s' = 2 z' s (1 - s)
    gelu         s = (1 + erf(x / sqrt 2)) / 2                      s' = exp(-x^2 / 2) / sqrt(2 pi)

gelu_tanh is written with sigma because (1 + tanh z) / 2 = sigma(2 z). With t = exp(-|2 z|), which
is at most 1, s (1 - s) = t / (1 + t)^2 neither cancels nor overflows.

Backward:  dx = dy * u * (s + x s')      du = dy * a(x)      (u = 1 where plain)

a(x) is computed again in the backward pass, not stored. T rows, I width. Bytes moved, forward: x
and u in, y out, 3 T I elements (plain: 2 T I). Backward: dy, x, u in, dx, du out, 5 T I (plain: 3 T
I). The arithmetic is float32 in every dtype. x and u may be halves of one (T, 2I) projection:
anything may follow a row, and no copy is made.

Hendrycks and Gimpel, Gaussian Error Linear Units, 2016; Shazeer, GLU Variants Improve Transformer,
2020.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import divide_up, fused, operation, power_of_two, tl, triton

ACTIVATIONS = {
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


def reference(x: Tensor, up: Tensor | None, act: str) -> Tensor:
    """Return act(x) * up, or act(x) where up is None; x, up (..., I)."""
    y = ACTIVATIONS[act](x)
    return y if up is None else y * up


# ------------------------------------------------------------------ Triton


@triton.jit
def soft_step(x, ACT: tl.constexpr):
    """Return s(x) and its derivative."""
    if ACT == "gelu":
        s = 0.5 + 0.5 * tl.erf(0.7071067811865476 * x)
        return s, 0.3989422804014327 * tl.exp(-0.5 * x * x)

    # s = sigma(z2), and the slope is the derivative of z2. The numbers are 2 sqrt(2/pi), 3 *
    # 0.044715.
    if ACT == "gelu_tanh":
        z2 = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        slope = 1.702 if ACT == "quick_gelu" else 1.0
        z2 = slope * x
    t = tl.exp(-tl.abs(z2))
    c = 1.0 / (1.0 + t)
    return tl.where(z2 < 0, t * c, c), slope * t * c * c


@triton.jit
def forward_kernel(
    X,
    U,  # if GATED
    Y,
    width,
    x_row,
    u_row,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute BLOCK elements of one row per program; x_row, u_row: elements from row to row."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width

    x = tl.load(X + row * x_row + at, inside, 0.0).to(tl.float32)
    s, _ = soft_step(x, ACT)
    y = x * s
    if GATED:
        y *= tl.load(U + row * u_row + at, inside, 0.0).to(tl.float32)
    tl.store(Y + row * width + at, y.to(Y.dtype.element_ty), inside)


@triton.jit
def backward_kernel(
    DY,
    X,
    U,  # if GATED
    DX,
    DU,  # if GATED
    width,
    dy_row,
    x_row,
    u_row,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute dx and du of BLOCK elements of one row per program."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width

    dy = tl.load(DY + row * dy_row + at, inside, 0.0).to(tl.float32)
    x = tl.load(X + row * x_row + at, inside, 0.0).to(tl.float32)
    s, slope = soft_step(x, ACT)
    dx = dy * (s + x * slope)
    if GATED:
        dx *= tl.load(U + row * u_row + at, inside, 0.0).to(tl.float32)
        tl.store(DU + row * width + at, (dy * x * s).to(DU.dtype.element_ty), inside)
    tl.store(DX + row * width + at, dx.to(DX.dtype.element_ty), inside)


def _rows(x: Tensor) -> Tensor:
    """Return x as (T, I) with the numbers of a row side by side; a copy only where it must be."""
    x = x.reshape(-1, x.size(-1))
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(kernel, outputs: list[Tensor], inputs: list[Tensor], act: str, gated: bool):
    """Run a program per block of a row.

    The kernels are bound by memory: 8 elements a thread are a 16-byte load in half precision, and
    small programs leave room for many on a multiprocessor.
    """
    rows = [_rows(x) for x in inputs]
    width = inputs[0].size(-1)
    block = min(1024, max(32, power_of_two(width)))
    grid = (len(rows[0]) * divide_up(width, block),)
    kernel[grid](
        *rows,
        *outputs,
        width,
        *(x.stride(0) for x in rows),
        ACT=act,
        GATED=gated,
        BLOCK=block,
        num_warps=max(1, block // 256),
    )


# ------------------------------------------------------------------ the operation and its gradient


@operation("barellava::glu")
def _glu(x: Tensor, up: Tensor | None, act: str) -> Tensor:
    y = x.new_empty(x.shape)
    if y.numel():
        _launch(forward_kernel, [y], [x, x if up is None else up], act, up is not None)
    return y


@_glu.register_fake
def _(x, up, act):
    return x.new_empty(x.shape)


@operation("barellava::glu_backward")
def _glu_backward(dy: Tensor, x: Tensor, up: Tensor | None, act: str) -> tuple[Tensor, Tensor]:
    """-> dx, du (empty where plain)."""
    dx = x.new_empty(x.shape)
    du = x.new_empty(x.shape if up is not None else 0)
    if dx.numel():
        inputs = [dy, x, x if up is None else up]
        _launch(backward_kernel, [dx, du], inputs, act, up is not None)
    return dx, du


@_glu_backward.register_fake
def _(dy, x, up, act):
    return x.new_empty(x.shape), x.new_empty(x.shape if up is not None else 0)


def _save(ctx, inputs, output):
    x, up, ctx.act = inputs
    ctx.save_for_backward(x, up)


def _gradients(compute, ctx, dy):
    x, up = ctx.saved_tensors
    dx, du = compute(dy, x, up, ctx.act)
    return dx, None if up is None else du, None


_glu.register_gradient(_save, _gradients, _glu_backward)


# ------------------------------------------------------------------ public


def triton_glu(x: Tensor, up: Tensor | None, act: str) -> Tensor:
    """Return what `reference` does, by Triton on any device (the interpreter, on a CPU)."""
    return _glu(x, up, act)


def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """Return act(gate) * up; gate, up (..., I) of one dtype.

    act is "silu" (SwiGLU) or "gelu_tanh" (GeGLU).
    """
    if fused(gate):
        return triton_glu(gate, up, act)
    return reference(gate, up, act)


def gelu(x: Tensor, kind: str) -> Tensor:
    """Return act(x) of x (..., I); kind is "gelu_tanh", "quick_gelu" (CLIP) or "gelu" (erf)."""
    if fused(x):
        return triton_glu(x, None, kind)
    return reference(x, None, kind)
