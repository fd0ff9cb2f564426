"""4-bit NormalFloat weights, byte for byte as bitsandbytes stores them.

A weight (N, K) is read row by row as one list of n = N K numbers, cut into blocks of 64. With m the
mean of all a_b:

    a_b = max |w| in block b                      the scale of a block
    c_i = the nearest of 16 codes to w_i / a_b    4 bits; element 2j is in the high half of a byte

    double quantization of the scales, 256 blocks at a time:
    A_j = max |a_b - m| in 256 blocks
    q_b = the nearest of 256 codes to (a_b - m) / A_j

    w_i = code[c_i] * (code8[q_b] * A_j + m)

Each operation is rounded to float32, and w once more to its dtype.

Bytes moved, `dequantize`: n/2 + n/64 in, 2 n out (bf16): one kernel in place of five. `matmul`, for
the few rows of decoding: n/2 + n/64 in and nothing of the weight out, so a token costs a quarter of
what it does in bf16; above about 64 rows `dequantize` and cuBLAS are faster. Neither has a
gradient: kernels/lora.py has.

Dettmers, Pagnoni, Holtzman and Zettlemoyer, QLoRA, 2023; the 8-bit codes: Dettmers, 8-Bit
Approximations, 2015.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import divide_up, fused, multiprocessors, operation, power_of_two, tl, triton

NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NESTED = 256  # blocks that share one second-level scale
FEW = 64  # rows up to which multiplying with the packed weight beats unpacking it first
BLOCKS_AT_ONCE = 1 << 16  # that are quantized: float32 copies of a part of the weight, not of all
FLOAT32_MAX = 3.4e38
STATE_KEY = "weight.quant_state.bitsandbytes__nf4"  # a JSON text, as bytes


class NF4(NamedTuple):
    """A weight in 4 bits; the fields are bitsandbytes' own.

    Without double quantization the nested ones are empty.
    """

    packed: Tensor  # ((n + 1) // 2, 1) uint8
    absmax: Tensor  # (blocks,) uint8 codes, or float32 without double quantization
    quant_map: Tensor  # (16,) float32
    nested_absmax: Tensor  # (blocks / 256,) float32
    nested_quant_map: Tensor  # (256,) float32
    nested_offset: Tensor  # () float32
    shape: tuple[int, int]  # (N, K): outputs, inputs
    dtype: torch.dtype  # of the weight before it was quantized
    blocksize: int

    @property
    def double(self) -> bool:
        """Whether the scales are quantized too."""
        return self.absmax.dtype == torch.uint8

    def to(self, device) -> NF4:
        return self._make(f.to(device) if isinstance(f, Tensor) else f for f in self)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of a bitsandbytes state dict, by what follows the layer's own name."""
        facts = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        state = {
            "weight": self.packed,
            "weight.absmax": self.absmax,
            "weight.quant_map": self.quant_map,
        }
        if self.double:
            facts["nested_blocksize"] = NESTED
            facts["nested_dtype"] = "float32"
            facts["nested_offset"] = self.nested_offset.item()
            state["weight.nested_absmax"] = self.nested_absmax
            state["weight.nested_quant_map"] = self.nested_quant_map
        text = json.dumps(facts).encode()
        state[STATE_KEY] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return state

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> NF4:
        """Return the weight of a `state`.

        ValueError for what bitsandbytes can write and this file does not read, and for a state that
        contradicts itself.
        """
        facts = read_facts(state)
        double = "nested_offset" in facts

        empty = state["weight.absmax"].new_empty(0, dtype=torch.float32)
        return cls(
            packed=state["weight"],
            absmax=state["weight.absmax"],
            quant_map=state["weight.quant_map"],
            nested_absmax=state["weight.nested_absmax"] if double else empty,
            nested_quant_map=state["weight.nested_quant_map"] if double else empty,
            nested_offset=empty.new_tensor(facts["nested_offset"] if double else 0.0),
            shape=tuple(facts["shape"]),
            dtype=getattr(torch, facts["dtype"]),
            blocksize=facts["blocksize"],
        )


