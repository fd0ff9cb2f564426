"""Softmax attention of dense batches and of packed rows of samples, in the way of FlashAttention.

    s_ij = scale q_i . k_j             lse_i = log sum_j exp(s_ij)
    p_ij = exp(s_ij - lse_i)           o_i = sum_j p_ij v_j

over the keys j that query i may see: j <= i where causal, j in the same sample where packed, and
j > i - window where there is a window. The backward pass needs only lse of the softmax:

    delta_i = do_i . o_i               ds_ij = p_ij (do_i . v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j       dk_j = scale sum_i ds_ij q_i       dv_j = sum_i p_ij do_i

    B batch    T tokens (queries)    M keys    S samples    d head width
    H query heads    K key-value heads    G = H / K query heads that share a key head
    BM queries and BN keys of one block    D1 + D2 columns of a head, cut in two (kernels/tiles.py)

scale is 1/sqrt(d) unless given, and positive. The softmax, lse and every sum are float32 in every
dtype. lse is kept in base 2: the machine's exponential is 2^x, so scores are multiplied by
scale * log2(e) once and every exp below is an exp2.

The scores stay on the chip, block by block. Bytes moved, forward: q, k, v in, o out, that is 2 T d
(H + K) elements, where separate operations also move T^2 H several times. Backward: one kernel over
blocks of queries makes delta and dq, one over blocks of keys makes dk and dv and sums the query
heads of its key head itself. So the scores are computed twice (on sm_90 three times above d = 128:
dk, then dv), but no sum depends on which program comes first: gradients are deterministic. Blocks
that the causal mask or the window empties are never visited.

The file in order: references, `forward_kernel`, `query_kernel`, `key_kernel`, block sizes, launch,
the operation, and the public `attention` and `attention_packed`. One new token against a cache is
kernels/decode.py.

Dao et al., FlashAttention, 2022; Dao, FlashAttention-2, 2023; Beltagy et al., Longformer, 2020, for
windows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import divide_up, is_hopper, operation, tl, triton
from kernels.decode import attention_decode
from kernels.tiles import (
    dot_add,
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

__all__ = ["attention", "attention_decode", "attention_packed"]


# ------------------------------------------------------------------ plain torch


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Return attention of a dense batch: q (B, T, H, d), k and v (B, M, K, d) -> (B, T, H, d).

    A window is for causal attention of as many queries as keys.
    """
    q = q.transpose(1, 2)  # (B, H, T, d)
    k = k.transpose(1, 2)  # (B, K, M, d)
    v = v.transpose(1, 2)
    grouped = q.size(1) != k.size(1)

    mask = None
    if window is not None:
        mask = window_mask(q.size(2), k.size(2), window, q.device)
        causal = False  # the mask says it
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return o.transpose(1, 2)


