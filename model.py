"""Decoder language models (one class, a table of families) and LLaVA: encoder + connector + language model.

    lm = LanguageModel.from_pretrained("TinyLlama/TinyLlama-1.1B-Chat-v1.0")   # folder or Hugging Face id
    logits = lm(input_ids)                                                     # (B, T) -> (B, T, V)
    model = LLaVA.from_pretrained("out/demo")
    out = model(input_ids, images, attention_mask, labels)                     # out.logits, out.loss

B batch, T tokens of a packed row, S samples in it, N images, n tokens per image, D width, H heads, K key-value
heads, d head width, L cache slots, V vocabulary.

Everything runs on packed rows: (T, D) activations, positions that restart with each sample, and cu_seqlens
(S+1,) that says where samples begin. A padded batch, a prompt and one decoded token are special cases of it.
Parameter names are Hugging Face's Llama names, so rename tables are short. Configuration is read when a module
is built; forward never branches on it. A new family is one entry of FAMILIES.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import weights
from config import Model, UserError
from connectors import build_connector, connector_tokens
from encoders import RENAME as VISION_RENAME
from encoders import TEXT_HALF, ImageTransform, VisionEncoder, vision_config
from generation import Attend, Decoding, beam_search, choose, packed
from kernels.cross_entropy import IGNORE, linear_cross_entropy

IMAGE_TOKEN = -200  # LLaVA's placeholder; in a packed row it stands at every position an image fills


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
    qkv_bias: bool = False
    tied: bool = False
    init_std: float = 0.02
    hf: dict = field(default_factory=dict, repr=False)  # the config.json it came from, written back unchanged


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich, 2019), computed in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.size(-1),), eps=self.eps).to(x.dtype) * self.weight


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, width: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate, bias=False)
        self.up_proj = nn.Linear(width, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rope_table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin (T, 1, dim) in float32 for rotary embeddings in Llama's half-split layout (Su et al., 2021)."""
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim)
    angle = positions[:, None, None].float() * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the heads x (T, H, d) by their positions."""
    cos, sin = rope
    left, right = x.chunk(2, -1)
    return (x * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: LMConfig, index: int):
        super().__init__()
        layer, d = c.layers[index], c.head_dim
        self.index, self.head_dim = index, d
        self.q_proj = nn.Linear(c.width, layer.heads * d, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, layer.kv_heads * d, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, layer.kv_heads * d, bias=c.qkv_bias)
        self.o_proj = nn.Linear(layer.heads * d, c.width, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(self.index, rotate(q, rope), rotate(k, rope), v).flatten(1))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to the residual stream."""

    def __init__(self, c: LMConfig, index: int):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = c.norm(c.width), c.norm(c.width)
        self.self_attn, self.mlp = Attention(c, index), c.mlp(c.width, c.layers[index].intermediate)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, c: LMConfig):
        super().__init__()
        self.rope = partial(rope_table, dim=c.head_dim, theta=c.rope_theta)
        self.embed_tokens = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(c.block(c, i) for i in range(len(c.layers)))
        self.norm = c.norm(c.width)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Embeddings x (T, D) and positions (T,) -> final hidden states (T, D)."""
        rope = self.rope(positions)
        for block in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, attend, use_reentrant=False)
            else:
                x = block(x, rope, attend)
        return self.norm(x)


class LanguageModel(nn.Module):
    def __init__(self, c: LMConfig):
        super().__init__()
        self.config = c
        self.model = Decoder(c)
        self.lm_head = nn.Linear(c.width, c.vocab, bias=False)
        self.tied = {"lm_head.weight": "model.embed_tokens.weight"} if c.tied else {}
        if c.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, T), no padding -> logits (B, T, V)."""
        B, T = input_ids.shape
        cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=input_ids.device)
        positions = torch.arange(T, device=input_ids.device).repeat(B)
        x = self.model.embed_tokens(input_ids.flatten())
        return self.lm_head(self.model(x, positions, packed(cu_seqlens, T))).view(B, T, -1)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = torch.float32, device="cpu"):
        """A language model from a Hugging Face folder or id; dtype None keeps the file's. Raises UserError."""
        folder = weights.resolve(str(path))
        hf = weights.read_json(folder / "config.json")
        config = lm_config(hf, folder / "config.json")
        with torch.device("meta"):
            model = cls(config)
        table = FAMILIES[hf["model_type"]].rename
        weights.load(model, weights.Checkpoint(folder), table, dtype=dtype, device=device, ignore=NOT_WEIGHTS)
        return model


