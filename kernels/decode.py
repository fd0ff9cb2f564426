"""Attention of one new token per sequence to a cache of the tokens before it.

    s_j = scale q . k_j         o = sum_j exp(s_j) v_j / sum_j exp(s_j)

over the filled slots j < length.

    B sequences    H query heads    K key-value heads    G = H / K query heads that share a key head
    d head width    L slots of the cache    D1 + D2 columns of a head, cut in two (kernels/tiles.py)

scale is 1/sqrt(d) unless given, and positive. Scores and sums are float32 in every dtype.

One token has too few heads to fill the machine, so the keys of a sequence are cut into parts of
equal length (Dao et al., Flash-Decoding, 2023): `decode_kernel` computes the softmax and the output
of each part, and `combine_kernel` puts the parts together by their log-sum-exp. The G query heads
of a key head are the rows of one program. Bytes moved: the filled part of the cache once, that is 2
length K d elements per sequence, however many heads share it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import divide_up, multiprocessors, operation, power_of_two, tl, triton
from kernels.tiles import (
    dot_transposed,
    fits_tiles,
    group_size,
    head_strided,
    load_rows,
    online_softmax,
    split_width,
    store_rows,
    zero_rows,
)

LEAST_PART = 128  # keys: a shorter part is not worth a program
MOST_PARTS = 32  # what combine_kernel holds at once


def reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """Return the same as `attention_decode` in plain torch."""
    filled = torch.arange(k.size(2), device=q.device) < lengths[:, None]  # (B, L)
    grouped = q.size(1) != k.size(1)
    o = F.scaled_dot_product_attention(
        q[:, :, None], k, v, attn_mask=filled[:, None, None], scale=scale, enable_gqa=grouped
    )
    return o[:, :, 0]


@triton.jit(do_not_specialize=["splits"])
def decode_kernel(
    Q,  # (B, H, d)
    K,  # (B, K, L, d); distances between sequences, heads and slots: k_batch, k_head, k_slot
    V,
    LENGTHS,  # (B,)
    PART,  # (B, H, splits, d) float32: the output of each part
    LSE,  # (B, H, splits) float32, in base 2
    k_batch,
    k_head,
    k_slot,
    v_batch,
    v_head,
    v_slot,
    KH,
    G,
    splits,
    scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute one part of the filled keys of one sequence and key head, for its G query heads.

    KH is the number of key heads. A part may be empty: its output is 0 and its lse -inf.
    """
    # Place: the part's keys, a multiple of BN of them, and the key head of its sequence.
    split = tl.program_id(0) % splits
    head = (tl.program_id(0) // splits).to(tl.int64)  # of all key heads of all sequences
    length = tl.load(LENGTHS + head // KH).to(tl.int32)
    part = tl.cdiv(tl.cdiv(length, splits), BN) * BN
    end = tl.minimum(split * part + part, length)
    K += head // KH * k_batch + head % KH * k_head
    V += head // KH * v_batch + head % KH * v_head

    q1, q2 = load_rows(Q + head * G * D, 0, G, D, BM, D, D1, D2)
    row = tl.arange(0, BM)
    scale_log2 = scale * 1.4426950408889634  # times log2(e): the machine's exponential is of 2

    row_max = tl.full((BM,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)
    acc1, acc2 = zero_rows(BM, D1, D2)
    for start in range(split * part, end, BN):
        k1, k2 = load_rows(K, start, end, k_slot, BN, D, D1, D2)
        filled = (start + tl.arange(0, BN) < end)[None, :]
        s = tl.where(filled, dot_transposed(q1, q2, k1, k2, D2), float("-inf"))  # (BM, BN)
        v1, v2 = load_rows(V, start, end, v_slot, BN, D, D1, D2)
        row_max, row_sum, acc1, acc2 = online_softmax(
            s, scale_log2, row_max, row_sum, acc1, acc2, v1, v2, D2
        )

    row_sum = tl.where(row_sum > 0, row_sum, 1.0)  # an empty part: 0 / 1
    first = head * G * splits + split  # of the first query head's parts
    PART += first * D
    o1 = acc1 / row_sum[:, None]
    o2 = acc2 / row_sum[:, None]
    store_rows(PART, o1, o2, 0, G, splits * D, BM, D, D1, D2)
    at = LSE + first + row * splits
    lse = row_max * scale_log2 + tl.log2(row_sum)
    tl.store(at, lse, row < G)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    PART,
    LSE,
    OUT,  # (B, H, d)
    splits,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BM: tl.constexpr,
):
    """Sum the parts of one head, each weighted by its share of the softmax's sum."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BM)
    lse = tl.load(LSE + head * splits + part, part < splits, float("-inf"))

    # Relative to the largest, so that none overflows. The bounds of -1e30 and 1e-30 are for a
    # sequence in which nothing is filled: all shares are 0 there, and so is the output.
    largest = tl.maximum(tl.max(lse, 0), -1e30)
    share = tl.exp2(lse - largest)[:, None]
    x1, x2 = load_rows(PART + head * splits * D, 0, splits, D, BM, D, D1, D2)
    x1 = tl.sum(x1 * share, 0)[None, :]
    x2 = tl.sum(x2 * share, 0)[None, :]
    total = tl.maximum(tl.sum(share, 0), 1e-30)[None, :]
    store_rows(OUT + head * D, x1 / total, x2 / total, 0, 1, D, 1, D, D1, D2)


def choose_blocks(d: int, group: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the sizes of a block: BM query heads and BN keys.

    A matrix unit multiplies 16 rows at least. The keys are as many as fit twice in shared memory:
    while one block is multiplied the next is loaded. The products of float32 are not the matrix
    unit's and take registers.
    """
    keys = 64 if d <= 128 else 32
    if dtype == torch.float32 and d > 64:
        keys = 16
    return {"BM": max(16, power_of_two(group)), "BN": keys}


@operation("barellava::attention_decode")
def _decode(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float | None) -> Tensor:
    B, H, d = q.shape
    K, L = k.shape[1:3]
    G = group_size(H, K)
    q = q.contiguous()
    k = head_strided(k)
    v = head_strided(v)
    o = q.new_empty(q.shape)
    if B == 0:
        return o

    # Enough parts to fill the machine twice.
    wanted = divide_up(2 * multiprocessors(q), B * K)
    splits = max(1, min(wanted, divide_up(L, LEAST_PART), MOST_PARTS))
    part = q.new_empty(B, H, splits, d, dtype=torch.float32)
    lse = q.new_empty(B, H, splits, 1, dtype=torch.float32)

    decode_kernel[(B * K * splits,)](
        q,
        k,
        v,
        lengths,
        part,
        lse,
        *k.stride()[:3],
        *v.stride()[:3],
        K,
        G,
        splits,
        d**-0.5 if scale is None else scale,
        **split_width(d),
        **choose_blocks(d, G, q.dtype),
        num_warps=4,
        num_stages=2,
    )
    combine_kernel[(B * H,)](part, lse, o, splits, **split_width(d), BM=power_of_two(splits))
    return o


@_decode.register_fake
def _(q, *_):
    return q.new_empty(q.shape)


def triton_decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """Return what `attention_decode` does, by Triton on any device (the interpreter, on a CPU)."""
    return _decode(q, k, v, lengths, scale)


def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """Return attention of one query per sequence to the filled slots of a cache.

    q (B, H, d), k and v (B, K, L, d), lengths (B,) filled slots -> (B, H, d). On a GPU it has no
    gradient. ValueError where H is no multiple of K.
    """
    if fits_tiles(q):
        return triton_decode(q, k, v, lengths, scale)
    return reference(q, k, v, lengths, scale)
