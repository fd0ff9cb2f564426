"""Checkpoint layouts: where each keeps its parts, and what its config.json means. One entry of LAYOUTS each.

    python export.py --model DIR --to hf-llava OUT         # from any of them to those that can be written

A layout has a rename table from the names in its files to `language_model.*`, `vision_tower.*` and `connector.*`,
read forwards to load and backwards to save. Behind those prefixes the names are ours in our own layout and Hugging
Face's in all others; the tables of the parts (model.py, encoders.py) take it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from checkpoints import weights
from checkpoints.files import read_json, resolve
from checkpoints.names import Table, rename
from config import LLaVAConfig, Model, UserError
from connectors import CONNECTORS
from encoders import vision_config
from inputs.image_processor import read_preprocessor
from inputs.tiling import TILED
from packing import IMAGE_TOKEN


def from_recipe(c: Model, template: str) -> LLaVAConfig:
    """What a recipe's [model] section describes. Reads configs, no weights; raises UserError for what is missing."""

    if c.checkpoint:
        if c != Model(checkpoint=c.checkpoint, tokenizer=c.tokenizer, allow_pickle=c.allow_pickle):
            raise UserError("model.checkpoint", "it brings its own parts and image settings",
                            "remove the other fields of [model]")  # fmt: skip
        return replace(
            read_config(resolve(c.checkpoint, "model.checkpoint", small=True)),
            template=template,
        )

    def folder(key: str) -> Path:
        return resolve(getattr(c, key), f"model.{key}", small=True)

    text = c.llm_config or read_json(folder("llm") / "config.json")
    vision = dict(c.vision_config) or read_json(folder("vision") / "config.json")
    preprocessor = (
        vision.pop("preprocessor", {}) if c.vision_config else read_preprocessor(folder("vision"))
    )
    if c.vision2:
        vision = {
            "model_type": "mof",
            "clip": vision,
            "dinov2": read_json(folder("vision2") / "config.json"),
        }
    return LLaVAConfig(
        text, vision, preprocessor, c.connector, c.connector_options, c.feature_layer, c.feature_select, c.image_mode,
        template, 1.0, {"llm": c.llm, "vision": c.vision, "vision2": c.vision2}, c.image_grids, c.frames, c.fps,
    )  # fmt: skip


class Layout(NamedTuple):
    read: Callable[[dict, Path], LLaVAConfig]
    table: Table = ()
    hf_names: bool = True
    writes: Callable[[LLaVAConfig], dict] | None = (
        None  # config.json of this layout, where we write it
    )


# ---------------------------------------------------------------------------------------------------- ours


def to_ours(c: LLaVAConfig) -> dict:
    """config.json of our own layout; the image processor has a file of its own."""
    rest = asdict(c)
    parts = {"text_config": rest.pop("text"), "vision_config": rest.pop("vision")}
    del rest["preprocessor"]
    return {"model_type": "barellava", **parts, **rest, "image_token_index": IMAGE_TOKEN}


def _ours(c: dict, folder: Path) -> LLaVAConfig:
    known = LLaVAConfig.__dataclass_fields__.keys() & c.keys()
    rest = {k: c[k] for k in known}
    return LLaVAConfig(c["text_config"], c["vision_config"], read_preprocessor(folder), **rest)


# --------------------------------------------------------------------------------------- TinyLLaVA Factory

# What the original's dispatch on names needs to see, where nothing else is known.
FACTORY_NAMES = {
    "llama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "phi": "microsoft/phi-2", "gemma": "google/gemma-2b-it",
    "stablelm": "stabilityai/stablelm-2-zephyr-1_6b", "qwen2": "Qwen/Qwen2-0.5B",
    "openelm": "apple/OpenELM-450M-Instruct", "clip_vision_model": "openai/clip-vit-large-patch14-336",
    "siglip_vision_model": "google/siglip-so400m-patch14-384", "dinov2": "facebook/dinov2-large",
}  # fmt: skip
FACTORY_CONNECTORS = CONNECTORS.keys() - {"mean_mlp2x_gelu"}  # TinyLLaVA-Video's two among them
FACTORY_SIZES = {"num_queries": 128, "num_resampler_layers": 3}  # of connectors, with its defaults
FACTORY_TEMPLATES = {"llama": "llama", "openelm": "llama", "gemma": "gemma", "qwen2": "qwen2_base"}


