"""SmolVLM and Idefics3, whose classes differ in names alone (Laurencon et al., 2024).

    python generate.py --model HuggingFaceTB/SmolVLM-256M-Instruct --image FILE --prompt TEXT
    python export.py --model DIR --to smolvlm OUT       # SmolVLMForConditionalGeneration
    python export.py --model DIR --to idefics3 OUT      # Idefics3ForConditionalGeneration

An encoder like SigLIP with its final norm, pixel shuffle with one linear, and a language model.
Pictures are split (inputs/tiling_split.py: SplitTiling). Around the features of each view stand
tokens of text; their ids are those that the folder's tokenizer gives them.

Read `read`, then `contents`. A video is refused: around its frames SmolVLM2 writes their number and
times into the text, before it is tokenized, since the first and last words join what is beside.

R factor of the pixel shuffle, S x S pixels of a view.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from checkpoints.fields import SIDE, VOCABULARY, Fields
from checkpoints.files import read_json
from checkpoints.folder import (
    folder_readme,
    has_head_bias,
    merged_field,
    named_tensors,
    write_folder,
)
from checkpoints.hf_tokenizer import chat_files
from config import LLaVAConfig, UserError
from inputs.image_processor import preprocessor_place, read_preprocessor
from inputs.tiling_split import FAKE, MOST_EDGE, mark_names
from inputs.tokenizer import Tokenizer, load_tokenizer
from packing import IMAGE_TOKEN

OPENED_BY = "transformers: `AutoModelForImageTextToText.from_pretrained(DIR)` and `AutoProcessor`"

TABLE = (
    ("model.connector.modality_projection.proj.weight", "connector.proj.weight"),
    ("model.vision_model.**", "vision_tower.vision_model.**"),
    ("model.text_model.**", "language_model.model.**"),
    ("lm_head.**", "language_model.lm_head.**"),
)

# The language models with a head without bias, and no scale between embeddings and features.
FAMILIES = ("llama", "mistral", "smollm3", "qwen2", "qwen3")

# What the vision_config of transformers leaves out.
VISION_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.02,
}

# The image processors, without the Fast or Pil that some writers put behind the name.
PROCESSORS = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
LANCZOS = 1  # the default of both

# ----------------------------------------------------------------------------------------- reading


def read(config: Fields, folder: Path) -> LLaVAConfig:
    """Return what a config.json of SmolVLM or Idefics3 describes. Raises UserError."""
    stated = config.table("text_config")
    text = {"model_type": "llama", **stated.values}
    if text["model_type"] not in FAMILIES:
        raise stated.refuse("model_type", f"not one of {', '.join(FAMILIES)}")
    if text["model_type"] == "llama":
        text.setdefault("rms_norm_eps", 1e-5)  # not Llama's own default

    # The top level decides alone whether the head is tied, as in transformers 5.
    text["tie_word_embeddings"] = config.flag("tie_word_embeddings", default=False)

    vision = config.table("vision_config")
    given = {key: value for key, value in vision.values.items() if value is not None}
    filled = Fields(VISION_DEFAULTS | given, config.where, "vision_config", config.fix)
    side = filled.integer("image_size", 1, SIDE)
    patches = side // filled.integer("patch_size", 1, side)
    check_positions(patches, filled)

    factor = config.integer("scale_factor", 1, SIDE, default=2)
    if patches % factor:
        raise config.refuse("scale_factor", f"no divisor of the {patches} patches along an edge")

    images, edge = read_images(folder, side)
    token = config.integer("image_token_id", 0, VOCABULARY, default=128257)
    check_sequence(folder, (patches // factor) ** 2)
    return LLaVAConfig(
        text=text,
        vision=filled.values | {"model_type": "siglip_vision_model"},
        preprocessor=images,
        connector="pixel_shuffle",
        connector_options={"factor": factor, "mlp_depth": 1},
        feature_layer=-1,
        feature_select="cls_patch",
        feature_norm=True,
        image_mode="split",
        image_edge=edge,
        image_marks=read_marks(folder, mark_names(edge, side), token, config),
        template="chat",
    )


def check_positions(patches: int, vision: Fields):
    """Raise UserError unless patch i along an edge has position i in transformers, too.

    Its encoder finds the position of a patch as a fraction of the edge in float32. For some numbers
    of patches, 19 and 25 are the smallest, that rounds into the place of a neighbour.
    """
    cpu = torch.device("cpu")  # also where a model is being built without storage
    boundaries = torch.arange(1 / patches, 1.0, 1 / patches, device=cpu)
    step = 1.0 / torch.tensor([patches], device=cpu)
    places = torch.arange(patches, dtype=torch.float32, device=cpu) * step
    places = places.clamp(max=1.0 - 1e-6)
    found = torch.bucketize(places, boundaries, right=True)
    if not torch.equal(found, torch.arange(patches, device=cpu)):
        why = (
            f"{patches} patches along an edge: the published encoder gives two of them one position"
        )
        raise vision.refuse("image_size", why)


def read_images(folder: Path, side: int) -> tuple[dict, int]:
    """Return the image processor of one view, and the pixels of the longest edge before the split.

    Raises UserError for what the published one may do and we do not.
    """
    place = preprocessor_place(folder)
    fields = Fields(dict(read_preprocessor(folder)), place)
    kind = fields.text("image_processor_type", default=PROCESSORS[0])
    if kind.removesuffix("Fast").removesuffix("Pil") not in PROCESSORS:
        raise fields.refuse("image_processor_type", f"not one of {', '.join(PROCESSORS)}")

    for key in ("do_image_splitting", "do_resize", "do_rescale", "do_normalize", "do_pad"):
        if not fields.flag(key, default=True):
            raise fields.refuse(key, "not supported: pictures are resized, split and padded")

    view = fields.table("max_image_size", optional=True)
    if view.integer("longest_edge", 1, SIDE, default=364) != side:
        raise view.refuse("longest_edge", f"not the {side} pixels that the encoder takes")
    size = fields.table("size", optional=True)
    for key in size.values:
        if key != "longest_edge":
            raise size.refuse(key, "not supported: only longest_edge")
    edge = size.integer("longest_edge", 1, MOST_EDGE, default=4 * 364)

    images = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": side, "width": side},
        "resample": fields.integer("resample", 0, 5, default=LANCZOS),
    }
    for key in ("image_mean", "image_std", "rescale_factor"):
        if key in fields:
            images[key] = fields.values[key]
    return images, edge


def check_sequence(folder: Path, tokens: int):
    """Raise UserError unless the processor writes as many image tokens as a view has."""
    file = folder / "processor_config.json"
    processor = Fields(read_json(file, optional=True), file)
    if processor.integer("image_seq_len", 1, SIDE**2, default=tokens) != tokens:
        raise processor.refuse("image_seq_len", f"not the {tokens} tokens of a view")


def read_marks(folder: Path, names: list[str], token: int, config: Fields) -> dict[str, list[int]]:
    """Return the ids of the strings around the views of pictures.

    Each of them stands between two control tokens, so it is encoded alone. Raises UserError for a
    tokenizer that does not have these, or another `<image>` than config.json.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer.token_id("<image>") != token:
        raise config.refuse("image_token_id", "not the tokenizer's <image>")
    if FAKE not in tokenizer.special:
        fix = "give the tokenizer of this model"
        raise UserError(folder, f"a tokenizer without a control token {FAKE}", fix)
    return {name: tokenizer.encode(name)[0] for name in names}


