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

An entry with spatial=True knows how the tokens of an item lie. It is built with the grid of a view,
(rows, columns), behind the two widths, and reads (N, v, h, w, C). Its `tokens` is called with
(views, grid, **options). Class token and registers are left out. With any_grid=True it also reads
pictures of other grids than the one that it was built with, as a NaFlex has them.

In the order of the file:

    identity, mlp, MixtureMLP            a token in, a token out
    MLPWithNewline, anyres_order         LLaVA-NeXT's: the tokens of an MLP as one large picture
    Resampler, NaiveResampler,           learnt latents read the tokens, however many there are
        GroupResampler
    QFormer                              learnt queries read the tokens, in a BERT
    PixelShuffle, AvgPool, Fourier       the grid of each view made smaller, then an MLP
    CAbstractor                          convolutions and pooling on the grid of each view
    CrossAttention                       learnt queries read each view, with positions, once
    Connector, CONNECTORS                the menu: name -> module, options, number of tokens
    build_connector, connector_tokens    what the rest of the code calls
    join_views                           the views of one item, as its connector reads them

N images, n tokens in and m tokens out per image, C vision width, D text width, W width inside a
Q-Former, v views, d width of a head, s stretches of a group resampler; h x w tokens of a view, M
views of all images, r side of a square of tokens that becomes one. Parameters have TinyLLaVA's
names, those of a C-Abstractor Honeybee's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isqrt, pi
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

    In image modes anyres and anyres_max the tiles of an item form one large picture, and the
    newline ends each row of its tokens (inputs/tiling.py).
    """

    def __init__(self, layers: nn.Module):
        """Take over the layers of an MLP. Raises UserError for another connector."""
        if not isinstance(layers, nn.Sequential):
            what = "anyres takes a connector mlpNx_gelu"
            raise UserError("model.image_mode", what, "use one, or tiles")
        super().__init__(*layers)

        # LLaVA-NeXT draws it with standard deviation 1 / sqrt(D).
        width = layers[-1].out_features
        newline = nn.init.normal_(torch.empty(width))  # weights.empty leaves this out
        self.image_newline = nn.Parameter(newline * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, n + 1, D) of (N, n, C): the MLP's tokens of each image, then the newline."""
        tokens = super().forward(x)  # (N, n, D)
        newline = self.image_newline.expand(len(x), 1, -1)  # (N, 1, D)
        return torch.cat([tokens, newline], dim=1)


def anyres_order(shape: ItemShape, n: int, device: torch.device | str = "cpu") -> Tensor:
    """Return which tokens stand in the text for an anyres item, as indices in the text's order.

    They are indices into the item's own tokens and one newline behind them: `shape.views` views of
    n tokens each, first the whole picture, then its tiles. The text has the tokens of the first
    view, then those of the tiles as of one large picture: row by row, without the border, and a
    newline behind each row.
    """
    side = isqrt(n)  # a view is a square of tokens
    newline = shape.views * n
    whole = torch.arange(n, device=device)

    # The indices of the tiles' tokens, laid out like the picture.
    tiles = torch.arange(n, newline, device=device).view(shape.rows, shape.columns, side, side)
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


# ------------------------------------------------------------------------------- grids of tokens

Grid = tuple[int, int]  # rows and columns of the tokens of a view


class EachView(nn.Module):
    """A spatial connector that reads each view of an item alone, in its method `read`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, v * m, D) of (N, v, h, w, C): the tokens of one view behind those before."""
        tokens = self.read(x.flatten(0, 1))  # (N * v, m, D)
        return tokens.unflatten(0, x.shape[:2]).flatten(1, 2)


def squares(grid: Grid, factor: int) -> Grid:
    """Return rows and columns of the squares of factor x factor tokens that a grid consists of.

    Raises UserError where some would be left over. Idefics3, InternVL and nanoVLM stop there too:
    none of them pads.
    """
    rows, columns = grid
    if rows % factor or columns % factor:
        where = "model.connector_options.factor"
        what = f"{factor} does not divide the {rows} x {columns} tokens of a view"
        divisors = [i for i in range(2, rows + 1) if rows % i == 0 and columns % i == 0]
        fix = f"one of {', '.join(map(str, divisors))}"
        if not divisors:
            fix = "take an encoder with another size of picture or patch"
        raise UserError(where, what, fix)
    return rows // factor, columns // factor