def _factory(c: dict, folder: Path) -> LLaVAConfig:
    """TinyLLaVA Factory and TinyLLaVA-Video, one file or three folders. Neither records the template (the LLM's usual
    one is taken) or how many frames were seen (16, as most of TinyLLaVA-Video's)."""
    text, vision = c["text_config"], c["vision_config"]
    if "vision_config2" in c:
        # Factory ran with transformers 4.40, which interpolates DINOv2's positions as the original code does.
        vision = {
            "model_type": "mof",
            "clip": vision,
            "dinov2": c["vision_config2"] | {"interpolate_offset": 0.1},
        }
    elif vision["model_type"] == "dinov2":
        vision = vision | {"interpolate_offset": 0.1}
    kind = (
        "naiveresampler" if c["connector_type"] == "resamplerwithpe" else c["connector_type"]
    )  # until March 2025
    # Factory takes a Q-Former's sizes from bert-base, as our defaults do; a file may say otherwise.
    sizes = {name: c[name] for name in (*FACTORY_SIZES, "group") if name in c} | c.get(
        f"{kind}_config", {}
    )
    options = {
        name: sizes[name] for name in getattr(CONNECTORS.get(kind), "options", ()) if name in sizes
    }
    return LLaVAConfig(
        text, vision, read_preprocessor(folder), kind, options, c["vision_feature_layer"],
        c["vision_feature_select_strategy"], c["image_aspect_ratio"], FACTORY_TEMPLATES.get(text["model_type"], "phi"),
        sources={"llm": c["llm_model_name_or_path"], "vision": c["vision_model_name_or_path"].removeprefix("mof:"),
                 "vision2": c.get("vision_model_name_or_path2", "").removeprefix("mof:")},
    )  # fmt: skip


def _to_factory(c: LLaVAConfig) -> dict:
    text, vision, second = c.text, c.vision, None
    mixture = "mof:" if vision["model_type"] == "mof" else ""
    if mixture:
        vision, second = vision["clip"], vision["dinov2"]
    for kind in (text["model_type"], vision.get("model_type"), c.connector):
        if kind not in FACTORY_NAMES and kind not in FACTORY_CONNECTORS:
            raise UserError(
                "config.json:model_type", f"TinyLLaVA Factory has no {kind}", "use --to barellava"
            )
    if c.image_mode in TILED:
        raise UserError(
            "config.json:image_mode",
            f"TinyLLaVA Factory has no {c.image_mode}",
            "use --to barellava",
        )
    if c.image_scale != 1 or text.get("lm_head_bias") is False:
        what = (
            "image features scaled otherwise"
            if c.image_scale != 1
            else "a Phi without a bias on its head"
        )
        raise UserError(
            "config.json", f"TinyLLaVA Factory has no {what}", "use --to barellava or hf-llava"
        )
    options, width = c.connector_options, vision.get("hidden_size", 768)
    name = {k: v for k, v in c.sources.items() if v and not Path(v).is_absolute()}
    return {
        "model_type": "tinyllava",
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision,
        **({"vision_config2": second} if second else {}),
        "vision_hidden_size": width,
        "hidden_size": text.get("hidden_size", text.get("model_dim")),
        "vocab_size": text["vocab_size"],
        "vision_feature_layer": c.feature_layer,
        "vision_feature_select_strategy": c.feature_select,
        "connector_type": c.connector,
        **FACTORY_SIZES,
        **{
            name: n
            for name, n in (CONNECTORS[c.connector].options | options).items()
            if name in FACTORY_SIZES
        },
        **({"group": options.get("group", 16)} if c.connector == "groupresampler" else {}),
        **(
            {f"{c.connector}_config": options}
            if options.keys() - FACTORY_SIZES.keys() - {"group"}
            else {}
        ),
        "image_aspect_ratio": c.image_mode,
        "image_token_index": IMAGE_TOKEN,
        "ignore_index": -100,
        "tokenizer_model_max_length": 2048,
        "llm_model_name_or_path": name.get("llm", FACTORY_NAMES[text["model_type"]]),
        "tokenizer_name_or_path": name.get("llm", FACTORY_NAMES[text["model_type"]]),
        "vision_model_name_or_path": mixture
        + name.get("vision", FACTORY_NAMES[vision["model_type"]]),
        "vision_model_name_or_path2": mixture + name.get("vision2", FACTORY_NAMES["dinov2"])
        if second
        else "",
    }


# ---------------------------------------------------------------------------------------- TinyLLaVABench


