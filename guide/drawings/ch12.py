"""Chapter 12: the softmax that keeps up as scores arrive, and the blocks that a kernel visits."""

import torch
from torch import Tensor

from guide.drawings.svg import (
    BLUE,
    GREY,
    LIGHT,
    ORANGE,
    PALE,
    circle,
    figure,
    line,
    rectangle,
    text,
)

BLOCK = 25  # keys at a time in the first figure


def some_scores() -> Tensor:
    """Return 100 scores whose largest values come late."""
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.randn(100, generator=generator) + torch.linspace(0, 3, 100)


def online() -> str:
    """Draw scores as they arrive block by block, the largest so far, and the sum relative to it."""
    scores = some_scores()
    largest = float("-inf")
    total = 0.0
    body = text(40, 26, "scores, and the largest so far", colour=GREY, size=13)
    body += text(40, 186, "the sum so far, relative to it", colour=GREY, size=13)

    def across(key: float) -> float:
        return 40 + key * 6.5

    def down(score: float) -> float:
        return 105 - score * 7

    for key, score in enumerate(scores.tolist()):
        body += circle(across(key + 0.5), down(score), 2.6, BLUE)

    for start in range(0, len(scores), BLOCK):
        one = scores[start : start + BLOCK]
        new = max(largest, one.max().item())
        shrunk = total * torch.exp(torch.tensor(largest - new)).item()
        added = (one - new).exp().sum().item()
        begin, end = across(start), across(start + BLOCK)
        body += line(begin, down(new), end, down(new), ORANGE, 2.5)
        body += line(begin, 34, begin, 300, LIGHT, 1)

        # Two bars: what was there, scaled down, and what the block adds.
        for i, (name, value) in enumerate((("kept", shrunk), ("added", added))):
            height = value * 16
            x = begin + 24 + i * 56
            body += rectangle(x, 290 - height, 40, height, (ORANGE, BLUE)[i], radius=2)
            body += text(x + 20, 284 - height, f"{value:.2f}", 12, anchor="middle")
            body += text(x + 20, 306, name, 12, GREY, "middle")
        largest = new
        total = shrunk + added
    return figure(720, 320, body, "Online softmax: scores arrive in four blocks of 25 keys.")


def kind_of(queries: Tensor, keys: Tensor, samples: Tensor) -> str:
    """Say of a block of queries and keys whether it is seen whole, in part, or not at all."""
    same = samples[queries][:, None] == samples[keys][None, :]
    visible = same & (keys[None, :] <= queries[:, None])
    if visible.all():
        return "whole"
    if visible.any():
        return "edge"
    return "never"


def blocks() -> str:
    """Draw which blocks the kernel visits of a packed row of two samples, 32 tokens a block."""
    lengths = (288, 192)
    size = 32
    samples = torch.tensor([0] * lengths[0] + [1] * lengths[1])
    count = len(samples) // size
    colours = {"whole": PALE[BLUE], "edge": BLUE, "never": "#fafafa"}
    found = {"whole": 0, "edge": 0, "never": 0}
    body = ""
    cell = 18
    for i in range(count):
        for j in range(count):
            queries = torch.arange(i * size, (i + 1) * size)
            keys = torch.arange(j * size, (j + 1) * size)
            kind = kind_of(queries, keys, samples)
            found[kind] += 1
            body += rectangle(
                60 + j * cell, 40 + i * cell, cell - 1, cell - 1, colours[kind], LIGHT
            )
    body += text(60, 30, "keys: 288 tokens, then 192", 13, GREY)
    body += f'<g transform="translate(48 300) rotate(-90)">{text(0, 0, "queries", 13, GREY)}</g>\n'

    words = {
        "edge": "at the diagonal: with a mask",
        "whole": "seen whole: without a mask",
        "never": "never visited",
    }
    for i, (kind, said) in enumerate(words.items()):
        y = 90 + i * 34
        body += rectangle(370, y, 18, 18, colours[kind], GREY)
        body += text(398, y + 14, f"{found[kind]} blocks {said}")
    return figure(720, 330, body, "The blocks of scores that a packed row of two samples needs.")


FIGURES = {"12-online.svg": online, "12-blocks.svg": blocks}
