"""Decoder language models (one class, a table of families) and LLaVA: encoder + connector + language model.

    lm = LanguageModel.from_pretrained("TinyLlama/TinyLlama-1.1B-Chat-v1.0")   # folder or Hugging Face id
    logits = lm(input_ids)                                                     # (B, T) -> (B, T, V)
    model = LLaVA.from_pretrained("out/demo")
    out = model(input_ids, images, attention_mask, labels)                     # out.logits, out.loss

B batch, T tokens of a packed row, S samples in it, N images, n tokens per image, P of all of them, D width, H heads,
K key-value heads, d head width, L cache slots, V vocabulary; beside N also the views of all images.

Everything runs on packed rows: (T, D) activations, positions that restart with each sample, and cu_seqlens
(S+1,) that says where samples begin. A padded batch, a prompt and one decoded token are special cases of it.
Parameter names are Hugging Face's Llama names, so rename tables are short. Configuration is read when a module
is built; forward never branches on it. A new family is one entry of FAMILIES.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoints import layouts, weights
from checkpoints.files import read_json, resolve, write_file
from checkpoints.names import Table
from config import LLaVAConfig, Model, UserError
from connectors import CONNECTORS, Separated, anyres_order, build_connector, join_views
from encoders import VisionEncoder, build_encoder, vision_config
from inference import generation
from inputs.tiling import Tiling, read_grids
from kernels.cross_entropy import linear_cross_entropy
from kernels.rope import rope as rotate
from layers import GLU, MLP, LayerNorm, LayerNormPerHead, OffsetRMSNorm, RMSNorm
from packing import (
    IGNORE,
    IMAGE_TOKEN,
    ONE_VIEW,
    Attend,
    Batch,
    Item,
    ItemShape,
    expand_images,
    match_images,
    pack_prompts,
    packed_attention,
)

# ----------------------------------------------------------------------------------------- language model


@dataclass(frozen=True)
class Layer:
    """The sizes of one block; uniform families repeat one."""

    heads: int
    kv_heads: int
    intermediate: int


@dataclass(frozen=True)
class LMConfig:
    """A language model as parts and numbers. Classes stand in it, not names; absent parts are nn.Identity."""

    vocab: int
    width: int
    head_dim: int
    layers: tuple[Layer, ...]
    norm: Callable[[int], nn.Module]
    mlp: Callable[[int, int], nn.Module]
    block: Callable[[LMConfig, int], nn.Module]
    rope_theta: float
    rotary_dim: int  # how much of each head turns with its position, from the front
    head_norm: Callable[[int, int], nn.Module] = (
        nn.Identity
    )  # (heads, d), on q and k before they turn
    qkv_bias: bool = False
    out_bias: bool = False
    lm_head_bias: bool = False
    tied: bool = False
    embed_scale: float = 1.0  # on all inputs, image features too
    init_std: float = 0.02


class Scale(nn.Module):
    def __init__(self, by: float):
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.full(
            (), self.by, dtype=x.dtype, device=x.device
        )  # rounded to x's dtype, as Gemma has it


def rope_table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (T, 1, dim) in float32 for rotary embeddings in Llama's half-split layout (Su et al., 2021)."""
    frequency = theta ** (
        -torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
    )
    angle = positions[:, None, None].float() * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


