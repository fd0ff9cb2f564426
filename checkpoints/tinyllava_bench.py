"""TinyLLaVABench, the code before TinyLLaVA Factory (bczhou/TinyLLaVA-3.1B and others). Read only.

One flat config.json holds the language model's fields and, as `mm_*`, the rest. The encoder is
there by name only: its own folder tells its sizes and its image processor.
"""

from __future__ import annotations

from pathlib import Path

from checkpoints.fields import EPS, LAYERS, Fields
from checkpoints.files import read_json, resolve
from checkpoints.tinyllava import LLM_NAMES, SELECTS
from config import LLaVAConfig
from inputs.image_processor import preprocessor_place, read_preprocessor

TABLE = (
    ("model.mm_projector.**", "connector.**"),
    ("model.vision_tower.vision_tower.**", "vision_tower.**"),
    ("**", "language_model.**"),
)


def read_phi(config: Fields, folder: Path) -> LLaVAConfig:
    """Return what a `tiny_llava_phi` describes. Its Phi has no bias on its head."""
    return _read(config, "phi", {"lm_head_bias": False}, "phi")


def read_llama(config: Fields, folder: Path) -> LLaVAConfig:
    """Return what a `tiny_llava` describes."""
    return _read(config, "llama", {}, "llama")


def read_stablelm(config: Fields, folder: Path) -> LLaVAConfig:
    """Return what a `tiny_llava_stablelm` describes.

    It was written before transformers had the class, so three of its fields have other names.
    """
    renamed = {
        "partial_rotary_factor": config.number("rope_pct", 0.0, 1.0, default=0.25),
        "layer_norm_eps": config.number("norm_eps", *EPS, default=1e-5),
        "use_qkv_bias": config.flag("use_qkv_bias", default=True),
    }
    return _read(config, "stablelm", renamed, "phi")


def _read(config: Fields, family: str, fields: dict, template: str) -> LLaVAConfig:
    """Return what a config.json describes.

    fields: those of the language model that it does not state, or states under other names.
    """
    name = config.text("mm_vision_tower", most=1000)
    tower = resolve(name, config.name("mm_vision_tower"), small=True)
    vision = read_json(tower / "config.json")

    text = {
        key: value for key, value in config.values.items() if not key.startswith(("mm_", "tune_"))
    }
    text |= {"model_type": family, **fields}

    kind = Fields(vision, tower / "config.json").text("model_type")
    if kind.startswith("siglip"):
        # The original's SigLIP class deletes the last block, takes what comes out and keeps all
        # patches.
        feature_layer = -2
        feature_select = "cls_patch"
    else:
        feature_layer = config.integer("mm_vision_select_layer", -LAYERS, LAYERS)
        feature_select = config.text("mm_vision_select_feature", SELECTS, default="patch")

    return LLaVAConfig(
        text=text,
        vision=vision,
        preprocessor=read_preprocessor(tower),
        connector=config.text("mm_projector_type", default="linear", most=100),
        feature_layer=feature_layer,
        feature_select=feature_select,
        image_mode=config.text("image_aspect_ratio", default="", most=100) or "square",
        template=template,
        sources={"llm": LLM_NAMES[family], "vision": name},
        places={
            "text": str(config.where),
            "vision": str(tower / "config.json"),
            "images": preprocessor_place(tower),
        },
    )