def with_marks(
    config: LLaVAConfig, tokenizer: Tokenizer | None, edge: int, side: int
) -> LLaVAConfig:
    """Return the config of a new model, with the marks, and embeddings for those that are new.

    Its pictures are resized as SmolVLM's are, whatever its encoder's processor says: some programs
    that run SmolVLM, llama.cpp for one, know no other way.

    tokenizer: it has them all (tiling_split.control_names). Without it each has one id, behind
    those of the language model. edge: 0 for that of one view. side: pixels of a view's side. Raises
    UserError.
    """
    edge = edge or side
    names = mark_names(edge, side)
    text = Fields(config.text, config.places.get("text", "llm_config"))
    rows = text.integer("vocab_size", 1, VOCABULARY)
    if tokenizer is None:
        marks = {name: [rows + i] for i, name in enumerate(names)}
        rows += len(names)
    else:
        # The language model may have more embeddings than its tokenizer has ids.
        marks = {name: tokenizer.encode(name)[0] for name in names}
        rows = max(rows, tokenizer.vocab_size)
    grown = config.text | {"vocab_size": rows}
    images = config.preprocessor | {"resample": LANCZOS}
    return replace(config, text=grown, preprocessor=images, image_edge=edge, image_marks=marks)


# ----------------------------------------------------------------------------------------- writing


