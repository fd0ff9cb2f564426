"""The pictures and videos of a LLaVA row: what the row calls them, and where their bytes are.

A row names them under "image" or "video", one name or a list of names:

    {"image": "a.jpg", ...}   {"image": ["a.jpg", "b.jpg"], ...}   {"video": "clip.mp4", ...}
"""

from __future__ import annotations

import base64
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from config import UserError, printable
from inputs.forms import Row

URL_FIX = "write the file itself to the folder, and its name into the row"


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
    return f"fetch the {media.kind} again, or remove the row"
