"""What every kernel is tested on, one file per operation.

    CASES      inputs on which Triton must be as exact as the reference (test_accuracy.py)
    BUILDS     every kernel as it is compiled for GPUs that are not there (test_compile.py)
    MUTATIONS  mistakes in a kernel's source that the cases must catch (test_mutations.py)

A new operation is a file in kernels/ and a file of the same name here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

OPERATIONS = sorted(module.name for module in pkgutil.iter_modules(__path__))


class Case(NamedTuple):
    """Inputs of an odd size on which `fused` must be as exact as `reference`, gradients too.

    inputs(generator) makes the arguments. Their float32 tensors are cast to the dtype under test,
    others stay. `grads` are the numbers of the arguments that have gradients.
    """

    name: str
    fused: Callable
    reference: Callable
    inputs: Callable[[torch.Generator], tuple]
    grads: tuple[int, ...] = ()


class Build(NamedTuple):
    """One kernel as it is compiled: the types of its arguments, its constants, warps and stages.

    `types` has Triton's names by argument: "*bf16", "*fp32", "i32", "fp32", or "i32:16" where every
    model has a multiple of 16. What it leaves out is in `constants`.
    """

    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    warps: int = 4
    stages: int = 2
    targets: tuple[int, ...] = (80, 89, 90, 100)  # compute capabilities that it is launched on
    spills: int = 0  # bytes of a thread that may be in memory, where the kernel's file says so


def in_dtype(build: Build, name: str) -> Build:
    """Return a build for tensors of another dtype than bf16: "fp32" or "fp16"."""
    types = {}
    for argument, kind in build.types.items():
        types[argument] = f"*{name}" if kind == "*bf16" else kind
    return build._replace(types=types)


class Mutation(NamedTuple):
    """A mistake (`old` -> `new` in the source) that the comparison with fp64 must catch in `case`.

    The source is the operation's own file, or another `file` of kernels/ that it is made of.
    """

    old: str
    new: str
    case: str
    file: str = ""


def randn(g: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Return normal random numbers on the CPU in float32."""
    return scale * torch.randn(*shape, generator=g)


def cases_file(operation: str):
    """Return the module of this folder with the operation's CASES, BUILDS and MUTATIONS."""
    return importlib.import_module(f"{__name__}.{operation}")
