"""Figures of chapter 3: what connectors read, and where pixel shuffle puts tokens."""

import torch
from torch import Tensor

from connectors import build_connector, cut_squares, join_views
from guide.drawings import svg

GRID = (4, 4)
READERS = [
    ("mlp2x_gelu", {}, "a token in, a token out"),
    ("pixel_shuffle", {"factor": 2}, "a square of 2 x 2 each"),
    ("fourier", {"side": 2}, "all, the near ones most"),
    ("resampler", {"num_queries": 4, "num_resampler_layers": 1}, "all of them, as a set"),
]


def sensitivity(name: str, options: dict) -> Tensor:
    """Return how strongly each token out depends on each token in, (m, 16), at most 1.

    It is the norm of the gradient of the token's squared length.
    """
    torch.manual_seed(0)
    connector = build_connector(name, 16, 24, GRID, **options)
    tokens = torch.randn(1, 1, 16, 16, requires_grad=True)
    out = connector(join_views(name, tokens, GRID))[0]

    rows = []
    for token in out:
        (gradient,) = torch.autograd.grad(token.pow(2).sum(), tokens, retain_graph=True)
        rows.append(gradient[0, 0].norm(dim=-1))
    strength = torch.stack(rows)
    return strength / strength.max()


def reads() -> str:
    """Draw which tokens in each token out of four connectors depends on."""
    body = ""
    cell = 16
    for i, (name, options, note) in enumerate(READERS):
        # The first one is tall and stands at the left; the others stand below each other.
        x, y = 410, 70 + (i - 1) * 140
        if i == 0:
            x, y = 50, 70
        strength = sensitivity(name, options)
        body += svg.text(x, y - 32, name, bold=True)
        body += svg.text(x, y - 12, f"{len(strength)} tokens out: {note}", 12)
        numbers = [str(j) for j in range(len(strength))]
        body += svg.heat_map(x, y, strength.tolist(), cell, 0, 1, rows=numbers, size=10)
        body += svg.text(x, y + len(strength) * cell + 18, "16 tokens in, row by row", 12, svg.GREY)
    return svg.figure(720, 480, body, "Which tokens in each token out of a connector depends on")


def shuffle() -> str:
    """Draw the grid of numbered tokens, and the tokens that pixel shuffle makes of it."""
    squares = cut_squares(torch.arange(16).view(1, 4, 4, 1), 2).flatten(3)[0].flatten(0, 1)
    square_of = {}
    for square, members in enumerate(squares.tolist()):
        for member in members:
            square_of[member] = square

    body = svg.text(20, 30, "4 x 4 tokens of C channels", bold=True)
    for token in range(16):
        x = 20 + (token % 4) * 46
        y = 46 + (token // 4) * 46
        body += svg.box(x, y, 42, 42, str(token), svg.COLOURS[square_of[token]])
    body += svg.arrow(214, 138, 284, 138)

    body += svg.text(300, 30, "4 tokens of 4 C channels", bold=True)
    for square, members in enumerate(squares.tolist()):
        for place, token in enumerate(members):
            x = 300 + place * 44
            body += svg.box(x, 46 + square * 46, 44, 42, str(token), svg.COLOURS[square])
    body += svg.arrow(484, 138, 554, 138)
    body += svg.box(566, 108, 130, 60, ["a linear", "4 C to D"], svg.GREY)
    return svg.figure(720, 246, body, "Pixel shuffle joins the channels of neighbouring tokens")


FIGURES = {"03-reads.svg": reads, "03-shuffle.svg": shuffle}