def window_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Return which keys each query sees, (queries, keys): `window` of them, its own the last.

    The queries belong to the last keys.
    """
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    own = keys - queries  # the key of the first query
    return ones.tril(own).triu(own - window + 1)


def reference_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    window: int | None = None,
    causal: bool = True,
) -> Tensor:
    """Return attention inside each sample of a row; arguments as in `attention_packed`."""
    tokens = q.size(0)
    samples = cu_seqlens.numel() - 1
    if samples == 1:
        return reference(q[None], k[None], v[None], causal, scale, window)[0]

    # On a CPU, and for very unequal lengths, padding costs more than a loop over the samples. A
    # trace of torch.compile cannot loop: how many samples there are is not known to it. Without a
    # causal mask padding would need a mask of its own, so there is always a loop.
    lengths = cu_seqlens.diff()
    unequal = samples * max_seqlen > 2 * tokens
    if not causal or (not torch.compiler.is_compiling() and (q.is_cpu or unequal)):
        sizes = lengths.tolist()
        outputs = []
        for one_q, one_k, one_v in zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
            one = reference(one_q[None], one_k[None], one_v[None], causal, scale, window)
            outputs.append(one[0])
        return torch.cat(outputs)

    # Pad on the right. Under a causal mask no real token sees the padding behind it, so it needs no
    # mask of its own. `slot` is where each token of the row goes.
    shift = torch.arange(samples, device=q.device) * max_seqlen - cu_seqlens[:-1]
    shift_of_token = shift.repeat_interleave(lengths, output_size=tokens)
    slot = torch.arange(tokens, device=q.device) + shift_of_token

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(samples * max_seqlen, *x.shape[1:]).index_copy(0, slot, x)
        return padded.view(samples, max_seqlen, *x.shape[1:])

    o = reference(pad(q), pad(k), pad(v), True, scale, window)  # (S, longest, H, d)
    return o.flatten(0, 1).index_select(0, slot)


# ------------------------------------------------------------------ Triton: forward


@triton.jit
def find_place(CU, max_q, max_k, heads, blocks, PACKED: tl.constexpr, LONGEST_FIRST: tl.constexpr):
    """Return this program's block and head, and where its sample begins and how long it is.

    -> block, head, first query of the sample, its first key, its queries, its keys.
    Under a causal mask the last block has the most keys. It should start first: what starts last
    should be short, or the others wait for it.
    """
    block = tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    if LONGEST_FIRST:
        block = blocks - 1 - block
    sample = (rest // heads).to(tl.int64)
    head = (rest % heads).to(tl.int64)

    if PACKED:
        begin = tl.load(CU + sample).to(tl.int64)
        length = (tl.load(CU + sample + 1) - begin).to(tl.int32)
        return block, head, begin, begin, length, length
    else:
        return block, head, sample * max_q, sample * max_k, max_q, max_k


@triton.jit
def key_blocks(
    first, keys, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Return which blocks of BN keys the BM queries from `first` on see.

    -> begin, whole, edge, end: the blocks from `begin` on are partly before the windows of some
    queries, those from `whole` to `edge` are seen whole by all queries, and those from `edge` to
    `end` are at the diagonal, or the last.
    """
    # Causal: the last query sees keys up to its own, and the first query all keys before `first`.
    if CAUSAL:
        edge = tl.minimum(first, keys) // BN
        end = tl.cdiv(tl.minimum(first + BM, keys), BN)
    else:
        edge = keys // BN
        end = tl.cdiv(keys, BN)

    # The window of the first query begins first. That of the last one ends what is not seen whole.
    begin = 0
    whole = 0
    if WINDOW:
        begin = tl.maximum(first - WINDOW + 1, 0) // BN
        whole = tl.minimum(tl.cdiv(tl.maximum(first + BM - WINDOW, 0), BN), edge)
    return begin, whole, edge, end


@triton.jit
def visible(query, first_key, keys, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BN: tl.constexpr):
    """Return which of BN keys exist, (1, BN), and are seen by each query, (BM, BN) where causal."""
    key = first_key + tl.arange(0, BN)[None, :]
    if WINDOW:
        # Two comparisons with `key` itself would take registers that an sm_100 has not left.
        behind = query[:, None] - key
        return (key < keys) & (behind >= 0) & (behind < WINDOW)
    elif CAUSAL:
        return (key < keys) & (key <= query[:, None])
    else:
        return key < keys


