"""Pictures as Pillow decodes them: upright, in RGB, and with a line for what is wrong with one.

    image = load_image("photo.jpg")           # or the bytes of the file; a PIL image
    width, height = image_size("photo.jpg")   # of that image, from the first bytes of the file

Every picture of the project comes through here: training rows, benchmarks, prompts and uploads. A
file says itself what it is, whatever its name, and only FORMATS are read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from inputs.sniff import open_checked

# What data sets hold. Pillow opens forty formats: for PostScript it starts another program, others
# are rare and their decoders are old.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")

# The longest side over the shortest. When the shortest is resized to 384, a picture of this ratio
# still has fewer pixels than Pillow allows.
MAX_RATIO = 500

# A progressive JPEG is decoded scan by scan, each over all pixels. Files have about ten scans; an
# attack has thousands. This many pixels, in all scans together, take half a minute.
MOST_SCANNED = 2**33

# The values of the EXIF tag Orientation for which width and height change places.
QUARTER_TURNS = (5, 6, 7, 8)

TILE_WIDTH = 322  # tags of TIFF
TILE_LENGTH = 323


def load_image(
    source: str | Path | bytes, check: Callable[[tuple[int, int]], None] | None = None
) -> Image.Image:
    """Return the first frame of a picture file, or of its bytes, in RGB and upright by its EXIF.

    `check` gets the size that it will have, (width, height), before the pixels are decoded, and may
    raise ValueError. Raise ValueError(what is wrong with it).
    """
    with _opened(source) as image:
        if check:
            # Asked for its EXIF, a PNG that does not begin with it would be decoded.
            size = image.size
            if image.format != "PNG" or "exif" in image.info:
                size = _upright_size(image)
            try:
                check(size)
            except ValueError as e:
                raise _Refused(str(e)) from None
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
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the width and height that an opened picture has when it is turned as its EXIF says."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        orientation = None  # damaged, as above

    # Of a TIFF, Pillow says the size as it is turned.
    width, height = image.size
    if orientation in QUARTER_TURNS and image.format != "TIFF":
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
                with Image.open(file, formats=FORMATS) as image:
                    _check_header(image, file)
                    yield image  # what the caller raises from here on is caught below
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            limit = Image.MAX_IMAGE_PIXELS
            raise ValueError(f"more than {limit} pixels, Pillow's limit against bombs") from None
        except UnidentifiedImageError:
            what = "not an image, or one with a damaged header or a side of zero pixels"
            raise ValueError(f"{what} (read are {', '.join(FORMATS)})") from None
        except _Refused as e:
            raise ValueError(str(e)) from None
        except Exception as e:  # Pillow's decoders raise nearly anything on a damaged file
            raise ValueError(_damage(e)) from None


class _Refused(Exception):
    """A good picture that takes too much: its message is no decoder's, and stays as it is."""


def _check_header(image: Image.Image, file: BinaryIO):
    """Raise _Refused for a picture whose decoding takes more than its size says."""
    width, height = image.size
    if max(width, height) > MAX_RATIO * min(width, height):
        raise _Refused(f"{width} x {height} pixels, a side ratio over {MAX_RATIO}")

    if image.format in ("JPEG", "MPO"):
        place = file.tell()
        file.seek(0)
        scans = 0
        while piece := file.read(2**20):
            scans += piece.count(b"\xff\xda")  # the marker that begins a scan
        file.seek(place)
        if scans * width * height > MOST_SCANNED:
            raise _Refused(f"{width} x {height} pixels in {scans} scans, which no real file has")

    # A tile is decoded whole, and may be larger than the picture.
    if image.format == "TIFF":
        tile = image.tag_v2.get(TILE_WIDTH, 1) * image.tag_v2.get(TILE_LENGTH, 1)
        if tile > Image.MAX_IMAGE_PIXELS:
            raise _Refused(f"a tile of {tile} pixels")


def _damage(error: Exception) -> str:
    """Return one line for what a decoder raised."""
    if isinstance(error, MemoryError):
        return "too large for the memory"
    text = " ".join(str(error).split())
    if "truncated" in text.lower():
        return "truncated"
    return f"damaged: {text}"
