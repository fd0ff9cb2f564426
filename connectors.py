"""Connectors: from the vision encoder's tokens to the width of the language model.

    connector = build_connector("mlp2x_gelu", vision_dim=1152, text_dim=2560)
    connector = build_connector("resampler", vision_dim=1152, text_dim=2560, num_queries=64)
    features = connector(tokens)                                   # (N, n, C) -> (N, m, D)

To add a connector, write its module anywhere above the menu and give the menu one entry. Nothing
else in the project changes: training, inference, checkpoints and tests look the entry up.

    class Average(nn.Module):
        def __init__(self, vision_dim: int, text_dim: int, every: int): ...
        def forward(self, x: Tensor) -> Tensor: ...     # (N, n, C) -> (N, n // every, D)

    def one_of_every(n: int, every: int) -> int:
        return n // every

    CONNECTORS = {
        ...
        "average": Connector(Average, options={"every": 4}, tokens=one_of_every),
    }

A recipe then says connector = "average" and, for another size, connector_options = {every = 2}.

In the order of the file:

    identity, mlp, MixtureMLP            a token in, a token out
    MLPWithNewline, anyres_order         LLaVA-NeXT's: the tokens of an MLP as one large picture
    Resampler, NaiveResampler,           learnt latents read the tokens, however many there are
        GroupResampler
    QFormer                              learnt queries read the tokens, in a BERT
    Connector, CONNECTORS                the menu: name -> module, options, number of tokens
    build_connector, connector_tokens    what the rest of the code calls
    join_views                           the views of one item, as its connector reads them

N images, n tokens in and m tokens out per image, C vision width, D text width, W width inside a
Q-Former, v views, d width of a head, s stretches of a group resampler. Parameters have TinyLLaVA's
names.
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

# ------------------------------------------------------------------------------------------- MLPs


def identity(vision_dim: int, text_dim: int) -> nn.Module:
    """Return a module that changes nothing. Raises UserError unless the widths are equal."""
    if vision_dim != text_dim:
        what = f"identity of widths {vision_dim} and {text_dim}"
        raise UserError("model.connector", what, "use linear")
    return nn.Identity()


def mlp(vision_dim: int, text_dim: int, depth: int = 2) -> nn.Sequential:
    """Return `depth` linears with GELU between them; two are LLaVA-1.5's (Liu et al., 2023)."""
    layers = [nn.Linear(vision_dim, text_dim)]

    # The first linear changes the width, the others keep it.
    for _ in range(depth - 1):
        layers.append(GELU())
        layers.append(nn.Linear(text_dim, text_dim))
    return nn.Sequential(*layers)


class MixtureMLP(nn.Module):
    """Interleaved mixture of features (Tong et al., 2024): an MLP for CLIP and one for DINOv2."""

    def __init__(self, vision_dim: int, text_dim: int):
        super().__init__()
        self.clip = mlp(vision_dim, text_dim)
        self.dinov2 = mlp(vision_dim, text_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, 2n, D) of (N, 2, n, C), which holds CLIP's tokens before DINOv2's.

        The tokens alternate: CLIP's have even places, DINOv2's odd ones.
        """
        clip, dinov2 = x.unbind(1)  # (N, n, C) each
        clip = self.clip(clip)  # (N, n, D)
        dinov2 = self.dinov2(dinov2)

        # Both encoders cut the picture into the same patches, so a pair shows one place.
        pairs = torch.stack([clip, dinov2], dim=2)  # (N, n, 2, D)
        return pairs.flatten(1, 2)


# ----------------------------------------------------------------------------------------- anyres


class MLPWithNewline(nn.Sequential):
    """An MLP, and LLaVA-NeXT's learnt `image_newline` (Liu et al., 2024) behind its tokens.

    In image mode anyres the tiles of an item form one large picture, and the newline ends each row
    of its tokens. anyres_order puts it there.
    """

    def __init__(self, layers: nn.Module):
        """Take over the layers of an MLP. Raises UserError for another connector."""
        if not isinstance(layers, nn.Sequential):
            what = "anyres takes a connector mlpNx_gelu"
            raise UserError("model.image_mode", what, "use one, or tiles")
        super().__init__(*layers)

        # LLaVA-NeXT draws it with standard deviation 1 / sqrt(D).
        width = layers[-1].out_features
        newline = torch.randn(width) * width**-0.5
        self.image_newline = nn.Parameter(newline)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, n + 1, D) of (N, n, C): the MLP's tokens of each image, then the newline."""
        tokens = super().forward(x)  # (N, n, D)
        newline = self.image_newline.expand(len(x), 1, -1)  # (N, 1, D)
        return torch.cat([tokens, newline], dim=1)