def cut_squares(x: Tensor, factor: int) -> Tensor:
    """Return the squares (M, h / r, w / r, r, r, C) of tokens x (M, h, w, C), with r = factor."""
    x = x.unflatten(2, (-1, factor))  # (M, h, w / r, r, C)
    x = x.unflatten(1, (-1, factor))  # (M, h / r, r, w / r, r, C)
    return x.transpose(2, 3)


class PixelShuffle(EachView):
    """Each square of r x r tokens as one token of r * r * C channels, then linears.

    Channel (i * r + j) * C + c of the token of a square is channel c of the token in row i and
    column j of the square. This is the order of Idefics3 and SmolVLM (Laurencon et al., 2024), of
    nanoVLM, and of InternVL (Chen et al., 2024) with ps_version v2. Its v1 has the same channels,
    but returns the squares column by column; it is not offered.

    mlp_depth 1 is the linear without bias of Idefics3, SmolVLM and nanoVLM. 2 is InternVL's: a
    LayerNorm, then an MLP. Raises UserError as `squares` does.
    """

    def __init__(self, vision_dim: int, text_dim: int, grid: Grid, factor: int, mlp_depth: int):
        super().__init__()
        squares(grid, factor)
        self.factor = factor

        width = vision_dim * factor**2
        if mlp_depth == 1:
            self.proj = nn.Linear(width, text_dim, bias=False)
        else:
            self.proj = nn.Sequential(LayerNorm(width), *mlp(width, text_dim, mlp_depth))

    def read(self, x: Tensor) -> Tensor:
        """Return (M, h * w / r^2, D) of (M, h, w, C)."""
        tokens = cut_squares(x, self.factor).flatten(3)  # (M, h / r, w / r, r * r * C)
        return self.proj(tokens.flatten(1, 2))


class AvgPool(EachView):
    """The mean of each square of r x r tokens, then an MLP.

    The pooling has no parameters, so this is what others compare with (DeCo; Yao et al., 2024).
    Raises UserError as `squares` does.
    """

    def __init__(self, vision_dim: int, text_dim: int, grid: Grid, factor: int, mlp_depth: int):
        super().__init__()
        squares(grid, factor)
        self.factor = factor
        self.proj = mlp(vision_dim, text_dim, mlp_depth)

    def read(self, x: Tensor) -> Tensor:
        """Return (M, h * w / r^2, D) of (M, h, w, C)."""
        pooled = cut_squares(x, self.factor).mean((3, 4))  # (M, h / r, w / r, C)
        return self.proj(pooled.flatten(1, 2))


