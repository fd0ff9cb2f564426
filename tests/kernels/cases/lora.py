"""Adapters: one and several, with and without dropout, on plain and on quantized weights."""

from __future__ import annotations

import torch

from kernels import int8, lora, nf4
from tests.kernels.cases import Build, Case, Mutation, in_dtype, randn

_SCALES = [2.0, 0.5, 3.0]


def _make(form: str, weight: torch.Tensor):
    if form == "nf4":
        return nf4.quantize(weight.float())
    if form == "int8":
        return int8.quantize(weight)
    return weight


def _case(
    name: str,
    T: int,
    K: int,
    widths: tuple[int, ...],
    ranks: tuple[int, ...],
    p: float,
    form: str = "plain",
    bias: bool = False,
    train: bool = False,
) -> Case:
    """One adapter per width and rank; the weights have gradients if `train`.

    The arguments are seeds, x, then all weights, all A, all B and all biases.
    """
    G = len(widths)

    def inputs(g):
        args = [torch.randint(2**62, (G,), generator=g), randn(g, T, K)]
        for n in widths:
            args.append(randn(g, n, K, scale=K**-0.5))
        for r in ranks:
            args.append(randn(g, r, K, scale=K**-0.5))
        for n, r in zip(widths, ranks, strict=True):
            args.append(randn(g, n, r, scale=r**-0.5))
        if bias:
            for n in widths:
                args.append(randn(g, n))
        return tuple(args)

    def of(function):
        def call(seeds, x, *lists):
            weights = [_make(form, w) for w in lists[:G]]
            As = list(lists[G : 2 * G])
            Bs = list(lists[2 * G : 3 * G])
            biases = list(lists[3 * G :]) or [None] * G
            return function(x, weights, biases, As, Bs, _SCALES[:G], p, seeds)

        return call

    first_A = 2 + G
    grads = [1, *range(first_A, first_A + (3 if bias else 2) * G)]
    if train:
        grads += range(2, first_A)
    return Case(name, of(lora.triton_linears), of(lora.reference), inputs, tuple(sorted(grads)))


CASES = [
    _case("one adapter", 7, 40, (24,), (5,), 0.0),
    _case("one adapter, dropout", 129, 70, (24,), (5,), 0.25),
    _case("one token, rank 1, dropout", 1, 33, (17,), (1,), 0.25, bias=True),
    _case("no token, dropout", 0, 33, (17,), (4,), 0.25),
    _case("q, k, v", 7, 96, (96, 32, 32), (16, 16, 16), 0.0, bias=True),
    _case("q, k, v, dropout", 129, 96, (96, 32, 32), (16, 16, 16), 0.25, bias=True),
    _case("gate, up, trained, dropout", 33, 48, (50, 50), (64, 5), 0.25, bias=True, train=True),
    _case("gate, up, trained", 33, 48, (50, 50), (64, 5), 0.0, train=True),
    _case("rank 200, dropout", 9, 40, (24,), (200,), 0.25),
    _case("nf4, dropout", 9, 64, (40, 24), (16, 8), 0.25, "nf4", bias=True),
    _case("int8", 9, 65, (40,), (16,), 0.0, "int8"),
]

_COMMON = {
    "SEEDS": "*i64",
    "T": "i32",
    "K": "i32:16",
    "G": "i32",
    "threshold": "i32",
    "scale": "fp32",
}
_KERNELS = {
    "down": (lora.down_kernel, {"X": "*bf16", "A": "*bf16", "H": "*bf16"}),
    "gradient": (lora.gradient_kernel, {"X": "*bf16", "DH": "*bf16", "DA": "*fp32"}),
    "add": (lora.add_kernel, {"DH": "*bf16", "A": "*bf16", "DX": "*bf16"}),
}
BUILDS = []
for _rank in (128, 256):
    for _name, (_kernel, _types) in _KERNELS.items():
        _sizes = lora.tile_sizes(_name, _rank, torch.bfloat16)
        _build = Build(_kernel, _COMMON | _types, _sizes, lora.LAUNCH["num_warps"])
        BUILDS.append(_build)
        _sizes = lora.tile_sizes(_name, _rank, torch.float32)
        BUILDS.append(in_dtype(_build, "fp32")._replace(constants=_sizes, targets=(80, 90)))

MUTATIONS = [
    Mutation(
        "B.to(x.dtype).t(), alpha=s)\n    return [",
        "B.to(x.dtype).t())\n    return [",
        "one adapter",
    ),
    Mutation("each_h[:, g,", "each_h[:, 0,", "q, k, v"),
    Mutation(
        "load_dropped(X, SEEDS + g, start, K, k, T, threshold, BLOCK_T)\n        at",
        "load_dropped(X, SEEDS, start, K, k, T, threshold, BLOCK_T)\n        at",
        "q, k, v, dropout",
    ),
    Mutation(
        "tl.where(kept(SEEDS + g, start + t, k, K, threshold), one, 0.0)",
        "one",
        "one adapter, dropout",
    ),
    Mutation("beta=0, alpha=s)\n        dB", "beta=0)\n        dB", "one adapter"),
    Mutation("+ total * scale", "+ total", "one adapter, dropout"),
]
