"""Chapter 13: how exact a finite difference is, and a wrong gradient that trains."""

import math

import torch
from torch import Tensor

from guide.drawings.svg import curves, figure

DIRECTIONS = 400


def loss(x: Tensor) -> Tensor:
    """Return some smooth function of vectors (n, 64), (n,): SwiGLU of their halves, squared."""
    gate, up = x.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).square().sum(-1)


def steps() -> str:
    """Draw the error of the central difference over its step, in float32 and float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(DIRECTIONS, 64, generator=generator, dtype=torch.float64)
    direction = torch.randn(DIRECTIONS, 64, generator=generator, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    exact = (gradient * direction).sum(-1)

    # The mean over many points and directions: a single rounding may be lucky.
    series = {}
    for dtype in (torch.float32, torch.float64):
        points = []
        for power in range(-20, 1):
            h = 10 ** (power / 2)
            above = loss((x + h * direction).to(dtype)).double()
            below = loss((x - h * direction).to(dtype)).double()
            wrong = ((above - below) / (2 * h) - exact).abs().mean() / exact.abs().mean()
            points.append((power / 2, wrong.item()))
        series[str(dtype).removeprefix("torch.")] = points
    body = curves(
        20,
        14,
        680,
        270,
        series,
        "step, as a power of ten",
        "relative error",
        logarithmic=True,
        low=1e-12,
        high=1e4,
    )
    return figure(720, 296, body, "The error of a finite difference over the size of its step.")


class Norm(torch.autograd.Function):
    """RMSNorm without a weight; `right` says which backward pass."""

    @staticmethod
    def forward(ctx, x, right):
        c = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        ctx.save_for_backward(x, c)
        ctx.right = right
        return c * x

    @staticmethod
    def backward(ctx, g):
        x, c = ctx.saved_tensors
        n = c * x
        if ctx.right:
            g = g - n * (g * n).mean(-1, keepdim=True)
        return c * g, None


def train(right: bool) -> list[float]:
    """Return the losses of the chapter's network of two layers."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(64, 8), torch.randn(64, 4)
    first, second = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.05)
    losses = []
    for _ in range(150):
        hidden = Norm.apply(first(inputs), right)
        value = (second(hidden) - targets).square().mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def wrong() -> str:
    """Draw the loss with the right and with the wrong gradient."""
    series = {}
    for name, right in (("right gradient", True), ("wrong gradient", False)):
        series[name] = list(enumerate(train(right)))
    low = min(value for points in series.values() for _, value in points)
    body = curves(20, 14, 680, 240, series, "step", "loss", low=math.floor(low * 10) / 10)
    return figure(720, 266, body, "The loss falls with the wrong gradient, too.")


FIGURES = {"13-steps.svg": steps, "13-wrong.svg": wrong}