class Attention(nn.Module):
    def __init__(self, c: LMConfig, index: int):
        super().__init__()
        layer, d = c.layers[index], c.head_dim
        self.index, self.head_dim = index, d
        self.q_proj = nn.Linear(c.width, layer.heads * d, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, layer.kv_heads * d, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, layer.kv_heads * d, bias=c.qkv_bias)
        self.o_proj = nn.Linear(layer.heads * d, c.width, bias=c.out_bias)
        self.q_norm, self.k_norm = c.head_norm(layer.heads, d), c.head_norm(layer.kv_heads, d)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), self.k_norm(k), *rope)
        return self.o_proj(
            attend(self, q, k, v).flatten(1)
        )  # `self`: torch.compile would make a graph for each index


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to the residual stream."""

    def __init__(self, c: LMConfig, index: int):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = c.norm(c.width), c.norm(c.width)
        self.self_attn, self.mlp = Attention(c, index), c.mlp(c.width, c.layers[index].intermediate)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        n, x = self.post_attention_layernorm.add(
            self.self_attn(self.input_layernorm(x), rope, attend), x
        )
        return x + self.mlp(n)


class ParallelBlock(nn.Module):
    """Attention and MLP read the same normalised input and are added together (Wang and Komatsuzaki, GPT-J)."""

    def __init__(self, c: LMConfig, index: int):
        super().__init__()
        self.input_layernorm = c.norm(c.width)
        self.self_attn, self.mlp = Attention(c, index), c.mlp(c.width, c.layers[index].intermediate)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        n = self.input_layernorm(x)
        return self.self_attn(n, rope, attend) + self.mlp(n) + x


class Decoder(nn.Module):
    def __init__(self, c: LMConfig):
        super().__init__()
        self.rope = partial(rope_table, dim=c.rotary_dim, theta=c.rope_theta)
        self.embed_tokens = nn.Embedding(c.vocab, c.width)
        self.scale = nn.Identity() if c.embed_scale == 1 else Scale(c.embed_scale)
        self.layers = nn.ModuleList(c.block(c, i) for i in range(len(c.layers)))
        self.norm = c.norm(c.width)
        self.gradient_checkpointing = False

    def embed(self, ids: Tensor) -> Tensor:
        """(T,) -> (T, D), in the dtype of the norms: a frozen table may be stored narrower."""
        return self.embed_tokens(ids).to(self.norm.weight.dtype)

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Embeddings x (T, D) and positions (T,) -> final hidden states (T, D)."""
        rope, x = self.rope(positions), self.scale(x)
        for block in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, attend, use_reentrant=False)
            else:
                x = block(x, rope, attend)
        return self.norm(x)


class Head(nn.Linear):
    """The last linear; a frozen one may be stored narrower than what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class LanguageModel(nn.Module):
    def __init__(self, c: LMConfig, rename: Table = ()):
        super().__init__()
        self.config, self.rename = c, rename  # rename: Hugging Face's names -> ours
        self.model = Decoder(c)
        self.lm_head = Head(c.width, c.vocab, bias=c.lm_head_bias)
        self.tied = {"lm_head.weight": "model.embed_tokens.weight"} if c.tied else {}
        if c.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    ignore = (
        "**.rotary_emb.inv_freq",
    )  # a buffer that old files carry; it is a function of the config

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, T), no padding -> logits (B, T, V)."""
        B, T = input_ids.shape
        cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=input_ids.device)
        positions = torch.arange(T, device=input_ids.device).repeat(B)
        x = self.model.embed(input_ids.flatten())
        return self.lm_head(self.model(x, positions, packed_attention(cu_seqlens, T))).view(
            B, T, -1
        )

    @classmethod
    def from_hf(cls, hf: dict, where: object = "llm_config") -> LanguageModel:
        """The model that a config.json describes, without its weights. Raises UserError as lm_config does."""
        return cls(lm_config(hf, where), FAMILIES[hf["model_type"]].rename)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = torch.float32,
        device="cpu",
        allow_pickle: bool = False,
    ) -> LanguageModel:
        """A language model from a Hugging Face folder or id; dtype None keeps the file's.

        allow_pickle also reads pytorch_model.bin, tensors only. Raises UserError.
        """
        folder = resolve(str(path), allow_pickle=allow_pickle)
        with weights.empty():
            model = cls.from_hf(read_json(folder / "config.json"), folder / "config.json")
        source = weights.Checkpoint(folder, allow_pickle)
        weights.load(model, source, model.rename, dtype=dtype, device=device, ignore=model.ignore)
        return model


