"""Low-rank adapters beside frozen (or trained) linears that share one input: q, k, v, or gate, up.

    y_g = x W_g^T + b_g + s_g h_g B_g^T          the linear and its adapter
    h_g = d_g(x) A_g^T
    d_g(x) = m_g x / (1 - p)                     dropout, m_g(t, k) in {0, 1}

    dh_g = s_g dy_g B_g         dB_g = s_g dy_g^T h_g         dA_g = dh_g^T d_g(x)
    dW_g = dy_g^T x             db_g = sum_t dy_g
    dx = sum_g dy_g W_g + m_g (dh_g A_g) / (1 - p)

    T tokens    K inputs    N_g outputs    G adapters    r_g ranks
    R the largest rank, rounded up to a power of two

W is a tensor, or an NF4 or Int8 weight that is unpacked in the forward pass, again in the backward
pass, and never kept. Every adapter drops other elements of x. The mask is a hash of (seed,
element), two elements to a hash, made anew by the three kernels that need it: no mask and no
dropped copy of x is stored. Saved for the backward pass: x and h.

Elements moved beside the frozen products: forward x in, h out (T K + T G R), y in and out once more
as B is added to it; backward x in for dA, dx in and out: 4 T K whatever G is. Separate operations
with dropout move 10 T K per adapter, and keep its dropped x and its mask. Without dropout all
products are cuBLAS's, one for all adapters where it can be.

The products of A and B run in x's dtype with float32 sums, as they do under autocast: A and B are
rounded to it first and their gradients come back in their own dtype; h, y and dx are rounded to x's
dtype.

The file in order: the dropout mask in torch, `reference`, the mask in Triton, `down_kernel` (h),
`gradient_kernel` (dA), `add_kernel` (dx), the operation `_lora`, its gradient `_lora_backward`, and
the public `lora_linears`.

Hu et al., LoRA, 2021; rsLoRA (Kalajdzievski, 2023) is another s. The hash is Wellons' lowbias32
with two keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kernels import (
    divide_up,
    fused,
    int8,
    multiprocessors,
    nf4,
    operation,
    power_of_two,
    tl,
    triton,
)

FORMATS = {nf4.NF4: nf4, int8.Int8: int8}
MAX_RANK = 256  # of the kernels: one program holds a row of h
LAUNCH = {"num_warps": 8, "num_stages": 2}

Weight = Tensor | nf4.NF4 | int8.Int8


# ------------------------------------------------------------------ the dropout mask, in torch


def _mix(h, key):
    """Return a 32-bit hash of h in torch's int32, whose right shift must lose the sign.

    `mix` is the same in Triton's uint32.
    """
    h = (h ^ (h >> 16 & 0xFFFF)) * 0x21F0AAAD
    h = (h ^ (h >> 15 & 0x1FFFF) ^ key) * 0x735A2D97
    return h ^ (h >> 15 & 0x1FFFF)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """Return what dropout keeps, on any device: (rows, columns) bool from seed () int64.

    It is true with probability 1 - p, to 2^-17. Two neighbours of a row share a hash, that of pair
    i of the row-major order: hash(seed, i mod 2^32). One is kept where its lower half is p 2^16 or
    more, the other where its upper half is.
    """
    low = seed.to(torch.int32)
    high = (seed >> 32).to(torch.int32)
    first = _mix(low ^ 0x1E3779B9, high)
    second = _mix(high ^ 0x05EBCA6B, first)

    pairs = divide_up(columns, 2)
    row = torch.arange(rows, device=seed.device, dtype=torch.int32)[:, None]
    pair = torch.arange(pairs, device=seed.device, dtype=torch.int32)
    h = _mix((row * pairs + pair) ^ first, second)  # (rows, pairs)
    halves = torch.stack([h, h >> 16], -1) & 0xFFFF  # (rows, pairs, 2)
    return halves.flatten(1)[:, :columns] >= _threshold(p)


def _threshold(p: float) -> int:
    """Return the least half of a hash that is kept."""
    return round(p * 2**16)


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K) in dtype, unpacked where it is quantized."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    return FORMATS[type(weight)].dequantize(weight, dtype)


def reference(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    p: float,
    seeds: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return what `lora_linears` does, with its arguments, in plain torch."""
    rows = x.reshape(-1, x.size(-1))  # (T, K)
    ys = []
    for g, (W, b, A, B, s) in enumerate(zip(weights, biases, As, Bs, scales, strict=True)):
        y = F.linear(rows, dense(W, x.dtype), None if b is None else b.to(x.dtype))
        kept_x = rows
        if p:
            kept_x = rows * keep_mask(seeds[g], *rows.shape, p) / (1 - p)
        h = F.linear(kept_x, A.to(x.dtype))  # (T, r)
        y = torch.addmm(y, h, B.to(x.dtype).t(), alpha=s)
        ys.append(y.view(*x.shape[:-1], y.size(-1)))
    return tuple(ys)


