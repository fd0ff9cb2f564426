"""Products of few rows on a CPU, which read a weight at the speed of the memory: in C++, cpu.cpp.

    y_mn = f s_n sum_k x_mk w_nk            x (M, K), w (N, K), scales s (N,) and a factor f

A step of decoding takes the time to read the weights. torch's own products are made for many rows:
with one row oneDNN's in bfloat16 and torch's with int8 weights are bound by their arithmetic.
These fetch the weight ahead of its use and widen it in registers; sums are float32.

Bytes moved: N K of the weight's size, once, for up to FEW rows.

cpu.cpp is compiled by the machine's C++ compiler, which takes a second, when it is first needed,
and kept in ~/.cache/barellava. `library` returns None where there is no compiler, or no AVX2 or
AVX512: then nothing of this file is used.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("cpu.cpp")
STEP = 32  # columns that cpu.cpp multiplies at a time
FEW = 16  # rows up to which this is faster than torch's products of float32 and int8

# What torch calls the instructions of a CPU, and a compiler.
ARCHITECTURES = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}

# Of x and of the weight.
DTYPES = {
    (torch.float32, torch.float32),
    (torch.float32, torch.int8),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.int8),
}
ARGUMENTS = [
    ctypes.c_void_p,  # x
    ctypes.c_void_p,  # w
    ctypes.c_void_p,  # scales, or None
    ctypes.c_float,  # factor
    ctypes.c_void_p,  # y
    ctypes.c_long,  # M
    ctypes.c_long,  # N
    ctypes.c_long,  # K
    ctypes.c_int,  # threads
]


def reference(x: Tensor, weight: Tensor, scales: Tensor | None, factor: float) -> Tensor:
    """Return what `product` does, in plain torch."""
    y = x.float() @ weight.float().T
    if scales is not None:
        y = y * scales
    return (y * factor).to(x.dtype)


# ------------------------------------------------------------------ the compiler


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled cpu.cpp; None where it cannot be had."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    architecture = ARCHITECTURES.get(torch.backends.cpu.get_cpu_capability())
    if compiler is None or architecture is None or platform.system() != "Linux":
        return None

    # -fopenmp: the threads are those of torch, which has loaded this library before.
    command = [compiler, f"-march={architecture}", "-O3", "-fopenmp", "-shared", "-fPIC"]
    recipe = f"{command} {platform.platform()}".encode() + SOURCE.read_bytes()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = caches / "barellava" / f"cpu-{hashlib.sha256(recipe).hexdigest()[:16]}.so"
    try:
        if not file.exists():
            _compile(command, file)
        return ctypes.CDLL(str(file))
    except (OSError, subprocess.CalledProcessError):
        return None


def _compile(command: list[str], file: Path):
    """Compile cpu.cpp to a file, which is whole as soon as it is there."""
    print("compiling kernels/cpu.cpp for this machine, once", file=sys.stderr)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        subprocess.run([*command, str(SOURCE), "-o", str(made)], check=True, capture_output=True)
        os.replace(made, file)


# ------------------------------------------------------------------ public


def fits(dtype: torch.dtype, weight: Tensor) -> bool:
    """Return whether there is a product of rows of a dtype with this weight."""
    if (dtype, weight.dtype) not in DTYPES or not weight.is_cpu or not weight.is_contiguous():
        return False
    return weight.size(1) % STEP == 0 and library() is not None


def product(x: Tensor, weight: Tensor, scales: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """Return factor * scales * (x W^T) in x's dtype, without a gradient: x (M, K) -> (M, N).

    The weight `fits`; scales (N,) are float32.
    """
    x = x.contiguous()
    rows = x.size(0)
    outputs, columns = weight.shape
    y = x.new_empty(rows, outputs)
    function = _function(x.dtype, weight.dtype)
    function(
        x.data_ptr(),
        weight.data_ptr(),
        None if scales is None else scales.data_ptr(),
        factor,
        y.data_ptr(),
        rows,
        outputs,
        columns,
        torch.get_num_threads(),
    )
    return y


@functools.cache
def _function(x: torch.dtype, weight: torch.dtype):
    """Return the function of cpu.cpp for two dtypes."""
    names = [str(dtype).removeprefix("torch.") for dtype in (x, weight)]
    function = getattr(library(), "_".join(names))
    function.argtypes = ARGUMENTS
    function.restype = None
    return function
