"""Figures of chapter 4: three kinds of blocks, and how a product falls with the distance."""

import torch

from guide.drawings import svg
from kernels.rope import rope
from model import rope_table

NORM = svg.GREY
PART = svg.BLUE
SUM = svg.ORANGE
BOTTOM = 420


def stream(x: float, title: str, users: str) -> str:
    """Draw the residual stream of a block at x + 150, and the names above it."""
    body = svg.text(x, 28, title, bold=True)
    body += svg.text(x, 47, users, 12, svg.GREY)
    return body + svg.arrow(x + 150, BOTTOM, x + 150, 66, svg.INK, 2)


def plus(x: float, y: float) -> str:
    """Draw the place where something is added to the stream."""
    body = svg.circle(x, y, 9, svg.PALE[SUM], SUM)
    return body + svg.text(x, y + 5, "+", 14, anchor="middle")


def column(x: float, title: str, users: str, parts: str) -> str:
    """Draw a block whose parts follow each other, from the bottom up; "+" adds to the stream."""
    body = stream(x, title, users)
    middle = x + 55
    right = x + 150

    # A branch leaves the stream below its first part and comes back at its "+". `below` is where
    # the line to the next part begins.
    y = 390
    below = y
    begins = True
    for part in parts.split():
        if part == "+":
            body += svg.line(middle, below, middle, y + 10)
            body += svg.arrow(middle, y + 10, right - 10, y + 10)
            body += plus(right, y + 10)
            begins = True
            y -= 26
            continue

        if begins:
            below = y + 24
            body += svg.line(right, below, middle, below)
            begins = False
            y -= 14
        body += svg.line(middle, below, middle, y - 18)
        below = y - 8

        colour = PART
        if part == "norm":
            colour = NORM
        body += svg.box(x, below, 110, 30, part, colour, 13)
        y -= 40
    return body


def fork(x: float, title: str, users: str) -> str:
    """Draw a block whose two parts read the same norm: one branch that forks."""
    body = stream(x, title, users)
    right = x + 150
    left_part = x
    right_part = x + 90

    # From the stream to the norm, and from there to both parts.
    body += svg.line(right, 400, x + 45, 400)
    body += svg.line(x + 45, 400, x + 45, 380)
    body += svg.box(x - 10, 350, 110, 30, "norm", NORM, 13)
    body += svg.arrow(x + 20, 350, left_part, 296)
    body += svg.arrow(x + 70, 350, right_part, 296)
    body += svg.box(left_part - 45, 266, 85, 30, "attention", PART, 13)
    body += svg.box(right_part - 40, 266, 80, 30, "MLP", PART, 13)

    # Both come together.
    body += svg.line(left_part, 266, left_part, 220)
    body += svg.line(right_part, 266, right_part, 220)
    body += svg.arrow(left_part, 220, right - 10, 220)
    return body + plus(right, 220)


def blocks() -> str:
    """Draw the blocks of Llama, Gemma-3 and Phi."""
    body = column(30, "Block", "Llama, Qwen, Mistral, Gemma", "norm attention + norm MLP +")
    sandwich = "norm attention norm + norm MLP norm +"
    body += column(270, "SandwichBlock", "Gemma-2, Gemma-3", sandwich)
    body += fork(540, "ParallelBlock", "Phi-2")
    return svg.figure(720, 440, body, "The three kinds of blocks, read from the bottom up")


def distance() -> str:
    """Draw the product of a query and a key of equal numbers over their distance."""
    positions = torch.arange(0, 201)
    ones = torch.ones(len(positions), 1, 64)
    series = {}
    for theta in (100.0, 10000.0):
        turned, _ = rope(ones, ones, *rope_table(positions, 64, theta))
        products = (turned[:1] * turned).sum(-1)[:, 0] / 64
        points = torch.stack([positions, products], dim=1)  # (T, 2)
        series[f"base {theta:.0f}"] = points.tolist()
    body = svg.curves(20, 16, 680, 300, series, "distance in tokens", "product")
    return svg.figure(720, 330, body, "The product of a turned query and key by their distance")


FIGURES = {"04-blocks.svg": blocks, "04-distance.svg": distance}
