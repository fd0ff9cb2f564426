"""The layout of TinyLLaVA Factory and TinyLLaVA-Video.

    python export.py --model DIR --to tinyllava OUT

Factory writes one model.safetensors, or three folders (language_model, vision_tower, connector)
while it trains. After a LoRA run those folders hold the base weights, and the adapters stand beside
them in PEFT's files; the adapters are merged on reading. We write the one file.

Read `read` and `config_json` first: they translate config.json to our LLaVAConfig and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from checkpoints import weights
from checkpoints.fields import ALPHA, LAYERS, MOST_RANK, Fields
from checkpoints.files import read_json
from checkpoints.folder import Renamed, folder_readme, merged_field, named_tensors, write_folder
from config import LLaVAConfig, UserError
from connectors import CONNECTORS
from inputs.image_modes import MODES
from inputs.image_processor import read_preprocessor
from packing import IMAGE_TOKEN

OPENED_BY = (
    "TinyLLaVA Factory, with a video's connector TinyLLaVA-Video: `load_pretrained_model(DIR)`"
)

# Names in the one file; and of the three folders, the prefix that their names have in the one file.
TABLE = (
    ("vision_tower._vision_tower.**", "vision_tower.**"),
    ("connector._connector.**", "connector.**"),
)
FOLDERS = {
    "language_model": "language_model.",
    "vision_tower": "vision_tower._vision_tower.",
    "connector": "connector.",
}

# Factory finds the class of a part by words in its name. These serve where no name is known.
LLM_NAMES = {
    "llama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "phi": "microsoft/phi-2",
    "gemma": "google/gemma-2b-it",
    "stablelm": "stabilityai/stablelm-2-zephyr-1_6b",
    "qwen2": "Qwen/Qwen2-0.5B",
    "openelm": "apple/OpenELM-450M-Instruct",
}
ENCODER_NAMES = {
    "clip_vision_model": "openai/clip-vit-large-patch14-336",
    "siglip_vision_model": "google/siglip-so400m-patch14-384",
    "dinov2": "facebook/dinov2-large",
}

# The chat template is not recorded, so we take the usual one of the language model; else "phi".
TEMPLATES = {"llama": "llama", "openelm": "llama", "gemma": "gemma", "qwen2": "qwen2_base"}

SELECTS = ("patch", "cls_patch")  # vision_feature_select_strategy
ROOT = "base_model.model."  # before every name in PEFT's files

# The connectors that Factory and -Video have, each with the options that it has there.
SIZES = ("num_queries", "num_resampler_layers")
BERT_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
OPTIONS = {
    "identity": (),
    "linear": (),
    "mlp1x_gelu": (),
    "mlp2x_gelu": (),
    "mlp3x_gelu": (),
    "mlp4x_gelu": (),
    "mlp5x_gelu": (),
    "mlp6x_gelu": (),
    "mlp7x_gelu": (),
    "mlp8x_gelu": (),
    "mof_mlp": (),
    "resampler": SIZES,
    "naiveresampler": SIZES,
    "groupresampler": (*SIZES, "group"),
    "qformer": ("num_queries", *BERT_SIZES),
}
# Every config.json has these two, with Factory's defaults where the connector has no such option.
ALWAYS = {"num_queries": 128, "num_resampler_layers": 3}

# ------------------------------------------------------------------------------------- config.json


def read(config: Fields, folder: Path) -> LLaVAConfig:
    """Return what a config.json of TinyLLaVA Factory or -Video describes.

    Neither records the chat template (the language model's usual one is taken) or how many frames
    of a video were seen (our default is 16, as in most of TinyLLaVA-Video's).
    """
    text = config.table("text_config")
    vision = config.table("vision_config").values

    # Factory ran with transformers 4.40, which interpolates DINOv2's positions as its authors do.
    interpolation = {"interpolate_offset": 0.1}
    if "vision_config2" in config:
        dinov2 = config.table("vision_config2").values | interpolation
        vision = {"model_type": "mof", "clip": vision, "dinov2": dinov2}
    elif vision.get("model_type") == "dinov2":
        vision = vision | interpolation

    connector = config.text("connector_type", most=100)
    if connector == "resamplerwithpe":  # its name until March 2025
        connector = "naiveresampler"

    # In a mixture, names of encoders have a prefix that says so.
    encoder = config.text("vision_model_name_or_path", default="").removeprefix("mof:")
    second_encoder = config.text("vision_model_name_or_path2", default="").removeprefix("mof:")
    return LLaVAConfig(
        text=text.values,
        vision=vision,
        preprocessor=read_preprocessor(folder),
        connector=connector,
        connector_options=_read_options(config, connector),
        feature_layer=config.integer("vision_feature_layer", -LAYERS, LAYERS),
        feature_select=config.text("vision_feature_select_strategy", SELECTS),
        image_mode=config.text("image_aspect_ratio", default="square", most=100),
        template=TEMPLATES.get(text.text("model_type"), "phi"),
        sources={
            "llm": config.text("llm_model_name_or_path", default=""),
            "vision": encoder,
            "vision2": second_encoder,
        },
    )


def _read_options(config: Fields, connector: str) -> dict[str, int]:
    """Return the options of the connector; config.json also states some that do not concern it.

    Factory takes a Q-Former's BERT sizes from bert-base, as our defaults do. A `qformer_config`,
    which we write, may state others.
    """
    # hidden_size of the top level is the language model's, so only these are taken from there.
    stated = {}
    for name in (*SIZES, "group"):
        if name in config:
            stated[name] = config.values[name]
    stated |= config.table(f"{connector}_config", optional=True).values

    options = {}
    for name in OPTIONS.get(connector, ()):
        if name in stated:
            options[name] = stated[name]
    return options


def config_json(c: LLaVAConfig) -> dict:
    """Return Factory's config.json, of a model that it can express."""
    # Of a mixture of features Factory has the first encoder where it always is, the second beside.
    text = c.text
    vision = c.vision
    second = None
    prefix = ""
    if vision["model_type"] == "mof":
        vision, second = vision["clip"], vision["dinov2"]
        prefix = "mof:"

    # A path of this machine says nothing elsewhere: Factory gets a name that it knows instead.
    names = {key: name for key, name in c.sources.items() if name and not Path(name).is_absolute()}
    llm_name = names.get("llm", LLM_NAMES[text["model_type"]])
    vision_name = prefix + names.get("vision", ENCODER_NAMES[vision["model_type"]])
    second_name = ""
    if second:
        second_name = prefix + names.get("vision2", ENCODER_NAMES["dinov2"])

    config = {
        "model_type": "tinyllava",
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision,
    }
    if second:
        config["vision_config2"] = second
    config |= {
        "vision_hidden_size": vision.get("hidden_size", 768),
        "hidden_size": text.get("hidden_size", text.get("model_dim")),
        "vocab_size": text["vocab_size"],
        "vision_feature_layer": c.feature_layer,
        "vision_feature_select_strategy": c.feature_select,
        "connector_type": c.connector,
        **_option_fields(c),
        "image_aspect_ratio": c.image_mode,
        "image_token_index": IMAGE_TOKEN,
        "ignore_index": -100,
        "tokenizer_model_max_length": 2048,
        "llm_model_name_or_path": llm_name,
        "tokenizer_name_or_path": llm_name,
        "vision_model_name_or_path": vision_name,
        "vision_model_name_or_path2": second_name,
        **merged_field(c),
    }
    return config


def _option_fields(c: LLaVAConfig) -> dict:
    """Return the fields of config.json that hold the connector's options."""
    options = CONNECTORS[c.connector].options | c.connector_options
    fields = {name: options.get(name, default) for name, default in ALWAYS.items()}
    if c.connector == "groupresampler":
        fields["group"] = options["group"]

    # Factory has no fields for other options. If the model states one, all go to a table of ours.
    if c.connector_options.keys() - {*ALWAYS, "group"}:
        fields[f"{c.connector}_config"] = c.connector_options
    return fields


def check_expressible(model):
    """Raise UserError that names the first thing Factory has no place for."""
    c = model.config

    # In a mixture the first encoder counts: the second is a DINOv2.
    encoder = c.vision.get("clip", c.vision).get("model_type")
    family = c.text["model_type"]
    unknown_options = sorted(c.connector_options.keys() - OPTIONS.get(c.connector, ()))

    fix = "use --to barellava"
    if family not in LLM_NAMES:
        where, what = "config.json:model_type", family
    elif encoder not in ENCODER_NAMES:
        where, what = "config.json:model_type", encoder
    elif c.connector not in OPTIONS:
        where, what = "config.json:model_type", c.connector
    elif unknown_options:
        where = "config.json:connector_options"
        what = f"{unknown_options[0]} of a {c.connector}"
    elif MODES[c.image_mode].tiled:
        where, what = "config.json:image_mode", c.image_mode
    elif c.feature_norm:
        where, what = "config.json:feature_norm", "norm behind the encoder's last block"
    elif c.image_scale != 1:
        where, what = "config.json", "image features scaled otherwise"
        fix = "use --to barellava or hf-llava"
    elif c.text.get("lm_head_bias") is False:
        where, what = "config.json", "a Phi without a bias on its head"
        fix = "use --to barellava or hf-llava"
    else:
        return
    raise UserError(where, f"TinyLLaVA Factory has no {what}", fix)


# ----------------------------------------------------------------------------------------- tensors


def open_tensors(folder: Path, allow_pickle: bool = False) -> Mapping[str, Tensor]:
    """Return the tensors under their names in one file; adapters of a LoRA run are merged."""
    if not (folder / "language_model").is_dir():
        return weights.Checkpoint(folder, allow_pickle)

    parts = {}
    for name, prefix in FOLDERS.items():
        parts[prefix] = weights.Checkpoint(folder / name, allow_pickle)
    source = weights.Joined(parts)

    if (folder / "adapter_config.json").exists():
        return WithAdapters(source, folder)
    return source


class WithAdapters(Renamed):
    """What Factory leaves after a LoRA run: base weights, and adapters in PEFT's files beside them.

    An adapted weight stands in the file as X.base_layer.weight. It is read as X.weight, W + s B A
    computed in float32, where s is the adapter's scale (Hu et al., 2021).
    """

    def __init__(self, source: weights.Joined, folder: Path):
        super().__init__(source, (("**.base_layer.**", "**.**"),))
        where = folder / "adapter_config.json"
        config = Fields(read_json(where), where)
        file = folder / "adapter_model.safetensors"

        for key in (
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "modules_to_save",
            "fan_in_fan_out",
        ):
            if config.values.get(key):
                raise UserError(config.name(key), "not supported", "merge it with PEFT first")

        rank = config.integer("r", 1, MOST_RANK)
        divisor = rank
        if config.flag("use_rslora", default=False):
            divisor = rank**0.5
        self.scale = config.number("lora_alpha", *ALPHA) / divisor
        self.adapters = weights.read_file(file)
        self.file = file

        # The base folders may hold copies of the adapters, too. Those of the adapter file are used.
        for ours in [ours for ours, key in self.theirs.items() if ".lora_" in key]:
            del self.theirs[ours]

        for key in self.adapters:
            owner, _, matrix = key.removeprefix(ROOT).rpartition(".lora_")
            if f"{owner}.weight" not in self.theirs:
                self.refuse(key, "the model has no place for it")
            if matrix not in ("A.weight", "B.weight"):
                self.refuse(key, "no matrix of a plain LoRA")

    def refuse(self, key: str, what: str):
        """Raise the UserError that names a tensor of the adapters."""
        raise UserError(f"{self.file}:{key}", what, "give its own base weights")

    def __getitem__(self, key: str) -> Tensor:
        weight = self.source[self.theirs[key]]
        name = f"{ROOT}{key.removesuffix('.weight')}"
        a = self.adapters.get(f"{name}.lora_A.weight")  # (r, K)
        b = self.adapters.get(f"{name}.lora_B.weight")  # (N, r)
        if a is None and b is None:
            return weight

        # One without the other has no shape.
        shapes = [list(tensor.shape) for tensor in (a, b) if tensor is not None]
        rank = shapes[0][0] if shapes[0] else 0
        needed = [[rank, *weight.shape[1:]], [*weight.shape[:1], rank]]
        if weight.dim() != 2 or shapes != needed:
            self.refuse(f"{name}.lora_A.weight", f"shapes {shapes}, the model needs {needed}")

        # W + s B A, (N, K).
        return weight.float().addmm(b.float(), a.float(), alpha=self.scale)


def write(folder: Path, model, tokenizer, transformers: int = 5):
    """Write a LLaVA as Factory's one file, with its tokenizer (or None).

    Raises UserError, before anything is written, for what Factory cannot express.
    """
    check_expressible(model)
    config = config_json(model.config)
    files = {
        "preprocessor_config.json": model.vision_tower.processor.to_hf(),
        "README.md": folder_readme(model, OPENED_BY),
        "config.json": config,
    }
    write_folder(folder, named_tensors(model, TABLE), files, tokenizer)
