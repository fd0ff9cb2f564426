"""mmproj, the vision half of a GGUF for llama.cpp: the encoder, the connector, the picture's sizes.

    check_expressible(model)          # before anything is written
    write(path, model, "float16")

llama.cpp computes one of two graphs with a SigLIP, by the connector:

    mlp         identity, linear, mlp1x_gelu, mlp2x_gelu; image mode square, one view of a picture
    idefics3    SmolVLM's (Laurencon et al., 2024): pixel_shuffle with one linear; image mode split

Tensors have the names of llama.cpp's tools/mtmd. Products are computed in the file's type, and the
patch embedding in float16 in any file, so features are 1e-4 to 1e-3 from ours (relative).

C width of the encoder, D width of the language model, W width inside the projector.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from checkpoints.files import write_file
from config import UserError
from inputs.tiling_split import FAKE, GLOBAL

# The graph mlp computes linear, GELU, linear. Its GELU returns x itself from 10 on. So a connector
# of one linear, or none, has SHIFT added before the GELU and taken away behind it. That is exact as
# long as no output is below 10 - SHIFT. A much larger number would cost digits: at 512 float32 has
# steps of 6e-5.
SHIFTED = ("identity", "linear", "mlp1x_gelu")
SHIFT = 512.0
MLP = (*SHIFTED, "mlp2x_gelu")

# llama.cpp's number of a file's type, and the type of its matrices.
FILE_TYPES = {"float32": (0, "F32"), "float16": (1, "F16"), "bfloat16": (32, "BF16")}


def graph_of(model) -> str:
    """Return llama.cpp's name of the graph for a model that can be expressed."""
    if model.config.connector == "pixel_shuffle":
        return "idefics3"
    return "mlp"


# ------------------------------------------------------------------------------- what can be said


def check_expressible(model):
    """Raise UserError naming the part that llama.cpp computes otherwise, and what to change."""
    for check in (check_encoder, check_connector, check_pictures):
        refusal = check(model)
        if refusal:
            reason, fix = refusal
            raise UserError("--to gguf", reason, fix)


def check_encoder(model) -> tuple[str, str] | None:
    """Return why the encoder cannot be expressed, and what to change; None if it can."""
    c = model.config
    kind = c.vision.get("model_type")
    siglip = 'train with a SigLIP of one size and feature_select = "cls_patch"'
    if kind == "clip_vision_model":
        return "encoder CLIP: llama.cpp takes the last patch for the class token", siglip
    if kind != "siglip_vision_model":
        return f"encoder {kind}: llama.cpp has no such graph for a LLaVA", siglip

    tower = model.vision_tower.config
    if tower.hidden_act not in ("gelu_pytorch_tanh", "quick_gelu"):
        fix = "train with an encoder of gelu_pytorch_tanh"
        return f"hidden_act {tower.hidden_act}: llama.cpp has GELU by tanh and quick GELU", fix
    if c.feature_select != "cls_patch":
        what = "feature_select patch: it drops SigLIP's first patch, and llama.cpp keeps all"
        return what, 'train with feature_select = "cls_patch"'
    if not len(model.vision_tower.blocks):
        return "features of no layer: llama.cpp has one at least", "raise feature_layer"
    return None


def check_connector(model) -> tuple[str, str] | None:
    """Return why the connector cannot be expressed, and what to change; None if it can."""
    c = model.config
    if c.connector == "pixel_shuffle":
        connector = model.connector
        if not isinstance(connector.proj, nn.Linear):
            return "pixel_shuffle with an MLP: llama.cpp has one linear", "train with mlp_depth = 1"
        if connector.factor == 1:
            return "pixel_shuffle with factor 1: llama.cpp joins 2 x 2 at least", "use linear"
        return None
    if c.connector not in MLP:
        fix = f"train with one of {', '.join(MLP)}, or with pixel_shuffle"
        return f"connector {c.connector}: llama.cpp has no such graph", fix
    return None


def check_pictures(model) -> tuple[str, str] | None:
    """Return why pictures would be seen otherwise, and what to change; None if they are not."""
    c = model.config
    wanted = "square"
    if graph_of(model) == "idefics3":
        wanted = "split"
    if c.image_mode != wanted:
        fix = f"train with image_mode = {wanted!r}"
        return f"image mode {c.image_mode}: with {c.connector} llama.cpp has {wanted}", fix

    resample = model.vision_tower.processor.resample
    if resample != Image.Resampling.BICUBIC:
        name = Image.Resampling(resample).name.lower()
        fix = "train with an image processor of resample 3"
        return f"pictures resized with {name}: llama.cpp does it with bicubic", fix
    if wanted == "split":
        return check_split(model)
    return None


def check_split(model) -> tuple[str, str] | None:
    """Return why the text around the views would be another one; None if it is the same."""
    if model.views.most() == 1:
        what = "pictures of one view: llama.cpp puts a blank line before the view of every picture"
        return what, "train with an image_edge of two views at least"
    for name in ("\n", "\n\n", FAKE, GLOBAL):
        if len(model.config.image_marks[name]) != 1:
            fix = "train with a tokenizer that has it"
            return f"{name!r} of several tokens: llama.cpp looks it up as one", fix
    return None


# ------------------------------------------------------------------------------------- the contents