def read_facts(state: dict[str, Tensor]) -> dict:
    """Return what a state says of its weight. ValueError unless its tensors fit to that."""
    try:
        facts = json.loads(bytes(state[STATE_KEY].tolist()))
        double = "nested_offset" in facts
        other_nesting = double and facts["nested_blocksize"] != NESTED
        other_type = facts["quant_type"] != "nf4"
        rows, columns = facts["shape"]
        sizes = (rows, columns, facts["blocksize"])
        known_dtype = facts["dtype"] in ("float32", "float16", "bfloat16")
        offset = facts.get("nested_offset", 0.0)
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise ValueError(f"{STATE_KEY} is not bitsandbytes' ({e})") from None
    if other_type or other_nesting:
        raise ValueError(f"only nf4 with a nested blocksize of {NESTED} is read, not {facts}")

    are_sizes = all(type(size) is int and 0 < size < 2**31 for size in sizes)
    is_float32 = type(offset) in (int, float) and abs(offset) < FLOAT32_MAX
    if not are_sizes or not known_dtype or not is_float32:
        raise ValueError(f"no nf4 weight has these facts: {facts}")

    # Each tensor by its type and how many numbers it has.
    numbers = rows * columns
    blocks = divide_up(numbers, facts["blocksize"])
    needed = {
        "weight": (torch.uint8, divide_up(numbers, 2)),
        "weight.absmax": (torch.uint8 if double else torch.float32, blocks),
        "weight.quant_map": (torch.float32, len(NF4_CODE)),
    }
    if double:
        needed["weight.nested_absmax"] = (torch.float32, divide_up(blocks, NESTED))
        needed["weight.nested_quant_map"] = (torch.float32, 256)
    for key, (dtype, count) in needed.items():
        tensor = state.get(key)
        if tensor is None or tensor.dtype != dtype or tensor.numel() != count:
            raise ValueError(f"{key} is not {count} numbers of {dtype}, as {STATE_KEY} says")
    return facts


# ------------------------------------------------------------------ quantize


def dynamic_map() -> Tensor:
    """Return the 256 codes of 8 bits, ascending.

    They are 0, 1, and in each of 7 decades equal steps of either sign, twice as many as in the
    decade below.
    """
    codes = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        steps = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        codes += steps.tolist()
        codes += (-steps).tolist()
    return torch.tensor(sorted(codes))


def _blocks(flat: Tensor, size: int) -> Tensor:
    """Return flat (n,) as (blocks, size) in float32, the last block filled up with zeros."""
    return F.pad(flat.float(), (0, -len(flat) % size)).view(-1, size)


