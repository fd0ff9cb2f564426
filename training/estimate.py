"""What a stage costs: the operations on one row of its data, and the hours they take.

    row = mean_row(rows, spec, model.views)            # what a row has, or what is assumed
    count = operations(model, stage, row, recompute=False)     # requires_grad says what trains
    hours(rows, count, GPUS["H100"], gpus=8)

Below: the assumptions; a row of the data (`mean_row`); one part of a model (`part_operations`); a
stage (`operations`). Memory is measured, in memory.py.

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
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import dropwhile

import torch
from torch import nn

from config import Stage, UserError
from connectors import CONNECTORS
from encoders import VisionEncoder
from inputs.conversation import check_turns
from inputs.media import media_names
from inputs.rows import RowMixture, Rows, in_few_blocks
from inputs.sample import SampleSpec, make_samples
from inputs.tiling import Tiling
from model import LLaVA
from packing import IGNORE, ONE_VIEW, ItemShape

# Assumptions.
SHARE = 0.3  # of the peak, over a whole run; plain PyTorch reaches about 0.2 to 0.4
PICTURE = (640, 480)  # pixels, where the number of tiles depends on them
TEXT = 200  # text tokens of a row, where there is no data
ANSWERS = 0.5  # the supervised share of them
CHARACTERS = 4  # per token of text, where there is no tokenizer


@dataclass(frozen=True)
class GPU:
    """What a datasheet says of a GPU."""

    memory: int  # GB
    peak: float  # operations per second in bfloat16, without sparsity


GPUS = {
    "4080-16G": GPU(16, 97e12),
    "4090-24G": GPU(24, 165e12),
    "A100-40G": GPU(40, 312e12),
    "A100-80G": GPU(80, 312e12),
    "H100": GPU(80, 989e12),
    "H200": GPU(141, 989e12),
}


@dataclass(frozen=True)
class RowSize:
    """What one row of the data has, on average; where rows are several samples, one of those."""

    views: float  # that the encoder sees
    positions: float  # of its pictures and videos in the sequence
    text: float  # tokens
    supervised: float  # tokens
    shape: ItemShape = ONE_VIEW  # of the item that is typical
    items: float = 1.0  # pictures and videos of that shape
    samples: float = 1.0  # of a row: more where a chat template rewrites earlier turns
    is_exact: bool = False  # the rows were tokenized, not guessed from their characters

    @property
    def tokens(self) -> float:
        """The length of its sequence."""
        return self.positions + self.text


# ----------------------------------------------------------------------------------- what a row has


def mean_row(
    rows: Rows | RowMixture | None, template: str, views: Tiling, spec: SampleSpec | None = None
) -> RowSize:
    """Return what up to 200 rows have on average; without rows, what is assumed.

    With spec the rows are made into samples, as training does, from the headers of their pictures.
    Without one (the tokenizer is not there), or where a picture is missing, tokens are guessed from
    the characters, and all pictures are taken to be of PICTURE's size.
    """
    picture = views.shape(PICTURE)
    if not rows:
        return RowSize(picture.views, views.positions(picture), TEXT, TEXT * ANSWERS, picture)

    # Evenly spaced rows.
    step = math.ceil(len(rows) / 200)
    sizes = []
    measured = 0  # rows
    for i in in_few_blocks(rows, range(0, len(rows), step)):
        of_row = []
        if spec is not None:
            with suppress(UserError, OSError):
                of_row = measure_row(rows, i, spec)
        if not of_row:
            with suppress(UserError):
                of_row = [guess_row(rows[i], template, views)]
        if of_row:
            sizes += of_row
            measured += 1

    # Where no row is one, training says so.
    if not sizes:
        return mean_row(None, template, views)

    # The items of all rows count as equal ones of the most frequent shape.
    shape = Counter(size.shape for size in sizes).most_common(1)[0][0]
    n = len(sizes)
    positions = sum(size.positions for size in sizes) / n
    return RowSize(
        views=sum(size.views for size in sizes) / n,
        positions=positions,
        text=sum(size.text for size in sizes) / n,
        supervised=sum(size.supervised for size in sizes) / n,
        shape=shape,
        items=positions / views.positions(shape),
        samples=n / measured,
        is_exact=all(size.is_exact for size in sizes),
    )


def measure_row(rows: Rows | RowMixture, i: int, spec: SampleSpec) -> list[RowSize]:
    """Return what each sample of row i has, by its tokens. Raises UserError if it has none."""
    sizes = []
    for sample in make_samples(rows, i, spec, pixels=False):
        shapes = [item.shape for item in sample.items]
        positions = sum(spec.views.positions(shape) for shape in shapes)
        size = RowSize(
            views=sum(shape.views for shape in shapes),
            positions=positions,
            text=len(sample.ids) - positions,
            supervised=int((sample.labels != IGNORE).sum()),
            shape=shapes[0] if shapes else spec.views.largest()[0],
            is_exact=True,
        )
        sizes.append(size)
    return sizes


def guess_row(row: dict, template: str, views: Tiling) -> RowSize:
    """Return what a row has, by its characters. Raises UserError if it has no turns."""
    check_turns(row.get("conversations"), prompt=False)
    kind, names = media_names(row)
    shape = views.for_images(len(names)).shape(PICTURE)
    if kind == "video":
        shape = views.clip_shape(views.frames, PICTURE)

    asked = 0.0  # tokens of the questions
    said = 0.0  # tokens of the answers
    for turn in row["conversations"]:
        text = turn["value"].replace("<image>", "").strip()
        tokens = len(text) / CHARACTERS
        if turn["from"] == "gpt":
            said += tokens
        elif template != "pretrain":  # that template leaves the questions out
            asked += tokens
    return RowSize(
        views=len(names) * shape.views,
        positions=len(names) * views.positions(shape),
        text=asked + said,
        supervised=said,
        shape=shape,
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


def part_operations(
    part: nn.Module,
    blocks: Sequence[nn.Module],
    heads: int,
    tokens: float,
    upstream: bool,
    recompute: bool,
    causal: bool = False,
) -> float:
    """Return what a sequence of `tokens` costs in a part made of `blocks`.

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
    return tokens * per_token + attention


