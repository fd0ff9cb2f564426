"""Vision encoders: one ViT that is CLIP or SigLIP, and the image transform each was trained with.

    encoder = load_encoder("openai/clip-vit-large-patch14-336")       # a Hugging Face folder or id
    features = encoder(encoder.preprocess(pil_image)[None])           # (1, 3, H, W) -> (1, n, C)

N images, H x W pixels, p patch size, n tokens per image, C width, h heads, d head width.
Names are Hugging Face's (CLIP's `pre_layrnorm` included), so the rename table is one line.
A family is one entry of FAMILIES, keyed by config.json's exact model_type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import weights
from config import UserError
from kernels.attention import attention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class ImageTransform:
    """A published image processor as numbers. Small and picklable: data workers carry it without the weights."""

    size: int = 224  # pixels: the square's side, or the shortest side where crop is set
    crop: int = 0  # 0 = resize straight to a size x size square; else resize the shortest side, cut the centre
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = int(Image.Resampling.BICUBIC)

    @property
    def side(self) -> int:
        return self.crop or self.size

    @classmethod
    def from_hf(cls, config: dict, default: ImageTransform) -> ImageTransform:
        """From preprocessor_config.json (integer or dict sizes); an absent file gives the family's default."""
        if not config:
            return default

        def pixels(value, fallback: int) -> int:
            if isinstance(value, dict):
                return value.get("shortest_edge") or value.get("height") or fallback
            return value or fallback

        crops = config.get("do_center_crop", False)
        return cls(
            size=pixels(config.get("size"), default.size),
            crop=pixels(config.get("crop_size"), default.side) if crops else 0,
            mean=tuple(config.get("image_mean", default.mean)),
            std=tuple(config.get("image_std", default.std)),
            resample=config.get("resample", default.resample),
        )

    def to_hf(self) -> dict:
        """preprocessor_config.json in the layout that Hugging Face's processors read."""
        square = {"height": self.side, "width": self.side}
        return {
            "image_processor_type": "CLIPImageProcessor" if self.crop else "SiglipImageProcessor",
            "do_resize": True,
            "size": {"shortest_edge": self.size} if self.crop else square,
            "do_center_crop": bool(self.crop),
            **({"crop_size": square} if self.crop else {}),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "resample": int(self.resample),
        }

    def __call__(self, image: Image.Image, image_mode: str = "square") -> Tensor:
        """An RGB picture -> (3, side, side) float32; `pad` first makes it a square with the mean colour."""
        image = image.convert("RGB")
        if image_mode == "pad" and image.width != image.height:
            side = max(image.size)
            square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in self.mean))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        if self.crop:
            short, long = sorted(image.size)
            other = int(self.size * long / short)
            image = image.resize(
                (self.size, other) if image.width <= image.height else (other, self.size), self.resample
            )
            left, top = (image.width - self.crop) // 2, (image.height - self.crop) // 2
            image = image.crop((left, top, left + self.crop, top + self.crop))
        else:
            image = image.resize((self.size, self.size), self.resample)
        pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
        pixels = (pixels - np.float32(self.mean)) / np.float32(self.std)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


@dataclass(frozen=True)
class VisionConfig:
    model_type: str
    width: int
    heads: int
    intermediate: int
    layers: int
    patch: int
    image: int
    eps: float
    activation: str
    class_token: bool
    patch_bias: bool
    pre_norm: bool
    transform: ImageTransform
    init_std: float = 0.02

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    def tokens(self, select: str) -> int:
        """Tokens per image: all of them, less the first one for `patch` (also where it is no class token)."""
        return self.patches + self.class_token - (select == "patch")


def _clip(c: dict, prep: dict) -> VisionConfig:
    image = c.get("image_size", 224)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return _config(c, prep, "quick_gelu", 1e-5, 32, True, ImageTransform(image, image, mean, std))


def _siglip(c: dict, prep: dict) -> VisionConfig:
    return _config(c, prep, "gelu_pytorch_tanh", 1e-6, 16, False, ImageTransform(c.get("image_size", 224)))


def _config(c: dict, prep: dict, act: str, eps: float, patch: int, cls: bool, transform: ImageTransform):
    return VisionConfig(
        model_type=c["model_type"], width=c.get("hidden_size", 768), heads=c.get("num_attention_heads", 12),
        intermediate=c.get("intermediate_size", 3072), layers=c.get("num_hidden_layers", 12),
        patch=c.get("patch_size", patch), image=c.get("image_size", 224), eps=c.get("layer_norm_eps", eps),
        activation=c.get("hidden_act", act), class_token=cls, patch_bias=not cls, pre_norm=cls,
        transform=ImageTransform.from_hf(prep, transform), init_std=c.get("initializer_range", 0.02),
    )  # fmt: skip


