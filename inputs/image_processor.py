"""Published image processors as numbers: how a picture becomes the square that an encoder takes.

    processor = ImageProcessor.from_hf(read_preprocessor(folder), default)
    pixels = processor(image)                  # a PIL image -> (3, side, side) float32
    pixels = processor(image, "pad")           # made a square with the mean colour first

The steps are Hugging Face's, done with Pillow, to the bit: convert to RGB, pad (where the model
asks for it), resize, crop the centre (CLIP and DINOv2, not SigLIP), divide by 255, normalise.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, isqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from checkpoints.fields import SIDE, Fields
from checkpoints.files import read_json
from config import UserError
from packing import constant

# Pixels of a strip, when a picture is padded: 12 MB.
STRIP = 2**22

CROPS = "CLIPImageProcessor"
RESIZES = "SiglipImageProcessor"

PATCHES = "Siglip2ImageProcessor"

# NaFlex: where the search for a picture's scale ends, and the largest budget of patches.
SCALE_EPS = 1e-5
MOST_PATCHES = 2**14

# The processors that do these steps. BitImageProcessor, DINOv2's, does what CLIP's does. DINOv3's
# resizes without rounding to 8 bits: a colour is at most 1 of 255 away from ours.
PROCESSORS = (
    CROPS,
    RESIZES,
    "BitImageProcessor",
    "CLIPFeatureExtractor",
    "DINOv3ViTImageProcessor",
)


def need(good: bool, where: object, value: object, fix: str):
    """Raise UserError for a value that is not supported, unless it is good."""
    if not good:
        raise UserError(where, f"{value!r} is not supported", fix)


@dataclass(frozen=True)
class ImageProcessor:
    """A published image processor. Small and picklable: data workers need no weights for it."""

    # In pixels. Without `crop` a picture is resized straight to a square of `size`. With it the
    # shortest side is resized to `size`, and a square of `crop` is cut from the centre.
    size: int = 224
    crop: int = 0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of red, green and blue, where white is 1
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = int(Image.Resampling.BICUBIC)

    @property
    def side(self) -> int:
        """Pixels along a side of the square that the encoder gets."""
        return self.crop or self.size

    def __call__(self, image: Image.Image, image_mode: str = "square") -> Tensor:
        """Return a picture as (3, side, side) float32, normalised.

        `image_mode` is "square", or "pad" to pad it to a square first, see tiling.py.
        """
        pixels = self.pixels(image, image_mode)
        return self.normalise(pixels[None])[0]

    def pixels(self, image: Image.Image, image_mode: str = "square") -> Tensor:
        """Return a picture as (3, side, side) uint8, not normalised yet.

        That is a quarter of the bytes to carry to the device.
        """
        if image.mode != "RGB":
            image = image.convert("RGB")

        if image_mode == "pad":
            image = self._resize_padded(image)
        elif self.crop:
            image = self._resize_shortest_side(image)
        else:
            image = image.resize((self.size, self.size), self.resample)

        # CLIP, DINOv2
        if self.crop:
            image = self._crop_centre(image)
        return self.tensor(image)

    def pixels_made(self, size: tuple[int, int], image_mode: str = "square") -> int:
        """Return how many pixels `pixels` makes of a picture of this width and height, at most.

        That is known before the picture is decoded, and bounds time and memory.
        """
        width, height = size
        if image_mode == "pad":
            return max(size) * (height + self.size) + self.size**2 + self.crop**2
        if not self.crop:
            return self.size**2
        shortest = min(size)
        resized = (self.size * width // shortest) * (self.size * height // shortest)
        return resized + self.crop**2

    def _resize_padded(self, image: Image.Image) -> Image.Image:
        """Return the picture in the middle of a square of the mean colour (LLaVA-1.5), resized.

        The large square is never there as a whole: that of a picture of 110,000 x 222 pixels would
        take 36 GB. Pillow resizes the rows first and the columns of the result after them. So the
        rows are padded and resized a strip at a time here, which gives the same pixels. The rows
        above and below the picture are not made at all.
        """
        side = max(image.size)
        left = (side - image.width) // 2
        top = (side - image.height) // 2  # one less than below where the difference is odd
        colour = tuple(int(mean * 255) for mean in self.mean)

        # Rows of padding are all alike: one of them is resized, and repeated.
        row = Image.new("RGB", (side, 1), colour).resize((self.size, 1), self.resample)
        columns = row.resize((self.size, side), Image.Resampling.NEAREST)

        rows = max(1, STRIP // side)
        for first in range(0, image.height, rows):
            last = min(first + rows, image.height)
            strip = Image.new("RGB", (side, last - first), colour)
            strip.paste(image.crop((0, first, image.width, last)), (left, 0))
            strip = strip.resize((self.size, last - first), self.resample)
            columns.paste(strip, (0, top + first))
        return columns.resize((self.size, self.size), self.resample)

    def _resize_shortest_side(self, image: Image.Image) -> Image.Image:
        """Return the picture with its shortest side `size` long; the longer one is rounded down."""
        shortest = min(image.size)
        width = self.size * image.width // shortest
        height = self.size * image.height // shortest
        return image.resize((width, height), self.resample)

    def _crop_centre(self, image: Image.Image) -> Image.Image:
        """Return the square in the picture's middle; black where it is larger than the picture."""
        left = (image.width - self.crop) // 2
        top = (image.height - self.crop) // 2
        return image.crop((left, top, left + self.crop, top + self.crop))

    @staticmethod
    def tensor(image: Image.Image) -> Tensor:
        """Return a picture in RGB as (3, H, W) uint8."""
        # Stacking the colours is faster than transposing (H, W, 3).
        bands = [np.asarray(band) for band in image.split()]
        return torch.from_numpy(np.stack(bands))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return (N, 3, H, W) uint8 as normalised float32 on the same device.

        Pixels that are float already are normalised already.
        """
        if pixels.dtype != torch.uint8:
            return pixels
        mean = constant(self.mean, pixels.device)[:, None, None]
        std = constant(self.std, pixels.device)[:, None, None]
        return pixels.float().div_(255).sub_(mean).div_(std)

    def shown(self, view: Tensor) -> Tensor:
        """Return a view (3, H, W), uint8 or normalised, as uint8 for people to look at."""
        if view.dtype == torch.uint8:
            return view
        mean = constant(self.mean, view.device)[:, None, None]
        std = constant(self.std, view.device)[:, None, None]
        return ((view * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    @classmethod
    def from_hf(
        cls, config: dict, default: ImageProcessor, where: object = "preprocessor_config.json"
    ) -> ImageProcessor:
        """Return the processor that a preprocessor_config.json describes.

        A field that is missing or null is the default's. Raise UserError for a field that asks for
        something this class does not do.
        """
        given = {key: value for key, value in config.items() if value is not None}

        # Old files call the type feature_extractor_type.
        if "feature_extractor_type" in given:
            given.setdefault("image_processor_type", given["feature_extractor_type"])
        values = {"crop_size": default.side} | default.to_hf() | given
        fix = "give the image processor that was published with the encoder"
        fields = Fields(values, where, fix=fix)

        crop = 0
        if fields.flag("do_center_crop"):
            crop = read_side(fields, "crop_size")
        mean = fields.numbers("image_mean", 0.0, 1.0)
        std = fields.numbers("image_std", 1e-3, 1e3)
        for key, numbers in (("image_mean", mean), ("image_std", std)):
            need(len(numbers) == 3, f"{where}:{key}", numbers, "give one of each colour")
        processor = cls(
            size=read_side(fields, "size"),
            crop=crop,
            mean=tuple(mean),
            std=tuple(std),
            resample=fields.integer("resample", 0, max(Image.Resampling)),
        )

        processor.check_same(fields, PROCESSORS)
        return processor

    def check_same(self, fields: Fields, kinds: tuple[str, ...]):
        """Raise UserError unless the fields are those that this processor would write.

        A step that it does not know must be off, all but do_convert_rgb: every picture is
        converted. kinds: the names of classes that do what this processor does.
        """
        where = fields.where
        values = fields.values
        wanted = {}
        for key in values:
            if key.startswith("do_") and key != "do_convert_rgb":
                wanted[key] = False
        wanted |= self.to_hf()

        for key, expected in wanted.items():
            value = values[key]
            if key == "image_processor_type":
                good = fields.text(key).removesuffix("Fast") in kinds
            elif key == "rescale_factor":
                # Files write 1/255 with more or fewer digits.
                good = abs(fields.number(key, 0.0, 1.0) * 255 - 1) < 1e-6
            elif key in ("size", "crop_size") and not isinstance(value, dict):
                good = True  # old files write one number
            else:
                good = value == expected
            need(good, f"{where}:{key}", value, fields.fix)

    def to_hf(self) -> dict:
        """Return the preprocessor_config.json from which Hugging Face makes the same processor."""
        fields = {
            "image_processor_type": CROPS if self.crop else RESIZES,
            "do_resize": True,
            "resample": int(self.resample),
            "do_center_crop": self.crop > 0,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        square = {"height": self.side, "width": self.side}
        if self.crop:
            fields["size"] = {"shortest_edge": self.size}
            fields["crop_size"] = square
        else:
            fields["size"] = square
        return fields


@dataclass(frozen=True)
class NaFlexProcessor(ImageProcessor):
    """SigLIP2-NaFlex's (Tschannen et al., 2025): a picture in its own proportions, as patches.

    It becomes as large as a budget of patches allows, and its patches come row by row.
    """

    resample: int = int(Image.Resampling.BILINEAR)
    patch_size: int = 16  # pixels
    patches: int = 256  # of a picture, at most

    @property
    def side(self) -> int:
        """Pixels along a side of a square that holds all the patches there can be."""
        return (isqrt(self.patches - 1) + 1) * self.patch_size

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of patches of a picture of this width and height.

        The arithmetic is that of transformers' get_image_size_for_max_num_patches, which finds the
        scale by halving an interval: the last digits decide about a row or a column.
        """
        width, height = size
        low = SCALE_EPS / 10
        high = 100.0
        while high - low >= SCALE_EPS:
            scale = (low + high) / 2
            rows = self._patches_along(height, scale)
            columns = self._patches_along(width, scale)
            if rows * columns <= self.patches:
                low = scale
            else:
                high = scale
        return self._patches_along(height, low), self._patches_along(width, low)

    def _patches_along(self, pixels: int, scale: float) -> int:
        """Return how many patches a side of so many pixels has, after it is scaled."""
        return max(1, ceil(pixels * scale / self.patch_size))

    def __call__(self, image: Image.Image, image_mode: str = "native") -> Tensor:
        """Return a picture's patches as (h * w, patch_size**2 * 3) float32, normalised."""
        return self.normalise(self.pixels(image))

    def pixels(self, image: Image.Image, image_mode: str = "native") -> Tensor:
        """Return a picture's patches as (h * w, patch_size**2 * 3) uint8, not normalised yet.

        A patch is its pixels row by row, each red, green and blue.
        """
        return self.patches_of(image, self.grid_of(image.size))

    def patches_of(self, image: Image.Image, grid: tuple[int, int]) -> Tensor:
        """Return what `pixels` does, of a picture resized to a grid of patches."""
        if image.mode != "RGB":
            image = image.convert("RGB")
        rows, columns = grid
        size = (columns * self.patch_size, rows * self.patch_size)
        pixels = torch.from_numpy(np.array(image.resize(size, self.resample)))  # (H, W, 3)
        pixels = pixels.unflatten(1, (columns, -1)).unflatten(0, (rows, -1))
        return pixels.transpose(1, 2).flatten(0, 1).flatten(1)

    def picture(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the pixels (3, H, W) of patches (h * w, patch_size**2 * 3), of this grid."""
        p = self.patch_size
        pixels = patches.view(*grid, p, p, 3)
        return pixels.permute(4, 0, 2, 1, 3).reshape(3, grid[0] * p, grid[1] * p)

    def pixels_made(self, size: tuple[int, int], image_mode: str = "native") -> int:
        """Return how many pixels `pixels` makes of a picture of this width and height."""
        rows, columns = self.grid_of(size)
        return rows * columns * self.patch_size**2

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return patches (P, patch_size**2 * 3) uint8 as normalised float32 on the same device.

        Pixels that are float already are normalised already.
        """
        if pixels.dtype != torch.uint8:
            return pixels
        mean = constant(self.mean, pixels.device)
        std = constant(self.std, pixels.device)
        colours = pixels.unflatten(1, (-1, 3)).float()
        return colours.div_(255).sub_(mean).div_(std).flatten(1)

    @classmethod
    def from_hf(
        cls, config: dict, default: NaFlexProcessor, where: object = "preprocessor_config.json"
    ) -> NaFlexProcessor:
        given = {key: value for key, value in config.items() if value is not None}
        fix = "give the image processor that was published with the encoder"
        fields = Fields(default.to_hf() | given, where, fix=fix)
        mean = fields.numbers("image_mean", 0.0, 1.0)
        std = fields.numbers("image_std", 1e-3, 1e3)
        for key, numbers in (("image_mean", mean), ("image_std", std)):
            need(len(numbers) == 3, f"{where}:{key}", numbers, "give one of each colour")
        processor = cls(
            mean=tuple(mean),
            std=tuple(std),
            resample=fields.integer("resample", 0, max(Image.Resampling)),
            patch_size=fields.integer("patch_size", 1, SIDE),
            patches=fields.integer("max_num_patches", 1, MOST_PATCHES),
        )
        processor.check_same(fields, (PATCHES, f"{PATCHES}Pil"))
        return processor

    def to_hf(self) -> dict:
        return {
            "image_processor_type": PATCHES,
            "do_resize": True,
            "resample": int(self.resample),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "patch_size": self.patch_size,
            "max_num_patches": self.patches,
        }


def read_side(fields: Fields, key: str) -> int:
    """Return the pixels of a size: of a number, of {"shortest_edge": ...}, or of a square."""
    if isinstance(fields.values[key], dict):
        size = fields.table(key)
        edge = next(iter(size.values), "height")
        return size.integer(edge, 1, SIDE)
    return fields.integer(key, 1, SIDE)


def read_preprocessor(folder: Path) -> dict:
    """Return the image processor's fields in a folder, {} where there is none.

    transformers 4 writes preprocessor_config.json, transformers 5 a part of processor_config.json.
    """
    fields = read_json(folder / "preprocessor_config.json", optional=True)
    if fields:
        return fields
    file = folder / "processor_config.json"
    processor = Fields(read_json(file, optional=True), file)
    return processor.table("image_processor", optional=True).values


def preprocessor_place(folder: Path) -> str:
    """Return where `read_preprocessor` finds the fields of a folder, for messages."""
    flat = folder / "preprocessor_config.json"
    nested = folder / "processor_config.json"
    if nested.exists() and not flat.exists():
        return f"{nested}:image_processor"
    return str(flat)
