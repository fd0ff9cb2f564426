"""How a picture or a video becomes an item: one or more views for the encoder.

    views = model.views                 # a Tiling: all that the data path needs of a model
    item = views.picture(pil_image)     # one view; tiled, the whole picture and then its tiles
    item = views.clip(frames)           # the frames of a video, a view each; not in every mode
    views.positions(item.shape)         # how many tokens the item takes in the text

A still picture is the case with one view: nothing behind this file knows which kind an item is. The
encoder sees the views of a whole batch in one call, the connector those of an item together.

Each image mode is a subclass of Tiling, which itself is the mode square. Those of one view and the
plain tiles are here; image_modes.py lists all of them.

n tokens of a view, v views of an item, S x S pixels of a view.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor

from config import UserError
from connectors import Grid, connector_tokens
from inputs.image_processor import ImageProcessor
from packing import IMAGE_TOKEN, ONE_VIEW, Item, ItemShape

# So many pixels may be made of one picture or video, and of all of a row together. They take 1.6 GB
# and ten seconds. A file of a few kB could else take all the memory there is.
MOST_PIXELS = 2**29


def read_grids(text: str) -> tuple[tuple[int, int], ...]:
    """Return the grids that a recipe names, as (rows, columns): "1x2 2x2" is ((1, 2), (2, 2)).

    Raise UserError.
    """
    fix = 'write rows x columns, as "1x2 2x1 2x2"'
    error = UserError("model.image_grids", f"{text!r} are no grids", fix)
    grids = []
    for grid in text.split():
        found = re.fullmatch("([0-9]{1,3})x([0-9]{1,3})", grid)
        if found is None:
            raise error
        rows = int(found[1])
        columns = int(found[2])
        if rows == 0 or columns == 0:
            raise error
        grids.append((rows, columns))
    if not grids:
        raise error
    return tuple(grids)


@dataclass(frozen=True)
class Tiling:
    """How a model sees pictures and videos. Small and picklable: data workers need no weights.

    This is image mode square, in which a picture is one view. The other modes are its subclasses.
    """

    # The name of the mode, whether it cuts pictures into tiles, whether a learnt separator stands
    # behind what the connector makes of an item (connectors.MLPWithNewline), and whether views have
    # sizes of their own.
    mode: ClassVar[str] = "square"
    tiled: ClassVar[bool] = False
    newline: ClassVar[bool] = False
    native: ClassVar[bool] = False

    # Of the pixels in an item. What is not uint8 is normalised already.
    dtype: ClassVar[torch.dtype] = torch.uint8

    # The shape of a picture that is seen as a whole, without tiles.
    one_view: ClassVar[ItemShape] = ONE_VIEW

    # How many tokens a view becomes.
    tokens: int  # n: what the encoder makes of a view (each encoder, in a mixture); native: at most
    connector: str = "identity"
    options: dict = field(default_factory=dict)  # the connector's

    # What becomes of a picture.
    processor: ImageProcessor | None = None  # None: only numbers of tokens are asked for
    grids: tuple[tuple[int, int], ...] = ()  # (rows, columns) to choose from, for tiled modes

    # What is taken of a video.
    frames: int = 16  # at most so many where fps is set, else always so many, evenly spread
    fps: float = 0.0  # frames a second; 0: as many as `frames` says

    # Rows and columns of a view's patches, for connectors that know them; None in a mixture and
    # in native.
    grid: Grid | None = None

    # For the modes split: pixels of the longest edge, and {string: its ids} of the marks.
    edge: int = 0
    marks: dict = field(default_factory=dict)

    # For split_nanovlm: whether the longest edge always becomes `edge`, or only what is larger.
    enlarge: bool = False

    # For image mode anyres_max: about how many views' tokens those of all tiles are at most.
    max_views: int = 9

    def check_marks(self):
        """Raise UserError where a mark that the mode writes into the text has no ids."""

    def for_images(self, count: int) -> Tiling:
        """Return how the pictures of a row or conversation that has so many of them are seen."""
        return self

    def shape(self, size: tuple[int, int]) -> ItemShape:
        """Return the shape of the item that a picture of this width and height becomes."""
        return ONE_VIEW

    def clip_shape(self, frames: int, size: tuple[int, int]) -> ItemShape:
        """Return the shape of the item that so many frames of this width and height become."""
        return ItemShape(frames)

    def largest(self) -> list[ItemShape]:
        """Return shapes of pictures of which one takes the most tokens; the first has one view."""
        return [ONE_VIEW]

    def grid_of(self, shape: ItemShape) -> Grid | None:
        """Return rows and columns of the patches of each view of an item; None in a mixture."""
        return self.grid

    def positions(self, shape: ItemShape = ONE_VIEW) -> int:
        """Return how many tokens an item takes in the text."""
        return connector_tokens(self.connector, self.tokens, shape.views, self.grid, **self.options)

    @property
    def tokens_text(self) -> str:
        """Return how many tokens a picture of one view takes, for people."""
        return f"{self.positions()}"

    @property
    def tokens_per_image(self) -> str:
        """Return how many tokens pictures take, of one view and of the most, for people."""
        said = f"{self.tokens_text} tokens per image"
        most = max(self.positions(shape) for shape in self.largest())
        if most > self.positions():
            said += f" of one view, up to {most} of several"
        return said

    def placeholder(self, shape: ItemShape = ONE_VIEW) -> list[int]:
        """Return an item's text: ids of marks, and IMAGE_TOKEN for each feature."""
        return self.positions(shape) * [IMAGE_TOKEN]

    def arrange(self, output: Tensor, shape: ItemShape) -> Tensor:
        """Return an item's features (m, D) in the order of the text; m is positions(shape).

        output (n, D) is what the connector made of the item's views; where the mode has a newline,
        that is the last one.
        """
        return output

    def pixels_size(self, shape: ItemShape) -> tuple[int, ...]:
        """Return the size of the tensor of an item's pixels."""
        side = self.processor.side
        return (shape.views, 3, side, side)

    def seen(self, item: Item) -> list[Tensor]:
        """Return the pictures (3, height, width) that the views of an item show."""
        return list(item.pixels)

    def pixels_of_frame(self, size: tuple[int, int]) -> int:
        """Return how many pixels `frame` makes of a picture of this width and height, at most."""
        return self.processor.pixels_made(size)

    def pixels_made(self, size: tuple[int, int]) -> int:
        """Return how many pixels `picture` makes of one of this width and height, at most."""
        return self.pixels_of_frame(size)

    def check_size(self, size: tuple[int, int]):
        """Raise ValueError if too much would be made of a picture of this width and height.

        It is asked before anything is decoded: what comes in may be small.
        """
        # Without a published processor, nothing is known and nothing large is made.
        if isinstance(self.processor, ImageProcessor):
            self._check_made(size, self.pixels_made(size))

    def _check_made(self, size: tuple[int, int], made: int):
        """Raise ValueError if so many pixels of a picture of this width and height are too many."""
        if made > MOST_PIXELS:
            width, height = size
            what = f"{width} x {height} pixels, of which {self.mode!r} makes {made}"
            raise ValueError(f"{what}, more than {MOST_PIXELS}")

    def check_views(self, views: int):
        """Raise ValueError if a row's pictures and videos have too many views in all."""
        if not isinstance(self.processor, ImageProcessor):
            return
        made = views * self.processor.side**2
        if made > MOST_PIXELS:
            raise ValueError(f"{views} views of {made} pixels, more than {MOST_PIXELS}")

    def picture(self, image: Image.Image) -> Item:
        """Return the item of a picture in RGB. Raise ValueError if it is too large."""
        self.check_size(image.size)
        return Item(self.frame(image))

    def check_video(self):
        """Raise ValueError("what; fix: action") if the mode has no videos."""

    def frame(self, image: Image.Image) -> Tensor:
        """Return a picture in RGB as one view (1, 3, S, S), in uint8."""
        return self.processor.pixels(image, "square")[None]

    def clip(self, frames: Iterable[Image.Image]) -> Item:
        """Return the item of a video's frames, in uint8. A tiled model sees each frame whole.

        Raise ValueError if they are too many or too large, or the mode has no videos.
        """
        self.check_video()
        views = []
        for frame in frames:
            if isinstance(self.processor, ImageProcessor):
                self._check_made(frame.size, self.pixels_of_frame(frame.size))
            views.append(self.frame(frame))
            self.check_views(len(views))
        return Item(torch.cat(views), ItemShape(len(views)))

    def cut(self, large: Image.Image) -> Tensor:
        """Return a picture of whole views cut into them, row by row, (views, 3, S, S) uint8."""
        side = self.processor.side
        tiles = []
        for top in range(0, large.height, side):
            for left in range(0, large.width, side):
                tile = large.crop((left, top, left + side, top + side))
                tiles.append(self.processor.tensor(tile))
        return torch.stack(tiles)


