"""Image modes split and split_nanovlm: tiles between which stand tokens that say where they lie.

    split          SmolVLM's and Idefics3's (Laurencon et al., 2024)
    split_nanovlm  nanoVLM's (Wiedmann et al., 2025)

Pixels and numbers of tokens are those of transformers' Idefics3ImageProcessorPil and of nanoVLM's
own code, their rounding included. The tokens are called marks here. In the text of a row an item is
a run of IMAGE_TOKEN that is as long as its features and marks together; the model puts the marks'
embeddings among the features (model.py: _among_marks).

v views of an item, S x S pixels of a view.
"""

from __future__ import annotations

from math import ceil
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image

from config import UserError
from connectors import connector_tokens
from inputs.tiling import Tiling
from packing import IMAGE_TOKEN, ONE_VIEW, Item, ItemShape

# The strings around pictures of SmolVLM and Idefics3, and the most pixels and tiles along an edge.
# Their published models have 4 and 5 tiles.
FAKE = "<fake_token_around_image>"
GLOBAL = "<global-img>"
MOST_EDGE = 4096
MOST_TILES = 16

WITHOUT_VIDEOS = "remove the videos, or use a model of another image mode"


def tile_mark(row: int, column: int) -> str:
    """Return the string that stands before a tile; both count from 0."""
    return f"<row_{row + 1}_col_{column + 1}>"


def most_tiles(edge: int, side: int) -> int:
    """Return how many tiles of `side` pixels a longest edge becomes.

    An odd edge may grow by a pixel.
    """
    return ceil((edge + edge % 2) / side)


def mark_names(edge: int, side: int) -> list[str]:
    """Return all strings that can stand around the views of pictures with this longest edge.

    Raise UserError for more tiles along an edge than any model has.
    """
    return [FAKE, GLOBAL, "\n", "\n\n", *tile_marks(most_tiles(edge, side))]


def tile_marks(most: int) -> list[str]:
    """Return the strings before the tiles of most x most. Raise UserError as mark_names does."""
    if most > MOST_TILES:
        what = f"split into {most} views along an edge, which is more than {MOST_TILES} a row"
        fix = "lower model.image_edge, or give the image processor of this model"
        raise UserError("model.image_mode", what, fix)

    names = []
    for row in range(most):
        for column in range(most):
            names.append(tile_mark(row, column))
    return names


def control_names(edge: int, side: int) -> list[str]:
    """Return the strings of `mark_names` that are control tokens, and `<image>`."""
    return ["<image>", *(name for name in mark_names(edge, side) if name.strip())]


class SplitTiling(Tiling):
    """Image mode split: SmolVLM's and Idefics3's tiles, with marks, and the whole picture last.

    The text of a picture of r x c tiles, where ... are the tokens of a view:

        FAKE <row_1_col_1> ... FAKE <row_1_col_2> ... \\n
        FAKE <row_2_col_1> ... FAKE <row_2_col_2> ... \\n\\n
        FAKE GLOBAL ... FAKE

    One that is a single view has the last line alone.
    """

    mode = "split"
    tiled = True

    # The models that come with the marks.
    owners: ClassVar[str] = "SmolVLM or Idefics3"

    def check_marks(self):
        fix = f"start from a {self.owners} as model.checkpoint"
        if self.edge < 1:
            raise UserError("model.image_mode", f"{self.mode}, without image_edge", fix)
        for name in self.names():
            if not self.marks.get(name):
                raise UserError("model.image_mode", f"{self.mode}, without ids of {name!r}", fix)

    def names(self) -> list[str]:
        """Return all strings that can stand around the views. Raise UserError as mark_names."""
        return mark_names(self.edge, self.processor.side)

    def most(self) -> int:
        """Return how many tiles the longest edge becomes at most."""
        return most_tiles(self.edge, self.processor.side)

    def features(self) -> list[int]:
        """Return the ids of a view's features."""
        view = connector_tokens(self.connector, self.tokens, 1, self.grid, **self.options)
        return view * [IMAGE_TOKEN]

    def shape(self, size: tuple[int, int]) -> ItemShape:
        width, height = self._whole_views(self._first_size(size))
        rows = height // self.processor.side
        columns = width // self.processor.side
        if rows * columns == 1:
            return ONE_VIEW
        return ItemShape(rows * columns + 1, rows, columns)

    def largest(self) -> list[ItemShape]:
        # The longest edge is as long as it can be, the other one anything.
        shapes = [ONE_VIEW]
        most = self.most()
        if most > 1:
            for tiles in range(1, most + 1):
                shapes.append(ItemShape(tiles * most + 1, tiles, most))
                shapes.append(ItemShape(tiles * most + 1, most, tiles))
        return shapes

    def positions(self, shape: ItemShape = ONE_VIEW) -> int:
        return len(self.placeholder(shape))

    def placeholder(self, shape: ItemShape = ONE_VIEW) -> list[int]:
        features = self.features()
        ids = []
        for row in range(shape.rows):
            for column in range(shape.columns):
                ids += [*self.marks[FAKE], *self.marks[tile_mark(row, column)], *features]

            # The last row's line break and the one before the whole picture are one text.
            if row + 1 < shape.rows:
                ids += self.marks["\n"]
            else:
                ids += self.marks["\n\n"]
        return [*ids, *self.marks[FAKE], *self.marks[GLOBAL], *features, *self.marks[FAKE]]

    def pixels_made(self, size: tuple[int, int]) -> int:
        # Both resized pictures, the tiles, and these once more in one tensor.
        width, height = self._first_size(size)
        return width * height + 3 * self.shape(size).views * self.processor.side**2

    def picture(self, image: Image.Image) -> Item:
        self.check_size(image.size)
        side = self.processor.side
        resample = self.processor.resample
        resized = image.resize(self._first_size(image.size), resample)
        large = resized.resize(self._whole_views(resized.size), resample)

        # The tiles, if there is more than one, then the whole picture.
        shape = self.shape(image.size)
        whole = large.resize((side, side), resample)
        views = self.processor.tensor(whole)[None]
        if shape.rows:
            views = torch.cat([self.cut(large), views])
        return Item(views, shape)  # (v, 3, S, S)

    def check_video(self):
        what = "image mode split has no videos: the times that SmolVLM2 writes around their frames"
        raise ValueError(f"{what} are not written here; fix: {WITHOUT_VIDEOS}")

    def _first_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return width and height with the longest edge of `edge` pixels, the other one even."""
        width, height = size
        aspect = width / height
        if width >= height:
            width = self.edge
            height = int(width / aspect)
            height += height % 2
        else:
            height = self.edge
            width = int(height * aspect)
            width += width % 2
        return max(width, 1), max(height, 1)

    def _whole_views(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return width and height of as many whole views as a resized picture takes."""
        side = self.processor.side
        width, height = size
        aspect = width / height
        if width >= height:
            width = ceil(width / side) * side
            height = ceil(int(width / aspect) / side) * side
        else:
            height = ceil(height / side) * side
            width = ceil(int(height * aspect) / side) * side
        return width, height


