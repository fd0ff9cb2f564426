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

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil, isqrt

import torch
from PIL import Image

from config import UserError
from connectors import connector_tokens
from inputs.image_processor import ImageProcessor
from packing import ONE_VIEW, Item, ItemShape

TILED = ("tiles", "anyres")


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
class Tiling:
    """How pictures and videos become items. Small and picklable: data workers carry it without the weights."""

    tokens: int  # n: what the encoder makes of a view (each encoder, in a mixture)
    connector: str = "identity"
    options: dict = field(default_factory=dict)
    processor: ImageProcessor | None = (
        None  # None: pictures are decoded and dropped (data.py check)
    )
    mode: str = "square"
    grids: tuple[tuple[int, int], ...] = ()
    frames: int = 16
    fps: float = 0.0

    def positions(self, shape: ItemShape = ONE_VIEW) -> int:
        """How many tokens an item takes in the text."""
        if shape.rows:
            side = isqrt(self.tokens)
            height, width = shape.rows * side - 2 * shape.top, shape.columns * side - 2 * shape.left
            return self.tokens + height * (width + 1)
        return connector_tokens(self.connector, self.tokens, shape.views, **self.options)

    def shape(self, size: tuple[int, int]) -> ItemShape:
        """The shape of the item that a picture of this width and height becomes."""
        if self.mode not in TILED:
            return ItemShape()
        rows, columns = self.grid(size)
        if self.mode == "tiles":
            return ItemShape(1 + rows * columns)
        (width, height), side = size, isqrt(self.tokens)
        w, h = columns * side, rows * side  # and how much of it the picture fills
        if width / height > w / h:
            return ItemShape(
                1 + rows * columns, rows, columns, (h - int(round(height * (w / width), 7))) // 2, 0
            )
        return ItemShape(
            1 + rows * columns, rows, columns, 0, (w - int(round(width * (h / height), 7))) // 2
        )

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid in which a picture keeps the most pixels, of those the one with the least border."""
        (width, height), side = size, self.processor.side

        def kept(grid: tuple[int, int]) -> tuple[int, int]:
            h, w = grid[0] * side, grid[1] * side
            scale = min(w / width, h / height)
            pixels = min(int(width * scale) * int(height * scale), width * height)
            return pixels, pixels - w * h

        return max(self.grids, key=kept)

    def picture(self, image: Image.Image) -> Item:
        """A picture in RGB -> its item, in uint8."""
        if self.mode not in TILED:
            return Item(self.processor.pixels(image, self.mode)[None])
        side, resample = self.processor.side, self.processor.resample
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
            torch.stack([self.processor.tensor(part) for part in parts]), self.shape(image.size)
        )

    def _boxed(self, image: Image.Image) -> Image.Image:
        """As large as its grid allows, in the middle of black."""
        width, height = (edge * self.processor.side for edge in reversed(self.grid(image.size)))
        across, down = width / image.width, height / image.height
        if across < down:
            size = width, min(ceil(image.height * across), height)
        else:
            size = min(ceil(image.width * down), width), height
        canvas = Image.new("RGB", (width, height))
        canvas.paste(
            image.resize(size, self.processor.resample),
            ((width - size[0]) // 2, (height - size[1]) // 2),
        )
        return canvas

    def clip(self, frames: Iterable[Image.Image]) -> Item:
        """The frames of a video -> its item, in uint8. A tiled model sees them whole."""
        mode = "square" if self.mode in TILED else self.mode
        pixels = torch.stack([self.processor.pixels(frame, mode) for frame in frames])
        return Item(pixels, ItemShape(len(pixels)))
