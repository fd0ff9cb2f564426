"""Vision encoders: a ViT that is CLIP, SigLIP, SigLIP2, DINOv2 or DINOv3; CLIP beside DINOv2.

    encoder = load_encoder("openai/clip-vit-large-patch14-336")     # a Hugging Face folder or id
    features = encoder(encoder.preprocess(pil_image)[None])         # (N, 3, H, W) -> (N, n, C)

The whole model is in this file. In the order of the file, which is the order to read it in:

    VisionConfig                 an encoder as numbers
    Embeddings                   pixels -> one token per patch, each with its position
    RotaryEmbeddings             the same for DINOv3, whose positions turn queries and keys instead
    Attention, MLP, GatedMLP     the two halves of a block
    Block                        attention, then an MLP, each added to the residual stream
    VisionEncoder                embeddings and blocks, up to the layer whose features are used
    Mixture                      CLIP and DINOv2 on the same picture
    clip_config, siglip_config,  how each family differs; FAMILIES has one entry per model_type
        dinov2_config, dinov3_config
    vision_config                config.json -> VisionConfig
    build_encoder, load_encoder  VisionConfig -> module; a folder -> module with its weights

N images, H x W pixels, h x w patches, n tokens per image, C width, I width inside the MLP, d width
of a head. Parameters have Hugging Face's names for CLIP; a family whose files use other names
brings a table that renames them. `attention`, `rope`, `gelu`, `glu` and the norms' `add` come from
kernels/: each call is one fused Triton kernel on a GPU, and plain PyTorch elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoints import weights
from checkpoints.fields import EPS, HEADS, INTERMEDIATE, LAYERS, SIDE, WIDTH, Fields
from checkpoints.files import read_json, resolve
from checkpoints.names import Table
from config import UserError
from inputs.image_processor import (
    ImageProcessor,
    NaFlexProcessor,
    need,
    preprocessor_place,
    read_preprocessor,
)
from kernels.attention import attention, attention_packed
from kernels.glu import gelu, glu
from kernels.rope import rope
from layers import GLU, LayerNorm, LayerScale
from packing import send

# PyTorch computes products of float32 in float32, but convolutions in TF32 unless told otherwise.
# The patch embedding is a convolution, and float32 is to mean float32 there too.
torch.backends.cudnn.allow_tf32 = False

# ------------------------------------------------------------------------------------- the config

# Names of activations: Hugging Face's -> those of kernels/glu.py.
ACTIVATIONS = {
    "quick_gelu": "quick_gelu",  # x * sigmoid(1.702 x)
    "gelu": "gelu",  # x * Phi(x), with erf
    "gelu_pytorch_tanh": "gelu_tanh",  # the same, by an approximation with tanh
}
# Not a function but another MLP, see GatedMLP.
SWIGLU = "swiglu"
# The same MLP in DINOv3's files: gate and value are two linears, see layers.GLU.
SPLIT_SWIGLU = "split_swiglu"

CLIP_NAMES: Table = (("vision_model.**", "**"),)


@dataclass(frozen=True)
class VisionConfig:
    """An encoder as numbers. The functions of the families below make it from a config.json."""

    hf: dict  # that config.json with every default filled in, kept for saving
    processor: ImageProcessor

    width: int  # C
    intermediate: int  # I
    layers: int
    heads: int
    hidden_act: str  # a name of ACTIVATIONS, or SWIGLU, or SPLIT_SWIGLU
    norm_eps: float
    patch_size: int  # pixels
    image_size: int  # pixels; the position table has a row for each patch of such a picture
    init_std: float  # of random weights

    # CLIP
    class_token: bool = False
    pre_norm: bool = False  # a LayerNorm in front of the first block, instead of the patches' bias

    # DINOv2
    registers: int | None = None  # tokens without a position; None: there is no such parameter
    layer_scale: float | None = None  # where LayerScale starts; None: there is none
    batch_axis: bool = False  # class token and positions are stored with leading dimensions of 1

    # Whether pictures of another size are welcome, and how the position table is resized for them.
    any_size: bool = False
    antialias: bool = False
    interpolate_offset: float = 0.0

    # Whether the norm behind the last block is applied to the features (model.feature_norm).
    final_norm: bool = False

    # DINOv3
    rope_theta: float | None = None  # None: positions are learnt, and added to the patches
    query_bias: bool = True
    key_bias: bool = True
    value_bias: bool = True

    # NaFlex: pictures keep their proportions, and the encoder takes patches.
    native: bool = False

    rename: Table = CLIP_NAMES  # (Hugging Face's names, ours)
    beside: VisionConfig | None = None  # in the mixture this config is CLIP's, and that DINOv2's

    @property
    def leading(self) -> int:
        """Return how many tokens stand before the patches: the class token and the registers."""
        count = self.registers or 0
        if self.class_token:
            count += 1
        return count

    @property
    def grid(self) -> tuple[int, int] | None:
        """Return rows and columns of the patches of a picture; None for a mixture or a NaFlex."""
        if self.beside is not None or self.native:
            return None
        side = self.processor.side // self.patch_size
        return side, side

    def tokens(self, select: str) -> int:
        """Return the number of tokens per image, of each encoder in a mixture.

        select: "cls_patch" keeps all of them, "patch" drops the first one. TinyLLaVA does so even
        where there is no class token: SigLIP then loses its first patch. For a NaFlex it is the
        most tokens that an image can have. Raises UserError where a NaFlex would lose a patch.
        """
        if self.native:
            fix = "use cls_patch: all tokens are patches"
            need(select == "cls_patch", "model.feature_select", select, fix)
            return self.processor.patches
        side = self.processor.side // self.patch_size
        count = self.leading + side**2
        if select == "patch":
            count -= 1
        return count


# ------------------------------------------------------------------------------------- the module


class Embeddings(nn.Module):
    """Pixels as tokens: the class token and registers, if any, then the patches row by row.

    All but the registers have a learnt position.
    """

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.grid = c.image_size // c.patch_size
        self.antialias = c.antialias
        self.interpolate_offset = c.interpolate_offset

        # The stride is the size of the kernel: one linear map of each patch, without overlap.
        self.patch_embedding = nn.Conv2d(
            3, c.width, kernel_size=c.patch_size, stride=c.patch_size, bias=not c.pre_norm
        )

        positions = self.grid**2
        if c.class_token:
            positions += 1
        self.position_embedding = nn.Embedding(positions, c.width)

        self.class_embedding = None
        if c.class_token:
            self.class_embedding = nn.Parameter(torch.zeros(c.width))
        self.register_tokens = None
        if c.registers is not None:
            self.register_tokens = nn.Parameter(torch.zeros(1, c.registers, c.width))

        # As DINOv2's files have them: (1, 1, C) and (1, positions, C).
        if c.batch_axis:
            token = self.class_embedding.detach()
            table = self.position_embedding.weight.detach()
            self.class_embedding = nn.Parameter(token[None, None])
            self.position_embedding.weight = nn.Parameter(table[None])

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the tokens (N, n, C) of pixels (N, 3, H, W)."""
        x = self.patch_embedding(pixels)  # (N, C, h, w)
        N, C, h, w = x.shape
        patches = x.flatten(2).transpose(1, 2)  # (N, h * w, C)
        patches = patches + self.patch_positions(h, w, x.dtype)
        if self.class_embedding is None:
            return patches

        # The first row of the table is the class token's position.
        first = self.position_embedding.weight.view(-1, C)[:1]
        leading = self.class_embedding.view(1, C) + first
        if self.register_tokens is not None:
            leading = torch.cat([leading, self.register_tokens.view(-1, C)])
        return torch.cat([leading.expand(N, -1, -1), patches], dim=1)

    def patch_positions(self, h: int, w: int, dtype: torch.dtype) -> Tensor:
        """Return the positions (h * w, C) of h x w patches.

        The table has grid x grid of them. For another number it is resized like a picture, in
        float32 as Hugging Face has it, and comes back in `dtype`.
        """
        table = self.position_embedding.weight.flatten(0, -2)  # (positions, C)
        table = table[-(self.grid**2) :]  # without the class token's
        if (h, w) == (self.grid, self.grid):
            return table

        # The code of 2023 resized by a factor, (h + 0.1) / grid, and today's resizes to a size. The
        # two sample the table at different places, so a checkpoint says which one it was made with.
        if self.interpolate_offset:
            offset = self.interpolate_offset
            target = {"scale_factor": [(h + offset) / self.grid, (w + offset) / self.grid]}
        else:
            target = {"size": (h, w)}

        table = table.float().T.unflatten(1, (self.grid, self.grid))  # (C, grid, grid)
        table = F.interpolate(table[None], mode="bicubic", antialias=self.antialias, **target)
        table = table[0].flatten(1).T  # (h * w, C)
        return table.to(dtype)


