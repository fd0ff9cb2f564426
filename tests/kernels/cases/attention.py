"""Attention: dense batches and packed rows, causal or not, every way to cut a head."""

from __future__ import annotations

import torch

from kernels import attention
from kernels.tiles import split_width
from tests.kernels.cases import Build, Case, Mutation, in_dtype, randn


def _dense(
    name: str, B: int, T: int, M: int, H: int, K: int, d: int, causal: bool, scale=None
) -> Case:
    """T queries of H heads and M keys of K heads, in a batch of B."""

    def inputs(g):
        q = randn(g, B, T, H, d)
        k = randn(g, B, M, K, d)
        v = randn(g, B, M, K, d)
        return q, k, v, causal, scale

    return Case(name, attention.triton_attention, attention.reference, inputs, (0, 1, 2))


def _packed(
    name: str,
    lengths: tuple[int, ...],
    H: int,
    K: int,
    d: int,
    window: int | None = None,
    causal: bool = True,
) -> Case:
    """Samples of these lengths in one row."""

    def inputs(g):
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        T = sum(lengths)
        q = randn(g, T, H, d)
        k = randn(g, T, K, d)
        v = randn(g, T, K, d)
        return q, k, v, cu_seqlens, max(lengths), None, window, causal

    return Case(name, attention.triton_packed, attention.reference_packed, inputs, (0, 1, 2))


def _of_one_projection(function):
    """q, k and v are views of one tensor (B, T, 3, H, d)."""
    return lambda x: function(*x.unbind(2), True)


def _with_gaps(function):
    """Heads are 16 of 20 columns: no whole heads apart, so a copy is needed."""
    return lambda x: function(x[..., :16], x[..., :16], x[..., :16], True)


CASES = [
    _dense("causal", 1, 129, 129, 2, 2, 64, True),
    _dense("not causal", 2, 129, 129, 1, 1, 72, False),
    # The gradients of q and k are 0 here: nothing to measure an error by.
    _dense("one token", 2, 1, 1, 1, 1, 16, True)._replace(grads=(2,)),
    _dense("no sample", 0, 5, 5, 2, 2, 16, False),
    _dense("no key", 1, 5, 0, 2, 1, 16, False),
    _dense("no query", 1, 0, 5, 2, 1, 16, False),
    _dense("few queries, grouped heads, scale", 2, 7, 129, 4, 1, 80, False, 0.2),
    _dense("more queries than keys", 1, 129, 7, 1, 1, 96, False),
    _dense("more queries than keys, causal", 1, 70, 40, 1, 1, 16, True),
    Case(
        "views of one projection",
        _of_one_projection(attention.triton_attention),
        _of_one_projection(attention.reference),
        lambda g: (randn(g, 2, 40, 3, 2, 48),),
        (0,),
    ),
    Case(
        "heads with a gap",
        _with_gaps(attention.triton_attention),
        _with_gaps(attention.reference),
        lambda g: (randn(g, 2, 9, 2, 20),),
        (0,),
    ),
    _packed("packed", (7, 129, 1), 2, 1, 128),
    _packed("packed, empty samples", (0, 5, 0, 1, 3, 0), 6, 2, 80),
    _packed("packed, no token", (0, 0), 2, 1, 16),
    _packed("packed, wide", (7, 66), 2, 1, 256),
    _packed("packed, not causal", (0, 7, 141, 1), 2, 1, 72, causal=False),
    # Windows smaller than a block, as large, and larger; the last one sees all of a sample.
    _packed("a window of one key", (5, 33, 1), 2, 1, 16, 1)._replace(grads=(2,)),
    _packed("a small window", (0, 13, 141, 1), 2, 1, 64, 7),
    _packed("a window of one block", (261, 3), 1, 1, 16, 128),
    _packed("a window of blocks and a bit", (17, 430), 1, 1, 16, 291),
    _packed("a window larger than a sample", (7, 129), 2, 1, 80, 129),
    _packed("a window, wide", (7, 70), 2, 1, 256, 21),
]

_TYPES = {
    **dict.fromkeys(("Q", "K", "V", "OUT", "DO", "DQ", "DK", "DV"), "*bf16"),
    **dict.fromkeys(("LSE", "PAIRS"), "*fp32"),
    "CU": "*i32",
    **dict.fromkeys(("q_token", "k_token", "v_token"), "i32"),
    **dict.fromkeys(("T", "max_q", "max_k", "H", "G", "blocks"), "i32"),
    "scale": "fp32",
}