def anyres_order(shape: ItemShape, n: int) -> Tensor:
    """Return which tokens stand in the text for an anyres item, as indices in the text's order.

    They are indices into the item's own tokens and one newline behind them: `shape.views` views of
    n tokens each, first the whole picture, then its tiles. The text has the tokens of the first
    view, then those of the tiles as of one large picture: row by row, without the border, and a
    newline behind each row.
    """
    side = isqrt(n)  # a view is a square of tokens
    newline = shape.views * n
    whole = torch.arange(n)

    # The indices of the tiles' tokens, laid out like the picture.
    tiles = torch.arange(n, newline).view(shape.rows, shape.columns, side, side)
    large = tiles.transpose(1, 2)  # (rows, side, columns, side)
    large = large.reshape(shape.rows * side, shape.columns * side)

    # Cut the border off, and end each row.
    height, width = large.shape
    large = large[shape.top : height - shape.top, shape.left : width - shape.left]
    large = F.pad(large, (0, 1), value=newline)
    return torch.cat([whole, large.flatten()])


# ------------------------------------------------------------------------------------- resamplers


class PerceiverAttention(nn.Module):
    """Latents attend to the tokens and to themselves (Flamingo; Alayrac et al., 2022)."""

    def __init__(self, width: int, heads: int = 8, head_width: int = 64):
        super().__init__()
        self.heads = heads
        inner = heads * head_width

        self.norm_media = LayerNorm(width)
        self.norm_latents = LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """Return what to add to the latents (N, m, D) after they read the tokens x (N, n, D)."""
        x = self.norm_media(x)
        latents = self.norm_latents(latents)
        source = torch.cat([x, latents], dim=1)  # (N, n + m, D)

        # Keys and values come from one linear, as in the released weights.
        q = self.to_q(latents)
        k, v = self.to_kv(source).chunk(2, dim=-1)

        q = q.unflatten(-1, (self.heads, -1))  # (N, m, heads, d)
        k = k.unflatten(-1, (self.heads, -1))  # (N, n + m, heads, d)
        v = v.unflatten(-1, (self.heads, -1))

        # One kernel for softmax(q k^T / sqrt(d)) v, head by head.
        attended = attention(q, k, v, causal=False)  # (N, m, heads, d)
        return self.to_out(attended.flatten(2))


def feed_forward(width: int) -> nn.Sequential:
    """Return the Perceiver's MLP: a norm, then two linears with GELU between them."""
    return nn.Sequential(
        LayerNorm(width),
        nn.Linear(width, 4 * width, bias=False),
        GELU(),
        nn.Linear(4 * width, width, bias=False),
    )


