"""8-bit weights: unpacked, and multiplied by few rows."""

from __future__ import annotations

from kernels import int8
from tests.kernels.cases import Build, Case, Mutation, randn


def _unpack(name: str, shape: tuple[int, int]) -> Case:
    def of(function):
        return lambda w: function(int8.quantize(w), w.dtype)

    return Case(name, of(int8.triton_dequantize), of(int8.reference), lambda g: (randn(g, *shape),))


def _multiply(name: str, rows: int, shape: tuple[int, int]) -> Case:
    def of(function):
        return lambda x, w: function(x, int8.quantize(w))

    def inputs(g):
        return randn(g, rows, shape[1]), randn(g, *shape)

    return Case(name, of(int8.triton_matmul), of(int8.reference_matmul), inputs)


CASES = [
    _unpack("dequantize", (33, 1100)),
    _unpack("dequantize, one number", (1, 1)),
    _multiply("matmul, one row", 1, (40, 129)),
    _multiply("matmul, 7 rows", 7, (70, 390)),
    _multiply("matmul, 64 rows", 64, (33, 17)),
    _multiply("matmul, no row", 0, (48, 64)),
]

_UNPACK = {"Q": "*i8", "S": "*fp32", "W": "*bf16", "K": "i32:16"}
_MULTIPLY = {
    "X": "*bf16",
    "Q": "*i8",
    "S": "*fp32",
    "Y": "*bf16",
    "M": "i32",
    "N": "i32:16",
    "K": "i32:16",
}
BUILDS = [Build(int8.dequantize_kernel, _UNPACK, {"BLOCK": int8.BLOCK})]
for _rows in (1, 32, 64):
    BUILDS.append(Build(int8.matmul_kernel, _MULTIPLY, int8.tile_sizes(_rows), stages=3))

MUTATIONS = [
    Mutation(
        "tl.load(S + row) * 7.874015718698502e-3", "tl.load(S + row) * 7.8125e-3", "dequantize"
    ),
    Mutation(
        "(n < N)[None, :] & (k < K)[:, None], 0)",
        "(n < N)[None, :] & (k < K - 1)[:, None], 0)",
        "matmul, one row",
    ),
    Mutation("tl.load(S + n, n < N, 0.0)", "tl.load(S + n * 0, n < N, 0.0)", "matmul, 7 rows"),
    Mutation("tl.num_programs(1) * BLOCK_K)", "BLOCK_K)", "matmul, 7 rows"),
]
