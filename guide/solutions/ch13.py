"""Chapter 13, backward passes: a solution."""

import torch
from torch import Tensor


def swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of y = silu(gate) * up for gate and up, by formula."""
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid

    # The derivative of sigmoid is sigmoid (1 - sigmoid); silu is a product.
    slope = sigmoid + silu * (1 - sigmoid)
    return dy * up * slope, dy * silu


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
    """Return dk and dv of causal attention, (T, d) each, `block` queries at a time."""
    dk = torch.zeros_like(k)
    dv = torch.zeros_like(v)
    keys = torch.arange(len(k))
    for start in range(0, len(q), block):
        some = slice(start, start + block)
        queries = keys[some]
        s = scale * q[some] @ k.T  # (block, T)
        p = (s - lse[some, None]).exp()
        p = p.masked_fill(keys[None, :] > queries[:, None], 0.0)

        dv += p.T @ do[some]
        ds = p * (do[some] @ v.T - delta[some, None])
        dk += scale * ds.T @ q[some]
    return dk, dv
