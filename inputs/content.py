"""What a row shows, asks and answers, as three hashes: the same content has the same, anywhere.

    keys = row_keys(rows, workers=4)    # (len(rows), 3) int64: pictures, question, answers

    pictures    of the bytes of its pictures, whatever their order; of a video its size and both
                ends. 0 if it has none
    question    of what the humans say, without the <image> marks, and of the order of the pictures.
                0 if the row or one of its pictures cannot be read
    answers     of what is answered

Neither names nor places count, nor what the rows are written in. So they say which rows are
duplicates (duplicates.py), and which rows to hold out so that no file and no order decides it
(holdout.py). They are numbers from 1 to 2**63 - 1.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from checkpoints.files import open_regular
from config import UserError
from inputs.conversation import IMAGE
from inputs.forms import Row
from inputs.measure import measure_rows
from inputs.media import Media, media_names
from inputs.rows import Rows

# The pictures of a row that cannot be read at all: the largest hash, which is held out last.
UNREADABLE = 2**63 - 1

# Fewer rows are read in seconds, so nothing is left beside their files.
FEW_ROWS = 4096

END = 2**16  # bytes at each end of a video that are hashed
LOOKED_AT = 64  # pictures that tell whether those of a folder are still the same

Keys = tuple[int, int, int]


def row_keys(rows: Rows, workers: int = 0) -> np.ndarray:
    """Return (len(rows), 3) int64: the hashes of each row's pictures, question and answers.

    Every picture is read, by `workers` processes. Of many rows they are kept beside the files.
    """
    doing = "reading all its pictures for a hash of their content"
    keys = measure_rows(rows, kind_of_keys, measure_keys, workers, doing)

    # What could not be read when they were made may have been fetched since.
    unread = np.flatnonzero(keys[:, 1] == 0)
    if len(unread):
        keys = np.array(keys)
        for i in unread.tolist():
            keys[i] = measure_keys(rows, i)
    return keys


def measure_keys(rows: Rows, i: int) -> Keys:
    """Return the three hashes of row i."""
    try:
        row = rows[i]
    except UserError:
        return UNREADABLE, 0, 0  # training says what is wrong with it

    # A picture that is not there has its name to be known by, and the row no question.
    answers = said_by(row, "gpt")
    try:
        digests = [digest_of_medium(medium) for medium in rows.media(i, row)]
    except (UserError, OSError):
        _, names = media_names(row)
        names = [str(name).encode(errors="replace") for name in names]
        return hash_of(names), 0, hash_of([answers])

    pictures = 0
    if digests:
        pictures = hash_of(sorted(set(digests)))
    question = said_by(row, "human")
    if not digests and not question:
        question = answers  # a text without a question is known by itself
    return pictures, hash_of([question, *digests]), hash_of([answers])


def said_by(row: Row, speaker: str) -> bytes:
    """Return what "human" or "gpt" says in a row, without <image> marks and white space."""
    texts = []
    turns = row.get("conversations")
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict) and turn.get("from") == speaker:
            text = str(turn.get("value")).replace(IMAGE, " ")
            texts.append(" ".join(text.split()))
    return "\n".join(texts).encode(errors="surrogatepass")


def hash_of(texts: Iterable[bytes]) -> int:
    """Return a number from 1 to 2**63 - 1 that stands for a list of texts."""
    hashed = hashlib.blake2b(digest_size=8)
    for text in texts:
        hashed.update(len(text).to_bytes(8, "big"))
        hashed.update(text)
    return max(1, int.from_bytes(hashed.digest(), "big") >> 1)


# ---------------------------------------------------------------------------- pictures and videos


def digest_of_medium(medium: Media) -> bytes:
    """Return a hash of a picture's bytes, or of a video's size and ends. Raise OSError.

    A video may be a folder of frames: then the names and sizes of its files count.
    """
    source = medium.source
    if isinstance(source, bytes):
        if medium.kind == "video":
            return digest(size_and_ends(len(source), source[:END], source[-END:]))
        return digest(source)

    if medium.kind == "video" and source.is_dir():
        frames = [(path.name, path.stat().st_size) for path in sorted(source.iterdir())]
        return digest(repr(frames).encode())

    with open_regular(source) as file:
        if medium.kind == "video":
            return digest(ends_of_file(file))
        new = partial(hashlib.blake2b, digest_size=16)
        return hashlib.file_digest(file, new).digest()


def ends_of_file(file: BinaryIO) -> bytes:
    """Return the size and both ends of an open file."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(END)
    file.seek(max(0, size - END))
    return size_and_ends(size, head, file.read(END))


def size_and_ends(size: int, head: bytes, tail: bytes) -> bytes:
    """Return what stands for a video."""
    return size.to_bytes(8, "big") + head + tail


def digest(content: bytes) -> bytes:
    """Return the hash of a content, 16 bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


# ------------------------------------------------------------------------------ where they are kept


def kind_of_keys(rows: Rows) -> str:
    """Return the kind of file in which the keys of these rows are kept; "" if they are not.

    What they depend on, besides the rows' files, is in its name: how columns are mapped, and the
    folder of pictures.
    """
    if len(rows) < FEW_ROWS:
        return ""
    images = getattr(rows, "images", None)  # tar files have no such folder
    columns = getattr(rows, "columns", None) or {}
    decides = repr((str(images and Path(images).resolve()), sorted(columns.items())))
    decides += repr(state_of_pictures(rows))
    key = hashlib.sha256(decides.encode(errors="replace")).hexdigest()[:12]
    return f"{key}.content"


def state_of_pictures(rows: Rows) -> list[tuple[int, int]]:
    """Return the sizes and times of some pictures and videos that lie in a folder.

    They tell whether it is still the same folder. Rows of a parquet or tar file hold their own
    pictures, and the file's state tells.
    """
    if rows.blocks is not None:
        return []
    states = []
    for k in range(LOOKED_AT):
        i = k * len(rows) // LOOKED_AT
        try:
            media = rows.media(i, rows[i])
            if any(isinstance(medium.source, bytes) for medium in media):
                break
            for medium in media:
                stat = medium.source.stat()
                states.append((stat.st_size, stat.st_mtime_ns))
        except (UserError, OSError, ValueError):
            states.append((-1, -1))
    return states
