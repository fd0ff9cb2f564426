"""How a picture or a video becomes an item: one or more views for the encoder.

    views = model.views                 # a Tiling: all that the data path needs of a model
    item = views.picture(pil_image)     # one view; tiled, the whole picture and then its tiles
    item = views.clip(frames)           # the frames of a video, a view each; not in mode split
    views.positions(item.shape)         # how many tokens the item takes in the text

A still picture is the case with one view: nothing behind this file knows which kind an item is. The
encoder sees the views of a whole batch in one call, the connector those of an item together.

The image modes, each a class below and an entry of MODES:

    square     the picture resized to one view (CLIP: its centre)
    pad        made square with the mean colour first (LLaVA-1.5)
    tiles      stretched to the best of `grids` and cut into that many views; with every connector
    anyres     LLaVA-NeXT's (Liu et al., 2024): resized into the best of `grids` in its own
               proportions, with black borders. The borders' tokens are taken out again, and a
               learnt separator ends each row of tokens (connectors.py)
    anyres_max LLaVA-OneVision's (Li et al., 2024): anyres, made smaller where the tiles' tokens are
               more than those of `max_views` views. Several pictures of a conversation are padded
               and have one view each; frames of a video have a quarter of the tokens
    split      SmolVLM's and Idefics3's (Laurencon et al., 2024): the longest edge resized to
               `edge`, then both edges to whole views. Between the tiles stand tokens of text that
               say their row and column; the whole picture comes last
    split_nanovlm  nanoVLM's (Wiedmann et al., 2025): both edges resized to whole views, the longest
               one to `edge` at most. The whole picture comes first, resized in float32
    native     SigLIP2-NaFlex's (Tschannen et al., 2025): one view in the picture's own proportions,
               as large as a budget of patches allows. Its pixels are patches (h * w, patch dim),
               and views of different sizes stand one behind the other

In all modes but native a view is a square of S x S pixels.

For anyres and anyres_max, pixels and numbers of tokens are those of transformers' LlavaNext and
LlavaOnevision, for split those of its Idefics3ImageProcessorPil, for native those of its
Siglip2ImageProcessorPil, for split_nanovlm those of nanoVLM's own code, their rounding included: a
model that was trained with them would misread a picture that is one row shorter.

n tokens of a view, v views of an item, S x S pixels of a view, h x w patches of a view.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil, isqrt, sqrt
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from config import UserError
from connectors import Grid, anyres_order, connector_tokens
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


class AnyresTiling(TilesTiling):
    """Image mode anyres: LLaVA-NeXT's, the tiles as one large picture without its borders."""

    mode = "anyres"
    newline = True

    def shape(self, size: tuple[int, int]) -> ItemShape:
        rows, columns = self.best_grid(size)
        top, left = self._border(size, rows, columns)
        return ItemShape(1 + rows * columns, rows, columns, top, left)

    def largest(self) -> list[ItemShape]:
        shapes = [ONE_VIEW]
        for rows, columns in self.grids:
            shapes.append(ItemShape(1 + rows * columns, rows, columns))
        return shapes

    def positions(self, shape: ItemShape = ONE_VIEW) -> int:
        if not shape.rows:
            return super().positions(shape)

        # The whole picture, then its tiles as one large picture of tokens, without its borders and
        # with a separator behind each row.
        height, width = self.size_in_tokens(shape)
        return self.tokens + height * (width + 1)

    def size_in_tokens(self, shape: ItemShape) -> tuple[int, int]:
        """Return height and width of the picture that all tiles are, without its borders."""
        side = isqrt(self.tokens)  # of a view
        height = shape.rows * side - 2 * shape.top
        width = shape.columns * side - 2 * shape.left
        return height, width

    def arrange(self, output: Tensor, shape: ItemShape) -> Tensor:
        # Only tiled pictures have rows to separate.
        tokens = len(output) - 1
        if not shape.rows:
            return output[:tokens]
        return output[anyres_order(shape, tokens // shape.views, output.device)]

    def _border(self, size: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
        """Return the rows of tokens above and below, and columns left and right, that see black.

        One of the two is 0. The arithmetic is that of transformers' unpad_image: it works on tokens
        and not on pixels, and rounds to 7 digits before it cuts, so that 5.9999999999 counts as 6.
        """
        width, height = size
        side = isqrt(self.tokens)
        grid_width = columns * side  # in tokens
        grid_height = rows * side

        # A picture that is wider than its grid has borders above and below.
        if width / height > grid_width / grid_height:
            filled = int(round(height * (grid_width / width), 7))
            return (grid_height - filled) // 2, 0

        filled = int(round(width * (grid_height / height), 7))
        return 0, (grid_width - filled) // 2

    def resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """Return the picture as large as fits, in the middle of width x height black pixels.

        The shorter side is rounded up, as in transformers' get_patch_output_size.
        """
        across = width / image.width
        down = height / image.height
        if across < down:
            new_width = width
            new_height = min(ceil(image.height * across), height)
        else:
            new_width = min(ceil(image.width * down), width)
            new_height = height
        resized = image.resize((new_width, new_height), self.processor.resample)

        left = (width - new_width) // 2
        top = (height - new_height) // 2
        canvas = Image.new("RGB", (width, height))
        canvas.paste(resized, (left, top))
        return canvas


# A picture that is a single view in mode anyres_max. ONE_VIEW is a video of one frame there.
PADDED = ItemShape(1, 1, 1)


class AnyresMaxTiling(AnyresTiling):
    """Image mode anyres_max: LLaVA-OneVision's, anyres with a bound on the tiles' tokens.

    An item without rows is a video.
    """

    mode = "anyres_max"
    one_view = PADDED

    def for_images(self, count: int) -> Tiling:
        if count > 1:
            return SeveralPadded(**vars(self))
        return self

    def largest(self) -> list[ItemShape]:
        # The largest grid is made smaller, so a picture with borders can have more tokens.
        shapes = [PADDED]
        side = isqrt(self.tokens)
        for rows, columns in self.grids:
            views = 1 + rows * columns
            for top in range(rows * side // 2):
                shapes.append(ItemShape(views, rows, columns, top, 0))
            for left in range(columns * side // 2):
                shapes.append(ItemShape(views, rows, columns, 0, left))
        return shapes

    def positions(self, shape: ItemShape = PADDED) -> int:
        side = isqrt(self.tokens)
        if not shape.rows:
            return shape.views * ceil(side / 2) ** 2 + 1
        if shape == PADDED:
            return self.tokens + 1

        height, width = self.made_smaller(*self.size_in_tokens(shape))
        return self.tokens + height * (width + 1)

    def made_smaller(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width, in tokens, to which the large picture is interpolated.

        The arithmetic is that of transformers' pack_image_features, which fails where nothing
        would be left of the shorter side.
        """
        ratio = sqrt(height * width / (self.max_views * self.tokens))
        if ratio <= 1.1:
            return height, width
        return max(1, int(height // ratio)), max(1, int(width // ratio))

    def arrange(self, output: Tensor, shape: ItemShape) -> Tensor:
        tokens = output[:-1]
        newline = output[-1:]

        # The frames of a video, each a quarter as large, then one separator.
        side = isqrt(len(tokens) // shape.views)
        if not shape.rows:
            frames = tokens.unflatten(0, (shape.views, side, side))
            half = ceil(side / 2)
            return torch.cat([interpolate(frames, half, half).flatten(0, 2), newline])

        # One of several pictures, then one separator.
        if shape == PADDED:
            return output

        order = anyres_order(shape, side**2, output.device)
        size = self.size_in_tokens(shape)
        height, width = self.made_smaller(*size)
        if (height, width) == size:
            return output[order]

        # The whole picture stays. That of all tiles is made smaller, and then gets its separators.
        large = order[side**2 :].view(size[0], size[1] + 1)[:, :-1]
        large = interpolate(output[large][None], height, width)[0]  # (height, width, D)
        separators = newline.expand(height, 1, -1)
        rows = torch.cat([large, separators], dim=1)  # (height, width + 1, D)
        return torch.cat([tokens[: side**2], rows.flatten(0, 1)])


class SeveralPadded(AnyresMaxTiling):
    """What mode anyres_max makes of each of several pictures: made square, one view."""

    def shape(self, size: tuple[int, int]) -> ItemShape:
        return PADDED

    def largest(self) -> list[ItemShape]:
        return [PADDED]

    def pixels_made(self, size: tuple[int, int]) -> int:
        return self.processor.pixels_made(size, "pad")

    def picture(self, image: Image.Image) -> Item:
        self.check_size(image.size)
        return Item(self.processor.pixels(image, "pad")[None], PADDED)


def interpolate(x: Tensor, height: int, width: int) -> Tensor:
    """Return grids of tokens (N, h, w, D) as (N, height, width, D), bilinearly."""
    x = x.permute(0, 3, 1, 2).contiguous()
    x = F.interpolate(x, (height, width), mode="bilinear")
    return x.permute(0, 2, 3, 1)


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
        raise UserError("model.image_mode", what, "give the image processor of this model")

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
        fix = f"give the folder of a {self.owners}"
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


# Keyed by the mode's name in a recipe and in config.json.
MODES: dict[str, type[Tiling]] = {
    "square": Tiling,
    "pad": PaddedTiling,
    "tiles": TilesTiling,
    "anyres": AnyresTiling,
    "anyres_max": AnyresMaxTiling,
    "split": SplitTiling,
    "split_nanovlm": NanoTiling,
    "native": NativeTiling,
}
