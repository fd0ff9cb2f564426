"""What a file is that should be something else: the error pages and zeros that downloads leave.

looks_like(b"<!DOCTYPE html>...")   # "an HTML page", as a line for a message
open_checked("photo.jpg")           # the open file, or ValueError("an HTML page")
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

from checkpoints.files import open_regular

HEAD = 256  # bytes of a file that are enough to tell


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