class RotaryEmbeddings(nn.Module):
    """DINOv3's tokens: the class token and registers, then the patches row by row.

    None of them has a position here. `rotation` returns what turns queries and keys by theirs
    (RoFormer: Su et al., 2021), in two dimensions (DINOv3: Siméoni et al., 2025).
    """

    position_embedding = None

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.rope_theta = c.rope_theta
        self.pairs = c.width // c.heads // 4  # of an axis; a head is two axes of pairs

        self.patch_embedding = nn.Conv2d(3, c.width, kernel_size=c.patch_size, stride=c.patch_size)
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, c.width))
        self.register_tokens = nn.Parameter(torch.zeros(1, c.registers, c.width))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the tokens (N, n, C) of pixels (N, 3, H, W)."""
        x = self.patch_embedding(pixels)  # (N, C, h, w)
        patches = x.flatten(2).transpose(1, 2)  # (N, h * w, C)

        leading = torch.cat([self.class_embedding, self.register_tokens], dim=1)
        return torch.cat([leading.expand(len(x), -1, -1), patches], dim=1)

    def rotation(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, (N * n, 1, d) float32, of the tokens of pixels (N, 3, H, W).

        A patch is where its centre is, in -1 to 1 from edge to edge. So a picture of any size has
        the positions that were trained, closer together or further apart.
        """
        N, _, H, W = pixels.shape
        h, w = self.grid_of(H), self.grid_of(W)
        device = pixels.device

        # Pair i of an axis turns by 2 pi * coordinate * theta^(-i / pairs).
        rows = 2 * (torch.arange(h, device=device) + 0.5) / h - 1
        columns = 2 * (torch.arange(w, device=device) + 0.5) / w - 1
        exponents = torch.arange(self.pairs, device=device) / self.pairs
        frequencies = 2 * math.pi * self.rope_theta**-exponents  # (d / 4,)
        by_row = torch.outer(rows, frequencies)[:, None].expand(h, w, -1)
        by_column = torch.outer(columns, frequencies)[None].expand(h, w, -1)
        angles = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)  # (h * w, d / 2)

        # The class token and the registers have no place in the picture, and do not turn.
        leading = 1 + self.register_tokens.size(1)
        angles = F.pad(angles, (0, 0, leading, 0))  # (n, d / 2)
        angles = angles.repeat(N, 2)[:, None]  # (N * n, 1, d): both halves of a head turn alike
        return angles.cos(), angles.sin()

    def grid_of(self, side: int) -> int:
        """Return how many patches stand along a side of so many pixels."""
        return side // self.patch_embedding.stride[0]


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., 2017) among all tokens of an image."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.heads = c.heads
        self.q_proj = nn.Linear(c.width, c.width, bias=c.query_bias)
        self.k_proj = nn.Linear(c.width, c.width, bias=c.key_bias)
        self.v_proj = nn.Linear(c.width, c.width, bias=c.value_bias)
        self.out_proj = nn.Linear(c.width, c.width)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return what the tokens (N, n, C) attend to; rotation turns queries and keys before."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))  # (N, n, heads, d)
        k = self.k_proj(x).unflatten(-1, (self.heads, -1))
        v = self.v_proj(x).unflatten(-1, (self.heads, -1))

        if rotation is not None:
            cos, sin = rotation  # (N * n, 1, d) each
            turned_q, turned_k = rope(q.flatten(0, 1), k.flatten(0, 1), cos, sin)
            q = turned_q.view_as(q)
            k = turned_k.view_as(k)

        # One kernel for softmax(q k^T / sqrt(d)) v, head by head; it never stores the n x n scores.
        attended = attention(q, k, v, causal=False)  # (N, n, heads, d)
        return self.out_proj(attended.flatten(2))  # (N, n, C)


