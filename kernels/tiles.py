"""Tiles: the pieces that attention.py and decode.py are made of.

A tile is some rows (queries or keys of one head) by the d columns of that head. Triton's tiles are
a power of two wide, a head need not be: SigLIP's has 72 columns and Phi-2's 80. One tile of 128
columns would cost a head of 80 as much as one of 128, so a head is cut into two tiles, of D1
columns and of the D2 that remain:

    d     D1 + D2
    64    64           D2 = 0: one tile is enough
    72    64 + 16      the last 8 columns are masked; a matrix unit multiplies 16 columns at least
    80    64 + 16
    96    64 + 32
    120   128          64 + 64 would cost as much as one tile

Every piece below therefore takes and returns pairs, x1 (rows, D1) and x2 (rows, D2). A product over
the width is the sum of two products. Where D2 is 0 the second of a pair is never computed with; it
is there because a function must return the same number of values in both cases.

`online_softmax` is the step of FlashAttention's loop over keys. The rest loads, stores and
multiplies.

Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import fused, power_of_two, tl, triton

MAX_HEAD = 256  # no program holds tiles of a wider head

# ------------------------------------------------------------------ load and store


@triton.jit
def load_rows(
    X,
    start,
    end,
    stride,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    EDGE: tl.constexpr = 1,
):
    """Rows start .. start + ROWS of a head at X, `stride` elements apart -> (ROWS, D1), (ROWS, D2).

    Rows from `end` on are zeros. Only the EDGE of a sequence has such rows; elsewhere no row is
    masked.
    """
    row = tl.arange(0, ROWS)[:, None]
    column1 = tl.arange(0, D1)[None, :]
    column2 = tl.arange(0, D2 if D2 else D1)[None, :]

    # The start may be far into the tensor, so it is 64 bits wide; the rows of a tile are near.
    X += tl.cast(start, tl.int64) * stride + row * stride
    inside = row < (end - start if EDGE else ROWS)

    # A mask of columns costs registers, so there is one only where columns are missing.
    X1 = X + column1
    inside1 = inside
    if D < D1:
        inside1 = inside & (column1 < D)
    x1 = tl.load(X1, inside1, 0.0)

    x2 = x1
    if D2:
        X2 = X + D1 + column2
        inside2 = inside
        if D < D1 + D2:
            inside2 = inside & (column2 < D - D1)
        x2 = tl.load(X2, inside2, 0.0)
    return x1, x2


@triton.jit
def store_rows(
    X,
    x1,
    x2,
    start,
    end,
    stride,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
):
    """Write the tiles to rows start .. start + ROWS of a head at X.

    Nothing is written beyond the rows (`end`) and the columns (D) that exist.

    Rows and masks are computed otherwise than in `load_rows`. If they were the same expressions,
    the compiler would keep the loads' results in registers all through the loop, to use them again
    here.
    """
    row = start + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, D1)[None, :]
    X += row.to(tl.int64) * stride
    tl.store(X + column, x1.to(X.dtype.element_ty), (row < end) & (column < D))
    if D2:
        column = D1 + tl.arange(0, D2)[None, :]
        tl.store(X + column, x2.to(X.dtype.element_ty), (row < end) & (column < D))


@triton.jit
def zero_rows(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Return a pair of zeros in float32, to sum into."""
    return tl.zeros((ROWS, D1), tl.float32), tl.zeros((ROWS, D2 if D2 else D1), tl.float32)


# ------------------------------------------------------------------ multiply


@triton.jit
def dot_transposed(a1, a2, b1, b2, D2: tl.constexpr):
    """a (M, d), b (N, d) -> a b^T (M, N) in float32: every row of a with every row of b.

    "ieee" keeps float32 inputs exact; the matrix unit would round them to 10 bits ("tf32").
    """
    s = tl.dot(a1, tl.trans(b1), input_precision="ieee")
    if D2:
        s = tl.dot(a2, tl.trans(b2), s, input_precision="ieee")
    return s


@triton.jit
def dot_add(c1, c2, p, b1, b2, D2: tl.constexpr):
    """c (M, d), p (M, N), b (N, d) -> c + p b. The matrix unit takes p in b's dtype."""
    c1 = tl.dot(p.to(b1.dtype), b1, c1, input_precision="ieee")
    if D2:
        c2 = tl.dot(p.to(b1.dtype), b2, c2, input_precision="ieee")
    return c1, c2


@triton.jit
def online_softmax(s, scale_log2, row_max, row_sum, acc1, acc2, v1, v2, D2: tl.constexpr):
    """Take one more block of keys into the softmax: scores s (M, N) and values v (N, d).

    row_max (M,) is the largest score so far, row_sum (M,) the sum of 2^(scale_log2 (s - row_max)),
    acc (M, d) the sum of the same times v. Where the largest score grows, what was summed before is
    scaled down to it, so no power of two is above 1 and none overflows. scale_log2 is scale *
    log2(e): it turns a power of e into one of 2.
    """
    new_max = tl.maximum(row_max, tl.max(s, 1))
    p = tl.exp2(s * scale_log2 - (new_max * scale_log2)[:, None])
    shrink = tl.exp2((row_max - new_max) * scale_log2)
    acc1, acc2 = dot_add(acc1 * shrink[:, None], acc2 * shrink[:, None], p, v1, v2, D2)
    return new_max, row_sum * shrink + tl.sum(p, 1), acc1, acc2


# ------------------------------------------------------------------ what a launch needs to know


def split_width(d: int) -> dict[str, int]:
    """Return how a head of d columns is cut, as the constants D, D1 and D2 of a kernel."""
    power = 1 << (d.bit_length() - 1)  # the largest power of two up to d
    first = max(16, power)
    if d <= first:
        return {"D": d, "D1": first, "D2": 0}

    rest = d - first
    second = max(16, power_of_two(rest))
    if second < first:
        return {"D": d, "D1": first, "D2": second}
    return {"D": d, "D1": 2 * first, "D2": 0}


def group_size(heads: int, kv_heads: int) -> int:
    """Return the query heads that share a key head. ValueError if they cannot share evenly."""
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not share {kv_heads} key-value heads evenly")
    return heads // kv_heads


def head_strided(x: Tensor) -> Tensor:
    """Return x (..., d) as the kernels address it, copied only where it has to be.

    Tokens and heads may lie anywhere, as they do in a view of a fused projection, but whole heads
    apart, and the numbers of a head side by side. Kernels count strides in heads: times d, they are
    multiples of d in elements, from which the compiler sees that wide loads are aligned.
    """
    in_order = x.stride(-1) == 1
    whole_heads_apart = all(stride % x.size(-1) == 0 for stride in x.stride()[:-1])
    if in_order and whole_heads_apart:
        return x
    return x.contiguous()


def fits_tiles(q: Tensor) -> bool:
    """Return whether Triton takes q (..., d): matrix units have no float64, tiles no wider head."""
    return fused(q) and q.dtype != torch.float64 and q.size(-1) <= MAX_HEAD
