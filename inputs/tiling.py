"""What an <image> stands for: an item of one or more views, each a square of pixels as the encoder sees it.

    views = model.views                      # or layouts.views_of(config): all that the data path needs of a model
    item = views.picture(pil_image)          # one view; in image_mode tiles or anyres the whole picture, then its tiles
    item = views.clip(frames)                # the frames of a video
    views.positions(item.shape)              # how many tokens it takes in the text

A still picture is the case with one view: nothing behind this file knows which kind an item is. The encoder sees the
views of a whole batch in one call, the connector those of an item together.

    square     the picture resized to one view (CLIP: its centre)
    pad        made square with the mean colour first
    tiles      stretched to the best of `grids`, cut into that many views; works with every connector
    anyres     LLaVA-NeXT's (Liu et al., 2024): resized into the best of `grids` as it is, with black borders, whose
               tokens are taken out again; a learnt separator ends each row of tokens
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil, isqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from config import UserError
from connectors import CONNECTORS, connector_tokens
from inputs.image_processor import ImageTransform
from inputs.templates import IMAGE_TOKEN

TILED = ("tiles", "anyres")


class Shape(NamedTuple):
    """What of an item decides how many tokens it takes and in which order. Rows and columns only in anyres."""

    views: int = 1
    rows: int = 0  # of tiles, behind the first view
    columns: int = 0
    top: int = 0  # rows of tokens that are border, above and below
    left: int = 0


PICTURE = Shape()


class Item(NamedTuple):
    pixels: Tensor  # (v, 3, H, W), uint8 or normalised
    shape: Shape = PICTURE


def items_of(images: Tensor | Sequence[Item]) -> list[Item]:
    """Pictures (N, 3, H, W) as items of one view; items as they are."""
    return [Item(image[None]) for image in images] if isinstance(images, Tensor) else list(images)


def called_for(rows: list[Tensor], images: Tensor | Sequence[Item] | None) -> list[Item]:
    """The items that the placeholders in rows of ids call for, in their order; of as many images as rows, those of the
    rows with a placeholder. Raises ValueError."""
    counts = [int((row == IMAGE_TOKEN).sum()) for row in rows]
    items = items_of(images) if images is not None and sum(counts) else []
    if len(items) == sum(counts):
        return items
    if len(items) != len(rows) or max(counts) > 1:
        raise ValueError(f"{sum(counts)} image placeholders but {len(items)} images")
    return [item for item, count in zip(items, counts, strict=True) if count]


def order(shape: Shape, n: int) -> Tensor:
    """Where the tokens of an anyres item come from, of `views` times n and one separator behind them: the first view's,
    then those of the tiles as of one large picture, row by row without its borders, the separator behind each row."""
    side = isqrt(n)
    tiles = torch.arange(n, shape.views * n).view(shape.rows, shape.columns, side, side)
    large = tiles.transpose(1, 2).reshape(shape.rows * side, shape.columns * side)
    large = large[shape.top : len(large) - shape.top, shape.left : large.size(1) - shape.left]
    return torch.cat([torch.arange(n), F.pad(large, (0, 1), value=shape.views * n).flatten()])


def join(spec: str, x: Tensor) -> Tensor:
    """The views of items (N, v, n, C) as their connector reads them: (N, v n, C), or the mean (N, n, C). Of a mixture
    (N, v, 2, n, C) -> (N, 2, v n, C)."""
    return x.mean(1) if CONNECTORS[spec].mean else x.transpose(1, -3).flatten(-3, -2)


class Separated(nn.Sequential):
    """An MLP of connectors.py and anyres's separator: (N, n, C) -> (N, n + 1, D), of each item the last."""

    def __init__(self, layers: nn.Module):
        if not isinstance(layers, nn.Sequential):
            raise UserError(
                "model.image_mode", "anyres takes a connector mlpNx_gelu", "use one, or tiles"
            )
        super().__init__(*layers)
        width = layers[-1].out_features
        self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), self.image_newline.expand(len(x), 1, -1)], 1)


