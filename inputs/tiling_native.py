"""Image mode native: SigLIP2-NaFlex's, a picture in its own proportions (Tschannen et al., 2025).

A view is as large as a budget of patches allows. Its pixels are patches (h * w, patch dim), and
views of different sizes stand one behind the other. They are those of transformers'
Siglip2ImageProcessorPil.

h x w patches of a view.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt

import torch
from PIL import Image
from torch import Tensor

from connectors import Grid, connector_tokens
from inputs.tiling import Tiling
from packing import ONE_VIEW, Item, ItemShape


class NativeTiling(Tiling):
    """Image mode native: a view keeps the proportions of its picture, for a NaFlex.

    All frames of a video have the size of its first one.
    """

    mode = "native"
    native = True

    def shape(self, size: tuple[int, int]) -> ItemShape:
        return self.clip_shape(1, size)

    def clip_shape(self, frames: int, size: tuple[int, int]) -> ItemShape:
        rows, columns = self.processor.grid_of(size)
        return ItemShape(frames, height=rows, width=columns)

    def largest(self) -> list[ItemShape]:
        # Of the grids with as many patches as there may be, that nearest to a square.
        rows = isqrt(self.tokens)
        while self.tokens % rows:
            rows -= 1
        return [ItemShape(height=rows, width=self.tokens // rows)]

    def grid_of(self, shape: ItemShape) -> Grid:
        # Where nothing is known of a picture, it is the largest.
        if shape.height == 0:
            shape = self.largest()[0]
        return shape.height, shape.width

    def positions(self, shape: ItemShape = ONE_VIEW) -> int:
        rows, columns = grid = self.grid_of(shape)
        return connector_tokens(self.connector, rows * columns, shape.views, grid, **self.options)

    @property
    def tokens_text(self) -> str:
        return f"at most {self.positions()}"

    def pixels_size(self, shape: ItemShape) -> tuple[int, ...]:
        return (shape.length, 3 * self.processor.patch_size**2)

    def seen(self, item: Item) -> list[Tensor]:
        grid = self.grid_of(item.shape)
        views = item.pixels.unflatten(0, (item.shape.views, -1))
        return [self.processor.picture(patches, grid) for patches in views]

    def picture(self, image: Image.Image) -> Item:
        self.check_size(image.size)
        return Item(self.processor.pixels(image), self.shape(image.size))

    def clip(self, frames: Iterable[Image.Image]) -> Item:
        views = []
        shape = ONE_VIEW
        for frame in frames:
            if not views:
                self.check_size(frame.size)
                shape = self.shape(frame.size)
            views.append(self.processor.patches_of(frame, self.grid_of(shape)))
            self.check_views(len(views))
        return Item(torch.cat(views), shape._replace(views=len(views)))
