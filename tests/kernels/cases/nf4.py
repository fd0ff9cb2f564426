"""4-bit weights: unpacked, and multiplied by few rows, with and without double quantization."""

from __future__ import annotations

from kernels import nf4
from tests.kernels.cases import Build, Case, Mutation, randn


def _unpack(name: str, shape: tuple[int, int], double: bool = True, blocksize: int = 64) -> Case:
    def of(function):
        return lambda w: function(nf4.quantize(w.float(), double, blocksize), w.dtype)

    return Case(name, of(nf4.triton_dequantize), of(nf4.reference), lambda g: (randn(g, *shape),))


def _multiply(name: str, rows: int, shape: tuple[int, int], double: bool = True) -> Case:
    def of(function):
        return lambda x, w: function(x, nf4.quantize(w.float(), double))

    def inputs(g):
        return randn(g, rows, shape[1]), randn(g, *shape)

    return Case(name, of(nf4.triton_matmul), of(nf4.reference_matmul), inputs)


CASES = [
    _unpack("dequantize", (130, 192)),
    _unpack("dequantize, odd size", (7, 129)),
    _unpack("dequantize, one number", (1, 1)),
    _unpack("dequantize, plain, blocks of 128", (33, 80), False, 128),
    _multiply("matmul, one row", 1, (40, 128)),
    _multiply("matmul, 7 rows", 7, (40, 576)),
    _multiply("matmul, 129 outputs", 3, (129, 64)),
    _multiply("matmul, 64 rows, plain", 64, (48, 64), False),
    _multiply("matmul, no row", 0, (48, 64)),
]

_WEIGHT = {
    **dict.fromkeys(("PACKED", "ABSMAX"), "*u8"),
    **dict.fromkeys(("MAP", "ABSMAX2", "MAP2", "OFFSET"), "*fp32"),
}
_UNPACK = {**_WEIGHT, "W": "*bf16", "size": "i32", "n": "i32", "blocks": "i32"}
_MULTIPLY = {
    **_WEIGHT,
    "X": "*bf16",
    "Y": "*bf16",
    "size": "i32:16",
    "M": "i32",
    "N": "i32:16",
    "K": "i32:16",
}
_KIND = {"HALF": 32, "DOUBLE": True}
BUILDS = [Build(nf4.dequantize_kernel, _UNPACK, {**_KIND, "BLOCKS": 32})]
for _rows in (1, 32, 64):
    BUILDS.append(Build(nf4.matmul_kernel, _MULTIPLY, {**_KIND, **nf4.tile_sizes(_rows)}, stages=1))

MUTATIONS = [
    Mutation(
        "tl.load(MAP + (byte >> 4)), tl.load(MAP + (byte & 15))",
        "tl.load(MAP + (byte & 15)), tl.load(MAP + (byte >> 4))",
        "dequantize",
    ),
    Mutation(" + tl.load(OFFSET)", "", "dequantize"),
    Mutation("block // 256", "block // 512", "dequantize"),
    Mutation("tl.num_programs(1) * BLOCKS):", "BLOCKS):", "matmul, 7 rows"),
    Mutation("at < n)", "at < n // 2)", "dequantize, odd size"),
]
