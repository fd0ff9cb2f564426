"""The language model's head and its loss in one operation, over supervised positions only.

    loss = sum_t  logsumexp(z_t) - z_t[y_t],   z_t = W h_t + b          over t with y_t != -100

    dz_t = softmax(z_t) - onehot(y_t)
    dh_t = W^T dz_t      dW = sum_t dz_t h_t^T      db = sum_t dz_t

T tokens, n of them supervised, D width, V vocabulary. Unsupervised rows are dropped before the
product, so a row of 700 image positions and 20 answer tokens computes 20 rows of logits. The sum,
not the mean, is returned: the caller divides by the number of supervised tokens of the whole
optimizer step, over micro-batches and ranks.

The gradients are computed in the forward pass, while the logits are there, and only scaled in the
backward pass. Rows are taken in chunks, so that at most CHUNK bytes of logits exist. For each chunk

    one product makes z,
    one kernel (`rows_kernel`) reads z twice and overwrites it with dz,
    two products make dh and dW.

Large chunks keep the products at full rate, as each reads W once and adds to all of dW. Bytes
moved: 3 n V elements of logits by the kernel, 2 n V by the products that follow, and per chunk W
twice and dW (float32 where there is more than one chunk) in and out.

The file in order: reference, the kernel, the same rows in plain torch, the operation over chunks
(`_linear_cross_entropy`), its gradient, and the public `linear_cross_entropy`.

Computing gradients in the forward pass is Liger-Kernel's method (Hsu et al., 2024); Cut
Cross-Entropy (Wijmans et al., 2024) keeps even a chunk out of memory and computes its logits again
instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import divide_up, fused, operation, power_of_two, tl, triton

IGNORE = -100
CHUNK = 512 << 20  # bytes of logits on a GPU: 1,766 rows of Qwen's 152k vocabulary in bfloat16
CHUNK_CPU = 128 << 20  # on a CPU float32 makes a second copy of them


def reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return the sum of the losses, with all logits at once.

    hidden (T, D), weight (V, D), bias (V,) or None, targets (T,).
    """
    rows = targets != IGNORE
    logits = F.linear(hidden[rows], weight.to(hidden.dtype), bias)  # (n, V)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets[rows], reduction="sum")


# ------------------------------------------------------------------ one row of logits


@triton.jit
def load_logits(Z, B, start, V, z_row, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Return a block of a row in float32, -inf beyond its end.

    Rows are padded to z_row elements. The load is masked at z_row and not at V: z_row is a multiple
    of 16, so loads stay 16 bytes wide.
    """
    at = start + tl.arange(0, BLOCK)
    z = tl.load(Z + at, at < z_row, 0.0).to(tl.float32)
    if BIAS:
        z += tl.load(B + at, at < V, 0.0).to(tl.float32)
    return tl.where(at < V, z, float("-inf"))


@triton.jit
def rows_kernel(
    Z,  # (n, V), z_row elements from row to row: logits, then dz in their place
    B,  # (V,) if BIAS
    TARGETS,  # (n,)
    LOSSES,  # (n,) float32
    V,
    z_row,
    BIAS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the loss of one row per program, and if GRADIENT write dz over the row's logits."""
    row = tl.program_id(0).to(tl.int64)
    Z += row * z_row
    target = tl.load(TARGETS + row)
    picked = tl.load(Z + target).to(tl.float32)
    if BIAS:
        picked += tl.load(B + target).to(tl.float32)

    # First pass: the largest logit and the sum of exp(z - largest). Where a block has a larger
    # one, the sum so far is scaled down to it, so that no exponential is above 1.
    largest = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        z = load_logits(Z, B, start, V, z_row, BIAS, BLOCK)
        new = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(z - new), 0)
        largest = new
    tl.store(LOSSES + row, largest - picked + tl.log(total))

    # Second pass: dz = softmax(z) - onehot(target). The padding becomes 0, which exp(-inf) is.
    if GRADIENT:
        share = 1.0 / total
        for start in range(0, V, BLOCK):
            z = load_logits(Z, B, start, V, z_row, BIAS, BLOCK)
            at = start + tl.arange(0, BLOCK)
            dz = tl.exp(z - largest) * share - tl.where(at == target, 1.0, 0.0)
            tl.store(Z + at, dz.to(Z.dtype.element_ty), at < z_row)


def triton_rows(
    z: Tensor, bias: Tensor | None, targets: Tensor, losses: Tensor, gradient: bool
) -> Tensor:
    """Fill losses (n,), and return dz, which is written over z where `gradient`.

    z (n, V) in rows that are a multiple of 16 elements apart, targets (n,).
    """
    # 16 elements per thread: two 16-byte loads in flight, 6 programs on a multiprocessor.
    block = min(4096, power_of_two(z.size(1)))
    rows_kernel[(len(z),)](
        z,
        z if bias is None else bias,
        targets,
        losses,
        z.size(1),
        z.stride(0),
        BIAS=bias is not None,
        GRADIENT=gradient,
        BLOCK=block,
        num_warps=max(1, block // 512),
    )
    return z


def torch_rows(
    z: Tensor, bias: Tensor | None, targets: Tensor, losses: Tensor, gradient: bool
) -> Tensor:
    """Do the same as `triton_rows` in plain torch; dz is a new tensor."""
    logits = z if bias is None else z + bias
    log_p = F.log_softmax(logits, -1, dtype=losses.dtype)
    column = targets[:, None]
    torch.neg(log_p.gather(1, column)[:, 0], out=losses)
    if not gradient:
        return log_p

    # In place: on a CPU the copies of the logits are what takes memory.
    minus_one = losses.new_full((len(z), 1), -1)
    return log_p.exp_().scatter_add_(1, column, minus_one).to(z.dtype)


# ------------------------------------------------------------------ the operation, over chunks


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool):
    """Add a b to total, summed in total's dtype where that is wider; the first replaces total."""
    beta = 0 if first else 1
    if not a.is_cuda:  # only CUDA multiplies narrow matrices into a wide one
        a = a.to(total.dtype)
        b = b.to(total.dtype)
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    else:
        torch.addmm(total, a, b, beta=beta, out=total, out_dtype=total.dtype)


