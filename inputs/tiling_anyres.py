"""Image modes anyres and anyres_max: tiles as one large picture, without its borders.

    anyres      LLaVA-NeXT's (Liu et al., 2024)
    anyres_max  LLaVA-OneVision's (Li et al., 2024), which bounds the tokens and pools videos

Pixels and numbers of tokens are those of transformers' LlavaNext and LlavaOnevision, their rounding
included: a model that was trained with them would misread a picture that is one row shorter.

n tokens of a view, v views of an item, S x S pixels of a view.
"""

from __future__ import annotations

from math import ceil, isqrt, sqrt

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from connectors import anyres_order
from inputs.tiling import TilesTiling, Tiling
from packing import ONE_VIEW, Item, ItemShape


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