def _builds(
    d: int,
    packed: bool,
    grouped: bool,
    window: int,
    hopper: bool,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool | None = None,
) -> list[Build]:
    """All kernels for a head of d columns; packed rows are causal, dense batches are encoders'.

    causal: for the packed rows of an encoder, False.
    """
    # Triton compiles an argument that is 1 in as a constant.
    ones = ["q_head", "k_head", "v_head"]
    if not grouped:
        ones.append("G")
    if causal is None:
        causal = packed
    constants = {"PACKED": packed, "CAUSAL": causal, "WINDOW": window}
    constants |= dict.fromkeys(ones, 1) | split_width(d)

    launches = [("forward", attention.forward_kernel, {}), ("query", attention.query_kernel, {})]
    for computed in attention.key_passes(d, hopper):
        launches.append(("key", attention.key_kernel, computed))

    builds = []
    for name, kernel, flags in launches:
        blocks = attention.choose_blocks(name, d, dtype, hopper)
        sizes = {"BM": blocks.BM, "BN": blocks.BN}
        builds.append(
            Build(
                kernel,
                _TYPES,
                constants | flags | sizes,
                blocks.num_warps,
                blocks.num_stages,
                (90,) if hopper else (80, 89, 100),
            )
        )
    return builds


# Head width, packed, grouped heads, window. The windows are Phi-3's, Mistral's and Gemma-3's.
_SHAPES = [
    (64, False, False, 0),
    (64, True, False, 0),
    (64, True, True, 0),
    (72, False, False, 0),
    (80, True, False, 0),
    (96, True, False, 0),
    (128, True, False, 0),
    (128, True, True, 0),
    (256, True, True, 0),
    (96, True, False, 2047),
    (128, True, True, 4096),
    (256, True, True, 512),
]
BUILDS = []
for _hopper in (False, True):
    for _shape in _SHAPES:
        BUILDS += _builds(*_shape, _hopper)
    # SigLIP2-NaFlex's: the base model's heads and the so400m's.
    for _d in (64, 72):
        BUILDS += _builds(_d, True, False, 0, _hopper, causal=False)

# In float32, with the bytes of a thread that kernels/attention.py says are in memory. An sm_90 has
# the same blocks; they are compiled for sm_80 only, as it takes a minute.
_SPILLS = {96: 8, 128: 24, 256: 296}
for _d, _window in ((64, 0), (96, 0), (128, 0), (256, 0), (64, 512), (256, 512)):
    for _build in _builds(_d, True, False, _window, False, torch.float32):
        _build = in_dtype(_build, "fp32")
        BUILDS.append(_build._replace(targets=(80,), spills=_SPILLS.get(_d, 0)))

_MIXED = "packed, not causal"
_SMALL = "a small window"
_BLOCKS = "a window of blocks and a bit"
MUTATIONS = [
    Mutation("(key <= query[:, None])", "(key <= query[:, None] + 1)", "causal"),
    Mutation("key[:, None] <= (start + row)", "key[:, None] < (start + row)", "causal"),
    Mutation("else:\n        return key < keys", "else:\n        return key > -1", "not causal"),
    Mutation("return block, head, begin, begin,", "return block, head, begin, 0,", _MIXED),
    Mutation("diagonal + partial", "diagonal", _MIXED),
    Mutation("K += begin_k * k_token", "K += 0 * k_token", "packed, empty samples"),
    Mutation("(i // count)", "(i // count * 0)", "few queries, grouped heads, scale"),
    Mutation("dk1 * scale, dk2 * scale", "dk1, dk2", "packed, empty samples"),
    Mutation("dq1 * scale, dq2 * scale", "dq1 * scale, dq2", "packed, empty samples"),
    Mutation("diagonal + partial", "diagonal", "not causal"),
    Mutation("(behind >= 0)", "(behind >= -1)", _SMALL),
    Mutation("(behind < WINDOW)", "(behind <= WINDOW)", _SMALL),
    Mutation("(key[:, None] > query - WINDOW)", "(key[:, None] >= query - WINDOW)", _SMALL),
    Mutation("tl.full((BM,), -1e30", 'tl.full((BM,), float("-inf")', _SMALL),
    Mutation("first + BM - WINDOW, 0), BN)", "first - WINDOW, 0), BN)", _BLOCKS),
    Mutation("tl.maximum(first - WINDOW + 1, 0)", "first", _BLOCKS),
    Mutation("start -= tl.where(i < edge", "start -= tl.where(i < begin", _BLOCKS),
    Mutation("tl.minimum(first + WINDOW, queries)", "queries", _BLOCKS),
    Mutation("first + BN - 1 + WINDOW, queries)", "first + WINDOW, queries)", _BLOCKS),
    Mutation("behind = start + last - diagonal * BM", "behind = last", _BLOCKS),
    Mutation(" - delta[None, :]", "", "packed, empty samples"),
    Mutation("delta += tl.sum(o2", "delta -= tl.sum(o2", "packed, empty samples"),
]
