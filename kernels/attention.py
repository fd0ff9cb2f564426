"""Softmax attention: dense batches and packed rows of samples here, one new token against a cache in kernels/decode.py.

    s_ij = scale * q_i . k_j      p_ij = exp(s_ij - lse_i)      lse_i = log sum_j exp(s_ij)      o_i = sum_j p_ij v_j

over the keys j that i may see: j <= i where causal, j in the same sample where packed. Backward, from lse alone:

    delta_i = do_i . o_i                   ds_ij = p_ij * (do_i . v_j - delta_i)
    dq_i = scale * sum_j ds_ij k_j         dk_j = scale * sum_i ds_ij q_i         dv_j = sum_i p_ij do_i

T tokens, S samples, B batch, H query heads, K key-value heads (H a multiple of K), d head width.
scale is 1/sqrt(d) unless given, and positive. The softmax, lse and every sum are float32 in every dtype.

The scores stay on the chip, block by block. Bytes moved, forward: q, k, v in, o out, 2 T d (H + K) elements, where
separate operations also move T^2 H several times. Backward: a kernel over blocks of queries (delta, dq) and one over
blocks of keys (dk, dv), which sums the query heads of its key head itself. So scores are computed twice (on sm_90 three
times above d = 128: dk, then dv), but no sum depends on which program comes first: deterministic. Blocks that the
causal mask empties are never visited.
The pieces, and how a head of 80 columns is cut into 64 and 16, are in kernels/decode.py.

Dao et al., FlashAttention, 2022; Dao, FlashAttention-2, 2023.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Build, Case, Mutation, hopper, randn, tl, triton
from kernels.decode import (
    add,
    attention_decode,
    eligible,
    group,
    inner,
    load,
    rows,
    softmax,
    store,
    widths,
    zeros,
)

__all__ = ["attention", "attention_decode", "attention_packed"]


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped
    ).transpose(1, 2)


def reference_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None = None
) -> Tensor:
    tokens, samples = q.size(0), cu_seqlens.numel() - 1
    if samples == 1:
        return reference(q[None], k[None], v[None], True, scale)[0]
    lengths = cu_seqlens.diff()
    if not torch.compiler.is_compiling() and (q.is_cpu or samples * max_seqlen > 2 * tokens):
        # On a CPU, and for very unequal lengths, padding costs more than a loop, which only a trace cannot take.
        parts = [t.split(lengths.tolist()) for t in (q, k, v)]
        return torch.cat(
            [reference(*(t[None] for t in s), True, scale)[0] for s in zip(*parts, strict=True)]
        )
    # Pad on the right. Under a causal mask no real token sees the padding behind it, so no mask is needed.
    start = torch.arange(samples, device=q.device) * max_seqlen - cu_seqlens[:-1]
    slot = torch.arange(tokens, device=q.device) + start.repeat_interleave(
        lengths, output_size=tokens
    )

    def pad(t: Tensor) -> Tensor:
        rows = t.new_zeros(samples * max_seqlen, *t.shape[1:]).index_copy(0, slot, t)
        return rows.view(samples, max_seqlen, *t.shape[1:])

    return reference(pad(q), pad(k), pad(v), True, scale).flatten(0, 1).index_select(0, slot)


@triton.jit
def _place(CU, TQ, TK, heads, blocks, PACKED: tl.constexpr, REVERSE: tl.constexpr):
    """This program's block and head, where its sample begins and how long it is, as queries and as keys."""
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    block = (
        blocks - 1 - block if REVERSE else block
    )  # the longest work first: what starts last should be short
    sample, head = (rest // heads).to(tl.int64), (rest % heads).to(tl.int64)
    if PACKED:
        begin = tl.load(CU + sample).to(tl.int64)
        length = (tl.load(CU + sample + 1) - begin).to(tl.int32)
        return block, head, begin, begin, length, length
    else:
        return block, head, sample * TQ, sample * TK, TQ, TK


@triton.jit
def _seen(row, start, tk, CAUSAL: tl.constexpr, BN: tl.constexpr):
    key = start + tl.arange(0, BN)[None, :]
    return (key < tk) & (key <= row[:, None]) if CAUSAL else key < tk


@triton.jit(do_not_specialize=["T", "TQ", "TK", "blocks"])
def forward_kernel(
    Q, K, V, OUT, LSE, CU, qt, qh, kt, kh, vt, vh, T, TQ, TK, H, G, blocks, scale, PACKED: tl.constexpr,
    CAUSAL: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM queries of one head per program, over blocks of BN keys: first those that all of them see, then the edge.

    Masks cost as much as the softmax, so the loop is written out without and with them. It counts blocks: where ptxas
    sees that a loop is run but once, it waits for every matrix product of the kernel.
    """
    block, head, begin_q, begin_k, tq, tk = _place(CU, TQ, TK, H, blocks, PACKED, CAUSAL)
    first = block * BM
    if first >= tq:
        return
    K += begin_k * kt * D + head // G * kh * D
    V += begin_k * vt * D + head // G * vh * D
    q1, q2 = load(Q + begin_q * qt * D + head * qh * D, first, tq, qt * D, BM, D, D1, D2)
    row, c = (
        first + tl.arange(0, BM),
        scale * 1.4426950408889634,
    )  # the machine's exponential is of 2
    top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    o1, o2 = zeros(BM, D1, D2)
    end = tl.minimum(first + BM, tk) if CAUSAL else tk
    whole = (tl.minimum(first, tk) if CAUSAL else tk) // BN
    for edge in tl.static_range(2):
        for i in range(edge * whole, tl.cdiv(end, BN) if edge else whole):
            start = i * BN
            k1, k2 = load(K, start, tk, kt * D, BN, D, D1, D2, edge)
            s = inner(q1, q2, k1, k2, D2)
            if edge:
                s = tl.where(_seen(row, start, tk, CAUSAL, BN), s, float("-inf"))
            v1, v2 = load(V, start, tk, vt * D, BN, D, D1, D2, edge)
            top, total, o1, o2 = softmax(s, c, top, total, o1, o2, v1, v2, D2)
    total = tl.where(total > 0, total, 1.0)  # no key at all: the output is 0
    at = (begin_q * H + head) * D
    store(OUT + at, o1 / total[:, None], o2 / total[:, None], first, tq, H * D, BM, D, D1, D2)
    tl.store(LSE + head * T + begin_q + row, top * c + tl.log2(total), row < tq)


@triton.jit(do_not_specialize=["T", "TQ", "TK", "blocks"])
def query_kernel(
    Q, K, V, OUT, DO, LSE, PAIRS, DQ, CU, qt, qh, kt, kh, vt, vh, T, TQ, TK, H, G, blocks, scale, PACKED: tl.constexpr,
    CAUSAL: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq of BM queries of one head, in the order of the forward pass; and their pairs (lse, delta), side by side."""
    block, head, begin_q, begin_k, tq, tk = _place(CU, TQ, TK, H, blocks, PACKED, CAUSAL)
    first = block * BM
    if first >= tq:
        return
    K += begin_k * kt * D + head // G * kh * D
    V += begin_k * vt * D + head // G * vh * D
    at, per_row = (begin_q * H + head) * D, head * T + begin_q
    row, c = first + tl.arange(0, BM), scale * 1.4426950408889634
    o1, o2 = load(OUT + at, first, tq, H * D, BM, D, D1, D2)
    g1, g2 = load(DO + at, first, tq, H * D, BM, D, D1, D2)
    delta = tl.sum(o1.to(tl.float32) * g1.to(tl.float32), 1)
    if D2:
        delta += tl.sum(o2.to(tl.float32) * g2.to(tl.float32), 1)
    lse = tl.load(LSE + per_row + row, row < tq, float("inf"))
    pair = PAIRS + 2 * (per_row + row)[:, None] + tl.arange(0, 2)[None, :]
    tl.store(pair, tl.join(lse, delta), (row < tq)[:, None])
    q1, q2 = load(Q + begin_q * qt * D + head * qh * D, first, tq, qt * D, BM, D, D1, D2)
    dq1, dq2 = zeros(BM, D1, D2)
    end = tl.minimum(first + BM, tk) if CAUSAL else tk
    whole = (tl.minimum(first, tk) if CAUSAL else tk) // BN
    for edge in tl.static_range(2):
        for i in range(edge * whole, tl.cdiv(end, BN) if edge else whole):
            start = i * BN
            k1, k2 = load(K, start, tk, kt * D, BN, D, D1, D2, edge)
            p = tl.exp2(inner(q1, q2, k1, k2, D2) * c - lse[:, None])
            if edge:
                p = tl.where(_seen(row, start, tk, CAUSAL, BN), p, 0.0)
            v1, v2 = load(V, start, tk, vt * D, BN, D, D1, D2, edge)
            ds = p * (inner(g1, g2, v1, v2, D2) - delta[:, None])
            dq1, dq2 = add(dq1, dq2, ds, k1, k2, D2)
    store(DQ + at, dq1 * scale, dq2 * scale, first, tq, H * D, BM, D, D1, D2)


@triton.jit(do_not_specialize=["T", "TQ", "TK", "blocks"])
def key_kernel(
    Q, K, V, DO, PAIRS, DK, DV, CU, qt, qh, kt, kh, vt, vh, T, TQ, TK, H, G, blocks, scale, PACKED: tl.constexpr,
    CAUSAL: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk (if KEYS) and dv (if VALUES) of BN keys of one key head, over its G query heads and their blocks of queries:
    first blocks that see all the keys, then those at the diagonal and the last, partial one.

    p and ds are transposed, (BN, BM), to be left operands, which stay in registers. Queries beyond the end are
    zeros, do and delta too, and so add nothing; keys beyond the end are not stored."""
    block, head, begin_q, begin_k, tq, tk = _place(CU, TQ, TK, H // G, blocks, PACKED, False)
    first = block * BN
    if first >= tk:
        return
    k1, k2 = load(K + begin_k * kt * D + head * kh * D, first, tk, kt * D, BN, D, D1, D2)
    v1, v2 = k1, k2
    if KEYS:
        v1, v2 = load(V + begin_k * vt * D + head * vh * D, first, tk, vt * D, BN, D, D1, D2)
    c, row, key = scale * 1.4426950408889634, tl.arange(0, BM), first + tl.arange(0, BN)
    dk1, dk2 = zeros(BN, D1, D2)
    dv1, dv2 = zeros(BN, D1, D2)
    Q += begin_q * qt * D + head * G * qh * D
    DO += (begin_q * H + head * G) * D
    PAIRS += 2 * (head * G * T + begin_q)
    near = first // BM * BM if CAUSAL else 0  # no query before this one sees a key of the block
    diagonal = tl.cdiv(tl.maximum(tl.minimum(first + BN, tq) - near, 0), BM) if CAUSAL else 0
    whole = tl.maximum(tl.maximum(tq - near, 0) // BM - diagonal, 0)
    far, last = near + diagonal * BM, near + (diagonal + whole) * BM
    for edge in tl.static_range(2):
        count = diagonal + (last < tq) if edge else whole
        for i in range(count * G):  # one loop, so that loads run ahead from one head into the next
            h, start = (i // count).to(tl.int64), i % count * BM
            start = tl.where(start < diagonal * BM, near + start, last) if edge else far + start
            pair = PAIRS + 2 * (h * T + start) + 2 * row[:, None] + tl.arange(0, 2)[None, :]
            lse, delta = tl.split(
                tl.load(pair, (row < tq - start)[:, None], 0.0) if edge else tl.load(pair)
            )
            q1, q2 = load(Q + h * qh * D, start, tq, qt * D, BM, D, D1, D2, edge)
            p = tl.exp2(inner(k1, k2, q1, q2, D2) * c - lse[None, :])
            if edge and CAUSAL:
                p = tl.where(key[:, None] <= (start + row)[None, :], p, 0.0)
            g1, g2 = load(DO + h * D, start, tq, H * D, BM, D, D1, D2, edge)
            if VALUES:
                dv1, dv2 = add(dv1, dv2, p, g1, g2, D2)
            if KEYS:
                ds = p * (inner(v1, v2, g1, g2, D2) - delta[None, :])
                dk1, dk2 = add(dk1, dk2, ds, q1, q2, D2)
    at, stride = (begin_k * (H // G) + head) * D, H // G * D
    if KEYS:
        store(DK + at, dk1 * scale, dk2 * scale, first, tk, stride, BN, D, D1, D2)
    if VALUES:
        store(DV + at, dv1, dv2, first, tk, stride, BN, D, D1, D2)


# Queries, keys, warps and stages of loads under way, by kernel and the widest head they are for, such that all numbers
# stay in registers. On sm_90 a block is 128 rows by what fits there and in 227 KiB of shared memory: its matrix unit
# takes 64 rows of each 4 warps, and L2 is read once for all of them. The others fit in sm_89's 99 KiB.
_BLOCKS = {
    "forward": {128: (128, 64, 8, 2), 256: (32, 32, 4, 2)},
    "query": {128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
    "key": {80: (32, 128, 8, 2), 96: (16, 128, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2)},
}
_BLOCKS_90 = {
    "forward": {
        64: (128, 128, 8, 3),
        96: (128, 128, 8, 2),
        128: (128, 64, 8, 3),
        256: (128, 32, 8, 2),
    },
    "query": {96: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2)},
    "key": {80: (64, 128, 8, 3), 256: (32, 128, 8, 2)},
}


def _blocks(kernel: str, d: int, dtype: torch.dtype, sm90: bool) -> dict:
    sizes = next(b for width, b in (_BLOCKS_90 if sm90 else _BLOCKS)[kernel].items() if d <= width)
    if dtype == torch.float32:  # no matrix unit multiplies it exactly
        sizes = (16, 32, 4, 1) if d <= 96 else (16, 16, 8, 1)
    return dict(zip(("BM", "BN", "num_warps", "num_stages"), sizes, strict=True))


def _parts(d: int, sm90: bool) -> list[dict]:
    each = (
        ((True, False), (False, True)) if sm90 and d > 128 else ((True, True),)
    )  # both sums would not fit
    return [{"KEYS": keys, "VALUES": values} for keys, values in each]


def _launch(
    kernel, name: str, q, k, v, others, cu, samples, longest_q, longest_k, causal, scale, **flags
):
    """One program per block, head and sample, all in the first dimension (the others end at 65,535)."""
    (T, H, d), K = q.shape, k.size(1)
    sizes, heads = _blocks(name, d, q.dtype, hopper(q)), K if name == "key" else H
    blocks = -(-longest_k // sizes["BN"]) if name == "key" else -(-longest_q // sizes["BM"])
    if blocks * samples * heads:
        q, k, v = map(rows, (q, k, v))
        kernel[(blocks * samples * heads,)](
            q, k, v, *others, q if cu is None else cu, *(x.stride(i) // d for x in (q, k, v) for i in (0, 1)), T,
            longest_q, longest_k, H, group(H, K), blocks, d**-0.5 if scale is None else scale, PACKED=cu is not None,
            CAUSAL=causal, **widths(d), **sizes, **flags,
        )  # fmt: skip


@torch.library.custom_op("barellava::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor | None, samples: int, longest_q: int, longest_k: int, causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (T, H, d), k and v (keys, K, d); without cu all samples have the longest length -> o, lse (H, T) in base 2."""
    o, lse = q.new_empty(q.shape), q.new_empty(q.size(1), q.size(0), dtype=torch.float32)
    _launch(
        forward_kernel,
        "forward",
        q,
        k,
        v,
        (o, lse),
        cu,
        samples,
        longest_q,
        longest_k,
        causal,
        scale,
    )
    return o, lse


@_attention.register_fake
def _(q, k, v, *_):
    return q.new_empty(q.shape), q.new_empty(q.size(1), q.size(0), dtype=torch.float32)


@torch.library.custom_op("barellava::attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu: Tensor | None,
    samples: int, longest_q: int, longest_k: int, causal: bool, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (dq, dk, dv), pairs, do = (
        (x.new_empty(x.shape) for x in (q, k, v)),
        lse.new_empty(*lse.shape, 2),
        do.contiguous(),
    )
    rest = cu, samples, longest_q, longest_k, causal, scale
    _launch(query_kernel, "query", q, k, v, (o, do, lse, pairs, dq), *rest)
    for part in _parts(q.size(-1), hopper(q)):
        _launch(key_kernel, "key", q, k, v, (do, pairs, dk, dv), *rest, **part)
    return dq, dk, dv


@_attention_backward.register_fake
def _(do, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])
    ctx.rest = inputs[4:]


def _gradients(ctx, do, _):
    return *_attention_backward(do, *ctx.saved_tensors, *ctx.rest), *[None] * 6


_attention.register_autograd(_gradients, setup_context=_save)


def triton_attention(q, k, v, causal, scale=None):
    # Under autocast a norm with float32 weights widens q and k; v says what the products are to be in.
    packed = (x.flatten(0, 1).to(v.dtype) for x in (q, k, v))
    return _attention(*packed, None, len(q), q.size(1), k.size(1), causal, scale)[0].view(q.shape)


def triton_packed(q, k, v, cu_seqlens, max_seqlen, scale=None):
    q, k = q.to(v.dtype), k.to(v.dtype)
    return _attention(
        q, k, v, cu_seqlens, len(cu_seqlens) - 1, max_seqlen, max_seqlen, True, scale
    )[0]


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> Tensor:
    """Dense attention: q (B, T, H, d), k and v (B, M, K, d) -> (B, T, H, d); causal: query i sees keys 0 .. i."""
    return (triton_attention if eligible(q) else reference)(q, k, v, causal, scale)


def attention_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None = None
) -> Tensor:
    """Causal attention inside each sample of a packed row; no token sees another sample.

    q (T, H, d), k and v (T, K, d), cu_seqlens (S+1,) int32 with sample s at [cu_seqlens[s], cu_seqlens[s+1]),
    max_seqlen the longest sample -> (T, H, d).
    """
    return (triton_packed if eligible(q) else reference_packed)(
        q, k, v, cu_seqlens, max_seqlen, scale
    )


def _dense(
    name: str,
    B: int,
    T: int,
    M: int,
    H: int,
    K: int,
    d: int,
    causal: bool,
    scale: float | None = None,
) -> Case:
    def inputs(g):
        return randn(g, B, T, H, d), randn(g, B, M, K, d), randn(g, B, M, K, d), causal, scale

    return Case(name, triton_attention, reference, inputs, (0, 1, 2))


def _packed(name: str, lengths: tuple[int, ...], H: int, K: int, d: int) -> Case:
    def inputs(g):
        cu, T = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), sum(lengths)
        return randn(g, T, H, d), randn(g, T, K, d), randn(g, T, K, d), cu, max(lengths)

    return Case(name, triton_packed, reference_packed, inputs, (0, 1, 2))


CASES = [
    _dense("causal", 1, 129, 129, 2, 2, 64, True),
    _dense("not causal", 2, 129, 129, 1, 1, 72, False),
    _dense("one token", 2, 1, 1, 1, 1, 16, True)._replace(grads=(2,)),  # of q and k they are 0: no measure of an error
    _dense("no sample", 0, 5, 5, 2, 2, 16, False),
    _dense("no key", 1, 5, 0, 2, 1, 16, False),
    _dense("no query", 1, 0, 5, 2, 1, 16, False),
    _dense("few queries, grouped heads, scale", 2, 7, 129, 4, 1, 80, False, 0.2),
    _dense("more queries than keys", 1, 129, 7, 1, 1, 96, False),
    _dense("more queries than keys, causal", 1, 70, 40, 1, 1, 16, True),
    Case("views of one projection", lambda x: triton_attention(*x.unbind(2), True),
         lambda x: reference(*x.unbind(2), True), lambda g: (randn(g, 2, 40, 3, 2, 48),), (0,)),
    Case("heads with a gap", lambda x: triton_attention(*[x[..., :16]] * 3, True),
         lambda x: reference(*[x[..., :16]] * 3, True), lambda g: (randn(g, 2, 9, 2, 20),), (0,)),
    _packed("packed", (7, 129, 1), 2, 1, 128),
    _packed("packed, empty samples", (0, 5, 0, 1, 3, 0), 6, 2, 80),
    _packed("packed, no token", (0, 0), 2, 1, 16),
    _packed("packed, wide", (7, 66), 2, 1, 256),
]  # fmt: skip

_TYPES = (dict.fromkeys("Q K V OUT DO DQ DK DV".split(), "*bf16")
          | dict.fromkeys("qt kt vt T TQ TK H G blocks".split(), "i32")
          | {"LSE": "*fp32", "PAIRS": "*fp32", "CU": "*i32", "scale": "fp32"})  # fmt: skip


def _builds(d: int, packed: bool, grouped: bool, sm90: bool) -> list[Build]:
    ones = dict.fromkeys(
        ("qh kh vh" if grouped else "qh kh vh G").split(), 1
    )  # an argument of 1 is compiled in
    constants, targets = (
        {"PACKED": packed, "CAUSAL": packed} | ones | widths(d),
        (90,) if sm90 else (80, 89, 100),
    )
    kernels = [(forward_kernel, "forward", {}), (query_kernel, "query", {})]
    kernels += [(key_kernel, "key", part) for part in _parts(d, sm90)]
    each = [
        (kernel, part, *_blocks(name, d, torch.bfloat16, sm90).values())
        for kernel, name, part in kernels
    ]
    return [Build(kernel, _TYPES, constants | part | {"BM": bm, "BN": bn}, warps, stages, targets)
            for kernel, part, bm, bn, warps, stages in each]  # fmt: skip


BUILDS = [
    build
    for sm90 in (False, True)
    for shape in ((64, False, False), (64, True, False), (64, True, True), (72, False, False), (80, True, False),
                  (96, True, False), (128, True, False), (128, True, True), (256, True, True))
    for build in _builds(*shape, sm90)
]  # fmt: skip
MUTATIONS = [
    Mutation("(key <= row[:, None])", "(key <= row[:, None] + 1)", "causal"),
    Mutation("key[:, None] <= (start + row)", "key[:, None] < (start + row)", "causal"),
    Mutation("if CAUSAL else key < tk", "if CAUSAL else key > -1", "not causal"),
    Mutation("K += begin_k * kt", "K += 0 * kt", "packed, empty samples"),
    Mutation("(i // count)", "(i // count * 0)", "few queries, grouped heads, scale"),
    Mutation("dk1 * scale, dk2 * scale", "dk1, dk2", "packed, empty samples"),
    Mutation("dq1 * scale, dq2 * scale", "dq1 * scale, dq2", "packed, empty samples"),
    Mutation("diagonal + (last < tq)", "diagonal", "not causal"),
    Mutation(" - delta[None, :]", "", "packed, empty samples"),
    Mutation("delta += tl.sum(o2", "delta -= tl.sum(o2", "packed, empty samples"),
]


if __name__ == "__main__":
    from bench.kernels import main

    main(["attention"])