def _bench(family: str, template: str):
    """TinyLLaVABench, before Factory: one config.json for the LLM and `mm_*` for the rest; the tower only by name.

    Its SigLIP class deletes the last block, takes what comes out and keeps all patches; its Phi has no head bias.
    """

    def read(c: dict, folder: Path) -> LLaVAConfig:
        tower = resolve(
            c["mm_vision_tower"], f"{folder / 'config.json'}:mm_vision_tower", small=True
        )
        vision = read_json(tower / "config.json")
        siglip = vision["model_type"].startswith("siglip")
        text = {k: v for k, v in c.items() if not k.startswith(("mm_", "tune_"))} | {
            "model_type": family
        }
        if family == "phi":
            text["lm_head_bias"] = False
        if family == "stablelm":  # written before transformers had the class, under other names
            text |= {"partial_rotary_factor": c.get("rope_pct", 0.25), "layer_norm_eps": c.get("norm_eps", 1e-5),
                     "use_qkv_bias": c.get("use_qkv_bias", True)}  # fmt: skip
        return LLaVAConfig(
            text, vision, read_preprocessor(tower), c.get("mm_projector_type", "linear"), {},
            -2 if siglip else c["mm_vision_select_layer"],
            "cls_patch" if siglip else c.get("mm_vision_select_feature", "patch"),
            c.get("image_aspect_ratio") or "square", template,
            sources={"llm": FACTORY_NAMES[family], "vision": c["mm_vision_tower"]},
        )  # fmt: skip

    table = (("model.mm_projector.**", "connector.**"), ("model.vision_tower.vision_tower.**", "vision_tower.**"),
             ("**", "language_model.**"))  # fmt: skip
    return Layout(read, table)


# ------------------------------------------------------------------------------------- Hugging Face LLaVA


PINPOINTS = [
    [336, 672],
    [672, 336],
    [672, 672],
    [1008, 336],
    [336, 1008],
]  # LLaVA-NeXT's default, in pixels


def _hf_next(c: dict, folder: Path) -> LLaVAConfig:
    """LlavaNextForConditionalGeneration: LLaVA in high resolution. Grids stand in its files as height, width."""
    config = _hf_llava(c, folder)
    side = vision_config(config.vision, config.preprocessor).processor.side
    pixels = c.get("image_grid_pinpoints") or PINPOINTS
    if odd := [edge for pair in pixels for edge in pair if edge % side]:
        what = f"{odd[0]} pixels are not whole views of {side}"
        raise UserError(
            f"{folder / 'config.json'}:image_grid_pinpoints",
            what,
            "give the processor of this encoder",
        )
    return replace(
        config,
        image_mode="anyres",
        image_grids=" ".join(f"{h // side}x{w // side}" for h, w in pixels),
    )


def _hf_llava(c: dict, folder: Path) -> LLaVAConfig:
    """LlavaForConditionalGeneration as transformers 4 and 5 write it."""
    select = {"default": "patch", "full": "cls_patch"}
    if not isinstance(c.get("vision_feature_layer", -2), int):
        raise UserError(
            f"{folder / 'config.json'}:vision_feature_layer",
            "several layers",
            "use a model with one",
        )
    if c.get("projector_hidden_act", "gelu") != "gelu" or not c.get(
        "multimodal_projector_bias", True
    ):
        raise UserError(
            f"{folder / 'config.json'}:projector_hidden_act",
            "only gelu with biases",
            "use another model",
        )
    text, images, mode = (
        {"model_type": "llama", **c["text_config"]},
        read_preprocessor(folder),
        "square",
    )
    if str(images.get("image_processor_type")).startswith(
        "LlavaImageProcessor"
    ):  # CLIP's, that can pad before it
        mode = "pad" if images.pop("do_pad", False) else "square"
        images["image_processor_type"] = "CLIPImageProcessor"
    if str(images.get("image_processor_type")).startswith(
        "LlavaNextImageProcessor"
    ):  # CLIP's, for each tile
        images = {k: v for k, v in images.items() if k != "do_pad"} | {
            "image_processor_type": "CLIPImageProcessor"
        }
    # transformers 5 multiplies Gemma's token embeddings by sqrt(D) and leaves image features alone; 4 scaled both.
    new = int(str(c.get("transformers_version", "4")).partition(".")[0]) >= 5
    scale = text.get("hidden_size", 3072) ** -0.5 if new and text["model_type"] == "gemma" else 1.0
    return LLaVAConfig(
        text, {"model_type": "clip_vision_model", **c["vision_config"]}, images, image_mode=mode,
        feature_layer=c.get("vision_feature_layer", -2),
        feature_select=select[c.get("vision_feature_select_strategy", "default")], template="chat", image_scale=scale,
    )  # fmt: skip


# anyres's separator stands beside the projector in their files, in it in ours.
NEWLINE = (("image_newline", "connector.image_newline"),)
PROJECTOR = NEWLINE + tuple(
    (f"multi_modal_projector.linear_{i}.*", f"connector.{2 * i - 2}.*") for i in (1, 2)
)
_FACTORY_TABLE = (
    ("vision_tower._vision_tower.**", "vision_tower.**"),
    ("connector._connector.**", "connector.**"),
)
_FACTORY_FOLDERS = {"language_model": "language_model.", "vision_tower": "vision_tower._vision_tower.",
                    "connector": "connector."}  # fmt: skip