class Family(NamedTuple):
    config: Callable[[dict], LMConfig]
    rename: weights.Table = ()  # (theirs, ours)


def _llama(c: dict, qkv_bias: bool = False, tied: bool = False) -> LMConfig:
    """Llama and what is built like it: RMSNorm, full rotary, SwiGLU."""
    heads = c["num_attention_heads"]
    layer = Layer(heads, c.get("num_key_value_heads") or heads, c["intermediate_size"])
    rope = c.get("rope_parameters") or {}  # where transformers 5 keeps rope_theta
    return LMConfig(
        vocab=c["vocab_size"],
        width=c["hidden_size"],
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        layers=(layer,) * c["num_hidden_layers"],
        norm=partial(RMSNorm, eps=c.get("rms_norm_eps", 1e-6)),
        mlp=SwiGLU,
        block=Block,
        rope_theta=c.get("rope_theta") or rope.get("rope_theta", 10000.0),
        qkv_bias=qkv_bias,
        tied=c.get("tie_word_embeddings", tied),
        init_std=c.get("initializer_range", 0.02),
        hf=c,
    )


FAMILIES: dict[str, Family] = {
    "llama": Family(_llama),
    "qwen2": Family(partial(_llama, qkv_bias=True)),
}
NOT_WEIGHTS = ("**.rotary_emb.inv_freq",)  # a buffer that old files carry; it is a function of the config
# Fields that would change the arithmetic, and the values at which they do not.
NEUTRAL = {
    "hidden_act": ("silu",), "rope_scaling": (None,), "quantization_config": (None,), "attention_bias": (False,),
    "mlp_bias": (False,), "use_sliding_window": (False,), "partial_rotary_factor": (1.0,),
}  # fmt: skip


def lm_config(hf: dict, where: object = "llm_config") -> LMConfig:
    """The parts and numbers of a language model from its config.json.

    Raises UserError for an unknown model_type, a missing size, or a field that would change the arithmetic.
    """
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"{where}:model_type",
            f"{kind!r} is no language model known here",
            f"one of {', '.join(FAMILIES)}",
        )
    rope_type = (hf.get("rope_parameters") or {}).get("rope_type", "default")
    for key, values in NEUTRAL.items():
        if key in hf and hf[key] not in values or rope_type != "default":
            raise UserError(
                f"{where}:{key}",
                f"{hf.get(key, rope_type)!r} is not supported for {kind}",
                "use another model",
            )
    try:
        return FAMILIES[kind].config(hf)
    except KeyError as e:
        raise UserError(f"{where}:{e.args[0]}", "missing", "give the config.json that belongs to the model") from None


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
        if isinstance(m, VisionEncoder):
            for p in (m.embeddings.position_embedding.weight, m.embeddings.class_embedding):
                if p is not None:
                    p.normal_(0.0, m.config.width**-0.5)


# ------------------------------------------------------------------------------------------------- LLaVA


@dataclass(frozen=True)
class LLaVAConfig:
    """What config.json of a checkpoint says; text and vision are Hugging Face config dicts, kept verbatim."""

    text: dict
    vision: dict
    preprocessor: dict
    connector: str = "mlp2x_gelu"
    feature_layer: int = -2
    feature_select: str = "patch"
    image_mode: str = "square"
    template: str = "llama"

    def to_json(self) -> dict:
        return {
            "model_type": "barellava", "text_config": self.text, "vision_config": self.vision,
            "connector": self.connector, "feature_layer": self.feature_layer, "feature_select": self.feature_select,
            "image_mode": self.image_mode, "template": self.template, "image_token_index": IMAGE_TOKEN,
        }  # fmt: skip


