"""Faster layers for decoding: other kernels in place of the modules' own methods.

    with replaced(fast_layers(language_model)):
        ...  # every step of decoding in here is faster

`fast_linears`: a step of decoding multiplies every weight with a few rows only, so its time is the
time to read the weights. The modules' own forwards are made for training; these can do better:

- on a CPU with a C++ compiler: inference/cpu.py reads a weight at the speed of the memory.
- bfloat16 on a CPU: oneDNN lays a weight out anew for every product. Here that is done once, for
  what has more rows than a step.
- NF4 on a CPU: torch has no product that reads its codes, so the weight is dequantized once.
- other quantized weights: the product is called without the (empty) adapter of lora.Quantized.

`fast_norms`, `fast_rotations`: with a C++ compiler each of them is one call, where torch needs ten,
which together would take as long as reading the weights of a small model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference import cpu
from kernels import int8, nf4
from kernels.lora import FORMATS
from kernels.rope import rope
from layers import LayerNorm, RMSNorm

Forward = Callable[[Tensor], Tensor]
Bias = Tensor | None


class Replacement(NamedTuple):
    """A function that takes the place of a module's attribute."""

    module: nn.Module
    name: str
    function: Callable


# Rows up to which inference/cpu.py is faster than oneDNN in bfloat16.
FEW_BFLOAT16 = 4
FEW_NF4 = 8  # and faster with codes than with the dequantized weight
FEW_INT8 = 64  # and faster than dequantizing first, for each product anew


def fast_layers(lm: nn.Module) -> list[Replacement]:
    """Return all that is faster for the decoding of a language model."""
    replacements = []
    for module, forward in fast_linears(lm).items():
        replacements.append(Replacement(module, "forward", forward))

    weight = lm.model.norm.weight
    compiled = weight.is_cpu and cpu.library() is not None
    if compiled and weight.dtype in cpu.WIDTHS:
        replacements += fast_norms(lm)
        replacements += fast_rotations(lm)
    return replacements


def fast_linears(lm: nn.Module) -> dict[nn.Module, Forward]:
    """Return a faster forward for every linear layer of a language model that has one.

    A weight that is laid out or dequantized takes its size in memory once more.
    """
    some_weight = lm.model.norm.weight
    dtype = some_weight.dtype
    on_cpu = some_weight.is_cpu

    # What is none of the kinds above, such as a sharded weight, keeps its own forward.
    fast = {}
    for name, module in lm.named_modules():
        # An adapter multiplies with its base layer itself, and never calls its forward.
        if name.endswith("base_layer"):
            continue

        weight = getattr(module, "weight", None)
        if type(weight) is nf4.NF4 and on_cpu:
            fast[module] = _nf4(weight, module.bias, dtype)
        elif type(weight) in FORMATS:
            fast[module] = _quantized(weight, module.bias, dtype)
        elif isinstance(module, nn.Linear) and on_cpu and _is_plain(weight, dtype):
            fast[module] = _dense(weight.detach(), module.bias)
    return fast


def _is_plain(weight: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a weight is an ordinary parameter: neither sharded nor of another dtype."""
    return type(weight) is nn.Parameter and weight.dtype == dtype


def _takes(x: Tensor, dtype: torch.dtype, most: int = cpu.FEW) -> bool:
    """Return whether inference/cpu.py takes these rows: few of them, in its dtype.

    Autocast, which chooses the dtype of every product, does not know it.
    """
    if torch.is_autocast_enabled("cpu"):
        return False
    return x.size(0) <= most and x.dtype == dtype


def _dense(weight: Tensor, bias: Bias) -> Forward:
    """Return x -> x weight^T + bias."""
    many = _many_rows(weight, bias)
    if not cpu.fits(weight.dtype, weight):
        return many

    # With more rows oneDNN's arithmetic in bfloat16 is faster.
    most = cpu.FEW
    if _suits_onednn(weight):
        most = FEW_BFLOAT16

    def linear(x):
        if not _takes(x, weight.dtype, most):
            return many(x)
        return _add_bias(cpu.product(x, weight), bias)

    return linear


def _suits_onednn(weight: Tensor) -> bool:
    """Return whether oneDNN has a layout of its own for a weight."""
    if weight.dtype != torch.bfloat16:
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _many_rows(weight: Tensor, bias: Bias) -> Forward:
    """Return x -> x weight^T + bias by torch, a bfloat16 weight in oneDNN's own layout."""
    if not _suits_onednn(weight):

        def linear(x):
            return F.linear(x, weight, bias)

        return linear

    # Laying the weight out takes longer than the product with a few rows.
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight)

    def reordered_linear(x):
        return torch.ops.mkldnn._linear_pointwise.default(x, reordered, bias, "none", [], "")

    return reordered_linear


