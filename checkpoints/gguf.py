"""GGUF, the files of llama.cpp, Ollama and LM Studio: `model.gguf`, and `mmproj.gguf` for pictures.

    python export.py --model DIR --to gguf OUT                  # f32, f16 or bf16, as the weights are
    python export.py --model DIR --to gguf OUT --dtype q8_0     # or q4_0; float32, bfloat16, float16
    python export.py --model DIR --to gguf OUT --check          # read back, and asked beside llama.cpp

The text model has keys, such as `llama.block_count`, and tensors, such as `blk.0.attn_q.weight`.
An architecture of llama.cpp is a graph in its own code. FAMILIES says for each of our families which
of them computes the same, what the tensors are called there, and which of them change: llama's
graph, for one, turns neighbours in a head where ours turns halves.

Read `write`, then `text_fields` and `text_tensors`. gguf_tokenizer.py makes the tokenizer's keys,
gguf_vision.py the file of encoder and connector.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints import gguf_tokenizer
from checkpoints.fields import Fields
from checkpoints.files import write_file
from checkpoints.names import matches, rename
from config import UserError

MODEL = "model.gguf"
ARCHITECTURE = "general.architecture"

# A file type of --dtype: llama.cpp's number for it, and the type of its matrices. Norms and biases,
# which are vectors, are float32 in all of them.
FILE_TYPES = {
    "float32": (0, "F32"),
    "float16": (1, "F16"),
    "bfloat16": (32, "BF16"),
    "q8_0": (7, "Q8_0"),
    "q4_0": (2, "Q4_0"),
}

# A context that config.json does not state.
CONTEXT = 4096

# -------------------------------------------------------------------------------------- families

# A change of a tensor: (tensor, the language model) -> what the file has, of the same shape.
Change = Callable[[Tensor, object], Tensor]


def neighbours(tensor: Tensor, lm) -> Tensor:
    """Return rows of queries or keys in the order in which llama.cpp's own graph turns them.

    Our rotation turns number i of a head together with number i + d/2; that graph turns numbers 2i
    and 2i + 1. So the rows of each head, (d, D) of a weight or (d,) of a bias, are interleaved.
    """
    d = lm.config.head_dim
    halves = tensor.unflatten(0, (-1, 2, d // 2))  # (H, 2, d/2, ...)
    return halves.transpose(1, 2).reshape(tensor.shape)


class Family(NamedTuple):
    """How llama.cpp knows a family."""

    architecture: str

    # Our names and its names, in pairs, where they are not those of NAMES. Several of ours that get
    # one name are one tensor there, along dimension 0, in our order.
    names: tuple[tuple[str, str], ...] = ()

    # Its names, and what becomes of such a tensor.
    changes: tuple[tuple[str, Change], ...] = ()


NAMES = (
    ("model.embed_tokens.*", "token_embd.*"),
    ("model.norm.*", "output_norm.*"),
    ("lm_head.*", "output.*"),
    ("model.layers.*.self_attn.q_proj.*", "blk.*.attn_q.*"),
    ("model.layers.*.self_attn.k_proj.*", "blk.*.attn_k.*"),
    ("model.layers.*.self_attn.v_proj.*", "blk.*.attn_v.*"),
    ("model.layers.*.self_attn.o_proj.*", "blk.*.attn_output.*"),
    ("model.layers.*.self_attn.q_norm.*", "blk.*.attn_q_norm.*"),
    ("model.layers.*.self_attn.k_norm.*", "blk.*.attn_k_norm.*"),
    ("model.layers.*.input_layernorm.*", "blk.*.attn_norm.*"),
    ("model.layers.*.post_attention_layernorm.*", "blk.*.ffn_norm.*"),
    ("model.layers.*.mlp.gate_proj.*", "blk.*.ffn_gate.*"),
    ("model.layers.*.mlp.up_proj.*", "blk.*.ffn_up.*"),
    ("model.layers.*.mlp.down_proj.*", "blk.*.ffn_down.*"),
)

INTERLEAVED = (
    ("blk.*.attn_q.*", neighbours),
    ("blk.*.attn_k.*", neighbours),
)

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", changes=INTERLEAVED),
}

# --------------------------------------------------------------------------------------- writing


def write(folder: Path, model, tokenizer, file_type: str | None = None):
    """Write the GGUF files of a LLaVA into a folder. Weights go out tensor by tensor.

    file_type: one of FILE_TYPES; None for that of the weights. Raises UserError, before anything is
    written, for what llama.cpp cannot express.
    """
    check_expressible(model)
    fields = text_fields(model) | gguf_tokenizer.tokenizer_fields(model, tokenizer)
    tensors = text_tensors(model)
    if file_type is None:
        file_type = str(model.language_model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    write_gguf(folder / MODEL, fields, tensors, file_type)


def check_expressible(model):
    """Raise UserError naming the part of the language model that llama.cpp has no place for."""
    kind = model.config.text["model_type"]
    if kind not in FAMILIES:
        reason = f"{kind}: llama.cpp has no such graph, or it is not written here"
        raise UserError("--to gguf", reason, "export to barellava")


def text_fields(model) -> dict:
    """Return the keys of a text model, its tokenizer's aside."""
    lm = model.language_model
    c = lm.config
    text = Fields(model.config.text, "llm_config")
    family = FAMILIES[model.config.text["model_type"]]
    (layer, *_) = c.layers

    own = {
        "context_length": text.integer("max_position_embeddings", 2, 2**31 - 1, default=CONTEXT),
        "embedding_length": c.width,
        "block_count": len(c.layers),
        "feed_forward_length": layer.intermediate,
        "vocab_size": c.vocab,
        "attention.head_count": layer.heads,
        "attention.head_count_kv": layer.kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": lm.model.norm.eps,
        "rope.freq_base": c.rope_theta,
        "rope.dimension_count": c.rotary_dim,
    }
    fields = {ARCHITECTURE: family.architecture, "general.type": "model"}
    for key, value in own.items():
        fields[f"{family.architecture}.{key}"] = value
    return fields