class Layout(NamedTuple):
    """A checkpoint layout: its config.json -> LLaVAConfig, the prefix of each part, and whether the parts use
    Hugging Face's names (True) or ours."""

    config: Callable[[dict], LLaVAConfig]
    language_model: str
    vision_tower: str
    connector: str
    hf_names: bool


def _ours(c: dict) -> LLaVAConfig:
    keys = ("connector", "feature_layer", "feature_select", "image_mode", "template")
    return LLaVAConfig(c["text_config"], c["vision_config"], {}, **{k: c[k] for k in keys})


def _factory(c: dict) -> LLaVAConfig:
    """TinyLLaVA Factory's one-file layout. It does not record the template; the LLM's usual one is taken."""
    templates = {"llama": "llama", "qwen2": "qwen2_base"}
    return LLaVAConfig(
        c["text_config"], c["vision_config"], {}, c["connector_type"], c["vision_feature_layer"],
        c["vision_feature_select_strategy"], c["image_aspect_ratio"],
        templates.get(c["text_config"]["model_type"], "phi"),
    )  # fmt: skip


LAYOUTS: dict[str, Layout] = {
    "barellava": Layout(_ours, "language_model.", "vision_tower.", "connector.", False),
    "tinyllava": Layout(_factory, "language_model.", "vision_tower._vision_tower.", "connector._connector.", True),
}


class Output(NamedTuple):
    logits: Tensor  # (B, T', V), right-padded after image expansion
    loss: Tensor | None  # mean over supervised tokens