def _nf4(weight: nf4.NF4, bias: Bias, dtype: torch.dtype) -> Forward:
    """Return x -> x weight^T + bias: few rows by the codes, others by the dequantized weight."""
    dense = _dense(nf4.dequantize(weight, dtype), bias)
    outputs, columns = weight.shape
    if dtype not in cpu.WIDTHS or not cpu.fits_nf4(columns, weight.blocksize):
        return dense

    packed = weight.packed.contiguous()
    scales = nf4.block_scales(weight).contiguous()
    code = weight.quant_map.contiguous()

    def linear(x):
        if not _takes(x, dtype, FEW_NF4):
            return dense(x)
        return _add_bias(cpu.nf4(x, packed, scales, code, outputs), bias)

    return linear


def _quantized(weight: nf4.NF4 | int8.Int8, bias: Bias, dtype: torch.dtype) -> Forward:
    """Return x -> x weight^T + bias, with the product of the weight's format."""
    matmul = FORMATS[type(weight)].matmul
    reads_int8 = type(weight) is int8.Int8 and cpu.fits(dtype, weight.weight)

    def linear(x):
        if reads_int8 and _takes(x, dtype, FEW_INT8):
            y = cpu.product(x, weight.weight, weight.SCB, int8.STEP)
        else:
            y = matmul(x, weight)
        return _add_bias(y, bias)

    return linear


def _add_bias(y: Tensor, bias: Bias) -> Tensor:
    """Return y + bias. It is in place: y is new, and nothing is differentiated here."""
    if bias is None:
        return y
    return y.add_(bias)


def fast_norms(lm: nn.Module) -> list[Replacement]:
    """Return `forward` and `add` of every norm by inference/cpu.py, for few rows."""
    dtype = lm.model.norm.weight.dtype
    replacements = []
    for module in lm.modules():
        if isinstance(module, (LayerNorm, RMSNorm)) and _is_plain(module.weight, dtype):
            replacements += _norm(module)
    return replacements


def _norm(module: LayerNorm | RMSNorm) -> list[Replacement]:
    """Return the two methods of one norm."""
    own = type(module)
    weight = module.weight.detach()
    dtype = weight.dtype
    rest = (weight, module.bias, module.eps, module.kind)

    def forward(x):
        if not _takes(x, dtype):
            return own.forward(module, x)
        normed, _ = cpu.norm(x, None, *rest)
        return normed

    def add(x, residual):
        if not _takes(x, dtype) or residual.dtype != dtype:
            return own.add(module, x, residual)
        return cpu.norm(x, residual, *rest)

    return [
        Replacement(module, "forward", forward),
        Replacement(module, "add", add),
    ]


def fast_rotations(lm: nn.Module) -> list[Replacement]:
    """Return `rotate` of every attention that rotates, by inference/cpu.py, for few rows."""
    dtype = lm.model.norm.weight.dtype

    def rotate(q, k, cos, sin):
        if not _takes(q, dtype) or k.dtype != dtype:
            return rope(q, k, cos, sin)
        turned_q = cpu.turn(q, cos, sin)
        turned_k = cpu.turn(k, cos, sin)
        return turned_q, turned_k

    replacements = []
    for module in lm.modules():
        if getattr(module, "rotate", None) is rope:
            replacements.append(Replacement(module, "rotate", rotate))
    return replacements


@contextmanager
def replaced(replacements: list[Replacement]) -> Iterator[None]:
    """Give modules other attributes, and their own again at the end."""
    before = []
    try:
        for module, name, function in replacements:
            # An attribute of the module itself hides the method of its class.
            before.append((module, name, module.__dict__.get(name)))
            module.__dict__[name] = function
        yield
    finally:
        for module, name, own in before:
            if own is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = own