def read_grids(text: str) -> tuple[tuple[int, int], ...]:
    """ "1x2 2x2" -> ((1, 2), (2, 2)), rows and columns. Raises UserError."""
    try:
        grids = tuple(tuple(map(int, grid.split("x"))) for grid in text.split())
        if all(len(grid) == 2 and min(grid) > 0 for grid in grids) and grids:
            return grids
    except ValueError:
        pass
    raise UserError(
        "model.image_grids", f"{text!r} are no grids", 'write rows x columns, as "1x2 2x1 2x2"'
    )


@dataclass(frozen=True)
class Views:
    """How pictures and videos become items. Small and picklable: data workers carry it without the weights."""

    tokens: int  # n: what the encoder makes of a view (each encoder, in a mixture)
    connector: str = "identity"
    options: dict = field(default_factory=dict)
    transform: ImageTransform | None = (
        None  # None: pictures are decoded and dropped (data.py check)
    )
    mode: str = "square"
    grids: tuple[tuple[int, int], ...] = ()
    frames: int = 16
    fps: float = 0.0

    def positions(self, shape: Shape = PICTURE) -> int:
        """How many tokens an item takes in the text."""
        if shape.rows:
            side = isqrt(self.tokens)
            height, width = shape.rows * side - 2 * shape.top, shape.columns * side - 2 * shape.left
            return self.tokens + height * (width + 1)
        return connector_tokens(self.connector, self.tokens, shape.views, **self.options)

    def shape(self, size: tuple[int, int]) -> Shape:
        """The shape of the item that a picture of this width and height becomes."""
        if self.mode not in TILED:
            return Shape()
        rows, columns = self.grid(size)
        if self.mode == "tiles":
            return Shape(1 + rows * columns)
        (width, height), side = size, isqrt(self.tokens)
        w, h = columns * side, rows * side  # and how much of it the picture fills
        if width / height > w / h:
            return Shape(
                1 + rows * columns, rows, columns, (h - int(round(height * (w / width), 7))) // 2, 0
            )
        return Shape(
            1 + rows * columns, rows, columns, 0, (w - int(round(width * (h / height), 7))) // 2
        )

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid in which a picture keeps the most pixels, of those the one with the least border."""
        (width, height), side = size, self.transform.side

        def kept(grid: tuple[int, int]) -> tuple[int, int]:
            h, w = grid[0] * side, grid[1] * side
            scale = min(w / width, h / height)
            pixels = min(int(width * scale) * int(height * scale), width * height)
            return pixels, pixels - w * h

        return max(self.grids, key=kept)

    def picture(self, image: Image.Image) -> Item:
        """A picture in RGB -> its item, in uint8."""
        if self.mode not in TILED:
            return Item(self.transform.pixels(image, self.mode)[None])
        side, resample = self.transform.side, self.transform.resample
        rows, columns = self.grid(image.size)
        large = (
            image.resize((columns * side, rows * side), resample)
            if self.mode == "tiles"
            else self._boxed(image)
        )
        corners = [(x * side, y * side) for y in range(rows) for x in range(columns)]
        parts = [
            image.resize((side, side), resample),
            *(large.crop((x, y, x + side, y + side)) for x, y in corners),
        ]
        return Item(
            torch.stack([self.transform.tensor(part) for part in parts]), self.shape(image.size)
        )

    def _boxed(self, image: Image.Image) -> Image.Image:
        """As large as its grid allows, in the middle of black."""
        width, height = (edge * self.transform.side for edge in reversed(self.grid(image.size)))
        across, down = width / image.width, height / image.height
        if across < down:
            size = width, min(ceil(image.height * across), height)
        else:
            size = min(ceil(image.width * down), width), height
        canvas = Image.new("RGB", (width, height))
        canvas.paste(
            image.resize(size, self.transform.resample),
            ((width - size[0]) // 2, (height - size[1]) // 2),
        )
        return canvas

    def clip(self, frames: Iterable[Image.Image]) -> Item:
        """The frames of a video -> its item, in uint8. A tiled model sees them whole."""
        mode = "square" if self.mode in TILED else self.mode
        pixels = torch.stack([self.transform.pixels(frame, mode) for frame in frames])
        return Item(pixels, Shape(len(pixels)))
