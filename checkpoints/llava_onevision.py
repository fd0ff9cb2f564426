"""Hugging Face's LLaVA-OneVision (Li et al., 2024), for image mode anyres_max.

    python export.py --model DIR --to llava-onevision OUT

Its class is LlavaOnevisionForConditionalGeneration. It is a LLaVA-NeXT (hf_llava.py) with another
way of seeing pictures and videos (inputs/tiling_anyres.py), and other defaults of config.json. What
is written is for transformers 5; a video has a token of its own there, `<video>`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from checkpoints import hf_llava
from checkpoints.fields import SIDE, VOCABULARY, Fields
from checkpoints.files import read_json
from checkpoints.folder import (
    folder_readme,
    has_head_bias,
    merged_field,
    named_tensors,
    write_folder,
)
from checkpoints.hf_tokenizer import chat_files, image_token, tokenizer_files
from config import LLaVAConfig, UserError
from inputs.image_processor import preprocessor_place, read_preprocessor

TABLE = hf_llava.TABLE
MODE = "anyres_max"
ENCODER = "siglip_vision_model"
VIDEOS = "video_preprocessor_config.json"
FULL = "full"  # the only way to select features: SigLIP has no class token
FIX = "use a model of llava-hf/llava-onevision-qwen2"

# What is meant where a config.json leaves a field out.
EDGES = (384, 768, 1152, 1536, 1920, 2304)
DEFAULTS = {
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": FULL,
    "image_grid_pinpoints": [[height, width] for height in EDGES for width in EDGES],
}

# ----------------------------------------------------------------------------------------- reading


def read(config: Fields, folder: Path) -> LLaVAConfig:
    """Return what such a config.json describes.

    Raises UserError, for what is wrong and for what would be computed otherwise here.
    """
    most = read_most(config)
    config.text("vision_feature_select_strategy", [FULL], default=FULL)
    config.integer("image_token_index", 0, VOCABULARY, default=151646)
    config.integer("video_token_index", 0, VOCABULARY, default=151647)
    vision = {"model_type": ENCODER, **config.table("vision_config").values}
    if vision["model_type"] != ENCODER:
        raise config.table("vision_config").refuse("model_type", f"not {ENCODER}")

    stated = {key: value for key, value in config.values.items() if value is not None}
    filled = DEFAULTS | stated
    filled["text_config"] = {"model_type": "qwen2", **config.table("text_config").values}
    filled["vision_config"] = vision
    fields = Fields(filled, config.where, config.path, config.fix)
    _check_processors(fields, most, folder)
    return replace(hf_llava.read_next(fields, folder), image_mode=MODE, image_views=most)


def read_most(fields: Fields) -> int:
    """Return the 9 of a field vision_aspect_ratio "anyres_max_9". Raises UserError."""
    mode = fields.text("vision_aspect_ratio", default=f"{MODE}_{LLaVAConfig.image_views}")
    found = re.fullmatch(f"{MODE}_([1-9][0-9]{{0,2}})", mode)
    if found is None:
        raise fields.refuse("vision_aspect_ratio", f"not {MODE}_N with N below 1000")
    return int(found[1])


def _check_processors(config: Fields, most: int, folder: Path):
    """Raise UserError if the processors see pictures or videos otherwise than the model."""
    file = folder / "processor_config.json"
    processor = Fields(read_json(file, optional=True), file)
    if read_most(processor) != most:
        raise processor.refuse("vision_aspect_ratio", f"not the {MODE}_{most} of config.json")
    processor.text("vision_feature_select_strategy", [FULL], default=FULL)

    # As many tokens of a view as the encoder makes.
    vision = config.table("vision_config")
    side = vision.integer("image_size", 1, SIDE, default=224)
    tokens = (side // vision.integer("patch_size", 1, side, default=16)) ** 2
    if processor.integer("num_image_tokens", 1, SIDE**2, default=tokens) != tokens:
        raise processor.refuse("num_image_tokens", f"not the {tokens} tokens of a view")

    images = Fields(dict(read_preprocessor(folder)), preprocessor_place(folder))
    grids = images.list("image_grid_pinpoints", list, default=None, most=1000)
    if grids is not None and grids != config.list("image_grid_pinpoints", list, most=1000):
        raise images.refuse("image_grid_pinpoints", "not those of config.json")

    # Frames become views as pictures do.
    videos = Fields(read_json(folder / VIDEOS, optional=True), folder / VIDEOS)
    if not videos.values:
        videos = processor.table("video_processor", optional=True)
    for key in ("size", "resample", "rescale_factor", "image_mean", "image_std"):
        value = videos.values.get(key)
        if value is not None and value != images.values.get(key, value):
            raise videos.refuse(key, "not that of the image processor")


# ----------------------------------------------------------------------------------------- writing


def write(folder: Path, model, tokenizer, transformers: int = 5):
    """Write a LLaVA-OneVision with its tokenizer (or None).

    Raises UserError, before anything is written, for what transformers cannot express.
    """
    if transformers != 5:
        what = "LLaVA-OneVision is written for transformers 5"
        raise UserError("--transformers", what, "leave it out")
    tensors, files = contents(model, tokenizer)
    files["README.md"] = folder_readme(model, hf_llava.OPENED_BY, videos=False)
    write_folder(folder, tensors, files)


def contents(model, tokenizer) -> tuple[dict[str, Tensor], dict[str, dict | str]]:
    """Return the tensors and the small files of a folder. Raises UserError as check_expressible."""
    check_expressible(model)
    c = model.config
    lm = model.language_model

    tensors = named_tensors(model, hf_llava.PROJECTOR)
    tensors.pop("language_model.lm_head.bias", None)  # it is zero
    hf_llava.scale_image_features(tensors, model, 5)
    vision, layer = _encoder(tensors, model)

    # Pictures and videos have an id each.
    image = image_token(tokenizer, lm.config.vocab)
    video = None
    if tokenizer:
        video = tokenizer.token_id("<video>")
    if video is None:
        video = image + 1
        if tokenizer:
            video = max(tokenizer.vocab_size, video)
    vocab = hf_llava.room_for_token(tensors, max(image, video), lm.config.vocab)

    dtype = tensors["language_model.model.embed_tokens.weight"].dtype
    side = model.vision_tower.processor.side
    grids = [[rows * side, columns * side] for rows, columns in model.views.grids]
    named = {"processor_class": "LlavaOnevisionProcessor"}
    pixels = model.vision_tower.processor.to_hf()
    shared = {
        "vision_feature_select_strategy": FULL,
        "vision_aspect_ratio": f"{MODE}_{c.image_views}",
    }

    files = {}
    files["config.json"] = {
        "model_type": "llava_onevision",
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "text_config": c.text | {"vocab_size": vocab, "tie_word_embeddings": lm.config.tied},
        "vision_config": vision,
        "image_token_index": image,
        "video_token_index": video,
        "image_grid_pinpoints": grids,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": layer,
        **shared,
        "tie_word_embeddings": lm.config.tied,
        "dtype": str(dtype).removeprefix("torch."),
        "transformers_version": hf_llava.VERSIONS[5],
        **merged_field(c),
    }
    files["preprocessor_config.json"] = {
        **pixels,
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_grid_pinpoints": grids,
        "do_pad": True,
        **named,
    }
    files[VIDEOS] = {
        key: value for key, value in pixels.items() if key != "image_processor_type"
    } | {"video_processor_type": "LlavaOnevisionVideoProcessor", **named}
    files["processor_config.json"] = {
        **named,
        **shared,
        "num_image_tokens": model.views.tokens,
        "image_token": "<image>",
        "video_token": "<video>",
    }
    if tokenizer:
        files |= tokenizer_files(tokenizer, image, video)
        files |= chat_files(tokenizer, c.template)
    return tensors, files


def _encoder(tensors: dict[str, Tensor], model) -> tuple[dict, int]:
    """Return vision_config and vision_feature_layer.

    Version 5 puts no norm on the last hidden state, so it may be the feature layer. An encoder that
    was made here lacks a norm, which hf_llava.py adds.
    """
    tower = model.vision_tower
    if tower.spares:
        return tower.config.hf, model.config.feature_layer
    return hf_llava.padded_encoder(tensors, model)


def check_expressible(model):
    """Raise UserError naming the part that LLaVA-OneVision has no place for."""
    c = model.config
    family = c.text["model_type"]
    tower = model.vision_tower
    encoder = tower.config.hf["model_type"]

    if c.image_mode != MODE:
        reason = f"image mode {c.image_mode}: LLaVA-OneVision has {MODE} alone"
    elif c.connector != "mlp2x_gelu":
        reason = f"connector {c.connector}: LLaVA-OneVision has the two-layer MLP alone"
    elif family not in hf_llava.FAMILIES:
        reason = f"{family}: transformers has no such class"
    elif encoder != ENCODER:
        reason = f"encoder {encoder}: LLaVA-OneVision takes SigLIP"
    elif c.feature_norm:
        reason = "features behind the encoder's final norm: a LLaVA-OneVision does not run it"
    elif tower.processor.crop:
        reason = f"{tower.processor.crop} pixels cropped: LLaVA-OneVision crops nothing"
    elif has_head_bias(model):
        reason = "the bias of the language model's head: LLaVA-OneVision drops it"
    else:
        return
    raise UserError("--to llava-onevision", reason, "export to barellava")
