"""Where each row of a JSON list is: a scan that reads the file in pieces, one row at a time.

    entries = scan_list(Path("rows.json"))   # (rows, 3) int64: start, end, number

Each row is parsed once, by the json module itself: what is wrong with the file is found now, and
not after a week of training. `scan_list` is the scan; `TextWindow` is the piece of the file that it
looks at, and makes characters of bytes.
"""

from __future__ import annotations

import codecs
import json
import re
from array import array
from pathlib import Path
from typing import BinaryIO

import numpy as np

from checkpoints.files import open_regular
from config import UserError
from inputs.indexed_rows import json_fix, parse_row, too_much

CHUNK = 1 << 24  # bytes of the file that are read at a time
TOKEN = 16  # characters; no number or word of JSON that may be cut off is as long

WHITE_SPACE = re.compile(r"[ \t\n\r]*")  # as JSON defines it
JSON_DECODER = json.JSONDecoder()

FIX = "write [row, row, ...], one row a line, or a table that begins with a line image,caption"


def scan_list(file: Path) -> np.ndarray:
    """Return (start, end, number) of each row of a JSON list, in bytes. Raise UserError."""
    # One flat array of integers: a tuple for each row would take several times the memory.
    entries = array("q")
    with open_regular(file) as raw:
        text = TextWindow(raw, file)
        try:
            open_list(text, file)
            scan_rows(text, entries)
        except json.JSONDecodeError as e:
            raise scan_error(e, text, raw, file, row=len(entries) // 3) from None
        except (ValueError, RecursionError) as e:
            if isinstance(e, UserError):
                raise
            what = "nested too deeply" if isinstance(e, RecursionError) else too_much(e)
            where = f"row {len(entries) // 3}, byte {text.byte}"
            raise UserError(file, f"{what} ({where})", "mend or remove the row") from None
    return np.array(entries).reshape(-1, 3)


def open_list(text: TextWindow, file: Path):
    """Move behind the [ of the list. Raise UserError if there is none, or nothing in it."""
    first = text.peek()
    if not first:
        raise UserError(file, "empty file", "write the rows again")
    if first != "[":
        # Whatever it is, only its beginning is looked at.
        begin = text.text[text.position : text.position + 40]
        if first == "{" and file.stat().st_size < CHUNK:
            with open_regular(file) as whole:
                parse_row(whole.read(), str(file))
            raise UserError(file, "a JSON dict, not a list of rows", FIX)
        raise UserError(file, f"not a JSON list of rows, it begins with {begin!r}", FIX)

    text.go_to(text.position + 1)
    if text.peek() == "]":
        raise UserError(file, "no rows", FIX)


def scan_rows(text: TextWindow, entries: array):
    """Add (start, end, number) of each row up to the ] to `entries`. Raise JSONDecodeError."""
    while True:
        text.peek()  # moves to where the row begins
        start = text.byte
        text.skip_value()
        number = len(entries) // 3
        entries.extend((start, text.byte, number))

        separator = text.peek()
        if separator not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' delimiter", text.text, text.position)
        text.go_to(text.position + 1)
        if separator == "]":
            break

    if text.peek():
        raise json.JSONDecodeError("Extra data", text.text, text.position)


def scan_error(
    error: json.JSONDecodeError, text: TextWindow, raw: BinaryIO, file: Path, row: int
) -> UserError:
    """Return the UserError for a JSONDecodeError whose position counts from the window's start."""
    byte = text.byte + text.bytes_to(error.pos)

    # Editors want a line and a column, counted in the file.
    raw.seek(0)
    before = raw.read(byte)
    lines = before.count(b"\n")
    line_start = before.rfind(b"\n") + 1
    line = before[line_start:].decode("utf-8-sig")
    where = f"line {lines + 1} column {len(line) + 1} (row {row}, byte {byte})"
    return UserError(file, f"not JSON at {where}: {error.msg}", json_fix(error.msg))


class TextWindow:
    """A part of a UTF-8 file, which moves on as it is read.

    `text` is the part, `position` a place in it, and `byte` the same place in the file.
    """

    def __init__(self, raw: BinaryIO, name: Path):
        self.raw = raw
        self.name = name
        self.text = ""
        self.position = 0
        self.byte = 0

        # A piece may end within a character; this keeps its bytes until the rest comes.
        self.utf8 = codecs.getincrementaldecoder("utf-8-sig")()

        # The decoder drops a byte order mark, so it is no part of `text`.
        if raw.read(3) == codecs.BOM_UTF8:
            self.byte = 3
        raw.seek(0)

    def read_more(self) -> bool:
        """Read on, and forget what is before `position`. At the end of the file, return False.

        It reads at least as much as there is already: `skip_value` parses a row from its start
        after each reading, and so does it only a few times, however long the row is.
        """
        unread = len(self.text) - self.position
        piece = self.raw.read(max(CHUNK, unread))
        try:
            read = self.utf8.decode(piece, final=not piece)
        except UnicodeDecodeError as e:
            # What the decoder failed on is the end of what was read from the file.
            at = self.raw.tell() - len(e.object) + e.start
            raise UserError(self.name, f"not UTF-8 at byte {at}", "save it as UTF-8") from None

        if not piece:
            return False
        self.text = self.text[self.position :] + read
        self.position = 0
        return True

    def bytes_to(self, end: int) -> int:
        """Return how many bytes of the file are between `position` and text[end]."""
        if self.text.isascii():
            return end - self.position
        return len(self.text[self.position : end].encode())

    def go_to(self, end: int):
        """Move `position` to text[end]."""
        self.byte += self.bytes_to(end)
        self.position = end

    def peek(self) -> str:
        """Move to the next character that is not white space, and return it; "" at the end."""
        while True:
            space = WHITE_SPACE.match(self.text, self.position)
            self.go_to(space.end())
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.read_more():
                return ""

    def skip_value(self):
        """Move behind the JSON value at `position`. Raise JSONDecodeError; its pos is in `text`."""
        while True:
            try:
                _, end = JSON_DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError as e:
                # Either it is wrong, or its end is not read yet: then the error is at the end of
                # the window, or in a string that does not end there.
                in_string = e.msg.startswith("Unterminated string")
                at_end = e.pos > len(self.text) - TOKEN
                if (in_string or at_end) and self.read_more():
                    continue
                raise

            # A number at the end of the window may go on: 1, 1e, 1e+, 1e+5. Of "1e+" the decoder
            # takes the 1, and leaves two characters.
            if end < len(self.text) - 2 or not self.read_more():
                self.go_to(end)
                return
