"""The pictures and videos of a LLaVA row: what the row calls them, and where their bytes are.

A row names them under "image" or "video", one name or a list of names:

    {"image": "a.jpg", ...}   {"image": ["a.jpg", "b.jpg"], ...}   {"video": "clip.mp4", ...}
"""

from __future__ import annotations

import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from config import UserError

# Keys under which other projects name a picture or video. A row that has one, in large or small
# letters, has something to show that nobody would read.
UNREAD = (
    "image images img imgs picture pictures image_path image_paths image_file image_url image_urls"
    " video videos video_path video_paths video_file video_url"
).split()


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

    A row without any is ("image", []). Raise UserError at `where` if it has both kinds, something
    that is no name, or pictures under a key that is not read.
    """
    for key, value in row.items():
        is_read = key in ("image", "video")
        if value and not is_read and key.lower() in UNREAD:
            what = f'it has something under "{key}", which is not read'
            fix = 'write it as "image" or "video": a file name, or a list of file names'
            raise UserError(where, what, fix)

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


def missing_fix(media: Media) -> str:
    """Return what to do about a picture or video that is not there, going by how it is written."""
    name = media.name
    if name.startswith("data:"):
        return "write the file itself to the folder, and its name into the row"
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