def low_frequencies(n: int, k: int, like: Tensor) -> Tensor:
    """Return the k lowest rows of the orthonormal DCT-II of n numbers, (k, n).

    Row f is sqrt(2 / n) cos(pi f (2 i + 1) / 2n), and row 0 is divided by sqrt(2).
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    place = torch.arange(n, device=like.device, dtype=dtype)
    frequency = torch.arange(k, device=like.device, dtype=dtype)
    waves = (pi / (2 * n) * frequency[:, None] * (2 * place + 1)).cos()  # (k, n)

    # The constant has twice the energy of a wave.
    scale = torch.full_like(frequency, 2 / n).sqrt()
    scale[0] = n**-0.5
    return scale[:, None] * waves


def low_pass(n: int, k: int, like: Tensor) -> Tensor:
    """Return the matrix (k, n) that takes n numbers to their k lowest frequencies and back to k."""
    back = low_frequencies(k, k, like).T  # of an orthonormal transform the inverse
    return back @ low_frequencies(n, k, like)


def lowest_square(grid: Grid, side: int) -> int:
    """Return how many tokens side x side frequencies are. Raises UserError if a grid has fewer."""
    if side > min(grid):
        rows, columns = grid
        what = f"{side} is more than the {rows} x {columns} tokens of a view have"
        raise UserError("model.connector_options.side", what, f"at most {min(grid)}")
    return side**2


class Fourier(EachView):
    """The lowest frequencies of a view, as a smaller grid, then an MLP (Wang et al., 2025).

    Fourier-VLM takes the two-dimensional DCT-II of the grid, channel by channel, keeps the corner
    of side x side lowest frequencies, and takes the inverse DCT of that size. Both are orthonormal
    and nothing is rescaled, as in the authors' code: a view of equal tokens x becomes tokens
    x * sqrt(h * w) / side. All of this is linear, so it is computed as one small matrix for rows
    and one for columns. In bf16 the authors transform in float32; here autocast rounds these
    products as it rounds those of linears. Raises UserError as `lowest_square` does.
    """

    def __init__(self, vision_dim: int, text_dim: int, grid: Grid, side: int, mlp_depth: int):
        super().__init__()
        lowest_square(grid, side)
        self.side = side
        self.proj = mlp(vision_dim, text_dim, mlp_depth)

    def read(self, x: Tensor) -> Tensor:
        """Return (M, side * side, D) of (M, h, w, C)."""
        down = low_pass(x.size(1), self.side, x)  # (side, h)
        across = low_pass(x.size(2), self.side, x)  # (side, w)

        small = across @ x.to(across.dtype)  # (M, h, side, C)
        small = torch.einsum("kh,mhjc->mkjc", down, small)  # (M, side, side, C)
        return self.proj(small.flatten(1, 2).to(x.dtype))


class ConvNorm(nn.Module):
    """A convolution without bias, then a LayerNorm over the channels of each token."""

    def __init__(self, width: int, out: int, size: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(width, out, size, padding=size // 2, groups=groups, bias=False)
        self.bn = LayerNorm(out)  # called like this in Honeybee's files

    def forward(self, x: Tensor) -> Tensor:
        """Return (M, out, h, w) of (M, width, h, w)."""
        x = self.conv(x).permute(0, 2, 3, 1)  # (M, h, w, out)
        return self.bn(x).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """A factor per channel, from the mean over all tokens (Hu et al., 2018)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1 = nn.Conv2d(width, inner, 1)
        self.fc2 = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (M, C, h, w) times its factors."""
        mean = x.mean((2, 3), keepdim=True)  # (M, C, 1, 1)
        factors = self.fc2(F.silu(self.fc1(mean)))
        return x * factors.sigmoid()


class RegNetBlock(nn.Module):
    """A RegNet-Y block (Radosavovic et al., 2020), with LayerNorm and SiLU as in Honeybee.

    Its 3 x 3 convolution is depthwise.
    """

    def __init__(self, width: int, out: int):
        super().__init__()
        self.conv1 = ConvNorm(width, out)
        self.conv2 = ConvNorm(out, out, size=3, groups=out)
        self.se = SqueezeExcite(out, max(1, round(width / 4)))
        self.conv3 = ConvNorm(out, out)

        self.downsample = nn.Identity()  # called like this in Honeybee's files
        if width != out:
            self.downsample = ConvNorm(width, out)

    def forward(self, x: Tensor) -> Tensor:
        """Return (M, out, h, w) of (M, width, h, w)."""
        inner = F.silu(self.conv1(x))
        inner = F.silu(self.conv2(inner))
        inner = self.conv3(self.se(inner))
        return F.silu(inner + self.downsample(x))


def regnet_stage(depth: int, width: int, out: int) -> nn.Sequential:
    """Return `depth` blocks, the first of which changes the width."""
    stage = nn.Sequential()
    for i in range(1, depth + 1):
        stage.add_module(f"b{i}", RegNetBlock(width, out))
        width = out
    return stage


def side_of(num_queries: int) -> int:
    """Return the side of a square of so many tokens. Raises UserError if they form none."""
    side = isqrt(num_queries)
    if side**2 != num_queries:
        where = "model.connector_options.num_queries"
        fix = f"a square, as {side**2} or {(side + 1) ** 2}"
        raise UserError(where, f"{num_queries} tokens form no square", fix)
    return side


class CAbstractor(EachView):
    """Honeybee's C-Abstractor (Cha et al., 2024): convolutions keep what is near to each other.

    Tokens get learnt positions. `depth` RegNet blocks, adaptive average pooling to num_queries
    tokens, `depth` more blocks, then linears with SiLU between them. This is the published module
    with its settings (pos_emb, no prenorm, no eos_tokens), where the class token is never read.
    Raises UserError as `side_of` does.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        grid: Grid,
        num_queries: int,
        hidden_size: int,
        depth: int,
        mlp_depth: int,
    ):
        super().__init__()
        side = side_of(num_queries)
        rows, columns = grid
        positions = nn.init.normal_(torch.empty(1, rows * columns, vision_dim), std=0.02)
        self.pos_emb = nn.Parameter(positions)

        self.net = nn.Sequential(
            regnet_stage(depth, vision_dim, hidden_size),
            nn.AdaptiveAvgPool2d(side),
            regnet_stage(depth, hidden_size, hidden_size),
        )
        self.readout = nn.Sequential(nn.Linear(hidden_size, text_dim))
        for _ in range(mlp_depth - 1):
            self.readout.append(nn.SiLU())
            self.readout.append(nn.Linear(text_dim, text_dim))

    def read(self, x: Tensor) -> Tensor:
        """Return (M, m, D) of (M, h, w, C)."""
        x = x + self.pos_emb.view(x.shape[1:])
        x = self.net(x.permute(0, 3, 1, 2))  # (M, W, side, side)
        tokens = x.flatten(2).transpose(1, 2)  # (M, m, W)
        return self.readout(tokens)


