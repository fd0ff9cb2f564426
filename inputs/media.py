"""Pictures and videos of rows: what stands for one in a row, and where its bytes are.

A row names them under "image" or "video", one name or a list of names:

    {"image": "a.jpg", ...}   {"image": ["a.jpg", "b.jpg"], ...}   {"video": "clip.mp4", ...}

A raw row (forms.py) may have more than a name in its place, which `read_medium` reads:

    "data:image/png;base64,..."   b"..."   {"bytes": b"...", "path": "a.jpg"}   {"url": "a.jpg"}
"""

from __future__ import annotations

import base64
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from config import UserError, printable

if TYPE_CHECKING:
    from inputs.forms import Row

MEDIA = ("image", "video")  # the kinds

# How names of files end that are pictures and videos.
PICTURE_ENDINGS = (
    ".jpg .jpeg .jpe .jfif .png .webp .avif .gif .bmp .tif .tiff .ppm .pgm .jp2 .heic"
).split()
VIDEO_ENDINGS = ".mp4 .m4v .mov .webm .mkv .avi .mpg .mpeg .ts .flv .wmv .ogv .3gp".split()

URL_FIX = "write the file itself to the folder, and its name into the row"

LONGEST_NAME = 4096  # characters; a longer text is no file's name


def ending_of(name: str) -> str:
    """Return the last ending of a file's name, with its dot and in small letters: ".jpg"."""
    return os.path.splitext(name)[1].lower()


def kind_by_ending(name: str) -> str:
    """Return "image" or "video" if a file's name ends as that of one; "" if not."""
    ending = ending_of(name)
    if ending in PICTURE_ENDINGS:
        return "image"
    if ending in VIDEO_ENDINGS:
        return "video"
    return ""


# ------------------------------------------------------------------------------------- in raw rows


class Medium(NamedTuple):
    """A picture or video as a raw row has it."""

    kind: str  # "image" or "video"
    name: str
    content: bytes | None  # None: it is the file of that name


def is_empty(value: Any, levels: int = 2) -> bool:
    """Say whether a value stands for nothing: null, an empty text, or a list or object of these.

    NaN is what pandas writes for null. `levels` says how deep lists and objects are looked into.
    """
    if isinstance(value, (str, bytes)):
        return not value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        if levels == 0:
            return not value
        return all(is_empty(inner, levels - 1) for inner in value)
    return value is None or value != value


def as_list(value: Any) -> list:
    """Return a list as it is, and anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def read_medium(value: Any, kind: str, where: str) -> Medium:
    """Return a picture or video from what stands for it: a name, bytes, or an object of these.

    Raise UserError at `where` if it is nothing of the kind.
    """
    if isinstance(value, str):
        return Medium(kind, value, None)
    if isinstance(value, bytes):
        return Medium(kind, kind, value)
    if isinstance(value, dict):
        names = [value[key] for key in ("path", "url", "file_name") if not is_empty(value.get(key))]
        name = names[0] if names else kind
        content = value.get("bytes") or None
        has_content = isinstance(content, bytes)
        if isinstance(name, str) and (has_content or names and content is None):
            return Medium(kind, name, content)
    what = f"{printable(repr(value), 60)} is no {kind}"
    raise UserError(where, what, "write a file name, or a list of file names")


def picture_in(value: Any, named: bool, levels: int = 4) -> str:
    """Return "image" or "video" if a value plainly holds one; "" if not.

    Bytes and data: URLs are one. With `named` a text that ends as the name of such a file is one,
    too. Of a list the first items are looked at, `levels` deep. A map of parquet is a list of
    tuples.
    """
    if isinstance(value, bytes) and value:
        return "image"
    if isinstance(value, str):
        if value.startswith(("data:image/", "data:video/")):
            return value[5:10]
        if named and len(value) <= LONGEST_NAME:
            return kind_by_ending(value)
        return ""

    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple) and levels > 0:
        for inner in value[:20]:
            found = picture_in(inner, named, levels - 1)
            if found:
                return found
    return ""


def check_unread(values: dict, keys: list[str], where: str, named: bool, fix: str = ""):
    """Raise UserError if one of these keys, which nothing reads, plainly holds a picture or video.

    named: a text that ends as the name of such a file is one.
    """
    for key in keys:
        kind = picture_in(values[key], named)
        if kind:
            key = printable(key, 60)
            fix = fix or f'name the key of the {kind}s: columns = {{{kind} = "{key}"}}'
            raise UserError(where, f"nothing reads the {kind} under {key!r}", fix)


# -------------------------------------------------------------------------------------- of a row


@dataclass(frozen=True)
class Media:
    """One picture or video of a row."""

    kind: str  # "image" or "video"
    name: str  # as the row writes it
    source: Path | bytes  # what pictures.load_image and video.stream take

    def __str__(self) -> str:
        """Return what messages call it: its path, or its name in the row if it comes as bytes."""
        if isinstance(self.source, bytes):
            return f"{self.kind} {printable(self.name, 60)}"
        return f"{self.kind} {self.source}"


def media_names(row: dict) -> tuple[str, list[str]]:
    """Return the kind of a row's media, "image" or "video", and their names in the row.

    A row without any is ("image", []).
    """
    kind = "image"
    if row.get("video"):
        kind = "video"
    names = row.get(kind) or []
    if isinstance(names, str):
        names = [names]
    return kind, names


def media_of_row(row: Row, folder: Path, where: str) -> list[Media]:
    """Return the pictures or videos of a row, whose files are in `folder`.

    Raise UserError at `where` for a data: URL that is none.
    """
    kind, names = media_names(row)
    media = []
    for name, content in zip(names, row.sources, strict=True):
        source: Path | bytes = folder / name
        if content is not None:
            source = content
        elif name.startswith("data:"):
            source = bytes_of_url(name, where)
        media.append(Media(kind, name, source))
    return media


def bytes_of_url(url: str, where: str) -> bytes:
    """Return what a URL "data:image/png;base64,..." holds. Raise UserError at `where`."""
    head, comma, text = url.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(text, validate=True)
    except ValueError:  # binascii.Error is one
        what = f"{printable(url, 60)} is no data: URL in base64"
        raise UserError(where, what, URL_FIX) from None


def missing_fix(media: Media) -> str:
    """Return what to do about a picture or video that is none, going by how it is written."""
    name = media.name
    if name.startswith("data:"):
        return URL_FIX
    if "://" in name:
        return "download it, and write the file's name into the row"
    if "\\" in name:
        return "write / between folders and file, not \\"

    # macOS writes letters with accents as two characters, others as one. They look the same.
    for form in ("NFC", "NFD"):
        other = unicodedata.normalize(form, str(media.source))
        if other != str(media.source) and os.path.exists(other):
            return f"write the name in Unicode's form {form}, as the file's own"

    fix = f"fetch the {media.kind} again, or remove the row"
    if isinstance(media.source, Path):
        fix += ", or name the folder that it lies in as images (--images)"
    return fix
