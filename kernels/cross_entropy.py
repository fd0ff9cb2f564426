"""The language model's head and its loss in one operation, over supervised positions only.

    loss = sum_t  logsumexp(z_t) - z_t[y_t],   z_t = W h_t + b          over t with y_t != -100

    dz_t = softmax(z_t) - onehot(y_t)      dh_t = W^T dz_t      dW = sum_t dz_t h_t^T      db = sum_t dz_t

T tokens, n of them supervised, D width, V vocabulary. Unsupervised rows are dropped before the product, so a row of 700
image positions and 20 answer tokens computes 20 rows of logits. The sum (not the mean) is returned: the caller
divides by the number of supervised tokens of the whole optimizer step, over micro-batches and ranks.

The gradients are computed in the forward pass, while the logits are there, and only scaled in the backward pass. Rows
are taken in chunks, so that at most CHUNK bytes of logits exist. Per chunk: one product makes z, one kernel reads it
twice and overwrites it with dz, two products make dh and dW. Large chunks keep the products at full rate: each reads W
once and adds to all of dW. Bytes moved: 3 n V elements of logits by the kernel, 2 n V by the products that follow,
and per chunk W twice and dW (float32 where there is more than one chunk) in and out.

Computing gradients in the forward pass is Liger-Kernel's method (Hsu et al., 2024); Cut Cross-Entropy (Wijmans et al.,
2024) keeps even a chunk out of memory and computes its logits again instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Build, Case, Mutation, fused, randn, tl, triton

IGNORE = -100
CHUNK = 512 << 20  # bytes of logits on a GPU: 1,766 rows of Qwen's 152k vocabulary in bfloat16
CHUNK_CPU = 128 << 20  # there float32 makes a second copy of them


def reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """hidden (T, D), weight (V, D), bias (V,) or None, targets (T,) -> the sum, with all logits at once."""
    rows = targets != IGNORE
    logits = F.linear(hidden[rows], weight.to(hidden.dtype), bias)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets[rows], reduction="sum")


@triton.jit
def logits(Z, B, start, V, z_row, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a row, -inf behind its end. Rows are padded: masked at z_row, not V, loads stay 16 bytes wide."""
    at = start + tl.arange(0, BLOCK)
    z = tl.load(Z + at, at < z_row, 0.0).to(tl.float32)
    if BIAS:
        z += tl.load(B + at, at < V, 0.0).to(tl.float32)
    return tl.where(at < V, z, float("-inf"))


@triton.jit
def rows_kernel(
    Z, B, TARGETS, LOSSES, V, z_row, BIAS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row of logits per program: its loss, and the gradient in the logits' place. z_row: elements between rows."""
    row = tl.program_id(0).to(tl.int64)
    Z += row * z_row
    target = tl.load(TARGETS + row)
    picked = tl.load(Z + target).to(tl.float32)
    if BIAS:
        picked += tl.load(B + target).to(tl.float32)
    largest, total = float("-inf"), 0.0
    for start in range(0, V, BLOCK):
        z = logits(Z, B, start, V, z_row, BIAS, BLOCK)
        top = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - top) + tl.sum(tl.exp(z - top), 0)
        largest = top
    tl.store(LOSSES + row, largest - picked + tl.log(total))
    if GRADIENT:
        share = 1.0 / total
        for start in range(0, V, BLOCK):
            z = logits(Z, B, start, V, z_row, BIAS, BLOCK)
            at = start + tl.arange(0, BLOCK)
            dz = tl.exp(z - largest) * share - tl.where(at == target, 1.0, 0.0)
            tl.store(Z + at, dz.to(Z.dtype.element_ty), at < z_row)