@operation("barellava::linear_cross_entropy")
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    dtype: torch.dtype,
    chunk: int,
    kernel: bool,
    with_dh: bool,
    with_dw: bool,
    with_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> loss, dh, dw, db (empty where not wanted). Products in `dtype`, `chunk` bytes of logits.

    It is one operation for torch.compile, although the number of supervised rows is known only at
    run time. Without `rows` the CPU waits for the GPU to read that number.
    """
    # The supervised rows, in chunks of equal size.
    at = rows  # (n,)
    if at is None:
        at = (targets != IGNORE).nonzero()[:, 0]
    count = len(at)
    V = len(weight)
    most_rows = max(1, chunk // (V * dtype.itemsize))
    chunks = max(1, divide_up(count, most_rows))
    height = max(1, divide_up(count, chunks))
    h = hidden[at].to(dtype)  # (n, D)
    targets = targets[at]
    w = weight.to(dtype)

    # dW is rounded once, as one product would be: in bfloat16 a sum over chunks loses more than the
    # products do.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sum_dtype = wide
    if chunks == 1 and weight.dtype == dtype:
        sum_dtype = weight.dtype

    losses = h.new_empty(count, dtype=wide)
    dh = hidden.new_zeros(hidden.shape if with_dh else 0)
    make = torch.empty if count else torch.zeros  # the first product replaces what is there
    dw = make(weight.shape if with_dw else 0, dtype=sum_dtype, device=weight.device)
    db = weight.new_zeros(V if with_db else 0, dtype=wide)

    # Rows start at multiples of 16 elements whatever the vocabulary: cuBLAS and wide loads need
    # them aligned.
    buffer = h.new_empty(height, divide_up(V, 16) * 16)
    run = triton_rows if kernel else torch_rows
    gradient = with_dh or with_dw or with_db

    with torch.autocast(hidden.device.type, enabled=False):  # it would narrow the wide sum
        for start in range(0, count, height):
            part = slice(start, start + height)
            z = buffer[: len(at[part]), :V]
            torch.mm(h[part], w.T, out=z)
            dz = run(z, bias, targets[part], losses[part], gradient)
            if with_dh:
                dh[at[part]] = torch.mm(dz, w).to(dh.dtype)
            if with_dw:
                _add_product(dw, dz.T, h[part], first=start == 0)
            if with_db:
                db += dz.sum(0, dtype=wide)
    return losses.sum(), dh, dw.to(weight.dtype), db.to(weight.dtype)


@_linear_cross_entropy.register_fake
def _(hidden, weight, bias, targets, rows, dtype, chunk, kernel, with_dh, with_dw, with_db):
    loss_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    loss = hidden.new_empty((), dtype=loss_dtype)
    dh = hidden.new_empty(hidden.shape if with_dh else 0)
    dw = torch.empty(weight.shape if with_dw else 0, dtype=weight.dtype, device=weight.device)
    db = weight.new_empty(len(weight) if with_db else 0)
    return loss, dh, dw, db


def _save(ctx, inputs, output):
    _, dh, dw, db = output
    ctx.wanted = inputs[-3:]
    ctx.save_for_backward(dh, dw, db)
    ctx.mark_non_differentiable(dh, dw, db)


def _gradients(_, ctx, dloss, *others):
    scaled = []
    for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True):
        scaled.append(gradient * dloss if wanted else None)
    dh, dw, db = scaled
    return dh, dw, db, None, None, None, None, None, None, None, None


_linear_cross_entropy.register_gradient(_save, _gradients)


# ------------------------------------------------------------------ public


def chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk: int,
    kernel: bool,
    rows: Tensor | None = None,
) -> Tensor:
    """Return the sum of the losses with `chunk` bytes of logits, by Triton if `kernel`.

    Autocast does not reach into an operation, and what requires a gradient is not known in it: both
    are asked for here.
    """
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)

    wanted = []
    for x in (hidden, weight, bias):
        wanted.append(torch.is_grad_enabled() and x is not None and x.requires_grad)

    outputs = _linear_cross_entropy(
        hidden, weight, bias, targets, rows, dtype, chunk, kernel, *wanted
    )
    return outputs[0]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor | None = None,
) -> Tensor:
    """Return the sum of the losses over supervised positions, a float32 scalar.

    hidden (T, D), weight (V, D), bias (V,) or None, targets (T,) with -100 where unsupervised. rows
    (n,): the supervised positions; with them the CPU does not wait for a GPU to find them. Under
    autocast the products are in its dtype; gradients have their tensors' dtypes. No second
    derivatives.
    """
    if fused(hidden):
        return chunked(hidden, weight, bias, targets, CHUNK, True, rows)

    # One small chunk is left to autograd, which need not scale dw afterwards. Not under
    # torch.compile: the number of supervised rows, which it does not know, would break the graph.
    one_chunk = len(targets) * len(weight) * 4 <= CHUNK_CPU
    if one_chunk and not torch.compiler.is_compiling():
        return reference(hidden, weight, bias, targets)
    return chunked(hidden, weight, bias, targets, CHUNK_CPU, False, rows)