class PaddedTiling(Tiling):
    """Image mode pad: a picture is made square with the mean colour (LLaVA-1.5)."""

    mode = "pad"

    def pixels_of_frame(self, size: tuple[int, int]) -> int:
        return self.processor.pixels_made(size, "pad")

    def frame(self, image: Image.Image) -> Tensor:
        return self.processor.pixels(image, "pad")[None]


class TilesTiling(Tiling):
    """Image mode tiles: the whole picture, then the picture stretched to a grid of tiles."""

    mode = "tiles"
    tiled = True

    def shape(self, size: tuple[int, int]) -> ItemShape:
        rows, columns = self.best_grid(size)
        return ItemShape(1 + rows * columns)

    def largest(self) -> list[ItemShape]:
        return [ONE_VIEW, *(ItemShape(1 + rows * columns) for rows, columns in self.grids)]

    def pixels_made(self, size: tuple[int, int]) -> int:
        # The resized picture, its tiles, and these once more in one tensor.
        rows, columns = self.best_grid(size)
        return 3 * (1 + rows * columns) * self.processor.side**2

    def picture(self, image: Image.Image) -> Item:
        self.check_size(image.size)
        side = self.processor.side
        rows, columns = self.best_grid(image.size)
        large = self.resize(image, columns * side, rows * side)

        # The whole picture as the first view, then the tiles.
        whole = image.resize((side, side), self.processor.resample)
        pixels = self.processor.tensor(whole)[None]
        views = torch.cat([pixels, self.cut(large)])  # (v, 3, S, S)
        return Item(views, self.shape(image.size))

    def resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """Return the picture that is cut into tiles, of width x height pixels."""
        return image.resize((width, height), self.processor.resample)

    def best_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the grid, as (rows, columns), for a picture of this width and height.

        It is the one in which the picture keeps the most pixels, resized in its own proportions; of
        several the one with the least border (transformers' select_best_resolution).
        """
        width, height = size
        side = self.processor.side

        best = None
        best_score = None
        for rows, columns in self.grids:
            grid_width = columns * side
            grid_height = rows * side
            scale = min(grid_width / width, grid_height / height)

            # Enlarging a picture adds no pixels to it.
            resized = int(width * scale) * int(height * scale)
            kept = min(resized, width * height)
            border = grid_width * grid_height - kept
            score = (kept, -border)
            if best is None or score > best_score:  # of equals the first one stays
                best = (rows, columns)
                best_score = score
        return best