# ------------------------------------------------------------------------------------------------ families


class Family(NamedTuple):
    config: Callable[[dict], LMConfig]
    rename: Table = ()  # (theirs, ours)
    defaults: dict = {}  # what Hugging Face's config class fills in; multimodal config.json files leave it out
    neutral: dict = {}  # fields that would change the arithmetic, and the values at which they do not


def _decoder(c: dict, rotary: float = 1.0, tied: bool = False, **parts) -> LMConfig:
    """Llama and what is built like it, with `parts` in place of Llama's own."""
    heads = c["num_attention_heads"]
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    layer = Layer(heads, c.get("num_key_value_heads") or heads, c["intermediate_size"])
    rope = c | (
        c.get("rope_parameters") or {}
    )  # where transformers 5 keeps what has to do with rotation
    like_llama = {
        "vocab": c["vocab_size"], "width": c["hidden_size"], "head_dim": head_dim,
        "layers": (layer,) * c["num_hidden_layers"], "norm": partial(RMSNorm, eps=c.get("rms_norm_eps", 1e-6)),
        "mlp": GLU, "block": Block, "rope_theta": rope.get("rope_theta", 10000.0),
        "rotary_dim": int(head_dim * rope.get("partial_rotary_factor", rotary)),
        "qkv_bias": c.get("attention_bias", False), "out_bias": c.get("attention_bias", False),
        "tied": c.get("tie_word_embeddings", tied), "init_std": c.get("initializer_range", 0.02),
    }  # fmt: skip
    return LMConfig(**(like_llama | parts))


def _qwen2(c: dict) -> LMConfig:
    return _decoder(c, qkv_bias=True, out_bias=False)


def _qwen3(c: dict) -> LMConfig:
    eps = c.get("rms_norm_eps", 1e-6)
    return _decoder(c, head_norm=lambda heads, d: RMSNorm(d, eps))


def _gemma(c: dict) -> LMConfig:
    return _decoder(
        c, tied=True, norm=partial(OffsetRMSNorm, eps=c.get("rms_norm_eps", 1e-6)), mlp=partial(GLU, act="gelu_tanh"),
        embed_scale=c["hidden_size"] ** 0.5,
    )  # fmt: skip


def _stablelm(c: dict) -> LMConfig:
    eps = c.get("layer_norm_eps", 1e-5)
    return _decoder(
        c, rotary=0.25, norm=partial(LayerNorm, eps=eps), qkv_bias=c.get("use_qkv_bias", False), out_bias=False,
        head_norm=partial(LayerNormPerHead, eps=eps) if c.get("qk_layernorm") else nn.Identity,
        block=ParallelBlock if c.get("use_parallel_residual") else Block,
    )  # fmt: skip


def _phi(c: dict) -> LMConfig:
    eps = c.get("layer_norm_eps", 1e-5)
    return _decoder(
        c, rotary=0.5, norm=partial(LayerNorm, eps=eps), mlp=MLP, block=ParallelBlock, qkv_bias=True, out_bias=True,
        lm_head_bias=c.get("lm_head_bias", True),  # our own key: TinyLLaVABench's Phi has none
        head_norm=(lambda heads, d: LayerNorm(d, eps)) if c.get("qk_layernorm") else nn.Identity,
    )  # fmt: skip


