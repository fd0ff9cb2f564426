"""The fused operations, one per file. Nothing of the project is imported here.

Every operation's file has the same order, so one that is read explains the others:

    docstring          the formulas, forward and backward, and the bytes that are moved
    reference          the same in plain torch: what a CPU runs, and what the tests compare with
    kernels            Triton, forward and backward
    the operation      an `operation` (below) with its gradient, which torch.compile keeps whole
    public function    picks Triton for tensors on a GPU and the reference elsewhere

Begin with norms.py, where a program has one row. Then attention.py, whose tiles are in tiles.py;
attention of one new token against a cache is decode.py. cross_entropy.py, glu.py, rope.py and
lora.py are the rest of a model, nf4.py and int8.py are quantized weights.

Three words of Triton. A kernel is run by many programs at once, each of which asks `tl.program_id`
which part of the work is its own. Its values are tiles, whose sizes (`tl.constexpr`) are powers of
two that the compiler knows. What of a tile lies beyond the end of a tensor is masked in every load
and store.

The inputs on which kernels are tested, what they are compiled for, and the mistakes that tests must
see are in tests/kernels/cases/.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# a * b + c as one instruction, with one rounding; Triton 3.10 does not do it by itself.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton as _triton
    import triton.language as tl
except ImportError:
    # There is no Triton for macOS and Windows. Every operation has its reference, and the kernels
    # stay functions that nothing calls.
    _triton = tl = None


class triton:  # noqa: N801
    """What the kernels use of Triton."""

    @staticmethod
    def jit(f=None, **options):
        """Return a kernel that runs on the GPU of its first tensor.

        Triton itself takes the current device of the thread, and would read the memory of another
        GPU there.
        """
        if f is None:
            return partial(triton.jit, **options)
        if _triton is None:
            return f
        kernel = _triton.jit(f, **options)

        def run(x: Tensor, *args, **kwargs):
            launch = type(kernel).run
            if not x.is_cuda or x.get_device() == torch.cuda.current_device():
                return launch(kernel, x, *args, **kwargs)
            with torch.cuda.device(x.device):
                return launch(kernel, x, *args, **kwargs)

        kernel.run = run
        return kernel


def has_bf16(device: torch.device) -> bool:
    """Return whether a CPU or GPU has instructions for bfloat16: from Ampere (sm_80) on, for GPUs.

    torch.cuda.is_bf16_supported also counts GPUs that emulate it.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


# torch.compile takes the answer for a constant. torch.compiler.assume_constant_result sets this,
# too, but a call of it imports what takes seconds.
has_bf16._dynamo_marked_constant = True


def default_dtype(device: torch.device) -> torch.dtype:
    """Return what a model answers in where nobody asks for another dtype.

    That is bfloat16 on a GPU that has it, else float32.
    """
    if device.type == "cuda" and has_bf16(device):
        return torch.bfloat16
    return torch.float32


_pretending = False


@contextlib.contextmanager
def pretending():
    """Take every tensor for one on a GPU with Triton, to see what would run there.

    It is for tensors without content (torch's FakeTensor): no kernel is launched.
    """
    global _pretending
    _pretending = True
    try:
        yield
    finally:
        _pretending = False


def fused(x: Tensor) -> bool:
    """Return whether Triton runs on this tensor: on a GPU from Ampere on.

    Older ones run the reference. Triton compiles for Turing (sm_75), but there the kernels of
    decode, LoRA, NF4 and int8 spill registers to memory, and bfloat16 is emulated.
    """
    if _pretending:
        return True
    return x.is_cuda and tl is not None and has_bf16(x.device)


def multiprocessors(x: Tensor) -> int:
    """Return the number of multiprocessors of x's GPU; a few for the interpreter."""
    if not x.is_cuda:
        return 8
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def is_hopper(x: Tensor) -> bool:
    """Return whether x's GPU is an H100, H200 or GH200 (sm_90), which the interpreter poses as."""
    if not x.is_cuda:
        return True
    return torch.cuda.get_device_capability(x.device) == (9, 0)


def power_of_two(n: int) -> int:
    """Return the smallest power of two from n on, which a tile that holds n numbers is wide."""
    return 1 << (n - 1).bit_length()


def divide_up(n: int, size: int) -> int:
    """Return how many blocks of `size` hold n numbers."""
    return -(-n // size)


class Operation:
    """A Python function of tensors that torch.compile keeps whole, with a gradient if it has one.

    What torch.library makes of a function costs the CPU 50 to 100 microseconds for each call, which
    is longer than a small model's kernels take. So only graphs of torch.compile, and what is done
    `pretending`, call that. Else the function itself is called, where a gradient may be wanted by
    an autograd.Function.
    """

    def __init__(self, name: str, run: Callable):
        self.run = run
        self.registered = torch.library.custom_op(name, run, mutates_args=())
        self.register_fake = self.registered.register_fake  # takes what makes results without data

        # Until there is a gradient: torch.library raises an error if one is asked for.
        self.recorded: Callable = self.registered

    def register_gradient(
        self, save: Callable, gradients: Callable, backward: Operation | None = None
    ):
        """Let autograd call save(ctx, inputs, output), then gradients(compute, ctx, *grads).

        `compute` is the operation `backward`, if there is one, as it is to be called there. Of an
        output that nothing used the gradient is None, not a tensor of zeros. There are no second
        derivatives.
        """
        run = None
        registered = None
        if backward is not None:
            run = backward.run
            registered = backward.registered

        def setup(ctx, inputs, output):
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)

        def forward(ctx, *inputs):
            output = self.run(*inputs)
            setup(ctx, inputs, output)
            return output

        def backward_once(ctx, *grads):
            return gradients(run, ctx, *grads)

        methods = {
            "forward": staticmethod(forward),
            "backward": staticmethod(once_differentiable(backward_once)),
        }
        self.recorded = type(self.run.__name__, (Function,), methods).apply
        traced = partial(gradients, registered)
        self.registered.register_autograd(traced, setup_context=setup)

    def __call__(self, *inputs):
        if torch.compiler.is_compiling() or _pretending:
            return self.registered(*inputs)
        if torch.is_grad_enabled():
            return self.recorded(*inputs)
        return self.run(*inputs)


def operation(name: str) -> Callable[[Callable], Operation]:
    """Return a decorator that makes an Operation of a function whose arguments are annotated."""
    return partial(Operation, name)
