"""Chapter 15: a wide drawing as views, what views cost, and tiles in the wrong order."""

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from config import LLaVAConfig
from guide.drawings.svg import GREY, curves, figure, picture, text
from inputs.tiling import Tiling
from model import tiling_of

TEXT = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 48,
}
COLOURS = ("#d62828", "#2e963c", "#2850d2", "#f0be14", "#b5568f")


def tiling(mode: str) -> Tiling:
    """Return how the chapter's model sees pictures in an image mode."""
    processor = {"size": {"height": 48, "width": 48}}
    config = LLaVAConfig(TEXT, VISION, processor, feature_select="cls_patch", image_mode=mode)
    return tiling_of(config)


def drawing() -> Image.Image:
    """Return the wide drawing of the chapter: five discs with one to five marks below them."""
    image = Image.new("RGB", (144, 48), (240, 240, 240))
    draw = ImageDraw.Draw(image)
    for i, colour in enumerate(COLOURS):
        draw.ellipse([4 + 28 * i, 8, 28 + 28 * i, 32], fill=colour)
        for mark in range(i + 1):
            x = 6 + 28 * i + 4 * mark
            draw.line([x, 38, x, 44], fill="#1d2430")
    return image


def rows_of(pixels: Tensor) -> list:
    """Return pixels (3, height, width) as rows of colours, in steps of 32 to keep figures small."""
    steps = ((pixels.int() + 16) // 32 * 32).clamp(max=255)
    return steps.permute(1, 2, 0).tolist()


def tiles() -> str:
    """Draw a wide picture, its one view in mode square, and its views in mode tiles."""
    image = drawing()
    body = text(20, 24, "the picture, 144 x 48", 13, GREY)
    pixels = torch.tensor(list(image.tobytes())).view(48, 144, 3).permute(2, 0, 1)
    body += picture(20, 34, rows_of(pixels), cell=2.4)

    square = tiling("square").picture(image)
    body += text(440, 24, "mode square: one view", 13, GREY)
    body += picture(440, 34, rows_of(square.pixels[0]), cell=2.4)

    views = tiling("tiles").picture(image)
    body += text(20, 184, "mode tiles: the whole picture, then three tiles", 13, GREY)
    for i, view in enumerate(views.pixels):
        body += picture(20 + i * 135, 194, rows_of(view), cell=2.4)
    return figure(720, 326, body, "One view of a wide picture, and four.")


def tokens() -> str:
    """Draw how many tokens a picture takes, over its width, in three image modes."""
    series = {}
    for mode in ("square", "tiles", "anyres"):
        views = tiling(mode)
        points = []
        for width in range(24, 193, 2):
            points.append((width, views.positions(views.shape((width, 48)))))
        series[f"mode {mode}"] = points
    label = "width of the picture in pixels; it is 48 high"
    body = curves(20, 14, 680, 260, series, label, "tokens", low=0)
    return figure(720, 286, body, "Tokens of a picture by its width.")


def order() -> str:
    """Draw three tiles put together in the right and in a wrong order of dimensions."""
    cut = tiling("tiles").picture(drawing()).pixels[1:]  # (3 tiles, 3 channels, 48, 48)
    body = ""
    orders = (("right: rows, tiles, columns", (1, 2, 0, 3)), ("wrong: tiles, rows, columns", None))
    for i, (name, dimensions) in enumerate(orders):
        joined = cut.permute(dimensions or (1, 0, 2, 3)).reshape(3, 48, 144)
        y = 34 + i * 150
        body += text(20, y - 10, name, 13, GREY)
        body += picture(20, y, rows_of(joined), cell=2.4)
    return figure(400, 314, body, "The same numbers, in the right and in a wrong order.")


FIGURES = {"15-tiles.svg": tiles, "15-tokens.svg": tokens, "15-order.svg": order}
