"""Connectors: from the encoder's tokens to the language model's width.

    build_connector("mlp2x_gelu", vision_dim=1152, text_dim=2560)
    build_connector("resampler", vision_dim=1152, text_dim=2560, num_queries=64)

N images, n tokens per image, C vision width, D text width, W width inside a Q-Former, H heads, d head width.
Parameter names are TinyLLaVA's. A connector is one entry of CONNECTORS: its module, its options, its token count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError
from kernels.attention import attention
from kernels.glu import gelu
from layers import GELU, LayerNorm
from packing import ItemShape


def identity(vision_dim: int, text_dim: int) -> nn.Module:
    if vision_dim != text_dim:
        raise UserError(
            "model.connector", f"identity of widths {vision_dim} and {text_dim}", "use linear"
        )
    return nn.Identity()


def mlp(vision_dim: int, text_dim: int, depth: int = 2) -> nn.Module:
    """LLaVA-1.5's connector: `depth` linears with GELU between them."""
    layers: list[nn.Module] = [nn.Linear(vision_dim, text_dim)]
    for _ in range(depth - 1):
        layers += [GELU(), nn.Linear(text_dim, text_dim)]
    return nn.Sequential(*layers)


class MixtureMLP(nn.Module):
    """Interleaved mixture of features (Tong et al., 2024): an MLP per encoder, tokens of CLIP and DINOv2 in turn."""

    def __init__(self, vision_dim: int, text_dim: int):
        super().__init__()
        self.clip, self.dinov2 = mlp(vision_dim, text_dim), mlp(vision_dim, text_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 2, n, C), CLIP before DINOv2 -> (N, 2n, D): CLIP's tokens at even places, DINOv2's at odd ones."""
        clip, dinov2 = x.unbind(1)
        return torch.stack([self.clip(clip), self.dinov2(dinov2)], 2).flatten(1, 2)


# ---------------------------------------------------------------------------------------------- resampler


class PerceiverAttention(nn.Module):
    """Latents attend to the tokens and to themselves, both normalised first (Flamingo; Alayrac et al., 2022)."""

    def __init__(self, width: int, heads: int = 8, head_width: int = 64):
        super().__init__()
        self.heads, inner = heads, heads * head_width
        self.norm_media, self.norm_latents = LayerNorm(width), LayerNorm(width)
        self.to_q, self.to_kv = (
            nn.Linear(width, inner, bias=False),
            nn.Linear(width, 2 * inner, bias=False),
        )
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """Tokens (N, n, D) and latents (N, m, D) -> what to add to the latents."""
        x, latents = self.norm_media(x), self.norm_latents(latents)
        k, v = self.to_kv(torch.cat([x, latents], 1)).chunk(2, -1)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)) for t in (self.to_q(latents), k, v)
        )  # (N, m or n+m, H, d)
        return self.to_out(attention(q, k, v, causal=False).flatten(2))


def feed_forward(width: int) -> nn.Module:
    up, down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
    return nn.Sequential(LayerNorm(width), up, GELU(), down)


class Resampler(nn.Module):
    """TinyLLaVA's Perceiver resampler: `num_queries` learnt latents read an image's tokens, however many there are."""

    def __init__(self, vision_dim: int, text_dim: int, num_queries: int, num_resampler_layers: int):
        super().__init__()
        self.linear = nn.Linear(vision_dim, text_dim)
        self.latents = nn.Parameter(nn.init.normal_(torch.empty(num_queries, text_dim)))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(text_dim), feed_forward(text_dim)])
            for _ in range(num_resampler_layers)
        )
        self.norm = LayerNorm(text_dim)

    def read(self, x: Tensor) -> Tensor:
        """Tokens of the text's width (N, n, D) -> the latents after they read them (N, m, D)."""
        latents = self.latents.expand(len(x), -1, -1)
        for attend, mlp in self.layers:
            latents = latents + attend(x, latents)
            latents = latents + mlp(latents)
        return self.norm(latents)

    def forward(self, x: Tensor) -> Tensor:
        """(N, n, C) -> (N, m, D)."""
        return self.read(self.linear(x))


def sinusoids(x: Tensor) -> Tensor:
    """Vaswani et al.'s positions for tokens (N, n, D): sine and cosine in turn, (n, D)."""
    n, width = x.shape[1:]
    frequency = 10000 ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angle = torch.arange(n, device=x.device)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width].to(x.dtype)


class NaiveResampler(Resampler):
    """TinyLLaVA-Video's baseline: the latents read all frames' tokens at once, each marked with its position."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, n, C) -> (N, m, D)."""
        x = self.linear(x)
        return self.read(x + sinusoids(x))


