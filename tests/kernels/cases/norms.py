"""Norms: every kind, with and without residual and bias, widths that are no power of two."""

from __future__ import annotations

from kernels import norms
from tests.kernels.cases import Build, Case, Mutation, in_dtype, randn


def _same_dtype(function):
    """The output's dtype is the input's, which the case does not know."""
    return lambda *args: function(*args, args[0].dtype)


def _case(name: str, shape: tuple[int, ...], kind: str, add: bool, bias: bool = False) -> Case:
    def inputs(g):
        D = shape[-1]
        x = randn(g, *shape)
        residual = randn(g, *shape) if add else None
        weight = 1 + 0.3 * randn(g, D)
        offset = randn(g, D) if bias else None
        return x, residual, weight, offset, 1e-5, kind

    grads = [0, 2]
    if add:
        grads.append(1)
    if bias:
        grads.append(3)
    fused = _same_dtype(norms.triton_norm)
    return Case(name, fused, _same_dtype(norms.reference), inputs, tuple(sorted(grads)))


CASES = [
    _case("rms", (7, 96), "rms", False),
    _case("rms, one token", (1, 33), "rms", False),
    _case("rms, no token", (0, 16), "rms", False),
    _case("rms of heads", (5, 3, 18), "rms", False),
    _case("rms, residual", (129, 72), "rms", True),
    _case("gemma, residual", (6, 130), "rms1", True),
    _case("layer", (5, 80), "layer", False, True),
    _case("layer without bias, residual", (9, 40), "layer", True),
    _case("layer, residual", (129, 48), "layer", True, True),
]

_FORWARD = {
    **dict.fromkeys(("X", "R", "W", "B", "Y", "S"), "*bf16"),
    **dict.fromkeys(("C", "M"), "*fp32"),
    "D": "i32:16",
    "eps": "fp32",
}
_BACKWARD = {
    **dict.fromkeys(("DY", "DS", "S", "W", "DX"), "*bf16"),
    **dict.fromkeys(("C", "M", "DW", "DB"), "*fp32"),
    "T": "i32",
    "D": "i32:16",
    "rows": "i32",
}


def _build(kernel, types: dict, layer: bool, block: int) -> Build:
    constants = norms.kernel_flags("layer" if layer else "rms", True, layer, block)
    warps = constants.pop("num_warps")
    return Build(kernel, types, constants, warps)


BUILDS = [
    _build(kernel, types, layer, block)
    for kernel, types in ((norms.forward_kernel, _FORWARD), (norms.backward_kernel, _BACKWARD))
    for layer in (False, True)
    for block in (2048, 4096)
]

# In float32 and float16, and as under autocast: a float32 stream and weights, bf16 beside them.
for _kernel, _types in ((norms.forward_kernel, _FORWARD), (norms.backward_kernel, _BACKWARD)):
    for _block in (4096, 8192):
        _bf16 = _build(_kernel, _types, True, _block)
        BUILDS.append(in_dtype(_bf16, "fp32")._replace(targets=(80, 90)))
    BUILDS.append(in_dtype(_bf16, "fp16")._replace(targets=(80, 90)))
_STREAM = {"R": "*fp32", "S": "*fp32", "W": "*fp32", "B": "*fp32"}
_MIXED = _build(norms.forward_kernel, _FORWARD, True, 8192)
BUILDS.append(_MIXED._replace(types=_FORWARD | _STREAM, targets=(80, 90)))
_MIXED = _build(norms.backward_kernel, _BACKWARD, True, 8192)
_STREAM = {"DS": "*fp32", "S": "*fp32", "W": "*fp32", "DX": "*fp32"}
BUILDS.append(_MIXED._replace(types=_BACKWARD | _STREAM, targets=(80, 90), spills=56))

MUTATIONS = [
    Mutation("ds = g - n * (tl.sum(g * n, 0) / D)", "ds = g", "rms"),
    Mutation("ds -= tl.sum(g, 0) / D", "ds -= 0", "layer"),
    Mutation("s = tl.where(inside, s - mean, 0.0)", "s = s - mean", "layer"),
    Mutation("to(tl.float32) + OFFSET", "to(tl.float32)", "gemma, residual"),
]
