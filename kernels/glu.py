"""Gated and plain activations: SwiGLU and GeGLU for the language models, GELU in three kinds for the encoders.

    y = a(x) * u        gated (glu);   y = a(x)        plain (gelu)          a(x) = x * s(x)

Every activation here is its input times a soft step s from 0 to 1; with sigma the logistic function:

    silu       s = sigma(x)                                           s' = s (1 - s)
    quick_gelu s = sigma(1.702 x)                                     s' = 1.702 s (1 - s)
    gelu_tanh  s = sigma(2 z), z = sqrt(2/pi) (x + 0.044715 x^3)      s' = 2 z' s (1 - s)
    gelu       s = (1 + erf(x / sqrt 2)) / 2                          s' = exp(-x^2 / 2) / sqrt(2 pi)

(1 + tanh z) / 2 = sigma(2 z), and s (1 - s) = t / (1 + t)^2 with t = exp(-|2 z|) neither cancels nor overflows.

Backward:  dx = dy * u * (s + x s')      du = dy * a(x)      (u = 1 where plain); a(x) is computed again, not stored.

T rows, I width. Bytes moved, forward: x and u in, y out, 3 T I elements (plain: 2 T I); backward: dy, x, u in, dx, du
out, 5 T I (plain: 3 T I). Arithmetic is float32 in every dtype. x and u may be halves of one (T, 2I) projection: a row
may be followed by anything, no copy is made.

Hendrycks and Gimpel, Gaussian Error Linear Units, 2016; Shazeer, GLU Variants Improve Transformer, 2020.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Build, Case, Mutation, fused, randn, tl, triton

ACTIVATIONS = {
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


def reference(x: Tensor, up: Tensor | None, act: str) -> Tensor:
    """x, up (..., I) -> act(x) * up, or act(x) where up is None."""
    y = ACTIVATIONS[act](x)
    return y if up is None else y * up


@triton.jit
def soft_step(x, ACT: tl.constexpr):
    """s(x) and its derivative."""
    if ACT == "gelu":
        return 0.5 + 0.5 * tl.erf(0.7071067811865476 * x), 0.3989422804014327 * tl.exp(-0.5 * x * x)
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
    X, U, Y, width, x_row, u_row, ACT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK elements of one row per program; x_row and u_row are the distances between rows, in elements."""
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
    U,
    DX,
    DU,
    width,
    dy_row,
    x_row,
    u_row,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
    """As (T, I) with neighbours side by side in a row; a copy only of what cannot be seen so."""
    x = x.reshape(-1, x.size(-1))
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(kernel, outputs: list[Tensor], inputs: list[Tensor], width: int, act: str, gated: bool):
    """A memory-bound kernel: 8 elements a thread are 16-byte loads in half precision, with many programs per SM."""
    inputs = [_rows(x) for x in inputs]
    block = min(1024, max(32, 1 << (width - 1).bit_length()))
    grid = (len(inputs[0]) * -(-width // block),)
    kernel[grid](*inputs, *outputs, width, *(x.stride(0) for x in inputs), ACT=act, GATED=gated, BLOCK=block,
                 num_warps=max(1, block // 256))  # fmt: skip


@torch.library.custom_op("barellava::glu", mutates_args=())
def _glu(x: Tensor, up: Tensor | None, act: str) -> Tensor:
    y = x.new_empty(x.shape)
    if y.numel():
        _launch(forward_kernel, [y], [x, x if up is None else up], x.size(-1), act, up is not None)
    return y


@_glu.register_fake
def _(x, up, act):
    return x.new_empty(x.shape)


@torch.library.custom_op("barellava::glu_backward", mutates_args=())
def _glu_backward(dy: Tensor, x: Tensor, up: Tensor | None, act: str) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    du = x.new_empty(x.shape if up is not None else 0)
    if dx.numel():
        inputs = [dy, x, x if up is None else up]
        _launch(backward_kernel, [dx, du], inputs, x.size(-1), act, up is not None)
    return dx, du


@_glu_backward.register_fake
def _(dy, x, up, act):
    return x.new_empty(x.shape), x.new_empty(x.shape if up is not None else 0)


def _save(ctx, inputs, output):
    x, up, ctx.act = inputs
    ctx.save_for_backward(x, up)


def _gradients(ctx, dy):
    x, up = ctx.saved_tensors
    dx, du = _glu_backward(dy, x, up, ctx.act)
    return dx, None if up is None else du, None


_glu.register_autograd(_gradients, setup_context=_save)


def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """gate, up (..., I) of one dtype -> act(gate) * up; act is "silu" (SwiGLU) or "gelu_tanh" (GeGLU)."""
    return (_glu if fused(gate) else reference)(gate, up, act)


def gelu(x: Tensor, kind: str) -> Tensor:
    """x (..., I) -> the same shape; kind is "gelu_tanh", "quick_gelu" (CLIP) or "gelu" (with erf)."""
    return (_glu if fused(x) else reference)(x, None, kind)


def _case(
    name: str, shape: tuple[int, ...], act: str, gated: bool = True, scale: float = 2.0
) -> Case:
    def inputs(g):
        return randn(g, *shape, scale=scale), randn(g, *shape) if gated else None, act

    return Case(name, _glu, reference, inputs, (0, 1) if gated else (0,))


def _halves(function):
    """Both arguments as views of one projection; its gradient is theirs side by side."""
    return lambda both, act: function(*both.chunk(2, -1), act)


CASES = [
    _case("silu", (7, 96), "silu"),
    _case("silu, one token", (1, 1), "silu"),
    _case("silu, no token", (0, 16), "silu"),
    _case("silu, several blocks", (3, 2055), "silu"),
    _case("gelu_tanh gated", (129, 33), "gelu_tanh"),
    _case("gelu_tanh, tails", (2, 3, 70), "gelu_tanh", gated=False, scale=12.0),
    _case("gelu_tanh plain", (7, 5, 18), "gelu_tanh", gated=False),
    _case("quick_gelu plain", (5, 80), "quick_gelu", gated=False),
    _case("gelu plain", (129, 7), "gelu", gated=False),
    Case(
        "one projection",
        _halves(_glu),
        _halves(reference),
        lambda g: (randn(g, 5, 2 * 37), "silu"),
        (0,),
    ),
]

_F = {
    "X": "*bf16",
    "U": "*bf16",
    "Y": "*bf16",
    "width": "i32:16",
    "x_row": "i32:16",
    "u_row": "i32:16",
}
_B = {"DY": "*bf16", "X": "*bf16", "U": "*bf16", "DX": "*bf16", "DU": "*bf16", "width": "i32:16",
      "dy_row": "i32:16", "x_row": "i32:16", "u_row": "i32:16"}  # fmt: skip
_GATED, _PLAIN = (
    (("silu", True), ("gelu_tanh", True)),
    (("gelu_tanh", False), ("quick_gelu", False), ("gelu", False)),
)
BUILDS = [
    Build(kernel, types, {"ACT": act, "GATED": gated, "BLOCK": 1024})
    for kernel, types in ((forward_kernel, _F), (backward_kernel, _B))
    for act, gated in (*_GATED, *_PLAIN)
]
MUTATIONS = [
    Mutation("slope * t * c * c", "slope * t * c", "silu"),
    Mutation("1.702 if", "1.0 if", "quick_gelu plain"),
    Mutation("(1.0 + 0.134145 * x * x)", "(1.0 + 0.044715 * x * x)", "gelu_tanh plain"),
    Mutation(
        "0.3989422804014327 * tl.exp(-0.5 * x * x)",
        "0.3989422804014327 * tl.exp(-x * x)",
        "gelu plain",
    ),
    Mutation("tl.load(U + row * u_row + at", "tl.load(U + row * width + at", "one projection"),
    Mutation("(dy * x * s).to", "(dy * s).to", "gelu_tanh gated"),
]


if __name__ == "__main__":
    from bench.kernels import main

    main(["glu"])