class MLP(nn.Module):
    """Two linears with a GELU between them."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.activation = ACTIVATIONS[c.hidden_act]
        self.fc1 = nn.Linear(c.width, c.intermediate)
        self.fc2 = nn.Linear(c.intermediate, c.width)

    def forward(self, x: Tensor) -> Tensor:  # (N, n, C)
        hidden = self.fc1(x)  # (N, n, I)
        hidden = gelu(hidden, self.activation)  # the variant of GELU that the config names
        return self.fc2(hidden)


class GatedMLP(nn.Module):
    """The SwiGLU (Shazeer, 2020) of DINOv2-giant, with gate and value in one linear."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.weights_in = nn.Linear(c.width, 2 * c.intermediate)
        self.weights_out = nn.Linear(c.intermediate, c.width)

    def forward(self, x: Tensor) -> Tensor:  # (N, n, C)
        gate, value = self.weights_in(x).chunk(2, dim=-1)  # (N, n, I) each
        hidden = glu(gate, value, "silu")  # silu(gate) * value, in one kernel
        return self.weights_out(hidden)


def layer_scale(c: VisionConfig) -> nn.Module:
    """Return a LayerScale where the config has one, else a module that changes nothing."""
    if c.layer_scale is None:
        return nn.Identity()
    return LayerScale(c.width, c.layer_scale)


class Block(nn.Module):
    """A pre-norm ViT block (Dosovitskiy et al., 2020): attention, then an MLP, each added to x."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.layer_norm1 = LayerNorm(c.width, c.norm_eps)
        self.layer_norm2 = LayerNorm(c.width, c.norm_eps)

        # DINOv2 and DINOv3 scale what a block adds, one factor per channel.
        self.layer_scale1 = layer_scale(c)
        self.layer_scale2 = layer_scale(c)

        self.self_attn = Attention(c)
        if c.hidden_act == SWIGLU:
            self.mlp = GatedMLP(c)
        elif c.hidden_act == SPLIT_SWIGLU:
            self.mlp = GLU(c.width, c.intermediate, "silu", bias=True)
        else:
            self.mlp = MLP(c)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the tokens (N, n, C) for the next block; see Attention for `rotation`."""
        attended = self.self_attn(self.layer_norm1(x), rotation)
        attended = self.layer_scale1(attended)

        # One kernel adds to the residual stream and normalises the sum:
        # x = attended + x, normed = norm(x).
        normed, x = self.layer_norm2.add(attended, x)
        return x + self.layer_scale2(self.mlp(normed))