def triton_rows(
    z: Tensor, bias: Tensor | None, targets: Tensor, losses: Tensor, gradient: bool
) -> Tensor:
    """z (n, V) in rows of a multiple of 16 elements, targets (n,): fills losses (n,) and, over z, returns dz."""
    # 16 elements per thread: two 16-byte loads in flight, 6 programs to an SM
    block = min(4096, 1 << (z.size(1) - 1).bit_length())
    rows_kernel[(len(z),)](
        z, z if bias is None else bias, targets, losses, z.size(1), z.stride(0),
        BIAS=bias is not None, GRADIENT=gradient, BLOCK=block, num_warps=max(1, block // 512),
    )  # fmt: skip
    return z


def torch_rows(
    z: Tensor, bias: Tensor | None, targets: Tensor, losses: Tensor, gradient: bool
) -> Tensor:
    """The same in plain torch, with dz beside z."""
    y = F.log_softmax(z if bias is None else z + bias, -1, dtype=losses.dtype)
    torch.neg(y.gather(1, targets[:, None])[:, 0], out=losses)
    return (
        y.exp_().scatter_add_(1, targets[:, None], losses.new_full((len(z), 1), -1)).to(z.dtype)
        if gradient
        else y
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool):
    """total += a b, summed and kept in total's dtype where that is wider; the first product replaces total."""
    if not a.is_cuda:  # only CUDA has products of narrow matrices into a wide one
        a, b = a.to(total.dtype), b.to(total.dtype)
    wider = {} if a.dtype == total.dtype else {"out_dtype": total.dtype}
    torch.addmm(total, a, b, beta=0 if first else 1, out=total, **wider)


@torch.library.custom_op("barellava::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype, chunk: int, kernel: bool,
    with_dh: bool, with_dw: bool, with_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> loss, dh, dw, db (empty where not wanted). Products in `dtype`, `chunk` bytes of logits at a time.

    One operation for torch.compile although the number of supervised rows is only known at run time; reading that
    number is the one place where the CPU waits for the GPU.
    """
    at = (targets != IGNORE).nonzero()[:, 0]
    count, V = len(at), len(weight)
    most = max(1, chunk // (V * dtype.itemsize))
    chunks = max(1, -(-count // most))
    rows = max(1, -(-count // chunks))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    h, targets, w = hidden[at].to(dtype), targets[at], weight.to(dtype)
    dh = hidden.new_zeros(hidden.shape if with_dh else 0)
    # Rounded once, as one product would be: in bfloat16 a sum over chunks loses more than the products do.
    sum_dtype = weight.dtype if chunks == 1 and weight.dtype == dtype else wide
    make = torch.empty if count else torch.zeros
    dw = make(weight.shape if with_dw else 0, dtype=sum_dtype, device=weight.device)
    db = weight.new_zeros(V if with_db else 0, dtype=wide)
    losses = h.new_empty(count, dtype=wide)
    run = triton_rows if kernel else torch_rows
    # Rows start at multiples of 16 elements whatever the vocabulary: cuBLAS and wide loads need aligned ones.
    buffer = h.new_empty(rows, -(-V // 16) * 16)
    with torch.autocast(hidden.device.type, enabled=False):  # it would narrow the wide sum
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            z = buffer[: len(at[part]), :V]
            torch.mm(h[part], w.T, out=z)
            dz = run(z, bias, targets[part], losses[part], with_dh or with_dw or with_db)
            if with_dh:
                dh[at[part]] = torch.mm(dz, w).to(dh.dtype)
            if with_dw:
                _add_product(dw, dz.T, h[part], start == 0)
            if with_db:
                db += dz.sum(0, dtype=wide)
    return losses.sum(), dh, dw.to(weight.dtype), db.to(weight.dtype)


@_linear_cross_entropy.register_fake
def _(hidden, weight, bias, targets, dtype, chunk, kernel, with_dh, with_dw, with_db):
    loss = hidden.new_empty((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    dw = torch.empty(weight.shape if with_dw else 0, dtype=weight.dtype, device=weight.device)
    return (
        loss,
        hidden.new_empty(hidden.shape if with_dh else 0),
        dw,
        weight.new_empty(len(weight) if with_db else 0),
    )


def _save(ctx, inputs, output):
    ctx.wanted = inputs[-3:]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or backward would be given V x D zeros as the gradient of dw


def _gradients(ctx, dloss, *_):
    made = [
        g * dloss if wanted else None
        for g, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]
    return *made, *(None,) * 7


_linear_cross_entropy.register_autograd(_gradients, setup_context=_save)


def _run(hidden, weight, bias, targets, chunk: int, kernel: bool) -> Tensor:
    """Inside an operation autocast does not reach and what requires a gradient is not known: both are asked here."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    wanted = [
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (hidden, weight, bias)
    ]
    return _linear_cross_entropy(hidden, weight, bias, targets, dtype, chunk, kernel, *wanted)[0]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """hidden (T, D), weight (V, D), bias (V,) or None, targets (T,) with -100 unsupervised -> scalar float32 sum.

    Under autocast the products are in its dtype; gradients have their tensors' dtypes. No second derivatives.
    """
    if fused(hidden):
        return _run(hidden, weight, bias, targets, CHUNK, True)
    # One small chunk is left to autograd, which need not scale dw afterwards; under torch.compile it would break the
    # graph: the number of supervised rows is not known.
    if len(targets) * len(weight) * 4 <= CHUNK_CPU and not torch.compiler.is_compiling():
        return reference(hidden, weight, bias, targets)
    return _run(hidden, weight, bias, targets, CHUNK_CPU, False)


def _case(
    name: str,
    tokens: int,
    D: int,
    V: int,
    masked: float = 0.4,
    bias=False,
    chunk=CHUNK,
    scale=1.0,
    kernel=True,
):
    """`masked` of the targets are unsupervised, but never the first; 1.0 leaves that one, 2.0 none."""

    def inputs(g):
        targets = torch.randint(0, V, (tokens,), generator=g)
        off = torch.rand(tokens, generator=g) < masked
        off[:1] = masked > 1
        return (randn(g, tokens, D), randn(g, V, D, scale=scale), randn(g, V) if bias else None,
                targets.masked_fill(off, IGNORE))  # fmt: skip

    def run(hidden, weight, bias, targets):
        return _run(hidden, weight, bias, targets, chunk, kernel)

    return Case(name, run, reference, inputs, (0, 1, 2) if bias else (0, 1))


def _tied(function):
    """The embeddings of the targets themselves are the hidden states: one tensor, both gradients."""
    return lambda weight, targets: function(weight[targets.clamp(min=0)], weight, None, targets)


CASES = [
    _case("one row", 1, 24, 50, 0.0),
    _case("seven rows, bias", 7, 40, 130, bias=True),
    _case("129 rows", 129, 16, 67),
    _case("chunks", 129, 16, 67, chunk=4 * 67 * 20),
    _case("chunks, bias", 33, 16, 5003, bias=True, chunk=4 * 5003 * 7),
    _case("large logits", 9, 64, 4500, scale=12.0),
    _case("300k vocabulary", 3, 8, 300_007, 0.0),
    _case("one supervised", 30, 8, 33, 1.0, bias=True),
    _case("none supervised", 30, 8, 33, 2.0, bias=True),
    _case("no token", 0, 8, 33),
    _case("on the CPU", 33, 16, 503, bias=True, chunk=4 * 503 * 7, kernel=False),
    Case("tied", _tied(lambda *a: _run(*a, CHUNK, True)), _tied(reference),
         lambda g: (randn(g, 61, 24), torch.randint(0, 61, (9,), generator=g).index_fill(0, torch.tensor([2]), IGNORE)),
         (0,)),
]  # fmt: skip

_TYPES = {
    "Z": "*bf16",
    "B": "*bf16",
    "TARGETS": "*i64",
    "LOSSES": "*fp32",
    "V": "i32",
    "z_row": "i32:16",
}
BUILDS = [
    Build(rows_kernel, _TYPES, {"BIAS": bias, "GRADIENT": gradient, "BLOCK": 4096}, 8)
    for bias in (False, True)
    for gradient in (False, True)
]
MUTATIONS = [
    Mutation("- tl.where(at == target, 1.0, 0.0)", "", "129 rows"),
    Mutation("tl.sum(tl.exp(z - top), 0)", "tl.sum(tl.exp(z), 0)", "large logits"),
    Mutation("total * tl.exp(largest - top)", "total", "300k vocabulary"),
    Mutation("tl.where(at < V, z, float(\"-inf\"))", "z", "one row"),
    Mutation("dh[at[part]]", "dh[at[part] - 1]", "one supervised"),
    Mutation("h, targets, w = hidden[at]", "h, targets, w = hidden[at - 1]", "129 rows"),
    Mutation("start == 0)", "True)", "chunks"),
    Mutation("picked += tl.load(B + target)", "picked += 0 * tl.load(B + target)", "seven rows, bias"),
    Mutation("g * dloss", "g", "129 rows"),
    Mutation("z if bias is None else z + bias, -1", "z, -1", "on the CPU"),
]  # fmt: skip


if __name__ == "__main__":
    from bench.kernels import main

    main(["cross_entropy"])
