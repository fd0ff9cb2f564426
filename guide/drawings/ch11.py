"""Chapter 11: pictures of low rank, the sixteen numbers of NF4, what a merge into them loses."""

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from guide.drawings.svg import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    circle,
    curves,
    figure,
    line,
    picture,
    rectangle,
    text,
)
from kernels import nf4

SIDE = 20  # pixels


def drawing() -> Tensor:
    """Return a grey picture (SIDE, SIDE) of a disc, a square and a slanted bar, from 0 to 1."""
    image = Image.new("L", (4 * SIDE, 4 * SIDE), 235)
    draw = ImageDraw.Draw(image)
    draw.ellipse([6, 6, 36, 36], fill=60)
    draw.rectangle([46, 10, 70, 34], fill=120)
    draw.line([12, 72, 68, 46], fill=20, width=9)
    small = image.reduce(4)
    return torch.tensor(list(small.tobytes())).view(SIDE, SIDE) / 255


def ranks() -> str:
    """Draw a picture and its best approximations of several ranks."""
    whole = drawing()
    left, values, right = torch.linalg.svd(whole)
    body = ""
    for i, rank in enumerate((SIDE, 1, 2, 4, 8)):
        shown = left[:, :rank] * values[:rank] @ right[:rank]
        grey = (shown.clamp(0, 1) * 32).round() * 8
        grey = grey.clamp(max=255).int()[:, :, None].expand(-1, -1, 3)
        x = 20 + i * 138
        body += picture(x, 44, grey.tolist(), cell=6.4)
        if rank == SIDE:
            name, count = "the matrix", f"{SIDE * SIDE} numbers"
        else:
            name, count = f"rank {rank}", f"{2 * SIDE * rank} numbers"
        body += text(x, 32, name, bold=True)
        body += text(x, 192, count, 13, GREY)
    return figure(720, 210, body, "A picture as a product of two thin matrices, of several ranks.")


def codes() -> str:
    """Draw the weights, each divided by the largest of its block, and two tables."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(4096, 64, generator=generator)
    scaled = blocks / blocks.abs().amax(1, keepdim=True)
    counts = torch.histc(scaled, 60, -1, 1)
    counts = counts / counts[1:-1].max()  # the two ends hold the largest of each block

    def across(value: float) -> float:
        return 40 + (value + 1) * 320

    body = text(40, 24, "weights, each divided by the largest of its block of 64")
    for i, count in enumerate(counts.clamp(max=1.0).tolist()):
        height = 120 * count
        body += rectangle(40 + i * 640 / 60, 160 - height, 640 / 60 - 1, height, BLUE, opacity=0.45)
    body += line(40, 160, 680, 160)

    tables = (
        ("NF4", nf4.NF4_CODE, GREEN, 186),
        ("evenly spaced", torch.linspace(-1, 1, 16).tolist(), ORANGE, 226),
    )
    for name, table, colour, y in tables:
        for value in table:
            body += circle(across(value), y, 4.5, colour)
        body += text(40, y + 20, name, 13, colour)
    for value in (-1, 0, 1):
        body += text(across(value), 264, str(value), 12, GREY, "middle")
    return figure(720, 276, body, "The sixteen values of NF4 are dense where weights are many.")


def merge() -> str:
    """Draw how much of an update is lost when it is merged into four bits."""
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    below = nf4.dequantize(nf4.quantize(weight, double=False), torch.float32)
    thin = torch.Generator().manual_seed(1)
    update = torch.randn(128, 4, generator=thin) @ torch.randn(4, 64, generator=thin)
    update = update * weight.norm() / update.norm()

    points = []
    for percent in range(1, 41):
        change = percent / 100 * update
        again = nf4.dequantize(nf4.quantize(below + change, double=False), torch.float32)
        wrong = (again - below - change).norm() / change.norm()
        points.append((percent, wrong.item()))
    series = {"merged into four bits": points, "left out": [(1, 1.0), (40, 1.0)]}
    label = "size of the update, in per cent of the weight"
    body = curves(20, 14, 680, 250, series, label, "relative error of the update", low=0, high=1.2)
    return figure(720, 276, body, "A small update does not survive a merge into four bits.")


FIGURES = {"11-rank.svg": ranks, "11-codes.svg": codes, "11-merge.svg": merge}