@triton.jit(do_not_specialize=["T", "max_q", "max_k", "blocks"])
def forward_kernel(
    Q,  # (T, H, d)
    K,  # (keys, K, d)
    V,
    OUT,  # (T, H, d)
    LSE,  # (H, T) float32, in base 2
    CU,  # (S + 1,) int32 if PACKED: where samples begin
    q_token,  # from one token of Q to the next, in heads: times D, in numbers
    q_head,  # from one head of Q to the next, in heads
    k_token,
    k_head,
    v_token,
    v_head,
    T,
    max_q,  # queries of every sample, if not PACKED
    max_k,  # keys of every sample, if not PACKED
    H,
    G,
    blocks,  # of the longest sample
    scale,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,  # keys that a causal query sees; 0: all of them
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute o and lse of BM queries of one head, in a loop over blocks of BN keys.

    Masks cost as much as the softmax, so the loop is written twice: over the blocks that all the
    queries see whole, without masks, then over those at the edge (where windows begin, the
    diagonal, the last keys).
    Each loop counts blocks. Where it counted keys in steps of BN, ptxas could see that a loop runs
    only once, and would then wait for each matrix product of the kernel.
    """
    # Place: the block's first query, and the keys and values of its key head.
    block, head, begin_q, begin_k, queries, keys = find_place(
        CU, max_q, max_k, H, blocks, PACKED, CAUSAL
    )
    first = block * BM
    if first >= queries:
        return
    K += begin_k * k_token * D + head // G * k_head * D
    V += begin_k * v_token * D + head // G * v_head * D

    # Load the queries once; they stay on the chip.
    Q += begin_q * q_token * D + head * q_head * D
    q1, q2 = load_rows(Q, first, queries, q_token * D, BM, D, D1, D2)
    query = first + tl.arange(0, BM)
    scale_log2 = scale * 1.4426950408889634  # times log2(e)

    # The softmax so far, in float32. The largest score starts finite: in a block at the edge of the
    # windows a query may see nothing, and the difference of two infinities would be NaN.
    row_max = tl.full((BM,), -1e30, tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)
    acc1, acc2 = zero_rows(BM, D1, D2)

    begin, whole, edge, end = key_blocks(first, keys, CAUSAL, WINDOW, BM, BN)
    for EDGE in tl.static_range(2):
        if EDGE:
            # Of the two edges, the blocks before `whole` are counted down to `edge`.
            begin_block = edge - (whole - begin)
            end_block = end
        else:
            begin_block = whole
            end_block = edge

        for i in range(begin_block, end_block):
            start = i * BN
            if EDGE and WINDOW:
                start -= tl.where(i < edge, edge - whole, 0) * BN
            k1, k2 = load_rows(K, start, keys, k_token * D, BN, D, D1, D2, EDGE)
            s = dot_transposed(q1, q2, k1, k2, D2)  # (BM, BN)
            if EDGE:
                s = tl.where(visible(query, start, keys, CAUSAL, WINDOW, BN), s, float("-inf"))
            v1, v2 = load_rows(V, start, keys, v_token * D, BN, D, D1, D2, EDGE)
            row_max, row_sum, acc1, acc2 = online_softmax(
                s, scale_log2, row_max, row_sum, acc1, acc2, v1, v2, D2
            )

    # Divide by the sum; where there was no key at all, the output is 0.
    row_sum = tl.where(row_sum > 0, row_sum, 1.0)
    OUT += (begin_q * H + head) * D
    o1 = acc1 / row_sum[:, None]
    o2 = acc2 / row_sum[:, None]
    store_rows(OUT, o1, o2, first, queries, H * D, BM, D, D1, D2)
    at = LSE + head * T + begin_q + query
    lse = row_max * scale_log2 + tl.log2(row_sum)
    tl.store(at, lse, query < queries)


# ------------------------------------------------------------------ Triton: backward


@triton.jit(do_not_specialize=["T", "max_q", "max_k", "blocks"])
def query_kernel(
    Q,
    K,
    V,
    OUT,  # (T, H, d)
    DO,  # (T, H, d)
    LSE,  # (H, T)
    PAIRS,  # (H, T, 2), filled for key_kernel: lse and delta of a query, side by side
    DQ,  # (T, H, d)
    CU,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    T,
    max_q,
    max_k,
    H,
    G,
    blocks,
    scale,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute dq of BM queries of one head, over the keys in the order of the forward pass.

    The arguments without a comment are as in `forward_kernel`. The queries' pairs (lse, delta) are
    stored, too: `key_kernel` then loads both in one piece.
    """
    # Place, as in the forward pass.
    block, head, begin_q, begin_k, queries, keys = find_place(
        CU, max_q, max_k, H, blocks, PACKED, CAUSAL
    )
    first = block * BM
    if first >= queries:
        return
    K += begin_k * k_token * D + head // G * k_head * D
    V += begin_k * v_token * D + head // G * v_head * D
    rows = (begin_q * H + head) * D  # of the sample's first query, in OUT, DO and DQ
    number = head * T + begin_q  # of the sample's first query, in LSE and PAIRS
    query = first + tl.arange(0, BM)
    scale_log2 = scale * 1.4426950408889634  # times log2(e)

    # delta = do . o, in float32 from rounded outputs.
    o1, o2 = load_rows(OUT + rows, first, queries, H * D, BM, D, D1, D2)
    do1, do2 = load_rows(DO + rows, first, queries, H * D, BM, D, D1, D2)
    delta = tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)  # (BM,)
    if D2:
        delta += tl.sum(o2.to(tl.float32) * do2.to(tl.float32), 1)

    # A query that does not exist has lse = inf, so every p of its row is 0.
    lse = tl.load(LSE + number + query, query < queries, float("inf"))
    pair = PAIRS + 2 * (number + query)[:, None] + tl.arange(0, 2)[None, :]
    tl.store(pair, tl.join(lse, delta), (query < queries)[:, None])

    Q += begin_q * q_token * D + head * q_head * D
    q1, q2 = load_rows(Q, first, queries, q_token * D, BM, D, D1, D2)
    dq1, dq2 = zero_rows(BM, D1, D2)

    # The two loops of the forward pass: blocks that all queries see whole, then the edges.
    begin, whole, edge, end = key_blocks(first, keys, CAUSAL, WINDOW, BM, BN)
    for EDGE in tl.static_range(2):
        if EDGE:
            begin_block = edge - (whole - begin)
            end_block = end
        else:
            begin_block = whole
            end_block = edge

        for i in range(begin_block, end_block):
            start = i * BN
            if EDGE and WINDOW:
                start -= tl.where(i < edge, edge - whole, 0) * BN
            k1, k2 = load_rows(K, start, keys, k_token * D, BN, D, D1, D2, EDGE)
            p = tl.exp2(dot_transposed(q1, q2, k1, k2, D2) * scale_log2 - lse[:, None])  # (BM, BN)
            if EDGE:
                p = tl.where(visible(query, start, keys, CAUSAL, WINDOW, BN), p, 0.0)
            v1, v2 = load_rows(V, start, keys, v_token * D, BN, D, D1, D2, EDGE)
            ds = p * (dot_transposed(do1, do2, v1, v2, D2) - delta[:, None])
            dq1, dq2 = dot_add(dq1, dq2, ds, k1, k2, D2)

    store_rows(DQ + rows, dq1 * scale, dq2 * scale, first, queries, H * D, BM, D, D1, D2)


