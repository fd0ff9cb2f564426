"""Figures of chapter 2: patches and features, from a real picture and an encoder."""

import random

import torch

from demo.scenes import IMAGE_SIZE, draw_scene, render
from encoders import build_encoder, vision_config
from guide.drawings import svg
from model import init_weights

SHOWN = 12  # of the numbers of a token


def states() -> tuple[object, torch.Tensor, torch.Tensor, int]:
    """Return a picture, its tokens before the first block and its features, and patches a side."""
    config = vision_config(
        {
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": IMAGE_SIZE // 6,
        }
    )
    torch.manual_seed(0)
    encoder = build_encoder(config, -1, "cls_patch")
    init_weights(encoder, 0.09)

    scene = draw_scene(random.Random(1), "train", 3)
    picture = render(scene, background=(240, 240, 240))
    pixels = encoder.preprocess(picture)[None]
    with torch.no_grad():
        return picture, encoder.embeddings(pixels)[0], encoder(pixels)[0], encoder.config.grid[0]


def patches() -> str:
    """Draw a picture under its grid, and the tokens of its patches before and after the blocks."""
    picture, tokens, features, grid = states()
    flat = list(picture.get_flattened_data())
    rows = [flat[i : i + IMAGE_SIZE] for i in range(0, len(flat), IMAGE_SIZE)]

    # The picture, and the lines between its patches with the number of each.
    scale = 192 / IMAGE_SIZE
    left, top = 20, 66
    side = IMAGE_SIZE * scale
    step = side / grid
    body = svg.text(left, 30, "The picture", bold=True)
    body += svg.text(left, 50, f"{grid} x {grid} patches of {IMAGE_SIZE // grid} pixels", 12)
    body += svg.picture(left, top, rows, scale)
    for i in range(grid + 1):
        body += svg.line(left + i * step, top, left + i * step, top + side, svg.GREY, 0.8)
        body += svg.line(left, top + i * step, left + side, top + i * step, svg.GREY, 0.8)
    for i in range(grid * grid):
        x = left + (i % grid) * step + 3
        y = top + (i // grid) * step + 11
        body += svg.text(x, y, str(i), 9, svg.GREY)

    # One row of a heat map for each patch.
    cell = 11
    names = [str(i) for i in range(grid * grid)]
    for x, title, note, state in (
        (270, "Before the first block", "a linear map of the patch, and its position", tokens),
        (510, "Behind the last block", "each row has read all others", features),
    ):
        shown = state[:, :SHOWN] / state.std()
        body += svg.text(x, 30, title, bold=True)
        body += svg.text(x, 50, note, 11)
        body += svg.heat_map(x + 20, top, shown.tolist(), cell, -2.5, 2.5, rows=names, size=9)
    height = top + grid * grid * cell + 40
    body += svg.text(290, height - 18, f"the first {SHOWN} of 64 numbers of each patch's token", 12)
    body += svg.arrow(left + side + 8, top + 90, 262, top + 90)
    body += svg.arrow(290 + SHOWN * cell + 8, top + 90, 500, top + 90)
    return svg.figure(720, height, body, "A picture, its patches, and a token for each of them")


FIGURES = {"02-patches.svg": patches}
