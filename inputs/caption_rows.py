"""Rows of a folder of pictures with captions: {"id": KEY, "image": "KEY.jpg", "caption": ...}.

    a.jpg, a.txt           the caption of a picture stands in the text of the same name
    more/b.png, more/b.txt

A picture without a caption and a caption without a picture are left out and counted. Folders that
are named for what their pictures show are not read: a row has a text.

The rows are written to ~/.cache/barellava as lines, and read from there as such.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from checkpoints.files import open_regular, write_file, writing
from config import UserError, printable
from inputs.folders import choose_captions, list_folder, pairs_of, stem_of
from inputs.index import cache_folder
from inputs.json_rows import JsonLines
from inputs.sniff import reason


class CaptionRows(JsonLines):
    """The rows of a folder of pictures with captions; its only file is the folder.

    Each opening reads all captions, and writes the lines again if one has changed.
    """

    def open_files(self) -> list[int]:
        """Raise UserError for a caption that cannot be read."""
        [self.folder] = self.files
        self.found = pairs_of(choose_captions(list_folder(self.folder)).names)
        lines = []
        for picture, caption in self.found.pairs:
            lines.append(caption_line(self.folder, picture, caption))
        self.files = [keep_lines(self.folder, "".join(lines))]
        return super().open_files()

    def details(self) -> str:
        what = f", {len(self.found.pairs)}"
        if self.found.alone:
            what += f"; pictures without a caption, left out: {listed(self.found.alone)}"
        if self.found.texts:
            what += f"; texts without a picture, left out: {listed(self.found.texts)}"
        return what

    def own_folder(self, file: Path) -> Path:
        return self.folder

    def place(self, k: int, number: int) -> str:
        return f"{self.file}:row {number}"


def listed(names: list[str]) -> str:
    """Return how many names there are, and the first of them."""
    first = printable(names[0], 100)
    if len(names) > 1:
        first += ", ..."
    return f"{len(names)} ({first})"


def caption_line(folder: Path, picture: str, caption: str) -> str:
    """Return the row of a picture and its caption, as a line of JSON. Raise UserError."""
    file = folder / caption
    try:
        with open_regular(file) as opened:
            text = opened.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as e:
        raise UserError(file, f"not UTF-8 at byte {e.start}", "save it as UTF-8") from None
    except OSError as e:
        raise UserError(file, reason(e), "make it readable, or remove it") from None
    return json.dumps({"id": stem_of(picture), "image": picture, "caption": text}) + "\n"


def keep_lines(folder: Path, lines: str) -> Path:
    """Return a file with these lines, which is written unless it is there."""
    content = lines.encode()
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    digest = hashlib.sha256(content).digest()
    with writing(folder, "set XDG_CACHE_HOME to a folder that may be written"):
        file = cache_folder() / f"{folder.resolve().name}-{place}.captions.jsonl"
        try:
            with open_regular(file) as opened:
                if opened.read() == content:
                    return file
        except OSError:
            pass  # it is not there

        # Ranks start together, and each may write it. So its time is a function of its content.
        def write(path: str):
            Path(path).write_bytes(content)
            time = int.from_bytes(digest[:4], "little")
            os.utime(path, (time, time))

        write_file(file, write)
    return file