class Resampler(nn.Module):
    """TinyLLaVA's Perceiver resampler: `num_queries` learnt latents read an image's tokens.

    The language model gets as many tokens as there are latents, whatever n is.
    """

    def __init__(self, vision_dim: int, text_dim: int, num_queries: int, num_resampler_layers: int):
        super().__init__()
        self.linear = nn.Linear(vision_dim, text_dim)
        latents = nn.init.normal_(torch.empty(num_queries, text_dim))
        self.latents = nn.Parameter(latents)

        # A layer is a pair without a name: `layers.0.0` attends and `layers.0.1` is its MLP.
        self.layers = nn.ModuleList()
        for _ in range(num_resampler_layers):
            layer = [PerceiverAttention(text_dim), feed_forward(text_dim)]
            self.layers.append(nn.ModuleList(layer))
        self.norm = LayerNorm(text_dim)

    def read(self, x: Tensor) -> Tensor:
        """Return the latents (N, m, D) after they read tokens x (N, n, D) of the text's width."""
        latents = self.latents.expand(len(x), -1, -1)  # (N, m, D), the same for every image
        for attend, mlp in self.layers:
            latents = latents + attend(x, latents)
            latents = latents + mlp(latents)

        return self.norm(latents)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, m, D) of (N, n, C)."""
        return self.read(self.linear(x))


def sinusoids(x: Tensor) -> Tensor:
    """Return the positions (n, D) of Vaswani et al. (2017) for tokens x (N, n, D).

    Sine and cosine alternate, and the frequency falls along the width.
    """
    n, width = x.shape[1:]

    # Half as many frequencies as channels, rounded up: 1 for the first, toward 1 / 10000.
    exponent = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
    frequency = 10000**-exponent  # (D / 2,)

    place = torch.arange(n, device=x.device)
    angle = place[:, None] * frequency  # (n, D / 2)
    waves = torch.stack([angle.sin(), angle.cos()], dim=-1)  # (n, D / 2, 2)
    waves = waves.flatten(1)[:, :width]  # of an odd width the last cosine is left out
    return waves.to(x.dtype)


class NaiveResampler(Resampler):
    """TinyLLaVA-Video's baseline: the latents read the tokens of all frames at once.

    Each token is marked with its position.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, m, D) of (N, n, C)."""
        x = self.linear(x)
        return self.read(x + sinusoids(x))


class GroupResampler(Resampler):
    """TinyLLaVA-Video's: `group` stretches of the frames' tokens, each read by the same latents.

    What they become is marked with its position. Where the tokens do not divide evenly, the first
    stretches are one token longer. Raises UserError unless `group` divides `num_queries`.
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
            where = "model.connector_options.group"
            what = f"{group} do not divide num_queries {num_queries}"
            raise UserError(where, what, "choose a divisor")

        # Each stretch is read by all the latents there are, so together they make num_queries.
        latents_per_stretch = num_queries // group
        super().__init__(vision_dim, text_dim, latents_per_stretch, num_resampler_layers)
        self.group = group

    def read_stretches(self, stretches: Tensor) -> Tensor:
        """Return the latents (N, s * m, D) of s stretches (N, s, size, D), each read alone."""
        # Stretches are read as if each were an image, so that none sees another.
        latents = self.read(stretches.flatten(0, 1))  # (N * s, m, D)
        return latents.view(len(stretches), -1, latents.size(-1))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, m, D) of (N, n, C); n is at least `group`."""
        x = self.linear(x)

        # Stretches of one length are read in one batch: first the longer ones, then the rest.
        size, longer = divmod(x.size(1), self.group)
        split = longer * (size + 1)
        first = x[:, :split].unflatten(1, (longer, size + 1))
        rest = x[:, split:].unflatten(1, (self.group - longer, size))
        first = self.read_stretches(first)
        rest = self.read_stretches(rest)

        latents = torch.cat([first, rest], dim=1)  # (N, m, D)
        return latents + sinusoids(latents)


# --------------------------------------------------------------------------------------- Q-Former

# The eps of BERT's norms, and the sizes of bert-base.
BERT_EPS = 1e-12
BERT_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}


class BertOutput(nn.Module):
    """The end of each half of a BERT layer, which normalises after it adds."""

    def __init__(self, inner: int, width: int):
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = LayerNorm(width, BERT_EPS)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return LayerNorm(dense(x) + residual)."""
        return self.LayerNorm(self.dense(x) + residual)


class BertProjections(nn.Module):
    """The three linears of BERT's attention."""

    def __init__(self, width: int, source_width: int):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)


class BertAttention(nn.Module):
    """BERT's attention (Devlin et al., 2018) of queries to a source, which may be themselves."""

    def __init__(self, width: int, heads: int, source_width: int):
        super().__init__()
        self.heads = heads
        self.self = BertProjections(width, source_width)  # called like this in BERT's files
        self.output = BertOutput(width, width)

    def split_heads(self, x: Tensor) -> Tensor:
        """Return (N, heads, n, d) of (N, n, W)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Return (N, m, W) of queries x (N, m, W) that attend to source (N, n, its width)."""
        project = self.self
        q = project.query(x)
        k = project.key(source)
        v = project.value(source)
        q = self.split_heads(q)  # (N, heads, m, d)
        k = self.split_heads(k)  # (N, heads, n, d)
        v = self.split_heads(v)  # (N, heads, n, d)

        # Not the fused attention. The queries' entries are nearly equal before they are normalised,
        # which makes this connector so sensitive to rounding that another order of sums alone
        # moves its output by 1e-4.
        scores = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5  # (N, heads, m, n)
        attended = scores.softmax(-1) @ v  # (N, heads, m, d)
        attended = attended.transpose(1, 2).flatten(2)  # (N, m, W)
        return self.output(attended, x)


