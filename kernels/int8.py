"""8-bit integer weights with a scale per row, byte for byte as bitsandbytes' LLM.int8 stores them.

    S_n = max |w_n|  over row n
    q = round(w * 127 / S_n), to even
    w = q * S_n * (1 / 127)

Weights pass through float16 on the way in, as they do in bitsandbytes. Activations stay in their
own dtype (LLM.int8 quantizes them too). N outputs, K inputs, M rows of activations.

Bytes moved, `dequantize`: N K in, 2 N K out (bf16), one kernel in place of three. `matmul`, for the
few rows of decoding: N K in. |q| <= 127 is exact in bf16, so the products need no rounding of w,
and the scale multiplies the finished sum. Neither has a gradient: kernels/lora.py has.

Dettmers, Lewis, Belkada and Zettlemoyer, LLM.int8(), 2022.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import divide_up, fused, multiprocessors, power_of_two, tl, triton

FEW = 64  # rows up to which multiplying with the 8-bit weight beats unpacking it first
FEW_CPU = 16  # the same where torch's own product does it
STEP = 7.874015718698502e-3  # 1 / 127 in float32, as bitsandbytes writes it
ROWS_AT_ONCE = 4096  # that are quantized: the products are float32, twice as large as the weight
BLOCK = 1024  # numbers of a program that unpacks


class Int8(NamedTuple):
    """A weight in 8 bits; the fields are bitsandbytes' own."""

    weight: Tensor  # (N, K) int8
    SCB: Tensor  # (N,) float32, the largest magnitude of each row

    def to(self, device) -> Int8:
        return Int8(self.weight.to(device), self.SCB.to(device))

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of a bitsandbytes state dict, by what follows the layer's own name."""
        return {
            "weight": self.weight,
            "SCB": self.SCB,
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Int8:
        """Return the weight of a `state`.

        ValueError for the tiled layouts of older GPUs, and for tensors that do not fit together.
        """
        layout = int(state.get("weight_format", 0))
        if layout != 0:
            raise ValueError(f"only row-wise int8 weights are read, not weight_format {layout}")

        weight = state.get("weight")
        scales = state.get("SCB")
        if weight is None or weight.dtype != torch.int8 or weight.dim() != 2:
            raise ValueError("weight is not a matrix of int8")
        if scales is None or scales.dtype != torch.float32 or scales.shape != weight.shape[:1]:
            raise ValueError("SCB is not a float32 for each row of weight")
        return cls(weight, scales)


def quantize(weight: Tensor) -> Int8:
    """Return weight (N, K), of any float dtype and on any device, in 8 bits.

    ValueError where a value is beyond float16 (65,504).
    """
    rows = weight.half()
    SCB = rows.abs().amax(1).float()
    if not SCB.isfinite().all():
        raise ValueError("a weight is not finite in float16, through which int8 weights are made")

    ratio = 127.0 / SCB.clamp(min=1e-30)  # a row of zeros stays zeros
    parts = []
    for w, r in zip(rows.split(ROWS_AT_ONCE), ratio.split(ROWS_AT_ONCE), strict=True):
        parts.append(torch.round(w * r[:, None]).to(torch.int8))
    return Int8(torch.cat(parts), SCB)


def reference(q: Int8, dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K) in dtype."""
    return (q.weight * q.SCB[:, None] * STEP).to(dtype)


def reference_matmul(x: Tensor, q: Int8) -> Tensor:
    """Return x W^T: x (..., K) -> (..., N)."""
    return F.linear(x, reference(q, x.dtype))


# ------------------------------------------------------------------ Triton


@triton.jit
def dequantize_kernel(Q, S, W, K, BLOCK: tl.constexpr):
    """Unpack BLOCK numbers of one row per program. The last factor is STEP."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    q = tl.load(Q + row * K + at, at < K, 0).to(tl.float32)
    w = q * tl.load(S + row) * 7.874015718698502e-3
    tl.store(W + row * K + at, w.to(W.dtype.element_ty), at < K)


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    X,  # (M, K)
    Q,  # (N, K) int8
    S,  # (N,) float32
    Y,  # (parts, M, N)
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply all rows of X by BLOCK_N rows of W, over every parts-th block of the width."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    part = tl.program_id(1)

    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(part * BLOCK_K, K, tl.num_programs(1) * BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x_at = X + m[:, None] * K + k[None, :]
        x = tl.load(x_at, (m < M)[:, None] & (k < K)[None, :], 0.0)  # (BLOCK_M, BLOCK_K)
        q_at = Q + n[None, :] * K + k[:, None]
        q = tl.load(q_at, (n < N)[None, :] & (k < K)[:, None], 0)  # (BLOCK_K, BLOCK_N)
        y = tl.dot(x, q.to(x.dtype), y, input_precision="ieee")

    # The scale of a row of W, once for the finished sum. The last factor is STEP.
    scale = tl.load(S + n, n < N, 0.0) * 7.874015718698502e-3
    y *= scale[None, :]
    at = (part * M + m)[:, None] * N + n[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


def tile_sizes(M: int) -> dict[str, int]:
    """Return the block sizes of `matmul_kernel` for M rows.

    A dot has 16 rows at least. With more of them half the width is in flight, as the sums of the
    rows take the registers.
    """
    rows = max(16, power_of_two(M))
    return {"BLOCK_M": rows, "BLOCK_N": 32, "BLOCK_K": 128 if rows == 16 else 64}


@torch.library.custom_op("barellava::int8_dequantize", mutates_args=())
def _dequantize(weight: Tensor, SCB: Tensor, dtype: torch.dtype) -> Tensor:
    weight = weight.contiguous()
    w = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    if w.numel():
        grid = (w.size(0), divide_up(w.size(1), BLOCK))
        dequantize_kernel[grid](weight, SCB, w, w.size(1), BLOCK)
    return w


@_dequantize.register_fake
def _(weight, SCB, dtype):
    return torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)


@torch.library.custom_op("barellava::int8_matmul", mutates_args=())
def _matmul(x: Tensor, weight: Tensor, SCB: Tensor) -> Tensor:
    """x (M, K) -> (M, N)."""
    x = x.contiguous()
    weight = weight.contiguous()
    M, K = x.shape
    N = weight.size(0)

    # Two programs per multiprocessor; where W has too few rows for that, its width is split as well
    # and the parts are summed in float32.
    sizes = tile_sizes(M)
    tiles = divide_up(N, sizes["BLOCK_N"])
    wanted = 2 * multiprocessors(x) // max(1, tiles)
    parts = max(1, min(wanted, K // sizes["BLOCK_K"]))
    y = x.new_empty(parts, M, N, dtype=x.dtype if parts == 1 else torch.float32)
    if y.numel():
        matmul_kernel[(tiles, parts)](x, weight, SCB, y, M, N, K, **sizes, num_stages=3)
    if parts == 1:
        return y[0]
    return y.sum(0).to(x.dtype)


@_matmul.register_fake
def _(x, weight, SCB):
    return x.new_empty(x.size(0), weight.size(0))


# ------------------------------------------------------------------ public


def triton_dequantize(q: Int8, dtype: torch.dtype) -> Tensor:
    """Return what `reference` does, by Triton on any device (the interpreter, on a CPU)."""
    return _dequantize(q.weight, q.SCB, dtype)


def triton_matmul(x: Tensor, q: Int8) -> Tensor:
    """Return what `reference_matmul` does, by Triton on any device, for up to FEW rows."""
    y = _matmul(x.reshape(-1, x.size(-1)), q.weight, q.SCB)
    return y.view(*x.shape[:-1], q.weight.size(0))


def _torch_matmul(x: Tensor, q: Int8) -> Tensor:
    """Return x W^T by torch's own product with 8-bit weights, for bfloat16 on a CPU.

    It takes a scale per row of W and would round it to bfloat16. So the scales it is given are 1,
    which is exact, and the finished sums are multiplied.
    """
    rows = x.reshape(-1, x.size(-1))
    ones = x.new_ones(q.weight.size(0))
    y = torch._weight_int8pack_mm(rows, q.weight, ones)
    y = (y * (q.SCB * STEP)).to(x.dtype)
    return y.view(*x.shape[:-1], q.weight.size(0))


def dequantize(q: Int8, dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K) in dtype: bitsandbytes' numbers, rounded once."""
    if fused(q.weight):
        return triton_dequantize(q, dtype)
    return reference(q, dtype)


def matmul(x: Tensor, q: Int8) -> Tensor:
    """Return x W^T in x's dtype, without a gradient: x (..., K) -> (..., N). The sum is float32.

    Few rows of a 16-bit dtype are multiplied by the 8-bit weight, others by the unpacked one.
    """
    K = x.size(-1)
    if fused(x) and x.numel() <= FEW * K and x.element_size() == 2:
        return triton_matmul(x, q)

    # torch's product reads beyond the end of sizes that are not multiples of 64.
    even = all(size % 64 == 0 for size in q.weight.shape)
    if x.is_cpu and x.dtype == torch.bfloat16 and even and x.numel() <= FEW_CPU * K:
        return _torch_matmul(x, q)
    return F.linear(x, dequantize(q, x.dtype))