class GroupResampler(Resampler):
    """TinyLLaVA-Video's: `group` stretches of the frames' tokens, each read by the same few latents.

    Where the tokens do not divide evenly the first stretches are one token longer. What comes out is marked with its
    position.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        num_queries: int,
        num_resampler_layers: int,
        group: int,
    ):
        if num_queries % group:
            raise UserError("model.connector_options.group", f"{group} do not divide num_queries {num_queries}",
                            "choose a divisor")  # fmt: skip
        super().__init__(vision_dim, text_dim, num_queries // group, num_resampler_layers)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """(N, n, C) -> (N, m, D); n is at least `group`."""
        x = self.linear(x)
        size, longer = divmod(x.size(1), self.group)
        stretches = (
            x[:, : longer * (size + 1)].unflatten(1, (longer, size + 1)),
            x[:, longer * (size + 1) :],
        )
        stretches = stretches[0], stretches[1].unflatten(1, (self.group - longer, size))
        latents = torch.cat(
            [self.read(s.flatten(0, 1)).view(len(x), -1, x.size(-1)) for s in stretches], 1
        )
        return latents + sinusoids(latents)


# ----------------------------------------------------------------------------------------------- Q-Former

BERT_EPS = 1e-12
BERT_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}


class BertOutput(nn.Module):
    """BERT normalises after it adds: LayerNorm(dense(x) + residual)."""

    def __init__(self, inner: int, width: int):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inner, width), LayerNorm(width, BERT_EPS)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class BertAttention(nn.Module):
    def __init__(self, width: int, heads: int, source_width: int):
        super().__init__()
        self.heads = heads
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                **{n: nn.Linear(source_width, width) for n in ("key", "value")},
            }
        )
        self.output = BertOutput(width, width)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Queries x (N, m, W) attend to source (N, n, its width) -> (N, m, W), residual and norm included."""
        project = self.self
        q, k, v = project["query"](x), project["key"](source), project["value"](source)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        # Not the fused attention: queries of nearly equal entries, normalised, make this connector so sensitive to
        # rounding that another order of sums alone moves its output by 1e-4.
        scores = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5
        return self.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), x)


class BertLayer(nn.Module):
    """A BERT layer's query branch (the text branch is never used with images and so not built)."""

    def __init__(self, width: int, heads: int, intermediate: int):
        super().__init__()
        self.attention = BertAttention(width, heads, width)
        self.intermediate_query = nn.ModuleDict({"dense": nn.Linear(width, intermediate)})
        self.output_query = BertOutput(intermediate, width)

    def mlp(self, x: Tensor) -> Tensor:
        return self.output_query(gelu(self.intermediate_query["dense"](x), "gelu"), x)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        return self.mlp(self.attention(x, x))


class CrossLayer(BertLayer):
    """The same with attention to the image's features in between."""

    def __init__(self, width: int, heads: int, intermediate: int, vision_dim: int):
        super().__init__(width, heads, intermediate)
        self.crossattention = BertAttention(width, heads, vision_dim)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        return self.mlp(self.crossattention(self.attention(x, x), features))


class QFormer(nn.Module):
    """BLIP-2's Q-Former (Li et al., 2023) as TinyLLaVA uses it: learnt queries through a BERT that sees the image.

    Every second layer, the first included, attends to the image. The queries are normalised without a weight; there
    is no dropout. BERT's table of positions lies in files and is never read: it is kept for saving.
    """

    spare = ("bert.embeddings.position_ids",)

    def __init__(
        self, vision_dim: int, text_dim: int, num_queries: int, hidden_size: int, num_hidden_layers: int,
        num_attention_heads: int, intermediate_size: int,
    ):  # fmt: skip
        super().__init__()
        if hidden_size % num_attention_heads:
            where, what = (
                "num_attention_heads",
                f"{num_attention_heads} do not divide hidden_size {hidden_size}",
            )
            raise UserError(f"model.connector_options.{where}", what, "choose a divisor")
        sizes = hidden_size, num_attention_heads, intermediate_size
        self.query_tokens = nn.Parameter(
            nn.init.normal_(torch.empty(1, num_queries, hidden_size), std=0.02)
        )
        self.bert = nn.Module()
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = nn.ModuleList(
            BertLayer(*sizes) if i % 2 else CrossLayer(*sizes, vision_dim)
            for i in range(num_hidden_layers)
        )
        self.projector = nn.Linear(hidden_size, text_dim)
        self.spares: dict[str, Tensor] = {}

    def forward(self, features: Tensor) -> Tensor:
        """(N, n, C) -> (N, m, D)."""
        x = F.layer_norm(self.query_tokens, self.query_tokens.shape[-1:], eps=BERT_EPS)
        x = x.expand(len(features), -1, -1)
        for layer in self.bert.encoder.layer:
            x = layer(x, features)
        return self.projector(x)