class BertIntermediate(nn.Module):
    """The first half of BERT's MLP."""

    def __init__(self, width: int, intermediate: int):
        super().__init__()
        self.dense = nn.Linear(width, intermediate)

    def forward(self, x: Tensor) -> Tensor:
        """Return gelu(dense(x)), with erf."""
        return gelu(self.dense(x), "gelu")


class BertLayer(nn.Module):
    """A BERT layer's query branch. The text branch never meets an image, and so it is not built."""

    def __init__(self, width: int, heads: int, intermediate: int):
        super().__init__()
        self.attention = BertAttention(width, heads, width)
        self.intermediate_query = BertIntermediate(width, intermediate)
        self.output_query = BertOutput(intermediate, width)

    def mlp(self, x: Tensor) -> Tensor:
        """Return the queries x (N, m, W) after the second half of the layer, norm included."""
        hidden = self.intermediate_query(x)  # (N, m, intermediate)
        return self.output_query(hidden, x)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """Return the queries x (N, m, W) after the layer, which does not look at the features."""
        x = self.attention(x, x)
        return self.mlp(x)


class CrossLayer(BertLayer):
    """A BertLayer whose queries also attend to the image, between the attention and the MLP."""

    def __init__(self, width: int, heads: int, intermediate: int, vision_dim: int):
        super().__init__(width, heads, intermediate)
        self.crossattention = BertAttention(width, heads, vision_dim)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """Return the queries x (N, m, W) after they attended to the features (N, n, C)."""
        x = self.attention(x, x)
        x = self.crossattention(x, features)
        return self.mlp(x)


class QFormer(nn.Module):
    """BLIP-2's Q-Former (Li et al., 2023) as TinyLLaVA uses it: learnt queries through a BERT.

    Every second layer, the first included, attends to the image. The queries are normalised
    without a weight, and there is no dropout. Raises UserError unless the heads divide the width.
    """

    # BERT's table of positions lies in files and is never read. It is kept for saving.
    spare = ("bert.embeddings.position_ids",)

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        num_queries: int,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        intermediate_size: int,
    ):
        super().__init__()
        if hidden_size % num_attention_heads:
            where = "model.connector_options.num_attention_heads"
            what = f"{num_attention_heads} do not divide hidden_size {hidden_size}"
            raise UserError(where, what, "choose a divisor")

        queries = nn.init.normal_(torch.empty(1, num_queries, hidden_size), std=0.02)
        self.query_tokens = nn.Parameter(queries)

        # Layers 0, 2, 4, ... attend to the image.
        layers = nn.ModuleList()
        sizes = (hidden_size, num_attention_heads, intermediate_size)
        for i in range(num_hidden_layers):
            if i % 2 == 0:
                layers.append(CrossLayer(*sizes, vision_dim))
            else:
                layers.append(BertLayer(*sizes))

        # Two empty modules give the layers their names in the files, bert.encoder.layer.*.
        self.bert = nn.Module()
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = layers

        self.projector = nn.Linear(hidden_size, text_dim)
        self.spares: dict[str, Tensor] = {}

    def forward(self, features: Tensor) -> Tensor:
        """Return (N, m, D) of (N, n, C)."""
        # The norm has no weight or bias, and is therefore not in the files.
        width = self.query_tokens.size(-1)
        x = F.layer_norm(self.query_tokens, (width,), eps=BERT_EPS)  # (1, m, W)
        x = x.expand(len(features), -1, -1)  # (N, m, W), the same for every image

        for layer in self.bert.encoder.layer:
            x = layer(x, features)

        return self.projector(x)


# --------------------------------------------------------------------------------------- the menu

# How many tokens a connector makes of n: the functions for Connector.tokens. Each is called with
# all of the connector's options, and takes the one that it needs.


def as_many(n: int, **options: int) -> int:
    """Return the number of tokens out of a connector that makes one of each token in."""
    return n


def of_two_encoders(n: int, **options: int) -> int:
    """Return the number of tokens out of a connector of two encoders with n tokens each."""
    return 2 * n


def as_many_as_queries(n: int, num_queries: int, **options: int) -> int:
    """Return the number of tokens out of a connector whose learnt queries read the tokens in."""
    return num_queries


