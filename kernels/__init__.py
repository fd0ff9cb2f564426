"""One operation per file; see each file's docstring for its mathematics. Imports nothing of the project.

Every file has the same order: docstring, `reference` in plain torch, Triton forward and backward, the autograd
operation that torch.compile keeps, the one public function, and what tests/test_kernels.py and bench/kernels.py
find it by: CASES, BUILDS, MUTATIONS. A public function picks Triton for tensors on a GPU and the reference elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

os.environ.setdefault(
    "TRITON_DEFAULT_FP_FUSION", "1"
)  # a * b + c as one instruction; Triton 3.10 will not by itself
try:
    import triton
    import triton.language as tl
except ImportError:  # there is none for macOS and Windows; every operation has its reference

    class triton:  # noqa: N801
        @staticmethod
        def jit(f=None, **_):
            return f or (lambda g: g)

    tl = None


def fused(x: Tensor) -> bool:
    """Whether Triton runs on this tensor."""
    return x.is_cuda and tl is not None


def processors(x: Tensor) -> int:
    """Multiprocessors of x's GPU; a few for the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8


def hopper(x: Tensor) -> bool:
    """Whether x's GPU is an H100, H200 or GH200, which the interpreter poses as."""
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) == (9, 0)


class Case(NamedTuple):
    """Inputs of an odd size on which `fused` must be as exact as `reference`, in every gradient too.

    inputs(generator) makes the arguments; float32 tensors are cast to the dtype under test, others stay. `grads` are
    the numbers of the arguments that have gradients.
    """

    name: str
    fused: Callable
    reference: Callable
    inputs: Callable[[torch.Generator], tuple]
    grads: tuple[int, ...] = ()


class Build(NamedTuple):
    """One kernel as it is compiled for a GPU that is not there: pointer types by argument, constants, warps, stages.

    `types` gives Triton's names ("*bf16", "*fp32", "i32", "fp32"; "i32:16" where every model has a multiple of 16);
    arguments that it leaves out are in `constants`.
    """

    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    warps: int = 4
    stages: int = 2
    targets: tuple[int, ...] = (80, 89, 90, 100)  # compute capabilities that it is launched on


class Mutation(NamedTuple):
    """A mistake (`old` -> `new` in the file's source) that the comparison with fp64 must catch in `case`."""

    old: str
    new: str
    case: str


def randn(g: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=g)
