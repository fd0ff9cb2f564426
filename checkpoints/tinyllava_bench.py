"""TinyLLaVABench, the code before TinyLLaVA Factory (bczhou/TinyLLaVA-3.1B and others). Read only.

One flat config.json holds the language model's fields and, as `mm_*`, the rest. The encoder is
there by name only: its own folder tells its sizes and its image processor.
"""

from __future__ import annotations

from pathlib import Path

from checkpoints.files import read_json, resolve
from checkpoints.tinyllava import LLM_NAMES
from config import LLaVAConfig
from inputs.image_processor import read_preprocessor

TABLE = (
    ("model.mm_projector.**", "connector.**"),
    ("model.vision_tower.vision_tower.**", "vision_tower.**"),
    ("**", "language_model.**"),
)


def read_phi(config: dict, folder: Path) -> LLaVAConfig:
    """Return what a `tiny_llava_phi` describes. Its Phi has no bias on its head."""
    return _read(config, folder, "phi", {"lm_head_bias": False}, "phi")


def read_llama(config: dict, folder: Path) -> LLaVAConfig:
    """Return what a `tiny_llava` describes."""
    return _read(config, folder, "llama", {}, "llama")


def read_stablelm(config: dict, folder: Path) -> LLaVAConfig:
    """Return what a `tiny_llava_stablelm` describes.

    It was written before transformers had the class, so three of its fields have other names.
    """
    renamed = {
        "partial_rotary_factor": config.get("rope_pct", 0.25),
        "layer_norm_eps": config.get("norm_eps", 1e-5),
        "use_qkv_bias": config.get("use_qkv_bias", True),
    }
    return _read(config, folder, "stablelm", renamed, "phi")


def _read(config: dict, folder: Path, family: str, fields: dict, template: str) -> LLaVAConfig:
    """Return what a config.json describes.

    fields: those of the language model that it does not state, or states under other names.
    """
    where = f"{folder / 'config.json'}:mm_vision_tower"
    tower = resolve(config["mm_vision_tower"], where, small=True)
    vision = read_json(tower / "config.json")

    text = {key: value for key, value in config.items() if not key.startswith(("mm_", "tune_"))}
    text |= {"model_type": family, **fields}

    if vision["model_type"].startswith("siglip"):
        # The original's SigLIP class deletes the last block, takes what comes out and keeps all
        # patches.
        feature_layer = -2
        feature_select = "cls_patch"
    else:
        feature_layer = config["mm_vision_select_layer"]
        feature_select = config.get("mm_vision_select_feature", "patch")

    return LLaVAConfig(
        text=text,
        vision=vision,
        preprocessor=read_preprocessor(tower),
        connector=config.get("mm_projector_type", "linear"),
        feature_layer=feature_layer,
        feature_select=feature_select,
        image_mode=config.get("image_aspect_ratio") or "square",
        template=template,
        sources={"llm": LLM_NAMES[family], "vision": config["mm_vision_tower"]},
    )
