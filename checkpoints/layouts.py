"""The checkpoint layouts that we know: one file each reads it and, where we can, writes it.

    config = read_config(folder)                    # config.json of any layout -> our LLaVAConfig
    config, tensors, hf_names = read(folder)        # and the tensors, under names of parts
    config = config_from_recipe(recipe.model, "")   # the same for a model that is yet to be made

A layout has its own config.json and its own names of tensors. Its file translates config.json into
a LLaVAConfig. Its table renames the tensors to `language_model.*`, `vision_tower.*` and
`connector.*`; it is used forwards to read and backwards to write. Behind these prefixes the names
are ours in our own layout and Hugging Face's in all others: the tables of the parts (model.py,
encoders.py) translate those.

A new layout is one file like barellava.py, the shortest of them, and one entry of LAYOUTS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from checkpoints import (
    barellava,
    gguf,
    hf_llava,
    llava_onevision,
    nanovlm,
    smolvlm,
    tinyllava,
    tinyllava_bench,
    weights,
)
from checkpoints.fields import Fields
from checkpoints.files import read_json, resolve
from checkpoints.folder import MERGED, Renamed
from checkpoints.names import Table
from config import LLaVAConfig, Model, UserError
from connectors import CONNECTORS
from encoders import vision_config, vision_half
from inputs import nanovlm_tokenizer
from inputs.image_modes import MODES
from inputs.image_processor import preprocessor_place, read_preprocessor
from inputs.tiling_split import control_names
from inputs.tokenizer import Tokenizer, load_tokenizer, with_controls


@dataclass(frozen=True)
class Layout:
    """How one published kind of folder is read and, if it has a writer, written."""

    # (config.json, its folder) -> what it describes. Raises UserError that names the field.
    read: Callable[[Fields, Path], LLaVAConfig]

    # Pairs (name in the file, our name).
    table: Table = ()

    # Whether language model and encoder have Hugging Face's names inside.
    hf_names: bool = True

    # (folder, allow_pickle) -> the tensors of the folder, under the file's names.
    open_tensors: Callable[[Path, bool], Mapping[str, Tensor]] = weights.Checkpoint

    # write(folder, model, tokenizer or None, major version of transformers), and its name in
    # export.py --to. Raises UserError for a model that the layout cannot express. None: we only
    # read it.
    write: Callable | None = None
    export_name: str = ""

    # check(model) raises UserError for a model that the layout cannot express, also for one without
    # values. None: it can express every model.
    check: Callable | None = None


# Keyed by the exact `model_type` of config.json; nanoVLM's has none.
LAYOUTS: dict[str, Layout] = {
    "barellava": Layout(
        barellava.read,
        hf_names=False,
        write=barellava.write,
        export_name="barellava",
    ),
    "tinyllava": Layout(
        tinyllava.read,
        tinyllava.TABLE,
        open_tensors=tinyllava.open_tensors,
        write=tinyllava.write,
        export_name="tinyllava",
        check=tinyllava.check_expressible,
    ),
    "tiny_llava_phi": Layout(tinyllava_bench.read_phi, tinyllava_bench.TABLE),
    "tiny_llava": Layout(tinyllava_bench.read_llama, tinyllava_bench.TABLE),
    "tiny_llava_stablelm": Layout(tinyllava_bench.read_stablelm, tinyllava_bench.TABLE),
    "llava": Layout(
        hf_llava.read,
        hf_llava.TABLE,
        write=hf_llava.write,  # of a model in image mode anyres it makes a llava_next
        export_name="hf-llava",
        check=hf_llava.check_expressible,
    ),
    "llava_next": Layout(hf_llava.read_next, hf_llava.TABLE),
    "llava_onevision": Layout(
        llava_onevision.read,
        llava_onevision.TABLE,
        write=llava_onevision.write,
        export_name="llava-onevision",
        check=llava_onevision.check_expressible,
    ),
    "smolvlm": Layout(
        smolvlm.read,
        smolvlm.TABLE,
        write=smolvlm.write,
        export_name="smolvlm",
        check=smolvlm.check_expressible,
    ),
    "idefics3": Layout(
        smolvlm.read,
        smolvlm.TABLE,
        write=smolvlm.write_idefics3,
        export_name="idefics3",
        check=smolvlm.check_idefics3,
    ),
    "nanovlm": Layout(
        nanovlm.read,
        nanovlm.TABLE,
        open_tensors=nanovlm.Unfused,
        write=nanovlm.write,
        export_name="nanovlm",
        check=nanovlm.check_expressible,
    ),
}


def exports_to(model) -> list[str]:
    """Return the names of export.py --to that can express a LLaVA, which may be without values."""
    # Files of GGUF are written, and never read.
    checks = {layout.export_name: layout.check for layout in LAYOUTS.values() if layout.write}
    checks["gguf"] = gguf.check_expressible

    names = []
    for name, check in checks.items():
        try:
            if check is not None:
                check(model)
        except UserError:
            continue
        names.append(name)
    return names


class ReadCheckpoint(NamedTuple):
    """A checkpoint as `read` returns it."""

    config: LLaVAConfig
    tensors: Mapping[str, Tensor]  # keys start with language_model., vision_tower. or connector.
    hf_names: bool  # whether the parts have Hugging Face's names behind that


def read(folder: Path, allow_pickle: bool = False) -> ReadCheckpoint:
    """Return a checkpoint of any layout. A tensor is read from the file when it is asked for.

    Raises UserError as read_config and weights.Checkpoint do.
    """
    config = read_config(folder)
    where = folder / "config.json"
    layout = LAYOUTS[kind_of(Fields(read_json(where), where))]

    tensors = layout.open_tensors(folder, allow_pickle)
    renamed = Renamed(tensors, layout.table)
    return ReadCheckpoint(config, renamed, layout.hf_names)


def kind_of(fields: Fields) -> str | None:
    """Return which of LAYOUTS a config.json says it is, None if it says nothing."""
    if nanovlm_tokenizer.is_needed(fields):
        return "nanovlm"
    return fields.text("model_type", default=None)


def read_config(folder: Path) -> LLaVAConfig:
    """Return the config of a checkpoint of any layout.

    Raises UserError for a config.json that is unknown or incomplete, and for a field of the wrong
    kind or out of range. The fields of text_config are read where the model is built.
    """
    where = folder / "config.json"
    fields = Fields(read_json(where), where, fix="give a complete config.json")
    kind = kind_of(fields)
    if kind not in LAYOUTS:
        what = f"{kind!r} is no layout known here"
        raise UserError(f"{where}:model_type", what, f"one of {', '.join(LAYOUTS)}")
    config = LAYOUTS[kind].read(fields, folder)
    if config.connector not in CONNECTORS:
        what = f"{config.connector!r} is no connector known here"
        raise UserError(f"{where}:connector", what, f"one of {', '.join(CONNECTORS)}")
    if config.image_mode not in MODES:
        what = f"image mode {config.image_mode!r} is not known here"
        raise UserError(where, what, f"one of {', '.join(MODES)}")

    places = {
        "text": f"{where}:text_config",
        "vision": f"{where}:vision_config",
        "images": preprocessor_place(folder),
    }
    return replace(
        config,
        vision=vision_half(config.vision, places["vision"]),
        merged_adapters=tuple(fields.list(MERGED, str, default=[])),
        places=places | config.places,
    )


def config_from_recipe(c: Model, template: str, has_tokenizer: bool = True) -> LLaVAConfig:
    """Return what the [model] section of a recipe describes. Reads config files and no weights.

    template: the chat template's name. has_tokenizer: without one, control tokens that the image
    mode needs get ids that are good for counting alone. Raises UserError for what is missing.
    """
    if c.checkpoint:
        return _config_of_checkpoint(c, template)

    # Each part is a table in the recipe, or the name of a checkpoint.
    text = c.llm_config
    places = {"text": "model.llm_config", "vision": "model.vision_config"}
    if not text:
        file = _part(c, "llm") / "config.json"
        text = read_json(file)
        places["text"] = str(file)

    # A vision_config of a recipe may have the image processor in it, as there is no file for that.
    if c.vision_config:
        vision = dict(c.vision_config)
        fields = Fields(vision, "model.vision_config")
        preprocessor = fields.table("preprocessor", optional=True).values
        vision.pop("preprocessor", None)
        places["images"] = "model.vision_config.preprocessor"
    else:
        folder = _part(c, "vision")
        vision = read_json(folder / "config.json")
        preprocessor = read_preprocessor(folder)
        places["vision"] = str(folder / "config.json")
        places["images"] = preprocessor_place(folder)

    if c.vision2:
        dinov2 = read_json(_part(c, "vision2") / "config.json")
        vision = {"model_type": "mof", "clip": vision, "dinov2": dinov2}

    config = LLaVAConfig(
        text=text,
        vision=vision_half(vision, places["vision"]),
        preprocessor=preprocessor,
        connector=c.connector,
        connector_options=c.connector_options,
        feature_layer=c.feature_layer,
        feature_select=c.feature_select,
        feature_norm=c.feature_norm,
        image_mode=c.image_mode,
        template=template,
        sources={"llm": c.llm, "vision": c.vision, "vision2": c.vision2},
        image_grids=c.image_grids,
        image_views=c.image_views,
        frames=c.frames,
        fps=c.fps,
        places=places,
    )
    if c.image_mode == "split":
        tokenizer = load_recipe_tokenizer(c) if has_tokenizer else None
        return smolvlm.with_marks(config, tokenizer, c.image_edge, _pixels_of_view(c))
    return config


def load_recipe_tokenizer(c: Model) -> Tokenizer:
    """Return the tokenizer of the model that a recipe makes.

    It has the control tokens of the image mode, which the tokenizer of its llm may lack. Raises
    UserError.
    """
    tokenizer = load_tokenizer(resolve(c.tokenizer_source, "model.tokenizer", small=True))
    if c.image_mode != "split":
        return tokenizer
    side = _pixels_of_view(c)
    return with_controls(tokenizer, control_names(c.image_edge or side, side))


def _pixels_of_view(c: Model) -> int:
    """Return how many pixels a side of a view has for the encoder of a recipe. Raises UserError."""
    if not c.vision_config:
        folder = _part(c, "vision")
        images = preprocessor_place(folder)
        config = folder / "config.json"
        return vision_config(
            read_json(config), read_preprocessor(folder), config, images
        ).processor.side
    fields = dict(c.vision_config)
    images = fields.pop("preprocessor", None)
    return vision_config(fields, images, "model.vision_config").processor.side


def _config_of_checkpoint(c: Model, template: str) -> LLaVAConfig:
    """Return the config of the finished model that a recipe goes on from, with its template."""
    alone = Model(checkpoint=c.checkpoint, tokenizer=c.tokenizer, allow_pickle=c.allow_pickle)
    if c != alone:
        what = "it brings its own parts and image settings"
        raise UserError("model.checkpoint", what, "remove the other fields of [model]")
    folder = resolve(c.checkpoint, "model.checkpoint", small=True)
    return replace(read_config(folder), template=template)


def _part(c: Model, key: str) -> Path:
    """Return the folder of a part that [model] names; downloads its config files if need be."""
    return resolve(getattr(c, key), f"model.{key}", small=True)
