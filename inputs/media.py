"""The pictures and videos of a LLaVA row: what the row calls them, and where their bytes are.

A row names them under "image" or "video", one name or a list of names:

    {"image": "a.jpg", ...}   {"image": ["a.jpg", "b.jpg"], ...}   {"video": "clip.mp4", ...}
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from config import UserError


@dataclass(frozen=True)
class Media:
    """One picture or video of a row."""

    kind: str  # "image" or "video"
    name: str  # as the row writes it
    source: Path | bytes  # what pictures.load_image and video.stream take

    def __str__(self) -> str:
        """Return what messages call it: its path, or its name in the row if it comes as bytes."""
        place = self.name if isinstance(self.source, bytes) else self.source
        return f"{self.kind} {place}"


def media_names(row: dict, where: str) -> tuple[str, list[str]]:
    """Return the kind of a row's media, "image" or "video", and their names in the row.

    A row without any is ("image", []). Raise UserError at `where` if it has both kinds, or
    something that is no name.
    """
    if row.get("image") and row.get("video"):
        raise UserError(where, "an image and a video in one row", "make two rows of it")

    kind = "video" if row.get("video") else "image"
    given = row.get(kind) or []
    names = given if isinstance(given, list) else [given]
    if not all(isinstance(name, str) for name in names):
        raise UserError(where, f'"{kind}" is {given!r}', "write a file name or a list of them")
    return kind, names
