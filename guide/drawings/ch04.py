"""Figures of chapter 4: three kinds of blocks, and how a product falls with the distance."""

import torch

from guide.drawings import svg
from kernels.rope import rope
from model import rope_table

NORM, PART, SUM = svg.GREY, svg.BLUE, svg.ORANGE


def column(x: float, title: str, users: str, parts: list[str]) -> str:
    """Draw a block whose parts follow each other, from the bottom up; "+" adds to the stream."""
    stream = x + 150
    body = svg.text(x, 28, title, bold=True) + svg.text(x, 47, users, 12, svg.GREY)
    body += svg.arrow(stream, 420, stream, 66, svg.INK, 2)

    # A branch leaves the stream below its first part and comes back at its "+".
    y = 390
    below = y  # where the line to the next part begins
    begins = True
    for part in parts:
        if part == "+":
            body += svg.line(x + 55, below, x + 55, y + 10)
            body += svg.arrow(x + 55, y + 10, stream - 10, y + 10)
            body += svg.circle(stream, y + 10, 9, svg.PALE[SUM], SUM)
            body += svg.text(stream, y + 15, "+", 14, anchor="middle")
            begins = True
            y -= 26
            continue
        if begins:
            body += svg.line(stream, y + 24, x + 55, y + 24)
            begins = False
            below = y + 24
            y -= 14
        body += svg.line(x + 55, below, x + 55, y - 18)
        below = y - 8
        colour = NORM if part == "norm" else PART
        body += svg.box(x, y - 8, 110, 30, part, colour, 13)
        y -= 40
    return body


def blocks() -> str:
    """Draw the blocks of Llama, Gemma-3 and Phi."""
    body = column(30, "Block", "Llama, Qwen, Mistral, Gemma", "norm attention + norm MLP +".split())
    sandwich = "norm attention norm + norm MLP norm +".split()
    body += column(270, "SandwichBlock", "Gemma-2, Gemma-3", sandwich)

    # Both parts read the same norm, so there is one branch, which forks.
    x, stream = 500, 690
    body += svg.text(x, 28, "ParallelBlock", bold=True) + svg.text(x, 47, "Phi-2", 12, svg.GREY)
    body += svg.arrow(stream, 420, stream, 66, svg.INK, 2)
    body += svg.line(stream, 400, x + 85, 400) + svg.line(x + 85, 400, x + 85, 380)
    body += svg.box(x + 30, 350, 110, 30, "norm", NORM, 13)
    body += svg.arrow(x + 60, 350, x + 40, 296) + svg.arrow(x + 110, 350, x + 130, 296)
    body += svg.box(x - 5, 266, 85, 30, "attention", PART, 13)
    body += svg.box(x + 90, 266, 80, 30, "MLP", PART, 13)
    body += svg.line(x + 38, 266, x + 38, 220) + svg.line(x + 130, 266, x + 130, 220)
    body += svg.arrow(x + 38, 220, stream - 10, 220)
    body += svg.circle(stream, 220, 9, svg.PALE[SUM], SUM)
    body += svg.text(stream, 225, "+", 14, anchor="middle")
    return svg.figure(720, 440, body, "The three kinds of blocks, read from the bottom up")


def distance() -> str:
    """Draw the product of a query and a key of equal numbers over their distance."""
    positions = torch.arange(0, 201)
    ones = torch.ones(len(positions), 1, 64)
    series = {}
    for theta in (100.0, 10000.0):
        turned, _ = rope(ones, ones, *rope_table(positions, 64, theta))
        products = (turned[:1] * turned).sum(-1)[:, 0] / 64
        points = zip(positions.tolist(), products.tolist(), strict=True)
        series[f"base {theta:.0f}"] = list(points)
    body = svg.curves(20, 16, 680, 300, series, "distance in tokens", "product")
    return svg.figure(720, 330, body, "The product of a turned query and key by their distance")


FIGURES = {"04-blocks.svg": blocks, "04-distance.svg": distance}