# The string before a whole picture of nanoVLM. Those before its tiles are the same as above.
WHOLE = "<|global_image|>"


class NanoTiling(SplitTiling):
    """Image mode split_nanovlm: nanoVLM's tiles, with marks, and the whole picture first.

    The text of a picture of r x c tiles, where ... are the tokens of a view:

        WHOLE ... <row_1_col_1> ... <row_1_col_2> ... <row_2_col_1> ... <row_2_col_2> ...

    One that is a single view has the first two alone. nanoVLM resizes the whole picture behind the
    division by 255, so its pixels are no whole numbers, and those of an item are float32.
    """

    mode = "split_nanovlm"
    owners = "nanoVLM"
    dtype = torch.float32

    def names(self) -> list[str]:
        return [WHOLE, *tile_marks(self.most())]

    def most(self) -> int:
        return self.edge // self.processor.side  # whole views

    def shape(self, size: tuple[int, int]) -> ItemShape:
        width, height = self._large_size(size)
        rows = height // self.processor.side
        columns = width // self.processor.side
        if rows * columns == 1:
            return ONE_VIEW

        # Of some squares nanoVLM rounds the height up to a row of tiles more, see _large_size.
        if self.marks and tile_mark(rows - 1, columns - 1) not in self.marks:
            what = f"a square of {size[0]} pixels becomes {rows} x {columns} tiles in nanoVLM"
            raise ValueError(f"{what}, and this model has no mark for the last row")
        return ItemShape(rows * columns + 1, rows, columns)

    def largest(self) -> list[ItemShape]:
        most = self.most()
        shapes = super().largest()
        if tile_mark(most, most - 1) in self.marks:
            shapes.append(ItemShape((most + 1) * most + 1, most + 1, most))
        return shapes

    def pixels_made(self, size: tuple[int, int]) -> int:
        # The resized picture, its tiles, and these once more in one tensor; each as float32.
        return 4 * 3 * self.shape(size).views * self.processor.side**2

    def picture(self, image: Image.Image) -> Item:
        self.check_size(image.size)
        side = self.processor.side
        large = image.resize(self._large_size(image.size), self.processor.resample)
        views = self.processor.normalise(self.cut(large))  # (r * c, 3, S, S)

        # The whole picture, if that is not the only tile, then the tiles.
        shape = self.shape(image.size)
        if shape.rows:
            pixels = self.processor.normalise(self.processor.tensor(large)[None])
            whole = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
            views = torch.cat([whole, views])
        return Item(views, shape)

    def check_video(self):
        what = "image mode split_nanovlm has no videos: nanoVLM sees none"
        raise ValueError(f"{what}; fix: {WITHOUT_VIDEOS}")

    def placeholder(self, shape: ItemShape = ONE_VIEW) -> list[int]:
        features = self.features()
        ids = [*self.marks[WHOLE], *features]
        for row in range(shape.rows):
            for column in range(shape.columns):
                ids += [*self.marks[tile_mark(row, column)], *features]
        return ids

    def _large_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return width and height of as many whole views as a picture takes."""
        side = self.processor.side
        longest = self.edge
        if not self.enlarge:
            longest = min(self.edge, ceil(max(size) / side) * side)

        # The shorter edge keeps the proportions, rounded up. Of a square of 187 pixels, enlarged to
        # 1536, the product is a little more than 1536: then the height is a view more. nanoVLM's
        # code does that, too.
        scale = longest / max(size)
        shortest = max(ceil(min(size) * scale / side) * side, side)
        width, height = size
        if width >= height:
            return longest, shortest
        return shortest, longest
