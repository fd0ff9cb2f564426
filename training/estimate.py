"""What a stage costs: the memory of one GPU in bytes, and the operations on one row.

    row = mean_row(rows, stage.template, model.views)      # what a row has, or what is assumed
    needs = estimate(model, stage, row, recompute=False)   # requires_grad says what trains
    needs.memory.total, needs.operations

Below: the assumptions; a row of the data (`mean_row`); one part of a model (`cost`); a stage
(`estimate`). Everything but the number of parameters is an estimate.

Memory of one GPU. Each holds the whole model, so more of them save none:

    weights      4 P          P parameters in float32; frozen matrices 2 in bfloat16, 0.516 in NF4,
                              1 in int8
    copies       2 P_m        bfloat16 copies of the P_m in matrices that train: autocast makes
                              them and keeps them
    gradients    4 P_t        of the P_t that train; AdamW's two moments: 8 P_t
    activations  per token and block of width D: 2 for each input and output of each matrix, 16 D
                 for norms and the float32 residual stream. Kept by every block that backward
                 passes through; with gradient checkpointing these keep their input alone, 4 D,
                 and one block at a time has the rest
    logits       16 V         per supervised token, V entries: in bfloat16 and float32, log-softmax,
                              both gradients

Operations on one token of a part with N parameters in matrices (no embeddings; the head sees
supervised tokens only):

    2 N     forward only         a frozen encoder
    4 N     + input gradients    a frozen part behind one that trains: the language model of stage 1
    6 N     + weight gradients   a part that trains
    + 2 N   where gradient checkpointing computes forward again
    attention: 4 T H d per token and block over T tokens, half of it if causal; 2.5 times as much
    again in backward

Hours are operations / (datasheet peak in bfloat16 * SHARE).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import dropwhile

import torch
from torch import nn

from config import Stage
from encoders import VisionEncoder
from inputs.media import media_names
from inputs.rows import RowMixture, Rows
from inputs.tiling import Tiling
from model import LLaVA
from packing import ItemShape

# Assumptions.
SHARE = 0.3  # of the peak, over a whole run; plain PyTorch reaches about 0.2 to 0.4
SPARE = 2e9  # bytes for CUDA's and NCCL's own use and for fragments
PICTURE = (640, 480)  # pixels, where the number of tiles depends on them
TEXT = 200  # text tokens of a row, where there is no data
ANSWERS = 0.5  # the supervised share of them
CHARACTERS = 4  # per token of text

# Bytes of a weight in a quantized linear, its scales included.
BYTES = {"qlora-nf4": 0.516, "qlora-int8": 1}


@dataclass(frozen=True)
class GPU:
    """What a datasheet says of a GPU."""

    memory: int  # GB
    peak: float  # operations per second in bfloat16, without sparsity


GPUS = {
    "A100-40G": GPU(40, 312e12),
    "A100-80G": GPU(80, 312e12),
    "H100": GPU(80, 989e12),
    "H200": GPU(141, 989e12),
}


@dataclass(frozen=True)
class RowSize:
    """What one row of the data has, on average."""

    views: float  # that the encoder sees
    positions: float  # of its pictures and videos in the sequence
    text: float  # tokens
    supervised: float  # tokens


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, by what they are for."""

    weights: float
    copies: float
    gradients: float
    AdamW: float
    activations: float
    logits: float
    spare: float = SPARE

    @property
    def by_kind(self) -> dict[str, float]:
        """The bytes by the names of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def total(self) -> float:
        """All bytes together."""
        return sum(self.by_kind.values())


@dataclass(frozen=True)
class Estimate:
    """What a stage costs."""

    memory: Memory  # of one GPU
    operations: float  # on one row, forward and backward


@dataclass(frozen=True)
class Cost:
    """What one sequence through a part costs."""

    operations: float
    kept: float  # bytes that stay until backward
    inside: float  # bytes of one block while it is computed

    def times(self, n: float) -> Cost:
        """Return the cost of `n` such sequences."""
        return Cost(self.operations * n, self.kept * n, self.inside * n)


# ----------------------------------------------------------------------------------- what a row has


def mean_row(rows: Rows | RowMixture | None, template: str, views: Tiling) -> RowSize:
    """Return what up to 200 rows have on average; without rows, what is assumed.

    All pictures are taken to be of PICTURE's size, because their files are not opened.
    """
    shapes = {"image": views.shape(PICTURE), "video": ItemShape(views.frames)}
    if not rows:
        picture = shapes["image"]
        return RowSize(picture.views, views.positions(picture), TEXT, TEXT * ANSWERS)

    # The sums over evenly spaced rows.
    seen = 0  # views
    positions = 0
    asked = 0.0  # tokens of the questions
    said = 0.0  # tokens of the answers
    step = math.ceil(len(rows) / 200)
    picked = range(0, len(rows), step)
    for i in picked:
        row = rows[i]
        kind, names = media_names(row, "")
        shape = shapes[kind]
        seen += len(names) * shape.views
        positions += len(names) * views.positions(shape)

        asked_here = 0.0
        said_here = 0.0
        for turn in row["conversations"]:
            text = turn["value"].replace("<image>", "").strip()
            tokens = len(text) / CHARACTERS
            if turn["from"] == "gpt":
                said_here += tokens
            elif template != "pretrain":  # that template leaves the questions out
                asked_here += tokens
        asked += asked_here
        said += said_here

    n = len(picked)
    return RowSize(
        views=seen / n,
        positions=positions / n,
        text=(asked + said) / n,
        supervised=said / n,
    )


# ------------------------------------------------------------------------------- what a part costs


def parameters_in_backward(module: nn.Module, upstream: bool) -> set[nn.Parameter]:
    """Return the parameters that the backward pass goes through.

    If something `upstream` of the module trains, that is all of them; else all from the first
    trainable one on, because modules register parameters in the order in which forward uses them.
    """
    if upstream:
        return set(module.parameters())
    return set(dropwhile(lambda p: not p.requires_grad, module.parameters()))


def cost(
    part: nn.Module,
    blocks: Sequence[nn.Module],
    width: int,
    heads: int,
    tokens: float,
    upstream: bool,
    recompute: bool,
    causal: bool = False,
) -> Cost:
    """Return what a sequence of `tokens` costs in a part made of `blocks` of this width.

    heads: the sum over the blocks of heads * head width. upstream: whether something before the
    part trains. recompute: gradient checkpointing.
    """
    # What backward goes through: the parameters, and for each block whether it does.
    passed = parameters_in_backward(part, upstream)
    in_backward = [not passed.isdisjoint(block.parameters()) for block in blocks]

    # Products with the matrices. Embeddings are looked up, which costs nothing.
    tables = {m.weight for m in part.modules() if isinstance(m, nn.Embedding)}
    per_token = 0
    for p in part.parameters():
        if p.dim() < 2 or p in tables:
            continue
        factor = 2  # forward: a multiplication and an addition
        if p in passed:
            factor += 2  # the gradient of its input
            if recompute:
                factor += 2  # forward again
        if p.requires_grad:
            factor += 2  # its own gradient
        per_token += p.numel() * factor

    # Attention: queries times keys and weights times values, 2 T^2 H d each. Backward is 2.5 times
    # as much. A causal mask saves half.
    attention = 4 * tokens**2 * heads
    if causal:
        attention /= 2
    share_in_backward = in_backward.count(True) / max(1, len(in_backward))
    backward = 2.5
    if recompute:
        backward += 1
    attention *= 1 + backward * share_in_backward

    # Activations: 16 D for norms and the residual stream, 2 bytes for all that enters and leaves a
    # matrix of shape (outputs, inputs).
    inside = []
    for block in blocks:
        sides = sum(sum(p.shape) for p in block.parameters() if p.dim() > 1)
        inside.append(tokens * (16 * width + 2 * sides))

    # Recomputed blocks keep only their input, in float32.
    kept = 0
    for size, keeps in zip(inside, in_backward, strict=True):
        if keeps and recompute:
            kept += 4 * width * tokens
        elif keeps:
            kept += size

    operations = tokens * per_token + attention
    return Cost(operations, kept, max(inside, default=0))


def _part_costs(model: LLaVA, row: RowSize, tokens: float, recompute: bool) -> list[Cost]:
    """Return the cost of each encoder, the connector and the language model for one row."""
    lm = model.language_model
    tower = model.vision_tower
    connector = model.connector
    width = lm.lm_head.weight.size(1)

    # A mixture of features has two encoders, which make as many tokens of the same views.
    costs = []
    view_tokens = 0
    for encoder in tower.modules():
        if not isinstance(encoder, VisionEncoder):
            continue
        view_tokens = encoder.config.tokens("cls_patch")
        a_view = cost(
            encoder,
            encoder.blocks,
            width=encoder.config.width,
            heads=encoder.config.width * len(encoder.blocks),
            tokens=view_tokens,
            upstream=False,
            recompute=recompute,
        )
        costs.append(a_view.times(row.views))

    # The connector is one block without attention. It is never recomputed.
    tower_trains = any(p.requires_grad for p in tower.parameters())
    a_view = cost(
        connector,
        [connector],
        width=width,
        heads=0,
        tokens=view_tokens,
        upstream=tower_trains,
        recompute=False,
    )
    costs.append(a_view.times(row.views))

    connector_trains = any(p.requires_grad for p in connector.parameters())
    heads = sum(layer.heads for layer in lm.config.layers)
    a_row = cost(
        lm.model,
        lm.blocks,
        width=width,
        heads=heads * lm.config.head_dim,
        tokens=tokens,
        upstream=tower_trains or connector_trains,
        recompute=recompute,
        causal=True,
    )
    costs.append(a_row)
    return costs


# ------------------------------------------------------------------------------ what a stage costs


def estimate(model: LLaVA, stage: Stage, row: RowSize, recompute: bool) -> Estimate:
    """Return what a stage costs, in which requires_grad says what trains.

    recompute: gradient checkpointing.
    """
    tokens = min(row.positions + row.text, stage.max_tokens)
    costs = _part_costs(model, row, tokens, recompute)

    # The head sees supervised tokens only: forward, the gradient of its input and, if it trains,
    # its own.
    head = model.language_model.lm_head.weight
    vocabulary, width = head.shape
    passes = 2
    if head.requires_grad:
        passes += 1
    head_operations = 2 * vocabulary * width * row.supervised * passes
    operations = head_operations + sum(c.operations for c in costs)

    # Rows of a micro-batch: at least one, at most those of the step.
    rows = stage.micro_batch_tokens // max(1, int(tokens))
    rows = min(stage.global_batch, max(1, rows))

    # All that is kept until backward, and the largest block while backward goes through it.
    kept = sum(c.kept for c in costs)
    inside = max(c.inside for c in costs)

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = Memory(
        weights=_weight_bytes(model, stage),
        copies=_copied_bytes(model),
        gradients=4 * trained,
        AdamW=8 * trained,
        activations=rows * (kept + inside),
        logits=16 * vocabulary * rows * row.supervised,
    )
    return Estimate(memory, operations)


def _weight_bytes(model: LLaVA, stage: Stage) -> float:
    """Return the bytes of all parameters: 4 each, less for those of frozen linears.

    Training keeps frozen linears in bfloat16, or quantized. Heads are never quantized.
    """
    when_frozen = {}  # a linear's weight -> bytes of one of its values
    for part, how in (
        (model.language_model, stage.tune.llm),
        (model.vision_tower, stage.tune.vision),
    ):
        for name, module in part.named_modules():
            if isinstance(module, nn.Linear):
                bytes_per_value = 2
                if name != "lm_head":
                    bytes_per_value = BYTES.get(how, 2)
                when_frozen[module.weight] = bytes_per_value

    size = 0
    for p in model.parameters():
        bytes_per_value = 4
        if not p.requires_grad:
            bytes_per_value = when_frozen.get(p, 4)
        size += p.numel() * bytes_per_value
    return size


def _copied_bytes(model: LLaVA) -> int:
    """Return the bytes of autocast's bfloat16 copies of the matrices that train."""
    copied = 0
    for part in (model.language_model, model.vision_tower):
        linears = {m.weight for m in part.modules() if isinstance(m, nn.Linear)}
        copied += sum(w.numel() for w in linears if w.requires_grad)
    for p in model.connector.parameters():
        if p.requires_grad and p.dim() > 1:
            copied += p.numel()
    return 2 * copied


def peak_share(model: LLaVA, stage: Stage, rows: Rows | RowMixture, device: torch.device) -> float:
    """Return what one token per second takes of this GPU's peak; 0 if the peak is not known.

    Tokens per second times this is the model FLOPs utilization, for which recomputation is no work.
    """
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)

    # A100-40G and A100-80G have the same peak, so the name before the dash is enough.
    peaks = [gpu.peak for key, gpu in GPUS.items() if key.split("-")[0] in name]
    if not peaks:
        return 0.0

    row = mean_row(rows, stage.template, model.views)
    needs = estimate(model, stage, row, recompute=False)
    tokens = min(row.positions + row.text, stage.max_tokens)
    return needs.operations / tokens / peaks[0]


def hours(stage_rows: int, operations: float, gpu: GPU, gpus: int) -> float:
    """Return the hours that so many GPUs take for so many rows."""
    seconds = stage_rows * operations / (gpu.peak * SHARE) / gpus
    return seconds / 3600
