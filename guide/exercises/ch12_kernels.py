"""Five versions of the kernel of chapter 12. Each differs from it in one place: find it.

A version averages values (M, D) with the softmax of scores (M,), BLOCK keys at a time.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # also where there is a GPU: the tensors are on the CPU

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402


@triton.jit
def one(S, V, OUT, M, D: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, D)
    largest = -1e30
    total = 0.0
    sums = tl.zeros((D,), tl.float32)
    for start in range(0, M, BLOCK):
        key = start + tl.arange(0, BLOCK)
        s = tl.load(S + key, key < M, 0.0)
        v = tl.load(V + key[:, None] * D + column[None, :], (key < M)[:, None], 0.0)
        new = tl.maximum(largest, tl.max(s, 0))
        p = tl.exp(s - new)
        shrink = tl.exp(largest - new)
        total = total * shrink + tl.sum(p, 0)
        sums = sums * shrink + tl.sum(p[:, None] * v, 0)
        largest = new
    tl.store(OUT + column, sums / total)


@triton.jit
def two(S, V, OUT, M, D: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, D)
    largest = -1e30
    total = 0.0
    sums = tl.zeros((D,), tl.float32)
    for start in range(0, M, BLOCK):
        key = start + tl.arange(0, BLOCK)
        s = tl.load(S + key, key < M, float("-inf"))
        v = tl.load(V + key[:, None] * D + column[None, :], (key < M)[:, None], 0.0)
        new = tl.max(s, 0)
        p = tl.exp(s - new)
        shrink = tl.exp(largest - new)
        total = total * shrink + tl.sum(p, 0)
        sums = sums * shrink + tl.sum(p[:, None] * v, 0)
        largest = new
    tl.store(OUT + column, sums / total)


@triton.jit
def three(S, V, OUT, M, D: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, D)
    largest = -1e30
    total = 0.0
    sums = tl.zeros((D,), tl.float32)
    for start in range(0, M, BLOCK):
        key = start + tl.arange(0, BLOCK)
        s = tl.load(S + key, key < M, float("-inf"))
        v = tl.load(V + key[:, None] * D + column[None, :], (key < M)[:, None], 1.0)
        new = tl.maximum(largest, tl.max(s, 0))
        p = tl.exp(s - new)
        shrink = tl.exp(largest - new)
        total = total * shrink + tl.sum(p, 0)
        sums = sums * shrink + tl.sum(p[:, None] * v, 0)
        largest = new
    tl.store(OUT + column, sums / total)


@triton.jit
def four(S, V, OUT, M, D: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, D)
    largest = -1e30
    total = 0.0
    sums = tl.zeros((D,), tl.float32)
    for start in range(0, M, BLOCK):
        key = start + tl.arange(0, BLOCK)
        s = tl.load(S + key, key < M, float("-inf"))
        v = tl.load(V + key[:, None] * D + column[None, :], (key < M)[:, None], 0.0)
        new = tl.maximum(largest, tl.max(s, 0))
        p = tl.exp(s - new)
        shrink = tl.exp(largest - new)
        total = total + tl.sum(p, 0)
        sums = sums * shrink + tl.sum(p[:, None] * v, 0)
        largest = new
    tl.store(OUT + column, sums / total)


@triton.jit
def five(S, V, OUT, M, D: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, D)
    largest = 0.0
    total = 0.0
    sums = tl.zeros((D,), tl.float32)
    for start in range(0, M, BLOCK):
        key = start + tl.arange(0, BLOCK)
        s = tl.load(S + key, key < M, float("-inf"))
        v = tl.load(V + key[:, None] * D + column[None, :], (key < M)[:, None], 0.0)
        new = tl.maximum(largest, tl.max(s, 0))
        p = tl.exp(s - new)
        shrink = tl.exp(largest - new)
        total = total * shrink + tl.sum(p, 0)
        sums = sums * shrink + tl.sum(p[:, None] * v, 0)
        largest = new
    tl.store(OUT + column, sums / total)


VERSIONS = {"one": one, "two": two, "three": three, "four": four, "five": five}
BLOCK = 32


def average(version: str, scores: Tensor, values: Tensor) -> Tensor:
    """Return what a version makes of scores (M,) and values (M, D); D is a power of two."""
    out = torch.empty(values.size(1))
    VERSIONS[version][(1,)](scores, values, out, len(scores), values.size(1), BLOCK)
    return out
