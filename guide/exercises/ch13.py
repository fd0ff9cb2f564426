"""Chapter 13, backward passes: fill in both functions, then run

python -m pytest guide/exercises/test_ch13.py -o addopts=""
"""

from torch import Tensor


def swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of y = silu(gate) * up for gate and up, by formula.

    gate, up and dy, the gradient of y, have one shape. silu(x) = x * sigmoid(x). Autograd is not
    allowed: the test gives tensors without it.
    """
    raise NotImplementedError


def key_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    do: Tensor,
    scale: float,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Return dk and dv of causal attention, (T, d) each, `block` queries at a time.

    q, k, v and do (T, d); lse (T,) is the logarithm of the sum of exp(scale q . k) over the keys
    that a query sees, its own the last; delta (T,) is do . o. No tensor may hold the scores of all
    pairs: the test counts numbers. As in kernels/attention.py:key_kernel.
    """
    raise NotImplementedError
