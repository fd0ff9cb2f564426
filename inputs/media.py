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
        if isinstance(self.source, bytes):
            return f"{self.kind} {self.name}"
        return f"{self.kind} {self.source}"


def media_names(row: dict, where: str) -> tuple[str, list[str]]:
    """Return the kind of a row's media, "image" or "video", and their names in the row.

    A row without any is ("image", []). Raise UserError at `where` if it has both kinds, or
    something that is no name.
    """
    # A row that has none may say so with null, "" or [], or leave the key out.
    kind = "image"
    if row.get("video"):
        kind = "video"
        if row.get("image"):
            raise UserError(where, "an image and a video in one row", "make two rows of it")

    given = row.get(kind) or []
    names = given
    if not isinstance(given, list):
        names = [given]
    if not all(isinstance(name, str) for name in names):
        raise UserError(where, f'"{kind}" is {given!r}', "write a file name or a list of them")
    return kind, names
