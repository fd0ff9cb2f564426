"""4-bit NormalFloat weights, byte for byte as bitsandbytes stores them.

A weight (N, K) is read row by row as one list of n = N K numbers, cut into blocks of 64. With m the mean of all a:

    a_b = max |w| in block b          c_i = the nearest of 16 codes to w_i / a_b          element 2j in the high nibble
    double quantization:  A_j = max |a_b - m| in 256 blocks          q_b = the nearest of 256 codes to (a_b - m) / A_j
    w_i = code[c_i] * (code8[q_b] * A_j + m)          each operation rounded to float32, w once more to its dtype

Bytes moved, dequantize: n/2 + n/64 in, 2 n out (bf16): one kernel in place of five. matmul, for the few rows of
decoding: n/2 + n/64 in and nothing of the weight out, so a token costs a quarter of what it does in bf16; above about
64 rows dequantize and cuBLAS is faster. Neither has a gradient: kernels/lora.py has.

Dettmers, Pagnoni, Holtzman and Zettlemoyer, QLoRA, 2023; the 8-bit codes: Dettmers, 8-Bit Approximations, 2015.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Build, Case, Mutation, fused, processors, randn, tl, triton

NF4_CODE = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
            1.0)  # fmt: skip
NESTED = 256  # blocks that share one second-level scale
FEW = 64  # rows up to which multiplying with the packed weight beats unpacking it first


class NF4(NamedTuple):
    """A weight in 4 bits; the fields are bitsandbytes' own. Without double quantization the nested ones are empty."""

    packed: Tensor  # ((n + 1) // 2, 1) uint8
    absmax: Tensor  # (blocks,) uint8 codes, or float32 without double quantization
    quant_map: Tensor  # (16,) float32
    nested_absmax: Tensor  # (blocks / 256,) float32
    nested_quant_map: Tensor  # (256,) float32
    nested_offset: Tensor  # () float32
    shape: tuple[int, int]  # (N, K): outputs, inputs
    dtype: torch.dtype  # of the weight before it was quantized
    blocksize: int

    def to(self, device) -> NF4:
        return self._make(f.to(device) if isinstance(f, Tensor) else f for f in self)

    def state(self) -> dict[str, Tensor]:
        """The tensors of a bitsandbytes state dict, under the names that follow the layer's own."""
        facts = {"quant_type": "nf4", "blocksize": self.blocksize, "dtype": str(self.dtype).removeprefix("torch."),
                 "shape": list(self.shape)}  # fmt: skip
        state = {
            "weight": self.packed,
            "weight.absmax": self.absmax,
            "weight.quant_map": self.quant_map,
        }
        if self.absmax.dtype == torch.uint8:
            facts |= {
                "nested_blocksize": NESTED,
                "nested_dtype": "float32",
                "nested_offset": self.nested_offset.item(),
            }
            state |= {
                "weight.nested_absmax": self.nested_absmax,
                "weight.nested_quant_map": self.nested_quant_map,
            }
        text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
        return state | {"weight.quant_state.bitsandbytes__nf4": text}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> NF4:
        """The inverse of `state`. ValueError for what bitsandbytes can write and this file does not read."""
        facts = json.loads(bytes(state["weight.quant_state.bitsandbytes__nf4"].tolist()))
        double = "nested_offset" in facts
        if facts["quant_type"] != "nf4" or double and facts["nested_blocksize"] != NESTED:
            raise ValueError(f"only nf4 with a nested blocksize of {NESTED} is read, not {facts}")
        none = state["weight.absmax"].new_empty(0, dtype=torch.float32)
        return cls(state["weight"], state["weight.absmax"], state["weight.quant_map"],
                   state["weight.nested_absmax"] if double else none,
                   state["weight.nested_quant_map"] if double else none,
                   none.new_tensor(facts["nested_offset"] if double else 0.0),
                   tuple(facts["shape"]), getattr(torch, facts["dtype"]), facts["blocksize"])  # fmt: skip


