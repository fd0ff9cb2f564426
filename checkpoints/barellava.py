"""Our own layout: config.json is a LLaVAConfig as JSON, tensors have the names of our modules.

model.save("out/mine")                               # what train.py leaves
python export.py --model DIR --to barellava OUT      # the same, with tokenizer and README.md
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

from checkpoints import weights
from checkpoints.files import write_file
from checkpoints.folder import card, named_tensors, write_folder
from config import LLaVAConfig
from inputs.image_processor import read_preprocessor
from packing import IMAGE_TOKEN

OPENED_BY = "barellava: `python generate.py --model DIR --image FILE`, or `--video FILE`"


def read(config: dict, folder: Path) -> LLaVAConfig:
    """Return what our config.json describes; a field that an older file lacks has its default."""
    names = [field.name for field in fields(LLaVAConfig)]
    rest = {name: config[name] for name in names if name in config}
    return LLaVAConfig(
        config["text_config"],
        config["vision_config"],
        read_preprocessor(folder),
        **rest,
    )


def config_json(c: LLaVAConfig) -> dict:
    """Return our config.json. The image processor is in preprocessor_config.json."""
    rest = asdict(c)
    text = rest.pop("text")
    vision = rest.pop("vision")
    del rest["preprocessor"]
    return {
        "model_type": "barellava",
        "text_config": text,
        "vision_config": vision,
        **rest,
        "image_token_index": IMAGE_TOKEN,
    }


def save(folder: Path, model):
    """Write a LLaVA: weights, preprocessor_config.json and, last, config.json."""
    weights.save(folder, named_tensors(model, hf_names=False))

    preprocessor = model.vision_tower.processor.to_hf()
    write_file(folder / "preprocessor_config.json", json.dumps(preprocessor, indent=2))
    write_file(folder / "config.json", json.dumps(config_json(model.config), indent=2))


def write(folder: Path, model, tokenizer, transformers: int = 5):
    """Write a LLaVA to pass on: what `save` writes, with its tokenizer (or None) and README.md."""
    files = {
        "preprocessor_config.json": model.vision_tower.processor.to_hf(),
        "README.md": card(model, OPENED_BY),
        "config.json": config_json(model.config),
    }
    write_folder(folder, named_tensors(model, hf_names=False), files, tokenizer)
