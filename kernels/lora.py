"""Low-rank adapters beside frozen (or trained) linears that share one input: q, k and v, or gate and up.

    y_g = x W_g^T + b_g + s_g h_g B_g^T        h_g = d_g(x) A_g^T        d_g(x) = m_g x / (1 - p), m_g(t, k) in {0, 1}

    dh_g = s_g dy_g B_g      dB_g = s_g dy_g^T h_g      dA_g = dh_g^T d_g(x)      dW_g = dy_g^T x      db_g = sum_t dy_g
    dx = sum_g dy_g W_g + m_g (dh_g A_g) / (1 - p)

T tokens, K inputs, N_g outputs, G adapters, r ranks (R: the largest, rounded up to a power of two). W is a tensor, or
an NF4 or Int8 weight that is unpacked in the forward pass, again in the backward pass, and never kept. Every adapter
drops other elements of x. The mask is a hash of (seed, element), two elements to a hash, made anew by the three kernels
that need it, so no mask and no dropped copy of x is stored. Saved for the backward pass: x and h.

Elements moved beside the frozen products: forward x in, h out (T K + T G R), y in and out once more as B is added to
it; backward x in for dA, dx in and out: 4 T K whatever G is. Separate operations with dropout move 10 T K per adapter,
and keep its dropped x and its mask. Without dropout all products are cuBLAS's, one for all adapters where it can be.

The products of A and B run in x's dtype with float32 sums, as they do under autocast: A and B are rounded to it first
and their gradients come back in their own dtype; h, y and dx are rounded to x's dtype.

Hu et al., LoRA, 2021; rsLoRA (Kalajdzievski, 2023) is another s. The hash is Wellons' lowbias32 with two keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Build, Case, Mutation, fused, int8, nf4, processors, randn, tl, triton

FORMATS = {nf4.NF4: nf4, int8.Int8: int8}
MAX_RANK = 256  # of the kernels: one program holds a row of h
LAUNCH = {"num_warps": 8, "num_stages": 2}

Weight = Tensor | nf4.NF4 | int8.Int8


def _mix(h, key):
    """A 32-bit hash in torch's int32, whose right shift must lose the sign; `mix` is the same in Triton's uint32."""
    h = (h ^ (h >> 16 & 0xFFFF)) * 0x21F0AAAD
    h = (h ^ (h >> 15 & 0x1FFFF) ^ key) * 0x735A2D97
    return h ^ (h >> 15 & 0x1FFFF)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """seed () int64 -> (rows, columns) bool, true with probability 1 - p to 2^-17: what dropout keeps, on any device.

    Two neighbours of a row share a hash, of pair i of the row-major order: hash(seed, i mod 2^32). One is kept where
    its lower, the other where its upper half is p 2^16 or more.
    """
    low, high = seed.to(torch.int32), (seed >> 32).to(torch.int32)
    first = _mix(low ^ 0x1E3779B9, high)
    second = _mix(high ^ 0x05EBCA6B, first)
    row, pair = (
        torch.arange(n, device=seed.device, dtype=torch.int32) for n in (rows, -(-columns // 2))
    )
    h = _mix(((row * len(pair))[:, None] + pair) ^ first, second)
    return (torch.stack([h, h >> 16], -1).flatten(1)[:, :columns] & 0xFFFF) >= round(p * 2**16)


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """-> the weight (N, K) in dtype, unpacked where it is quantized."""
    return (
        weight.to(dtype)
        if isinstance(weight, Tensor)
        else FORMATS[type(weight)].dequantize(weight, dtype)
    )


def reference(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None], As: Sequence[Tensor], Bs: Sequence[Tensor],
    scales: Sequence[float], p: float, seeds: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The arguments of `lora_linears`."""
    rows, ys = x.reshape(-1, x.size(-1)), []
    for g, (W, b, A, B, s) in enumerate(zip(weights, biases, As, Bs, scales, strict=True)):
        y = F.linear(rows, dense(W, x.dtype), None if b is None else b.to(x.dtype))
        d = rows * keep_mask(seeds[g], *rows.shape, p) / (1 - p) if p else rows
        y = torch.addmm(y, F.linear(d, A.to(x.dtype)), B.to(x.dtype).t(), alpha=s)
        ys.append(y.view(*x.shape[:-1], y.size(-1)))
    return tuple(ys)