def write(folder: Path, model, tokenizer, transformers: int = 5, kind: str = "SmolVLM"):
    """Write a folder of that kind, "SmolVLM" or "Idefics3", with its tokenizer.

    transformers: every layout's writer gets it; both versions read the same files. Raises
    UserError, before anything is written, for what the layout cannot express.
    """
    check_expressible(model, kind)
    if tokenizer is None:
        reason = f"no tokenizer: the marks around pictures of {kind} are its tokens"
        raise UserError(f"--to {kind.lower()}", reason, "export to barellava")
    tensors = named_tensors(model, TABLE)
    files = contents(model, tokenizer, kind, tensors)
    files["README.md"] = folder_readme(model, OPENED_BY, videos=False)
    write_folder(folder, tensors, files, tokenizer)


write_idefics3 = partial(write, kind="Idefics3")


def check_expressible(model, kind: str = "SmolVLM"):
    """Raise UserError naming the part that neither class of transformers has a place for."""
    c = model.config
    tower = model.vision_tower.config
    family = c.text["model_type"]
    options = {"factor": 2, "mlp_depth": 1} | c.connector_options

    if c.connector != "pixel_shuffle" or options["mlp_depth"] != 1:
        reason = f"connector {c.connector}: {kind} has pixel_shuffle with mlp_depth 1 alone"
    elif tower.hf["model_type"] != "siglip_vision_model":
        reason = f"encoder {tower.hf['model_type']}: {kind} takes one like SigLIP"
    elif not c.feature_norm:
        reason = f"features without the encoder's final norm: {kind} has it (model.feature_norm)"
    elif c.feature_select != "cls_patch":
        reason = f"feature_select patch: {kind} keeps the first patch"
    elif family not in FAMILIES or has_head_bias(model):
        reason = f"{family}: {kind} takes {', '.join(FAMILIES)}, with a head without bias"
    elif c.image_scale != 1:
        reason = f"image features scaled by {c.image_scale:g}: {kind} has no scale"
    elif c.image_mode != "split":
        reason = f"image mode {c.image_mode}: {kind} writes {FAKE} around every picture"
    elif c.template != "chat":
        reason = f"template {c.template}: {kind} has the tokenizer's own, chat"
    else:
        grid = Fields(tower.hf | {"image_size": tower.image_size}, f"--to {kind.lower()}")
        check_positions(tower.image_size // tower.patch_size, grid)
        return
    raise UserError(f"--to {kind.lower()}", reason, "export to barellava")


check_idefics3 = partial(check_expressible, kind="Idefics3")


def contents(model, tokenizer, kind: str, tensors: dict) -> dict[str, dict | str]:
    """Return the small files of a folder."""
    c = model.config
    lm = model.language_model
    processor = model.vision_tower.processor
    tied = lm.config.tied
    dtype = tensors["model.text_model.embed_tokens.weight"].dtype
    token = tokenizer.token_id("<image>")
    kept = {
        key: value for key, value in model.vision_tower.config.hf.items() if key != "model_type"
    }

    images = processor.to_hf()
    del images["do_center_crop"]
    images |= {
        "image_processor_type": f"{kind}ImageProcessor",
        "size": {"longest_edge": c.image_edge},
        "max_image_size": {"longest_edge": processor.side},
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_pad": True,
    }
    images["processor_class"] = f"{kind}Processor"

    files = {}
    files["config.json"] = {
        "model_type": kind.lower(),
        "architectures": [f"{kind}ForConditionalGeneration"],
        "text_config": c.text | {"tie_word_embeddings": tied},
        "vision_config": kept | {"model_type": f"{kind.lower()}_vision"},
        "scale_factor": model.connector.factor,
        "image_token_id": token,
        "pad_token_id": tokenizer.pad_id,
        "tie_word_embeddings": tied,
        "dtype": str(dtype).removeprefix("torch."),
        **merged_field(c),
    }
    files["preprocessor_config.json"] = images
    view = model.views.placeholder().count(IMAGE_TOKEN)
    files["processor_config.json"] = {
        "processor_class": f"{kind}Processor",
        "image_seq_len": view,
    }
    return files | chat_files(tokenizer, c.template)
