"""Chapter 14: an all-reduce in a ring, and a gradient that counts tokens."""

import pytest
import torch

from guide.exercises import chosen

ch = chosen("ch14")


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ring_all_reduce(size):
    torch.manual_seed(0)
    tensors = [torch.randn(4 * size) for _ in range(size)]
    originals = [tensor.clone() for tensor in tensors]
    sent = [0] * size

    def send(a: int, b: int, x: torch.Tensor) -> torch.Tensor:
        assert b == (a + 1) % size, "a rank sends to its neighbour alone"
        sent[a] += x.numel()
        return x.clone()

    sums = ch.ring_all_reduce(tensors, send)
    assert len(sums) == size
    for one in sums:
        torch.testing.assert_close(one, sum(originals))
    assert all(torch.equal(a, b) for a, b in zip(tensors, originals, strict=True))
    assert sent == [2 * (size - 1) * 4] * size


def test_fair_gradient():
    torch.manual_seed(0)
    weight = torch.randn(6, requires_grad=True)
    rows = [torch.randn(n, 6) for n in (3, 40, 0, 1)]
    means = []
    for x in rows:
        if len(x) == 0:
            means.append(torch.full((6,), float("nan")))  # as F.cross_entropy makes it
            continue
        (gradient,) = torch.autograd.grad((x @ weight).square().mean(), weight)
        means.append(gradient)
    (expected,) = torch.autograd.grad((torch.cat(rows) @ weight).square().mean(), weight)
    torch.testing.assert_close(ch.fair_gradient(means, [3, 40, 0, 1]), expected)