class VisionEncoder(nn.Module):
    """A Vision Transformer (Dosovitskiy et al., 2020) up to the layer whose features are used.

    feature_layer counts Hugging Face's `hidden_states`: 0 is the embeddings, -2 the input of the
    last block. What lies behind is not built. Only with final_norm the last state gets the final
    norm, as in SmolVLM; it is asked for together with the last layer. The other tensors wait in
    `spares` and leave with the checkpoint, so that a saved encoder is whole again.

    feature_select is "patch" or "cls_patch", see VisionConfig.tokens.
    """

    # Tensors of a vision checkpoint that no forward pass here reads: they go to `spares`.
    spare = (
        "encoder.layers.*.**",
        "post_layernorm.*",
        "head.**",
        "embeddings.mask_token",
    )
    # What else lies in a full CLIP or SigLIP checkpoint: its text half, and a table of indices.
    ignore = (
        "text_model.**",
        "logit_scale",
        "logit_bias",
        "*_projection.weight",
        "**.position_ids",
    )

    make_embeddings: type[nn.Module] | None = None  # None: as the config says
    make_block = Block

    def __init__(self, c: VisionConfig, feature_layer: int, feature_select: str):
        super().__init__()
        # Hidden state i has passed i blocks, so it needs only those.
        states = range(c.layers + 1)
        need(
            -len(states) <= feature_layer < len(states),
            "model.feature_layer",
            feature_layer,
            f"{-len(states)} to {c.layers}",
        )
        depth = states[feature_layer]
        if c.final_norm and depth != c.layers:
            what = f"the final norm, which stands behind layer {c.layers} and not {depth}"
            raise UserError("model.feature_norm", what, "set model.feature_layer to -1")

        self.config = c
        self.processor = c.processor
        self.preprocess = c.processor  # a picture -> (3, H, W)
        self.rename = c.rename
        self.spares: dict[str, Tensor] = {}
        self.gradient_checkpointing = False
        self.skip = 1 if feature_select == "patch" else 0

        if self.make_embeddings is not None:
            self.embeddings = self.make_embeddings(c)
        elif c.rope_theta is None:
            self.embeddings = Embeddings(c)
        else:
            self.embeddings = RotaryEmbeddings(c)
        self.pre_layrnorm = nn.Identity()  # spelt like this in CLIP's files
        if c.pre_norm:
            self.pre_layrnorm = LayerNorm(c.width, c.norm_eps)
        blocks = nn.ModuleList(self.make_block(c) for _ in range(depth))
        self.encoder = nn.ModuleDict({"layers": blocks})
        self.post_layernorm = nn.Identity()
        if c.final_norm:
            self.post_layernorm = LayerNorm(c.width, c.norm_eps)

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the blocks that are built, in order."""
        return self.encoder["layers"]

    @torch.no_grad()
    def init_positions(self):
        """Draw positions, class token and registers with std C**-0.5; set LayerScale's start."""
        std = self.config.width**-0.5
        if self.embeddings.position_embedding is not None:
            self.embeddings.position_embedding.weight.normal_(0.0, std)
        for token in (self.embeddings.class_embedding, self.embeddings.register_tokens):
            if token is not None:
                token.normal_(0.0, std)

        for module in self.modules():
            if isinstance(module, LayerScale):
                module.lambda1.fill_(self.config.layer_scale)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features (N, n, C) of normalised pixels (N, 3, H, W)."""
        pixels = pixels.to(self.embeddings.patch_embedding.weight.dtype)
        x = self.embeddings(pixels)  # (N, n, C)
        x = self.pre_layrnorm(x)
        rotation = None
        if self.config.rope_theta is not None:
            rotation = self.embeddings.rotation(pixels)

        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                x = checkpoint(block, x, rotation, use_reentrant=False)
            else:
                x = block(x, rotation)

        x = self.post_layernorm(x)
        return x[:, self.skip :]


class PatchEmbeddings(nn.Module):
    """NaFlex's: a linear map of each patch, and a learnt position resized to its picture's grid."""

    class_embedding = None
    register_tokens = None

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.grid = c.image_size // c.patch_size
        self.patch_embedding = nn.Linear(3 * c.patch_size**2, c.width)
        self.position_embedding = nn.Embedding(self.grid**2, c.width)

    def forward(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Return the tokens (P, C) of patches (P, 3 * patch_size**2) of pictures of these grids."""
        table = self.position_embedding.weight
        square = table.float().T.unflatten(1, (self.grid, self.grid))[None]  # (1, C, grid, grid)

        # Pictures of one grid share its positions.
        resized = {}
        for grid in set(grids):
            made = F.interpolate(square, size=grid, mode="bilinear", antialias=True)
            resized[grid] = made[0].flatten(1).T.to(table.dtype)  # (h * w, C)
        positions = torch.cat([resized[grid] for grid in grids])
        return self.patch_embedding(patches) + positions


