"""Attention of one new token: unequal and empty caches, several parts, wide and narrow heads."""

from __future__ import annotations

import torch

from kernels import decode
from kernels.tiles import split_width
from tests.kernels.cases import Build, Case, Mutation, in_dtype, randn


def _case(name: str, lengths: tuple[int, ...], H: int, K: int, d: int, L: int) -> Case:
    """One sequence per length, H query heads and K key heads, a cache of L slots."""

    def inputs(g):
        B = len(lengths)
        q = randn(g, B, H, d)
        k = randn(g, B, K, L, d)
        v = randn(g, B, K, L, d)
        return q, k, v, torch.tensor(lengths)

    return Case(name, decode.triton_decode, decode.reference, inputs)


CASES = [
    _case("grouped heads", (1, 7, 129), 4, 1, 72, 160),
    _case("several parts", (129, 300, 520), 6, 2, 64, 520),
    _case("wide", (7, 65), 2, 2, 256, 70),
    _case("narrow, an empty sequence", (5, 0), 1, 1, 8, 5),
    _case("80 columns", (40,), 20, 1, 80, 40),
]

_TYPES = {
    **dict.fromkeys(("Q", "K", "V", "OUT"), "*bf16"),
    "LENGTHS": "*i64",
    **dict.fromkeys(("PART", "LSE"), "*fp32"),
    **dict.fromkeys(("KH", "G", "splits"), "i32"),
    "scale": "fp32",
}


def _builds(d: int, dtype: torch.dtype = torch.bfloat16) -> list[Build]:
    # The strides of a cache of 2048 slots and 2 heads are constants here: that they are multiples
    # of 16 makes wide loads.
    strides = {
        "k_batch": 4096 * d,
        "k_head": 2048 * d,
        "k_slot": d,
        "v_batch": 4096 * d,
        "v_head": 2048 * d,
        "v_slot": d,
    }
    width = split_width(d)
    return [
        Build(decode.decode_kernel, _TYPES, strides | width | decode.choose_blocks(d, 8, dtype)),
        Build(decode.combine_kernel, _TYPES, width | {"BM": 32}),
    ]


BUILDS = [*_builds(64), *_builds(128), *_builds(256)]
for _d in (128, 256):
    for _build in _builds(_d, torch.float32):
        BUILDS.append(in_dtype(_build, "fp32")._replace(targets=(80, 90)))

MUTATIONS = [
    Mutation("tl.minimum(split * part + part, length)", "split * part + part", "grouped heads"),
    Mutation(
        "s = tl.dot(a2, tl.trans(b2), s, input",
        "tl.dot(a2, tl.trans(b2), s, input",
        "grouped heads",
        file="tiles",
    ),
    Mutation(
        "c2 = tl.dot(p.to(b1.dtype), b2, c2, input",
        "tl.dot(p.to(b1.dtype), b2, c2, input",
        "80 columns",
        file="tiles",
    ),
    Mutation("scale * 1.4426950408889634", "1.4426950408889634", "narrow, an empty sequence"),
    Mutation("acc1 * shrink[:, None]", "acc1", "wide", file="tiles"),
    Mutation("x1 * share", "x1 / splits", "several parts"),
]
