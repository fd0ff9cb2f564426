"""Pictures as Pillow decodes them: upright, in RGB, and with a line for what is wrong with one.

    image = load_image("photo.jpg")           # or the bytes of the file; a PIL image
    width, height = image_size("photo.jpg")   # of that image, from the first bytes of the file

Every picture of the project comes through here: training rows, benchmarks, prompts and uploads.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from inputs.sniff import open_checked

# The longest side over the shortest. When the shortest is resized to 384, a picture of this ratio
# still has fewer pixels than Pillow allows.
MAX_RATIO = 500

# The values of the EXIF tag Orientation for which width and height change places.
QUARTER_TURNS = (5, 6, 7, 8)


def load_image(source: str | Path | bytes) -> Image.Image:
    """Return the first frame of a picture file, or of its bytes, in RGB and upright by its EXIF.

    Raise ValueError(what is wrong with it).
    """
    with _opened(source) as image:
        image.load()

        # Damaged EXIF raises nearly anything (SyntaxError, TypeError, struct.error). The pixels
        # are good all the same, and stay as they are stored.
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except Exception:
            pass

        if image.mode == "RGB":
            return image.copy()
        return image.convert("RGB")


def image_size(source: str | Path | bytes) -> tuple[int, int]:
    """Return the width and height of what `load_image` returns, without decoding the pixels.

    Raise ValueError(what is wrong with it), as far as the first bytes show it.
    """
    with _opened(source) as image:
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        except Exception:
            orientation = None  # damaged, as above

        width, height = image.size
        if orientation in QUARTER_TURNS:
            return height, width
        return width, height


@contextmanager
def _opened(source: str | Path | bytes) -> Iterator[Image.Image]:
    """Open a picture. What goes wrong then, or while it is used, becomes a one-line ValueError."""
    with open_checked(source) as file:
        try:
            with warnings.catch_warnings():
                # Odd palettes and metadata make Pillow warn; the pixels are right. Its warning of
                # a decompression bomb is the limit that we enforce.
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file) as image:
                    yield image  # what the caller raises from here on is caught below
                    width, height = image.size
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            limit = Image.MAX_IMAGE_PIXELS
            raise ValueError(f"more than {limit} pixels, Pillow's limit against bombs") from None
        except UnidentifiedImageError:
            what = "not an image, or one with a damaged header or a side of zero pixels"
            raise ValueError(what) from None
        except Exception as e:  # Pillow's decoders raise nearly anything on a damaged file
            raise ValueError(_damage(e)) from None

    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels, a side ratio over {MAX_RATIO}")


def _damage(error: Exception) -> str:
    """Return one line for what a decoder raised."""
    text = " ".join(str(error).split())
    if "truncated" in text.lower():
        return "truncated"
    return f"damaged: {text}"