# ------------------------------------------------------------------------------ what a stage costs


def share_of_keys(window: int | None, tokens: float) -> float:
    """Return the share of the keys of a causal mask that a layer's window leaves."""
    if window is None or window >= tokens:
        return 1.0

    # Of T tokens the first w see as many as before, w^2 / 2, the others w each; of T^2 / 2.
    share = window / tokens
    return share**2 + 2 * share * (1 - share)


def samples_of_micro_batch(stage: Stage, row: RowSize) -> int:
    """Return how many average samples a micro-batch has: at least one, at most the step's."""
    tokens = min(row.tokens, stage.max_tokens)
    samples = stage.micro_batch_tokens // max(1, int(tokens))
    return min(samples_of_step(stage, row), max(1, samples))


def samples_of_step(stage: Stage, row: RowSize) -> int:
    """Return how many samples an optimizer step has."""
    return round(stage.global_batch * row.samples)


def operations(model: LLaVA, stage: Stage, row: RowSize, recompute: bool) -> float:
    """Return the operations on one row, forward and backward; requires_grad says what trains.

    recompute: gradient checkpointing.
    """
    lm = model.language_model
    tower = model.vision_tower
    connector = model.connector

    # A mixture of features has two encoders, which make as many tokens of the same views.
    total = 0.0
    view_tokens = 0
    for encoder in tower.modules():
        if not isinstance(encoder, VisionEncoder):
            continue
        view_tokens = encoder.config.tokens("cls_patch")
        total += row.views * part_operations(
            encoder,
            encoder.blocks,
            heads=encoder.config.width * len(encoder.blocks),
            tokens=view_tokens,
            upstream=False,
            recompute=recompute,
        )

    # The connector is one block without attention. It is never recomputed. In a spatial one, most
    # linears stand behind what makes the tokens fewer.
    connector_tokens = view_tokens
    if CONNECTORS[model.config.connector].spatial:
        connector_tokens = model.image_tokens
    tower_trains = any(p.requires_grad for p in tower.parameters())
    total += row.views * part_operations(
        connector,
        [connector],
        heads=0,
        tokens=connector_tokens,
        upstream=tower_trains,
        recompute=False,
    )

    connector_trains = any(p.requires_grad for p in connector.parameters())
    tokens = min(row.tokens, stage.max_tokens)
    heads = 0.0
    for layer in lm.config.layers:
        heads += layer.heads * share_of_keys(layer.window, tokens)
    total += part_operations(
        lm.model,
        lm.blocks,
        heads=heads * lm.config.head_dim,
        tokens=tokens,
        upstream=tower_trains or connector_trains,
        recompute=recompute,
        causal=True,
    )

    # The head sees supervised tokens only: forward, the gradient of its input and, if it trains,
    # its own.
    head = lm.lm_head.weight
    passes = 2
    if head.requires_grad:
        passes += 1
    total += 2 * head.numel() * row.supervised * passes
    return row.samples * total


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
    tokens = row.samples * min(row.tokens, stage.max_tokens)
    return operations(model, stage, row, recompute=False) / tokens / peaks[0]


def hours(stage_rows: int, row_operations: float, gpu: GPU, gpus: int) -> float:
    """Return the hours that so many GPUs take for so many rows."""
    seconds = stage_rows * row_operations / (gpu.peak * SHARE) / gpus
    return seconds / 3600