def fields(model) -> dict:
    """Return the keys of the file, but those that every GGUF has."""
    tower = model.vision_tower
    c = tower.config
    blocks = len(tower.blocks)
    graph = graph_of(model)
    values = {
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": graph,
        "clip.vision.image_size": c.processor.side,
        "clip.vision.patch_size": c.patch_size,
        "clip.vision.embedding_length": c.width,
        "clip.vision.feed_forward_length": c.intermediate,
        "clip.vision.block_count": blocks,
        "clip.vision.attention.head_count": c.heads,
        "clip.vision.attention.layer_norm_epsilon": float(c.norm_eps),
        "clip.vision.projection_dim": model.language_model.config.width,
        "clip.vision.image_mean": [float(value) for value in c.processor.mean],
        "clip.vision.image_std": [float(value) for value in c.processor.std],
    }
    # Without the key it is the quick one.
    if c.hidden_act != "quick_gelu":
        values["clip.use_gelu"] = True

    if graph == "idefics3":
        values["clip.vision.projector.scale_factor"] = model.connector.factor
        values["clip.vision.preproc_image_size"] = model.config.image_edge
    else:
        # Without this, one more block would be left out.
        values["clip.vision.feature_layer"] = [blocks]

        # A grid of no tiles: the picture is resized to one view, and not padded.
        values["clip.vision.image_grid_pinpoints"] = [0, 0]
    return values


def tensors(model) -> dict[str, Tensor]:
    """Return the tensors of the file by their names there, in the types that the model has."""
    tower = model.vision_tower
    embeddings = tower.embeddings
    named = {
        "v.patch_embd.weight": embeddings.patch_embedding.weight,
        "v.patch_embd.bias": embeddings.patch_embedding.bias,
        "v.position_embd.weight": embeddings.position_embedding.weight,
    }

    # llama.cpp swaps the two halves of an MLP where they have the same shape.
    up, down = "ffn_up", "ffn_down"
    if tower.config.intermediate == tower.config.width:
        up, down = down, up
    for i, block in enumerate(tower.blocks):
        modules = {
            "ln1": block.layer_norm1,
            "ln2": block.layer_norm2,
            "attn_q": block.self_attn.q_proj,
            "attn_k": block.self_attn.k_proj,
            "attn_v": block.self_attn.v_proj,
            "attn_out": block.self_attn.out_proj,
            up: block.mlp.fc1,
            down: block.mlp.fc2,
        }
        for name, module in modules.items():
            named[f"v.blk.{i}.{name}.weight"] = module.weight
            named[f"v.blk.{i}.{name}.bias"] = module.bias

    if tower.config.final_norm:
        named["v.post_ln.weight"] = tower.post_layernorm.weight
        named["v.post_ln.bias"] = tower.post_layernorm.bias
    with torch.no_grad():
        return named | projector(model)


def projector(model) -> dict[str, Tensor]:
    """Return the tensors of the connector; the factor on its output is in the last of them."""
    c = model.config
    scale = c.image_scale
    if c.connector == "pixel_shuffle":
        return {"mm.model.fc.weight": model.connector.proj.weight * scale}

    if c.connector == "mlp2x_gelu":
        first, second = model.connector[0], model.connector[2]
        return {
            "mm.0.weight": first.weight,
            "mm.0.bias": first.bias,
            "mm.2.weight": second.weight * scale,
            "mm.2.bias": second.bias * scale,
        }

    # One linear, and what becomes nothing around the GELU; see SHIFT.
    width = model.language_model.config.width
    one = torch.eye(width)
    if c.connector == "identity":
        weight = one
        bias = torch.zeros(width)
    else:
        linear = model.connector
        if isinstance(linear, nn.Sequential):
            linear = linear[0]
        weight = linear.weight.float()
        bias = linear.bias.float()
    return {
        "mm.0.weight": weight * scale,
        "mm.0.bias": bias * scale + SHIFT,
        "mm.2.weight": one,
        "mm.2.bias": torch.full((width,), -SHIFT),
    }


# -------------------------------------------------------------------------------------- the writing


def write(path: Path, model, file_type: str):
    """Write the mmproj of a model, whole or not at all, one tensor after the other.

    file_type: one of FILE_TYPES, or another one of the text model: then the matrices are float16.
    Raises UserError as check_expressible does, and without the package gguf.
    """
    check_expressible(model)
    package = gguf_package()
    number, matrices = FILE_TYPES.get(file_type, FILE_TYPES["float16"])
    named = tensors(model)
    kinds = {}
    for name, tensor in named.items():
        stored = "F32" if is_float32(name, tensor, model) else matrices
        kinds[name] = package.GGMLQuantizationType[stored]

    def fill(temporary: str):
        writer = package.GGUFWriter(temporary, "clip")
        writer.add_file_type(number)
        for key, value in fields(model).items():
            add_field(writer, key, value)

        # The shapes of all come first, so that one tensor after the other can be written then.
        for name, tensor in named.items():
            _, size = package.GGML_QUANT_SIZES[kinds[name]]
            writer.add_tensor_info(
                name, tensor.shape, np.dtype(np.float32), tensor.numel() * size, kinds[name]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in named.items():
            values = tensor.detach().float().cpu().contiguous().numpy()
            writer.write_tensor_data(package.quantize(values, kinds[name]))
        writer.close()

    write_file(path, fill)


def is_float32(name: str, tensor: Tensor, model) -> bool:
    """Return whether a tensor is float32 in every file: one that is added, or that is shifted."""
    is_shifted = name.startswith("mm.") and model.config.connector in SHIFTED
    return tensor.dim() == 1 or name == "v.position_embd.weight" or is_shifted


def add_field(writer, key: str, value):
    """Add a key to a file, with the type there that the Python type stands for."""
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


def gguf_package():
    """Import llama.cpp's `gguf`, an optional package, when it is needed. Raise UserError."""
    try:
        import gguf
    except ImportError:
        what = "the package gguf, which writes it, is not installed"
        raise UserError("--to gguf", what, "pip install '.[gguf]'") from None
    return gguf