_HF_TABLE = (
    *PROJECTOR,
    *((f"model.{theirs}", ours) for theirs, ours in PROJECTOR),
    ("model.vision_tower.**", "vision_tower.**"),
    ("model.language_model.**", "language_model.model.**"),
    ("lm_head.**", "language_model.lm_head.**"),
)
LAYOUTS: dict[str, Layout] = {
    "barellava": Layout(_ours, hf_names=False, writes=to_ours),
    "tinyllava": Layout(_factory, _FACTORY_TABLE, writes=_to_factory),
    "tiny_llava_phi": _bench("phi", "phi"),
    "tiny_llava": _bench("llama", "llama"),
    "tiny_llava_stablelm": _bench("stablelm", "phi"),
    "llava": Layout(_hf_llava, _HF_TABLE),
    "llava_next": Layout(_hf_next, _HF_TABLE),
}


ADAPTED = (
    LAYOUTS["llava"].table + LAYOUTS["tinyllava"].table
)  # names that PEFT files of whole models may have


class Renamed(Mapping):
    """A checkpoint seen through a layout's table: keys as `language_model.*`, `vision_tower.*`, `connector.*`."""

    def __init__(self, source: Mapping, table: Table):
        self.source, self.theirs = source, {}
        for key in source:
            ours = rename(key, table)
            if ours in self.theirs:
                raise UserError(
                    source.locate(key),
                    f"the same tensor as {self.theirs[ours]}",
                    "remove one of the two",
                )
            self.theirs[ours] = key

    def __getitem__(self, key: str):
        return self.source[self.theirs[key]]

    def __iter__(self):
        return iter(self.theirs)

    def __len__(self):
        return len(self.theirs)

    def locate(self, key: str) -> str:
        return self.source.locate(self.theirs.get(key, key))


class _Merged(Renamed):
    """What TinyLLaVA Factory leaves after LoRA: base weights in three folders, adapters beside them in PEFT's files.

    Adapted weights stand as X.base_layer.weight; they come as X.weight with s B A added, in float32.
    """

    def __init__(self, source: weights.Joined, folder: Path):
        super().__init__(source, (("**.base_layer.**", "**.**"),))
        c, file = read_json(folder / "adapter_config.json"), "adapter_model.safetensors"
        for key in (
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "modules_to_save",
            "fan_in_fan_out",
        ):
            if c.get(key):
                raise UserError(
                    f"{folder}/adapter_config.json:{key}",
                    "not supported",
                    "merge it with PEFT first",
                )
        self.scale = c["lora_alpha"] / (c["r"] ** 0.5 if c.get("use_rslora") else c["r"])
        self.low = weights.read_file(folder / file)
        self.theirs = {ours: key for ours, key in self.theirs.items() if ".lora_" not in key}
        if odd := [k for k in self.low if self._owner(k) not in self.theirs]:
            raise UserError(
                f"{folder / file}:{odd[0]}",
                "the model has no place for it",
                "give its own base weights",
            )

    @staticmethod
    def _owner(key: str) -> str:
        return key.removeprefix("base_model.model.").rpartition(".lora_")[0] + ".weight"

    def __getitem__(self, key: str):
        tensor, name = (
            self.source[self.theirs[key]],
            f"base_model.model.{key.removesuffix('.weight')}",
        )
        low = [self.low.get(f"{name}.lora_{x}.weight") for x in "BA"]
        return (
            tensor
            if low[0] is None
            else tensor.float().addmm(*(t.float() for t in low), alpha=self.scale)
        )


def read_config(folder: Path) -> LLaVAConfig:
    """The config of a checkpoint of any layout. Raises UserError for an unknown or incomplete config.json."""
    where = folder / "config.json"
    c = read_json(where)
    kind = c.get("model_type")
    if kind not in LAYOUTS:
        raise UserError(
            f"{where}:model_type",
            f"{kind!r} is no layout known here",
            f"one of {', '.join(LAYOUTS)}",
        )
    try:
        return LAYOUTS[kind].read(c, folder)
    except KeyError as e:
        raise UserError(f"{where}:{e.args[0]}", "missing", "give a complete config.json") from None


def read(folder: Path, allow_pickle: bool = False) -> tuple[LLaVAConfig, Mapping, bool]:
    """A checkpoint of any layout -> its config, its tensors by part, whether the parts have Hugging Face's names.

    Raises UserError as read_config and weights.Checkpoint do.
    """
    config, kind = read_config(folder), read_json(folder / "config.json")["model_type"]
    layout = LAYOUTS[kind]
    if (
        kind == "tinyllava" and (folder / "language_model").is_dir()
    ):  # Factory's training folder: three parts
        parts = {
            prefix: weights.Checkpoint(folder / n, allow_pickle)
            for n, prefix in _FACTORY_FOLDERS.items()
        }
        source = weights.Joined(parts)
        if (folder / "adapter_config.json").exists():
            source = _Merged(source, folder)
    else:
        source = weights.Checkpoint(folder, allow_pickle)
    return config, Renamed(source, layout.table), layout.hf_names