class LLaVA(nn.Module):
    def __init__(self, c: LLaVAConfig):
        super().__init__()
        self.config = c
        vision, text = vision_config(c.vision, c.preprocessor), lm_config(c.text)
        self.vision_tower = VisionEncoder(vision, c.feature_layer, c.feature_select)
        self.connector = build_connector(c.connector, vision.width, text.width)
        self.language_model = LanguageModel(text)
        self.image_tokens = connector_tokens(c.connector, vision.tokens(c.feature_select))

    # -- construction ------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = torch.float32, device="cpu") -> LLaVA:
        """A whole model from a folder or Hugging Face id: ours or TinyLLaVA Factory's one-file layout.

        Raises UserError for an unknown layout and as weights.load does.
        """
        folder = weights.resolve(str(path))
        c = weights.read_json(folder / "config.json")
        if c.get("model_type") not in LAYOUTS:
            raise UserError(f"{folder / 'config.json'}:model_type", f"{c.get('model_type')!r} is no layout known here",
                            f"one of {', '.join(LAYOUTS)}")  # fmt: skip
        layout = LAYOUTS[c["model_type"]]
        try:
            config = layout.config(c)
        except KeyError as e:
            raise UserError(f"{folder / 'config.json'}:{e.args[0]}", "missing", "give a complete config.json") from None
        preprocessor = weights.read_json(folder / "preprocessor_config.json", optional=True)
        with torch.device("meta"):
            model = cls(replace(config, preprocessor=preprocessor))
        source, used = weights.Checkpoint(folder), set()
        tables = model.rename_tables() if layout.hf_names else {}
        for part in ("language_model", "vision_tower", "connector"):
            used |= weights.load(
                getattr(model, part),
                source,
                tables.get(part, ()),
                getattr(layout, part),
                dtype,
                device,
                NOT_WEIGHTS,
            )
        if left := sorted(set(source) - used):
            raise UserError(f"{source.file(left[0])}:{left[0]}", "belongs to no part of the model", "check model_type")
        return model

    @classmethod
    def from_parts(cls, c: Model, template: str, seed: int = 0) -> LLaVA:
        """A new model as a recipe's [model] section says: pretrained parts from folders, the rest random."""
        text, vision, preprocessor = part_configs(c)
        torch.manual_seed(seed)  # only what is initialised here draws from it
        config = LLaVAConfig(
            text, vision, preprocessor, c.connector, c.feature_layer, c.feature_select, c.image_mode, template
        )
        model = cls(config)
        init_weights(model.connector, 0.02)
        if c.llm_config:
            init_weights(model.language_model, model.language_model.config.init_std)
        else:
            source = weights.Checkpoint(weights.resolve(c.llm, "model.llm"))
            weights.load(model.language_model, source, model.rename_tables()["language_model"], dtype=torch.float32,
                         ignore=NOT_WEIGHTS)  # fmt: skip
        if c.vision_config:
            init_weights(model.vision_tower, model.vision_tower.config.init_std)
        else:
            source = weights.Checkpoint(weights.resolve(c.vision, "model.vision"))
            weights.load(model.vision_tower, source, VISION_RENAME, dtype=torch.float32, ignore=TEXT_HALF)
        return model

    def rename_tables(self) -> dict[str, weights.Table]:
        """Hugging Face's names of each part -> ours."""
        return {
            "language_model": FAMILIES[self.config.text["model_type"]].rename,
            "vision_tower": VISION_RENAME,
        }

    def save(self, folder: str | Path):
        """config.json, preprocessor_config.json and the weights, config last. Tokenizer and recipe are the caller's."""
        folder, layout, state = Path(folder), LAYOUTS["barellava"], {}
        for part in ("language_model", "vision_tower", "connector"):
            state |= weights.tensors(getattr(self, part), prefix=getattr(layout, part))
        weights.save(folder, state)
        preprocessor = self.vision_tower.transform.to_hf()
        weights.write_file(folder / "preprocessor_config.json", json.dumps(preprocessor, indent=2))
        weights.write_file(folder / "config.json", json.dumps(self.config.to_json(), indent=2))

    # -- forward -----------------------------------------------------------------------------------------

    def encode_images(self, images: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) -> what stands in the sequence for them, (N, n, D)."""
        return self.connector(self.vision_tower(images))

    def embed(self, input_ids: Tensor, images: Tensor | None) -> Tensor:
        """Packed ids (T,) with IMAGE_TOKEN at every image position, images in order -> (T, D)."""
        x = self.language_model.model.embed_tokens(input_ids.clamp(min=0))
        if images is None:
            return x
        return x.masked_scatter((input_ids == IMAGE_TOKEN)[:, None], self.encode_images(images).to(x.dtype))

    def loss(self, input_ids, labels, positions, cu_seqlens, max_seqlen, images=None) -> Tensor:
        """Sum of the token losses of a packed row: ids, labels, positions (T,), cu_seqlens (S+1,).

        The sum, not the mean: the trainer divides by the supervised tokens of the whole step. labels[t] is what
        should stand at t, so position t-1 predicts it; the first label of each sample is -100 and predicts nothing.
        """
        hidden = self.language_model.model(self.embed(input_ids, images), positions, packed(cu_seqlens, max_seqlen))
        head = self.language_model.lm_head
        targets = torch.cat([labels[1:], labels.new_full((1,), IGNORE)])
        loss = linear_cross_entropy(hidden, head.weight, head.bias, targets)
        if images is None:
            # Every trainable parameter gets a (zero) gradient, or DDP would wait for it on the other ranks.
            unused = [p for part in (self.connector, self.vision_tower) for p in part.parameters() if p.requires_grad]
            loss = loss + 0 * sum(p.flatten()[0] for p in unused)
        return loss

    def forward(self, input_ids: Tensor, images=None, attention_mask=None, labels=None) -> Output:
        """TinyLLaVA's convenience call: a padded batch with one -200 where each image goes.

        input_ids, attention_mask, labels (B, T); images (N, 3, H, W), one per -200 in order, or one per row (a row
        without a -200 then ignores its own). Raises ValueError when images and placeholders disagree.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [ids[m.bool()] for ids, m in zip(input_ids, mask, strict=True)]
        images = self._images_in_order(rows, images)
        ids, positions, cu_seqlens, max_seqlen = self._pack(rows)
        hidden = self.language_model.model(self.embed(ids, images), positions, packed(cu_seqlens, max_seqlen))
        logits = self.language_model.lm_head(hidden)
        lengths = cu_seqlens.diff().tolist()
        padded = torch.nn.utils.rnn.pad_sequence(logits.split(lengths), batch_first=True)
        if labels is None:
            return Output(padded, None)
        given = [row[m.bool()] for row, m in zip(labels, mask, strict=True)]
        wide = [self._expand(row, to) for row, to in zip(rows, given, strict=True)]
        targets = torch.cat([F.pad(row[1:], (0, 1), value=IGNORE) for row in wide])
        return Output(padded, F.cross_entropy(logits.float(), targets))

    def _expand(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """One placeholder -> n image positions; with labels, their expansion instead (image positions -100)."""
        image = ids == IMAGE_TOKEN
        repeats = torch.where(image, self.image_tokens, 1)
        return (ids if labels is None else labels.masked_fill(image, IGNORE)).repeat_interleave(repeats)

    def _pack(self, rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, int]:
        """Rows of ids with single placeholders -> packed ids, positions, cu_seqlens, max_seqlen."""
        rows = [self._expand(row) for row in rows]
        lengths = [len(r) for r in rows]
        device = rows[0].device
        cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        return torch.cat(rows), positions, cu_seqlens, max(lengths)

    def _images_in_order(self, rows: list[Tensor], images: Tensor | None) -> Tensor | None:
        counts = [int((row == IMAGE_TOKEN).sum()) for row in rows]
        given = 0 if images is None else len(images)
        if sum(counts) == 0:
            return None
        if given == sum(counts):
            return images
        if given == len(rows) and max(counts) <= 1:
            return images[torch.tensor(counts, device=images.device) == 1]
        raise ValueError(f"{sum(counts)} image placeholders but {given} images")

    # -- generation --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self, input_ids, images: Tensor | None = None, attention_mask: Tensor | None = None,
        max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0, num_beams: int = 1,
        eos_token_id: int | None = None, use_cache: bool = True, generator: torch.Generator | None = None,
        stream: Callable[[list[int]], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """Continue prompts: (B, T) with attention_mask, or a list of B ragged (T,) tensors -> (B, new) tokens.

        Greedy at temperature 0, else sampling from the top_p nucleus; num_beams > 1 is beam search (scores divided
        by length, as Hugging Face's default). A sequence ends with eos_token_id and is filled up with it.
        images are in the order of the -200 placeholders. stream is called with each step's B tokens.
        use_cache=False recomputes everything for each token: slow, the check on the cache.
        """
        if isinstance(input_ids, Tensor):
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            input_ids = [ids[m.bool()] for ids, m in zip(input_ids, mask, strict=True)]
        device = self.language_model.lm_head.weight.device
        rows = [row.to(device) for row in input_ids]
        images = self._images_in_order(rows, images)
        decoding = Decoding(self, rows, images, num_beams, max_new_tokens, use_cache)
        if num_beams > 1:
            return beam_search(decoding, max_new_tokens, eos_token_id)
        done = torch.zeros(len(rows), dtype=torch.bool, device=device)
        new: list[Tensor] = []
        for _ in range(max_new_tokens):
            token = choose(decoding.logits, temperature, top_p, generator)
            if eos_token_id is not None:
                token = torch.where(done, eos_token_id, token)
                done |= token == eos_token_id
            new.append(token)
            if stream:
                stream(token.tolist())
            if done.all() or len(new) == max_new_tokens:
                break
            decoding.step(token)
        return torch.stack(new, 1)


def part_configs(c: Model) -> tuple[dict, dict, dict]:
    """The language model's, the encoder's and the image processor's config dicts of a recipe's [model] section."""
    text = c.llm_config or weights.read_json(weights.resolve(c.llm, "model.llm") / "config.json")
    if c.vision_config:
        vision = dict(c.vision_config)
        return text, vision, vision.pop("preprocessor", {})
    folder = weights.resolve(c.vision, "model.vision")
    preprocessor = weights.read_json(folder / "preprocessor_config.json", optional=True)
    return text, weights.read_json(folder / "config.json"), preprocessor


def vision_spec(c: Model) -> tuple[ImageTransform, int]:
    """What the data path needs to know of a recipe's model, without its weights: transform, positions per image."""
    _, vision, preprocessor = part_configs(c)
    vision = vision_config(vision, preprocessor)
    return vision.transform, connector_tokens(c.connector, vision.tokens(c.feature_select))