# ------------------------------------------------------------------------------------------------ the menu


class Connector(NamedTuple):
    build: Callable[..., nn.Module]  # (vision_dim, text_dim, **options)
    options: dict[str, int] = {}  # names and defaults
    tokens: Callable[..., int] = lambda n, **options: (
        n
    )  # positions in the text, of n encoder tokens (per encoder)
    mean: bool = False  # of an item with several views their mean is taken, else all their tokens


def _queries(n: int, num_queries: int, **options: int) -> int:
    return num_queries


CONNECTORS = {
    "identity": Connector(identity),
    "linear": Connector(nn.Linear),
    **{f"mlp{depth}x_gelu": Connector(partial(mlp, depth=depth)) for depth in range(1, 9)},
    "mean_mlp2x_gelu": Connector(mlp, mean=True),
    "mof_mlp": Connector(MixtureMLP, tokens=lambda n: 2 * n),
    "resampler": Connector(Resampler, {"num_queries": 128, "num_resampler_layers": 3}, _queries),
    "naiveresampler": Connector(
        NaiveResampler, {"num_queries": 512, "num_resampler_layers": 3}, _queries
    ),
    "groupresampler": Connector(
        GroupResampler, {"num_queries": 512, "num_resampler_layers": 3, "group": 16}, _queries
    ),
    "qformer": Connector(QFormer, {"num_queries": 128, **BERT_BASE}, _queries),
}


def _choose(spec: str, options: dict[str, int]) -> tuple[Connector, dict[str, int]]:
    """The entry of an exact name, and its options with the defaults filled in."""
    if spec not in CONNECTORS:
        raise UserError("model.connector", f"unknown {spec!r}", f"one of {', '.join(CONNECTORS)}")
    connector = CONNECTORS[spec]
    for name, value in options.items():
        where = f"model.connector_options.{name}"
        if name not in connector.options:
            known = (
                f"one of {', '.join(connector.options)}"
                if connector.options
                else "remove it, there is none"
            )
            raise UserError(where, f"unknown to {spec}", known)
        if type(value) is not int or value < 1:
            raise UserError(
                where,
                f"{value!r} is not a positive integer",
                f"the default is {connector.options[name]}",
            )
    return connector, connector.options | options


def build_connector(spec: str, vision_dim: int, text_dim: int, **options: int) -> nn.Module:
    """A module (N, n, C) -> (N, m, D); mof_mlp takes (N, 2, n, C). `spec` is an exact name of CONNECTORS.
    Raises UserError for another name, an unknown option, or a value that is no positive integer."""
    connector, options = _choose(spec, options)
    return connector.build(vision_dim, text_dim, **options)


def connector_tokens(spec: str, tokens: int, views: int = 1, **options: int) -> int:
    """How many positions an item takes in the text: `views` of `tokens` encoder tokens each (of each encoder, in a
    mixture). Raises UserError as build_connector does."""
    connector, options = _choose(spec, options)
    return connector.tokens(tokens if connector.mean else views * tokens, **options)


# ------------------------------------------------------------------------------------------ several views


def anyres_order(shape: ItemShape, n: int) -> Tensor:
    """Where the tokens of an anyres item come from, of `views` times n and one separator behind them: the first view's,
    then those of the tiles as of one large picture, row by row without its borders, the separator behind each row."""
    side = isqrt(n)
    tiles = torch.arange(n, shape.views * n).view(shape.rows, shape.columns, side, side)
    large = tiles.transpose(1, 2).reshape(shape.rows * side, shape.columns * side)
    large = large[shape.top : len(large) - shape.top, shape.left : large.size(1) - shape.left]
    return torch.cat([torch.arange(n), F.pad(large, (0, 1), value=shape.views * n).flatten()])


def join_views(spec: str, x: Tensor) -> Tensor:
    """The views of items (N, v, n, C) as their connector reads them: (N, v n, C), or the mean (N, n, C). Of a mixture
    (N, v, 2, n, C) -> (N, 2, v n, C)."""
    return x.mean(1) if CONNECTORS[spec].mean else x.transpose(1, -3).flatten(-3, -2)


class Separated(nn.Sequential):
    """An MLP of connectors.py and anyres's separator: (N, n, C) -> (N, n + 1, D), of each item the last."""

    def __init__(self, layers: nn.Module):
        if not isinstance(layers, nn.Sequential):
            raise UserError(
                "model.image_mode", "anyres takes a connector mlpNx_gelu", "use one, or tiles"
            )
        super().__init__(*layers)
        width = layers[-1].out_features
        self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), self.image_newline.expand(len(x), 1, -1)], 1)
