"""mmproj, the vision half of a GGUF for llama.cpp: the encoder, the connector, the picture's sizes.

    check_expressible(model)          # before anything is written
    write(path, model, "float16")

llama.cpp computes one of two graphs with a SigLIP, by the connector:

    mlp         identity, linear, mlp1x_gelu, mlp2x_gelu; image mode square, one view of a picture
    idefics3    SmolVLM's (Laurencon et al., 2024): pixel_shuffle with one linear; image mode split

Pixels are equal to ours to the bit, but for one thing: Pillow 13 resizes the columns of a tall
picture before its rows, where it is less work, and llama.cpp as Pillow did before. Its products are
in the file's type and its patch embedding in float16, so features are 1e-4 to 1e-3 from ours.

C width of the encoder, D width of the language model, W width inside the projector.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from checkpoints.gguf_file import ARCHITECTURE, FileTensor, compare, write_gguf
from config import UserError
from inputs.tiling_split import FAKE, GLOBAL

# The graph mlp computes linear, GELU, linear. Its GELU returns x itself from 10 on. So a connector
# of one linear, or none, has SHIFT added before the GELU and taken away behind it. That is exact as
# long as no output is below 10 - SHIFT. A much larger number would cost digits: at 512 float32 has
# steps of 6e-5.
SHIFTED = ("identity", "linear", "mlp1x_gelu")
SHIFT = 512.0
MLP = (*SHIFTED, "mlp2x_gelu")

# By image mode, how llama.cpp resizes pictures there.
RESAMPLE = {"square": Image.Resampling.BICUBIC, "split": Image.Resampling.LANCZOS}


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
    kind = model.vision_tower.config.hf["model_type"]
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

    resample = Image.Resampling(model.vision_tower.processor.resample)
    if resample != RESAMPLE[wanted]:
        theirs = RESAMPLE[wanted].name.lower()
        what = (
            f"pictures resized with {resample.name.lower()}: llama.cpp has {theirs} with {wanted}"
        )
        return what, f"train with resample {RESAMPLE[wanted]:d} in its preprocessor_config.json"
    if wanted == "split":
        return check_split(model)
    return None


def check_split(model) -> tuple[str, str] | None:
    """Return why views would be others, or the text around them; None if both are the same."""
    side = model.vision_tower.processor.side
    edge = model.config.image_edge
    if edge <= side:
        # It would be written as a tile and a whole picture.
        fix = f"train with image_edge = {2 * side} or more"
        return "pictures of one view: llama.cpp makes two of it", fix
    if edge % side or edge % 2:
        what = f"image_edge {edge}, no even multiple of {side}: llama.cpp rounds to other views"
        return what, f"train with image_edge = {2 * side * (edge // (2 * side) + 1)}"
    for name in ("\n", "\n\n", FAKE, GLOBAL):
        if len(model.config.image_marks[name]) != 1:
            fix = "train with a tokenizer that has it"
            return f"{name!r} of several tokens: llama.cpp looks it up as one", fix
    return None


# ------------------------------------------------------------------------------------- the contents


def vision_fields(model) -> dict:
    """Return the keys of the file."""
    tower = model.vision_tower
    c = tower.config
    graph = graph_of(model)
    fields = {
        ARCHITECTURE: "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": graph,
        "clip.vision.image_size": c.processor.side,
        "clip.vision.patch_size": c.patch_size,
        "clip.vision.embedding_length": c.width,
        "clip.vision.feed_forward_length": c.intermediate,
        "clip.vision.block_count": len(tower.blocks),
        "clip.vision.attention.head_count": c.heads,
        "clip.vision.attention.layer_norm_epsilon": c.norm_eps,
        "clip.vision.projection_dim": model.language_model.config.width,
        "clip.vision.image_mean": list(c.processor.mean),
        "clip.vision.image_std": list(c.processor.std),
    }
    # Without the key it is the quick one.
    if c.hidden_act != "quick_gelu":
        fields["clip.use_gelu"] = True

    if graph == "idefics3":
        fields["clip.vision.projector.scale_factor"] = model.connector.factor
        fields["clip.vision.preproc_image_size"] = model.config.image_edge
    else:
        # Without this, one more block would be left out.
        fields["clip.vision.feature_layer"] = [len(tower.blocks)]

        # A grid of no tiles: the picture is stretched to one view, and not padded.
        fields["clip.vision.image_grid_pinpoints"] = [0, 0]
    return fields


def vision_tensors(model) -> list[FileTensor]:
    """Return the tensors of the file, with the names that they have there."""
    tensors = []
    for name, tensor in named_tensors(model).items():
        # What no product takes is exact in every file. So is what SHIFT was added to: it would
        # leave float16 no digits.
        is_shifted = name.startswith("mm.") and model.config.connector in SHIFTED
        is_float32 = tensor.dim() == 1 or name == "v.position_embd.weight" or is_shifted

        def make(tensor=tensor) -> Tensor:
            return tensor.detach().float().cpu()

        tensors.append(FileTensor(name, tuple(tensor.shape), make, is_float32))
    return tensors


def named_tensors(model) -> dict[str, Tensor]:
    """Return the tensors by their names in the file, of the model's own types."""
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


def unscaled_inputs(model) -> float:
    """Return the factor of all inputs that llama.cpp's graph leaves out where pictures stand.

    That of Gemma-3 multiplies embeddings of tokens alone, ours and that of Gemma multiply both.
    """
    if model.config.text["model_type"] == "gemma3_text":
        return model.language_model.config.embed_scale
    return 1.0


def projector(model) -> dict[str, Tensor]:
    """Return the tensors of the connector, with the factor on its output in the last product."""
    c = model.config
    scale = c.image_scale * unscaled_inputs(model)
    if c.connector == "pixel_shuffle":
        return {"mm.model.fc.weight": model.connector.proj.weight.float() * scale}

    if c.connector == "mlp2x_gelu":
        first, second = model.connector[0], model.connector[2]
        return {
            "mm.0.weight": first.weight,
            "mm.0.bias": first.bias,
            "mm.2.weight": second.weight.float() * scale,
            "mm.2.bias": second.bias.float() * scale,
        }

    # One linear, and what becomes nothing around the GELU; see SHIFT.
    width = model.language_model.config.width
    one = torch.eye(width)
    if c.connector == "identity":
        weight = one
        bias = torch.zeros(width)
    else:
        linear = model.connector
        if c.connector == "mlp1x_gelu":
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

    file_type: that of the text model, see gguf_file.FILE_TYPES. Raises UserError as
    check_expressible does, before anything is written, and without the package gguf.
    """
    check_expressible(model)
    write_gguf(path, vision_fields(model), vision_tensors(model), type_of(file_type))


def check(path: Path, model, file_type: str):
    """Raise UserError unless a file holds the encoder and connector of a model, as `write` does."""
    compare(path, vision_fields(model), vision_tensors(model), type_of(file_type))


def type_of(file_type: str) -> str:
    """Return the type of the mmproj beside a text model of a type: it is not quantized."""
    if file_type.startswith("q"):
        return "float16"
    return file_type