class Connector(NamedTuple):
    """An entry of the menu: how a connector is built, and how many tokens it makes."""

    # Called with (vision_dim, text_dim, **options), it returns a module (N, n, C) -> (N, m, D).
    build: Callable[..., nn.Module]

    # The names of its options and their defaults. All are positive integers, up to LARGEST.
    options: dict[str, int] = {}

    # Called with (n, **options), it returns m. The text is laid out by it before any picture is
    # encoded.
    tokens: Callable[..., int] = as_many

    # Whether it reads the mean of an item's views instead of the tokens of all of them.
    mean: bool = False


# The largest values of options: that of an option with this name, and that of all others.
LARGEST = {"num_resampler_layers": 512, "num_hidden_layers": 512}
LARGEST_SIZE = 2**16

MLPS = {f"mlp{depth}x_gelu": Connector(partial(mlp, depth=depth)) for depth in range(1, 9)}

CONNECTORS = {
    # A token in, a token out.
    "identity": Connector(identity),
    "linear": Connector(nn.Linear),
    **MLPS,
    "mean_mlp2x_gelu": Connector(mlp, mean=True),
    "mof_mlp": Connector(MixtureMLP, tokens=of_two_encoders),
    # As many tokens out as there are queries.
    "resampler": Connector(
        Resampler,
        options={"num_queries": 128, "num_resampler_layers": 3},
        tokens=as_many_as_queries,
    ),
    "naiveresampler": Connector(
        NaiveResampler,
        options={"num_queries": 512, "num_resampler_layers": 3},
        tokens=as_many_as_queries,
    ),
    "groupresampler": Connector(
        GroupResampler,
        options={"num_queries": 512, "num_resampler_layers": 3, "group": 16},
        tokens=as_many_as_queries,
    ),
    "qformer": Connector(
        QFormer,
        options={"num_queries": 128, **BERT_BASE},
        tokens=as_many_as_queries,
    ),
}


# -------------------------------------------------------------- what the rest of the code calls


def _choose(spec: str, options: dict[str, int]) -> tuple[Connector, dict[str, int]]:
    """Return the entry of an exact name, and its options with the defaults filled in."""
    if spec not in CONNECTORS:
        raise UserError("model.connector", f"unknown {spec!r}", f"one of {', '.join(CONNECTORS)}")
    connector = CONNECTORS[spec]

    for name, value in options.items():
        where = f"model.connector_options.{name}"
        if name not in connector.options:
            fix = "remove it, there is none"
            if connector.options:
                fix = f"one of {', '.join(connector.options)}"
            raise UserError(where, f"unknown to {spec}", fix)

        # Not isinstance: True is an int, too.
        fix = f"the default is {connector.options[name]}"
        if type(value) is not int or value < 1:
            raise UserError(where, f"{value!r} is not a positive integer", fix)
        largest = LARGEST.get(name, LARGEST_SIZE)
        if value > largest:
            raise UserError(where, f"{value!r} is more than {largest}", fix)

    # Options on the right of | win over the defaults.
    return connector, connector.options | options


def build_connector(spec: str, vision_dim: int, text_dim: int, **options: int) -> nn.Module:
    """Return a module (N, n, C) -> (N, m, D); mof_mlp takes (N, 2, n, C).

    spec: an exact name of CONNECTORS. Raises UserError for another name, for an unknown option,
    and for a value that is no positive integer.
    """
    connector, options = _choose(spec, options)
    return connector.build(vision_dim, text_dim, **options)


def connector_tokens(spec: str, tokens: int, views: int = 1, **options: int) -> int:
    """Return how many positions an item takes in the text.

    It has `views` views of `tokens` encoder tokens each; in a mixture, of each encoder. Raises
    UserError as build_connector does.
    """
    connector, options = _choose(spec, options)

    # As in join_views: the mean of the views has the tokens of one view.
    if connector.mean:
        n = tokens
    else:
        n = views * tokens
    return connector.tokens(n, **options)


def join_views(spec: str, x: Tensor) -> Tensor:
    """Return the views of items as their connector reads them.

    x (N, v, n, C) becomes (N, v * n, C), or (N, n, C) where the connector takes the mean; x of a
    mixture (N, v, 2, n, C) becomes (N, 2, v * n, C).
    """
    if CONNECTORS[spec].mean:
        return x.mean(1)

    # In a mixture, the views of one encoder come together.
    is_mixture = x.dim() == 5
    if is_mixture:
        x = x.transpose(1, 2)  # (N, 2, v, n, C)
    return x.flatten(-3, -2)
