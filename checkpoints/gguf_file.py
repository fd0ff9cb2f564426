"""One GGUF file, as llama.cpp's package `gguf` writes and reads it: keys, and tensors by name.

    tensor = FileTensor("output_norm.weight", (D,), lambda: norm.weight.float(), is_float32=True)
    write_gguf(path, {"general.architecture": "llama", ...}, [tensor, ...], "q8_0")
    compare(path, fields, tensors, "q8_0")      # a UserError unless the file holds just that

A tensor is made when it is written, so that there is never a second copy of a whole model. Norms
and biases are float32 in every file. A row that is not whole blocks of a quantized type is float16.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints.files import write_file
from config import UserError

ARCHITECTURE = "general.architecture"

# A file type of --dtype: llama.cpp's number for it, and its name of the type of the matrices.
FILE_TYPES = {
    "float32": (0, "F32"),
    "float16": (1, "F16"),
    "bfloat16": (32, "BF16"),
    "q8_0": (7, "Q8_0"),
    "q4_0": (2, "Q4_0"),
}

QUANTIZED = ("q8_0", "q4_0")  # those of fewer than 16 bits

# Four bits cost most at the head, which may be the embeddings, so these have eight. For SmolLM2
# (135M) that is 18 % more bytes, and the KL divergence of first tokens falls from 0.66 to 0.47.
FINER = ("token_embd.weight", "output.weight")

# How far a number may be from what was quantized, as a share of the largest of its block. Q8_0
# rounds to 1/127 of it. Q4_0 has 16 steps, of which the last on one side is missing.
STEPS = {"Q8_0": 0.6 / 127, "Q4_0": 1.01 / 8}


class FileTensor(NamedTuple):
    """A tensor of a GGUF file, that is made when it is written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]  # in float32, on the CPU
    is_float32: bool = False  # in a file of any type


def write_gguf(path: Path, fields: dict, tensors: list[FileTensor], file_type: str):
    """Write one GGUF file, whole or not at all.

    fields: keys and their values, of which the Python types decide the types in the file.
    file_type: one of FILE_TYPES. Raises UserError without the package.
    """
    package = gguf_package()

    def fill(temporary: str):
        """Write the file under its temporary name."""
        writer = package.GGUFWriter(temporary, fields[ARCHITECTURE])
        for key, value in with_file_type(fields, file_type).items():
            if key != ARCHITECTURE:  # which the writer has from its start
                add_field(writer, key, value)

        # First the shapes of all, so that then one after the other can be written.
        for tensor in tensors:
            kind = tensor_type(tensor, file_type)
            shape = package.quants.quant_shape_to_byte_shape(tensor.shape, kind)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), prod(shape), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()

        for tensor in watched(tensors, f"writing {path.name}"):
            kind = tensor_type(tensor, file_type)
            values = tensor.make().contiguous()
            stored = package.quants.quantize(values.numpy(), kind)
            writer.write_tensor_data(stored.view(np.uint8))
        writer.close()

    write_file(path, fill)


def with_file_type(fields: dict, file_type: str) -> dict:
    """Return the keys of a file with those of its type."""
    number, _ = FILE_TYPES[file_type]
    return {
        **fields,
        "general.file_type": number,
        "general.quantization_version": 2,
    }


def add_field(writer, key: str, value):
    """Add a key to a file. Whole numbers have 32 bits without a sign there, lists one type."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def tensor_type(tensor: FileTensor, file_type: str):
    """Return the type that a tensor has in a file of a file type."""
    package = gguf_package()
    types = package.GGMLQuantizationType
    if tensor.is_float32:
        return types.F32

    _, name = FILE_TYPES[file_type]
    kind = types[name]
    if kind == types.Q4_0 and tensor.name in FINER:
        kind = types.Q8_0

    # A block of a quantized type is a part of one row.
    block, _ = package.GGML_QUANT_SIZES[kind]
    if tensor.shape[-1] % block:
        return types.F16
    return kind


def watched(tensors: list[FileTensor], what: str):
    """Yield the tensors; a terminal sees how many numbers are done."""
    total = 0
    for tensor in tensors:
        total += prod(tensor.shape)
    progress = tqdm(total=total, desc=what, unit_scale=True, disable=None, leave=False)
    with progress:
        for tensor in tensors:
            yield tensor
            progress.update(prod(tensor.shape))


def gguf_package():
    """Import llama.cpp's `gguf`, an optional package, when it is needed. Raise UserError."""
    try:
        import gguf
    except ImportError:
        what = "the package gguf, which writes it, is not installed"
        raise UserError("--to gguf", what, "pip install '.[gguf]'") from None
    return gguf


# --------------------------------------------------------------------------------------- the check


def compare(path: Path, fields: dict, tensors: list[FileTensor], file_type: str):
    """Raise UserError unless a file has just these keys and tensors, each number as it should be.

    In float32, float16 and bfloat16 every number is exact, that is what torch rounds it to. In a
    quantized type it is as near as STEPS says.
    """
    reader = gguf_package().GGUFReader(path)
    for key, value in with_file_type(fields, file_type).items():
        field = reader.get_field(key)
        if field is None or not is_same(field.contents(), value):
            raise differs(path, key)

    stored = {tensor.name: tensor for tensor in reader.tensors}
    if stored.keys() != {tensor.name for tensor in tensors}:
        raise differs(path, "the names of its tensors")
    for tensor in watched(tensors, f"checking {path.name}"):
        if not holds(stored[tensor.name], tensor, file_type):
            raise differs(path, tensor.name)


def differs(path: Path, what: str) -> UserError:
    """Return the error for a file that does not hold what was written."""
    return UserError(f"{path.name}:{what}", "not what the model has", "export again, report it")


def is_same(stored, value) -> bool:
    """Return whether a key has a value; a fraction has 32 bits in a file."""
    if isinstance(value, float):
        return stored == float(np.float32(value))
    if isinstance(value, list) and value and isinstance(value[0], float):
        return stored == np.array(value, np.float32).tolist()
    return stored == value


def holds(stored, tensor: FileTensor, file_type: str) -> bool:
    """Return whether what a reader found is a tensor in a file of a file type."""
    kind = tensor_type(tensor, file_type)
    shape = tuple(int(size) for size in reversed(stored.shape))
    if stored.tensor_type != kind or shape != tensor.shape:
        return False

    package = gguf_package()
    values = tensor.make()
    dequantized = package.quants.dequantize(stored.data, kind)
    found = torch.tensor(dequantized).view(values.shape)

    # Quantized in blocks of a row.
    if kind.name in STEPS:
        block, _ = package.GGML_QUANT_SIZES[kind]
        blocks = values.view(-1, block)
        largest = blocks.abs().amax(1, keepdim=True)
        distance = (found.view(-1, block) - blocks).abs()
        limit = STEPS[kind.name] * largest
        return bool((distance <= limit).all())

    rounded = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind.name]
    return torch.equal(found.float(), values.to(rounded).float())
