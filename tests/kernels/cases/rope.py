"""Rope: whole and partial heads, odd halves, many heads, strides."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import rope
from tests.kernels.cases import Build, Case, Mutation, randn


def table(positions: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin (T, 1, dim) of these positions, with equal halves and theta = 100."""
    exponent = -torch.arange(0, dim, 2, device=positions.device) / dim
    angle = positions[:, None, None].float() * 100.0**exponent
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def _unchanged(x: Tensor) -> Tensor:
    return x


def _heads_first(x: Tensor) -> Tensor:
    """The same numbers with tokens side by side and heads far apart."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _case(
    name: str, tokens: int, heads: int, kv_heads: int, width: int, rotary: int, strided=_unchanged
) -> Case:
    """The table is made in float32 inside, so that no dtype under test rounds it."""

    def on(function):
        return lambda q, k, positions: function(strided(q), strided(k), *table(positions, rotary))

    def inputs(g):
        positions = torch.randint(0, 50, (tokens,), generator=g)
        return randn(g, tokens, heads, width), randn(g, tokens, kv_heads, width), positions

    return Case(name, on(rope.triton_rope), on(rope.reference), inputs, (0, 1))


CASES = [
    _case("full", 7, 4, 2, 16, 16),
    _case("one token", 1, 3, 1, 64, 64),
    _case("no token", 0, 3, 1, 16, 16),
    _case("partial", 17, 3, 3, 18, 8),
    _case("odd half", 5, 33, 2, 20, 14),
    _case("quarter, many heads", 3, 40, 40, 64, 16),
    _case("strided", 6, 6, 4, 16, 8, _heads_first),
]

_TYPES = {
    **dict.fromkeys(("Q", "K", "YQ", "YK"), "*bf16"),
    **dict.fromkeys(("COS", "SIN"), "*fp32"),
    **dict.fromkeys(("q_row", "q_head", "k_row", "k_head"), "i32:16"),
    **dict.fromkeys(("q_heads", "k_heads"), "i32"),
    "sign": "fp32",
}
_SIZES = [(64, 64), (64, 16), (80, 32), (96, 96), (128, 128), (256, 256)]
BUILDS = [Build(rope.rope_kernel, _TYPES, rope.block_sizes(*size)) for size in _SIZES]

MUTATIONS = [
    Mutation("-ctx.sign", "ctx.sign", "full"),
    Mutation("2 * HALF + tl.arange", "HALF + tl.arange", "partial"),
    Mutation('"HALF": rotary // 2', '"HALF": width // 2', "partial"),
    Mutation("left * cos - right * sin", "left * cos + right * sin", "one token"),
    Mutation("head.to(tl.int64) * head_stride", "head * D", "strided"),
]
