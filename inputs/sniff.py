"""What a file is that should be something else: the error pages and zeros that downloads leave.

looks_like(b"<!DOCTYPE html>...")    # "an HTML page", as a line for a message
open_checked("photo.jpg")            # the open file, or ValueError("an HTML page")
check_may_be_rows(b"PK...", file)    # UserError: a zip archive, no file of rows
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import BinaryIO

from checkpoints.files import open_regular
from config import UserError

HEAD = 256  # bytes of a file that are enough to tell

# What holds no rows: its first bytes, what it is, and what to do about it.
UNPACK = "unpack it, and name the file inside"
NO_ROWS = (
    (
        b"PK\x03\x04",
        "a zip archive or a spreadsheet",
        "unpack it, or save the sheet as CSV in UTF-8",
    ),
    (b"\x1f\x8b", "a gzip file", UNPACK),
    (b"BZh", "a bzip2 file", UNPACK),
    (b"\xfd7zXZ", "an xz file", UNPACK),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", UNPACK),
    (b"7z\xbc\xaf", "a 7-Zip archive", UNPACK),
    (b"ARROW1", "an Arrow file", "write it as parquet: dataset.to_parquet(FILE)"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "write it as parquet: dataset.to_parquet(FILE)"),
    (b"\x93NUMPY", "a numpy array", "write rows as JSON lines, parquet or a table"),
    (b"\x89HDF", "an HDF5 file", "write rows as JSON lines, parquet or a table"),
    (b"SQLite format 3", "an SQLite data base", "write rows as JSON lines, parquet or a table"),
    (b"%PDF", "a PDF document", "write rows as JSON lines, parquet or a table"),
)
PICTURE = "name the folder that it is in, or a file of rows"

# How pictures and films begin: what rows show.
MEDIUM = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|BM....\0\0|II\*\0|MM\0\*|RIFF....(WEBP|AVI )|P[3-6]\s"
    rb"|\0\0\0\x0cjP  |....ftyp|\x1aE\xdf\xa3|\0\0\x01\xba|FLV\x01|OggS",
    re.DOTALL,
)


def looks_like(head: bytes) -> str:
    """Return what a file is that is neither JSON nor a picture nor a video, from its first bytes.

    Return "" for a file that may be one of them.
    """
    if not head:
        return "empty file"
    # A download that broke off may leave the file at its full length, with nothing in it.
    if not head.strip(b"\0"):
        return "only zero bytes"

    if is_utf16(head):
        return "UTF-16 text"
    if head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "a PostScript file"

    # What precedes a text: a byte order mark, and white space.
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, the file itself was never fetched"
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if b"<svg" in text:
        return "an SVG drawing"
    if text.startswith((b"<?xml", b"<error")):
        return "an XML text"
    return ""


def is_utf16(head: bytes) -> bool:
    """Say whether a file begins with a byte order mark of UTF-16, or two of its ASCII letters."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    first, second, third, fourth = head[:4].ljust(4, b"x")
    little_endian = first and not second and third and not fourth
    big_endian = not first and second and not third and fourth
    return bool(little_endian or big_endian)


def reason(error: OSError) -> str:
    """Return why a file cannot be read, in words."""
    return (error.strerror or str(error)).lower()


def open_checked(source: str | Path | bytes) -> BinaryIO:
    """Open a file, or the bytes of one, at its start.

    Raise ValueError(what is wrong with it) if it cannot be read or `looks_like` something else.
    """
    file = None
    try:
        if isinstance(source, bytes):
            file = io.BytesIO(source)
        else:
            file = open_regular(source)
        wrong = looks_like(file.read(HEAD))
        file.seek(0)
    except OSError as e:
        wrong = reason(e)

    if wrong:
        if file is not None:
            file.close()
        raise ValueError(wrong)
    return file


def begins_as_medium(head: bytes) -> bool:
    """Say whether a file begins as a picture or a film does."""
    return MEDIUM.match(head) is not None


def check_may_be_rows(head: bytes, file: Path):
    """Raise UserError for a file that is neither a text, nor of a kind of rows."""
    if not head.strip():
        return  # an empty file, which each format names
    other = looks_like(head[:HEAD])
    if other:
        fix = "fetch or write it again"
        if "UTF-16" in other:
            fix = "save it as UTF-8"
        if "Git LFS" in other:
            fix = "run git lfs pull, or fetch it again"
        raise UserError(file, other, fix)
    for magic, what, fix in NO_ROWS:
        if head.startswith(magic):
            raise UserError(file, f"{what}, no file of rows", fix)
    if begins_as_medium(head):
        raise UserError(file, "a picture or a film, no file of rows", PICTURE)

    # A text has no zero byte. One that is not in its first line is in a bad row.
    first_line = head.split(b"\n", 1)[0]
    if b"\0" in first_line and not head.lstrip().startswith((b"[", b"{")):
        what = "binary, and neither a tar nor a parquet file"
        raise UserError(file, what, "write rows as JSON lines, parquet, tar or a table")