def dynamic_map() -> Tensor:
    """(256,) ascending: 0, 1 and in each of 7 decades twice as many equal steps of either sign as in the one below."""
    codes = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        steps = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        codes += steps.tolist() + (-steps).tolist()
    return torch.tensor(sorted(codes))


def _blocks(flat: Tensor, size: int) -> Tensor:
    return F.pad(flat.float(), (0, -len(flat) % size)).view(-1, size)


def _scaled(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """flat (n,) -> its blocks divided by their largest magnitude (blocks, size), and that magnitude (blocks,)."""
    blocks = _blocks(flat, size)
    absmax = blocks.abs().amax(1)
    return blocks * (1 / absmax.clamp(min=1e-38))[:, None], absmax  # a block of zeros stays zeros


def _nearest(x: Tensor, codes: Tensor) -> Tensor:
    """Indices, uint8, of the nearest codes; a tie goes to the lower."""
    return torch.bucketize(x, (codes[:-1] + codes[1:]) / 2, out_int32=True).to(torch.uint8).view(-1)


def quantize(weight: Tensor, double: bool = True, blocksize: int = 64) -> NF4:
    """weight (N, K), any float dtype, any device -> NF4. A few hundred MB beyond the result, whatever the size."""
    flat, code = weight.reshape(-1), torch.tensor(NF4_CODE, device=weight.device)
    packed, absmax = [], []
    for part in flat.split(blocksize << 16):
        scaled, scale = _scaled(part, blocksize)
        index = _nearest(scaled, code)[: len(part) + len(part) % 2]
        packed.append(index[::2] << 4 | index[1::2])
        absmax.append(scale)
    packed, absmax = torch.cat(packed)[:, None], torch.cat(absmax)
    nested, codes, offset = absmax.new_empty(0), absmax.new_empty(0), absmax.new_zeros(())
    if double:
        codes, offset, blocks = dynamic_map().to(weight.device), absmax.mean(), len(absmax)
        scaled, nested = _scaled(absmax - offset, NESTED)
        # bitsandbytes looks 8-bit codes up in a table of 65,536 steps over [-1, 1]; a block of zeros has code 0.
        scaled = (
            ((scaled + 1) * 32767.5 + 0.5).floor() / 32767.5 - 1 - (nested == 0)[:, None].float()
        )
        absmax = _nearest(scaled, codes)[:blocks]
    return NF4(
        packed, absmax, code, nested, codes, offset, tuple(weight.shape), weight.dtype, blocksize
    )


def reference(q: NF4, dtype: torch.dtype) -> Tensor:
    """-> the weight (N, K) in dtype."""
    n, scale = q.shape[0] * q.shape[1], q.absmax
    if scale.dtype == torch.uint8:
        scale = F.pad(q.nested_quant_map[scale.int()], (0, -len(scale) % NESTED)).view(-1, NESTED)
        scale = (scale * q.nested_absmax[:, None] + q.nested_offset).view(-1)[: len(q.absmax)]
    pairs = torch.cartesian_prod(
        q.quant_map, q.quant_map
    )  # one look-up for the two numbers of a byte
    w = pairs[q.packed.view(-1).int()].view(-1)[:n]
    return (_blocks(w, q.blocksize) * scale[:, None]).view(-1)[:n].view(q.shape).to(dtype)


def reference_matmul(x: Tensor, q: NF4) -> Tensor:
    return F.linear(x, reference(q, x.dtype))


@triton.jit
def weights(
    PACKED, ABSMAX, MAP, ABSMAX2, MAP2, OFFSET, block, inside, size, HALF: tl.constexpr, DOUBLE: tl.constexpr
):  # fmt: skip
    """The quantization blocks `block` (N,) -> their numbers (N, 2 HALF) in float32; `size` is the bytes of PACKED."""
    at = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    byte = tl.load(PACKED + at, inside[:, None] & (at < size), 0).to(tl.int32)
    scale = tl.load(ABSMAX + block, inside, 0)
    if DOUBLE:
        nested = tl.load(ABSMAX2 + block // 256, inside, 0.0)
        scale = tl.load(MAP2 + scale.to(tl.int32)) * nested + tl.load(OFFSET)
    pair = tl.join(tl.load(MAP + (byte >> 4)), tl.load(MAP + (byte & 15)))
    return tl.reshape(pair, (block.shape[0], 2 * HALF)) * scale[:, None]


@triton.jit
def dequantize_kernel(
    PACKED, ABSMAX, MAP, ABSMAX2, MAP2, OFFSET, W, size, n, blocks,
    HALF: tl.constexpr, DOUBLE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS quantization blocks per program: a scale is found once for its 64 numbers."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    w = weights(
        PACKED, ABSMAX, MAP, ABSMAX2, MAP2, OFFSET, block, block < blocks, size, HALF, DOUBLE
    )
    at = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(W + at, w.to(W.dtype.element_ty), at < n)


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    X, PACKED, ABSMAX, MAP, ABSMAX2, MAP2, OFFSET, Y, size, M, N, K,
    HALF: tl.constexpr, DOUBLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """All rows of X by BLOCK_N rows of W, over every SPLIT-th part of the width; a row of W is whole blocks."""
    row, m = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    part, each = tl.program_id(1), K // (2 * HALF)
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(part * BLOCKS, each, tl.num_programs(1) * BLOCKS):
        b, k = first + tl.arange(0, BLOCKS), first * 2 * HALF + tl.arange(0, BLOCKS * 2 * HALF)
        x = tl.load(X + m[:, None] * K + k[None, :], (m < M)[:, None] & (k < K)[None, :], 0.0)
        block = tl.reshape(row[:, None] * each + b[None, :], (BLOCK_N * BLOCKS,))
        inside = tl.reshape((row < N)[:, None] & (b < each)[None, :], (BLOCK_N * BLOCKS,))
        w = weights(PACKED, ABSMAX, MAP, ABSMAX2, MAP2, OFFSET, block, inside, size, HALF, DOUBLE)
        w = tl.reshape(w, (BLOCK_N, BLOCKS * 2 * HALF)).to(x.dtype)
        y = tl.dot(x, tl.trans(w), y, input_precision="ieee")
    at = (part * M + m)[:, None] * N + row[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), (m < M)[:, None] & (row < N)[None, :])


@torch.library.custom_op("barellava::nf4_dequantize", mutates_args=())
def _dequantize(
    packed: Tensor, absmax: Tensor, code: Tensor, nested: Tensor, codes: Tensor, offset: Tensor,
    rows: int, columns: int, blocksize: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    w, block = packed.new_empty(rows, columns, dtype=dtype), max(1, 2048 // blocksize)
    if w.numel():
        # Without fused multiply-add: bitsandbytes rounds code8 * A before it adds the mean.
        dequantize_kernel[(triton.cdiv(len(absmax), block),)](
            packed, absmax, code, nested, codes, offset, w, packed.numel(), w.numel(), len(absmax),
            blocksize // 2, absmax.dtype == torch.uint8, block, enable_fp_fusion=False,
        )  # fmt: skip
    return w


@_dequantize.register_fake
def _(packed, absmax, code, nested, codes, offset, rows, columns, blocksize, dtype):
    return packed.new_empty(rows, columns, dtype=dtype)


@torch.library.custom_op("barellava::nf4_matmul", mutates_args=())
def _matmul(
    x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, nested: Tensor, codes: Tensor, offset: Tensor,
    rows: int, blocksize: int,
) -> Tensor:  # fmt: skip
    x, (M, K) = x.contiguous(), x.shape
    tile = _tile(M)
    tiles = triton.cdiv(rows, tile["BLOCK_N"])
    # Four programs per multiprocessor hide each other's look-ups (a pipeline would copy every code to shared memory);
    # where the rows of W are too few for that, its width is split as well.
    many = 4 * processors(x)
    split = max(1, min(many // max(1, tiles), K // blocksize // tile["BLOCKS"]))
    y = x.new_empty(split, M, rows, dtype=x.dtype if split == 1 else torch.float32)
    if y.numel():
        matmul_kernel[(tiles, split)](
            x, packed, absmax, code, nested, codes, offset, y, packed.numel(), M, rows, K,
            blocksize // 2, absmax.dtype == torch.uint8, **tile, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
    return y[0] if split == 1 else y.sum(0).to(x.dtype)


@_matmul.register_fake
def _(x, packed, absmax, code, nested, codes, offset, rows, blocksize):
    return x.new_empty(x.size(0), rows)


def _tile(M: int) -> dict[str, int]:
    """The dot has 16 rows at least; with more, half as much of W is in flight, for the sake of registers."""
    rows = max(16, 1 << (M - 1).bit_length())
    return {"BLOCK_M": rows} | (
        {"BLOCK_N": 16, "BLOCKS": 4} if rows == 16 else {"BLOCK_N": 32, "BLOCKS": 1}
    )


def triton_dequantize(q: NF4, dtype: torch.dtype) -> Tensor:
    return _dequantize(*q[:6], *q.shape, q.blocksize, dtype)


def triton_matmul(x: Tensor, q: NF4) -> Tensor:
    return _matmul(x.reshape(-1, x.size(-1)), *q[:6], q.shape[0], q.blocksize).view(
        *x.shape[:-1], q.shape[0]
    )


def dequantize(q: NF4, dtype: torch.dtype) -> Tensor:
    """-> the weight (N, K) in dtype: bitsandbytes' numbers, bit for bit."""
    return (triton_dequantize if fused(q.packed) else reference)(q, dtype)


def matmul(x: Tensor, q: NF4) -> Tensor:
    """x (..., K) -> x W^T (..., N) in x's dtype, no gradient; W is rounded to that dtype, the sum is float32.

    The fused kernel is for the 16-bit dtypes and rows of W that are whole blocks of 64, as every model's are.
    """
    few = (
        x.numel() <= FEW * x.size(-1)
        and x.element_size() == 2
        and q.blocksize == 64
        and x.size(-1) % 64 == 0
    )
    return triton_matmul(x, q) if few and fused(x) else F.linear(x, dequantize(q, x.dtype))


def _unpack(name: str, shape: tuple[int, int], double: bool = True, blocksize: int = 64) -> Case:
    def of(function):
        return lambda w: function(quantize(w.float(), double, blocksize), w.dtype)

    return Case(name, of(triton_dequantize), of(reference), lambda g: (randn(g, *shape),))


def _multiply(name: str, rows: int, shape: tuple[int, int], double: bool = True) -> Case:
    def of(function):
        return lambda x, w: function(x, quantize(w.float(), double))

    return Case(
        name,
        of(triton_matmul),
        of(reference_matmul),
        lambda g: (randn(g, rows, shape[1]), randn(g, *shape)),
    )


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

_W = {
    "PACKED": "*u8",
    "ABSMAX": "*u8",
    "MAP": "*fp32",
    "ABSMAX2": "*fp32",
    "MAP2": "*fp32",
    "OFFSET": "*fp32",
}
BUILDS = [Build(dequantize_kernel, _W | {"W": "*bf16", "size": "i32", "n": "i32", "blocks": "i32"},
                {"HALF": 32, "DOUBLE": True, "BLOCKS": 32})] + [
    Build(matmul_kernel, _W | {"X": "*bf16", "Y": "*bf16", "size": "i32:16", "M": "i32", "N": "i32:16", "K": "i32:16"},
          {"HALF": 32, "DOUBLE": True, **_tile(rows)}, stages=1)
    for rows in (1, 32, 64)
]  # fmt: skip
MUTATIONS = [
    Mutation("tl.load(MAP + (byte >> 4)), tl.load(MAP + (byte & 15))",
             "tl.load(MAP + (byte & 15)), tl.load(MAP + (byte >> 4))", "dequantize"),
    Mutation(" + tl.load(OFFSET)", "", "dequantize"),
    Mutation("block // 256", "block // 512", "dequantize"),
    Mutation("tl.num_programs(1) * BLOCKS):", "BLOCKS):", "matmul, 7 rows"),
    Mutation("at < n)", "at < n // 2)", "dequantize, odd size"),
]  # fmt: skip


if __name__ == "__main__":
    from bench.kernels import main

    main(["nf4"])