@triton.jit
def mix(h, key):
    h = (h ^ (h >> 16)) * 0x21F0AAAD
    h = (h ^ (h >> 15) ^ key) * 0x735A2D97
    return h ^ (h >> 15)


@triton.jit
def kept(SEED, row, column, K, threshold):
    """keep_mask at rows (a, 1) and columns (1, b) -> (a, b)."""
    seed = tl.load(SEED)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    first = mix(low ^ 0x1E3779B9, high)
    second = mix(high ^ 0x05EBCA6B, first)
    row, column = (
        row.to(tl.uint32),
        column.to(tl.uint32),
    )  # the compiler sees that two columns of a thread are a pair
    h = mix((row * tl.cdiv(K, 2) + column // 2) ^ first, second)
    return (h >> column % 2 * 16 & 0xFFFF) >= threshold.to(tl.uint32)


@triton.jit
def dropped(X, SEED, first, K, k, T, threshold, BLOCK_T: tl.constexpr):
    """Rows `first` and on, columns k, of x, as its dropout leaves them: less the factor 1 / (1 - p)."""
    t = tl.arange(0, BLOCK_T)[:, None]
    inside = (t < T - first) & (k < K)[None, :]
    x = tl.load(X + first * K + (t * K + k[None, :]), inside, 0.0)
    return tl.where(kept(SEED, first + t, k[None, :], K, threshold), x, 0.0)


@triton.jit(do_not_specialize=["T"])
def down_kernel(
    X, A, SEEDS, H, T, K, G, threshold, scale, RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """h_g = d_g(x) A_g^T. The programs of one tile of x follow each other, so that it leaves memory once."""
    g, r, t = tl.program_id(0) % G, tl.arange(0, RANK), tl.arange(0, BLOCK_T)
    start = (tl.program_id(0) // G).to(tl.int64) * BLOCK_T
    h = tl.zeros(
        (RANK, BLOCK_T), tl.float32
    )  # transposed: with x on the left, Hopper's products wait for each other
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = dropped(X, SEEDS + g, start, K, k, T, threshold, BLOCK_T)
        a = tl.load(A + g * RANK * K + (r[:, None] * K + k[None, :]), (k < K)[None, :], 0.0)
        h = tl.dot(a, tl.trans(x), h, input_precision="ieee")
    at = H + (start * G + g) * RANK + (t[None, :] * (G * RANK) + r[:, None])
    tl.store(at, (h * scale).to(H.dtype.element_ty), (t < T - start)[None, :])


@triton.jit(do_not_specialize=["T"])
def gradient_kernel(
    X, DH, SEEDS, DA, T, K, G, threshold, scale, RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """dA_g = dh_g^T d_g(x) for BLOCK_K columns, over every SPLIT-th tile of tokens."""
    k, g, r = (
        tl.program_id(0) // G * BLOCK_K + tl.arange(0, BLOCK_K),
        tl.program_id(0) % G,
        tl.arange(0, RANK),
    )
    t, part = tl.arange(0, BLOCK_T), tl.program_id(1).to(tl.int64)
    da = tl.zeros((RANK, BLOCK_K), tl.float32)
    for start in range(part * BLOCK_T, T, tl.num_programs(1) * BLOCK_T):
        x = dropped(X, SEEDS + g, start, K, k, T, threshold, BLOCK_T)
        at = DH + (start * G + g) * RANK + (t[None, :] * (G * RANK) + r[:, None])
        dh = tl.load(at, (t < T - start)[None, :], 0.0)
        da = tl.dot(dh, x, da, input_precision="ieee")
    at = ((part * G + g) * RANK + r)[:, None] * K + k[None, :]
    tl.store(DA + at, da * scale, (k < K)[None, :])


@triton.jit(do_not_specialize=["T"])
def add_kernel(
    DH, A, SEEDS, DX, T, K, G, threshold, scale,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx += m_g (dh_g A_g) / (1 - p) over all adapters, in one pass over dx."""
    start, t = tl.program_id(0).to(tl.int64) * BLOCK_T, tl.arange(0, BLOCK_T)[:, None]
    k, inside = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :], t < T - start
    total = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for g in range(G):
        one = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
        for first in range(0, RANK, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            dh = tl.load(DH + (start * G + g) * RANK + (t * (G * RANK) + r[None, :]), inside, 0.0)
            a = tl.load(A + g * RANK * K + (r[:, None] * K + k), k < K, 0.0)
            one = tl.dot(dh, a, one, input_precision="ieee")
        total += tl.where(kept(SEEDS + g, start + t, k, K, threshold), one, 0.0)
    at, inside = DX + start * K + (t * K + k), inside & (k < K)
    tl.store(
        at,
        (tl.load(at, inside, 0.0).to(tl.float32) + total * scale).to(DX.dtype.element_ty),
        inside,
    )


def _rank(As: Sequence[Tensor]) -> int:
    return max(
        16, 1 << (max(len(A) for A in As) - 1).bit_length()
    )  # a dot has 16 rows and columns at least


def _stack(As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(r_g, K) each -> (G, R, K) in dtype, the missing ranks zero."""
    return torch.stack([F.pad(A.to(dtype), (0, 0, 0, _rank(As) - len(A))) for A in As])


def _flatten(weights: Sequence[Weight]) -> tuple[list[Tensor], list[int]]:
    """An operation takes a list of tensors: the first of every weight, then what quantized ones have besides.

    The form of a weight is 0 for a tensor, 1 for Int8 and the blocksize for NF4.
    """
    parts = [
        [W] if isinstance(W, Tensor) else [f for f in W if isinstance(f, Tensor)] for W in weights
    ]
    forms = [0 if isinstance(W, Tensor) else getattr(W, "blocksize", 1) for W in weights]
    return [first for first, *_ in parts] + [t for _, *rest in parts for t in rest], forms


def _restore(
    tensors: Sequence[Tensor], forms: Sequence[int], Bs: Sequence[Tensor], width: int
) -> list[Weight]:
    """The inverse of `_flatten`; the rows of B and the width of x are the shape of W."""
    G = len(forms)
    rest, weights = iter(tensors[G:]), []
    for first, form, B in zip(tensors[:G], forms, Bs, strict=True):
        if form == 0:
            weights.append(first)
        elif form == 1:
            weights.append(int8.Int8(first, next(rest)))
        else:
            weights.append(nf4.NF4(first, *islice(rest, 5), (len(B), width), torch.float32, form))
    return weights


def _product(x: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    """x W^T + b, where b is empty if there is none; a quantized W is not unpacked for the few rows of decoding."""
    bias = bias.to(x.dtype) if len(bias) else None
    if isinstance(weight, Tensor):
        return F.linear(x, weight.to(x.dtype), bias)
    y = FORMATS[type(weight)].matmul(x, weight)
    return y if bias is None else y.add_(bias)


def _tile(kernel: str, rank: int, dtype: torch.dtype) -> dict[str, int]:
    """Tokens and columns of a program, as many as keep its sums in registers."""
    narrow = {"down": (128, 64), "gradient": (64, 128), "add": (64, 128)}
    wide = {"down": (64, 64), "gradient": (64, 64), "add": (64, 128)}
    rows, columns = (32, 32) if dtype.itemsize > 2 else (narrow if rank <= 128 else wide)[kernel]
    return {"RANK": rank, "BLOCK_T": rows, "BLOCK_K": columns} | (
        {"BLOCK_R": min(rank, 64)} if kernel == "add" else {}
    )


@torch.library.custom_op("barellava::lora", mutates_args=())
def _lora(
    x: Tensor, tensors: Sequence[Tensor], forms: Sequence[int], biases: Sequence[Tensor], As: Sequence[Tensor],
    Bs: Sequence[Tensor], scales: Sequence[float], p: float, seeds: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """x (T, K) -> y of every adapter (T, N_g), and all h side by side (T, G R)."""
    x, (T, K), G, rank, A = x.contiguous(), x.shape, len(As), _rank(As), _stack(As, x.dtype)
    if p and T:
        h, tile = x.new_empty(T, G * rank), _tile("down", rank, x.dtype)
        grid = (G * triton.cdiv(T, tile["BLOCK_T"]),)
        down_kernel[grid](x, A, seeds, h, T, K, G, round(p * 2**16), 1 / (1 - p), **tile, **LAUNCH)
    else:
        h = x @ A.view(-1, K).t()
    ys = [_product(x, W, b) for W, b in zip(_restore(tensors, forms, Bs, K), biases, strict=True)]
    for g, (y, B, s) in enumerate(zip(ys, Bs, scales, strict=True)):
        y.addmm_(h.view(T, G, rank)[:, g, : B.size(1)], B.to(x.dtype).t(), alpha=s)
    return [*ys, h]


@_lora.register_fake
def _(x, tensors, forms, biases, As, Bs, scales, p, seeds):
    return [*(x.new_empty(len(x), len(B)) for B in Bs), x.new_empty(len(x), len(As) * _rank(As))]


@torch.library.custom_op("barellava::lora_backward", mutates_args=())
def _lora_backward(
    dys: Sequence[Tensor], x: Tensor, tensors: Sequence[Tensor], forms: Sequence[int], As: Sequence[Tensor],
    Bs: Sequence[Tensor], h: Tensor, scales: Sequence[float], p: float, seeds: Tensor | None, need: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """-> dx, every dA, every dB, every dW; dx and the dW are empty where `need` (of x and of each W) says so."""
    x, (T, K), G, rank, dtype = x.contiguous(), x.shape, len(As), _rank(As), x.dtype
    A, h, dh = _stack(As, dtype), h.view(T, G, rank), x.new_zeros(T, G, rank)
    dBs = []
    for g, (dy, B, s) in enumerate(zip(dys, Bs, scales, strict=True)):
        dh[:, g, : B.size(1)].addmm_(dy, B.to(dtype), beta=0, alpha=s)
        dB = dy.new_empty(B.shape).addmm_(dy.t(), h[:, g, : B.size(1)], beta=0, alpha=s)
        dBs.append(dB.to(B.dtype))
    dropout = round(p * 2**16), 1 / (1 - p)
    if p and T:
        tile = _tile("gradient", rank, dtype)
        tiles = G * triton.cdiv(K, tile["BLOCK_K"])
        # Two programs per multiprocessor; their sums are added in a fixed order.
        many = 2 * processors(x)
        split = max(1, min(many // tiles, T // 64))
        dA = x.new_empty(split, G, rank, K, dtype=torch.float32)
        gradient_kernel[(tiles, split)](x, dh, seeds, dA, T, K, G, *dropout, **tile, **LAUNCH)
        dA = dA.sum(0)
    else:
        dA = (dh.flatten(1).t() @ x).view(G, rank, K)
    dAs = [d[: len(a)].to(a.dtype, copy=True) for d, a in zip(dA, As, strict=True)]
    dx = x.new_empty(0)
    if need[0]:
        for g, (dy, W) in enumerate(zip(dys, _restore(tensors, forms, Bs, K), strict=True)):
            dx = dx.addmm_(dy, dense(W, dtype)) if g else dy @ dense(W, dtype)
        if p and T:
            tile = _tile("add", rank, dtype)
            grid = triton.cdiv(T, tile["BLOCK_T"]), triton.cdiv(K, tile["BLOCK_K"])
            add_kernel[grid](dh, A, seeds, dx, T, K, G, *dropout, **tile, **LAUNCH)
        else:
            dx.addmm_(dh.flatten(1), A.view(-1, K))
    each = zip(dys, tensors[:G], need[1:], strict=True)
    dWs = [(dy.t() @ x).to(W.dtype) if trained else x.new_empty(0) for dy, W, trained in each]
    return [dx, *dAs, *dBs, *dWs]


@_lora_backward.register_fake
def _(dys, x, tensors, forms, As, Bs, h, scales, p, seeds, need):
    dx, *dWs = [
        t.new_empty(t.shape if n else 0)
        for t, n in zip([x, *tensors[: len(As)]], need, strict=True)
    ]
    return [dx, *(t.new_empty(t.shape) for t in (*As, *Bs)), *dWs]


def _save(ctx, inputs, output):
    x, tensors, ctx.forms, biases, As, Bs, ctx.scales, ctx.p, seeds = inputs
    ctx.bias = [b.dtype for b in biases]
    ctx.set_materialize_grads(False)  # of h, and of outputs that nothing uses
    ctx.sizes = [2, len(tensors), len(As), len(Bs), 1]
    ctx.save_for_backward(x, output[-1], *tensors, *As, *Bs, seeds)


def _gradients(ctx, grads):
    each, need = iter(ctx.saved_tensors), ctx.needs_input_grad
    (x, h), tensors, As, Bs, (seeds,) = [list(islice(each, n)) for n in ctx.sizes]
    G = len(As)
    dys = [
        x.new_zeros(len(x), len(B)) if d is None else d.contiguous()
        for d, B in zip(grads[:-1], Bs, strict=True)
    ]
    needs = [need[0], *need[1][:G]]
    made = _lora_backward(dys, x, tensors, ctx.forms, As, Bs, h, ctx.scales, ctx.p, seeds, needs)
    dx, *dWs = [d if n else None for d, n in zip([made[0], *made[1 + 2 * G :]], needs, strict=True)]
    dbs = [d.sum(0, dtype=b) if n else None for d, b, n in zip(dys, ctx.bias, need[3], strict=True)]
    dWs = [*dWs, *[None] * (len(tensors) - G)]
    return dx, dWs, None, dbs, made[1 : 1 + G], made[1 + G : 1 + 2 * G], None, None, None


_lora.register_autograd(_gradients, setup_context=_save)


def triton_linears(x, weights, biases, As, Bs, scales, p, seeds):
    tensors, forms = _flatten(weights)
    biases = [x.new_empty(0) if b is None else b for b in biases]
    *ys, _ = _lora(x.reshape(-1, x.size(-1)), tensors, forms, biases, As, Bs, scales, p, seeds)
    return tuple(y.view(*x.shape[:-1], y.size(-1)) for y in ys)


def lora_linears(
    x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None], As: Sequence[Tensor], Bs: Sequence[Tensor],
    scales: Sequence[float], p: float = 0.0, seeds: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Linears of one input, each with its adapter: PEFT's W_g(x) + B_g(A_g(dropout(x))) scale_g.

    x (..., K); per adapter a weight (N_g, K) (a tensor, nf4.NF4 or int8.Int8), a bias (N_g,) or None, A (r_g, K),
    B (N_g, r_g) and scale -> y (..., N_g) each, in x's dtype, or in autocast's where that is on. p is the dropout of
    training (0: none); seeds (G,) int64 on x's device then say what is dropped. Drawn with torch.randint, they are
    drawn again alike where activations are recomputed. Gradients for x, A, B, and tensors and biases that ask for them.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    run = triton_linears if fused(x) and _rank(As) <= MAX_RANK else reference
    return run(x, list(weights), list(biases), list(As), list(Bs), list(scales), p, seeds)


def _case(
    name: str, T: int, K: int, widths: tuple[int, ...], ranks: tuple[int, ...], p: float, form: str = "plain",
    bias: bool = False, train: bool = False,
) -> Case:  # fmt: skip
    G = len(widths)
    make = {"plain": lambda w: w, "nf4": lambda w: nf4.quantize(w.float()), "int8": int8.quantize}[
        form
    ]

    def inputs(g):
        return (torch.randint(2**62, (G,), generator=g), randn(g, T, K),
                *(randn(g, n, K, scale=K**-0.5) for n in widths),
                *(randn(g, r, K, scale=K**-0.5) for r in ranks),
                *(randn(g, n, r, scale=r**-0.5) for n, r in zip(widths, ranks, strict=True)),
                *((randn(g, n) for n in widths) if bias else ()))  # fmt: skip

    def of(function):
        def call(seeds, x, *flat):
            Ws, As, Bs, bs = (flat[i * G : (i + 1) * G] for i in range(4))
            scales = [2.0, 0.5, 3.0][:G]
            return function(
                x,
                [make(w) for w in Ws],
                list(bs or [None] * G),
                list(As),
                list(Bs),
                scales,
                p,
                seeds,
            )

        return call

    grads = range(1, 2 + (4 if bias else 3) * G)
    return Case(name, of(triton_linears), of(reference), inputs,
                tuple(i for i in grads if train or not 2 <= i < 2 + G))  # fmt: skip


CASES = [
    _case("one adapter", 7, 40, (24,), (5,), 0.0),
    _case("one adapter, dropout", 129, 70, (24,), (5,), 0.25),
    _case("one token, rank 1, dropout", 1, 33, (17,), (1,), 0.25, bias=True),
    _case("no token, dropout", 0, 33, (17,), (4,), 0.25),
    _case("q, k, v", 7, 96, (96, 32, 32), (16, 16, 16), 0.0, bias=True),
    _case("q, k, v, dropout", 129, 96, (96, 32, 32), (16, 16, 16), 0.25, bias=True),
    _case("gate, up, trained, dropout", 33, 48, (50, 50), (64, 5), 0.25, bias=True, train=True),
    _case("gate, up, trained", 33, 48, (50, 50), (64, 5), 0.0, train=True),
    _case("rank 200, dropout", 9, 40, (24,), (200,), 0.25),
    _case("nf4, dropout", 9, 64, (40, 24), (16, 8), 0.25, "nf4", bias=True),
    _case("int8", 9, 65, (40,), (16,), 0.0, "int8"),
]

_P = {"SEEDS": "*i64", "T": "i32", "K": "i32:16", "G": "i32", "threshold": "i32", "scale": "fp32"}


def _builds(rank: int) -> list[Build]:
    types = {"down": {"X": "*bf16", "A": "*bf16", "H": "*bf16"}, "add": {"DH": "*bf16", "A": "*bf16", "DX": "*bf16"},
             "gradient": {"X": "*bf16", "DH": "*bf16", "DA": "*fp32"}}  # fmt: skip
    kernels = {"down": down_kernel, "gradient": gradient_kernel, "add": add_kernel}
    return [
        Build(k, _P | types[name], _tile(name, rank, torch.bfloat16), 8)
        for name, k in kernels.items()
    ]


BUILDS = [*_builds(128), *_builds(256)]
MUTATIONS = [
    Mutation("B.to(x.dtype).t(), alpha=s)\n    return [", "B.to(x.dtype).t())\n    return [", "one adapter"),
    Mutation("h.view(T, G, rank)[:, g,", "h.view(T, G, rank)[:, 0,", "q, k, v"),
    Mutation("dropped(X, SEEDS + g, start, K, k, T, threshold, BLOCK_T)\n        at",
             "dropped(X, SEEDS, start, K, k, T, threshold, BLOCK_T)\n        at", "q, k, v, dropout"),
    Mutation("tl.where(kept(SEEDS + g, start + t, k, K, threshold), one, 0.0)", "one", "one adapter, dropout"),
    Mutation("beta=0, alpha=s)\n        dB", "beta=0)\n        dB", "one adapter"),
    Mutation("total * scale)", "total)", "one adapter, dropout"),
]  # fmt: skip


if __name__ == "__main__":
    from bench.kernels import main

    main(["lora"])
