"""The head and its loss: one and several chunks, with bias, few supervised rows, a tied weight."""

from __future__ import annotations

import torch

from kernels import cross_entropy
from kernels.cross_entropy import CHUNK, IGNORE
from tests.kernels.cases import Build, Case, Mutation, randn


def _case(
    name: str,
    tokens: int,
    D: int,
    V: int,
    masked: float = 0.4,
    bias: bool = False,
    chunk: int = CHUNK,
    scale: float = 1.0,
    kernel: bool = True,
) -> Case:
    """`masked` of the targets are unsupervised, never the first; 1.0 leaves that one, 2.0 none."""

    def inputs(g):
        targets = torch.randint(0, V, (tokens,), generator=g)
        off = torch.rand(tokens, generator=g) < masked
        off[:1] = masked > 1
        hidden = randn(g, tokens, D)
        weight = randn(g, V, D, scale=scale)
        offset = randn(g, V) if bias else None
        return hidden, weight, offset, targets.masked_fill(off, IGNORE)

    def fused(hidden, weight, offset, targets):
        return cross_entropy.chunked(hidden, weight, offset, targets, chunk, kernel)

    grads = (0, 1, 2) if bias else (0, 1)
    return Case(name, fused, cross_entropy.reference, inputs, grads)


def _tied(function):
    """The embeddings of the targets are the hidden states: one tensor, both gradients."""
    return lambda weight, targets: function(weight[targets.clamp(min=0)], weight, None, targets)


def _tied_inputs(g):
    weight = randn(g, 61, 24)
    targets = torch.randint(0, 61, (9,), generator=g)
    return weight, targets.index_fill(0, torch.tensor([2]), IGNORE)


def _one_chunk(*args):
    return cross_entropy.chunked(*args, CHUNK, True)


CASES = [
    _case("one row", 1, 24, 50, 0.0),
    _case("seven rows, bias", 7, 40, 130, bias=True),
    _case("129 rows", 129, 16, 67),
    _case("chunks", 129, 16, 67, chunk=4 * 67 * 20),
    _case("chunks, bias", 33, 16, 5003, bias=True, chunk=4 * 5003 * 7),
    _case("large logits", 9, 64, 4500, scale=12.0),
    _case("300k vocabulary", 3, 8, 300_007, 0.0),
    _case("one supervised", 30, 8, 33, 1.0, bias=True),
    _case("none supervised", 30, 8, 33, 2.0, bias=True),
    _case("no token", 0, 8, 33),
    _case("on the CPU", 33, 16, 503, bias=True, chunk=4 * 503 * 7, kernel=False),
    Case("tied", _tied(_one_chunk), _tied(cross_entropy.reference), _tied_inputs, (0,)),
]

_TYPES = {
    "Z": "*bf16",
    "B": "*bf16",
    "TARGETS": "*i64",
    "LOSSES": "*fp32",
    "V": "i32",
    "z_row": "i32:16",
}
BUILDS = [
    Build(cross_entropy.rows_kernel, _TYPES, {"BIAS": bias, "GRADIENT": gradient, "BLOCK": 4096}, 8)
    for bias in (False, True)
    for gradient in (False, True)
]

MUTATIONS = [
    Mutation("- tl.where(at == target, 1.0, 0.0)", "", "129 rows"),
    Mutation("tl.sum(tl.exp(z - new), 0)", "tl.sum(tl.exp(z), 0)", "large logits"),
    Mutation("total * tl.exp(largest - new)", "total", "300k vocabulary"),
    Mutation('tl.where(at < V, z, float("-inf"))', "z", "one row"),
    Mutation("dh[at[part]]", "dh[at[part] - 1]", "one supervised"),
    Mutation("h = hidden[at]", "h = hidden[at - 1]", "129 rows"),
    Mutation("first=start == 0)", "first=True)", "chunks"),
    Mutation(
        "picked += tl.load(B + target)", "picked += 0 * tl.load(B + target)", "seven rows, bias"
    ),
    Mutation("gradient * dloss", "gradient", "129 rows"),
    Mutation("z if bias is None else z + bias\n    log_p", "z\n    log_p", "on the CPU"),
]
