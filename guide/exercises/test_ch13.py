"""Chapter 13: two backward passes against autograd, in float64."""

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from guide.exercises import chosen

ch = chosen("ch13")


def test_swiglu_backward():
    torch.manual_seed(0)
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    dy = torch.randn(5, 7, dtype=torch.float64)
    (F.silu(gate) * up).backward(dy)
    dgate, dup = ch.swiglu_backward(gate.detach(), up.detach(), dy)
    torch.testing.assert_close(dgate, gate.grad)
    torch.testing.assert_close(dup, up.grad)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.numel())
        return out


def test_key_gradients():
    torch.manual_seed(0)
    tokens, width, scale = 70, 16, 0.3
    q, k, v = (torch.randn(tokens, width, dtype=torch.float64) for _ in range(3))
    do = torch.randn(tokens, width, dtype=torch.float64)
    leaves = [one.clone().requires_grad_() for one in (q, k, v)]
    above = torch.ones(tokens, tokens).triu(1).bool()
    scores = (scale * leaves[0] @ leaves[1].T).masked_fill(above, float("-inf"))
    o = scores.softmax(-1) @ leaves[2]
    o.backward(do)

    lse = scores.detach().logsumexp(-1)
    delta = (do * o.detach()).sum(-1)
    for block in (16, 1):
        with Largest() as largest:
            dk, dv = ch.key_gradients(q, k, v, lse, delta, do, scale, block)
        torch.testing.assert_close(dk, leaves[1].grad)
        torch.testing.assert_close(dv, leaves[2].grad)
        assert largest.numbers <= tokens * width, "the scores of more than `block` queries"
