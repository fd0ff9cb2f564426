"""Decoder language models, and LLaVA: an encoder, a connector and a language model.

    lm = LanguageModel.from_pretrained("TinyLlama/TinyLlama-1.1B-Chat-v1.0")   # folder or Hub id
    logits = lm(input_ids)                                                     # (B, T) -> (B, T, V)
    model = LLaVA.from_pretrained("out/demo")
    out = model(input_ids, images, attention_mask, labels)                     # .logits, .loss

A map of this file:
    LMConfig         a language model as parts and numbers
    LanguageModel    embedding, blocks and norm (Decoder), then the lm_head
    FAMILIES         how each family differs from Llama; lm_config reads its config.json.
                     A new family is one function and one entry
    init_weights     random weights
    LLaVA            pixels -> encode_items -> embed -> the decoder -> logits, loss or new tokens

To follow a token through Llama, read `forward` of LanguageModel, Decoder, Block and Attention, in
this order. Five of the calls on its way are fused kernels, with plain PyTorch of the same meaning
beside them:
    rotate                  kernels/rope.py: turns q and k by an angle that grows with the position
    attend                  kernels/attention.py: causal attention inside each sample
    norm.add                kernels/norms.py: adds to the residual stream and normalises the sum
    mlp                     kernels/glu.py: act(gate) * up, between the linears of layers.GLU
    linear_cross_entropy    kernels/cross_entropy.py: lm_head and loss, at supervised positions only

Everything runs on packed rows (packing.py): activations (T, D) of all samples, one behind the
other, positions that restart with each sample, and cu_seqlens, which says where samples begin. A
padded batch, a prompt and one decoded token are special cases. Parameter names are Hugging Face's
Llama names, so rename tables are short. Configuration is read when a module is built; `forward`
never branches on it.

B batch, T tokens of a packed row, S samples in it, N items (pictures and videos), M views of all of
them, n tokens of a view or an item, C width of the encoder, D width of the language model, H query
heads, K key-value heads, d head width, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isqrt, log, pi, sqrt
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from checkpoints import barellava, layouts, weights
from checkpoints.fields import (
    EPS,
    HEAD_DIM,
    HEADS,
    INTERMEDIATE,
    LAYERS,
    VOCABULARY,
    WIDTH,
    Fields,
)
from checkpoints.files import read_json, resolve
from checkpoints.names import Table
from config import LLaVAConfig, Model, UserError
from connectors import CONNECTORS, MLPWithNewline, build_connector, join_views
from encoders import VisionConfig, VisionEncoder, build_encoder, vision_config
from inference import generation
from inputs.image_modes import MODES
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
    PackedRow,
    constant,
    expand_images,
    image_positions,
    length_of,
    match_images,
    pack_prompts,
    pack_rows,
    packed_attention,
    send,
    without_padding,
)

# --------------------------------------------------------------------------------- language model


@dataclass(frozen=True)
class Layer:
    """The numbers of one block. In most models all blocks have the same."""

    heads: int
    kv_heads: int
    intermediate: int
    rotary: bool = True  # whether queries and keys turn with their positions
    rope_theta: float | None = None  # its own base, not scaled; None: the model's, as it is scaled
    window: int | None = None  # a query sees so many keys, its own and those before; None: all


@dataclass(frozen=True)
class RopeScaling:
    """What divides the frequencies of the rotation, one number for each pair, in longer contexts.

    LongRoPE has two sets: `short` for samples of at most `switch` tokens, `long` for longer ones.
    """

    short: tuple[float, ...]
    long: tuple[float, ...] = ()
    switch: int | None = None  # None: `short` is for all samples
    amplitude: float = 1.0  # multiplies cos and sin

    def divisors(self, positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Return the divisors of each token's frequencies, (T, 1, r/2), or (r/2,) for all tokens.

        positions (T,) and cu_seqlens: see Decoder.forward.
        """
        short = constant(self.short, positions.device)
        if self.switch is None:
            return short
        is_long = sample_lengths(positions, cu_seqlens) > self.switch  # (T,)
        long = constant(self.long, positions.device)
        return torch.where(is_long[:, None, None], long, short)


