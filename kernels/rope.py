"""Rotary position embedding of queries and keys, over the whole head or its front (Llama's half-split layout).

    y_i       = x_i cos_i - x_{i+r/2} sin_i          i < r/2, pairs (i, i + r/2) turn by position * theta^(-2i/r)
    y_{i+r/2} = x_{i+r/2} cos_i + x_i sin_i
    y_j       = x_j                                  j >= r: what the table does not reach passes

Backward is the rotation by the negative angle, so nothing but the table is kept: dx = rope(dy, cos, -sin).

T tokens, H query heads, K key heads, d head width, r <= d rotary width. Bytes moved: q and k in and out once,
2 T d (H + K) elements, in one launch, and the front half of the table (its halves are equal). float32 inside.

Su et al., RoFormer, 2021; the half-split layout is GPT-NeoX's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import Build, Case, Mutation, fused, randn, tl, triton


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotary = cos.size(-1)
    if rotary < x.size(-1):
        return torch.cat([_turn(x[..., :rotary], cos, sin), x[..., rotary:]], -1)
    left, right = x.chunk(2, -1)
    return (x * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (T, H, d), k (T, K, d), cos and sin (T, 1, r) float32 -> q and k, turned."""
    return _turn(q, cos, sin), _turn(k, cos, sin)


@triton.jit
def turn_heads(
    X, Y, cos, sin, heads, head_stride,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The heads of one token, HEADS at a time, from X to Y (heads side by side)."""
    at, rest = tl.arange(0, BLOCK)[None], 2 * HALF + tl.arange(0, REST)[None]
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        x, y = X + head.to(tl.int64) * head_stride, Y + head * D
        inside = (head < heads) & (at < HALF)
        left = tl.load(x + at, inside, 0.0).to(tl.float32)
        right = tl.load(x + HALF + at, inside, 0.0).to(tl.float32)
        tl.store(y + at, (left * cos - right * sin).to(Y.dtype.element_ty), inside)
        tl.store(y + HALF + at, (right * cos + left * sin).to(Y.dtype.element_ty), inside)
        if 2 * HALF < D:
            inside = (head < heads) & (rest < D)
            tl.store(y + rest, tl.load(x + rest, inside, 0.0), inside)


@triton.jit
def rope_kernel(
    Q, K, COS, SIN, YQ, YK, q_heads, k_heads, q_row, q_head, k_row, k_head, sign,
    D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token per program; q_row, q_head, k_row, k_head are distances in elements."""
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)[None]
    cos = tl.load(COS + token * 2 * HALF + at, at < HALF, 0.0).to(tl.float32)
    sin = tl.load(SIN + token * 2 * HALF + at, at < HALF, 0.0).to(tl.float32) * sign
    turn_heads(
        Q + token * q_row,
        YQ + token * q_heads * D,
        cos,
        sin,
        q_heads,
        q_head,
        D,
        HALF,
        BLOCK,
        REST,
        HEADS,
    )
    turn_heads(
        K + token * k_row,
        YK + token * k_heads * D,
        cos,
        sin,
        k_heads,
        k_head,
        D,
        HALF,
        BLOCK,
        REST,
        HEADS,
    )


def _sizes(width: int, rotary: int) -> dict:
    """Blocks by head width: HEADS so that a tile is 1024 pairs, 8 of them (two 16-byte loads) in each thread."""
    block = 1 << (rotary // 2 - 1).bit_length()
    return {"D": width, "HALF": rotary // 2, "BLOCK": block, "REST": 1 << max(0, width - rotary - 1).bit_length(),
            "HEADS": max(1, 1024 // max(32, block))}  # fmt: skip


@torch.library.custom_op("barellava::rope", mutates_args=())
def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """sign -1 turns back."""
    y = q.new_empty(q.shape), k.new_empty(k.shape)
    if len(q):
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        rope_kernel[(len(q),)](
            q, k, cos.contiguous(), sin.contiguous(), *y, q.size(1), k.size(1), *q.stride()[:2], *k.stride()[:2],
            sign, **_sizes(q.size(-1), cos.size(-1)),
        )  # fmt: skip
    return y


@_rope.register_fake
def _(q, k, cos, sin, sign):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx, inputs, output):
    *_, cos, sin, ctx.sign = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx, dq, dk):
    return *_rope(dq, dk, *ctx.saved_tensors, -ctx.sign), None, None, None


_rope.register_autograd(_gradients, setup_context=_save)


def triton_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rope(q, k, cos, sin, 1.0)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (T, H, d), k (T, K, d), cos and sin (T, 1, r) float32 with equal halves -> q and k turned by their positions.

    r < d turns the front of each head only. Gradients reach q and k, not the table.
    """
    return (triton_rope if fused(q) else reference)(q, k, cos, sin)


def _table(positions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    angle = positions[:, None, None].float() * 100.0 ** (
        -torch.arange(0, dim, 2, device=positions.device) / dim
    )
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def _case(
    name: str, tokens: int, heads: int, kv_heads: int, width: int, rotary: int, turned=lambda x: x
) -> Case:
    """The table is made in float32 inside, so that no dtype under test rounds it; `turned` changes the strides."""

    def on(function):
        return lambda q, k, positions: function(turned(q), turned(k), *_table(positions, rotary))

    def inputs(g):
        positions = torch.randint(0, 50, (tokens,), generator=g)
        return randn(g, tokens, heads, width), randn(g, tokens, kv_heads, width), positions

    return Case(name, on(triton_rope), on(reference), inputs, (0, 1))


CASES = [
    _case("full", 7, 4, 2, 16, 16),
    _case("one token", 1, 3, 1, 64, 64),
    _case("no token", 0, 3, 1, 16, 16),
    _case("partial", 17, 3, 3, 18, 8),
    _case("odd half", 5, 33, 2, 20, 14),
    _case("quarter, many heads", 3, 40, 40, 64, 16),
    _case("strided", 6, 6, 4, 16, 8, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
]

_T = (
    dict.fromkeys(("Q", "K", "YQ", "YK"), "*bf16")
    | dict.fromkeys(("COS", "SIN"), "*fp32")
    | {"sign": "fp32"}
)
_T |= dict.fromkeys(("q_row", "q_head", "k_row", "k_head"), "i32:16") | {
    "q_heads": "i32",
    "k_heads": "i32",
}
BUILDS = [
    Build(rope_kernel, _T, _sizes(*size))
    for size in ((64, 64), (64, 16), (80, 32), (96, 96), (128, 128), (256, 256))
]
MUTATIONS = [
    Mutation("-ctx.sign", "ctx.sign", "full"),
    Mutation("2 * HALF + tl.arange", "HALF + tl.arange", "partial"),
    Mutation('"HALF": rotary // 2', '"HALF": width // 2', "partial"),
    Mutation("left * cos - right * sin", "left * cos + right * sin", "one token"),
    Mutation("head.to(tl.int64) * head_stride", "head * D", "strided"),
]


if __name__ == "__main__":
    from bench.kernels import main

    main(["rope"])
