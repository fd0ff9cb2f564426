"""Rotary position embedding of queries and keys, over the whole head or its front.

The layout is Llama's half-split one. Pairs (i, i + r/2) turn by the angle position * theta^(-2i/r):

    y_i       = x_i cos_i - x_{i+r/2} sin_i          i < r/2
    y_{i+r/2} = x_{i+r/2} cos_i + x_i sin_i
    y_j       = x_j                                  j >= r: what the table does not reach passes

Backward is the rotation by the negative angle, so nothing but the table is kept:
dx = rope(dy, cos, -sin).

T tokens, H query heads, K key heads, d head width, r <= d rotary width. Bytes moved: q and k in and
out once, 2 T d (H + K) elements, in one launch, and the front half of the table, whose halves are
equal. The arithmetic is float32.

Su et al., RoFormer, 2021; the half-split layout is GPT-NeoX's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import fused, operation, power_of_two, tl, triton


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary = cos.size(-1)
    if rotary < x.size(-1):
        front = _turn(x[..., :rotary], cos, sin)
        return torch.cat([front, x[..., rotary:]], -1)
    left, right = x.chunk(2, -1)
    return (x * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k, turned: q (T, H, d), k (T, K, d), cos and sin (T, 1, r) float32."""
    return _turn(q, cos, sin), _turn(k, cos, sin)


@triton.jit
def turn_heads(
    X,
    Y,
    cos,  # (1, BLOCK)
    sin,
    heads,
    head_stride,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Turn the heads of one token, HEADS at a time, from X to Y, where heads lie side by side."""
    at = tl.arange(0, BLOCK)[None]
    rest = 2 * HALF + tl.arange(0, REST)[None]
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        x = X + head.to(tl.int64) * head_stride
        y = Y + head * D

        # The pairs.
        inside = (head < heads) & (at < HALF)
        left = tl.load(x + at, inside, 0.0).to(tl.float32)
        right = tl.load(x + HALF + at, inside, 0.0).to(tl.float32)
        tl.store(y + at, (left * cos - right * sin).to(Y.dtype.element_ty), inside)
        tl.store(y + HALF + at, (right * cos + left * sin).to(Y.dtype.element_ty), inside)

        # What the table does not reach is copied.
        if 2 * HALF < D:
            inside = (head < heads) & (rest < D)
            tl.store(y + rest, tl.load(x + rest, inside, 0.0), inside)


@triton.jit
def rope_kernel(
    Q,  # (T, H, d)
    K,  # (T, K, d)
    COS,  # (T, r)
    SIN,
    YQ,
    YK,
    q_heads,
    k_heads,
    q_row,
    q_head,
    k_row,
    k_head,
    sign,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Turn one token per program. q_row, q_head, k_row, k_head are distances in elements."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)[None]
    cos = tl.load(COS + token * 2 * HALF + at, at < HALF, 0.0).to(tl.float32)
    sin = tl.load(SIN + token * 2 * HALF + at, at < HALF, 0.0).to(tl.float32) * sign

    XQ = Q + token * q_row
    YQ += token * q_heads * D
    turn_heads(XQ, YQ, cos, sin, q_heads, q_head, D, HALF, BLOCK, REST, HEADS)
    XK = K + token * k_row
    YK += token * k_heads * D
    turn_heads(XK, YK, cos, sin, k_heads, k_head, D, HALF, BLOCK, REST, HEADS)


def block_sizes(width: int, rotary: int) -> dict[str, int]:
    """Return the constants of a head: a tile of HEADS heads is 1024 pairs.

    So each thread of 4 warps has 8 pairs, which are two 16-byte loads in half precision.
    """
    block = power_of_two(rotary // 2)
    return {
        "D": width,
        "HALF": rotary // 2,
        "BLOCK": block,
        "REST": power_of_two(max(1, width - rotary)),
        "HEADS": max(1, 1024 // max(32, block)),
    }


def _elements_in_order(x: Tensor) -> Tensor:
    """Tokens and heads may lie anywhere, the numbers of a head must be side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


@operation("barellava::rope")
def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """-> q and k, turned; sign -1 turns them back."""
    yq = q.new_empty(q.shape)
    yk = k.new_empty(k.shape)
    if len(q):
        q = _elements_in_order(q)
        k = _elements_in_order(k)
        rope_kernel[(len(q),)](
            q,
            k,
            cos.contiguous(),
            sin.contiguous(),
            yq,
            yk,
            q.size(1),
            k.size(1),
            *q.stride()[:2],
            *k.stride()[:2],
            sign,
            **block_sizes(q.size(-1), cos.size(-1)),
        )
    return yq, yk


@_rope.register_fake
def _(q, k, cos, sin, sign):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx, inputs, output):
    _, _, cos, sin, ctx.sign = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(compute, ctx, dq, dk):
    cos, sin = ctx.saved_tensors

    # What nothing used has no gradient: of it there are no heads to turn.
    no_dq = dq is None
    no_dk = dk is None
    if no_dq:
        dq = dk[:, :0]
    if no_dk:
        dk = dq[:, :0]

    dq, dk = compute(dq, dk, cos, sin, -ctx.sign)
    if no_dq:
        dq = None
    if no_dk:
        dk = None
    return dq, dk, None, None, None


_rope.register_gradient(_save, _gradients, _rope)


def triton_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `rope` does, by Triton on any device (the interpreter, on a CPU)."""
    return _rope(q, k, cos, sin, 1.0)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k turned by their positions.

    q (T, H, d), k (T, K, d), cos and sin (T, 1, r) float32 with equal halves. r < d turns the front
    of each head only. Gradients reach q and k, not the table.
    """
    if fused(q):
        return triton_rope(q, k, cos, sin)
    return reference(q, k, cos, sin)
