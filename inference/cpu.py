"""What a step of decoding computes on a CPU, for few rows: in C++, cpu.cpp.

    product    y_mn = f s_n sum_k x_mk w_nk        x (M, K), w (N, K), scales s (N,), a factor f
    nf4        the same with the weight of kernels/nf4.py, whose codes are looked up in a register
    norm       as in kernels/norms.py
    turn       as in kernels/rope.py

A step takes the time to read the weights. torch's own products are made for many rows: with one
row oneDNN's in bfloat16 and torch's with int8 weights are bound by their arithmetic. These fetch
the weight ahead of its use and widen it in registers; sums are float32. Norms and rotations are
one call in place of ten. None of it has a gradient.

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
FEW = 16  # rows up to which this is faster than torch's products of float32

# What torch calls the instructions of a CPU, and a compiler.
ARCHITECTURES = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}

# Of x and of the weight.
DTYPES = {
    (torch.float32, torch.float32),
    (torch.float32, torch.int8),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.int8),
}
WIDTHS = (torch.float32, torch.bfloat16)  # dtypes of norms and rotations

POINTER = ctypes.c_void_p
LONG = ctypes.c_long
ARGUMENTS = {
    # x, w, scales or None, factor, y, M, N, K, threads
    "product": [POINTER] * 3 + [ctypes.c_float, POINTER] + [LONG] * 3 + [ctypes.c_int],
    # x, packed, scales, code, y, M, N, K, threads
    "nf4": [POINTER] * 5 + [LONG] * 3 + [ctypes.c_int],
    # x, residual or None, weight, bias or None, y, s or None, rows, D, eps, kind
    "norm": [POINTER] * 6 + [LONG] * 2 + [ctypes.c_float, ctypes.c_int],
    # x, cos, sin, y, T, heads, D, R
    "turn": [POINTER] * 4 + [LONG] * 4,
}
KINDS = {"rms": 0, "rms1": 1, "layer": 2}  # of norms, in cpu.cpp


# ------------------------------------------------------------------ the compiler


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled cpu.cpp; None where it cannot be had."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    architecture = ARCHITECTURES.get(torch.backends.cpu.get_cpu_capability())
    if compiler is None or architecture is None or platform.system() != "Linux":
        return None

    command = [compiler, f"-march={architecture}", "-O3", "-fopenmp", "-fPIC"]
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
    print("compiling inference/cpu.cpp for this machine, once", file=sys.stderr)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        compiled = Path(folder) / "cpu.o"
        linked = Path(folder) / file.name
        run = functools.partial(subprocess.run, check=True, capture_output=True)
        run([*command, "-c", str(SOURCE), "-o", str(compiled)])

        # Without -fopenmp, so that it takes OpenMP from torch, which has loaded one. Two of them
        # would have threads that wait for each other. `now`: to fail here if torch has none.
        run([command[0], "-shared", "-Wl,-z,now", str(compiled), "-o", str(linked)])
        os.replace(linked, file)


@functools.cache
def _function(operation: str, *dtypes: torch.dtype):
    """Return an operation of cpu.cpp for the dtypes of its arguments."""
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    function = getattr(library(), "_".join([operation, *names]))
    function.argtypes = ARGUMENTS[operation]
    function.restype = None
    return function


def _address(tensor: Tensor | None) -> int | None:
    """Return where a tensor begins."""
    if tensor is None:
        return None
    return tensor.data_ptr()


# ------------------------------------------------------------------ public


def fits(dtype: torch.dtype, weight: Tensor) -> bool:
    """Return whether there is a product of rows of a dtype with this weight."""
    if (dtype, weight.dtype) not in DTYPES or not weight.is_cpu or not weight.is_contiguous():
        return False
    return weight.size(1) % STEP == 0 and library() is not None


def product(x: Tensor, weight: Tensor, scales: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """Return factor * scales * (x W^T) in x's dtype: x (M, K) -> (M, N).

    The weight `fits`; scales (N,) are float32.
    """
    x = x.contiguous()
    rows = x.size(0)
    outputs, columns = weight.shape
    y = x.new_empty(rows, outputs)
    run = _function("product", x.dtype, weight.dtype)
    run(
        x.data_ptr(),
        weight.data_ptr(),
        _address(scales),
        factor,
        y.data_ptr(),
        rows,
        outputs,
        columns,
        torch.get_num_threads(),
    )
    return y


def fits_nf4(columns: int, blocksize: int) -> bool:
    """Return whether there is a product with such an NF4 weight: a register must hold its code."""
    if columns % 64 or blocksize != 64 or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return library() is not None


def nf4(x: Tensor, packed: Tensor, scales: Tensor, code: Tensor, outputs: int) -> Tensor:
    """Return x W^T in x's dtype: x (M, K), float32 or bfloat16 -> (M, outputs).

    packed is NF4.packed; scales are those of its blocks and code its 16 numbers, in float32.
    """
    x = x.contiguous()
    rows, columns = x.shape
    y = x.new_empty(rows, outputs)
    run = _function("nf4", x.dtype)
    run(
        x.data_ptr(),
        packed.data_ptr(),
        scales.data_ptr(),
        code.data_ptr(),
        y.data_ptr(),
        rows,
        outputs,
        columns,
        torch.get_num_threads(),
    )
    return y


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor]:
    """Return what norms.py's `norm` does, of tensors (..., D) that are all float32 or bfloat16."""
    x = x.contiguous()
    y = torch.empty_like(x)
    s = x
    if residual is not None:
        residual = residual.contiguous()
        s = torch.empty_like(x)
    width = x.size(-1)
    run = _function("norm", x.dtype)
    run(
        x.data_ptr(),
        _address(residual),
        weight.data_ptr(),
        _address(bias),
        y.data_ptr(),
        s.data_ptr(),
        x.numel() // width,
        width,
        eps,
        KINDS[kind],
    )
    return y, s


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (T, H, d), float32 or bfloat16, turned by tables (T, 1, r) as in rope.py."""
    x = x.contiguous()
    y = torch.empty_like(x)
    tokens, heads, width = x.shape
    run = _function("turn", x.dtype)
    run(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        y.data_ptr(),
        tokens,
        heads,
        width,
        cos.size(-1),
    )
    return y
