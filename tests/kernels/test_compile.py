"""Every kernel compiles to machine code for four generations of GPUs, and once for all lengths.

The interpreter and the compiler do not share a process, so each test runs one of its own.
"""

import os
import subprocess
import sys

import pytest

from tests.kernels.cases import OPERATIONS
from tests.tools.environment import ROOT

pytestmark = pytest.mark.gpu
TARGETS = (80, 89, 90, 100)

# An operation's targets share a process. Attention has most of the builds, and its blocks are of
# two kinds: those of sm_90, in which registers are scarcest, are always compiled, the others with
# `make test-full`.
COMPILED = []
for operation in OPERATIONS:
    if operation != "attention":
        COMPILED.append(pytest.param(operation, TARGETS, id=operation))
COMPILED.append(pytest.param("attention", (90,), id="attention-90"))
for target in (80, 89, 100):
    name = f"attention-{target}"
    COMPILED.append(pytest.param("attention", (target,), id=name, marks=pytest.mark.full))


def run_compiler(*command) -> subprocess.CompletedProcess:
    """Run `python ...` in the repository root, without the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done


@pytest.mark.parametrize("operation, targets", COMPILED)
def test_compiles_without_spilling(operation, targets):
    run_compiler("tests/tools/compile_kernels.py", operation, *targets)


# All kernels of training on rows of other lengths, with a compiler that only takes notes.
LENGTHS = """
from types import SimpleNamespace
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from kernels import attention, cross_entropy, glu, lora, norms, rope
from tests.kernels.cases.rope import table

class NoGPU:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = get_current_stream = lambda self, device=None: 0
    get_active_torch_device = lambda self: torch.device("cpu")

driver.set_active(NoGPU())
launch = JITFunction.run
compiled = []

def note(source, **options):
    compiled.append(f"{source.fn.__module__}.{source.fn.__name__}")
    return SimpleNamespace(hash=len(compiled))

def compile_only(self, *args, warmup, **options):
    return launch(self, *args, warmup=True, **options)

triton.compiler.compile = note
JITFunction.run = compile_only
for lengths in ([1], [16], [17, 47]):
    T = sum(lengths)
    x = torch.randn(T, 64, dtype=torch.bfloat16, requires_grad=True)
    q = torch.randn(T, 4, 64, dtype=torch.bfloat16, requires_grad=True)
    A, B, W = (torch.randn(n, requires_grad=True) for n in ((16, 64), (64, 16), (64, 64)))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    seed = torch.tensor([3])
    targets = torch.zeros(T, dtype=torch.long)

    turned = rope.triton_rope(q, q, *table(torch.arange(T), 64))
    attention.triton_packed(*turned, q, cu_seqlens, max(lengths)).sum().backward()
    lora.triton_linears(x, [W], [None], [A], [B], [1.0], 0.1, seed)[0].sum().backward()
    y, s = norms.triton_norm(x, x, W[0], W[1], 1e-5, "layer", x.dtype)
    glu.triton_glu(y, x, "silu").sum().backward()
    cross_entropy.chunked(x, W.bfloat16(), None, targets, 1 << 20, True).backward()

names = sorted(compiled)
assert len(names) == len(set(names)) == 12, names
"""


def test_a_kernel_is_compiled_once_for_all_lengths():
    """No packed row or batch of another size stops training to compile."""
    run_compiler("-c", LENGTHS)


# The additions that bitsandbytes rounds twice, as they are launched and with the default.
FUSED_SUMS = """
from tests.kernels.cases.nf4 import BUILDS
from tests.tools.compile_kernels import compile_build
for fuse in (False, True):
    made = compile_build(BUILDS[0], 90, enable_fp_fusion=fuse)
    print(made.asm["ptx"].count("fma.rn.f32"))
"""


def test_bitsandbytes_sums_are_not_fused_into_one_rounding():
    """code8 * A + m is two roundings there: the machine code must have no fused multiply-add."""
    unfused, fused = map(int, run_compiler("-c", FUSED_SUMS).stdout.split())
    assert unfused == 0 < fused
    assert "enable_fp_fusion=False" in (ROOT / "kernels" / "nf4.py").read_text()