def _openelm(c: dict) -> LMConfig:
    """Apple's OpenELM: every layer has widths of its own, its files name things otherwise."""

    def divisible(
        value: float, by: int
    ) -> int:  # to the nearest multiple, never more than a tenth below
        nearest = max(by, int(value + by / 2) // by * by)
        return nearest + by if nearest < 0.9 * value else nearest

    width, head_dim = c["model_dim"], c["head_dim"]
    ffn = (divisible(m * width, c["ffn_dim_divisor"]) for m in c["ffn_multipliers"])
    layers = tuple(
        Layer(*sizes) for sizes in zip(c["num_query_heads"], c["num_kv_heads"], ffn, strict=True)
    )
    return LMConfig(
        vocab=c["vocab_size"], width=width, head_dim=head_dim, layers=layers, norm=partial(RMSNorm, eps=1e-6), mlp=GLU,
        block=Block, rope_theta=c["rope_freq_constant"], rotary_dim=head_dim,
        head_norm=(lambda heads, d: RMSNorm(d, 1e-6)) if c["normalize_qk_projections"] else nn.Identity,
        tied=c["share_input_output_layers"], init_std=c.get("initializer_range", 0.02),
    )  # fmt: skip


def _sizes(vocab: int, width: int, intermediate: int, layers: int, heads: int, **more: int) -> dict:
    """What Hugging Face's config class fills in where a multimodal config.json leaves it out."""
    return {"vocab_size": vocab, "hidden_size": width, "intermediate_size": intermediate, "num_hidden_layers": layers,
            "num_attention_heads": heads, **more}  # fmt: skip


_QWEN_SIZES = _sizes(151936, 4096, 22016, 32, 32, num_key_value_heads=32)
_HEAD_NORMS = (("**.q_layernorm.**", "**.q_norm.**"), ("**.k_layernorm.**", "**.k_norm.**"))
_PHI_NAMES = (
    ("**.self_attn.dense.*", "**.self_attn.o_proj.*"),
    ("model.final_layernorm.*", "model.norm.*"),
)
_BLOCK = "model.layers.*."
_OPENELM_NAMES = (
    (
        "transformer.layers.*.attn.qkv_proj.weight",
        tuple(f"{_BLOCK}self_attn.{x}_proj.weight" for x in "qkv"),
    ),
    ("transformer.layers.*.attn.out_proj.weight", f"{_BLOCK}self_attn.o_proj.weight"),
    ("transformer.layers.*.attn.*_norm.weight", f"{_BLOCK}self_attn.*_norm.weight"),
    ("transformer.layers.*.attn_norm.weight", f"{_BLOCK}input_layernorm.weight"),
    ("transformer.layers.*.ffn_norm.weight", f"{_BLOCK}post_attention_layernorm.weight"),
    (
        "transformer.layers.*.ffn.proj_1.weight",
        (f"{_BLOCK}mlp.gate_proj.weight", f"{_BLOCK}mlp.up_proj.weight"),
    ),
    ("transformer.layers.*.ffn.proj_2.weight", f"{_BLOCK}mlp.down_proj.weight"),
    ("transformer.token_embeddings.weight", "model.embed_tokens.weight"),
    ("transformer.norm.weight", "model.norm.weight"),
)
_TANH = ("gelu_new", "gelu_pytorch_tanh")

FAMILIES: dict[str, Family] = {
    "llama": Family(_decoder, defaults=_sizes(32000, 4096, 11008, 32, 32)),
    "qwen2": Family(_qwen2, defaults=_QWEN_SIZES),
    "qwen3": Family(_qwen3, defaults=_QWEN_SIZES | {"head_dim": 128}),
    # Gemma's files say `gelu` for what has always been computed with tanh.
    "gemma": Family(_gemma, (), _sizes(256000, 3072, 24576, 28, 16, num_key_value_heads=16, head_dim=256),
                    {"hidden_act": ("gelu", *_TANH), "use_bidirectional_attention": (None, False)}),
    "stablelm": Family(_stablelm, _HEAD_NORMS, _sizes(50304, 2560, 6912, 32, 32, num_key_value_heads=32)),
    "phi": Family(_phi, _PHI_NAMES + _HEAD_NORMS, _sizes(51200, 2048, 8192, 24, 32), {"hidden_act": _TANH}),
    "openelm": Family(_openelm, _OPENELM_NAMES, {}, {
        "activation_fn_name": ("swish",), "ffn_with_glu": (True,), "normalization_layer_name": ("rms_norm",)}),
}  # fmt: skip
# What none of them computes otherwise than at these values.
NEUTRAL = {
    "hidden_act": ("silu",), "hidden_activation": (None, "gelu_pytorch_tanh"), "rope_scaling": (None,),
    "quantization_config": (None,), "mlp_bias": (False,), "use_sliding_window": (None, False), "use_mrope": (False,),
    "rope_interleaved": (False,), "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,),
}  # fmt: skip
REFUSED = {
    "gemma2": "soft-capped scores and sliding windows",
    "gemma3_text": "sliding windows of two rotary bases",
}


def lm_config(hf: dict, where: object = "llm_config") -> LMConfig:
    """The parts and numbers of a language model from its config.json.

    Raises UserError for an unknown model_type, a missing size, or a field that would change the arithmetic.
    """
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        why = f": it has {REFUSED[kind]}" if kind in REFUSED else ""
        raise UserError(
            f"{where}:model_type",
            f"{kind!r} is no language model known here{why}",
            f"one of {', '.join(FAMILIES)}",
        )
    rope = hf.get("rope_parameters") or {}
    given = hf | {"rope_parameters.rope_type": rope.get("rope_type", "default"),
                  "layer_types": sorted(set(hf.get("layer_types") or ["full_attention"]))}  # fmt: skip
    neutral = NEUTRAL | {
        "rope_parameters.rope_type": ("default",),
        "layer_types": (["full_attention"],),
    }
    for key, values in (neutral | FAMILIES[kind].neutral).items():
        if key in given and given[key] not in values:
            raise UserError(
                f"{where}:{key}", f"{given[key]!r} is not supported for {kind}", "use another model"
            )
    try:
        return FAMILIES[kind].config(hf)
    except KeyError as e:
        raise UserError(
            f"{where}:{e.args[0]}", "missing", "give the config.json that belongs to the model"
        ) from None


@torch.no_grad()
def init_weights(module: nn.Module, std: float):
    """Random weights: Normal(0, std) for matrices and embeddings, zero biases, unit norms, as Llama's own code has it.

    Patches are normalised by their fan-in and positions by the width, as in SigLIP: with one std for both, pixels
    would drown the positions.
    """
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Embedding, nn.Conv2d)):
            m.weight.normal_(0.0, m.weight[0].numel() ** -0.5 if isinstance(m, nn.Conv2d) else std)
            if getattr(m, "bias", None) is not None:
                m.bias.zero_()
    for m in module.modules():
        if hasattr(m, "init_positions"):
            m.init_positions()


