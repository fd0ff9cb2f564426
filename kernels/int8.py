"""8-bit integer weights with one scale per row, byte for byte as bitsandbytes' LLM.int8 stores them.

    S_n = max |w_n|  over row n          q = round(w * 127 / S_n), to even          w = q * S_n * (1 / 127)

Weights pass through float16 on the way in, as they do in bitsandbytes. Activations stay in their own dtype (LLM.int8
quantizes them too). N outputs, K inputs. Bytes moved, dequantize: N K in, 2 N K out (bf16), one kernel in place of
three. matmul, for the few rows of decoding: N K in; |q| <= 127 is exact in bf16, so the products need no rounding of
w, and the scale multiplies the finished sum. Neither has a gradient: kernels/lora.py has.

Dettmers, Lewis, Belkada and Zettlemoyer, LLM.int8(), 2022.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Build, Case, Mutation, fused, processors, randn, tl, triton

FEW = 64  # rows up to which multiplying with the 8-bit weight beats unpacking it first
FEW_CPU = 16  # the same where torch's own product does it
STEP = 7.874015718698502e-3  # 1 / 127 in float32, as bitsandbytes writes it


class Int8(NamedTuple):
    """A weight in 8 bits; the fields are bitsandbytes' own."""

    weight: Tensor  # (N, K) int8
    SCB: Tensor  # (N,) float32, the largest magnitude of each row

    def to(self, device) -> Int8:
        return Int8(self.weight.to(device), self.SCB.to(device))

    def state(self) -> dict[str, Tensor]:
        """The tensors of a bitsandbytes state dict, under the names that follow the layer's own."""
        return {
            "weight": self.weight,
            "SCB": self.SCB,
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Int8:
        """The inverse of `state`. ValueError for the tiled layouts of older GPUs."""
        if int(state.get("weight_format", 0)) != 0:
            raise ValueError(
                f"only row-wise int8 weights are read, not weight_format {int(state['weight_format'])}"
            )
        return cls(state["weight"], state["SCB"])


def quantize(weight: Tensor) -> Int8:
    """weight (N, K), any float dtype, any device -> Int8. ValueError where a value is beyond float16 (65,504)."""
    rows = weight.half()
    SCB = rows.abs().amax(1).float()
    if not SCB.isfinite().all():
        raise ValueError("a weight is not finite in float16, through which int8 weights are made")
    ratio = 127.0 / SCB.clamp(min=1e-30)  # a row of zeros stays zeros
    parts = zip(
        rows.split(4096), ratio.split(4096), strict=True
    )  # the products are float32: not all at once
    return Int8(torch.cat([torch.round(w * r[:, None]).to(torch.int8) for w, r in parts]), SCB)


def reference(q: Int8, dtype: torch.dtype) -> Tensor:
    """-> the weight (N, K) in dtype."""
    return (q.weight * q.SCB[:, None] * STEP).to(dtype)


def reference_matmul(x: Tensor, q: Int8) -> Tensor:
    return F.linear(x, reference(q, x.dtype))


@triton.jit
def dequantize_kernel(Q, S, W, K, BLOCK: tl.constexpr):
    """BLOCK numbers of one row per program."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    w = (
        tl.load(Q + row * K + at, at < K, 0).to(tl.float32)
        * tl.load(S + row)
        * 7.874015718698502e-3
    )
    tl.store(W + row * K + at, w.to(W.dtype.element_ty), at < K)


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    X, Q, S, Y, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """All rows of X by BLOCK_N rows of W, over every SPLIT-th part of the width."""
    n, m = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(part * BLOCK_K, K, tl.num_programs(1) * BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(X + m[:, None] * K + k[None, :], (m < M)[:, None] & (k < K)[None, :], 0.0)
        q = tl.load(Q + n[None, :] * K + k[:, None], (n < N)[None, :] & (k < K)[:, None], 0)
        y = tl.dot(x, q.to(x.dtype), y, input_precision="ieee")
    y *= (tl.load(S + n, n < N, 0.0) * 7.874015718698502e-3)[None, :]
    at = (part * M + m)[:, None] * N + n[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


@torch.library.custom_op("barellava::int8_dequantize", mutates_args=())
def _dequantize(weight: Tensor, SCB: Tensor, dtype: torch.dtype) -> Tensor:
    weight, w = (
        weight.contiguous(),
        torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format),
    )
    if w.numel():
        dequantize_kernel[(w.size(0), triton.cdiv(w.size(1), 1024))](
            weight, SCB, w, w.size(1), 1024
        )
    return w


@_dequantize.register_fake
def _(weight, SCB, dtype):
    return torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)


@torch.library.custom_op("barellava::int8_matmul", mutates_args=())
def _matmul(x: Tensor, weight: Tensor, SCB: Tensor) -> Tensor:
    x, weight, (M, K), N = x.contiguous(), weight.contiguous(), x.shape, weight.size(0)
    tile = _tile(M)
    tiles = triton.cdiv(N, tile["BLOCK_N"])
    # Two programs per multiprocessor; where the rows of W are too few for that, its width is split as well.
    many = 2 * processors(x)
    split = max(1, min(many // max(1, tiles), K // tile["BLOCK_K"]))
    y = x.new_empty(split, M, N, dtype=x.dtype if split == 1 else torch.float32)
    if y.numel():
        matmul_kernel[(tiles, split)](x, weight, SCB, y, M, N, K, **tile, num_stages=3)
    return y[0] if split == 1 else y.sum(0).to(x.dtype)


@_matmul.register_fake
def _(x, weight, SCB):
    return x.new_empty(x.size(0), weight.size(0))


def _tile(M: int) -> dict[str, int]:
    """The dot has 16 rows at least; with more, half the width is in flight, for the sake of registers."""
    rows = max(16, 1 << (M - 1).bit_length())
    return {"BLOCK_M": rows, "BLOCK_N": 32, "BLOCK_K": 128 if rows == 16 else 64}


def triton_dequantize(q: Int8, dtype: torch.dtype) -> Tensor:
    return _dequantize(q.weight, q.SCB, dtype)


def triton_matmul(x: Tensor, q: Int8) -> Tensor:
    return _matmul(x.reshape(-1, x.size(-1)), *q).view(*x.shape[:-1], q.weight.size(0))


def dequantize(q: Int8, dtype: torch.dtype) -> Tensor:
    """-> the weight (N, K) in dtype: bitsandbytes' numbers, rounded once."""
    return (triton_dequantize if fused(q.weight) else reference)(q, dtype)


def matmul(x: Tensor, q: Int8) -> Tensor:
    """x (..., K) -> x W^T (..., N) in x's dtype, no gradient; the sum is float32. The kernel is for 16-bit dtypes.

    On a CPU few rows in bfloat16 go through torch's own product with 8-bit weights.
    """
    few = x.numel() <= FEW * x.size(-1) and x.element_size() == 2
    if few and fused(x):
        return triton_matmul(x, q)
    even = not any(
        size % 64 for size in q.weight.shape
    )  # torch's product reads beyond the end of others
    if x.is_cpu and x.dtype == torch.bfloat16 and even and x.numel() <= FEW_CPU * x.size(-1):
        # Its scales would be rounded to bfloat16: they are 1 in it, and the finished sums are multiplied.
        y = torch._weight_int8pack_mm(
            x.reshape(-1, x.size(-1)), q.weight, x.new_ones(q.weight.size(0))
        )
        return (y * (q.SCB * STEP)).to(x.dtype).view(*x.shape[:-1], q.weight.size(0))
    return F.linear(x, dequantize(q, x.dtype))


def _unpack(name: str, shape: tuple[int, int]) -> Case:
    def of(function):
        return lambda w: function(quantize(w), w.dtype)

    return Case(name, of(triton_dequantize), of(reference), lambda g: (randn(g, *shape),))


def _multiply(name: str, rows: int, shape: tuple[int, int]) -> Case:
    def of(function):
        return lambda x, w: function(x, quantize(w))

    return Case(
        name,
        of(triton_matmul),
        of(reference_matmul),
        lambda g: (randn(g, rows, shape[1]), randn(g, *shape)),
    )


CASES = [
    _unpack("dequantize", (33, 1100)),
    _unpack("dequantize, one number", (1, 1)),
    _multiply("matmul, one row", 1, (40, 129)),
    _multiply("matmul, 7 rows", 7, (70, 390)),
    _multiply("matmul, 64 rows", 64, (33, 17)),
    _multiply("matmul, no row", 0, (48, 64)),
]

BUILDS = [
    Build(dequantize_kernel, {"Q": "*i8", "S": "*fp32", "W": "*bf16", "K": "i32:16"}, {"BLOCK": 1024}),
    *(Build(matmul_kernel, {"X": "*bf16", "Q": "*i8", "S": "*fp32", "Y": "*bf16", "M": "i32", "N": "i32:16",
                            "K": "i32:16"}, _tile(rows), stages=3) for rows in (1, 32, 64)),
]  # fmt: skip
MUTATIONS = [
    Mutation(" * 7.874015718698502e-3\n", " * 7.8125e-3\n", "dequantize"),
    Mutation("(n < N)[None, :] & (k < K)[:, None], 0)", "(n < N)[None, :] & (k < K - 1)[:, None], 0)",
             "matmul, one row"),
    Mutation("tl.load(S + n, n < N, 0.0)", "tl.load(S + n * 0, n < N, 0.0)", "matmul, 7 rows"),
    Mutation("tl.num_programs(1) * BLOCK_K)", "BLOCK_K)", "matmul, 7 rows"),
]  # fmt: skip


if __name__ == "__main__":
    from bench.kernels import main

    main(["int8"])
