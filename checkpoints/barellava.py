"""Our own layout: config.json is a LLaVAConfig as JSON, tensors have the names of our modules.

    model.save("out/mine")                              # what train.py leaves
    python export.py --model DIR --to barellava OUT     # the same, with tokenizer and README.md

This is the shortest of the layouts, and so the one to read first: `read` and `config_json`
translate config.json, `save` and `write` write a folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

from checkpoints import weights
from checkpoints.fields import LAYERS, SIDE, VIEWS, VOCABULARY, Fields
from checkpoints.files import write_file
from checkpoints.folder import folder_readme, named_tensors, write_folder
from config import LLaVAConfig, Model
from inputs.image_processor import read_preprocessor
from packing import IMAGE_TOKEN

OPENED_BY = "barellava: `python generate.py --model DIR --image FILE`, or `--video FILE`"


def read(config: Fields, folder: Path) -> LLaVAConfig:
    """Return what our config.json describes; a field that an older file lacks has its default."""
    choices = {field.name: field.metadata["choices"] for field in fields(Model)}
    defaults = {field.name: field.default for field in fields(LLaVAConfig)}

    def text(key: str) -> str:
        """Return a text, one of those that a recipe may choose from."""
        return config.text(key, choices.get(key, ()), default=defaults[key], most=1000)

    sources = config.table("sources", optional=True)
    marks = config.table("image_marks", optional=True)
    return LLaVAConfig(
        text=config.table("text_config").values,
        vision=config.table("vision_config").values,
        preprocessor=read_preprocessor(folder),
        connector=text("connector"),
        connector_options=config.table("connector_options", optional=True).values,
        feature_layer=config.integer("feature_layer", -LAYERS, LAYERS, defaults["feature_layer"]),
        feature_select=text("feature_select"),
        feature_norm=config.flag("feature_norm", default=False),
        image_mode=text("image_mode"),
        template=text("template"),
        image_scale=config.number("image_scale", 1e-6, 1e6, defaults["image_scale"]),
        sources={key: sources.text(key, default="") for key in sources.values},
        image_grids=text("image_grids"),
        frames=config.integer("frames", 1, 2**16, defaults["frames"]),
        fps=config.number("fps", 0.0, 1e3, defaults["fps"]),
        image_edge=config.integer("image_edge", 0, SIDE, 0),
        image_marks={key: marks.integers(key, 0, VOCABULARY) for key in marks.values},
        image_enlarge=config.flag("image_enlarge", default=False),
        image_views=config.integer("image_views", 1, VIEWS, defaults["image_views"]),
    )


def config_json(c: LLaVAConfig) -> dict:
    """Return our config.json."""
    rest = asdict(c)
    del rest["preprocessor"]  # a file of its own: preprocessor_config.json
    del rest["places"]
    if not c.merged_adapters:
        del rest["merged_adapters"]
    if not c.image_marks:
        del rest["image_edge"]
        del rest["image_marks"]
    if not c.image_enlarge:
        del rest["image_enlarge"]
    if c.image_mode != "anyres_max":
        del rest["image_views"]
    if not c.feature_norm:
        del rest["feature_norm"]

    # These two have the names that Hugging Face's multimodal models use.
    text = rest.pop("text")
    vision = rest.pop("vision")
    return {
        "model_type": "barellava",
        "text_config": text,
        "vision_config": vision,
        **rest,
        "image_token_index": IMAGE_TOKEN,
    }


def save(folder: Path, model):
    """Write a LLaVA: weights, preprocessor_config.json and, last, config.json."""
    tensors = named_tensors(model, hf_names=False)
    weights.save(folder, tensors)

    preprocessor = model.vision_tower.processor.to_hf()
    write_file(folder / "preprocessor_config.json", json.dumps(preprocessor, indent=2))

    # A folder with a config.json is a whole model.
    config = config_json(model.config)
    write_file(folder / "config.json", json.dumps(config, indent=2))


def write(folder: Path, model, tokenizer, transformers: int = 5):
    """Write a LLaVA to pass on: what `save` writes, with its tokenizer (or None) and README.md.

    transformers: every layout's writer gets it; this one has no use for it.
    """
    tensors = named_tensors(model, hf_names=False)
    files = {
        "preprocessor_config.json": model.vision_tower.processor.to_hf(),
        "README.md": folder_readme(model, OPENED_BY),
        "config.json": config_json(model.config),
    }
    write_folder(folder, tensors, files, tokenizer)
