"""Activations: every kind, rows of several blocks, the tails, and halves of one projection."""

from __future__ import annotations

from kernels import glu
from tests.kernels.cases import Build, Case, Mutation, randn


def _case(
    name: str, shape: tuple[int, ...], act: str, gated: bool = True, scale: float = 2.0
) -> Case:
    def inputs(g):
        x = randn(g, *shape, scale=scale)
        up = randn(g, *shape) if gated else None
        return x, up, act

    grads = (0, 1) if gated else (0,)
    return Case(name, glu.triton_glu, glu.reference, inputs, grads)


def _halves(function):
    """Both arguments are views of one projection, whose gradient is theirs side by side."""
    return lambda both, act: function(*both.chunk(2, -1), act)


CASES = [
    _case("silu", (7, 96), "silu"),
    _case("silu, one token", (1, 1), "silu"),
    _case("silu, no token", (0, 16), "silu"),
    _case("silu, several blocks", (3, 2055), "silu"),
    _case("gelu_tanh gated", (129, 33), "gelu_tanh"),
    _case("gelu_tanh, tails", (2, 3, 70), "gelu_tanh", gated=False, scale=12.0),
    _case("gelu_tanh plain", (7, 5, 18), "gelu_tanh", gated=False),
    _case("quick_gelu plain", (5, 80), "quick_gelu", gated=False),
    _case("gelu plain", (129, 7), "gelu", gated=False),
    Case(
        "one projection",
        _halves(glu.triton_glu),
        _halves(glu.reference),
        lambda g: (randn(g, 5, 2 * 37), "silu"),
        (0,),
    ),
]

_FORWARD = {
    **dict.fromkeys(("X", "U", "Y"), "*bf16"),
    **dict.fromkeys(("width", "x_row", "u_row"), "i32:16"),
}
_BACKWARD = {
    **dict.fromkeys(("DY", "X", "U", "DX", "DU"), "*bf16"),
    **dict.fromkeys(("width", "dy_row", "x_row", "u_row"), "i32:16"),
}
_KINDS = [
    ("silu", True),
    ("gelu_tanh", True),
    ("gelu_tanh", False),
    ("quick_gelu", False),
    ("gelu", False),
]
BUILDS = [
    Build(kernel, types, {"ACT": act, "GATED": gated, "BLOCK": 1024})
    for kernel, types in ((glu.forward_kernel, _FORWARD), (glu.backward_kernel, _BACKWARD))
    for act, gated in _KINDS
]

MUTATIONS = [
    Mutation("slope * t * c * c", "slope * t * c", "silu"),
    Mutation("1.702 if", "1.0 if", "quick_gelu plain"),
    Mutation("(1.0 + 0.134145 * x * x)", "(1.0 + 0.044715 * x * x)", "gelu_tanh plain"),
    Mutation(
        "0.3989422804014327 * tl.exp(-0.5 * x * x)",
        "0.3989422804014327 * tl.exp(-x * x)",
        "gelu plain",
    ),
    Mutation("tl.load(U + row * u_row + at", "tl.load(U + row * width + at", "one projection"),
    Mutation("(dy * x * s).to", "(dy * s).to", "gelu_tanh gated"),
]