class PackedAttention(Attention):
    """Self-attention among the tokens of each picture, of pictures one behind the other."""

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:  # (P, C)
        """Return what the tokens (P, C) attend to; see attention_packed for the boundaries."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))  # (P, heads, d)
        k = self.k_proj(x).unflatten(-1, (self.heads, -1))
        v = self.v_proj(x).unflatten(-1, (self.heads, -1))
        attended = attention_packed(q, k, v, cu_seqlens, max_seqlen, causal=False)
        return self.out_proj(attended.flatten(1))


class PackedBlock(Block):
    """A Block for pictures one behind the other, each of as many tokens as it has."""

    def __init__(self, c: VisionConfig):
        super().__init__(c)
        self.self_attn = PackedAttention(c)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Return the tokens (P, C) for the next block; see PackedAttention."""
        attended = self.self_attn(self.layer_norm1(x), cu_seqlens, max_seqlen)
        normed, x = self.layer_norm2.add(attended, x)
        return x + self.mlp(normed)


class NaFlexEncoder(VisionEncoder):
    """SigLIP2-NaFlex (Tschannen et al., 2025): pictures in their own proportions, none padded.

    The pictures of a batch stand one behind the other, and each attends to itself.
    """

    make_embeddings = PatchEmbeddings
    make_block = PackedBlock

    def __init__(self, c: VisionConfig, feature_layer: int, feature_select: str):
        c.tokens(feature_select)  # raises UserError where it is not cls_patch
        super().__init__(c, feature_layer, feature_select)

    def forward(self, pixels: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Return the features (P, C) of normalised patches (P, 3 * patch_size**2).

        grids: for each picture, its rows and columns of patches.
        """
        x = self.embeddings(pixels.to(self.embeddings.patch_embedding.weight.dtype), grids)

        lengths = [rows * columns for rows, columns in grids]
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        cu_seqlens = send(ends, x.device)

        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                x = checkpoint(block, x, cu_seqlens, max(lengths), use_reentrant=False)
            else:
                x = block(x, cu_seqlens, max(lengths))
        return x


class Mixture(nn.Module):
    """CLIP and DINOv2 on the same pixels (Tong et al., 2024), for the connector mof_mlp."""

    def __init__(self, c: VisionConfig, feature_layer: int, feature_select: str):
        super().__init__()
        self.config = c
        self.processor = c.processor
        self.preprocess = c.processor
        self.spares: dict[str, Tensor] = {}
        self.gradient_checkpointing = False
        self.clip = VisionEncoder(c, feature_layer, feature_select)
        self.dinov2 = VisionEncoder(c.beside, feature_layer, feature_select)

        # The names of both towers, each behind the name of its tower.
        rename = []
        spare = []
        ignore = []
        for name, tower in self.named_children():
            rename += [(f"{name}.{theirs}", f"{name}.{ours}") for theirs, ours in tower.rename]
            spare += [f"{name}.{glob}" for glob in tower.spare]
            ignore += [f"{name}.{glob}" for glob in tower.ignore]
        self.rename = tuple(rename)
        self.spare = tuple(spare)
        self.ignore = tuple(ignore)

    @property
    def blocks(self) -> nn.ModuleList:
        """Return a list whose item i holds block i of each tower that is deep enough."""
        depth = max(len(self.clip.blocks), len(self.dinov2.blocks))
        levels = nn.ModuleList()
        for i in range(depth):
            level = nn.ModuleList()
            for tower in (self.clip, self.dinov2):
                if i < len(tower.blocks):
                    level.append(tower.blocks[i])
            levels.append(level)
        return levels

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features (N, 2, n, C) of normalised pixels (N, 3, H, W), CLIP's first."""
        self.clip.gradient_checkpointing = self.gradient_checkpointing
        self.dinov2.gradient_checkpointing = self.gradient_checkpointing
        return torch.stack([self.clip(pixels), self.dinov2(pixels)], dim=1)


# ------------------------------------------------------------------------------------ the families

# What a config.json may leave out.
DEFAULTS = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-6,
}
CLIP_DEFAULTS = DEFAULTS | {
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "patch_size": 32,
}
SIGLIP_DEFAULTS = DEFAULTS | {
    "hidden_act": "gelu_pytorch_tanh",
}
NAFLEX_DEFAULTS = SIGLIP_DEFAULTS | {
    "num_patches": 256,
}
DINOV2_DEFAULTS = DEFAULTS | {
    "hidden_act": "gelu",
    "mlp_ratio": 4,
    "layerscale_value": 1.0,
    "patch_size": 14,
}
DINOV2_REGISTERS_DEFAULTS = DEFAULTS | {
    "hidden_act": "gelu",
    "mlp_ratio": 4,
    "layerscale_value": 1.0,
    "num_register_tokens": 4,
}
DINOV3_DEFAULTS = DEFAULTS | {
    "hidden_size": 384,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "layerscale_value": 1.0,
    "num_register_tokens": 0,
    "rope_theta": 100.0,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
    "use_gated_mlp": False,
}

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Hugging Face's names for DINOv2 -> ours. The first line that matches a name decides.
DINOV2_NAMES: Table = (
    ("encoder.layer.*.attention.attention.query.*", "encoder.layers.*.self_attn.q_proj.*"),
    ("encoder.layer.*.attention.attention.key.*", "encoder.layers.*.self_attn.k_proj.*"),
    ("encoder.layer.*.attention.attention.value.*", "encoder.layers.*.self_attn.v_proj.*"),
    ("encoder.layer.*.attention.output.dense.*", "encoder.layers.*.self_attn.out_proj.*"),
    ("encoder.layer.*.norm1.*", "encoder.layers.*.layer_norm1.*"),
    ("encoder.layer.*.norm2.*", "encoder.layers.*.layer_norm2.*"),
    ("encoder.layer.*.**", "encoder.layers.*.**"),
    ("layernorm.*", "post_layernorm.*"),
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.position_embeddings", "embeddings.position_embedding.weight"),
    ("embeddings.patch_embeddings.projection.*", "embeddings.patch_embedding.*"),
)