# ------------------------------------------------------------------------------------------------- LLaVA


def tiling_of(c: LLaVAConfig) -> Tiling:
    """How a model's pictures and videos become items. Raises UserError for what does not go together."""
    vision = vision_config(c.vision, c.preprocessor)
    n = vision.tokens(c.feature_select)
    if c.image_mode == "anyres" and CONNECTORS[c.connector].mean:
        raise UserError(
            "model.image_mode",
            f"anyres with {c.connector}, the mean of all views",
            "use mlp2x_gelu",
        )
    if c.image_mode == "anyres" and isqrt(n) ** 2 != n:
        raise UserError("model.image_mode", f"anyres, with {n} tokens of a view that are no square",
                        "set model.feature_select so that only patches are left, or use tiles")  # fmt: skip
    if c.frames < 1 or c.fps < 0:
        raise UserError(
            "model.frames",
            f"{c.frames} frames, {c.fps} a second",
            "write 1 or more, and fps 0 or more",
        )
    return Tiling(n, c.connector, c.connector_options, vision.transform, c.image_mode, read_grids(c.image_grids),
                 c.frames, c.fps)  # fmt: skip


class Output(NamedTuple):
    logits: Tensor  # (B, T', V), right-padded after image expansion
    loss: Tensor | None  # mean over supervised tokens


AT_ONCE = 16  # views that the encoder sees at once where nothing is kept for a backward pass


