"""Compare batches of text, pictures, tiles and videos on two ranks with each row alone.

`code` of tests/tools/training_runs.on_ranks. Losses and gradients must be equal, of every
connector, copied and sharded, and of one process that packs the rows in several ways.
"""

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import train
from config import Tune
from inputs.sample import Sample
from inputs.tiling_split import WHOLE, mark_names
from model import LLaVA
from packing import IGNORE, IMAGE_TOKEN, expand_images, pack_samples
from tests.tools.small_llava import SIDE, small
from training.parallel import ParallelModel, whole
from training.ranks import Ranks

# The modes split have longest edges of up to two views, and marks of one or two ids.
EDGE = 2 * SIDE
NAMES = [*mark_names(EDGE, SIDE), WHOLE]
SPLIT = {
    "feature_select": "cls_patch",
    "feature_layer": -1,
    "feature_norm": True,
    "image_mode": "split",
    "image_edge": EDGE,
    "image_marks": {name: [5 + i] * (1 + i % 2) for i, name in enumerate(NAMES)},
}
NANO = SPLIT | {"image_mode": "split_nanovlm"}
TILES = {"image_mode": "tiles", "image_grids": "1x2 2x1 2x2", "frames": 3}
ANYRES = TILES | {"image_mode": "anyres"}
ANYRES_MAX = TILES | {"image_mode": "anyres_max", "image_views": 1}
NATIVE = {
    "feature_select": "cls_patch",
    "feature_layer": -1,
    "image_mode": "native",
    "frames": 3,
}

# (tower, connector, its options, how pictures are seen). A view has 3 x 3 tokens, that of a NaFlex
# up to 12. Every entry of CONNECTORS but mof_mlp, which needs two encoders, and the MLPs of other
# depths.
RESAMPLER = {"num_queries": 4, "num_resampler_layers": 1}
CASES = (
    ("siglip", "pixel_shuffle", {"factor": 3}, SPLIT),
    ("siglip", "pixel_shuffle", {"factor": 3, "mlp_depth": 2}, NANO),
    ("clip", "mlp2x_gelu", {}, ANYRES),
    ("clip", "mlp2x_gelu", {}, ANYRES_MAX),
    ("clip", "avg_pool", {"factor": 3}, TILES),
    ("clip", "fourier", {"side": 2}, TILES),
    ("clip", "c_abstractor", {"num_queries": 4, "hidden_size": 16, "depth": 1}, TILES),
    ("clip", "cross_attention", {"num_queries": 3}, TILES),
    ("clip", "mean_mlp2x_gelu", {}, TILES),
    ("clip", "linear", {}, TILES),
    ("siglip2", "mlp2x_gelu", {}, NATIVE),
    ("siglip2", "cross_attention", {"num_queries": 3}, NATIVE),
    ("clip", "resampler", RESAMPLER, TILES),
    ("clip", "naiveresampler", RESAMPLER, TILES),
    ("clip", "groupresampler", RESAMPLER | {"group": 2}, TILES),
    (
        "clip",
        "qformer",
        {
            "num_queries": 3,
            "hidden_size": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 16,
        },
        TILES,
    ),
)

# Which rows each rank packs into which micro-batches. One rank has text alone first, and fewer
# micro-batches.
SHARES = (((4, 1), (0,), (2,)), ((5,), (3, 6)))


def noise(width: int, height: int) -> Image.Image:
    """Return a picture of noise, always the same of one size."""
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def rows_of(model: LLaVA) -> list[Sample]:
    """Return rows of one picture, several, text alone and, where the mode has one, a video."""
    views = model.views
    wide = noise(50, 20)
    tall = noise(21, 47)
    little = noise(9, 8)
    several = [views.for_images(3).picture(picture) for picture in (little, tall, wide)]
    film = views.picture(little)
    if not views.marks:  # the modes that have videos
        film = views.clip([little, tall, wide])

    rows = []
    kinds = ([views.picture(wide)], [], several, [film], [], [], [views.picture(tall)])
    for i, items in enumerate(kinds):
        g = torch.Generator().manual_seed(i)
        ids = torch.randint(40, 97, (12 + i,), generator=g)
        ids[2 : 2 + len(items)] = IMAGE_TOKEN
        labels = ids.masked_fill(torch.arange(len(ids)) < 6, IGNORE)
        counts = [views.positions(item.shape) for item in items]
        row_labels = expand_images(ids, counts, labels)
        rows.append(Sample(expand_images(ids, counts), row_labels, items, i, 0))
    return rows


def step(case: tuple, mode: str, ranks: Ranks, micro_batches) -> tuple[float, dict]:
    """Return the loss and the gradients of a step, summed over these micro-batches of all ranks."""
    tower, connector, options, seen = case
    model = small("llama", tower, connector=connector, connector_options=options, **seen).train()
    train.set_trainable(model, Tune(llm="full", vision="full", connector="full"))
    parallel_model = ParallelModel(model, mode, ranks)
    rows = rows_of(model)

    total = 0.0
    batches = [pack_samples([rows[i] for i in micro_batch]) for micro_batch in micro_batches]
    for i, batch in enumerate(parallel_model.in_step(batches)):
        with parallel_model.accumulating(last=i + 1 == len(batches)):
            loss = parallel_model.loss(batch)
            parallel_model.backward(loss)
        total += loss.item()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
    return total, gradients


def check(case: tuple, how: str, got: tuple[float, dict], want: tuple[float, dict]):
    """Assert that losses and gradients are equal."""
    assert abs(got[0] - want[0]) <= 1e-5 * want[0], (case, how, got[0], want[0])
    for name, gradient in want[1].items():
        error = (got[1][name] - gradient).abs().max()
        assert error <= 1e-5 * max(1, gradient.abs().max()), (case, how, name, error)


def main():
    ranks = Ranks.join("cpu")
    alone = Ranks(0, 1, ranks.device)
    for case in CASES:
        want = step(case, "none", alone, [(i,) for i in range(7)])
        check(case, "packed", step(case, "none", alone, [range(7)]), want)
        check(case, "split", step(case, "none", alone, [(6, 0, 1), (5, 2), (4, 3)]), want)
        for mode in ("ddp", "fsdp"):
            loss, gradients = step(case, mode, ranks, SHARES[ranks.rank])
            check(case, mode, (ranks.total(loss), gradients), want)
        if ranks.is_first:
            print(f"{case[1]} {case[3]['image_mode']}: equal")
    dist.destroy_process_group()