# Hugging Face's names for DINOv3 -> ours. A gated MLP keeps theirs.
DINOV3_NAMES: Table = (
    ("layer.*.attention.o_proj.*", "encoder.layers.*.self_attn.out_proj.*"),
    ("layer.*.attention.**", "encoder.layers.*.self_attn.**"),
    ("layer.*.norm1.*", "encoder.layers.*.layer_norm1.*"),
    ("layer.*.norm2.*", "encoder.layers.*.layer_norm2.*"),
    ("norm.*", "post_layernorm.*"),
    ("embeddings.cls_token", "embeddings.class_embedding"),
    ("embeddings.patch_embeddings.*", "embeddings.patch_embedding.*"),
)
DINOV3_MLP_NAMES: Table = (
    ("layer.*.mlp.up_proj.*", "encoder.layers.*.mlp.fc1.*"),
    ("layer.*.mlp.down_proj.*", "encoder.layers.*.mlp.fc2.*"),
)
DINOV3_OTHER_NAMES: Table = (("layer.*.**", "encoder.layers.*.**"),)


def vit_config(c: Fields, **differences) -> VisionConfig:
    """Return what all families read from a config.json, and in `differences` what they do not."""
    width = c.integer("hidden_size", 1, WIDTH)
    heads = c.integer("num_attention_heads", 1, HEADS)
    if width % heads:
        raise c.refuse("num_attention_heads", f"no divisor of hidden_size {width}")

    image_size = c.integer("image_size", 1, SIDE)
    patch_size = c.integer("patch_size", 1, SIDE)
    if patch_size > image_size:
        raise c.refuse("patch_size", f"larger than the image_size {image_size}")

    return VisionConfig(
        hf=c.values,
        width=width,
        intermediate=c.integer("intermediate_size", 1, INTERMEDIATE),
        layers=c.integer("num_hidden_layers", 1, LAYERS),
        heads=heads,
        hidden_act=c.text("hidden_act", (*ACTIVATIONS, SWIGLU)),
        norm_eps=c.number("layer_norm_eps", *EPS),
        patch_size=patch_size,
        image_size=image_size,
        init_std=c.number("initializer_range", 0.0, 100.0),
        layer_scale=c.number("layerscale_value", 0.0, 1e3, default=None),
        interpolate_offset=c.number("interpolate_offset", 0.0, 1.0, default=0.0),
        **differences,
    )


def clip_config(c: Fields) -> VisionConfig:
    """Return the config of a CLIP (Radford et al., 2021)."""
    side = c.integer("image_size", 1, SIDE)
    return vit_config(
        c,
        processor=ImageProcessor(size=side, crop=side, mean=CLIP_MEAN, std=CLIP_STD),
        class_token=True,
        pre_norm=True,
    )


def siglip_config(c: Fields) -> VisionConfig:
    """Return the config of a SigLIP (Zhai et al., 2023), or of a SigLIP2 with one size of picture.

    It has no class token: all tokens are patches.
    """
    side = c.integer("image_size", 1, SIDE)
    return vit_config(c, processor=ImageProcessor(size=side))


def naflex_config(c: Fields) -> VisionConfig:
    """Return the config of a SigLIP2-NaFlex (Tschannen et al., 2025).

    Its position table is a square of num_patches.
    """
    patches = c.integer("num_patches", 1, MOST_TOKENS)
    patch_size = c.integer("patch_size", 1, SIDE)
    side = isqrt(patches)
    if side**2 != patches:
        raise c.refuse("num_patches", "no square number")
    sized = Fields(c.values | {"image_size": side * patch_size}, c.where, c.path, c.fix)
    config = vit_config(
        sized,
        processor=NaFlexProcessor(patch_size=patch_size, patches=patches),
        any_size=True,
        native=True,
    )
    return replace(config, hf=c.values)


