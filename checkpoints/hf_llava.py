"""Hugging Face's LLaVA, and LLaVA-NeXT for image mode anyres.

    python export.py --model DIR --to hf-llava OUT                    # for transformers 5
    python export.py --model DIR --to hf-llava OUT --transformers 4   # and for 4

Their classes are LlavaForConditionalGeneration and LlavaNextForConditionalGeneration. We read what
transformers 4 and 5 write. We write folders that they load with nothing missing and nothing left
over, and on which their chat pipelines work; hf_tokenizer.py makes tokenizer and chat template.

Read `read`, then `contents`. Three things in there are more than other names:
- Version 5 multiplies Gemma's token embeddings by sqrt(D) and leaves image features alone. Version
  4 multiplied both, as we do. Gemma-3's image features are left alone by both versions.
- Version 4.57 puts SigLIP's final norm on the last hidden state, so the feature layer must not be
  the last one.
- An `<image>` needs an id of its own, and the embedding may have no row free for it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import weights
from checkpoints.fields import LAYERS, WIDTH, Fields
from checkpoints.folder import (
    folder_readme,
    has_head_bias,
    merged_field,
    named_tensors,
    write_folder,
)
from checkpoints.hf_tokenizer import chat_files, image_token, tokenizer_files
from config import LLaVAConfig, UserError
from encoders import vision_config
from inputs.image_modes import MODES
from inputs.image_processor import preprocessor_place, read_preprocessor

OPENED_BY = "transformers: `AutoModelForImageTextToText.from_pretrained(DIR)` and `AutoProcessor`"

# The connector's two linears, and the separator of anyres, which is a part of the connector for us.
# These are the older names, and those that we write: both versions of transformers read them.
PROJECTOR = (
    ("image_newline", "connector.image_newline"),
    ("multi_modal_projector.linear_1.*", "connector.0.*"),
    ("multi_modal_projector.linear_2.*", "connector.2.*"),
)
# Newer files have everything but the head below `model.`.
NEWER = (
    ("model.image_newline", "connector.image_newline"),
    ("model.multi_modal_projector.linear_1.*", "connector.0.*"),
    ("model.multi_modal_projector.linear_2.*", "connector.2.*"),
    ("model.vision_tower.**", "vision_tower.**"),
    ("model.language_model.**", "language_model.model.**"),
    ("lm_head.**", "language_model.lm_head.**"),
)
TABLE = PROJECTOR + NEWER

# The families that transformers has a class for. Its LLaVA gives each of them a head without bias.
FAMILIES = (
    "llama",
    "mistral",
    "smollm3",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma3_text",
    "stablelm",
    "phi",
    "phi3",
)
GEMMA3_LAYERS = ("full_attention", "sliding_attention")  # its kinds, as rope_parameters has them
ENCODERS = ("clip_vision_model", "siglip_vision_model")
SELECT = {"default": "patch", "full": "cls_patch"}  # vision_feature_select_strategy -> ours
MOST_PIXELS = 2**14  # along an edge of a grid
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # LLaVA-NeXT's default
VERSIONS = {4: "4.57.1", 5: "5.23.0"}  # what config.json says of transformers, by major version

# The encoder of a config.json without vision_config.
DEFAULT_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
}

TOWER = "vision_tower.vision_model."

# ----------------------------------------------------------------------------------------- reading


def read(config: Fields, folder: Path) -> LLaVAConfig:
    """Return what a config.json of LlavaForConditionalGeneration describes. Raises UserError."""
    layer = _read_layer(config)
    select = config.text("vision_feature_select_strategy", SELECT, default="default")

    activation = config.text("projector_hidden_act", default="gelu")
    has_biases = config.flag("multimodal_projector_bias", default=True)
    if activation != "gelu" or not has_biases:
        what = "only gelu with biases"
        raise UserError(config.name("projector_hidden_act"), what, "use another model")

    # Version 5 ties the head if either of two places says so. Version 4 writes one of them only,
    # and leaves out the other.
    stated = config.table("text_config", optional=True)
    text = {"model_type": "llama", **stated.values}
    if config.flag("tie_word_embeddings", default=False):
        text["tie_word_embeddings"] = True

    # Phi's head has a bias, but not in a LLaVA of today.
    if text["model_type"] == "phi":
        text["lm_head_bias"] = _stores(folder, "lm_head.bias")

    # See the top of the file: some image features should be smaller than ours.
    version = config.text("transformers_version", default="4", most=100)
    major = version.partition(".")[0]
    image_scale = 1.0
    if major.isdecimal() and int(major) >= 5 and text["model_type"] == "gemma":
        image_scale = stated.integer("hidden_size", 1, WIDTH, default=3072) ** -0.5
    if text["model_type"] == "gemma3_text":
        image_scale = stated.integer("hidden_size", 1, WIDTH, default=2304) ** -0.5

    vision = DEFAULT_VISION
    if "vision_config" in config:
        vision = {"model_type": "clip_vision_model", **config.table("vision_config").values}

    images, image_mode = _read_images(folder)
    return LLaVAConfig(
        text=text,
        vision=vision,
        preprocessor=images,
        feature_layer=layer,
        feature_select=SELECT[select],
        image_mode=image_mode,
        template="chat",
        image_scale=image_scale,
    )


def _read_layer(config: Fields) -> int:
    """Return the feature layer. The file may have a list: features of several are concatenated."""
    if not isinstance(config.values.get("vision_feature_layer"), list):
        return config.integer("vision_feature_layer", -LAYERS, LAYERS, default=-2)
    layers = config.integers("vision_feature_layer", -LAYERS, LAYERS)
    if len(layers) != 1:
        raise UserError(config.name("vision_feature_layer"), "several layers", "use one layer")
    return layers[0]


def _stores(folder: Path, name: str) -> bool:
    """Say whether a folder's safetensors have a tensor whose name ends like this.

    Pickled weights are not opened for it.
    """
    files = ("model.safetensors", "model.safetensors.index.json")
    if not any((folder / file).exists() for file in files):
        return False
    return any(key.endswith(name) for key in weights.Checkpoint(folder))


def _read_images(folder: Path) -> tuple[dict, str]:
    """Return the encoder's image processor and the image mode.

    The processors of LLaVA and LLaVA-NeXT are CLIP's, with something done before it.
    """
    images = dict(read_preprocessor(folder))
    fields = Fields(dict(images), preprocessor_place(folder))
    kind = fields.text("image_processor_type", default="")
    mode = "square"

    if kind.startswith("LlavaImageProcessor"):  # can make a picture square before CLIP's
        images.pop("do_pad", None)
        if fields.flag("do_pad", default=False):
            mode = "pad"
        images["image_processor_type"] = "CLIPImageProcessor"

    # These apply CLIP's to each tile.
    if kind.startswith(("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor")):
        images.pop("do_pad", None)
        images["image_processor_type"] = "CLIPImageProcessor"
    return images, mode


def read_next(config: Fields, folder: Path) -> LLaVAConfig:
    """Return what a config.json of LlavaNextForConditionalGeneration describes. Raises UserError.

    Its grids are in pixels, height before width.
    """
    base = read(config, folder)

    # Version 5 looks at the top level alone here, so a head may be stored beside a text_config that
    # ties it. Without one the file is of version 4, which looked at text_config.
    is_tied = config.flag("tie_word_embeddings", default=False)
    if not is_tied and _stores(folder, "lm_head.weight"):
        base = replace(base, text=base.text | {"tie_word_embeddings": False})

    places = (config.name("vision_config"), preprocessor_place(folder))
    vision = vision_config(base.vision, base.preprocessor, *places)
    side = vision.processor.side

    grids = []
    for pair in config.list("image_grid_pinpoints", list, default=[], most=1000) or PINPOINTS:
        is_pair = len(pair) == 2 and all(type(edge) is int for edge in pair)
        if not is_pair or not 0 < min(pair) <= max(pair) <= MOST_PIXELS:
            what = f"no list of height and width, each at most {MOST_PIXELS} pixels"
            raise config.refuse("image_grid_pinpoints", what)

        for edge in pair:
            if edge % side:
                what = f"{edge} pixels are not whole views of {side}"
                fix = "give the processor of this encoder"
                raise UserError(config.name("image_grid_pinpoints"), what, fix)
        height, width = pair
        grids.append(f"{height // side}x{width // side}")
    return replace(base, image_mode="anyres", image_grids=" ".join(grids))


# ----------------------------------------------------------------------------------------- writing


def write(folder: Path, model, tokenizer, transformers: int = 5):
    """Write a LLaVA for that major version of transformers, with its tokenizer (or None).

    Raises UserError, before anything is written, for what transformers cannot express.
    """
    tensors, files = contents(model, tokenizer, transformers)
    files["README.md"] = folder_readme(model, OPENED_BY, videos=False)  # its class takes no video
    write_folder(folder, tensors, files)


def contents(
    model, tokenizer, transformers: int
) -> tuple[dict[str, Tensor], dict[str, dict | str]]:
    """Return the tensors and the small files of a folder. Raises UserError as check_expressible."""
    check_expressible(model)
    c = model.config
    lm = model.language_model
    architecture = "LlavaNext" if c.image_mode == "anyres" else "Llava"

    tensors = named_tensors(model, PROJECTOR)
    tensors.pop("language_model.lm_head.bias", None)  # it is zero
    scale_image_features(tensors, model, transformers)
    vision, feature_layer = padded_encoder(tensors, model)
    token = image_token(tokenizer, lm.config.vocab)
    vocab = room_for_token(tensors, token, lm.config.vocab)

    images, grids = _image_processor(model)
    select = {ours: theirs for theirs, ours in SELECT.items()}[c.feature_select]
    dtype = tensors["language_model.model.embed_tokens.weight"].dtype
    processor = f"{architecture}Processor"

    files = {}
    files["config.json"] = {
        "model_type": {"Llava": "llava", "LlavaNext": "llava_next"}[architecture],
        "architectures": [f"{architecture}ForConditionalGeneration"],
        "text_config": text_config(c.text, transformers)
        | {"vocab_size": vocab, "tie_word_embeddings": lm.config.tied},
        "vision_config": vision,
        "image_token_index": token,
        "image_seq_length": model.image_tokens,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": feature_layer,
        "vision_feature_select_strategy": select,
        "tie_word_embeddings": lm.config.tied,
        "dtype": str(dtype).removeprefix("torch."),
        "transformers_version": VERSIONS[transformers],
        **grids,
        **merged_field(c),
    }
    files["preprocessor_config.json"] = images | {"processor_class": processor}
    files["processor_config.json"] = {
        "processor_class": processor,
        "patch_size": vision["patch_size"],
        "num_additional_image_tokens": model.vision_tower.config.leading,
        "vision_feature_select_strategy": select,
        "image_token": "<image>",
    }
    if tokenizer:
        files |= tokenizer_files(tokenizer, token)
        files |= chat_files(tokenizer, c.template)
    return tensors, files


def check_expressible(model):
    """Raise UserError naming the part that neither class of transformers has a place for."""
    c = model.config
    family = c.text["model_type"]
    encoder = model.vision_tower.config.hf["model_type"]
    processor = model.vision_tower.processor

    if c.connector != "mlp2x_gelu":
        theirs = "Hugging Face LLaVA, and the servers built on it, have the two-layer MLP alone"
        reason = f"connector {c.connector}: {theirs}"
    elif family not in FAMILIES:
        reason = f"{family}: transformers has no such class"
    elif encoder not in ENCODERS:
        reason = f"encoder {encoder}: its LLaVA takes CLIP or SigLIP"
    elif has_head_bias(model):
        reason = "the bias of the language model's head: Hugging Face LLaVA drops it"
    elif c.feature_norm:
        reason = "features behind the encoder's final norm: a LLaVA does not run it"
    elif c.image_mode not in ("square", "pad", "anyres"):
        reason = f"image mode {c.image_mode}: Hugging Face LLaVA-NeXT has anyres alone"
    elif c.image_mode == "anyres" and processor.crop not in (0, processor.size):
        sizes = f"{processor.crop} pixels cropped from {processor.size}"
        reason = f"anyres of {sizes}: LLaVA-NeXT would crop each tile"
    else:
        return

    fix = "export to barellava or tinyllava"
    mode = MODES[c.image_mode]
    if mode.tiled or mode.native or c.feature_norm:
        fix = "export to barellava"
    raise UserError("--to hf-llava", reason, fix)


def text_config(text: dict, transformers: int) -> dict:
    """Return the language model's config for a version of transformers.

    Version 5 reads the table rope_parameters, and also what version 4 reads: rope_scaling without
    what stands beside it there. Raises UserError for what version 4 has no place for.
    """
    rope = text.get("rope_parameters")
    if transformers >= 5 or not rope:
        return text

    older = {key: value for key, value in text.items() if key != "rope_parameters"}

    # Gemma-3 has a table for each kind of layer. Those with a window have no scaling.
    if text["model_type"] == "gemma3_text" and rope.keys() <= set(GEMMA3_LAYERS):
        local = rope.get("sliding_attention") or {}
        older["rope_local_base_freq"] = local.get("rope_theta", 1e4)
        rope = rope.get("full_attention") or {}

    scaling = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in scaling:
            older[key] = scaling.pop(key)

    # Its Phi-3 wants exactly three fields there; the original context is one of the top level.
    if text["model_type"] == "phi3":
        scaling.pop("original_max_position_embeddings", None)
        for key in ("attention_factor", "factor"):
            if scaling.get(key) is not None:
                what = f"{key} of Phi-3's rotation: transformers 4 has no place for it"
                raise UserError("--transformers 4", what, "export for transformers 5")
            scaling.pop(key, None)

    if scaling.get("type", "default") != "default":
        # Gemma-3 alone wants the newer name of its kind.
        if text["model_type"] == "gemma3_text":
            scaling["rope_type"] = scaling.pop("type")
        older.setdefault("rope_scaling", scaling)
    return older


def scale_image_features(tensors: dict[str, Tensor], model, transformers: int):
    """Build the scale of image features into the last linear, and into the separator of anyres.

    transformers has no such scale. It also leaves out the one by which our Gemmas multiply, but for
    the first Gemma in version 4.
    """
    scale = model.config.image_scale
    if transformers >= 5 or model.config.text["model_type"] != "gemma":
        scale *= model.language_model.config.embed_scale
    if scale == 1:
        return

    # In float64, so that it is rounded once.
    for key in (
        "multi_modal_projector.linear_2.weight",
        "multi_modal_projector.linear_2.bias",
        "image_newline",
    ):
        if key in tensors:
            tensor = tensors[key]
            tensors[key] = (tensor.double() * scale).to(tensor.dtype)


def padded_encoder(tensors: dict[str, Tensor], model) -> tuple[dict, int]:
    """Return vision_config and vision_feature_layer.

    Adds to tensors what their encoder has and ours does not.
    """
    tower = model.vision_tower
    vision = dict(tower.config.hf)
    layer = model.config.feature_layer

    if not tower.spares:
        # Made here, not loaded: nothing is stored behind the feature layer. They still want the
        # norm behind the last block, which a LLaVA does not run.
        layer = -1
        vision["num_hidden_layers"] = len(tower.blocks)
        vision["vision_use_head"] = False
        width = tower.config.width
        tensors[f"{TOWER}post_layernorm.weight"] = torch.ones(width)
        tensors[f"{TOWER}post_layernorm.bias"] = torch.zeros(width)

    depth = vision["num_hidden_layers"]
    if layer in (-1, depth):
        # The feature layer must not be the last, see the top of the file. A block of zeros adds
        # nothing to what comes in, so one more of them behind it is harmless.
        layer = -2
        vision["num_hidden_layers"] = depth + 1
        last = f"{TOWER}encoder.layers.{depth - 1}."
        added = f"{TOWER}encoder.layers.{depth}."
        for key, tensor in list(tensors.items()):
            if key.startswith(last):
                tensors[key.replace(last, added)] = 0 * tensor
    return vision, layer


def room_for_token(tensors: dict[str, Tensor], token: int, vocab: int) -> int:
    """Return a vocabulary size that includes the image token.

    Where no row is free for it, rows are added to the tensors. They are copies of the first row, a
    control token's, so greedy decoding never prefers them.
    """
    if token < vocab:
        return vocab

    # A tied head is not among the tensors.
    for key in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if key in tensors:
            table = tensors[key]
            added = table[:1].expand(token + 1 - vocab, -1)
            tensors[key] = torch.cat([table, added])
    return token + 1


def _image_processor(model) -> tuple[dict, dict]:
    """Return preprocessor_config.json, and the field of config.json for the grids of anyres."""
    images = model.vision_tower.processor.to_hf()
    grids = {}

    if model.config.image_mode == "pad":
        images["image_processor_type"] = "LlavaImageProcessor"
        images["do_pad"] = True

    if model.config.image_mode == "anyres":
        side = model.vision_tower.processor.side
        pixels = [[rows * side, columns * side] for rows, columns in model.views.grids]
        grids = {"image_grid_pinpoints": pixels}
        images["image_processor_type"] = "LlavaNextImageProcessor"
        images |= grids
        # Here crop_size is the size of a tile, whether it is cropped or not.
        images["crop_size"] = {"height": side, "width": side}
    return images, grids
