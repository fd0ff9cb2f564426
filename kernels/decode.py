"""Attention of one new token per sequence to a cache of the tokens before it, and the pieces that all attention is of.

    s_j = scale * q . k_j      o = sum_j exp(s_j) v_j / sum_j exp(s_j)      over the filled slots j < length

B sequences, H query heads, K key-value heads (H a multiple of K), d head width, L slots of the cache. scale is
1/sqrt(d) unless given, and positive. Scores and sums are float32 in every dtype.

The sum runs over blocks of keys: the largest score so far is kept, and what was summed before it grew is scaled down
(`softmax`; Milakov and Gimelshein, Online normalizer calculation for softmax, 2018). One token has too few heads to
fill the machine, so each sequence is cut into parts of equal length, whose outputs are put together by their
log-sum-exp (Dao et al., Flash-Decoding, 2023). The G = H / K query heads of a key head are one program's rows.
Bytes moved: the filled part of the cache once, 2 length K d elements per sequence, however many heads share it.

A block is a power of two wide, a head need not be: 72 = 64 + 16 (half of it masked), 80 = 64 + 16, 96 = 64 + 32 are
two blocks of D1 and D2 columns with a product each, so 80 does not cost what 128 does. D2 is 0 where one is enough.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Build, Case, Mutation, fused, processors, randn, tl, triton


def reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    seen = torch.arange(k.size(2), device=q.device) < lengths[:, None]
    grouped, q, mask = q.size(1) != k.size(1), q[:, :, None], seen[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)[
        :, :, 0
    ]


@triton.jit
def load(
    P, start, end, stride, ROWS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    EDGE: tl.constexpr = 1,
):  # fmt: skip
    """Rows start .. start + ROWS of a head, as two blocks of columns; zeros from row `end` on, which only the EDGE
    of a sequence has."""
    row, one, two = (
        tl.arange(0, ROWS)[:, None],
        tl.arange(0, D1)[None, :],
        tl.arange(0, D2 if D2 else D1)[None, :],
    )
    P += tl.cast(start, tl.int64) * stride + row * stride
    inside = row < (end - start if EDGE else ROWS)
    x = tl.load(P + one, inside & (one < D) if D < D1 else inside, 0.0)
    y = tl.load(P + D1 + two, inside & (two < D - D1) if D < D1 + D2 else inside, 0.0) if D2 else x
    return x, y


@triton.jit
def store(
    P,
    x,
    y,
    start,
    end,
    stride,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
):
    # Not the words of `load`: the compiler would keep the loads' masks and rows in registers all through the loop.
    row, at = start + tl.arange(0, ROWS)[:, None], tl.arange(0, D1)[None, :]
    P += row.to(tl.int64) * stride
    tl.store(P + at, x.to(P.dtype.element_ty), (row < end) & (at < D))
    if D2:
        at = D1 + tl.arange(0, D2)[None, :]
        tl.store(P + at, y.to(P.dtype.element_ty), (row < end) & (at < D))


@triton.jit
def zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    return tl.zeros((ROWS, D1), tl.float32), tl.zeros((ROWS, D2 if D2 else D1), tl.float32)


@triton.jit
def inner(a1, a2, b1, b2, D2: tl.constexpr):
    """a b', every row of a with every row of b."""
    s = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if D2:
        s = tl.dot(a2, tl.trans(b2), s, input_precision="ieee")
    return s


@triton.jit
def add(c1, c2, p, b1, b2, D2: tl.constexpr):
    """c + p b."""
    c1 = tl.dot(p.to(b1.dtype), b1, c1, input_precision="ieee")
    if D2:
        c2 = tl.dot(p.to(b1.dtype), b2, c2, input_precision="ieee")
    return c1, c2


@triton.jit
def softmax(s, c, top, total, o1, o2, v1, v2, D2: tl.constexpr):
    """One more block of keys: the new largest score, sum and output of every row. c is scale * log2(e)."""
    new = tl.maximum(top, tl.max(s, 1))
    p, shrink = tl.exp2(s * c - (new * c)[:, None]), tl.exp2((top - new) * c)
    o1, o2 = add(o1 * shrink[:, None], o2 * shrink[:, None], p, v1, v2, D2)
    return new, total * shrink + tl.sum(p, 1), o1, o2