def sample_lengths(positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return for each token how many tokens its sample has up to here, (T,), cached ones too."""
    if cu_seqlens is None:
        return positions + 1
    ends = cu_seqlens[1:].long()
    tokens = torch.arange(len(positions), device=positions.device)
    sample = torch.searchsorted(ends, tokens, right=True)
    lengths = positions[ends - 1] + 1  # (S,), by the position of each sample's last token
    return lengths[sample]


@dataclass(frozen=True)
class LMConfig:
    """A language model as parts and numbers. It holds classes, not their names."""

    vocab: int
    width: int
    head_dim: int
    layers: tuple[Layer, ...]
    norm: Callable[[int], nn.Module]  # (width)
    mlp: Callable[[int, int], nn.Module]  # (width, intermediate)
    block: Callable[[LMConfig, int], nn.Module]  # (config, index of the block)
    rope_theta: float
    rotary_dim: int  # how many numbers of each head are rotated, from the front
    rope_scaling: RopeScaling | None = None
    head_norm: Callable[[int, int], nn.Module] = nn.Identity  # (heads, d), on q and on k
    qkv_bias: bool = False
    out_bias: bool = False
    lm_head_bias: bool = False
    tied: bool = False  # lm_head.weight is the embedding table
    score_scale: float | None = None  # multiplies q . k; None: 1 / sqrt(head_dim)
    embed_scale: float = 1.0  # multiplies all inputs, image features too
    init_std: float = 0.02

    def rotation(self, layer: Layer) -> tuple[float, RopeScaling | None]:
        """Return the base of a layer's rotation, and how it is scaled."""
        if layer.rope_theta is None:
            return self.rope_theta, self.rope_scaling
        return layer.rope_theta, None

    @property
    def rope_switch(self) -> float:
        """Return the number of tokens beyond which a sample has other keys; infinity if none is."""
        if self.rope_scaling is None or self.rope_scaling.switch is None:
            return inf
        return self.rope_scaling.switch


class Scale(nn.Module):
    """Gemma's factor on its inputs."""

    def __init__(self, by: float):
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        # Gemma rounds the factor to x's dtype first. A Python number would not be rounded.
        factor = torch.full((), self.by, dtype=x.dtype, device=x.device)
        return x * factor


def rope_table(
    positions: Tensor,
    dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cos and sin (T, 1, dim) of rotary embeddings (Su et al., 2021), in float32.

    Numbers i and i + dim/2 of a head form a pair (Llama's half-split layout), which turns by
    position * theta^(-2i/dim). So both halves of the table are the same. scaling: what divides the
    frequencies. cu_seqlens: see Decoder.forward.
    """
    even = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device)
    frequency = theta ** (-even / dim)
    if scaling is not None:
        frequency = frequency / scaling.divisors(positions, cu_seqlens)

    angle = positions[:, None, None].float() * frequency  # (T, 1, dim/2)
    angle = torch.cat([angle, angle], -1)
    if scaling is None:
        return angle.cos(), angle.sin()
    return angle.cos() * scaling.amplitude, angle.sin() * scaling.amplitude


def without_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k as they are, in a layer that leaves positions to the others."""
    return q, k


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023): H heads of queries, K of keys and values."""

    def __init__(self, c: LMConfig, index: int):
        super().__init__()
        layer = c.layers[index]
        queries = layer.heads * c.head_dim
        keys = layer.kv_heads * c.head_dim
        self.index = index
        self.head_dim = c.head_dim
        self.scale = c.score_scale
        self.window = layer.window
        self.q_proj = nn.Linear(c.width, queries, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, keys, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, keys, bias=c.qkv_bias)
        self.o_proj = nn.Linear(queries, c.width, bias=c.out_bias)
        self.q_norm = c.head_norm(layer.heads, c.head_dim)
        self.k_norm = c.head_norm(layer.kv_heads, c.head_dim)
        self.rotate = rotate
        if not layer.rotary:
            self.rotate = without_rotation

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """x (T, D), rope as rope_table returns it -> what to add to the residual stream, (T, D)."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, H, d)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, K, d)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, K, d)

        # Queries and keys turn with their position, so q . k depends on the distance of two tokens.
        cos, sin = rope
        q, k = self.rotate(self.q_norm(q), self.k_norm(k), cos, sin)

        # A cache only needs self.index, but `attend` gets the module: the number would be a
        # constant of the graph, and torch.compile would make one graph for every block. As it is,
        # all blocks of one kind share a graph.
        attended = attend(self, q, k, v)  # (T, H, d)
        return self.o_proj(attended.flatten(1))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP, each added to the residual stream."""

    def __init__(self, c: LMConfig, index: int):
        super().__init__()
        self.input_layernorm = c.norm(c.width)
        self.post_attention_layernorm = c.norm(c.width)
        self.self_attn = Attention(c, index)
        self.mlp = c.mlp(c.width, c.layers[index].intermediate)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """x (T, D), the residual stream -> the residual stream behind this block."""
        attended = self.self_attn(self.input_layernorm(x), rope, attend)

        # x = x + attended, and the norm of the sum, in one kernel.
        normed, x = self.post_attention_layernorm.add(attended, x)

        # In Llama: down_proj(silu(gate_proj(normed)) * up_proj(normed)).
        return x + self.mlp(normed)


class SandwichBlock(nn.Module):
    """Gemma-2's and Gemma-3's block: a norm before and a norm behind attention and MLP, each."""

    def __init__(self, c: LMConfig, index: int):
        super().__init__()
        self.input_layernorm = c.norm(c.width)
        self.post_attention_layernorm = c.norm(c.width)
        self.pre_feedforward_layernorm = c.norm(c.width)
        self.post_feedforward_layernorm = c.norm(c.width)
        self.self_attn = Attention(c, index)
        self.mlp = c.mlp(c.width, c.layers[index].intermediate)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """x (T, D), the residual stream -> the residual stream behind this block."""
        attended = self.self_attn(self.input_layernorm(x), rope, attend)
        attended = self.post_attention_layernorm(attended)

        # x = x + attended, and the norm of the sum, in one kernel.
        normed, x = self.pre_feedforward_layernorm.add(attended, x)
        return x + self.post_feedforward_layernorm(self.mlp(normed))


class ParallelBlock(nn.Module):
    """Attention and MLP read the same norm and are added together (GPT-J; Wang and Komatsuzaki)."""

    def __init__(self, c: LMConfig, index: int):
        super().__init__()
        self.input_layernorm = c.norm(c.width)
        self.self_attn = Attention(c, index)
        self.mlp = c.mlp(c.width, c.layers[index].intermediate)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """x (T, D), the residual stream -> the residual stream behind this block."""
        normed = self.input_layernorm(x)
        return self.self_attn(normed, rope, attend) + self.mlp(normed) + x


class Decoder(nn.Module):
    """The language model without its head: embedding table, blocks and the last norm."""

    def __init__(self, c: LMConfig):
        super().__init__()
        self.rotary_dim = c.rotary_dim

        # The rotations, and for each block which of them it has: in most models all have the same.
        rotations = [c.rotation(layer) for layer in c.layers]
        self.rotations = list(dict.fromkeys(rotations))
        self.rotation_of_block = [self.rotations.index(rotation) for rotation in rotations]

        self.embed_tokens = nn.Embedding(c.vocab, c.width)
        if c.embed_scale == 1:
            self.scale = nn.Identity()
        else:
            self.scale = Scale(c.embed_scale)
        self.layers = nn.ModuleList(c.block(c, index) for index in range(len(c.layers)))
        self.norm = c.norm(c.width)
        self.gradient_checkpointing = False

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings (T, D) of ids (T,), before they are scaled.

        They have the dtype of the norms: the table itself, when frozen, may be stored narrower.
        """
        return self.embed_tokens(ids).to(self.norm.weight.dtype)

    def forward(
        self, x: Tensor, positions: Tensor, attend: Attend, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Embeddings x (T, D) and positions (T,) of a packed row -> hidden states (T, D).

        cu_seqlens (S+1,): where its S samples begin. Without them each token is the last one of a
        sample of its own, as in a step of decoding.
        """
        tables = []
        for theta, scaling in self.rotations:
            tables.append(rope_table(positions, self.rotary_dim, theta, scaling, cu_seqlens))
        x = self.scale(x)

        # With gradient checkpointing only the input of a block is kept for the backward pass, which
        # then runs the block's forward a second time: less memory, about a third more time.
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block, rotation in zip(self.layers, self.rotation_of_block, strict=True):
            rope = tables[rotation]
            if recompute:
                x = checkpoint(block, x, rope, attend, use_reentrant=False)
            else:
                x = block(x, rope, attend)
        return self.norm(x)


class Head(nn.Linear):
    """The lm_head: hidden states -> logits. A frozen one may be stored narrower than its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class LanguageModel(nn.Module):
    """A decoder language model of any of FAMILIES.

    checkpoints/weights.py reads `rename` (Hugging Face's names -> ours), `tied` (a parameter -> the
    one whose storage it shares) and `ignore` (names in files that are no parameters).
    """

    # Some old files hold this buffer, which is a function of the config.
    ignore = ("**.rotary_emb.inv_freq",)

    def __init__(self, c: LMConfig, rename: Table = ()):
        super().__init__()
        self.config = c
        self.rename = rename
        self.model = Decoder(c)
        self.lm_head = Head(c.width, c.vocab, bias=c.lm_head_bias)
        self.tied = {}
        if c.tied:
            self.tied = {"lm_head.weight": "model.embed_tokens.weight"}
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, T), no padding -> logits (B, T, V)."""
        B, T = input_ids.shape
        row = pack_rows(list(input_ids))  # B samples of T tokens
        attend = packed_attention(row.cu_seqlens, row.max_seqlen)

        x = self.model.embed(row.input_ids)  # (B T, D)
        hidden = self.model(x, row.positions, attend, row.cu_seqlens)  # (B T, D)
        logits = self.lm_head(hidden)  # (B T, V)
        return logits.view(B, T, -1)

    @classmethod
    def from_hf(cls, hf: dict, where: object = "llm_config") -> LanguageModel:
        """Return the model that a config.json describes. Its weights are torch's random ones.

        Raises UserError as lm_config does.
        """
        config = lm_config(hf, where)
        return cls(config, FAMILIES[hf["model_type"]].rename)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = torch.float32,
        device="cpu",
        allow_pickle: bool = False,
    ) -> LanguageModel:
        """Load a language model from a Hugging Face folder or id.

        dtype None keeps the dtype of the file. allow_pickle also reads pytorch_model.bin, tensors
        only. Raises UserError.
        """
        folder = resolve(str(path), allow_pickle=allow_pickle)
        file = folder / "config.json"
        with weights.empty():
            model = cls.from_hf(read_json(file), file)
        source = weights.Checkpoint(folder, allow_pickle)
        weights.load(model, source, model.rename, dtype=dtype, device=device, ignore=model.ignore)
        return model


# ---------------------------------------------------------------------------------------- families


class Family(NamedTuple):
    """How to read the config.json and the weights of one `model_type`."""

    # A function of config.json that says, in keywords, how the family differs from Llama.
    config: Callable[[Fields], LMConfig]

    # Hugging Face's parameter names and ours, in pairs, where they differ.
    rename: Table = ()

    # What Hugging Face's config class fills in, because multimodal config.json files leave it out.
    defaults: dict = {}

    # Fields that would change the arithmetic, and the values at which they do not. lm_config
    # refuses all others; they come in addition to NEUTRAL.
    neutral: dict = {}


def llama(
    c: Fields,
    rotary: float = 1.0,
    tied: bool = False,
    ropes: Mapping[str, ScalingReader] | None = None,
    window: int | None = None,
    **differences,
) -> LMConfig:
    """Llama, SmolLM2 and Falcon3, and the start of all that is built like them.

    rotary and tied hold where config.json says nothing. ropes: the kinds of scaled rotation, ROPES
    by default. window: that of all layers. `differences` take the place of Llama's own parts and
    numbers.
    """
    if ropes is None:
        ropes = ROPES
    width = c.integer("hidden_size", 1, WIDTH)
    heads = c.integer("num_attention_heads", 1, HEADS)
    kv_heads = c.integer("num_key_value_heads", 1, HEADS, default=heads)
    if heads % kv_heads:
        raise c.refuse("num_key_value_heads", f"no divisor of num_attention_heads {heads}")

    head_dim = c.integer("head_dim", 1, HEAD_DIM, default=None)
    if head_dim is None:
        if width % heads:
            raise c.refuse("num_attention_heads", f"no divisor of hidden_size {width}")
        head_dim = width // heads

    layer = Layer(heads, kv_heads, c.integer("intermediate_size", 1, INTERMEDIATE), window=window)
    attention_bias = c.flag("attention_bias", default=False)
    rotated = rotary_dim(c, head_dim, rotary)
    parts = {
        "vocab": c.integer("vocab_size", 1, VOCABULARY),
        "width": width,
        "head_dim": head_dim,
        "layers": (layer,) * c.integer("num_hidden_layers", 1, LAYERS),
        "norm": partial(RMSNorm, eps=rms_eps(c)),
        "mlp": partial(GLU, bias=c.flag("mlp_bias", default=False)),
        "block": Block,
        "rope_theta": rope_number(c, "rope_theta", *THETA, default=10000.0),
        "rotary_dim": rotated,
        "rope_scaling": rope_scaling(c, rotated, ropes),
        "qkv_bias": attention_bias,
        "out_bias": attention_bias,
        "tied": c.flag("tie_word_embeddings", default=tied),
        "init_std": c.number("initializer_range", 0.0, 100.0, default=0.02),
    }
    return LMConfig(**(parts | differences))


# The base of the rotation. Published ones are 10,000 to 10 million.
THETA = (1.0, 1e12)


def rms_eps(c: Fields) -> float:
    """Return the eps of the RMSNorms of a config.json."""
    return c.number("rms_norm_eps", *EPS, default=1e-6)


def rope_fields(c: Fields) -> Fields:
    """Return the table of the rotation: transformers 5 writes another one than older versions.

    In transformers, too, an older one that is not empty goes first.
    """
    older = c.table("rope_scaling", optional=True)
    if older.values:
        return older
    return c.table("rope_parameters", optional=True)


def rope_number(c: Fields, key: str, low: float, high: float, default: float) -> float:
    """Return a number of the rotation, from its table or, in older files, beside it."""
    rope = rope_fields(c)
    if key in rope:
        return rope.number(key, low, high)
    return c.number(key, low, high, default=default)


def rotary_dim(c: Fields, head_dim: int, default: float) -> int:
    """Return how many numbers of a head are rotated: a share that config.json states."""
    share = rope_number(c, "partial_rotary_factor", 0.0, 1.0, default=default)
    dim = int(head_dim * share)
    if dim < 2 or dim % 2:
        what = f"rotates {dim} of the {head_dim} numbers of a head, and they turn in pairs"
        raise UserError(c.name("partial_rotary_factor"), what, c.fix)
    return dim


# Reads config.json and its table of the rotation, for so many pairs of numbers.
ScalingReader = Callable[[Fields, Fields, int], RopeScaling | None]

FACTOR = (1e-3, 1e6)  # of a frequency or a context
POSITIONS = (2, 2**31 - 1)  # of a context


def rope_scaling(c: Fields, dim: int, ropes: Mapping[str, ScalingReader]) -> RopeScaling | None:
    """Return how the rotation of `dim` numbers is scaled. Raises UserError for an unknown kind."""
    return scaling_of(c, rope_fields(c), dim, ropes)


def scaling_of(
    c: Fields, rope: Fields, dim: int, ropes: Mapping[str, ScalingReader]
) -> RopeScaling | None:
    """Return what `rope_scaling` does, of the table `rope`."""
    key = "rope_type"
    if key not in rope:
        key = "type"  # its older name
    kind = rope.text(key, default="default")
    if kind not in ropes:
        what = f"{kind!r} is not supported for {c.text('model_type')}"
        raise UserError(rope.name(key), what, "use another model")
    return ropes[kind](c, rope, dim // 2)


def unscaled(c: Fields, rope: Fields, pairs: int) -> None:
    """Return what stands for the rotation as Su et al. have it."""


def linear_rope(c: Fields, rope: Fields, pairs: int) -> RopeScaling:
    """Return position interpolation (Chen et al., 2023): all pairs turn slower by a factor."""
    return RopeScaling(short=(rope.number("factor", *FACTOR),) * pairs)


def llama3_rope(c: Fields, rope: Fields, pairs: int) -> RopeScaling:
    """Return Llama-3.1's scaling: slow pairs turn slower by a factor, fast ones as before.

    Between the two limits, which are wavelengths as shares of the original context, the change of
    the frequency is linear in the number of turns.
    """
    factor = rope.number("factor", *FACTOR)
    low = rope.number("low_freq_factor", *FACTOR)
    high = rope.number("high_freq_factor", *FACTOR)
    if low >= high:
        raise rope.refuse("high_freq_factor", f"not above low_freq_factor {low:g}")
    context = original_context(c, rope)
    theta = rope_number(c, "rope_theta", *THETA, default=10000.0)

    divisors = []
    for pair in range(pairs):
        wavelength = 2 * pi * theta ** (pair / pairs)
        turns = context / wavelength  # in the original context
        share = (turns - low) / (high - low)
        share = min(1.0, max(0.0, share))
        divisors.append(1 / ((1 - share) / factor + share))
    return RopeScaling(short=tuple(divisors))


def long_rope(c: Fields, rope: Fields, pairs: int, original: int | None = None) -> RopeScaling:
    """Return LongRoPE (Ding et al., 2024): searched divisors, others in short and long contexts.

    original: the original context where config.json does not say it at its top level.
    """
    context = original_context(c, rope, original)
    lists = {}
    for key in ("short_factor", "long_factor"):
        lists[key] = tuple(rope.numbers(key, *FACTOR, most=HEAD_DIM))
        if len(lists[key]) != pairs:
            raise rope.refuse(key, f"a list of {len(lists[key])}, and {pairs} pairs are rotated")

    # Scores grow with the logarithm of the context.
    factor = rope.number("factor", *FACTOR, default=None)
    if factor is None:
        # Phi3Config's default, as a config.json may leave it out.
        factor = c.integer("max_position_embeddings", *POSITIONS, default=4096) / context
    amplitude = 1.0
    if factor > 1:
        amplitude = sqrt(1 + log(factor) / log(context))
    amplitude = rope.number("attention_factor", *FACTOR, default=amplitude)
    return RopeScaling(lists["short_factor"], lists["long_factor"], context, amplitude)


def original_context(c: Fields, rope: Fields, default: int | None = None) -> int:
    """Return how many positions a model saw before its rotation was scaled.

    As in transformers, the top level goes first, also a default of it.
    """
    key = "original_max_position_embeddings"
    if key in c:
        return c.integer(key, *POSITIONS)
    if default is not None:
        return default
    if key in rope:
        return rope.integer(key, *POSITIONS)
    return c.integer("max_position_embeddings", *POSITIONS)


ROPES: dict[str, ScalingReader] = {
    "default": unscaled,
    "linear": linear_rope,
    "llama3": llama3_rope,
    "longrope": long_rope,
}


def same_for_all_heads(norm: Callable[[int], nn.Module]) -> Callable[[int, int], nn.Module]:
    """Return a head_norm with one weight (d,), which all heads share."""

    def build(heads: int, head_dim: int) -> nn.Module:
        return norm(head_dim)

    return build


def sliding_window(c: Fields, default: int | None = None) -> int | None:
    """Return how many keys a query sees; None where a file says null: all of them.

    default: what it is in a file that does not say it.
    """
    if "sliding_window" not in c.values:
        return default
    return c.integer("sliding_window", 1, POSITIONS[1], default=None)


def mistral(c: Fields) -> LMConfig:
    """Mistral: a Llama without biases. Version 0.1 has a sliding window in all layers."""
    return llama(
        c,
        window=sliding_window(c, MISTRAL_DEFAULTS["sliding_window"]),
        qkv_bias=False,
        out_bias=False,
    )


MISTRAL_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def smollm3(c: Fields) -> LMConfig:
    """SmolLM3: every fourth layer has no rotation (Yang et al., 2025), by default."""
    c = Fields({"rope_theta": 2e6} | c.values, c.where, c.path, c.fix)
    config = llama(c, tied=True)
    depth = len(config.layers)

    # 1 for a layer with rotation, 0 for one without.
    if "no_rope_layers" in c:
        flags = c.integers("no_rope_layers", 0, 1)
        if len(flags) < depth:
            raise c.refuse("no_rope_layers", f"a list of {len(flags)} for {depth} layers")
    else:
        interval = c.integer("no_rope_layer_interval", 1, POSITIONS[1], default=4)
        flags = [(index + 1) % interval for index in range(depth)]

    layers = []
    for layer, flag in zip(config.layers, flags[:depth], strict=True):
        layers.append(replace(layer, rotary=flag != 0))
    return replace(config, layers=tuple(layers))


def phi3(c: Fields) -> LMConfig:
    """Phi-3 and Phi-4-mini: a Llama without biases whose files fuse projections (PHI3_NAMES).

    Phi-4-mini rotates three quarters of each head. Both have LongRoPE for long contexts. Some have
    a sliding window, which is the same in all layers.
    """
    # Its older names are two.
    scaled = partial(long_rope, original=PHI3_CONTEXT)
    return llama(
        c,
        ropes={"default": unscaled, "longrope": scaled, "su": scaled, "yarn": scaled},
        window=sliding_window(c),
        norm=partial(RMSNorm, eps=c.number("rms_norm_eps", *EPS, default=1e-5)),
        qkv_bias=False,
        out_bias=False,
    )


PHI3_CONTEXT = 4096  # original_max_position_embeddings of a file that does not say it

# One of theirs holds several of ours, stacked along dimension 0.
PHI3_NAMES: Table = (
    (
        "**.self_attn.qkv_proj.weight",
        (
            "**.self_attn.q_proj.weight",
            "**.self_attn.k_proj.weight",
            "**.self_attn.v_proj.weight",
        ),
    ),
    (
        "**.mlp.gate_up_proj.weight",
        (
            "**.mlp.gate_proj.weight",
            "**.mlp.up_proj.weight",
        ),
    ),
)


def qwen2(c: Fields) -> LMConfig:
    """Qwen1.5, Qwen2 and Qwen2.5: biases on q, k and v."""
    return llama(
        c,
        qkv_bias=True,
        out_bias=False,
    )


def qwen3(c: Fields) -> LMConfig:
    """Qwen3: no biases, and a norm on each head of q and k."""
    head_norm = partial(RMSNorm, eps=rms_eps(c))
    return llama(
        c,
        head_norm=same_for_all_heads(head_norm),
    )


def gemma(c: Fields) -> LMConfig:
    """Gemma: norms that multiply by 1 + weight, GeGLU, tied embeddings, inputs times sqrt(D)."""
    return llama(
        c,
        norm=partial(OffsetRMSNorm, eps=rms_eps(c)),
        mlp=partial(GLU, act="gelu_tanh"),
        tied=True,
        embed_scale=c.integer("hidden_size", 1, WIDTH) ** 0.5,
    )


def gemma3(c: Fields) -> LMConfig:
    """Gemma-3's language models: Gemma with four norms a block, and a norm on each head of q and k.

    Five of six layers have a sliding window and a rotation of their own; scores have a scale that
    config.json states.
    """
    c = Fields({"head_dim": GEMMA3_DEFAULTS["head_dim"]} | c.values, c.where, c.path, c.fix)
    norm = partial(OffsetRMSNorm, eps=rms_eps(c))

    # transformers 5 has a table of the rotation for each kind of layer. The table of older versions
    # is for the layers without a window.
    by_kind = c.table("rope_parameters", optional=True)
    rope = c.table("rope_scaling", optional=True)
    if by_kind.values and rope.values:
        raise c.refuse("rope_scaling", "beside rope_parameters: one of them is enough")
    for key in by_kind.values:
        if key not in GEMMA3_LAYERS:
            raise by_kind.refuse(key, f"for no kind of layer: {' or '.join(GEMMA3_LAYERS)}")
    if by_kind.values:
        rope = by_kind.table("full_attention", optional=True)
    local_rope = by_kind.table("sliding_attention", optional=True)

    thetas = []
    for table, key, default in (
        (rope, "rope_theta", 1e6),
        (local_rope, "rope_local_base_freq", 1e4),
    ):
        if table.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1:
            raise table.refuse("partial_rotary_factor", "not 1, and all of a head is rotated here")
        theta = c.number(key, *THETA, default=default)
        thetas.append(table.number("rope_theta", *THETA, default=theta))

    config = llama(
        c,
        norm=norm,
        head_norm=same_for_all_heads(norm),
        mlp=partial(GLU, act="gelu_tanh"),
        block=SandwichBlock,
        tied=True,
        rope_theta=thetas[0],
        score_scale=c.number("query_pre_attn_scalar", 1e-6, 1e6, default=256.0) ** -0.5,
        embed_scale=c.integer("hidden_size", 1, WIDTH) ** 0.5,
    )
    scaling_of(c, local_rope, config.head_dim, {"default": unscaled})  # refuses all other kinds
    scaling = scaling_of(c, rope, config.head_dim, {"default": unscaled, "linear": linear_rope})

    layers = []
    for layer, kind in zip(config.layers, gemma3_layers(c, len(config.layers)), strict=True):
        if kind == "sliding_attention":
            window = sliding_window(c, GEMMA3_DEFAULTS["sliding_window"])
            if window is None:
                raise c.refuse("sliding_window", "no window, and some layers have one")
            layer = replace(layer, rope_theta=thetas[1], window=window)
        layers.append(layer)
    return replace(config, layers=tuple(layers), rope_scaling=scaling)


def gemma3_layers(c: Fields, depth: int) -> list[str]:
    """Return the kind of each layer. Where no list says it, every sixth one has no window."""
    if "layer_types" not in c:
        pattern = c.integer("sliding_window_pattern", 1, LAYERS, default=6)
        kinds = ["sliding_attention"] * depth
        kinds[pattern - 1 :: pattern] = ["full_attention"] * (depth // pattern)
        return kinds

    kinds = c.list("layer_types", str)
    if len(kinds) != depth:
        raise c.refuse("layer_types", f"a list of {len(kinds)} for {depth} layers")
    return kinds


GEMMA3_LAYERS = ("full_attention", "sliding_attention")

GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
}


def stablelm(c: Fields) -> LMConfig:
    """StableLM-2: LayerNorm, and only the first quarter of each head is rotated.

    As options: biases on q, k and v; a norm of its own for each head; parallel blocks.
    """
    eps = c.number("layer_norm_eps", *EPS, default=1e-5)
    head_norm = nn.Identity
    if c.flag("qk_layernorm", default=False):
        head_norm = partial(LayerNormPerHead, eps=eps)
    block = Block
    if c.flag("use_parallel_residual", default=False):
        block = ParallelBlock
    return llama(
        c,
        rotary=0.25,
        norm=partial(LayerNorm, eps=eps),
        head_norm=head_norm,
        block=block,
        qkv_bias=c.flag("use_qkv_bias", default=False),
        out_bias=False,
    )


def phi(c: Fields) -> LMConfig:
    """Phi-1.5 and Phi-2: LayerNorm, parallel blocks, a plain MLP, biases everywhere.

    Only half of each head is rotated, by default. As an option: a norm on each head of q and k.
    """
    norm = partial(LayerNorm, eps=c.number("layer_norm_eps", *EPS, default=1e-5))
    head_norm = nn.Identity
    if c.flag("qk_layernorm", default=False):
        head_norm = same_for_all_heads(norm)
    return llama(
        c,
        rotary=0.5,
        norm=norm,
        head_norm=head_norm,
        mlp=MLP,
        block=ParallelBlock,
        qkv_bias=True,
        out_bias=True,
        # A key of ours: TinyLLaVABench's Phi has none.
        lm_head_bias=c.flag("lm_head_bias", default=True),
    )


def openelm(c: Fields) -> LMConfig:
    """OpenELM (Mehta et al., 2024): every layer has widths of its own, and keys are Apple's."""
    width = c.integer("model_dim", 1, WIDTH)
    head_dim = c.integer("head_dim", 1, HEAD_DIM)
    multipliers = c.numbers("ffn_multipliers", 0.01, 100.0)
    divisor = c.integer("ffn_dim_divisor", 1, 2**14)
    all_heads = c.integers("num_query_heads", 1, HEADS)
    all_kv_heads = c.integers("num_kv_heads", 1, HEADS)

    # The three lists have an entry for each layer.
    depth = len(multipliers)
    for key, entries in (("num_query_heads", all_heads), ("num_kv_heads", all_kv_heads)):
        if len(entries) != depth or depth == 0:
            raise c.refuse(key, f"a list of {len(entries)}, and ffn_multipliers one of {depth}")

    layers = []
    for multiplier, heads, kv_heads in zip(multipliers, all_heads, all_kv_heads, strict=True):
        if heads % kv_heads:
            raise c.refuse("num_kv_heads", f"no list of divisors: {kv_heads} of {heads} heads")
        layers.append(Layer(heads, kv_heads, round_to_multiple(multiplier * width, divisor)))

    norm = partial(RMSNorm, eps=1e-6)
    head_norm = nn.Identity
    if c.flag("normalize_qk_projections"):
        head_norm = same_for_all_heads(norm)
    return LMConfig(
        vocab=c.integer("vocab_size", 1, VOCABULARY),
        width=width,
        head_dim=head_dim,
        layers=tuple(layers),
        norm=norm,
        head_norm=head_norm,
        mlp=GLU,
        block=Block,
        rope_theta=c.number("rope_freq_constant", *THETA),
        rotary_dim=rotary_dim(c, head_dim, 1.0),
        rope_scaling=rope_scaling(c, head_dim, {"default": unscaled}),
        tied=c.flag("share_input_output_layers"),
        init_std=c.number("initializer_range", 0.0, 100.0, default=0.02),
    )


def round_to_multiple(value: float, by: int) -> int:
    """Return the multiple of `by` nearest to value, or the next one if that is 10 % below it.

    This is OpenELM's make_divisible, which is MobileNet's.
    """
    nearest = max(by, int(value + by / 2) // by * by)
    if nearest < 0.9 * value:
        nearest += by
    return nearest


# Apple's names and ours. One of theirs with several of ours holds them stacked along dimension 0.
OPENELM_NAMES: Table = (
    (
        "transformer.layers.*.attn.qkv_proj.weight",
        (
            "model.layers.*.self_attn.q_proj.weight",
            "model.layers.*.self_attn.k_proj.weight",
            "model.layers.*.self_attn.v_proj.weight",
        ),
    ),
    ("transformer.layers.*.attn.out_proj.weight", "model.layers.*.self_attn.o_proj.weight"),
    ("transformer.layers.*.attn.*_norm.weight", "model.layers.*.self_attn.*_norm.weight"),
    ("transformer.layers.*.attn_norm.weight", "model.layers.*.input_layernorm.weight"),
    ("transformer.layers.*.ffn_norm.weight", "model.layers.*.post_attention_layernorm.weight"),
    (
        "transformer.layers.*.ffn.proj_1.weight",
        (
            "model.layers.*.mlp.gate_proj.weight",
            "model.layers.*.mlp.up_proj.weight",
        ),
    ),
    ("transformer.layers.*.ffn.proj_2.weight", "model.layers.*.mlp.down_proj.weight"),
    ("transformer.token_embeddings.weight", "model.embed_tokens.weight"),
    ("transformer.norm.weight", "model.norm.weight"),
)

# Two names of the same activation.
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh")

FAMILIES: dict[str, Family] = {
    "llama": Family(
        config=llama,
        defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
        neutral={"mlp_bias": (False, True)},
    ),
    "mistral": Family(
        config=mistral,
        defaults=MISTRAL_DEFAULTS,
    ),
    "smollm3": Family(
        config=smollm3,
        defaults={
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
        },
        neutral={"mlp_bias": (False, True)},
    ),
    "phi3": Family(
        config=phi3,
        rename=PHI3_NAMES,
        defaults={
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
        },
    ),
    "qwen2": Family(
        config=qwen2,
        defaults={
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    ),
    "qwen3": Family(
        config=qwen3,
        defaults={
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 22016,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
        },
    ),
    "gemma": Family(
        config=gemma,
        defaults={
            "vocab_size": 256000,
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
        },
        neutral={
            # Gemma's files say `gelu`, but Hugging Face has always computed it with tanh.
            "hidden_act": ("gelu", *GELU_TANH),
            "use_bidirectional_attention": (None, False),
        },
    ),
    "gemma3_text": Family(
        config=gemma3,
        defaults=GEMMA3_DEFAULTS,
        neutral={
            "hidden_act": GELU_TANH,
            "hidden_activation": ("gelu_pytorch_tanh",),
            "layer_types": (
                ["full_attention"],
                ["sliding_attention"],
                ["full_attention", "sliding_attention"],
            ),
            "partial_rotary_factor": (None, 1),
            "use_bidirectional_attention": (None, False),
        },
    ),
    "stablelm": Family(
        config=stablelm,
        rename=(
            ("**.q_layernorm.**", "**.q_norm.**"),
            ("**.k_layernorm.**", "**.k_norm.**"),
        ),
        defaults={
            "vocab_size": 50304,
            "hidden_size": 2560,
            "intermediate_size": 6912,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    ),
    "phi": Family(
        config=phi,
        rename=(
            ("**.self_attn.dense.*", "**.self_attn.o_proj.*"),
            ("model.final_layernorm.*", "model.norm.*"),
            ("**.q_layernorm.**", "**.q_norm.**"),
            ("**.k_layernorm.**", "**.k_norm.**"),
        ),
        defaults={
            "vocab_size": 51200,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
        },
        neutral={"hidden_act": GELU_TANH},
    ),
    "openelm": Family(
        config=openelm,
        rename=OPENELM_NAMES,
        neutral={
            "activation_fn_name": ("swish",),
            "ffn_with_glu": (True,),
            "normalization_layer_name": ("rms_norm",),
        },
    ),
}

# Fields of config.json, and the values at which they change nothing here. A family's own `neutral`
# goes before this table.
NEUTRAL = {
    "hidden_act": ("silu",),
    "hidden_activation": (None, "gelu_pytorch_tanh"),
    "quantization_config": (None,),
    "mlp_bias": (False,),
    "use_sliding_window": (None, False),
    "use_mrope": (False,),
    "rope_interleaved": (False,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "layer_types": (["full_attention"],),
}

# Known families that are not built here, and why.
REFUSED = {
    "gemma2": "soft-capped scores",
}


def lm_config(hf: dict, where: object = "llm_config") -> LMConfig:
    """Return the parts and numbers of a language model from its config.json.

    Raises UserError for an unknown model_type, a field that is missing, of the wrong kind or out of
    range, and one that would change the arithmetic. `where` names the file in the message.
    """
    c = Fields(hf, where, fix="give the config.json that belongs to the model")
    kind = c.text("model_type", default=None)
    if kind not in FAMILIES:
        what = f"{kind!r} is no language model known here"
        if kind in REFUSED:
            what += f": it has {REFUSED[kind]}"
        raise UserError(f"{where}:model_type", what, f"one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]

    # One field is made comparable first: it lists all layers.
    layer_types = c.list("layer_types", str, default=[]) or ["full_attention"]
    given = hf | {"layer_types": sorted(set(layer_types))}
    for key, values in (NEUTRAL | family.neutral).items():
        if key in given and given[key] not in values:
            what = f"{given[key]!r} is not supported for {kind}"
            raise UserError(f"{where}:{key}", what, "use another model")
    return family.config(c)


def with_rows_for_marks(
    source: Mapping[str, Tensor], model: LanguageModel, folder: Path
) -> Mapping[str, Tensor]:
    """Return a checkpoint with as many embeddings as the model has: its llm does not know marks.

    folder: of the llm, whose config.json says how many there are.
    """
    file = folder / "config.json"
    known = Fields(read_json(file), file).integer("vocab_size", 1, VOCABULARY)
    tables = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
    return weights.Grown(source, model.rename, tables, known, model.config.vocab)


@torch.no_grad()
def init_weights(module: nn.Module, std: float):
    """Draw random weights, as Llama's own code does: Normal(0, std) for matrices, zero biases.

    Norms stay as they were built. Patch embeddings are normalised by their fan-in and positions by
    the width, as in SigLIP: with one std for both, pixels would drown the positions.
    """
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            fan_in = m.weight[0].numel()
            m.weight.normal_(0.0, fan_in**-0.5)
        elif isinstance(m, (nn.Linear, nn.Embedding)):
            m.weight.normal_(0.0, std)
        else:
            continue
        if getattr(m, "bias", None) is not None:
            m.bias.zero_()

    # Positions come last: their table is an nn.Embedding, which the loop has drawn too.
    for m in module.modules():
        if hasattr(m, "init_positions"):
            m.init_positions()


# ------------------------------------------------------------------------------------------- LLaVA


def vision_config_of(c: LLaVAConfig) -> VisionConfig:
    """Return the config of a model's encoder. Raises UserError that names the file of a field."""
    images = c.places.get("images", "preprocessor_config.json")
    where = c.places.get("vision", "vision_config")
    vision = vision_config(c.vision, c.preprocessor, where, images)
    if c.feature_norm and vision.beside is not None:
        what = "the norm of one encoder, and a mixture has two"
        raise UserError("model.feature_norm", what, "remove it")
    return replace(vision, final_norm=c.feature_norm)


def vocabulary_of(c: LLaVAConfig) -> int | None:
    """Return how many ids a model has a row of embeddings for; None if the config does not say."""
    text = Fields(c.text, c.places.get("text", "llm_config"))
    kind = text.text("model_type", default=None)
    default = None
    if kind in FAMILIES:
        default = FAMILIES[kind].defaults.get("vocab_size")  # which Hugging Face's files leave out
    return text.integer("vocab_size", 1, VOCABULARY, default=default)


def tiling_of(c: LLaVAConfig) -> Tiling:
    """Return how the pictures and videos of a model become items; no weights are needed for it.

    Raises UserError for settings that do not go together.
    """
    vision = vision_config_of(c)
    check_native(c, vision)
    tokens = vision.tokens(c.feature_select)
    if tokens < 1:
        what = "patch drops the only token of a picture"
        raise UserError("model.feature_select", what, "use cls_patch")

    # anyres arranges the tokens of all tiles as one large picture, so each tile must be a square.
    mode = MODES[c.image_mode]
    if mode.newline:
        if CONNECTORS[c.connector].mean:
            what = f"{c.image_mode} with {c.connector}, the mean of all views"
            raise UserError("model.image_mode", what, "use mlp2x_gelu")
        if isqrt(tokens) ** 2 != tokens:
            what = f"{c.image_mode}, with {tokens} tokens of a view that are no square"
            fix = "set model.feature_select so that only patches are left, or use tiles"
            raise UserError("model.image_mode", what, fix)

    if c.frames < 1 or c.fps < 0:
        what = f"{c.frames} frames, {c.fps} a second"
        raise UserError("model.frames", what, "write 1 or more, and fps 0 or more")

    views = mode(
        tokens,
        c.connector,
        c.connector_options,
        vision.processor,
        read_grids(c.image_grids),
        c.frames,
        c.fps,
        vision.grid,
        c.image_edge,
        c.image_marks,
        c.image_enlarge,
        c.image_views,
    )
    views.check_marks()
    views.positions()  # raises UserError where connector and encoder do not fit
    return views


def check_native(c: LLaVAConfig, vision: VisionConfig):
    """Raise UserError unless a NaFlex, image mode native and a connector for any grid meet."""
    mode = MODES[c.image_mode]
    if vision.native and not mode.native:
        what = f"{c.image_mode}, for a NaFlex, whose pictures keep their proportions"
        raise UserError("model.image_mode", what, "use native")
    if mode.native and not vision.native:
        what = f"{c.image_mode}, for an encoder of squares"
        raise UserError("model.image_mode", what, "use square, or a SigLIP2-NaFlex as model.vision")
    if not mode.native:
        return

    one_grid = [name for name, entry in CONNECTORS.items() if entry.spatial and not entry.any_grid]
    if c.connector in one_grid:
        what = f"{c.connector} reads one grid of tokens, and each picture of a NaFlex has its own"
        raise UserError("model.connector", what, "use mlp2x_gelu or cross_attention")


def check_memory(c: LLaVAConfig, pretrained: Collection[str]):
    """Raise UserError if random weights would not fit in the memory of this machine.

    pretrained: the parts that come from files, which are as large as those are.
    """
    with weights.empty():
        model = LLaVA(c)
    needed = 0
    for name in LLaVA.PARTS:
        if name not in pretrained:
            needed += sum(4 * p.numel() for p in getattr(model, name).parameters())

    # Windows has no sysconf.
    memory = needed
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        what = f"{needed / 1e9:.0f} GB of random weights; this machine has {memory / 1e9:.0f} GB"
        raise UserError("model.llm_config", what, "choose smaller sizes")


class Output(NamedTuple):
    """What a call of LLaVA returns."""

    logits: Tensor  # (B, T', V), T' tokens after image expansion, right-padded
    loss: Tensor | None  # mean over supervised tokens


# How many views the encoder sees at once where nothing is kept for a backward pass.
VIEWS_AT_ONCE = 16


class LLaVA(nn.Module):
    """An encoder, a connector and a language model (Liu et al., 2023).

    The way of a picture: `encode_items` makes features of its pixels, `embed` puts them where the
    text has IMAGE_TOKEN, and the decoder reads the row. `loss` is for training; a call of the model
    (`forward`) takes a padded batch and returns logits too; `generate` continues prompts.
    """

    PARTS = ("language_model", "vision_tower", "connector")

    def __init__(self, c: LLaVAConfig, empty: Collection[str] = ()):
        """Build the parts with torch's random weights.

        The parts named in `empty` have shapes but no storage: weights.load brings it.
        """
        super().__init__()
        self.config = c

        def storage(part: str):
            """Return the context in which to build a part."""
            if part in empty:
                return weights.empty()
            return nullcontext()

        vision = vision_config_of(c)
        with storage("language_model"):
            self.language_model = LanguageModel.from_hf(c.text, c.places.get("text", "llm_config"))
        with storage("vision_tower"):
            self.vision_tower = build_encoder(vision, c.feature_layer, c.feature_select)

        self.views = tiling_of(c)
        width = self.language_model.config.width
        self.connector = build_connector(
            c.connector,
            vision.width,
            width,
            self.views.grid_of(ONE_VIEW),
            **c.connector_options,
        )
        if self.views.newline:
            self.connector = MLPWithNewline(self.connector)  # adds the separator of rows of tokens

    # -- construction ------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = torch.float32,
        device="cpu",
        allow_pickle: bool = False,
        load: Mapping[str, Callable] | None = None,
    ) -> LLaVA:
        """Load a whole model from a folder or Hugging Face id, in any of layouts.LAYOUTS.

        dtype None keeps the dtype of the file. allow_pickle also reads pytorch_model.bin, tensors
        only. load: for the name of a part, a function to load it with in place of weights.load,
        with the same arguments. Raises UserError.
        """
        folder = resolve(str(path), allow_pickle=allow_pickle)
        found = layouts.read(folder, allow_pickle)
        source = found.tensors

        # Hugging Face's files leave out of `text_config` what its config class has as a default.
        config = found.config
        kind = Fields(config.text, config.places["text"]).text("model_type")
        if found.hf_names and kind in FAMILIES:
            config = replace(config, text=FAMILIES[kind].defaults | config.text)

        with weights.empty():
            model = cls(config)

        # A connector has neither names of its own nor anything to ignore.
        loaders = load or {}
        used = set()
        for name in cls.PARTS:
            part = getattr(model, name)
            load_part = loaders.get(name, weights.load)
            table = ()
            if found.hf_names:
                table = getattr(part, "rename", ())
            used |= load_part(
                part,
                source,
                table,
                f"{name}.",
                dtype=dtype,
                device=device,
                ignore=getattr(part, "ignore", ()),
            )

        # Every tensor of the files must have found its place.
        left = sorted(set(source) - used)
        if left:
            where = source.locate(left[0])
            raise UserError(where, "belongs to no part of the model", "check model_type")
        return model

    @classmethod
    def from_parts(
        cls, c: Model, template: str, seed: int = 0, load: Mapping[str, Callable] | None = None
    ) -> LLaVA:
        """Build a new model as [model] of a recipe says: pretrained parts, the rest random.

        load: as in from_pretrained. Raises UserError.
        """
        # Everything random in a new run is drawn after this: the weights below, and the adapters
        # that come later. So equal seeds give equal models, however they start.
        torch.manual_seed(seed)

        # A finished model, to train further.
        if c.checkpoint:
            model = cls.from_pretrained(c.checkpoint, allow_pickle=c.allow_pickle, load=load)
            model.config = replace(model.config, template=template)
            return model

        # For each pretrained part, where its weights are, by the prefix that their names get.
        pretrained = {}
        if not c.llm_config:
            pretrained["language_model"] = {"": c.llm}
        if not c.vision_config:
            if c.vision2:
                pretrained["vision_tower"] = {"clip.": c.vision, "dinov2.": c.vision2}
            else:
                pretrained["vision_tower"] = {"": c.vision}

        config = layouts.config_from_recipe(c, template)
        check_memory(config, pretrained)
        model = cls(config, empty=list(pretrained))
        init_weights(model.connector, 0.02)
        for name in ("language_model", "vision_tower"):
            part = getattr(model, name)
            if name not in pretrained:
                init_weights(part, part.config.init_std)
                continue

            checkpoints = {}
            for prefix, path in pretrained[name].items():
                folder = resolve(path, f"model.{name}", c.allow_pickle)
                checkpoints[prefix] = weights.Checkpoint(folder, c.allow_pickle)
            source = weights.Joined(checkpoints)
            if name == "language_model" and c.image_mode == "split":
                source = with_rows_for_marks(source, part, folder)
            load_part = (load or {}).get(name, weights.load)
            load_part(part, source, part.rename, dtype=torch.float32, ignore=part.ignore)
        return model

    def save(self, folder: str | Path):
        """Write the weights, preprocessor_config.json and, last, config.json.

        Tokenizer and recipe are the caller's.
        """
        barellava.save(Path(folder), self)

    def compile_blocks(self, **options):
        """Run torch.compile on every block of language model and encoder, in place.

        A block is what repeats: compiled alone, one graph serves all blocks of a kind. Lengths are
        dynamic, so it also serves rows of any length.
        """
        for module in self.modules():
            if isinstance(module, (LanguageModel, VisionEncoder)):
                for block in module.blocks:
                    block.compile(dynamic=True, **options)

    # -- from pixels to hidden states --------------------------------------------------------------

    @property
    def image_tokens(self) -> int:
        """How many positions a picture of one view takes."""
        return self.views.positions()

    def encode_images(self, images: Tensor) -> Tensor:
        """Pixels (N, 3, height, width), normalised or uint8 -> the connector's output (N, n, D)."""
        tokens = self._encode_views(images, [ONE_VIEW] * len(images))  # (N, n, C)
        return self.connector(join_views(self.config.connector, tokens[:, None], self.views.grid))

    def encode_items(self, items: Sequence[Item]) -> list[Tensor]:
        """Return the features of each item, (n, D) with an n of its own, in the order of the text.

        The encoder sees the views of all items as one batch; the connector reads the views of an
        item together. Raises ValueError for an item without a grid where a NaFlex needs one.
        """
        if not items:
            return []
        if self.views.native and not all(item.shape.height for item in items):
            raise ValueError("a NaFlex sees items of views.picture and views.clip alone")
        device = self.language_model.lm_head.weight.device
        pixels = torch.cat([item.pixels for item in items])
        return self._encode(send(pixels, device), [item.shape for item in items])

    def _encode(self, pixels: Tensor | None, shapes: Sequence[ItemShape]) -> list[Tensor]:
        """Return what encode_items does, of items of these shapes with the pixels of all views."""
        if not shapes:
            return []
        tokens = self._encode_views(pixels, shapes)  # (M, n, C), in image mode native (P, C)

        # Items of as many views, with one grid of patches, form one batch of the connector.
        kinds = [(shape.views, shape.height, shape.width) for shape in shapes]
        tokens_of_each = tokens.split([shape.length for shape in shapes])
        features = [None] * len(shapes)
        for kind in sorted(set(kinds)):
            same = [i for i, other in enumerate(kinds) if other == kind]
            if len(same) == len(shapes):
                batch = tokens.unflatten(0, (len(shapes), -1))  # the usual case, without a copy
            else:
                batch = torch.stack([tokens_of_each[i] for i in same])
            shape = shapes[same[0]]
            if self.views.native:
                batch = batch.unflatten(1, (shape.views, -1))

            # (items, v, n, C) -> (items, m, D)
            grid = self.views.grid_of(shape)
            outputs = self.connector(join_views(self.config.connector, batch, grid))
            for i, output in zip(same, outputs, strict=True):
                arranged = self.views.arrange(output, shapes[i])
                features[i] = self._among_marks(arranged, shapes[i])
        return features

    def _among_marks(self, features: Tensor, shape: ItemShape) -> Tensor:
        """Return an item's features (m, D) among the embeddings of the marks around them.

        The text has IMAGE_TOKEN for marks too, so an item is one stretch of the row everywhere.
        """
        if not self.views.marks:
            return features
        # All of it is known from the shape, also where tensors have no values (training/memory.py).
        text = self.views.placeholder(shape)
        image_at = [i for i, token in enumerate(text) if token == IMAGE_TOKEN]
        ids = torch.tensor([max(token, 0) for token in text], device="cpu")  # (positions,)
        x = self.language_model.model.embed(send(ids, features.device))
        places = send(torch.tensor(image_at, device="cpu"), features.device)
        return x.index_copy(0, places, features.to(x.dtype))

    def embed(
        self, input_ids: Tensor, features: Tensor | None, image_at: Tensor | None = None
    ) -> Tensor:
        """Return the embeddings (T, D) of packed ids (T,), with features at the images' positions.

        features (..., D) are those of all items, in the order of the ids; None without any image.
        image_at (P,): these positions. Without them the CPU waits for a GPU to find them.
        """
        x = self.language_model.model.embed(input_ids.clamp(min=0))  # IMAGE_TOKEN is negative
        if features is None:
            return x
        if image_at is None:
            image_at = image_positions(input_ids)
        features = (features * self.config.image_scale).to(x.dtype).flatten(0, -2)  # (P, D)
        return x.index_copy(0, image_at, features)

    def _encode_views(self, pixels: Tensor, shapes: Sequence[ItemShape]) -> Tensor:
        """Return the encoder's tokens of items, (M, n, C), in image mode native (P, C).

        pixels: those of the items of these shapes, one behind the other (packing.Item).
        """
        views = []  # each of them as an item
        for shape in shapes:
            views += shape.views * [ItemShape(height=shape.height, width=shape.width)]
        if torch.is_grad_enabled():
            return self._run_encoder(pixels, views)

        # Without gradients a few at a time, so that a video takes little more memory than its
        # result. The parts are written into place: joined at the end, they would take it twice.
        tokens = None
        end = 0
        for first in range(0, len(views), VIEWS_AT_ONCE):
            some = views[first : first + VIEWS_AT_ONCE]
            chunk = slice(end, end + length_of(some))
            end = chunk.stop
            encoded = self._run_encoder(pixels[chunk], some)
            if tokens is None:
                tokens = encoded.new_empty(len(pixels), *encoded.shape[1:])
            tokens[chunk] = encoded
        return tokens

    def _run_encoder(self, pixels: Tensor, views: Sequence[ItemShape]) -> Tensor:
        """Return what the encoder makes of the pixels of views, normalised or uint8."""
        pixels = self.vision_tower.processor.normalise(pixels)
        if not self.views.native:
            return self.vision_tower(pixels)
        return self.vision_tower(pixels, [(view.height, view.width) for view in views])

    def _decode(self, row: PackedRow | Batch, features: list[Tensor]) -> Tensor:
        """Return the hidden states (T, D) of a packed row with these features of its items.

        inference/engine.py does the same with an attention that also fills its cache.
        """
        joined = None
        if features:
            joined = torch.cat(features)
        x = self.embed(row.input_ids, joined, row.image_at)
        attend = packed_attention(row.cu_seqlens, row.max_seqlen)
        return self.language_model.model(x, row.positions, attend, row.cu_seqlens)

    # -- loss and logits ---------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Tensor:
        """Return the sum of the token losses of a packed batch.

        It is the sum, not the mean: the trainer divides it by the supervised tokens of the whole
        step, over micro-batches and ranks.
        """
        features = self._encode(batch.images, batch.shapes)
        hidden = self._decode(batch, features)
        loss = self._sum_of_losses(hidden, batch.labels, batch.learns_at)

        # Every trainable parameter gets a gradient, here zero: DDP would wait for it on other
        # ranks.
        if batch.images is None:
            unused = []
            for part in (self.connector, self.vision_tower):
                unused += [p for p in part.parameters() if p.requires_grad]
            loss = loss + 0 * sum(p.flatten()[0] for p in unused)
        return loss

    def forward(self, input_ids: Tensor, images=None, attention_mask=None, labels=None) -> Output:
        """Return logits, and with labels the mean loss: TinyLLaVA's convenience call.

        input_ids, attention_mask and labels are a padded batch (B, T), with one -200 where each
        image goes. images: (N, 3, height, width), or a list of N items (see `views`); one per -200
        in order, or one per row (a row without a -200 then ignores its own). Raises ValueError when
        images and placeholders disagree.
        """
        rows = without_padding(input_ids, attention_mask)
        features = self.encode_items(match_images(rows, images, self.views.one_view))
        counts = [len(f) for f in features]
        packed = pack_prompts(rows, counts)
        hidden = self._decode(packed, features)
        logits = self.language_model.lm_head(hidden)

        lengths = packed.cu_seqlens.diff().tolist()
        padded = pad_sequence(logits.split(lengths), batch_first=True)  # (B, T', V)
        if labels is None:
            return Output(padded, None)

        # Labels are packed as the ids are. The first token of a row has no token that predicts it.
        labels = torch.cat(without_padding(labels, attention_mask))
        labels = expand_images(torch.cat(rows), counts, labels)
        labels[packed.cu_seqlens[:-1].long()] = IGNORE
        supervised = (labels != IGNORE).sum()
        return Output(padded, self._sum_of_losses(hidden, labels) / supervised)

    def _sum_of_losses(
        self, hidden: Tensor, labels: Tensor, learns_at: Tensor | None = None
    ) -> Tensor:
        """Hidden states (T, D) and labels (T,) of a packed row -> the sum of its token losses.

        labels[t] is the token at t, so the hidden state at t - 1 predicts it. The first label of
        each sample is IGNORE: what is left of it belongs to another sample. learns_at: see Batch.
        """
        targets = F.pad(labels[1:], (0, 1), value=IGNORE)
        head = self.language_model.lm_head
        return linear_cross_entropy(hidden, head.weight, head.bias, targets, learns_at)

    # -- generation -------------------------------------------------------------------------------

    def _check_ids(self, prompts: Sequence[Tensor]):
        """Raise UserError for an id that the embedding has no row for: another model's tokenizer.

        Ids that are on a GPU already are not looked at, because the CPU would wait for them.
        """
        vocab = self.language_model.config.vocab
        for ids in prompts:
            if ids.is_cpu and len(ids) and ids.max() >= vocab:
                what = f"makes id {ids.max()}, and the model has {vocab}"
                raise UserError("tokenizer", what, "give the tokenizer of this model")

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
            input_ids = without_padding(input_ids, attention_mask)
        self._check_ids(input_ids)
        device = self.language_model.lm_head.weight.device
        prompts = [ids.to(device) for ids in input_ids]
        items = match_images(prompts, images, self.views.one_view)

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