def grid_sinusoids(x: Tensor) -> Tensor:
    """Return the positions (h, w, W) of tokens x (M, h, w, W): of the row, then of the column."""
    h, w, width = x.shape[1:]
    half = width // 2
    down = sinusoids(x[:, :, 0, :half])  # (h, W / 2)
    across = sinusoids(x[:, 0, :, half:])  # (w, W / 2)

    down = down[:, None].expand(-1, w, -1)
    across = across[None].expand(h, -1, -1)
    return torch.cat([down, across], dim=-1)


class CrossAttention(EachView):
    """Learnt queries that read the tokens of a view once, as in Qwen-VL (Bai et al., 2023).

    There is no self-attention among the queries and no second layer. Keys get sinusoids of the
    token's row and column. Qwen-VL's queries have such positions too; here what they learn must do,
    so that they need not form a square.
    """

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        grid: Grid,
        num_queries: int,
        num_attention_heads: int,
        head_width: int = 64,
    ):
        super().__init__()
        self.heads = num_attention_heads
        inner = num_attention_heads * head_width

        queries = nn.init.normal_(torch.empty(num_queries, text_dim), std=0.02)
        self.queries = nn.Parameter(queries)
        self.linear = nn.Linear(vision_dim, text_dim, bias=False)
        self.norm_queries = LayerNorm(text_dim)
        self.norm_tokens = LayerNorm(text_dim)

        self.to_q = nn.Linear(text_dim, inner, bias=False)
        self.to_k = nn.Linear(text_dim, inner, bias=False)
        self.to_v = nn.Linear(text_dim, inner, bias=False)
        self.to_out = nn.Linear(inner, text_dim, bias=False)
        self.norm = LayerNorm(text_dim)
        self.proj = nn.Linear(text_dim, text_dim)

    def read(self, x: Tensor) -> Tensor:
        """Return (M, m, D) of (M, h, w, C)."""
        x = self.norm_tokens(self.linear(x))  # (M, h, w, D)
        placed = x + grid_sinusoids(x)
        queries = self.norm_queries(self.queries)  # (m, D), the same for every view

        q = self.to_q(queries).expand(len(x), -1, -1)  # (M, m, inner)
        k = self.to_k(placed.flatten(1, 2))  # (M, h * w, inner)
        v = self.to_v(x.flatten(1, 2))

        q = q.unflatten(-1, (self.heads, -1))  # (M, m, heads, d)
        k = k.unflatten(-1, (self.heads, -1))  # (M, h * w, heads, d)
        v = v.unflatten(-1, (self.heads, -1))
        attended = attention(q, k, v, causal=False)  # (M, m, heads, d)
        return self.proj(self.norm(self.to_out(attended.flatten(2))))


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


# Those of spatial entries.


def one_of_a_square(views: int, grid: Grid, factor: int, **options: int) -> int:
    """Return the number of tokens out of a connector that makes one of each square of tokens."""
    rows, columns = squares(grid, factor)
    return views * rows * columns


def low_frequencies_of_each(views: int, grid: Grid, side: int, **options: int) -> int:
    """Return the number of tokens out of a connector that keeps side x side of each view."""
    return views * lowest_square(grid, side)


def a_square_of_each(views: int, grid: Grid, num_queries: int, **options: int) -> int:
    """Return the number of tokens out of a connector that pools each view to a square of them."""
    return views * side_of(num_queries) ** 2


