"""Vision encoders: one ViT that is CLIP, SigLIP, SigLIP2 or DINOv2; CLIP beside DINOv2; the image transform of each.

    encoder = load_encoder("openai/clip-vit-large-patch14-336")       # a Hugging Face folder or id
    features = encoder(encoder.preprocess(pil_image)[None])           # (N, 3, H, W) -> (N, n, C)

N images, H x W pixels, h x w patches, n tokens per image, C width. Parameter names are Hugging Face's for CLIP.
A family is one entry of FAMILIES, keyed by config.json's exact model_type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoints import weights
from checkpoints.files import read_json, resolve
from checkpoints.names import Table
from inputs.image_processor import ImageProcessor, need, read_preprocessor
from kernels.attention import attention
from kernels.glu import gelu, glu
from layers import LayerNorm, LayerScale

torch.backends.cudnn.allow_tf32 = (
    False  # float32 is float32 in convolutions too, as torch has it in products
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: gelu(x, "quick_gelu"),
    "gelu": lambda x: gelu(x, "gelu"),
    "gelu_pytorch_tanh": lambda x: gelu(x, "gelu_tanh"),
    "swiglu": lambda x: glu(*x.chunk(2, -1), "silu"),
}


@dataclass(frozen=True)
class VisionConfig:
    """An encoder as numbers, under Hugging Face's names, and as parts; absent parts are nn.Identity."""

    hf: dict  # config.json with every default filled in
    processor: ImageProcessor
    leading: dict[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # tokens before the patches: shape without C
    pre_norm: Callable[..., nn.Module] = nn.Identity
    rename: Table = (("vision_model.**", "**"),)  # Hugging Face's names -> ours
    antialias: bool | None = (
        None  # how the position table is resized; None = made for one size of picture
    )
    beside: VisionConfig | None = None  # in the mixture this is CLIP, and that its DINOv2
    width = property(lambda self: self.hf["hidden_size"])
    init_std = property(lambda self: self.hf["initializer_range"])

    def tokens(self, select: str) -> int:
        """Tokens per image: all of them, less the first one for `patch` (also where it is no class token)."""
        grid, leading = self.processor.side // self.hf["patch_size"], self.leading.values()
        return grid**2 + sum((1, *shape)[-1] for shape in leading) - (select == "patch")


class Block(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        hidden, eps, self.heads = (
            c.hf["intermediate_size"],
            c.hf["layer_norm_eps"],
            c.hf["num_attention_heads"],
        )
        self.layer_norm1, self.layer_norm2 = LayerNorm(c.width, eps), LayerNorm(c.width, eps)
        start = c.hf.get("layerscale_value")  # DINOv2 scales what it adds, per channel
        self.layer_scale1, self.layer_scale2 = (
            nn.Identity() if start is None else LayerScale(c.width, start) for _ in "12"
        )
        linears = {
            name: nn.Linear(c.width, c.width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        }
        self.self_attn, self.activation = nn.ModuleDict(linears), ACTIVATIONS[c.hf["hidden_act"]]
        gated = (
            c.hf["hidden_act"] == "swiglu"
        )  # then DINOv2's names, and two outputs for each hidden unit
        up, down = nn.Linear(c.width, hidden * (1 + gated)), nn.Linear(hidden, c.width)
        self.mlp = nn.ModuleDict(
            {"weights_in": up, "weights_out": down} if gated else {"fc1": up, "fc2": down}
        )

    def forward(self, x: Tensor) -> Tensor:
        (q_proj, k_proj, v_proj, out_proj), (up, down) = self.self_attn.values(), self.mlp.values()
        y = self.layer_norm1(x)
        q, k, v = (proj(y).unflatten(-1, (self.heads, -1)) for proj in (q_proj, k_proj, v_proj))
        y, x = self.layer_norm2.add(
            self.layer_scale1(out_proj(attention(q, k, v, causal=False).flatten(2))), x
        )
        return x + self.layer_scale2(down(self.activation(up(y))))


class Embeddings(nn.Module):
    """Class token and registers, where there are any, then the patches row by row. Registers have no position."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        patch, self.grid, self.antialias = (
            c.hf["patch_size"],
            c.hf["image_size"] // c.hf["patch_size"],
            c.antialias,
        )
        self.patch_embedding = nn.Conv2d(3, c.width, patch, patch, bias=c.pre_norm is nn.Identity)
        self.position_embedding = nn.Embedding(self.grid**2 + bool(c.leading), c.width)
        axis = c.leading.get("class_embedding", ())[
            :1
        ]  # DINOv2's tokens and table have a leading dimension of 1
        self.position_embedding.weight = nn.Parameter(
            self.position_embedding.weight.detach().view(*axis, -1, c.width)
        )
        for name, shape in c.leading.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(*shape, c.width)))
        # The code of 2023 resizes the table by a scale, (h + 0.1) / grid, today's to a size: they sample elsewhere.
        offset, size = c.hf.get("interpolate_offset", 0.0), lambda *hw: {"size": hw}
        self.target = (
            (lambda *hw: {"scale_factor": [(n + offset) / self.grid for n in hw]})
            if offset
            else size
        )

    def forward(self, pixels: Tensor) -> Tensor:
        N, C, h, w = (x := self.patch_embedding(pixels)).shape
        first, table = self.position_embedding.weight.view(-1, C).tensor_split([-(self.grid**2)])
        leading = torch.cat([first[:0], *(p.view(-1, C) for p in self.parameters(recurse=False))])
        leading = leading + F.pad(first, (0, 0, 0, len(leading) - len(first)))
        if (h, w) != (self.grid, self.grid):  # bicubic, in float32 as Hugging Face has it
            table = table.float().T.unflatten(1, (self.grid, self.grid))[None]
            table = F.interpolate(
                table, mode="bicubic", antialias=self.antialias, **self.target(h, w)
            )
            table = table[0].flatten(1).T.to(x.dtype)
        return torch.cat([leading.expand(N, -1, -1), x.flatten(2).transpose(1, 2) + table], 1)


class VisionEncoder(nn.Module):
    """Vision Transformer (Dosovitskiy et al., 2020) up to the chosen feature layer: (N, 3, H, W) -> (N, n, C).

    feature_layer counts Hugging Face's `hidden_states`: 0 is the embeddings, -2 the input of the last block, and none
    gets the final norm. What lies behind is not built; its tensors wait in `spares`, to leave with the checkpoint.
    """

    spare = ("encoder.layers.*.**", "post_layernorm.*", "head.**", "embeddings.mask_token")
    ignore = (
        "text_model.**",
        "logit_scale",
        "logit_bias",
        "*_projection.weight",
        "**.position_ids",
    )  # not vision

    def __init__(self, c: VisionConfig, feature_layer: int, feature_select: str):
        super().__init__()
        states = range(c.hf["num_hidden_layers"] + 1)
        need(
            -len(states) <= feature_layer < len(states),
            "model.feature_layer",
            feature_layer,
            f"-1 to {states[-1]}",
        )
        self.config, self.rename, self.spares, self.gradient_checkpointing = c, c.rename, {}, False
        self.processor, self.preprocess, self.skip = (
            c.processor,
            c.processor,
            int(feature_select == "patch"),
        )
        self.embeddings, self.pre_layrnorm = (
            Embeddings(c),
            c.pre_norm(c.width, c.hf["layer_norm_eps"]),
        )
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(Block(c) for _ in range(states[feature_layer]))}
        )

    blocks = property(lambda self: self.encoder["layers"])

    @torch.no_grad()
    def init_positions(self):
        """Random positions, class token and registers of std C**-0.5; LayerScale as configured."""
        for p in (
            self.embeddings.position_embedding.weight,
            *self.embeddings.parameters(recurse=False),
        ):
            p.normal_(0.0, self.config.width**-0.5)
        for p in (p for name, p in self.named_parameters() if name.endswith(".lambda1")):
            p.fill_(self.config.hf["layerscale_value"])

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.pre_layrnorm(
            self.embeddings(pixels.to(self.embeddings.patch_embedding.weight.dtype))
        )
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x[:, self.skip :]


class Mixture(nn.Module):
    """CLIP and DINOv2 on the same pixels (Tong et al., 2024): (N, 3, H, W) -> (N, 2, n, C), CLIP's features first."""

    def __init__(self, c: VisionConfig, feature_layer: int, feature_select: str):
        super().__init__()
        self.config, self.spares, self.gradient_checkpointing = c, {}, False
        self.processor = self.preprocess = c.processor
        self.clip, self.dinov2 = (
            VisionEncoder(t, feature_layer, feature_select) for t in (c, c.beside)
        )
        self.rename = tuple(
            (f"{n}.{a}", f"{n}.{b}") for n, t in self.named_children() for a, b in t.rename
        )
        self.spare = tuple(f"{n}.{glob}" for n, t in self.named_children() for glob in t.spare)
        self.ignore = tuple(f"{n}.{glob}" for n, t in self.named_children() for glob in t.ignore)

    @property
    def blocks(self) -> nn.ModuleList:
        """Item i holds block i of both towers."""
        return nn.ModuleList(
            nn.ModuleList(filter(None, p))
            for p in zip_longest(self.clip.blocks, self.dinov2.blocks)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        self.clip.gradient_checkpointing = self.dinov2.gradient_checkpointing = (
            self.gradient_checkpointing
        )
        return torch.stack([self.clip(pixels), self.dinov2(pixels)], 1)


DINOV2 = tuple((f"encoder.layer.*.{theirs}.*", f"encoder.layers.*.{ours}.*") for theirs, ours in (
    *((f"attention.attention.{name}", f"self_attn.{name[0]}_proj") for name in ("query", "key", "value")),
    ("attention.output.dense", "self_attn.out_proj"), ("norm1", "layer_norm1"), ("norm2", "layer_norm2"),
)) + (
    ("encoder.layer.*.**", "encoder.layers.*.**"), ("layernorm.*", "post_layernorm.*"),
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding.weight"),
    ("embeddings.patch_embeddings.projection.*", "embeddings.patch_embedding.*"),
)  # fmt: skip


def _dinov2(c: dict, _: int) -> VisionConfig:
    hidden, registers = int(c["hidden_size"] * c["mlp_ratio"]), c.get("num_register_tokens")
    gated = {"hidden_act": "swiglu", "intermediate_size": (int(hidden * 2 / 3) + 7) // 8 * 8}
    c = c | (gated if c.get("use_swiglu_ffn") else {"intermediate_size": hidden})
    leading = {"class_embedding": (1, 1)} | (
        {} if registers is None else {"register_tokens": (1, registers)}
    )
    transform = ImageProcessor(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return VisionConfig(c, transform, leading, nn.Identity, DINOV2, registers is not None)


# What config.json may leave out, and what makes the config of it.
COMMON = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 3072,
          "image_size": 224, "patch_size": 16, "initializer_range": 0.02, "layer_norm_eps": 1e-6}  # fmt: skip
DINO = {"hidden_act": "gelu", "mlp_ratio": 4, "layerscale_value": 1.0}
CLIP_STATS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FAMILIES: dict[str, tuple[dict, Callable[[dict, int], VisionConfig]]] = {
    "clip_vision_model": ({"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32}, lambda c, n:
        VisionConfig(c, ImageProcessor(n, n, *CLIP_STATS), {"class_embedding": ()}, LayerNorm)),
    "siglip_vision_model": ({"hidden_act": "gelu_pytorch_tanh"}, lambda c, n: VisionConfig(c, ImageProcessor(n))),
    "dinov2": (DINO | {"patch_size": 14}, _dinov2),
    "dinov2_with_registers": (DINO | {"num_register_tokens": 4}, _dinov2),
}  # fmt: skip


def vision_config(
    hf: dict, preprocessor: dict | None = None, where: object = "vision_config"
) -> VisionConfig:
    """An encoder's config, from its config.json and image processor. UserError for what we cannot reproduce."""
    kind = hf.get("model_type")
    if kind == "mof":  # TinyLLaVA Factory's mixture of features: DINOv2 sees CLIP's pictures
        clip = vision_config(hf.get("clip", {}), preprocessor, f"{where}:clip")
        dinov2 = vision_config(hf.get("dinov2", {}), clip.processor.to_hf(), f"{where}:dinov2")
        sizes = [(c.width, c.tokens("patch")) for c in (clip, dinov2)]
        need(
            sizes[0] == sizes[1],
            f"{where}:(width, tokens)",
            sizes,
            "take a CLIP and a DINOv2 with equal ones",
        )
        return replace(clip, beside=dinov2)
    if kind in ("clip", "siglip"):  # a full checkpoint: its text half is not ours to load
        hf, kind = hf.get("vision_config", {}), f"{kind}_vision_model"
    need(
        kind in FAMILIES,
        f"{where}:model_type",
        kind,
        f"one of {', '.join(FAMILIES)} (no NaFlex: its shapes vary)",
    )
    c = (
        COMMON
        | FAMILIES[kind][0]
        | {k: v for k, v in hf.items() if v is not None}
        | {"model_type": kind}
    )
    only = {"hidden_act": [*ACTIVATIONS], "num_channels": [3], "qkv_bias": [True], "image_size": range(1, 9999),
            "patch_size": range(1, 9999), "hidden_size": range(0, 99999, c["num_attention_heads"]),
            "head_dim": [c["hidden_size"] // c["num_attention_heads"]]}  # fmt: skip
    for key, values in only.items():
        need(c.get(key, values[0]) in values, f"{where}:{key}", c.get(key), f"one of {values}")
    config = FAMILIES[kind][1](c, c["image_size"])
    transform = ImageProcessor.from_hf(
        preprocessor or {}, config.processor, f"{where}:image processor"
    )
    fix = f"the image processor makes {transform.side}: give the one that belongs to this encoder"
    need(
        config.antialias is not None or transform.side == c["image_size"],
        f"{where}:image_size",
        c["image_size"],
        fix,
    )
    return replace(config, processor=transform)


def build_encoder(
    config: VisionConfig, feature_layer: int = -2, feature_select: str = "patch"
) -> nn.Module:
    """The module of a config, on the meta device where that is the default; see VisionEncoder and Mixture."""
    return (Mixture if config.beside else VisionEncoder)(config, feature_layer, feature_select)


def load_encoder(
    path, dtype=None, device="cpu", feature_layer=-2, feature_select="patch", allow_pickle=False
):
    """A pretrained encoder from a Hugging Face folder or id. Raises UserError as weights.load does."""
    folder = resolve(str(path), allow_pickle=allow_pickle)
    hf, preprocessor = read_json(folder / "config.json"), read_preprocessor(folder)
    with weights.empty():
        encoder = build_encoder(
            vision_config(hf, preprocessor, folder / "config.json"), feature_layer, feature_select
        )
    weights.load(
        encoder,
        weights.Checkpoint(folder, allow_pickle),
        encoder.rename,
        "",
        dtype,
        device,
        encoder.ignore,
    )
    return encoder