# ------------------------------------------------------------------ the dropout mask, in Triton


@triton.jit
def mix(h, key):
    """Return a 32-bit hash of h, uint32."""
    h = (h ^ (h >> 16)) * 0x21F0AAAD
    h = (h ^ (h >> 15) ^ key) * 0x735A2D97
    return h ^ (h >> 15)


@triton.jit
def kept(SEED, row, column, K, threshold):
    """Return `keep_mask` at rows (a, 1) and columns (1, b), (a, b)."""
    seed = tl.load(SEED)
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    first = mix(low ^ 0x1E3779B9, high)
    second = mix(high ^ 0x05EBCA6B, first)

    # The compiler sees that two columns of a thread are a pair, and computes one hash for both.
    row = row.to(tl.uint32)
    column = column.to(tl.uint32)
    h = mix((row * tl.cdiv(K, 2) + column // 2) ^ first, second)
    return (h >> column % 2 * 16 & 0xFFFF) >= threshold.to(tl.uint32)


@triton.jit
def load_dropped(X, SEED, first, K, k, T, threshold, BLOCK_T: tl.constexpr):
    """Return rows `first` and on, columns k, of x as its dropout leaves them.

    The factor 1 / (1 - p) is left to the caller, who multiplies the finished sum.
    """
    t = tl.arange(0, BLOCK_T)[:, None]
    inside = (t < T - first) & (k < K)[None, :]
    x = tl.load(X + first * K + (t * K + k[None, :]), inside, 0.0)
    return tl.where(kept(SEED, first + t, k[None, :], K, threshold), x, 0.0)


# ------------------------------------------------------------------ kernels


@triton.jit(do_not_specialize=["T"])
def down_kernel(
    X,  # (T, K)
    A,  # (G, R, K)
    SEEDS,  # (G,)
    H,  # (T, G, R)
    T,
    K,
    G,
    threshold,
    scale,  # 1 / (1 - p)
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute h_g = d_g(x) A_g^T for BLOCK_T tokens of one adapter per program.

    The programs of one tile of x follow each other, so that it leaves memory once. The sum is
    transposed, (RANK, BLOCK_T): with x on the left, Hopper's products would wait for each other.
    """
    g = tl.program_id(0) % G
    r = tl.arange(0, RANK)
    t = tl.arange(0, BLOCK_T)
    start = (tl.program_id(0) // G).to(tl.int64) * BLOCK_T

    h = tl.zeros((RANK, BLOCK_T), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = load_dropped(X, SEEDS + g, start, K, k, T, threshold, BLOCK_T)
        a_at = A + g * RANK * K + (r[:, None] * K + k[None, :])
        a = tl.load(a_at, (k < K)[None, :], 0.0)  # (RANK, BLOCK_K)
        h = tl.dot(a, tl.trans(x), h, input_precision="ieee")

    at = H + (start * G + g) * RANK + (t[None, :] * (G * RANK) + r[:, None])
    tl.store(at, (h * scale).to(H.dtype.element_ty), (t < T - start)[None, :])


@triton.jit(do_not_specialize=["T"])
def gradient_kernel(
    X,  # (T, K)
    DH,  # (T, G, R)
    SEEDS,  # (G,)
    DA,  # (parts, G, R, K) float32
    T,
    K,
    G,
    threshold,
    scale,  # 1 / (1 - p)
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute dA_g = dh_g^T d_g(x) for BLOCK_K columns, over every parts-th tile of tokens."""
    k = tl.program_id(0) // G * BLOCK_K + tl.arange(0, BLOCK_K)
    g = tl.program_id(0) % G
    r = tl.arange(0, RANK)
    t = tl.arange(0, BLOCK_T)
    part = tl.program_id(1).to(tl.int64)

    da = tl.zeros((RANK, BLOCK_K), tl.float32)
    for start in range(part * BLOCK_T, T, tl.num_programs(1) * BLOCK_T):
        x = load_dropped(X, SEEDS + g, start, K, k, T, threshold, BLOCK_T)
        at = DH + (start * G + g) * RANK + (t[None, :] * (G * RANK) + r[:, None])
        dh = tl.load(at, (t < T - start)[None, :], 0.0)  # (RANK, BLOCK_T)
        da = tl.dot(dh, x, da, input_precision="ieee")

    at = ((part * G + g) * RANK + r)[:, None] * K + k[None, :]
    tl.store(DA + at, da * scale, (k < K)[None, :])


@triton.jit(do_not_specialize=["T"])
def add_kernel(
    DH,  # (T, G, R)
    A,  # (G, R, K)
    SEEDS,  # (G,)
    DX,  # (T, K)
    T,
    K,
    G,
    threshold,
    scale,  # 1 / (1 - p)
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add sum_g m_g (dh_g A_g) / (1 - p) to dx, in one pass over dx."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = tl.arange(0, BLOCK_T)[:, None]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = t < T - start

    # The product of each adapter, of which its mask keeps a part.
    total = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for g in range(G):
        one = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        for first in range(0, RANK, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            dh_at = DH + (start * G + g) * RANK + (t * (G * RANK) + r[None, :])
            dh = tl.load(dh_at, inside, 0.0)  # (BLOCK_T, BLOCK_R)
            a_at = A + g * RANK * K + (r[:, None] * K + k)
            a = tl.load(a_at, k < K, 0.0)  # (BLOCK_R, BLOCK_K)
            one = tl.dot(dh, a, one, input_precision="ieee")
        total += tl.where(kept(SEEDS + g, start + t, k, K, threshold), one, 0.0)

    at = DX + start * K + (t * K + k)
    inside = inside & (k < K)
    dx = tl.load(at, inside, 0.0).to(tl.float32) + total * scale
    tl.store(at, dx.to(DX.dtype.element_ty), inside)


# Tokens and columns of a program, as many as keep its sums in registers.
TILES = {"down": (128, 64), "gradient": (64, 128), "add": (64, 128)}
TILES_ABOVE_RANK_128 = {"down": (64, 64), "gradient": (64, 64), "add": (64, 128)}
TILE_FLOAT32 = (32, 32)
TILE_FLOAT32_ABOVE_RANK_128 = (32, 16)


def tile_sizes(kernel: str, rank: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the constants of "down", "gradient" or "add"."""
    if dtype.itemsize > 2 and rank <= 128:
        tokens, columns = TILE_FLOAT32
    elif dtype.itemsize > 2:
        tokens, columns = TILE_FLOAT32_ABOVE_RANK_128
    elif rank <= 128:
        tokens, columns = TILES[kernel]
    else:
        tokens, columns = TILES_ABOVE_RANK_128[kernel]

    sizes = {"RANK": rank, "BLOCK_T": tokens, "BLOCK_K": columns}
    if kernel == "add":
        sizes["BLOCK_R"] = min(rank, 64)
    return sizes


# ------------------------------------------------------------------ what an operation may be given


def _rank(As: Sequence[Tensor]) -> int:
    """Return R, at least the 16 rows and columns of a dot."""
    return max(16, power_of_two(max(len(A) for A in As)))


def _stack(As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return all A, (r_g, K) each, as (G, R, K) in dtype; the missing ranks are zero."""
    rank = _rank(As)
    padded = []
    for A in As:
        missing = rank - len(A)
        A = A.to(dtype)
        padded.append(F.pad(A, (0, 0, 0, missing)) if missing else A)

    # One adapter, as most linears have it, is not copied.
    if len(padded) == 1:
        return padded[0][None]
    return torch.stack(padded)


# An operation takes lists of tensors and of numbers, so a quantized weight is taken apart for it.
# Its form is 0 for a tensor, 1 for Int8 and the blocksize for NF4.
TENSOR = 0
INT8 = 1


def _flatten(weights: Sequence[Weight]) -> tuple[list[Tensor], list[int]]:
    """Return all tensors and the form of each weight.

    First comes one tensor of every weight, then what the quantized ones have besides.
    """
    firsts = []
    others = []
    forms = []
    for weight in weights:
        if isinstance(weight, Tensor):
            firsts.append(weight)
            forms.append(TENSOR)
            continue
        first, *rest = [field for field in weight if isinstance(field, Tensor)]
        firsts.append(first)
        others += rest
        forms.append(INT8 if isinstance(weight, int8.Int8) else weight.blocksize)
    return firsts + others, forms


def _restore(
    tensors: Sequence[Tensor], forms: Sequence[int], Bs: Sequence[Tensor], width: int
) -> list[Weight]:
    """Return the weights that `_flatten` took apart; W is (rows of B, width of x)."""
    G = len(forms)
    others = iter(tensors[G:])
    weights = []
    for first, form, B in zip(tensors[:G], forms, Bs, strict=True):
        if form == TENSOR:
            weights.append(first)
        elif form == INT8:
            weights.append(int8.Int8(first, next(others)))
        else:
            shape = (len(B), width)
            weights.append(nf4.NF4(first, *islice(others, 5), shape, torch.float32, form))
    return weights


def _product(x: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    """Return x W^T + b, where b is empty if there is none.

    A quantized W is not unpacked for the few rows of decoding.
    """
    bias = bias.to(x.dtype) if len(bias) else None
    if isinstance(weight, Tensor):
        return F.linear(x, weight.to(x.dtype), bias)
    y = FORMATS[type(weight)].matmul(x, weight)
    return y if bias is None else y.add_(bias)


# ------------------------------------------------------------------ the operation


@operation("barellava::lora")
def _lora(
    x: Tensor,
    tensors: Sequence[Tensor],
    forms: Sequence[int],
    biases: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    p: float,
    seeds: Tensor | None,
) -> list[Tensor]:
    """x (T, K) -> y of every adapter (T, N_g), and all h side by side (T, G R)."""
    x = x.contiguous()
    T, K = x.shape
    G = len(As)
    rank = _rank(As)
    A = _stack(As, x.dtype)

    # h = d(x) A^T, for all adapters.
    if p and T:
        h = x.new_empty(T, G * rank)
        sizes = tile_sizes("down", rank, x.dtype)
        grid = (G * divide_up(T, sizes["BLOCK_T"]),)
        down_kernel[grid](x, A, seeds, h, T, K, G, _threshold(p), 1 / (1 - p), **sizes, **LAUNCH)
    else:
        h = x @ A.view(-1, K).t()

    # y = x W^T + b, then s h B^T is added to it in place.
    ys = []
    for weight, bias in zip(_restore(tensors, forms, Bs, K), biases, strict=True):
        ys.append(_product(x, weight, bias))
    each_h = h.view(T, G, rank)
    for g, (y, B, s) in enumerate(zip(ys, Bs, scales, strict=True)):
        y.addmm_(each_h[:, g, : B.size(1)], B.to(x.dtype).t(), alpha=s)
    return [*ys, h]


@_lora.register_fake
def _(x, tensors, forms, biases, As, Bs, scales, p, seeds):
    ys = [x.new_empty(len(x), len(B)) for B in Bs]
    return [*ys, x.new_empty(len(x), len(As) * _rank(As))]


# ------------------------------------------------------------------ its gradient


def _gradient_of_A(
    x: Tensor, dh: Tensor, As: Sequence[Tensor], p: float, seeds: Tensor | None
) -> list[Tensor]:
    """Return dA_g = dh_g^T d_g(x) of every adapter, in A's dtype; dh (T, G, R)."""
    T, G, rank = dh.shape
    K = x.size(1)
    if p and T:
        # Two programs per multiprocessor; their sums are added in a fixed order.
        sizes = tile_sizes("gradient", rank, x.dtype)
        tiles = G * divide_up(K, sizes["BLOCK_K"])
        parts = max(1, min(2 * multiprocessors(x) // tiles, T // 64))
        dA = x.new_empty(parts, G, rank, K, dtype=torch.float32)
        gradient_kernel[(tiles, parts)](
            x, dh, seeds, dA, T, K, G, _threshold(p), 1 / (1 - p), **sizes, **LAUNCH
        )
        dA = dA.sum(0) if parts > 1 else dA[0]
    else:
        dA = (dh.flatten(1).t() @ x).view(G, rank, K)

    # Without the ranks that were filled up; a copy, as an operation may not return views.
    dAs = []
    for padded, A in zip(dA, As, strict=True):
        dAs.append(padded[: len(A)].to(A.dtype, copy=True))
    return dAs


def _gradient_of_x(
    dys: Sequence[Tensor],
    weights: Sequence[Weight],
    dh: Tensor,
    A: Tensor,
    p: float,
    seeds: Tensor | None,
) -> Tensor:
    """Return dx = sum_g dy_g W_g + m_g (dh_g A_g) / (1 - p); dh (T, G, R), A (G, R, K)."""
    T, G, rank = dh.shape
    K = A.size(2)
    dx = dys[0] @ dense(weights[0], A.dtype)
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        dx = dx.addmm_(dy, dense(weight, A.dtype))

    if p and T:
        sizes = tile_sizes("add", rank, A.dtype)
        grid = divide_up(T, sizes["BLOCK_T"]), divide_up(K, sizes["BLOCK_K"])
        add_kernel[grid](dh, A, seeds, dx, T, K, G, _threshold(p), 1 / (1 - p), **sizes, **LAUNCH)
    else:
        dx.addmm_(dh.flatten(1), A.view(-1, K))
    return dx


@operation("barellava::lora_backward")
def _lora_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    tensors: Sequence[Tensor],
    forms: Sequence[int],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    h: Tensor,
    scales: Sequence[float],
    p: float,
    seeds: Tensor | None,
    need: Sequence[bool],
) -> list[Tensor]:
    """-> dx, every dA, every dB, every dW.

    `need` says of x and of each W whether its gradient is wanted; it is empty otherwise.
    """
    x = x.contiguous()
    T, K = x.shape
    G = len(As)
    rank = _rank(As)
    A = _stack(As, x.dtype)
    h = h.view(T, G, rank)

    # dh = s dy B and dB = s dy^T h. The ranks that were filled up stay 0 in dh.
    dh = x.new_zeros(T, G, rank)
    dBs = []
    for g, (dy, B, s) in enumerate(zip(dys, Bs, scales, strict=True)):
        r = B.size(1)
        dh[:, g, :r].addmm_(dy, B.to(x.dtype), beta=0, alpha=s)
        dB = dy.new_empty(B.shape).addmm_(dy.t(), h[:, g, :r], beta=0, alpha=s)
        dBs.append(dB.to(B.dtype))

    dAs = _gradient_of_A(x, dh, As, p, seeds)
    dx = x.new_empty(0)
    if need[0]:
        dx = _gradient_of_x(dys, _restore(tensors, forms, Bs, K), dh, A, p, seeds)

    dWs = []
    for dy, weight, trained in zip(dys, tensors[:G], need[1:], strict=True):
        dWs.append((dy.t() @ x).to(weight.dtype) if trained else x.new_empty(0))
    return [dx, *dAs, *dBs, *dWs]


@_lora_backward.register_fake
def _(dys, x, tensors, forms, As, Bs, h, scales, p, seeds, need):
    wanted = []
    for t, needed in zip([x, *tensors[: len(As)]], need, strict=True):
        wanted.append(t.new_empty(t.shape if needed else 0))
    dx, *dWs = wanted
    dABs = [t.new_empty(t.shape) for t in (*As, *Bs)]
    return [dx, *dABs, *dWs]


def _save(ctx, inputs, output):
    x, tensors, ctx.forms, biases, As, Bs, ctx.scales, ctx.p, seeds = inputs
    ctx.bias_dtypes = [b.dtype for b in biases]
    ctx.set_materialize_grads(False)  # of h, and of outputs that nothing uses
    ctx.save_for_backward(x, output[-1], seeds, *tensors, *As, *Bs)


def _gradients(compute, ctx, grads, need_x, need_tensors, need_biases):
    """Return dx, and the gradients of the tensors, the biases, the As and the Bs, in lists.

    `compute` is _lora_backward, as it is to be called here. need_*: which gradients are wanted.
    """
    # Tensors are saved in one list: take its parts out again.
    G = len(ctx.forms)
    x, h, seeds, *lists = ctx.saved_tensors
    tensors = lists[: -2 * G]
    As = lists[-2 * G : -G]
    Bs = lists[-G:]

    dys = []
    for dy, B in zip(grads[:-1], Bs, strict=True):
        dys.append(x.new_zeros(len(x), len(B)) if dy is None else dy.contiguous())

    need = [need_x, *need_tensors[:G]]
    dx, *rest = compute(dys, x, tensors, ctx.forms, As, Bs, h, ctx.scales, ctx.p, seeds, need)
    dAs = rest[:G]
    dBs = rest[G : 2 * G]

    dx = dx if need_x else None
    dWs = [None] * len(tensors)
    for g, dW in enumerate(rest[2 * G :]):
        if need_tensors[g]:
            dWs[g] = dW
    dbs = []
    for dy, dtype, needed in zip(dys, ctx.bias_dtypes, need_biases, strict=True):
        dbs.append(dy.sum(0, dtype=dtype) if needed else None)
    return dx, dWs, dbs, dAs, dBs


def _gradients_of_lists(ctx, grads):
    """Return the gradients of the arguments of `_lora` as torch.library takes them."""
    need_x, need_tensors, _, need_biases = ctx.needs_input_grad[:4]
    compute = _lora_backward.registered
    dx, dWs, dbs, dAs, dBs = _gradients(compute, ctx, grads, need_x, need_tensors, need_biases)
    return dx, dWs, None, dbs, dAs, dBs, None, None, None


class _Recorded(Function):
    """`_lora` for autograd, which sees no tensors in lists: here they are arguments themselves."""

    @staticmethod
    def forward(ctx, x, seeds, forms, scales, p, *lists):
        G = len(forms)
        tensors = lists[: -3 * G]
        biases = lists[-3 * G : -2 * G]
        As = lists[-2 * G : -G]
        Bs = lists[-G:]
        inputs = (x, tensors, forms, biases, As, Bs, scales, p, seeds)
        output = _lora.run(*inputs)
        _save(ctx, inputs, output)
        return tuple(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        G = len(ctx.forms)
        need_x, _, _, _, _, *needs = ctx.needs_input_grad
        compute = _lora_backward.run
        dx, dWs, dbs, dAs, dBs = _gradients(
            compute, ctx, grads, need_x, needs[: -3 * G], needs[-3 * G : -2 * G]
        )
        return dx, None, None, None, None, *dWs, *dbs, *dAs, *dBs


def _record(x, tensors, forms, biases, As, Bs, scales, p, seeds) -> tuple[Tensor, ...]:
    return _Recorded.apply(x, seeds, forms, scales, p, *tensors, *biases, *As, *Bs)


_lora.recorded = _record
_lora.registered.register_autograd(_gradients_of_lists, setup_context=_save)


# ------------------------------------------------------------------ public


def triton_linears(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    p: float,
    seeds: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return what `reference` does, by Triton on any device (the interpreter, on a CPU)."""
    tensors, forms = _flatten(weights)
    biases = [x.new_empty(0) if b is None else b for b in biases]
    rows = x
    if x.dim() != 2:
        rows = x.reshape(-1, x.size(-1))
    *ys, _ = _lora(rows, tensors, forms, biases, As, Bs, scales, p, seeds)
    if x.dim() == 2:
        return tuple(ys)
    return tuple(y.view(*x.shape[:-1], y.size(-1)) for y in ys)


def lora_linears(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    p: float = 0.0,
    seeds: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return linears of one input, each with its adapter.

    In PEFT's words, W_g(x) + B_g(A_g(dropout(x))) scale_g. x (..., K); per adapter a weight (N_g,
    K) (a tensor, nf4.NF4 or int8.Int8), a bias (N_g,) or None, A (r_g, K), B (N_g, r_g) and a scale
    -> y (..., N_g) each, in x's dtype, or in autocast's where that is on.

    p is the dropout of training (0: none); seeds (G,) int64 on x's device then say what is dropped.
    Drawn with torch.randint, they are drawn again alike where activations are recomputed. Gradients
    for x, A, B, and for those tensors and biases that ask for them.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    run = triton_linears if fused(x) and _rank(As) <= MAX_RANK else reference
    return run(x, list(weights), list(biases), list(As), list(Bs), list(scales), p, seeds)