def queries_of_each(views: int, grid: Grid, num_queries: int, **options: int) -> int:
    """Return the number of tokens out of a connector whose learnt queries read each view."""
    return views * num_queries


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

    # Whether it knows how tokens lie: the first part of this file says what is different then.
    spatial: bool = False

    # Whether a spatial one reads every grid that there is, whatever it was built with.
    any_grid: bool = False


# The largest values of options: that of an option with this name, and that of all others.
LARGEST = {"num_resampler_layers": 512, "num_hidden_layers": 512, "depth": 512, "mlp_depth": 8}
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
    # Spatial: fewer tokens of each view.
    "pixel_shuffle": Connector(
        PixelShuffle,
        options={"factor": 2, "mlp_depth": 1},
        tokens=one_of_a_square,
        spatial=True,
    ),
    "avg_pool": Connector(
        AvgPool,
        options={"factor": 2, "mlp_depth": 2},
        tokens=one_of_a_square,
        spatial=True,
    ),
    "fourier": Connector(
        Fourier,
        options={"side": 12, "mlp_depth": 2},
        tokens=low_frequencies_of_each,
        spatial=True,
    ),
    "c_abstractor": Connector(
        CAbstractor,
        options={"num_queries": 144, "hidden_size": 1024, "depth": 3, "mlp_depth": 2},
        tokens=a_square_of_each,
        spatial=True,
    ),
    "cross_attention": Connector(
        CrossAttention,
        options={"num_queries": 64, "num_attention_heads": 8},
        tokens=queries_of_each,
        spatial=True,
        any_grid=True,
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


def _check_one_grid(spec: str, grid: Grid | None):
    """Raise UserError if there is no grid for a spatial connector to read."""
    if grid is None:
        what = f"{spec} reads the grid of one encoder, and a mixture has two"
        raise UserError("model.connector", what, "use mof_mlp")


def build_connector(
    spec: str, vision_dim: int, text_dim: int, grid: Grid | None = None, **options: int
) -> nn.Module:
    """Return a module that takes what join_views returns, and makes (N, m, D) of it.

    spec: an exact name of CONNECTORS. grid: rows and columns of a view's patches, which a spatial
    connector needs. Raises UserError for another name, for an unknown option, for a value that is
    no positive integer, and for options that do not fit the grid.
    """
    connector, options = _choose(spec, options)
    if not connector.spatial:
        return connector.build(vision_dim, text_dim, **options)
    _check_one_grid(spec, grid)
    return connector.build(vision_dim, text_dim, grid, **options)


def connector_tokens(
    spec: str, tokens: int, views: int = 1, grid: Grid | None = None, **options: int
) -> int:
    """Return how many positions an item takes in the text.

    It has `views` views of `tokens` encoder tokens each; in a mixture, of each encoder. grid: as in
    build_connector. Raises UserError as build_connector does, and where tokens of the grid are
    missing.
    """
    connector, options = _choose(spec, options)
    if connector.spatial:
        _check_one_grid(spec, grid)
        rows, columns = grid
        if tokens < rows * columns:
            what = f"patch drops the first of the {rows} x {columns} patches that {spec} reads"
            raise UserError("model.feature_select", what, "use cls_patch")
        return connector.tokens(views, grid, **options)

    # As in join_views: the mean of the views has the tokens of one view.
    if connector.mean:
        n = tokens
    else:
        n = views * tokens
    return connector.tokens(n, **options)


def join_views(spec: str, x: Tensor, grid: Grid | None = None) -> Tensor:
    """Return the views of items as their connector reads them.

    x (N, v, n, C) becomes (N, v * n, C), or (N, n, C) where the connector takes the mean; x of a
    mixture (N, v, 2, n, C) becomes (N, 2, v * n, C). For a spatial connector x becomes
    (N, v, h, w, C), with h x w = grid.
    """
    connector = CONNECTORS[spec]
    if connector.spatial:
        # Class token and registers come first.
        rows, columns = grid
        return x[:, :, -rows * columns :].unflatten(2, grid)
    if connector.mean:
        return x.mean(1)

    # In a mixture, the views of one encoder come together.
    is_mixture = x.dim() == 5
    if is_mixture:
        x = x.transpose(1, 2)  # (N, 2, v, n, C)
    return x.flatten(-3, -2)