FAMILIES: dict[str, Callable[[dict, dict], VisionConfig]] = {
    "clip_vision_model": _clip,
    "siglip_vision_model": _siglip,
}
# A full CLIP or SigLIP checkpoint keeps its vision half in `vision_config`; the text half is not ours to load.
TWO_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
RENAME: weights.Table = (("vision_model.**", "**"),)
TEXT_HALF = ("text_model.**", "logit_scale", "logit_bias", "visual_projection.weight", "text_projection.weight",
             "**.position_ids")  # fmt: skip


def vision_config(hf: dict, preprocessor: dict | None = None, where: object = "vision_config") -> VisionConfig:
    """The numbers of an encoder from its config.json (and preprocessor_config.json).

    Raises UserError for a model_type that is not in FAMILIES or an activation that is not in ACTIVATIONS.
    """
    if hf.get("model_type") in TWO_TOWERS:
        hf = hf.get("vision_config", {}) | {"model_type": TWO_TOWERS[hf["model_type"]]}
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"{where}:model_type",
            f"{kind!r} is no vision encoder known here",
            f"one of {', '.join(FAMILIES)}",
        )
    config = FAMILIES[kind](hf, preprocessor or {})
    if config.activation not in ACTIVATIONS:
        raise UserError(f"{where}:hidden_act", repr(config.activation), f"one of {', '.join(ACTIVATIONS)}")
    if config.transform.side != config.image:
        raise UserError(f"{where}:image_size", f"{config.image}, but the processor makes {config.transform.side}",
                        "use the preprocessor_config.json that belongs to this encoder")  # fmt: skip
    return config


class Attention(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.heads = c.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(c.width, c.width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, causal=False).flatten(2))


class MLP(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.width, c.intermediate), nn.Linear(c.intermediate, c.width)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(c.width, c.eps), nn.LayerNorm(c.width, c.eps)
        self.self_attn, self.mlp = Attention(c), MLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, c.width, c.patch, c.patch, bias=c.patch_bias)
        self.class_embedding = nn.Parameter(torch.zeros(c.width)) if c.class_token else None
        self.position_embedding = nn.Embedding(c.patches + c.class_token, c.width)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (N, n, C), patches row by row
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        return x + self.position_embedding.weight


class VisionEncoder(nn.Module):
    """Vision Transformer up to the chosen feature layer.

    feature_layer counts Hugging Face's `hidden_states`, which start with the embeddings: -2 is the input of the
    last block and gets no final norm. Blocks behind it, the final norm and SigLIP's pooling head are never run;
    they are not built, their tensors wait in `spares` so that a checkpoint goes out as complete as it came in.
    """

    spare = ("encoder.layers.*.**", "post_layernorm.*", "head.**")

    def __init__(self, c: VisionConfig, feature_layer: int = -2, feature_select: str = "patch"):
        super().__init__()
        self.config, self.select = c, feature_select
        depth = feature_layer if feature_layer >= 0 else c.layers + 1 + feature_layer
        if not 0 <= depth <= c.layers:
            raise UserError(
                "model.feature_layer", f"{feature_layer} of {c.layers} blocks", "use -2, or -1 for the last"
            )
        self.embeddings = Embeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.width, c.eps) if c.pre_norm else nn.Identity()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Block(c) for _ in range(depth))
        self.gradient_checkpointing = False
        self.spares: dict[str, Tensor] = {}

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.layers

    @property
    def transform(self) -> ImageTransform:
        return self.config.transform

    def preprocess(self, image: Image.Image, image_mode: str = "square") -> Tensor:
        """A picture -> (3, H, W) float32, as the published image processor makes it."""
        return self.transform(image, image_mode)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, n, C)."""
        x = self.pre_layrnorm(self.embeddings(pixels.to(self.embeddings.patch_embedding.weight.dtype)))
        for block in self.encoder.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x[:, 1:] if self.select == "patch" else x

    def to_hf(self) -> dict:
        """config.json of this encoder alone."""
        c = self.config
        return {
            "model_type": c.model_type, "hidden_size": c.width, "num_attention_heads": c.heads,
            "intermediate_size": c.intermediate, "num_hidden_layers": c.layers, "patch_size": c.patch,
            "image_size": c.image, "layer_norm_eps": c.eps, "hidden_act": c.activation, "initializer_range": c.init_std,
        }  # fmt: skip


def load_encoder(path: str, dtype=None, device="cpu", feature_layer: int = -2, feature_select: str = "patch"):
    """A pretrained encoder from a Hugging Face folder or id. Raises UserError as weights.load does."""
    folder = weights.resolve(str(path))
    hf = weights.read_json(folder / "config.json")
    preprocessor = weights.read_json(folder / "preprocessor_config.json", optional=True)
    with torch.device("meta"):
        encoder = VisionEncoder(vision_config(hf, preprocessor, folder / "config.json"), feature_layer, feature_select)
    weights.load(encoder, weights.Checkpoint(folder), RENAME, dtype=dtype, device=device, ignore=TEXT_HALF)
    return encoder
