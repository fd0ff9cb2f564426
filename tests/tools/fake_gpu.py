"""A GPU that is not there: a device "gpu" whose tensors lie in the CPU's memory, and its waits.

    from tests.tools import fake_gpu       # in a process of its own: the device stays
    with fake_gpu.watch() as waits:
        loss = model.to("gpu").loss(batch.to("gpu"))
    assert waits == []

On a CUDA device most operations are queued, and the CPU goes on. `waits` gets a line for each that
makes it wait for the queue instead: a value or a number of elements is read from the device, a
tensor is copied between the two memories without non_blocking, or an operation takes a tensor of
each.

Everything is computed by PyTorch on the CPU. Our Triton kernels are launched and do nothing, so
their results are zeros: what is seen is which operations there are, not what they compute.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from triton.runtime.jit import JITFunction

import kernels

ROOT = Path(__file__).resolve().parents[2]

# Operations that read something of a tensor on the device.
READS = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "masked_scatter",  # its backward pass is masked_select
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}


class Backend:
    """What torch asks of the module of a device."""

    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=0: torch.zeros(1))
    set_rng_state = staticmethod(lambda state, device=0: None)
    device = staticmethod(lambda index: contextlib.nullcontext())


_setup_privateuseone_for_python_backend("gpu", Backend)


class OnGPU(Tensor):
    """A tensor of the device; `data_of` is the one on the CPU that it stands for."""

    @staticmethod
    def __new__(cls, data_of: Tensor):
        new = Tensor._make_wrapper_subclass(
            cls,
            data_of.size(),
            strides=data_of.stride(),
            storage_offset=data_of.storage_offset(),
            dtype=data_of.dtype,
            device="gpu:0",
        )
        new.data_of = data_of
        return new

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"OnGPU({self.data_of})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args: tuple, kwargs: dict):
    """Compute an operation of tensors of the device, or one that makes them."""
    name = function._schema.name.partition("::")[2]
    flat, spec = _pytree.tree_flatten((args, kwargs))
    inputs = [x for x in flat if isinstance(x, Tensor)]
    asked = kwargs.get("device")
    if asked is not None:
        on_gpu = torch.device(asked).type == "gpu"
    else:
        on_gpu = any(isinstance(x, OnGPU) for x in inputs)

    # PyTorch on the CPU computes it. What is not filled is zeros, so that no result is random.
    plain = []
    for x in flat:
        if isinstance(x, OnGPU):
            x = x.data_of
        elif isinstance(x, torch.device) and x.type == "gpu":
            x = torch.device("cpu")
        plain.append(x)
    plain_args, plain_kwargs = _pytree.tree_unflatten(plain, spec)
    plain_kwargs.pop("pin_memory", None)
    out = function(*plain_args, **plain_kwargs)
    if name in ("empty", "empty_like", "new_empty", "empty_strided"):
        out.zero_()

    # An operation in place returns what it was given.
    def place(x):
        if not isinstance(x, Tensor):
            return x
        for given in inputs:
            if x is given or (isinstance(given, OnGPU) and x is given.data_of):
                return given
        return OnGPU(x) if on_gpu else x

    return _pytree.tree_map(place, out)


class Watch(TorchDispatchMode):
    """Notes what makes the CPU wait, and counts all operations by name."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.partition("::")[2]
        self.counts[name] += 1
        why = why_it_waits(function, name, args, kwargs)
        if why:
            self.waits.append(f"{name}: {why}, at {place_in_code()}")
        return compute(function, args, kwargs)


def why_it_waits(function, name: str, args: tuple, kwargs: dict) -> str:
    """Return why an operation makes the CPU wait for the device, or ""."""
    inputs = [x for x in _pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_gpu = [isinstance(x, OnGPU) for x in inputs]

    # Copies from one memory to the other.
    if name in ("copy_", "_to_copy"):
        if name == "copy_":
            target, source = on_gpu[0], on_gpu[1]
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        else:
            source = on_gpu[0]
            device = kwargs.get("device")
            target = source if device is None else torch.device(device).type == "gpu"
            non_blocking = kwargs.get("non_blocking", False)
        if source and not target:
            return "a copy from the device"
        if target and not source and not non_blocking:
            return "a blocking copy to the device"
        return ""

    if not any(on_gpu):
        return ""
    if name in READS:
        return "reads from the device"
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "reads the number of elements"
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        indices = [i for i in args[1] if i is not None]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            return "reads the number of elements"
    for x in inputs:
        if not isinstance(x, OnGPU) and x.dim() > 0:
            return "takes a tensor of the CPU, too"
    return ""


def place_in_code() -> str:
    """Return the innermost line of the repository that is being executed."""
    lines = []
    for frame in traceback.extract_stack():
        inside = frame.filename.startswith(f"{ROOT}{os.sep}") and ".venv" not in frame.filename
        if inside and frame.filename != __file__:
            lines.append(f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno} {frame.line}")
    return lines[-1] if lines else "the backward pass"


@contextlib.contextmanager
def watch() -> Iterator[Watch]:
    """Take the device for one with CUDA, on which our kernels run, and note what waits."""
    names = [
        (JITFunction, "run", lambda *args, **kwargs: None),
        (Tensor, "is_cuda", property(lambda x: x.device.type == "gpu")),
        (Tensor, "new_tensor", copied(Tensor.new_tensor)),
        (torch, "tensor", copied(torch.tensor)),
        (torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=8)),
        (torch.cuda, "get_device_capability", lambda _: (9, 0)),
        (torch.cuda, "current_device", lambda: 0),
    ]
    for module in pkgutil.iter_modules(kernels.__path__):
        file = importlib.import_module(f"kernels.{module.name}")
        if hasattr(file, "fused"):
            names.append((file, "fused", lambda x: x.is_cuda))
    real = [(owner, name, getattr(owner, name)) for owner, name, _ in names]
    for owner, name, new in names:
        setattr(owner, name, new)
    with Watch() as mode:
        yield mode
    for owner, name, old in real:
        setattr(owner, name, old)


def copied(make):
    """Return torch.tensor or new_tensor, which hide from modes that they copy to a device."""

    def make_and_copy(*args, device=None, **options):
        if device is None and isinstance(args[0], Tensor):
            device = args[0].device  # of new_tensor
        if isinstance(args[0], OnGPU):
            args = (args[0].data_of, *args[1:])
        made = make(*args, device="cpu", **options)
        return made if device is None else made.to(device)

    return make_and_copy
