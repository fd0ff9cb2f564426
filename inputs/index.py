"""Where in a file each row is: byte offsets of a JSON list, of lines of JSON, or of a tar shard's members.

They are scanned once and kept beside the file as FILE.index (in ~/.cache/barellava where its folder is read-only): a
numpy array that every rank and worker maps into memory, so that millions of rows cost a process next to nothing.
A file is scanned to an (m, 3) int64 array with one entry a row: the bytes where it starts and ends, and its number (in
lines: of its line). In shards it is one entry a member, numbered in its sample: 0 is the row, 1 and on its pictures.
"""

from __future__ import annotations

import codecs
import fcntl
import hashlib
import io
import json
import os
import re
import tarfile
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np

from checkpoints.files import write_file
from config import UserError

CHUNK = 1 << 24  # bytes of a JSON file that are read at a time
SMALL = (
    1 << 25
)  # a JSON file of fewer bytes is scanned in half a second: no index is left beside it
VERSION = b"1"  # of what the scans make


def looks_like(head: bytes) -> str:
    """What a file that should be something else is, from its first bytes; "" if that is not plain."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, the file itself was never fetched"
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if text.startswith((b"<?xml", b"<error", b"<svg")):
        return "an XML text"
    return "" if head.strip(b"\0") else "only zero bytes" if head else "empty file"


def parse(raw: bytes, where: str, byte: int = 0):
    """One JSON text, which starts at that byte of its file."""
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise UserError(where, f"not UTF-8 at byte {byte + e.start}", "save it as UTF-8") from None
    except json.JSONDecodeError as e:
        what = (
            looks_like(raw[:256])
            or f"not JSON at line {e.lineno} column {e.colno}, from byte {byte}: {e.msg}"
        )
        fix = (
            "one row per line belongs into a .jsonl file"
            if e.msg == "Extra data"
            else "mend it there"
        )
        raise UserError(where, what, fix) from None


class _Text:
    """A text file that is read as far as it is asked for; `byte` is the place of text[pos] in the file."""

    def __init__(self, raw, name: Path):
        self.raw, self.name, self.text, self.pos = raw, name, "", 0
        self.utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self.byte = 3 if raw.read(3) == codecs.BOM_UTF8 else 0
        raw.seek(0)

    def more(self) -> bool:
        """Forget what is before pos and read on; at the end of the file change nothing and return False."""
        raw = self.raw.read(max(CHUNK, len(self.text) - self.pos))
        try:
            read = self.utf8.decode(raw, final=not raw)
        except UnicodeDecodeError as e:  # its object is the last bytes that were read
            at = self.raw.tell() - len(e.object) + e.start
            raise UserError(self.name, f"not UTF-8 at byte {at}", "save it as UTF-8") from None
        if raw:
            self.text, self.pos = self.text[self.pos :] + read, 0
        return bool(raw)

    def bytes_to(self, end: int) -> int:
        return end - self.pos if self.text.isascii() else len(self.text[self.pos : end].encode())

    def go(self, end: int):
        self.byte, self.pos = self.byte + self.bytes_to(end), end

    def peek(self, blank=re.compile(r"[ \t\n\r]*").match) -> str:  # noqa: B008 (JSON's white space, compiled once)
        """The next character that is not white, "" at the end; pos is there."""
        while True:
            self.go(blank(self.text, self.pos).end())
            if self.pos < len(self.text) or not self.more():
                return self.text[self.pos : self.pos + 1]

    def skip_value(self, decode=json.JSONDecoder().raw_decode):  # noqa: B008 (made once)
        """Go behind the JSON value at pos. Raises JSONDecodeError, whose pos is in `text`."""
        while True:
            try:
                _, end = decode(self.text, self.pos)
                if (
                    end < len(self.text) - 2 or not self.more()
                ):  # a number at the end may go on: 1, 1e, 1e+, 1e+5
                    return self.go(end)
            except json.JSONDecodeError as e:  # a wrong one, or one whose end is not read yet
                cut = (
                    e.msg.startswith("Unterminated string") or e.pos > len(self.text) - 16
                )  # no token is as long
                if not (cut and self.more()):
                    raise


def scan_list(file: Path) -> np.ndarray:
    """A JSON list. Each row is parsed once, by the json module itself: what is wrong is found now, not in a week."""
    found = array("q")
    with open(file, "rb") as raw:
        text = _Text(raw, file)
        try:
            if not (first := text.peek()):
                raise UserError(file, "empty file", "write the rows again")
            if first != "[":
                kind = type(parse(file.read_bytes(), str(file))).__name__
                what = f"a JSON {kind}, not a list of rows"
                raise UserError(
                    file, what, "write [row, row, ...], or one row per line in a .jsonl file"
                )
            text.go(text.pos + 1)
            if text.peek() == "]":
                raise UserError(
                    file, "no rows", "write [row, row, ...], or one row per line in a .jsonl file"
                )
            while first != "]":
                text.peek()
                start = text.byte
                text.skip_value()
                found.extend((start, text.byte, len(found) // 3))
                first = text.peek()
                if first not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text.text, text.pos)
                text.go(text.pos + 1)
            if text.peek():
                raise json.JSONDecodeError("Extra data", text.text, text.pos)
        except json.JSONDecodeError as e:
            byte = text.byte + text.bytes_to(e.pos)
            raw.seek(0)
            head = raw.read(byte)
            line = head[head.rfind(b"\n") + 1 :].decode("utf-8-sig")
            where = f"line {head.count(10) + 1} column {len(line) + 1} (row {len(found) // 3}, byte {byte})"
            fix = (
                "one row per line belongs into a .jsonl file"
                if e.msg == "Extra data"
                else "mend it there"
            )
            raise UserError(file, f"not JSON at {where}: {e.msg}", fix) from None
    return np.array(found).reshape(-1, 3)


def scan_lines(file: Path) -> np.ndarray:
    """One row a line, which stays unread until it is asked for: a bad line is one bad row."""
    found, end = array("q"), 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            start, end = end, end + len(line)
            if line.strip():
                found.extend((start, end, number))
    if not found:
        raise UserError(file, "empty file", "write the rows again")
    return np.array(found).reshape(-1, 3)


def scan_tar(file: Path) -> np.ndarray:
    """A WebDataset shard: a sample's members stand together, are named alike up to the first dot, and one is .json."""
    samples: list[tuple[str, list]] = []
    try:
        with tarfile.open(file, "r:") as tar:
            while member := tar.next():
                tar.members.clear()  # else it would hold the headers of millions
                if not member.isfile():
                    continue
                folder, name = os.path.split(member.name)
                name, _, kind = name.partition(".")
                if not samples or samples[-1][0] != f"{folder}/{name}":
                    samples.append((f"{folder}/{name}", []))
                number = kind.partition(".")[0]
                place = -1 if kind == "json" else int(number) if number.isdigit() else 0
                samples[-1][1].append((place, member.offset_data, member.offset_data + member.size))
    except (tarfile.TarError, OSError) as e:
        raise UserError(
            file, f"not a tar file, or a damaged one: {e}", "write or fetch the shard again"
        ) from None
    for name, members in samples:
        members.sort(key=lambda m: m[0])
        if [m[0] for m in members[:2]].count(-1) != 1:
            raise UserError(
                f"{file}:{name}", "not exactly one .json among its members", "write the shard again"
            )
    if not samples:
        raise UserError(file, "no rows", "write the shard again")
    return np.array(
        [(start, end, k) for _, ms in samples for k, (_, start, end) in enumerate(ms)], np.int64
    )