class LLaVA(nn.Module):
    PARTS = ("language_model", "vision_tower", "connector")

    def __init__(self, c: LLaVAConfig, empty: Collection[str] = ()):
        """The parts named in `empty` have shapes but no storage, which weights.load brings; others default weights."""
        super().__init__()
        self.config = c
        vision = vision_config(c.vision, c.preprocessor)
        with weights.empty() if "language_model" in empty else nullcontext():
            self.language_model = LanguageModel.from_hf(c.text)
        with weights.empty() if "vision_tower" in empty else nullcontext():
            self.vision_tower = build_encoder(vision, c.feature_layer, c.feature_select)
        width = self.language_model.config.width
        self.connector = build_connector(c.connector, vision.width, width, **c.connector_options)
        if c.image_mode == "anyres":
            self.connector = Separated(self.connector)
        self.views = tiling_of(c)

    # -- construction ------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, path: str | Path, dtype: torch.dtype | None = torch.float32, device="cpu", allow_pickle: bool = False,
        load: Mapping[str, Callable] | None = None,
    ) -> LLaVA:  # fmt: skip
        """A whole model from a folder or Hugging Face id, in any of layouts.LAYOUTS.

        dtype None keeps the file's; allow_pickle also reads pytorch_model.bin, tensors only; load: for a part's name
        what loads it instead of weights.load, with the same arguments. Raises UserError.
        """
        folder = resolve(str(path), allow_pickle=allow_pickle)
        config, source, hf_names = layouts.read(folder, allow_pickle)
        if hf_names and config.text["model_type"] in FAMILIES:
            config = replace(
                config, text=FAMILIES[config.text["model_type"]].defaults | config.text
            )
        with weights.empty():
            model = cls(config)
        used = set()
        for name in cls.PARTS:
            part = getattr(model, name)
            table = getattr(part, "rename", ()) if hf_names else ()
            fill, ignore = (load or {}).get(name, weights.load), getattr(part, "ignore", ())
            used |= fill(part, source, table, f"{name}.", dtype=dtype, device=device, ignore=ignore)
        if left := sorted(set(source) - used):
            raise UserError(
                source.locate(left[0]), "belongs to no part of the model", "check model_type"
            )
        return model

    @classmethod
    def from_parts(
        cls, c: Model, template: str, seed: int = 0, load: Mapping[str, Callable] | None = None
    ) -> LLaVA:
        """A new model as a recipe's [model] says: pretrained parts from folders, the rest random. load: as above."""
        if c.checkpoint:
            model = cls.from_pretrained(c.checkpoint, allow_pickle=c.allow_pickle, load=load)
            model.config = replace(model.config, template=template)
            return model
        torch.manual_seed(seed)  # only what is initialised here draws from it
        folders = {"language_model": {"": c.llm}, "vision_tower": {"": c.vision}}
        if c.vision2:
            folders["vision_tower"] = {"clip.": c.vision, "dinov2.": c.vision2}
        random = {"language_model": c.llm_config, "vision_tower": c.vision_config}
        model = cls(
            layouts.from_recipe(c, template), empty=[name for name in folders if not random[name]]
        )
        init_weights(model.connector, 0.02)
        for name, prefixes in folders.items():
            part = getattr(model, name)
            if random[name]:
                init_weights(part, part.config.init_std)
            else:
                where = {
                    prefix: resolve(f, f"model.{name}", c.allow_pickle)
                    for prefix, f in prefixes.items()
                }
                source = weights.Joined(
                    {p: weights.Checkpoint(f, c.allow_pickle) for p, f in where.items()}
                )
                fill = (load or {}).get(name, weights.load)
                fill(part, source, part.rename, dtype=torch.float32, ignore=part.ignore)
        return model

    def save(self, folder: str | Path):
        """config.json, preprocessor_config.json and the weights, config last. Tokenizer and recipe are the caller's."""
        folder, state = Path(folder), {}
        for name in self.PARTS:
            state |= weights.tensors(getattr(self, name), prefix=f"{name}.")
        weights.save(folder, state)
        preprocessor = self.vision_tower.transform.to_hf()
        write_file(folder / "preprocessor_config.json", json.dumps(preprocessor, indent=2))
        write_file(folder / "config.json", json.dumps(layouts.to_ours(self.config), indent=2))

    def compile_blocks(self, **options):
        """torch.compile every block of language model and encoder in place, one graph for all lengths."""
        for m in self.modules():
            if isinstance(m, (LanguageModel, VisionEncoder)):
                for block in m.blocks:
                    block.compile(dynamic=True, **options)

    # -- forward -----------------------------------------------------------------------------------------

    @property
    def image_tokens(self) -> int:
        """How many positions a picture takes that is one view."""
        return self.views.positions()

    def encode_images(self, images: Tensor) -> Tensor:
        """Pixels (N, 3, H, W), normalised or uint8 -> what the connector makes of each, (N, n, D)."""
        return self.connector(self.see(images))

    def see(self, views: Tensor) -> Tensor:
        """Views (V, 3, H, W), normalised or uint8 -> the encoder's tokens (V, n, C). Without gradients so few at once
        that the memory it takes beside them does not grow with V."""
        normalise, made = self.vision_tower.transform.normalise, None
        if torch.is_grad_enabled():
            return self.vision_tower(normalise(views))
        for at in range(0, len(views), AT_ONCE):
            seen = self.vision_tower(normalise(views[at : at + AT_ONCE]))
            made = seen.new_empty(len(views), *seen.shape[1:]) if made is None else made
            made[at : at + AT_ONCE] = seen
        return made

    def encode(self, images: Tensor, shapes: Sequence[ItemShape] = ()) -> list[Tensor]:
        """The views (V, 3, H, W) of items (of one each), in order -> what stands in the sequence for each, (n, D)."""
        shapes = shapes or [ONE_VIEW] * len(images)
        kinds, made, seen = (
            {shape.views for shape in shapes},
            [None] * len(shapes),
            self.see(images),
        )
        parts = seen.split([shape.views for shape in shapes])
        for views in kinds:
            same = [i for i, shape in enumerate(shapes) if shape.views == views]
            x = (
                seen.unflatten(0, (-1, views))
                if len(kinds) == 1
                else torch.stack([parts[i] for i in same])
            )
            tokens = self.connector(join_views(self.config.connector, x))
            n = tokens.size(1) - isinstance(self.connector, Separated)
            for i, item in zip(same, tokens, strict=True):
                made[i] = (
                    item[anyres_order(shapes[i], n // views).to(item.device)]
                    if shapes[i].rows
                    else item[:n]
                )
        return made

    def embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Packed ids (T,) with IMAGE_TOKEN at every image position, features (P, D) in order -> (T, D)."""
        x = self.language_model.model.embed(input_ids.clamp(min=0))
        if features is None:
            return x
        return x.masked_scatter(
            (input_ids == IMAGE_TOKEN)[:, None], (features * self.config.image_scale).to(x.dtype)
        )

    def loss(self, batch: Batch) -> Tensor:
        """Sum of the token losses of a packed batch.

        The sum, not the mean: the trainer divides by the supervised tokens of the whole step. labels[t] is what
        should stand at t, so position t-1 predicts it; the first label of each sample is -100 and predicts nothing.
        """
        features = None
        if batch.images is not None:
            features = torch.cat(self.encode(batch.images, batch.shapes))
        hidden = self.language_model.model(
            self.embed(batch.input_ids, features),
            batch.positions,
            packed_attention(batch.cu_seqlens, batch.max_seqlen),
        )
        labels = batch.labels
        head = self.language_model.lm_head
        targets = torch.cat([labels[1:], labels.new_full((1,), IGNORE)])
        loss = linear_cross_entropy(hidden, head.weight, head.bias, targets)
        if batch.images is None:
            # Every trainable parameter gets a (zero) gradient, or DDP would wait for it on the other ranks.
            unused = [
                p
                for part in (self.connector, self.vision_tower)
                for p in part.parameters()
                if p.requires_grad
            ]
            loss = loss + 0 * sum(p.flatten()[0] for p in unused)
        return loss

    def forward(self, input_ids: Tensor, images=None, attention_mask=None, labels=None) -> Output:
        """TinyLLaVA's convenience call: a padded batch with one -200 where each image goes.

        input_ids, attention_mask, labels (B, T); images: (N, 3, H, W) or a list of N items (see `views`), one per -200
        in order, or one per row (a row without a -200 then ignores its own). Raises ValueError when images and
        placeholders disagree.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [ids[m.bool()] for ids, m in zip(input_ids, mask, strict=True)]
        features = self.encode_items(match_images(rows, images))
        counts = [len(f) for f in features]
        ids, positions, cu_seqlens, max_seqlen = pack_prompts(rows, counts)
        hidden = self.language_model.model(
            self.embed(ids, torch.cat(features) if features else None),
            positions,
            packed_attention(cu_seqlens, max_seqlen),
        )
        logits = self.language_model.lm_head(hidden)
        lengths = cu_seqlens.diff().tolist()
        padded = torch.nn.utils.rnn.pad_sequence(logits.split(lengths), batch_first=True)
        if labels is None:
            return Output(padded, None)
        given = [row[m.bool()] for row, m in zip(labels, mask, strict=True)]
        wide = expand_images(torch.cat(rows), counts, torch.cat(given)).split(lengths)
        targets = torch.cat([F.pad(row[1:], (0, 1), value=IGNORE) for row in wide])
        return Output(padded, F.cross_entropy(logits.float(), targets))

    def encode_items(self, items: Sequence[Item]) -> list[Tensor]:
        """What stands in the sequence for each item, (n, D)."""
        if not items:
            return []
        pixels = torch.cat([item.pixels for item in items]).to(
            self.language_model.lm_head.weight.device
        )
        return self.encode(pixels, [item.shape for item in items])

    # -- generation --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor | Sequence[Tensor],
        images: Tensor | Sequence[Item] | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        num_beams: int = 1,
        eos_token_id: int | None = None,
        generator: torch.Generator | None = None,
        stream: Callable[[list[int]], None] | None = None,
        top_k: int = 0,
        until: Callable[[list[int]], bool] | None = None,
    ) -> Tensor:
        """Return the tokens that continue B prompts, (B, new).

        input_ids: (B, T) with an attention_mask, or a list of B ragged tensors (T,).
        images: as in `forward`, one for each -200 in order. An image that several prompts begin
        with is encoded and prefilled once.

        Decoding is greedy at temperature 0; otherwise tokens are sampled with top_p and top_k
        (inference/sampling.py) and seeds that `generator` draws. num_beams > 1 is beam search,
        whose scores are divided by length, as Hugging Face's default has it.

        A sequence ends with eos_token_id, or when `until`, called with its tokens so far, returns
        true. It is padded with eos_token_id. `stream` is called with each step's B tokens.

        Raises ValueError when images and placeholders disagree, when a prompt is empty, or when
        beam search is asked to sample, to stream or to stop at a text.
        """
        if isinstance(input_ids, Tensor):
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            input_ids = [ids[m.bool()] for ids, m in zip(input_ids, mask, strict=True)]
        device = self.language_model.lm_head.weight.device
        prompts = [ids.to(device) for ids in input_ids]
        items = match_images(prompts, images)

        if num_beams > 1:
            if temperature or stream or until:
                raise ValueError("beam search has no temperature, no stream and no stopping text")
            return generation.generate_with_beams(
                self, prompts, items, max_new_tokens, num_beams, eos_token_id
            )
        return generation.generate(
            self,
            prompts,
            items,
            max_new_tokens,
            eos_token_id,
            generator,
            stream,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            until=until,
        )