def _scaled(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the blocks of flat (n,) divided by their largest magnitude, and that (blocks,)."""
    blocks = _blocks(flat, size)
    absmax = blocks.abs().amax(1)
    inverse = 1 / absmax.clamp(min=1e-38)  # a block of zeros stays zeros
    return blocks * inverse[:, None], absmax


def _nearest(x: Tensor, codes: Tensor) -> Tensor:
    """Return the indices of the nearest codes, flat, in uint8; a tie goes to the lower."""
    middles = (codes[:-1] + codes[1:]) / 2
    return torch.bucketize(x, middles, out_int32=True).to(torch.uint8).view(-1)


def quantize(weight: Tensor, double: bool = True, blocksize: int = 64) -> NF4:
    """Return weight (N, K), of any float dtype and on any device, in 4 bits.

    It takes a few hundred MB beyond the result, whatever the size of the weight.
    """
    code = torch.tensor(NF4_CODE, device=weight.device)
    packed_parts = []
    scales = []
    for part in weight.reshape(-1).split(blocksize * BLOCKS_AT_ONCE):
        scaled, scale = _scaled(part, blocksize)
        even = len(part) + len(part) % 2  # an odd count is filled up to a whole byte
        index = _nearest(scaled, code)[:even]
        packed_parts.append(index[::2] << 4 | index[1::2])
        scales.append(scale)
    packed = torch.cat(packed_parts)[:, None]
    absmax = torch.cat(scales)

    nested = absmax.new_empty(0)
    codes = absmax.new_empty(0)
    offset = absmax.new_zeros(())
    if double:
        blocks = len(absmax)
        codes = dynamic_map().to(weight.device)
        offset = absmax.mean()
        scaled, nested = _scaled(absmax - offset, NESTED)

        # bitsandbytes looks the 8-bit code up in a table of 65,536 steps over [-1, 1], so the scale
        # is first rounded to such a step. In a block of zeros it comes out at -1, which is code 0.
        step = ((scaled + 1) * 32767.5 + 0.5).floor()
        scaled = step / 32767.5 - 1 - (nested == 0)[:, None].float()
        absmax = _nearest(scaled, codes)[:blocks]

    shape = tuple(weight.shape)
    return NF4(packed, absmax, code, nested, codes, offset, shape, weight.dtype, blocksize)


def block_scales(q: NF4) -> Tensor:
    """Return the scale of each block, (blocks,) float32."""
    if not q.double:
        return q.absmax
    codes = q.nested_quant_map[q.absmax.int()]
    nested = F.pad(codes, (0, -len(codes) % NESTED)).view(-1, NESTED)
    return (nested * q.nested_absmax[:, None] + q.nested_offset).view(-1)[: len(codes)]


def reference(q: NF4, dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K) in dtype."""
    n = q.shape[0] * q.shape[1]
    scale = block_scales(q)

    # One look-up for the two numbers of a byte.
    pairs = torch.cartesian_prod(q.quant_map, q.quant_map)  # (256, 2)
    w = pairs[q.packed.view(-1).int()].view(-1)[:n]
    w = _blocks(w, q.blocksize) * scale[:, None]
    return w.view(-1)[:n].view(q.shape).to(dtype)


def reference_matmul(x: Tensor, q: NF4) -> Tensor:
    """Return x W^T: x (..., K) -> (..., N)."""
    return F.linear(x, reference(q, x.dtype))


# ------------------------------------------------------------------ Triton


@triton.jit
def unpack(
    PACKED,
    ABSMAX,
    MAP,
    ABSMAX2,
    MAP2,
    OFFSET,
    block,
    inside,
    size,
    HALF: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Return the numbers of quantization blocks `block` (N,) in float32, (N, 2 HALF).

    `size` is the bytes of PACKED.
    """
    at = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    byte = tl.load(PACKED + at, inside[:, None] & (at < size), 0).to(tl.int32)
    scale = tl.load(ABSMAX + block, inside, 0)
    if DOUBLE:
        nested = tl.load(ABSMAX2 + block // 256, inside, 0.0)
        scale = tl.load(MAP2 + scale.to(tl.int32)) * nested + tl.load(OFFSET)
    pair = tl.join(tl.load(MAP + (byte >> 4)), tl.load(MAP + (byte & 15)))  # (N, HALF, 2)
    return tl.reshape(pair, (block.shape[0], 2 * HALF)) * scale[:, None]


@triton.jit
def dequantize_kernel(
    PACKED,
    ABSMAX,
    MAP,
    ABSMAX2,
    MAP2,
    OFFSET,
    W,  # (n,)
    size,
    n,
    blocks,
    HALF: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Unpack BLOCKS quantization blocks per program: a scale is found once for its 64 numbers."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    w = unpack(PACKED, ABSMAX, MAP, ABSMAX2, MAP2, OFFSET, block, inside, size, HALF, DOUBLE)
    at = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(W + at, w.to(W.dtype.element_ty), at < n)


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    X,  # (M, K)
    PACKED,
    ABSMAX,
    MAP,
    ABSMAX2,
    MAP2,
    OFFSET,
    Y,  # (parts, M, N)
    size,
    M,
    N,
    K,
    HALF: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Multiply all rows of X by BLOCK_N rows of W, over every parts-th piece of the width.

    A piece is BLOCKS quantization blocks; a row of W is whole blocks.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    each = K // (2 * HALF)  # blocks of a row

    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(part * BLOCKS, each, tl.num_programs(1) * BLOCKS):
        b = first + tl.arange(0, BLOCKS)
        k = first * 2 * HALF + tl.arange(0, BLOCKS * 2 * HALF)
        x_at = X + m[:, None] * K + k[None, :]
        x = tl.load(x_at, (m < M)[:, None] & (k < K)[None, :], 0.0)

        block = tl.reshape(row[:, None] * each + b[None, :], (BLOCK_N * BLOCKS,))
        inside = tl.reshape((row < N)[:, None] & (b < each)[None, :], (BLOCK_N * BLOCKS,))
        w = unpack(PACKED, ABSMAX, MAP, ABSMAX2, MAP2, OFFSET, block, inside, size, HALF, DOUBLE)
        w = tl.reshape(w, (BLOCK_N, BLOCKS * 2 * HALF)).to(x.dtype)
        y = tl.dot(x, tl.trans(w), y, input_precision="ieee")

    at = (part * M + m)[:, None] * N + row[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), (m < M)[:, None] & (row < N)[None, :])


def tile_sizes(M: int) -> dict[str, int]:
    """Return the block sizes of `matmul_kernel` for M rows.

    A dot has 16 rows at least. With more of them half as much of W is in flight, as the sums of the
    rows take the registers.
    """
    rows = max(16, power_of_two(M))
    if rows == 16:
        return {"BLOCK_M": rows, "BLOCK_N": 16, "BLOCKS": 4}
    return {"BLOCK_M": rows, "BLOCK_N": 32, "BLOCKS": 1}


@operation("barellava::nf4_dequantize")
def _dequantize(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested: Tensor,
    codes: Tensor,
    offset: Tensor,
    rows: int,
    columns: int,
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    w = packed.new_empty(rows, columns, dtype=dtype)
    blocks = max(1, 2048 // blocksize)  # of a program: 2,048 numbers
    if w.numel():
        # Without fused multiply-add: bitsandbytes rounds code8 * A before it adds the mean.
        dequantize_kernel[(divide_up(len(absmax), blocks),)](
            packed,
            absmax,
            code,
            nested,
            codes,
            offset,
            w,
            packed.numel(),
            w.numel(),
            len(absmax),
            blocksize // 2,
            absmax.dtype == torch.uint8,
            blocks,
            enable_fp_fusion=False,
        )
    return w


@_dequantize.register_fake
def _(packed, absmax, code, nested, codes, offset, rows, columns, blocksize, dtype):
    return packed.new_empty(rows, columns, dtype=dtype)


@operation("barellava::nf4_matmul")
def _matmul(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested: Tensor,
    codes: Tensor,
    offset: Tensor,
    rows: int,
    blocksize: int,
) -> Tensor:
    """x (M, K) -> (M, rows)."""
    x = x.contiguous()
    M, K = x.shape

    # Four programs per multiprocessor hide each other's look-ups; a pipeline would copy every code
    # to shared memory. Where W has too few rows for that, its width is split as well and the parts
    # are summed in float32.
    sizes = tile_sizes(M)
    tiles = divide_up(rows, sizes["BLOCK_N"])
    pieces = K // blocksize // sizes["BLOCKS"]
    wanted = 4 * multiprocessors(x) // max(1, tiles)
    parts = max(1, min(wanted, pieces))
    y = x.new_empty(parts, M, rows, dtype=x.dtype if parts == 1 else torch.float32)
    if y.numel():
        matmul_kernel[(tiles, parts)](
            x,
            packed,
            absmax,
            code,
            nested,
            codes,
            offset,
            y,
            packed.numel(),
            M,
            rows,
            K,
            blocksize // 2,
            absmax.dtype == torch.uint8,
            **sizes,
            num_stages=1,
            enable_fp_fusion=False,
        )
    if parts == 1:
        return y[0]
    return y.sum(0).to(x.dtype)


@_matmul.register_fake
def _(x, packed, absmax, code, nested, codes, offset, rows, blocksize):
    return x.new_empty(x.size(0), rows)


# ------------------------------------------------------------------ public


def triton_dequantize(q: NF4, dtype: torch.dtype) -> Tensor:
    """Return what `reference` does, by Triton on any device (the interpreter, on a CPU)."""
    return _dequantize(*q[:6], *q.shape, q.blocksize, dtype)


def triton_matmul(x: Tensor, q: NF4) -> Tensor:
    """Return what `reference_matmul` does, by Triton on any device, for up to FEW rows."""
    y = _matmul(x.reshape(-1, x.size(-1)), *q[:6], q.shape[0], q.blocksize)
    return y.view(*x.shape[:-1], q.shape[0])


def dequantize(q: NF4, dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K) in dtype: bitsandbytes' numbers, bit for bit."""
    if fused(q.packed):
        return triton_dequantize(q, dtype)
    return reference(q, dtype)


def matmul(x: Tensor, q: NF4) -> Tensor:
    """Return x W^T in x's dtype, without a gradient: x (..., K) -> (..., N).

    W is rounded to x's dtype, the sum is float32. The fused kernel is for few rows of the 16-bit
    dtypes and rows of W that are whole blocks of 64, as every model's are.
    """
    K = x.size(-1)
    few = x.numel() <= FEW * K and x.element_size() == 2
    whole_blocks = q.blocksize == 64 and K % 64 == 0
    if few and whole_blocks and fused(x):
        return triton_matmul(x, q)
    return F.linear(x, dequantize(q, x.dtype))
