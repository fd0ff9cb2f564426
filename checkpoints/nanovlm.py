"""nanoVLM, Hugging Face's small training code with a layout of its own (Wiedmann et al., 2025).

    python generate.py --model lusxvr/nanoVLM-230M-8k --image FILE --prompt TEXT
    python export.py --model DIR --to nanovlm OUT       # of such a model

An encoder like SigLIP with its final norm, pixel shuffle with one linear, and a Llama. Pictures are
split, see inputs/tiling_split.py: NanoTiling. Nothing is normalised: a pixel is 0 to 1. A folder
has config.json, which is nanoVLM's VLMConfig, and model.safetensors; for the tokenizer see
inputs/nanovlm_tokenizer.py.

Read `read`, then `contents`. What nanoVLM does otherwise while it trains: it also learns the line
break that its chat template writes behind an answer, and it lets the samples that it packs into one
row see each other. In a sample of more than lm_max_position_embeddings tokens it divides the
frequencies of the rotation, which is not done here.

C width of the encoder, n positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import weights
from checkpoints.fields import (
    EPS,
    HEADS,
    INTERMEDIATE,
    LAYERS,
    SIDE,
    VOCABULARY,
    WIDTH,
    Fields,
)
from checkpoints.files import read_json
from checkpoints.folder import folder_readme, named_tensors, write_folder
from config import LLaVAConfig, UserError
from inputs import nanovlm_tokenizer
from inputs.tiling_split import MOST_EDGE, MOST_TILES, WHOLE, tile_mark
from inputs.tokenizer import Tokenizer, load_tokenizer

OPENED_BY = "nanoVLM: `VisionLanguageModel.from_pretrained(DIR)`"

# VLMConfig's defaults. A field that is not here is not in nanoVLM either.
DEFAULTS = {
    "vit_hidden_dim": 768,
    "vit_inter_dim": 3072,
    "vit_patch_size": 16,
    "vit_img_size": 512,
    "vit_n_heads": 12,
    "vit_dropout": 0.0,
    "vit_n_blocks": 12,
    "vit_ln_eps": 1e-6,
    "vit_cls_flag": False,
    "vit_model_type": "google/siglip2-base-patch16-512",
    "lm_hidden_dim": 960,
    "lm_inter_dim": 2560,
    "lm_rms_eps": 1e-5,
    "lm_re_base": 100000,
    "lm_max_position_embeddings": 8192,
    "lm_base_vocab_size": 49152,
    "extra_token_amount": 66,
    "lm_vocab_size": 49218,
    "lm_n_heads": 15,
    "lm_n_kv_heads": 5,
    "lm_dropout": 0.0,
    "lm_n_blocks": 32,
    "lm_attn_scaling": 1.0,
    "lm_max_length": 4096,
    "lm_use_tokens": False,
    "lm_tie_weights": True,
    "lm_model_type": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "lm_tokenizer": nanovlm_tokenizer.LLM,
    "lm_chat_template": nanovlm_tokenizer.CHAT,
    "mp_pixel_shuffle_factor": 4,
    "mp_image_token_length": 64,
    "max_img_size": 2048,
    "resize_to_max_side_len": True,
    "vlm_extra_tokens": nanovlm_tokenizer.TOKENS,
    "vlm_load_backbone_weights": True,
    "vlm_checkpoint_path": "checkpoints",
    "hf_repo_name": "nanoVLM",
}

# Fields that change the computation, and the one value that is computed here.
NEUTRAL = {
    "vit_dropout": 0.0,
    "vit_cls_flag": False,
    "lm_dropout": 0.0,
    "lm_attn_scaling": 1.0,
    "lm_use_tokens": False,
}

TABLE = (
    (
        "vision_encoder.patch_embedding.conv.*",
        "vision_tower.vision_model.embeddings.patch_embedding.*",
    ),
    (
        "vision_encoder.patch_embedding.position_embedding",
        "vision_tower.vision_model.embeddings.position_embedding.weight",
    ),
    ("vision_encoder.blocks.*.ln1.*", "vision_tower.vision_model.encoder.layers.*.layer_norm1.*"),
    ("vision_encoder.blocks.*.ln2.*", "vision_tower.vision_model.encoder.layers.*.layer_norm2.*"),
    (
        "vision_encoder.blocks.*.attn.*.*",
        "vision_tower.vision_model.encoder.layers.*.self_attn.*.*",
    ),
    ("vision_encoder.blocks.*.mlp.**", "vision_tower.vision_model.encoder.layers.*.mlp.**"),
    ("vision_encoder.layer_norm.*", "vision_tower.vision_model.post_layernorm.*"),
    ("MP.proj.weight", "connector.proj.weight"),
    ("decoder.token_embedding.weight", "language_model.model.embed_tokens.weight"),
    ("decoder.blocks.*.norm1.weight", "language_model.model.layers.*.input_layernorm.weight"),
    (
        "decoder.blocks.*.norm2.weight",
        "language_model.model.layers.*.post_attention_layernorm.weight",
    ),
    ("decoder.blocks.*.attn.out_proj.*", "language_model.model.layers.*.self_attn.o_proj.*"),
    ("decoder.blocks.*.attn.*.*", "language_model.model.layers.*.self_attn.*.*"),
    ("decoder.blocks.*.mlp.**", "language_model.model.layers.*.mlp.**"),
    ("decoder.norm.weight", "language_model.model.norm.weight"),
    ("decoder.head.weight", "language_model.lm_head.weight"),
)

EMBEDDING = "decoder.token_embedding.weight"
HEAD = "decoder.head.weight"
ROTATION = "decoder.rotary_embd.inv_freq"
POSITIONS = "vision_encoder.patch_embedding.position_embedding"

# Queries, keys and values of the encoder are one linear in the file.
FUSED = "qkv_proj"
SEPARATE = ("q_proj", "k_proj", "v_proj")

# ----------------------------------------------------------------------------------------- reading


def read(config: Fields, folder: Path) -> LLaVAConfig:
    """Return what nanoVLM's config.json describes. Raises UserError."""
    for key in config.values:
        if key not in DEFAULTS:
            raise config.refuse(key, "a field that nanoVLM does not have")
    given = {key: value for key, value in config.values.items() if value is not None}
    c = Fields(DEFAULTS | given, config.where, fix=config.fix)
    for key, value in NEUTRAL.items():
        if c.values[key] != value:
            raise c.refuse(key, f"not supported: only {value}")

    side = c.integer("vit_img_size", 1, SIDE)
    patches = side // c.integer("vit_patch_size", 1, side)
    factor = c.integer("mp_pixel_shuffle_factor", 1, SIDE)
    if patches % factor:
        why = f"no divisor of the {patches} patches along an edge"
        raise c.refuse("mp_pixel_shuffle_factor", why)
    tokens = (patches // factor) ** 2
    if c.integer("mp_image_token_length", 1, SIDE**2) != tokens:
        raise c.refuse("mp_image_token_length", f"not the {tokens} tokens of a view")

    edge = c.integer("max_img_size", 1, MOST_EDGE)
    if edge % side:
        raise c.refuse("max_img_size", f"not whole views of {side} pixels")

    vocabulary = c.integer("lm_vocab_size", 1, VOCABULARY)
    sources = {
        "llm": c.text("lm_model_type", most=1000),
        "vision": c.text("vit_model_type", most=1000),
        "tokenizer": c.text("lm_tokenizer", most=1000),
    }
    return LLaVAConfig(
        text={
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": c.integer("lm_hidden_dim", 1, WIDTH),
            "intermediate_size": c.integer("lm_inter_dim", 1, INTERMEDIATE),
            "num_hidden_layers": c.integer("lm_n_blocks", 1, LAYERS),
            "num_attention_heads": c.integer("lm_n_heads", 1, HEADS),
            "num_key_value_heads": c.integer("lm_n_kv_heads", 1, HEADS),
            "rms_norm_eps": c.number("lm_rms_eps", *EPS),
            "rope_theta": c.number("lm_re_base", 1.0, 1e12),
            "max_position_embeddings": c.integer("lm_max_position_embeddings", 1, 2**31),
            "tie_word_embeddings": c.flag("lm_tie_weights"),
        },
        vision={
            "model_type": "siglip_vision_model",
            "hidden_size": c.integer("vit_hidden_dim", 1, WIDTH),
            "intermediate_size": c.integer("vit_inter_dim", 1, INTERMEDIATE),
            "num_hidden_layers": c.integer("vit_n_blocks", 1, LAYERS),
            "num_attention_heads": c.integer("vit_n_heads", 1, HEADS),
            "image_size": side,
            "patch_size": c.integer("vit_patch_size", 1, side),
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": c.number("vit_ln_eps", *EPS),
        },
        preprocessor={
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": side, "width": side},
            "resample": 3,  # bicubic
            "image_mean": [0.0, 0.0, 0.0],
            "image_std": [1.0, 1.0, 1.0],
        },
        connector="pixel_shuffle",
        connector_options={"factor": factor, "mlp_depth": 1},
        feature_layer=-1,
        feature_select="cls_patch",
        feature_norm=True,
        image_mode="split_nanovlm",
        image_edge=edge,
        image_marks=read_marks(folder, vocabulary, c),
        image_enlarge=c.flag("resize_to_max_side_len"),
        template="chat",
        sources=sources,
    )


def read_marks(folder: Path, vocabulary: int, config: Fields) -> dict[str, list[int]]:
    """Return the ids of the strings before the views. Raises UserError for what is not ours."""
    tokens = nanovlm_tokenizer.extra_tokens(config)
    for name in ("image_token", "global_image_token"):
        if name not in tokens:
            raise config.refuse("vlm_extra_tokens", f"without {name}")
    for name, string in tokens.items():
        if nanovlm_tokenizer.TOKENS.get(name, own_name(name)) != string:
            raise config.refuse("vlm_extra_tokens", f"not the published string of {name}")

    tokenizer = load_tokenizer(folder)
    marks = {}
    for name, string in tokens.items():
        i = tokenizer.token_id(string)
        if i >= vocabulary:
            what = f"fewer than the tokenizer's: {string} is {i}"
            raise config.refuse("lm_vocab_size", what)
        if name != "image_token":
            marks[string] = [i]
    return marks


def own_name(name: str) -> str | None:
    """Return the string of a tile outside of the 8 x 8 that are published; None for other names."""
    found = re.fullmatch("r([0-9]{1,3})c([0-9]{1,3})", name)
    if found is None:
        return None
    return tile_mark(int(found[1]) - 1, int(found[2]) - 1)


class Unfused(Mapping):
    """The tensors of nanoVLM, each of the encoder's queries, keys and values by itself.

    The rotation's frequencies are left out. Raises UserError if they are not those of config.json,
    because nanoVLM would compute with those of the file.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False):
        self.source = weights.Checkpoint(folder, allow_pickle)
        self.theirs: dict[str, tuple[str, int]] = {}  # our key -> the file's, and which third
        for key in self.source:
            if f".{FUSED}." in key:
                for i, name in enumerate(SEPARATE):
                    self.theirs[key.replace(FUSED, name)] = key, i
            elif key != ROTATION:
                self.theirs[key] = key, 0

        if ROTATION in self.source:
            given = read_json(folder / "config.json")
            c = DEFAULTS | {key: value for key, value in given.items() if value is not None}
            stored = self.source[ROTATION].float()
            wanted = frequencies(c["lm_re_base"], c["lm_hidden_dim"] // c["lm_n_heads"])
            if stored.shape != wanted.shape or not torch.allclose(stored, wanted, rtol=1e-5):
                what = "not the frequencies of lm_re_base"
                raise UserError(self.source.locate(ROTATION), what, "correct config.json")

    def __getitem__(self, key: str) -> Tensor:
        theirs, third = self.theirs[key]
        tensor = self.source[theirs]
        if key != theirs and tensor.dim() and len(tensor) % 3 == 0:
            return tensor.chunk(3)[third]
        if key == POSITIONS and tensor.dim() == 3 and len(tensor) == 1:
            return tensor[0]  # (n, C)
        return tensor

    def __iter__(self):
        return iter(self.theirs)

    def __len__(self):
        return len(self.theirs)

    def locate(self, key: str) -> str:
        """Return `file:key` for messages, the key as it stands in the file."""
        theirs, _ = self.theirs.get(key, (key, 0))
        return self.source.locate(theirs)


def frequencies(base: float, width: int) -> Tensor:
    """Return the frequencies of the rotation of a head, (width / 2,), as nanoVLM computes them."""
    even = torch.arange(0, width, 2, device="cpu").float()
    return 1.0 / (base ** (even / width))


# ----------------------------------------------------------------------------------------- writing


def write(folder: Path, model, tokenizer, transformers: int = 5):
    """Write a folder of nanoVLM, and the tokenizer beside it.

    transformers: every layout's writer gets it; nanoVLM's layout is the same for both. Raises
    UserError, before anything is written, for what nanoVLM cannot express.
    """
    check_expressible(model)
    check_tokenizer(tokenizer)
    files = {
        "README.md": folder_readme(model, OPENED_BY, videos=False),
        "config.json": config_json(model, tokenizer),
    }
    write_folder(folder, contents(model), files, tokenizer)


def check_expressible(model):
    """Raise UserError naming the part that nanoVLM has no place for."""
    c = model.config
    tower = model.vision_tower.config
    lm = model.language_model.config
    processor = model.vision_tower.processor
    options = {"factor": 2, "mlp_depth": 1} | c.connector_options

    if c.connector != "pixel_shuffle" or options["mlp_depth"] != 1:
        reason = f"connector {c.connector}: nanoVLM has pixel_shuffle with mlp_depth 1 alone"
    elif tower.hf["model_type"] != "siglip_vision_model" or tower.hidden_act != "gelu_pytorch_tanh":
        reason = f"encoder {tower.hf['model_type']}: nanoVLM takes one like SigLIP"
    elif not c.feature_norm:
        reason = "features without the encoder's final norm: nanoVLM has it (model.feature_norm)"
    elif c.feature_select != "cls_patch":
        reason = "feature_select patch: nanoVLM keeps the first patch"
    elif c.text["model_type"] != "llama":
        reason = f"{c.text['model_type']}: nanoVLM has a Llama"
    elif lm.qkv_bias or lm.head_dim * lm.layers[0].heads != lm.width or lm.rope_scaling is not None:
        reason = "this Llama: nanoVLM's has no biases, no scaled rotation and heads of equal shares"
    elif c.image_scale != 1:
        reason = f"image features scaled by {c.image_scale:g}: nanoVLM has no scale"
    elif c.image_mode != "split_nanovlm":
        reason = f"image mode {c.image_mode}: nanoVLM writes {WHOLE} before every picture"
    elif (processor.mean, processor.std) != ((0.0,) * 3, (1.0,) * 3) or processor.resample != 3:
        reason = "an image processor that normalises, or does not resize bicubic"
    elif c.template != "chat":
        reason = f"template {c.template}: nanoVLM has the tokenizer's own, chat"
    else:
        return
    raise UserError("--to nanovlm", reason, "export to barellava")


def check_tokenizer(tokenizer: Tokenizer | None):
    """Raise UserError for a tokenizer that nanoVLM would not make, or none."""
    if tokenizer is None:
        reason = "no tokenizer: the marks around pictures of nanoVLM are its tokens"
    elif not (tokenizer.chat_template or "").startswith(nanovlm_tokenizer.BEFORE_CHAT):
        reason = "a chat template that is not nanoVLM's"
    else:
        return
    raise UserError("--to nanovlm", reason, "export to barellava")


def contents(model) -> dict[str, Tensor]:
    """Return the tensors under nanoVLM's names."""
    tensors = named_tensors(model, TABLE)

    # A linear for queries, keys and values, in the encoder alone.
    first, *others = SEPARATE
    fused = {}
    for key, tensor in tensors.items():
        if not key.startswith("vision_encoder.") or not any(f".{s}." in key for s in SEPARATE):
            fused[key] = tensor
        elif f".{first}." in key:
            parts = [tensor, *(tensors[key.replace(first, other)] for other in others)]
            fused[key.replace(first, FUSED)] = torch.cat(parts)
    fused[POSITIONS] = fused[POSITIONS][None]

    # Of a tied head safetensors keeps the first name in the alphabet.
    lm = model.language_model.config
    if lm.tied:
        fused[HEAD] = fused.pop(EMBEDDING)
    fused[ROTATION] = frequencies(whole(lm.rope_theta), lm.head_dim)
    return fused


def config_json(model, tokenizer: Tokenizer) -> dict:
    """Return nanoVLM's config.json."""
    c = model.config
    lm = model.language_model.config
    layer = lm.layers[0]
    tower = model.vision_tower.config

    # The added tokens in the order of their ids.
    tokens = {
        name: nanovlm_tokenizer.TOKENS[name] for name in ("image_token", "global_image_token")
    }
    for row in range(MOST_TILES):
        for column in range(MOST_TILES):
            string = tile_mark(row, column)
            if tokenizer.token_id(string) is not None:
                tokens[f"r{row + 1}c{column + 1}"] = string
    tokens = dict(sorted(tokens.items(), key=lambda pair: tokenizer.token_id(pair[1])))

    return DEFAULTS | {
        "vit_hidden_dim": tower.width,
        "vit_inter_dim": tower.intermediate,
        "vit_patch_size": tower.patch_size,
        "vit_img_size": tower.image_size,
        "vit_n_heads": tower.heads,
        "vit_n_blocks": tower.layers,
        "vit_ln_eps": tower.norm_eps,
        "lm_hidden_dim": lm.width,
        "lm_inter_dim": layer.intermediate,
        "lm_rms_eps": lm.norm.keywords["eps"],
        "lm_re_base": whole(lm.rope_theta),
        "lm_max_position_embeddings": c.text.get("max_position_embeddings", 8192),
        "lm_base_vocab_size": lm.vocab - len(tokens),
        "extra_token_amount": len(tokens),
        "lm_vocab_size": lm.vocab,
        "lm_n_heads": layer.heads,
        "lm_n_kv_heads": layer.kv_heads,
        "lm_n_blocks": len(lm.layers),
        "lm_tie_weights": lm.tied,
        "lm_chat_template": tokenizer.chat_template.removeprefix(nanovlm_tokenizer.BEFORE_CHAT),
        "mp_pixel_shuffle_factor": model.connector.factor,
        "mp_image_token_length": len(model.views.features()),
        "max_img_size": c.image_edge,
        "resize_to_max_side_len": c.image_enlarge,
        "vlm_extra_tokens": tokens,
        "vit_model_type": c.sources.get("vision", ""),
        "lm_model_type": c.sources.get("llm", ""),
        "lm_tokenizer": c.sources.get("tokenizer", ""),
    }


def whole(number: float) -> float | int:
    """Return a number as nanoVLM's files have it: a whole one as an int."""
    if number == int(number):
        return int(number)
    return number