@triton.jit(do_not_specialize=["T", "max_q", "max_k", "blocks"])
def key_kernel(
    Q,
    K,
    V,
    DO,  # (T, H, d)
    PAIRS,  # (H, T, 2): lse and delta
    DK,  # (keys, K, d)
    DV,
    CU,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    T,
    max_q,
    max_k,
    H,
    G,
    blocks,
    scale,
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compute dk (if KEYS) and dv (if VALUES) of BN keys of one key head.

    It loops over the G query heads of the key head and the blocks of BM queries of each: first the
    blocks that see all the keys, without masks, then those at the edge: the diagonal, those whose
    windows have lost some of the keys, and the last, partial one. p and ds are transposed, (BN,
    BM), so that they are left operands of a matrix product: these may stay in registers, right ones
    must go to shared memory.

    Queries beyond the end need no mask: their q, do and delta are loaded as zeros, so they add
    nothing. Keys beyond the end are computed and not stored.
    """
    # Place: the block's first key. K and V are read once and stay on the chip.
    block, head, begin_q, begin_k, queries, keys = find_place(
        CU, max_q, max_k, H // G, blocks, PACKED, False
    )
    first = block * BN
    if first >= keys:
        return
    K += begin_k * k_token * D + head * k_head * D
    k1, k2 = load_rows(K, first, keys, k_token * D, BN, D, D1, D2)
    v1, v2 = k1, k2
    if KEYS:
        V += begin_k * v_token * D + head * v_head * D
        v1, v2 = load_rows(V, first, keys, v_token * D, BN, D, D1, D2)

    scale_log2 = scale * 1.4426950408889634  # times log2(e)
    row = tl.arange(0, BM)
    key = first + tl.arange(0, BN)
    dk1, dk2 = zero_rows(BN, D1, D2)
    dv1, dv2 = zero_rows(BN, D1, D2)

    # The first of the G query heads.
    Q += begin_q * q_token * D + head * G * q_head * D
    DO += (begin_q * H + head * G) * D
    PAIRS += 2 * (head * G * T + begin_q)

    # The queries in order. Causal: none before `near` sees a key of the block, and the `diagonal`
    # blocks from there on see some of them. From `far` on `whole` blocks see all keys, and the
    # `partial` blocks from `last` on see some, or have only some queries.
    if CAUSAL:
        near = first // BM * BM
        diagonal = tl.cdiv(tl.maximum(tl.minimum(first + BN, queries) - near, 0), BM)
    else:
        near = 0
        diagonal = 0
    if WINDOW:
        seen_whole = tl.minimum(first + WINDOW, queries)  # until the window loses the first key
        seen = tl.minimum(first + BN - 1 + WINDOW, queries)  # until it loses the last one
    else:
        seen_whole = queries
    whole = tl.maximum(tl.maximum(seen_whole - near, 0) // BM - diagonal, 0)
    far = near + diagonal * BM
    last = near + (diagonal + whole) * BM
    if WINDOW:
        partial = tl.cdiv(tl.maximum(seen - last, 0), BM)
    else:
        partial = tl.where(last < queries, 1, 0)

    for EDGE in tl.static_range(2):
        if EDGE:
            count = diagonal + partial
        else:
            count = whole

        # One loop over heads and blocks, so that loads run ahead from one head into the next.
        for i in range(count * G):
            h = (i // count).to(tl.int64)
            start = i % count * BM
            if EDGE:
                # Without a window one partial block needs no distance from `last`, nor registers.
                behind = last
                if WINDOW:
                    behind = start + last - diagonal * BM
                start = tl.where(start < diagonal * BM, near + start, behind)
            else:
                start = far + start

            pair = PAIRS + 2 * (h * T + start) + 2 * row[:, None] + tl.arange(0, 2)[None, :]
            if EDGE:
                lse, delta = tl.split(tl.load(pair, (row < queries - start)[:, None], 0.0))
            else:
                lse, delta = tl.split(tl.load(pair))

            q1, q2 = load_rows(Q + h * q_head * D, start, queries, q_token * D, BM, D, D1, D2, EDGE)
            p = tl.exp2(dot_transposed(k1, k2, q1, q2, D2) * scale_log2 - lse[None, :])  # (BN, BM)
            if EDGE and WINDOW:
                query = (start + row)[None, :]
                p = tl.where((key[:, None] <= query) & (key[:, None] > query - WINDOW), p, 0.0)
            elif EDGE and CAUSAL:
                p = tl.where(key[:, None] <= (start + row)[None, :], p, 0.0)

            do1, do2 = load_rows(DO + h * D, start, queries, H * D, BM, D, D1, D2, EDGE)
            if VALUES:
                dv1, dv2 = dot_add(dv1, dv2, p, do1, do2, D2)
            if KEYS:
                ds = p * (dot_transposed(v1, v2, do1, do2, D2) - delta[None, :])
                dk1, dk2 = dot_add(dk1, dk2, ds, q1, q2, D2)

    rows = (begin_k * (H // G) + head) * D
    stride = H // G * D
    if KEYS:
        store_rows(DK + rows, dk1 * scale, dk2 * scale, first, keys, stride, BN, D, D1, D2)
    if VALUES:
        store_rows(DV + rows, dv1, dv2, first, keys, stride, BN, D, D1, D2)


# ------------------------------------------------------------------ block sizes and launch


class Blocks(NamedTuple):
    """Queries and keys of a block, warps of a program, stages of loads under way at once."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


# By kernel, then by the widest head they are for. What limits them is registers: all numbers of a
# program must stay in them, and the compile test fails where one is spilled to memory. These fit in
# the 99 KiB of shared memory of an sm_89, and in those of sm_80 and sm_100.
BLOCKS = {
    "forward": {128: Blocks(128, 64, 8, 2), 256: Blocks(32, 32, 4, 2)},
    "query": {128: Blocks(128, 32, 8, 2), 256: Blocks(64, 32, 8, 1)},
    "key": {
        80: Blocks(32, 128, 8, 2),
        96: Blocks(16, 128, 8, 2),
        128: Blocks(64, 64, 8, 2),
        256: Blocks(32, 32, 8, 2),
    },
}

# On sm_90 a block is 128 rows by what fits in registers and in 227 KiB of shared memory: the matrix
# unit takes 64 rows from each 4 warps, and one read of L2 serves all of them.
BLOCKS_HOPPER = {
    "forward": {
        64: Blocks(128, 128, 8, 3),
        96: Blocks(128, 128, 8, 2),
        128: Blocks(128, 64, 8, 3),
        256: Blocks(128, 32, 8, 2),
    },
    "query": {96: Blocks(128, 64, 8, 3), 128: Blocks(128, 64, 8, 2), 256: Blocks(128, 32, 8, 2)},
    "key": {80: Blocks(64, 128, 8, 3), 256: Blocks(32, 128, 8, 2)},
}

# No matrix unit multiplies float32 exactly: the products take so many registers that blocks are
# small. Even so, the backward pass has up to 24 bytes of each thread in memory above d = 80, and
# 296 above d = 128. Train wide heads in bfloat16.
FLOAT32_NARROW = Blocks(16, 32, 4, 1)
FLOAT32_WIDE = Blocks(16, 16, 8, 1)


def choose_blocks(kernel: str, d: int, dtype: torch.dtype, hopper: bool) -> Blocks:
    """Return the block sizes of "forward", "query" or "key" for heads of d columns."""
    if dtype == torch.float32:
        return FLOAT32_NARROW if d <= 96 else FLOAT32_WIDE
    table = BLOCKS_HOPPER if hopper else BLOCKS
    for widest, blocks in table[kernel].items():
        if d <= widest:
            return blocks
    raise ValueError(f"no block holds a head of {d} columns")


def key_passes(d: int, hopper: bool) -> list[dict[str, bool]]:
    """Return what each launch of `key_kernel` computes: dk and dv together, or one after the other.

    In Hopper's large blocks both sums of a wide head would not fit in registers.
    """
    if hopper and d > 128:
        return [{"KEYS": True, "VALUES": False}, {"KEYS": False, "VALUES": True}]
    return [{"KEYS": True, "VALUES": True}]


class Layout(NamedTuple):
    """What all kernels of a call share beside the tensors. Without cu_seqlens samples are equal."""

    cu_seqlens: Tensor | None  # (S + 1,) int32
    samples: int
    max_q: int  # queries of the longest sample
    max_k: int  # keys of the longest sample
    causal: bool
    scale: float | None
    window: int | None


def _launch(
    kernel, name: str, q: Tensor, k: Tensor, v: Tensor, others: tuple, layout: Layout, **flags: bool
):
    """Run one program per block, head and sample; `others` are the tensors between V and CU.

    All of them are numbered in the grid's first dimension, as the other two end at 65,535.
    """
    T, H, d = q.shape
    K = k.size(1)
    sizes = choose_blocks(name, d, q.dtype, is_hopper(q))
    if name == "key":
        heads = K
        blocks = divide_up(layout.max_k, sizes.BN)
    else:
        heads = H
        blocks = divide_up(layout.max_q, sizes.BM)
    programs = blocks * layout.samples * heads
    if programs == 0:
        return

    # Distances between tokens and between heads, in heads.
    strides = []
    q, k, v = head_strided(q), head_strided(k), head_strided(v)
    for x in (q, k, v):
        strides += [x.stride(0) // d, x.stride(1) // d]

    packed = layout.cu_seqlens is not None
    kernel[(programs,)](
        q,
        k,
        v,
        *others,
        layout.cu_seqlens if packed else q,  # not read where samples are equal
        *strides,
        T,
        layout.max_q,
        layout.max_k,
        H,
        group_size(H, K),
        blocks,
        d**-0.5 if layout.scale is None else layout.scale,
        PACKED=packed,
        CAUSAL=layout.causal,
        WINDOW=layout.window or 0,
        **split_width(d),
        **sizes._asdict(),
        **flags,
    )


# ------------------------------------------------------------------ the operation and its gradient


@operation("barellava::attention")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor | None,
    samples: int,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """q (T, H, d), k and v (keys, K, d), all samples one behind another -> o, lse (H, T) in base 2.

    cu (S + 1,) says where samples begin; without it all of them have max_q queries and max_k keys.
    """
    layout = Layout(cu, samples, max_q, max_k, causal, scale, window)
    o = q.new_empty(q.shape)
    lse = q.new_empty(q.size(1), q.size(0), dtype=torch.float32)
    _launch(forward_kernel, "forward", q, k, v, (o, lse), layout)
    return o, lse


@_attention.register_fake
def _(q, k, v, *_):
    return q.new_empty(q.shape), q.new_empty(q.size(1), q.size(0), dtype=torch.float32)


@operation("barellava::attention_backward")
def _attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu: Tensor | None,
    samples: int,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv in the shapes of q, k and v."""
    layout = Layout(cu, samples, max_q, max_k, causal, scale, window)
    dq = q.new_empty(q.shape)
    dk = k.new_empty(k.shape)
    dv = v.new_empty(v.shape)
    pairs = lse.new_empty(*lse.shape, 2)
    do = do.contiguous()

    _launch(query_kernel, "query", q, k, v, (o, do, lse, pairs, dq), layout)
    for computed in key_passes(q.size(-1), is_hopper(q)):
        _launch(key_kernel, "key", q, k, v, (do, pairs, dk, dv), layout, **computed)
    return dq, dk, dv


@_attention_backward.register_fake
def _(do, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, cu, *ctx.numbers = inputs
    o, lse = output
    ctx.save_for_backward(q, k, v, o, lse, cu)


def _gradients(compute, ctx, do, _):
    dq, dk, dv = compute(do, *ctx.saved_tensors, *ctx.numbers)
    return dq, dk, dv, None, None, None, None, None, None, None


_attention.register_gradient(_save, _gradients, _attention_backward)


# ------------------------------------------------------------------ public


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None
) -> Tensor:
    """Return what `attention` does, by Triton on any device (the interpreter, on a CPU)."""
    # Under autocast a norm with float32 weights widens q and k. v's dtype is that of the products.
    o, _ = _attention(
        q.flatten(0, 1).to(v.dtype),
        k.flatten(0, 1).to(v.dtype),
        v.flatten(0, 1),
        None,
        len(q),
        q.size(1),
        k.size(1),
        causal,
        scale,
        None,
    )
    return o.view(q.shape)


def triton_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    window: int | None = None,
    causal: bool = True,
) -> Tensor:
    """Return what `attention_packed` does, by Triton on any device."""
    q = q.to(v.dtype)
    k = k.to(v.dtype)
    samples = len(cu_seqlens) - 1
    o, _ = _attention(q, k, v, cu_seqlens, samples, max_seqlen, max_seqlen, causal, scale, window)
    return o


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> Tensor:
    """Return dense attention: q (B, T, H, d), k and v (B, M, K, d) -> (B, T, H, d).

    Where causal, query i sees keys 0 .. i. H is a multiple of K. With gradients.
    """
    if fits_tiles(q):
        return triton_attention(q, k, v, causal, scale)
    return reference(q, k, v, causal, scale)


def attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    window: int | None = None,
    causal: bool = True,
) -> Tensor:
    """Return attention inside each sample of a packed row; no token sees another sample.

    q (T, H, d), k and v (T, K, d), cu_seqlens (S + 1,) int32 with sample s at [cu_seqlens[s],
    cu_seqlens[s + 1]), max_seqlen the longest sample -> (T, H, d). With a window, from 1 on, each
    query sees the last `window` keys only, its own included. Where not causal, each query sees all
    keys of its sample, and there is no window. With gradients.
    """
    if fits_tiles(q):
        return triton_packed(q, k, v, cu_seqlens, max_seqlen, scale, window, causal)
    return reference_packed(q, k, v, cu_seqlens, max_seqlen, scale, window, causal)