def dinov2_config(c: Fields) -> VisionConfig:
    """Return the config of a DINOv2 (Oquab et al., 2023).

    One with registers (Darcet et al., 2023) says how many; its position table is resized with
    antialiasing.
    """
    # The config gives the width of the MLP as a ratio. A gated MLP has three matrices instead of
    # two, so it gets two thirds of the width, rounded up to a multiple of 8.
    derived = {}
    ratio = c.number("mlp_ratio", 0.01, 100.0)
    intermediate = int(c.integer("hidden_size", 1, WIDTH) * ratio)
    if c.flag("use_swiglu_ffn", default=False):
        intermediate = (int(intermediate * 2 / 3) + 7) // 8 * 8
        derived["hidden_act"] = SWIGLU
    derived["intermediate_size"] = intermediate

    registers = c.integer("num_register_tokens", 0, 1024, default=None)
    return vit_config(
        Fields(c.values | derived, c.where, c.path, c.fix),
        processor=ImageProcessor(size=256, crop=224, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        class_token=True,
        registers=registers,
        batch_axis=True,
        any_size=True,
        antialias=registers is not None,
        rename=DINOV2_NAMES,
    )


def dinov3_config(c: Fields) -> VisionConfig:
    """Return the config of a DINOv3 ViT (Siméoni et al., 2025).

    Its positions come from the coordinates of the patches, so it sees pictures of any size. The
    random shift, jitter and rescaling of these coordinates (pos_embed_*) belong to its pretraining:
    transformers does them in training mode only, and they are not done here. Pictures are resized
    with 8 bits a colour here and in float32 by its published processor: a colour differs by at most
    1 of 255. Raises UserError for a model without biases in its MLPs or outputs.
    """
    for key in ("proj_bias", "mlp_bias"):
        if not c.flag(key):
            raise c.refuse(key, "not supported: outputs and MLPs have a bias")

    width = c.integer("hidden_size", 1, WIDTH)
    heads = c.integer("num_attention_heads", 1, HEADS)
    if width % (4 * heads):
        what = f"no divisor of hidden_size {width} into heads of a multiple of 4"
        raise c.refuse("num_attention_heads", what)

    # vit_config knows SWIGLU, and not the silu that the file calls a gated MLP's activation.
    is_gated = c.flag("use_gated_mlp")
    derived = {}
    names = DINOV3_MLP_NAMES
    if is_gated:
        c.text("hidden_act", ("silu",))
        derived["hidden_act"] = SWIGLU
        names = ()

    side = c.integer("image_size", 1, SIDE)
    bilinear = int(Image.Resampling.BILINEAR)
    config = vit_config(
        Fields(c.values | derived, c.where, c.path, c.fix),
        processor=ImageProcessor(side, 0, IMAGENET_MEAN, IMAGENET_STD, bilinear),
        class_token=True,
        registers=c.integer("num_register_tokens", 0, 1024),
        any_size=True,
        rope_theta=c.number("rope_theta", 1e-3, 1e12),
        query_bias=c.flag("query_bias"),
        key_bias=c.flag("key_bias"),
        value_bias=c.flag("value_bias"),
        rename=DINOV3_NAMES + names + DINOV3_OTHER_NAMES,
    )
    if is_gated:
        config = replace(config, hidden_act=SPLIT_SWIGLU, hf=c.values)
    return config


class Family(NamedTuple):
    """How a model_type becomes a VisionConfig."""

    config: Callable[[Fields], VisionConfig]
    defaults: dict  # what its config.json may leave out


# By the exact model_type of config.json.
FAMILIES = {
    "clip_vision_model": Family(clip_config, CLIP_DEFAULTS),
    "siglip_vision_model": Family(siglip_config, SIGLIP_DEFAULTS),
    "siglip2_vision_model": Family(naflex_config, NAFLEX_DEFAULTS),
    "dinov2": Family(dinov2_config, DINOV2_DEFAULTS),
    "dinov2_with_registers": Family(dinov2_config, DINOV2_REGISTERS_DEFAULTS),
    "dinov3_vit": Family(dinov3_config, DINOV3_DEFAULTS),
}


# The most tokens that an encoder may make of a picture: 128 x 128 patches.
MOST_TOKENS = 2**14


def check_fields(c: Fields):
    """Raise UserError for a field of a config.json that asks for what this ViT does not compute."""
    if c.integer("num_channels", 1, 1024, default=3) != 3:
        raise c.refuse("num_channels", "not supported: pictures have 3")
    if not c.flag("qkv_bias", default=True):
        raise c.refuse("qkv_bias", "not supported: queries, keys and values have a bias")

    width = c.integer("hidden_size", 1, WIDTH)
    heads = c.integer("num_attention_heads", 1, HEADS)
    head_dim = c.integer("head_dim", 1, WIDTH, default=width // heads)
    if head_dim != width // heads:
        raise c.refuse("head_dim", f"not supported: {heads} heads share the width {width}")


def mixture_config(
    c: Fields, preprocessor: dict | None, where: object, images: object
) -> VisionConfig:
    """Return the config of TinyLLaVA Factory's mixture: CLIP's, with DINOv2's beside it.

    DINOv2 sees the pixels that CLIP's image processor makes. Raises UserError as vision_config
    does, and where the two differ in width or number of tokens.
    """
    clip_fields = c.table("clip", optional=True).values
    dinov2_fields = c.table("dinov2", optional=True).values
    for name, fields in (("clip", clip_fields), ("dinov2", dinov2_fields)):
        is_mixture = fields.get("model_type") == "mof"
        need(not is_mixture, f"{where}:{name}:model_type", "mof", "take a single encoder")

    clip = vision_config(clip_fields, preprocessor, f"{where}:clip", images)
    dinov2 = vision_config(dinov2_fields, clip.processor.to_hf(), f"{where}:dinov2", images)

    sizes = [(c.width, c.tokens("patch")) for c in (clip, dinov2)]
    fix = "take a CLIP and a DINOv2 with equal ones"
    need(sizes[0] == sizes[1], f"{where}:(width, tokens)", sizes, fix)
    return replace(clip, beside=dinov2)


def vision_half(hf: dict, where: object = "vision_config") -> dict:
    """Return the vision half of a full CLIP's or SigLIP's config.json; of others the whole.

    The published files of these have a text half too, which is not ours to load. In a mixture the
    CLIP is halved. Raises UserError for a half that is no table.
    """
    fields = Fields(hf, where)
    kind = fields.text("model_type", default=None)
    if kind in ("clip", "siglip", "siglip2"):
        half = fields.table("vision_config", optional=True).values
        return half | {"model_type": f"{kind}_vision_model"}
    if kind == "mof":
        return hf | {"clip": vision_half(fields.table("clip", optional=True).values, where)}
    return hf


def vision_config(
    hf: dict,
    preprocessor: dict | None = None,
    where: object = "vision_config",
    images: object = "preprocessor_config.json",
) -> VisionConfig:
    """Return the config of an encoder, from its config.json and preprocessor_config.json.

    where, images: what errors name as the places of the two. Raises UserError for a model or an
    image processor that we cannot reproduce, and for a field of the wrong kind or out of range.
    """
    fields = Fields(hf, where)
    kind = fields.text("model_type", default=None)
    if kind == "mof":
        return mixture_config(fields, preprocessor, where, images)

    hf = vision_half(hf, where)
    kind = hf.get("model_type")
    known = f"one of {', '.join(FAMILIES)}"
    need(kind in FAMILIES, f"{where}:model_type", kind, known)
    family = FAMILIES[kind]

    # A null that has no default stays, as it may not be what transformers fills in.
    given = {}
    for key, value in hf.items():
        if value is not None or key not in family.defaults:
            given[key] = value
    filled = Fields(family.defaults | given | {"model_type": kind}, where)
    check_fields(filled)
    config = family.config(filled)

    processor = type(config.processor).from_hf(preprocessor or {}, config.processor, images)
    if config.native and processor.patch_size != config.patch_size:
        what = f"{processor.patch_size} is not the encoder's {config.patch_size}"
        raise UserError(f"{images}:patch_size", what, "give the one that belongs to this encoder")
    config = replace(config, processor=processor)
    fits = config.any_size or processor.side == config.image_size
    fix = f"the image processor makes {processor.side}: give the one that belongs to this encoder"
    need(fits, f"{where}:image_size", config.image_size, fix)

    if processor.side < config.patch_size:
        what = f"{processor.side} pixels are less than a patch of {config.patch_size}"
        raise UserError(images, what, "give the image processor that belongs to this encoder")
    tokens = config.tokens("cls_patch")
    if tokens > MOST_TOKENS:
        what = f"{processor.side} pixels in patches of {config.patch_size} are {tokens} tokens"
        raise UserError(f"{where}:patch_size", what, f"at most {MOST_TOKENS} can be seen")
    return config


# -------------------------------------------------------------------------------------- making one


def build_encoder(
    config: VisionConfig, feature_layer: int = -2, feature_select: str = "patch"
) -> nn.Module:
    """Return the VisionEncoder or Mixture of a config, with PyTorch's random weights."""
    if config.beside is not None:
        return Mixture(config, feature_layer, feature_select)
    if config.native:
        return NaFlexEncoder(config, feature_layer, feature_select)
    return VisionEncoder(config, feature_layer, feature_select)


def load_encoder(
    path,
    dtype=None,
    device="cpu",
    feature_layer=-2,
    feature_select="patch",
    allow_pickle=False,
) -> nn.Module:
    """Return a pretrained encoder from a Hugging Face folder or id.

    dtype None keeps the file's; allow_pickle also reads pytorch_model.bin, tensors only. Raises
    UserError as vision_config and weights.load do.
    """
    folder = resolve(str(path), allow_pickle=allow_pickle)
    hf = read_json(folder / "config.json")
    images = read_preprocessor(folder)
    config = vision_config(hf, images, folder / "config.json", preprocessor_place(folder))
    with weights.empty():
        encoder = build_encoder(config, feature_layer, feature_select)

    source = weights.Checkpoint(folder, allow_pickle)
    weights.load(
        encoder,
        source,
        encoder.rename,
        dtype=dtype,
        device=device,
        ignore=encoder.ignore,
    )
    return encoder