class FileTensor(NamedTuple):
    """A tensor of a GGUF file, that is made when it is written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]  # in float32


def text_tensors(model) -> list[FileTensor]:
    """Return the tensors of a language model as llama.cpp's graph for its family wants them."""
    lm = model.language_model
    family = FAMILIES[model.config.text["model_type"]]
    parts: dict[str, list[Tensor]] = {}
    for ours, tensor in lm.state_dict().items():
        if ours not in lm.tied:
            name = rename(ours, family.names + NAMES)
            parts.setdefault(name, []).append(tensor)

    tensors = []
    for name, stacked in parts.items():
        rows = sum(len(part) for part in stacked)
        shape = (rows, *stacked[0].shape[1:])

        def make(name=name, stacked=stacked) -> Tensor:
            tensor = torch.cat([part.detach().cpu().float() for part in stacked])
            for pattern, change in family.changes:
                if matches(name, [pattern]):
                    tensor = change(tensor, lm)
            return tensor

        tensors.append(FileTensor(name, shape, make))
    return tensors


def write_gguf(path: Path, fields: dict, tensors: list[FileTensor], file_type: str):
    """Write one GGUF file, whole or not at all.

    fields: keys and their values, of which the Python types decide the types in the file.
    """
    package = gguf_package()
    number, _ = FILE_TYPES[file_type]
    fields = fields | {"general.file_type": number, "general.quantization_version": 2}

    def fill(temporary: str):
        writer = package.GGUFWriter(temporary, fields[ARCHITECTURE])
        for key, value in fields.items():
            if key != ARCHITECTURE:  # which the writer has from its start
                add_field(writer, key, value)

        # First the shapes of all, so that then one after the other can be written.
        for tensor in tensors:
            kind = tensor_type(tensor, file_type)
            shape = package.quants.quant_shape_to_byte_shape(tensor.shape, kind)
            size = int(np.prod(shape))
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()

        total = sum(int(np.prod(tensor.shape)) for tensor in tensors)
        with tqdm(total=total, unit="", unit_scale=True, disable=None, leave=False) as progress:
            progress.set_description(path.name)
            for tensor in tensors:
                writer.write_tensor_data(quantized(tensor, file_type))
                progress.update(int(np.prod(tensor.shape)))
        writer.close()

    write_file(path, fill)


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
    _, name = FILE_TYPES[file_type]
    if len(tensor.shape) == 1:
        return types.F32

    # A block of a quantized type is a part of one row.
    kind = types[name]
    block, _ = package.GGML_QUANT_SIZES[kind]
    if tensor.shape[-1] % block:
        return types.F16
    return kind


def quantized(tensor: FileTensor, file_type: str) -> np.ndarray:
    """Return the bytes of a tensor in a file of a file type, an array of its rows."""
    kind = tensor_type(tensor, file_type)
    values = tensor.make().contiguous().numpy()
    return gguf_package().quants.quantize(values, kind).view(np.uint8)


def gguf_package():
    """Import llama.cpp's `gguf`, an optional package, when it is needed. Raise UserError."""
    try:
        import gguf
    except ImportError:
        what = "the package gguf, which writes it, is not installed"
        raise UserError("--to gguf", what, "pip install '.[gguf]'") from None
    return gguf
