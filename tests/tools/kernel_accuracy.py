"""How far a kernel and plain torch are from fp64 on one case of tests/kernels/cases/."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.tools.environment import GPU

DEVICE = "cuda" if GPU else "cpu"

# Without a GPU kernels run in Triton's interpreter, whose bf16 dot is wrong in triton 3.9.
DTYPES = [torch.float32, torch.float16]
if GPU:
    DTYPES.append(torch.bfloat16)


class Error(NamedTuple):
    """Frobenius norms of the distance to fp64, relative to the norm of what is exact."""

    what: str
    ours: float
    plain: float


def as_outputs(out) -> list[Tensor]:
    """Return what a function returned as a list of its tensors."""
    if not isinstance(out, tuple):
        out = (out,)
    return [o for o in out if o is not None]


def _unplaced(x: Tensor) -> Tensor:
    return x


def run(function, case, dtype: torch.dtype, place=_unplaced) -> list[Tensor]:
    """Return outputs and gradients of a function on the case's inputs.

    The inputs are rounded to bf16 first, so every dtype sees the same. `place` may put a tensor
    somewhere else in memory.
    """
    g = torch.Generator().manual_seed(0)
    args = []
    for i, a in enumerate(case.inputs(g)):
        if isinstance(a, Tensor) and a.dtype == torch.float32:
            a = place(a.bfloat16().to(DEVICE, dtype)).requires_grad_(i in case.grads)
        elif isinstance(a, Tensor):
            a = place(a.to(DEVICE))
        args.append(a)

    outs = as_outputs(function(*args))
    if case.grads:
        weights = [torch.randn(o.shape, generator=g).to(o) for o in outs]
        loss = sum((o * w).sum() for o, w in zip(outs, weights, strict=True))
        loss.backward()
    return [o.detach() for o in outs] + [args[i].grad for i in case.grads]


def errors(case, dtype: torch.dtype) -> list[Error]:
    """Return the errors of every output and every gradient, by Triton and by plain torch."""
    exact = run(case.reference, case, torch.float64)
    plain = run(case.reference, case, dtype)
    ours = run(case.fused, case, dtype)

    outputs = len(exact) - len(case.grads)
    names = [f"output {i}" for i in range(outputs)]
    names += [f"gradient of argument {i}" for i in case.grads]

    found = []
    for name, e, p, o in zip(names, exact, plain, ours, strict=True):
        assert o is not None and o.shape == e.shape, name
        size = e.double().norm().clamp(min=1e-30)
        of_ours = (o.double() - e).norm().div(size).item()
        of_plain = (p.double() - e).norm().div(size).item()
        found.append(Error(name, of_ours, of_plain))
    return found


def wrong(case, dtype: torch.dtype) -> list[str]:
    """Return what of the fused path is further from fp64 than twice plain torch.

    A rounding to dtype is always granted.
    """
    grant = torch.finfo(dtype).eps / 2
    found = []
    for error in errors(case, dtype):
        # Not `>`: an error that is not a number must be found, too.
        if not error.ours <= 2 * error.plain + grant:
            found.append(f"{error.what}: {error.ours:.2e}, plain torch {error.plain:.2e}")
    return found
