"""Published image processors as numbers: resize, crop, normalise, exactly as Hugging Face's do with Pillow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from checkpoints.files import read_json
from config import UserError

PROCESSORS = (
    "CLIPImageProcessor",
    "SiglipImageProcessor",
    "BitImageProcessor",
    "CLIPFeatureExtractor",
)


def need(good: bool, where: object, value: object, fix: str):
    if not good:
        raise UserError(where, f"{value!r} is not supported", fix)


@dataclass(frozen=True)
class ImageProcessor:
    """A published image processor as numbers. Small and picklable: data workers carry it without the weights."""

    size: int = 224  # pixels: the square's side, or the shortest side where crop is set
    crop: int = 0  # 0 = resize straight to a size x size square; else resize the shortest side, cut the centre
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = int(Image.Resampling.BICUBIC)
    side = property(lambda self: self.crop or self.size)

    @classmethod
    def from_hf(
        cls, config: dict, default: ImageProcessor, where: object = "preprocessor_config.json"
    ):
        """From an image processor's fields; a missing one is the default's. UserError for one we cannot reproduce."""
        given = {
            "image_processor_type": config.get("feature_extractor_type")
        } | config  # its name in old files
        given = {key: value for key, value in given.items() if value is not None}
        c = {"crop_size": default.side} | default.to_hf() | given
        size, crop = (
            next(iter(v.values()), 0) if isinstance(v, dict) else v
            for v in (c["size"], c["crop_size"])
        )
        made = cls(
            size,
            crop * c["do_center_crop"],
            tuple(c["image_mean"]),
            tuple(c["image_std"]),
            c["resample"],
        )
        others = {key: False for key in c if key.startswith("do_")} | {
            "do_convert_rgb": c.get("do_convert_rgb")
        }
        for key, value in (others | made.to_hf()).items():
            given = c.get(key, value)
            good = (
                given.removesuffix("Fast") in PROCESSORS
                if key == "image_processor_type"
                else given == value
            )
            good |= key in ("size", "crop_size") and isinstance(given, int)  # of old files
            good |= key == "rescale_factor" and abs(given * 255 - 1) < 1e-6
            need(
                good,
                f"{where}:{key}",
                given,
                "give the image processor that was published with the encoder",
            )
        return made

    def to_hf(self) -> dict:
        """preprocessor_config.json as Hugging Face's processors read it (BitImageProcessor does what CLIP's does)."""
        square = {"height": self.side, "width": self.side}
        sizes = (
            {"size": {"shortest_edge": self.size}, "crop_size": square}
            if self.crop
            else {"size": square}
        )
        return {
            "image_processor_type": PROCESSORS[not self.crop], "do_resize": True, "resample": int(self.resample),
            "do_center_crop": self.crop > 0, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": list(self.mean), "image_std": list(self.std), **sizes,
        }  # fmt: skip

    def __call__(self, image: Image.Image, image_mode: str = "square") -> Tensor:
        """A picture -> (3, side, side) float32; `pad` first makes it a square with the mean colour."""
        return self.normalise(self.pixels(image, image_mode)[None])[0]

    def pixels(self, image: Image.Image, image_mode: str = "square") -> Tensor:
        """The same in uint8, not normalised yet: a quarter of the bytes to carry to the device."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        if image_mode == "pad":
            left, top = ((max(image.size) - edge) // 2 for edge in image.size)
            border = (
                left,
                top,
                max(image.size) - image.width - left,
                max(image.size) - image.height - top,
            )
            image = ImageOps.expand(image, border, tuple(int(m * 255) for m in self.mean))
        size = [
            self.size * edge // min(image.size) if self.crop else self.size for edge in image.size
        ]
        left, top = ((edge - self.side) // 2 for edge in size)
        return self.tensor(
            image.resize(size, self.resample).crop((left, top, left + self.side, top + self.side))
        )

    @staticmethod
    def tensor(image: Image.Image) -> Tensor:
        """A picture in RGB -> (3, H, W) uint8."""
        return torch.from_numpy(
            np.stack([np.asarray(band) for band in image.split()])
        )  # faster than a transpose

    def normalise(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> float32, where they lie; what is float already is normalised."""
        if pixels.dtype != torch.uint8:
            return pixels
        mean, std = (
            pixels.new_tensor(x, dtype=torch.float32)[:, None, None] for x in (self.mean, self.std)
        )
        return pixels.float().div_(255).sub_(mean).div_(std)


def read_preprocessor(folder) -> dict:
    """The image processor's fields in a folder: transformers 4's file, else transformers 5's, else {}."""
    flat = read_json(folder / "preprocessor_config.json", optional=True)
    return flat or read_json(folder / "processor_config.json", optional=True).get(
        "image_processor", {}
    )