@triton.jit(do_not_specialize=["splits"])
def decode_kernel(
    Q, K, V, LENGTHS, PART, LSE, kb, kh, kt, vb, vh, vt, KH, G, splits, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One part of the filled keys of one sequence and key head, for its G query heads; a part may be empty."""
    split, rest = tl.program_id(0) % splits, (tl.program_id(0) // splits).to(tl.int64)
    length = tl.load(LENGTHS + rest // KH).to(tl.int32)
    part = tl.cdiv(tl.cdiv(length, splits), BN) * BN
    end = tl.minimum(split * part + part, length)
    K += rest // KH * kb + rest % KH * kh
    V += rest // KH * vb + rest % KH * vh
    q1, q2 = load(Q + rest * G * D, 0, G, D, BM, D, D1, D2)
    row, c = tl.arange(0, BM), scale * 1.4426950408889634
    top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    o1, o2 = zeros(BM, D1, D2)
    for start in range(split * part, end, BN):
        k1, k2 = load(K, start, end, kt, BN, D, D1, D2)
        s = tl.where(
            (start + tl.arange(0, BN) < end)[None, :], inner(q1, q2, k1, k2, D2), float("-inf")
        )
        v1, v2 = load(V, start, end, vt, BN, D, D1, D2)
        top, total, o1, o2 = softmax(s, c, top, total, o1, o2, v1, v2, D2)
    total, at = tl.where(total > 0, total, 1.0), rest * G * splits + split
    store(PART + at * D, o1 / total[:, None], o2 / total[:, None], 0, G, splits * D, BM, D, D1, D2)
    tl.store(LSE + at + row * splits, top * c + tl.log2(total), row < G)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    PART, LSE, OUT, splits, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr
):
    """One head's parts, each weighted by its share of the softmax's sum."""
    head, part = tl.program_id(0).to(tl.int64), tl.arange(0, BM)
    lse = tl.load(LSE + head * splits + part, part < splits, float("-inf"))
    share = tl.exp2(lse - tl.maximum(tl.max(lse, 0), -1e30))[
        :, None
    ]  # all are 0 where nothing is filled
    x, y = load(PART + head * splits * D, 0, splits, D, BM, D, D1, D2)
    x, y = tl.sum(x * share, 0)[None, :], tl.sum(y * share, 0)[None, :]
    total = tl.maximum(tl.sum(share, 0), 1e-30)[None, :]
    store(OUT + head * D, x / total, y / total, 0, 1, D, 1, D, D1, D2)


def widths(d: int) -> dict:
    """d as a power of two and the rest, each at least 16 (the least that a matrix unit multiplies), or as one block."""
    one = max(16, 1 << (d.bit_length() - 1))
    two = max(16, 1 << (d - one - 1).bit_length()) if d > one else 0
    return {"D": d, "D1": one, "D2": two} if two < one else {"D": d, "D1": 2 * one, "D2": 0}


def group(heads: int, kv_heads: int) -> int:
    """Query heads per key head."""
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not share {kv_heads} key-value heads evenly")
    return heads // kv_heads


def rows(x: Tensor) -> Tensor:
    """Tokens and heads may lie anywhere (a view of a fused projection), but whole heads apart, their numbers in order.

    Strides are then counted in heads: a multiple of d in numbers, which makes wide loads at every d.
    """
    return (
        x
        if x.stride(-1) == 1 and not any(s % x.size(-1) for s in x.stride()[:-1])
        else x.contiguous()
    )


def eligible(q: Tensor) -> bool:
    """Whether Triton runs: there is no matrix product in float64, and no block holds a wider head."""
    return fused(q) and q.dtype != torch.float64 and q.size(-1) <= 256


def _blocks(d: int, G: int) -> dict:
    """Rows of queries, at least the 16 that a matrix unit multiplies; keys, as many as fit twice in shared memory."""
    return {"BM": max(16, 1 << (G - 1).bit_length()), "BN": 64 if d <= 128 else 32}


@torch.library.custom_op("barellava::attention_decode", mutates_args=())
def _decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float | None) -> Tensor:
    (B, H, d), (K, L) = q.shape, k.shape[1:3]
    q, k, v, G, o = q.contiguous(), rows(k), rows(v), group(H, K), q.new_empty(q.shape)
    # Enough parts to fill the machine twice, but of 128 keys at least, and no more than combine_kernel holds at once.
    many = 2 * processors(q)
    splits = max(1, min(-(-many // max(1, B * K)), -(-L // 128), 32))
    part, lse = (q.new_empty(B, H, splits, n, dtype=torch.float32) for n in (d, 1))
    if B:
        decode_kernel[(B * K * splits,)](
            q, k, v, lengths, part, lse, *k.stride()[:3], *v.stride()[:3], K, G, splits,
            d**-0.5 if scale is None else scale, **widths(d), **_blocks(d, G), num_warps=4, num_stages=2,
        )  # fmt: skip
        combine_kernel[(B * H,)](
            part, lse, o, splits, **widths(d), BM=1 << (splits - 1).bit_length()
        )
    return o


_decode.register_fake(lambda q, *_: q.new_empty(q.shape))


def triton_decode(q, k, v, lengths, scale=None):
    return _decode(q, k, v, lengths, scale)


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """One query per sequence against a cache: q (B, H, d), k and v (B, K, L, d), lengths (B,) filled slots.

    -> (B, H, d). On a GPU it has no gradient. ValueError where H is no multiple of K.
    """
    return (triton_decode if eligible(q) else reference)(q, k, v, lengths, scale)


def _case(name: str, lengths: tuple[int, ...], H: int, K: int, d: int, L: int) -> Case:
    def inputs(g):
        B = len(lengths)
        return randn(g, B, H, d), randn(g, B, K, L, d), randn(g, B, K, L, d), torch.tensor(lengths)

    return Case(name, triton_decode, reference, inputs)


CASES = [
    _case("grouped heads", (1, 7, 129), 4, 1, 72, 160),
    _case("several parts", (129, 300, 520), 6, 2, 64, 520),
    _case("wide", (7, 65), 2, 2, 256, 70),
    _case("narrow, an empty sequence", (5, 0), 1, 1, 8, 5),
    _case("80 columns", (40,), 20, 1, 80, 40),
]

_TYPES = {"Q": "*bf16", "K": "*bf16", "V": "*bf16", "OUT": "*bf16", "LENGTHS": "*i64", "PART": "*fp32", "LSE": "*fp32",
          "KH": "i32", "G": "i32", "splits": "i32", "scale": "fp32"}  # fmt: skip
BUILDS = [
    build
    for d in (64, 128, 256)
    for build in (
        # The strides of a cache of 2048 slots: constants, because their being multiples of 16 makes wide loads.
        Build(decode_kernel, _TYPES, {"kb": 4096 * d, "kh": 2048 * d, "kt": d, "vb": 4096 * d, "vh": 2048 * d, "vt": d}
              | widths(d) | _blocks(d, 8)),
        Build(combine_kernel, _TYPES, widths(d) | {"BM": 32}),
    )
]  # fmt: skip
MUTATIONS = [
    Mutation("tl.minimum(split * part + part, length)", "split * part + part", "grouped heads"),
    Mutation(
        "s = tl.dot(a2, tl.trans(b2), s, input",
        "tl.dot(a2, tl.trans(b2), s, input",
        "grouped heads",
    ),
    Mutation(
        "c2 = tl.dot(p.to(b1.dtype), b2, c2, input",
        "tl.dot(p.to(b1.dtype), b2, c2, input",
        "80 columns",
    ),
    Mutation("scale * 1.4426950408889634", "1.4426950408889634", "narrow, an empty sequence"),
    Mutation("o1 * shrink[:, None]", "o1", "wide"),
    Mutation("x * share", "x / splits", "several parts"),
]


if __name__ == "__main__":
    from bench.kernels import main

    main(["decode"])
