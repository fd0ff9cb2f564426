"""Figures of chapter 5: padding beside packing, and attention with and without boundaries."""

import random

import torch
from torch import Tensor

from guide.drawings import svg
from model import LanguageModel, init_weights
from packing import bin_pack, pack_rows

SAMPLES = 16
BAR = 12  # height of a sample


def sample_bar(x: float, y: float, length: int, scale: float) -> str:
    """Draw a sample: the tokens of its picture, then its text."""
    image = 36 * scale
    body = svg.rectangle(x, y, image, BAR, svg.ORANGE)
    return body + svg.rectangle(x + image, y, length * scale - image - 1.5, BAR, svg.BLUE)


def padding() -> str:
    """Draw samples in a padded matrix, and packed into rows of the same length."""
    draw = random.Random(0)
    lengths = [36 + round(draw.lognormvariate(3.5, 0.8)) for _ in range(SAMPLES)]
    longest = max(lengths)
    scale = 660 / longest
    left = 30

    filled = 100 * sum(lengths) / (SAMPLES * longest)
    body = svg.text(left, 28, f"Padded: {SAMPLES} rows, {filled:.0f} % of them tokens", bold=True)
    y = 42
    for length in lengths:
        body += svg.rectangle(left, y, 660, BAR, svg.LIGHT)
        body += sample_bar(left, y, length, scale)
        y += BAR + 3

    bins = bin_pack(lengths, longest)
    filled = 100 * sum(lengths) / (len(bins) * longest)
    y += 34
    title = f"Packed: {len(bins)} rows, {filled:.0f} % of them tokens"
    body += svg.text(left, y, title, bold=True)
    y += 14
    for samples in bins:
        body += svg.rectangle(left, y, 660, BAR, svg.LIGHT)
        x = left
        for sample in samples:
            body += sample_bar(x, y, lengths[sample], scale)
            x += lengths[sample] * scale
        y += BAR + 3

    y += 24
    for x, colour, words in (
        (left, svg.ORANGE, "picture, 36 tokens"),
        (left + 180, svg.BLUE, "text"),
        (left + 260, svg.LIGHT, "nothing"),
    ):
        body += svg.rectangle(x, y - BAR, 20, BAR, colour)
        body += svg.text(x + 28, y - 1, words, 13)
    return svg.figure(720, y + 20, body, "The same samples in a padded matrix and packed")


def weights(lengths: list[int], forget: bool) -> Tensor:
    """Return the attention of the first block in a packed row, (T, T), the mean over heads.

    forget: as if the row were one long sample.
    """
    torch.manual_seed(0)
    lm = LanguageModel.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
        }
    )
    init_weights(lm, 0.15)
    row = pack_rows([torch.randint(97, (length,)) for length in lengths])
    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seen = (sample[:, None] == sample).tril()
    if forget:
        seen = torch.ones_like(seen).tril()
    found = []

    def attend(layer, q, k, v):
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.size(-1) ** 0.5
        found.append(scores.masked_fill(~seen, -torch.inf).softmax(-1))
        return torch.einsum("hqk,khd->qhd", found[0], v)

    with torch.no_grad():
        lm.model(lm.model.embed(row.input_ids), row.positions, attend)
    return found[0].mean(0)


def attention() -> str:
    """Draw the attention of a packed row with its boundaries and without them."""
    lengths = [6, 4, 7]
    cell = 18
    side = sum(lengths) * cell
    body = ""
    for x, title, forget in ((40, "With boundaries", False), (386, "Boundaries forgotten", True)):
        body += svg.text(x, 28, title, bold=True)
        body += svg.heat_map(x, 44, weights(lengths, forget).tolist(), cell, 0, 0.6)
        edge = 0
        for length in lengths[:-1]:
            edge += length * cell
            body += svg.line(x + edge, 44, x + edge, 44 + side, svg.ORANGE, 1.2, dashed=True)
            body += svg.line(x, 44 + edge, x + side, 44 + edge, svg.ORANGE, 1.2, dashed=True)
    note = "Rows read, columns are read. Three samples of 6, 4 and 7 tokens."
    body += svg.text(40, 44 + side + 24, note, 13, svg.GREY)
    return svg.figure(720, 44 + side + 44, body, "Attention in a packed row of three samples")


FIGURES = {"05-padding.svg": padding, "05-attention.svg": attention}