SCANS = {".jsonl": scan_lines, ".tar": scan_tar}


def _stamp(file: Path) -> list[int]:
    """What changes with the file: its size, time, and a checksum of its head and tail."""
    with open(file, "rb") as f:
        stat, head = os.fstat(f.fileno()), f.read(4096)
        f.seek(max(0, stat.st_size - 4096))
        digest = hashlib.sha256(VERSION + head + f.read()).digest()
    return [stat.st_size, stat.st_mtime_ns, int.from_bytes(digest[:7], "little")]


def kept(file: Path, kind: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An (m, 3) int64 array that `make` derives from a file, as the memory map of FILE.kind; made if it is not there
    or older than the file. Its first row on the disk is the file's stamp."""
    name = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "barellava"
    places, stamp = (Path(f"{file}.{kind}"), cache / f"{file.name}-{name}.{kind}"), _stamp(file)

    def read() -> np.ndarray | None:
        for place in places:
            try:
                found = np.load(place, mmap_mode="r")
                if found[0].tolist() == stamp:
                    return found[1:]
            except (OSError, ValueError, EOFError, IndexError):
                pass  # none yet, or no array: the next place, or a new one
        return None

    with open(file, "rb") as lock:
        try:
            fcntl.flock(
                lock, fcntl.LOCK_EX
            )  # ranks start together: one makes it, the others find it made
        except OSError:
            pass  # without locks each makes it, and the last rename wins: they are equal
        if (found := read()) is not None:
            return found
        made = make()
        buffer = io.BytesIO()
        # Column by column: who asks for starts and ends alone has no other pages in memory.
        np.save(buffer, np.asfortranarray(np.concatenate([np.array([stamp]), made])))
        for place in places:
            try:
                write_file(place, buffer.getvalue())
                return read()
            except OSError:
                pass  # read-only or full: the next place
    return made


def index(file: Path) -> np.ndarray:
    """The offsets of a .json, .jsonl or .tar file. Raises UserError for what is none of them, OSError."""
    scan = SCANS.get(file.suffix, scan_list)
    if file.suffix != ".tar" and file.stat().st_size < SMALL:
        return scan(file)
    return kept(file, "index", lambda: scan(file))
