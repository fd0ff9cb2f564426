"""Arrays that are derived from a file once and kept beside it: where its rows are, their lengths.

    cached_array(file, "index", make)   # FILE.index, or what `make` returns, written to FILE.index

Scanning a file of a million rows takes minutes. So the result is kept as FILE.index, a numpy array
that every rank and worker maps into memory: it costs a process next to nothing. Where the folder
is read-only, it is kept in ~/.cache/barellava.

An index is an (m, 3) int64 array. An entry of it, (start, end, number), stands for the bytes
file[start:end]:

    .json     an entry a row; number is the row's, from 0
    .jsonl    an entry a row; number is the line's, from 1
    .tar      an entry a member, sample by sample; number 0 is the row, 1, 2, ... are its media,
              -1 is a caption beside them, -2 is passed over (shards.py)
    .csv      an entry a record; number is that of its first line, from 1

That of a .parquet file has an entry a row group, (end of its rows, first byte, bytes before
compression), and depends on the file's footer alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from checkpoints.files import open_regular, remove_temporaries, write_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# A JSON file of fewer bytes is scanned in half a second, so no index is left beside it.
SMALL = 1 << 25

# Raise it when the scans find something else in the same file: kept arrays are then made again.
VERSION = b"3"

# Of a large file, so many pieces are read to tell whether it is the same.
PIECES = 64
PIECE = 4096  # bytes


# What is kept beside files, by the last ending of its name.
KINDS = (".index", ".counts", ".content", ".numbers")


def is_kept(file: Path) -> bool:
    """Say whether a file is one that is kept beside another: FILE.index, or FILE.KEY.counts."""
    beside = file.with_suffix("")
    is_there = beside.exists() or beside.with_suffix("").exists()
    return file.suffix in KINDS and is_there


def is_small(file: Path) -> bool:
    """Say whether a file is scanned faster than an index is worth keeping. Raise OSError."""
    return file.stat().st_size < SMALL


def cached_array(
    file: Path,
    kind: str,
    make: Callable[[], np.ndarray],
    read: Callable[[BinaryIO], bytes] | None = None,
) -> np.ndarray:
    """Return the (m, 3) int64 array that `make` derives from a file, as a memory map of FILE.kind.

    It is made, and written, if it is not there, is damaged, or belongs to another content. Where it
    can be written nowhere, return it as it was made. Raise OSError if there is no such file.

    read: returns what the array depends on, of the open file; by default it is all.
    """
    places = cache_places(file, kind)
    with open_regular(file) as opened, locked(opened) as is_alone:
        stamp = file_stamp(opened, read or read_sample)
        found = read_cached(places, stamp)
        if found is not None:
            return found

        made = make()
        content = to_npy(made, stamp)
        for place in places:
            try:
                if is_alone:
                    remove_temporaries(place)
                write_file(place, content)
            except OSError:
                continue  # read-only or full
            return read_cached([place], stamp)
    return made


@contextlib.contextmanager
def locked(file: BinaryIO) -> Iterator[bool]:
    """Hold a lock on an open file, and yield whether there is one.

    Ranks start together: one makes the array while the others wait, and then find it. Where there
    are no locks, each makes it. They are equal, and the last one stays.
    """
    has_lock = fcntl is not None
    if has_lock:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            has_lock = False  # some network file systems have none
    yield has_lock  # closing the file releases it


def file_stamp(file: BinaryIO, read: Callable[[BinaryIO], bytes]) -> list[int]:
    """Return three numbers that change with a file: its size, its time and a hash of what is read.

    So another file of the same size and time is seen.
    """
    stat = os.fstat(file.fileno())
    digest = hashlib.sha256(VERSION + read(file))

    # Seven bytes of the hash, as they fit into a signed integer of eight.
    return [stat.st_size, stat.st_mtime_ns, int.from_bytes(digest.digest()[:7], "little")]


def read_sample(file: BinaryIO) -> bytes:
    """Return all of a small file, and evenly spaced pieces of a large one."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    if size < SMALL:
        return file.read()

    pieces = []
    last = max(0, size - PIECE)
    for i in range(PIECES):
        file.seek(last * i // (PIECES - 1))
        pieces.append(file.read(PIECE))
    return b"".join(pieces)


def cache_places(file: Path, kind: str) -> list[Path]:
    """Return where an array of this file may be, the first choice first."""
    places = [Path(f"{file}.{kind}")]
    try:
        cache = cache_folder()
    except RuntimeError:
        return places  # this user has no home

    # Files of the same name in other folders must not meet in the cache.
    path_hash = hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:16]
    places.append(cache / f"{file.name}-{path_hash}.{kind}")
    return places


def cache_folder() -> Path:
    """Return the folder for what is kept and has no place of its own.

    Raise RuntimeError if this user has no home.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "barellava"


def to_npy(array: np.ndarray, stamp: list[int]) -> bytes:
    """Return the content of a .npy file: the stamp, a check sum, then the array.

    It is stored column by column, so that reading one column leaves the others on the disk.
    """
    array = np.asfortranarray(array, np.int64)
    check = [check_sum(array), 0, 0]
    stamped = np.concatenate([np.array([stamp, check]), array])
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(stamped))
    return buffer.getvalue()


def check_sum(array: np.ndarray) -> int:
    """Return the CRC-32 of an array, column by column. It reads a gigabyte in a second."""
    check = 0
    for column in range(array.shape[1]):
        check = zlib.crc32(np.ascontiguousarray(array[:, column]), check)
    return check


def read_cached(places: list[Path], stamp: list[int]) -> np.ndarray | None:
    """Return a memory map of the first whole array with this stamp, without it; None if none."""
    for place in places:
        try:
            open_regular(place).close()  # numpy would wait for a FIFO
            stamped = np.lib.format.open_memmap(place, mode="r")
            if stamped.dtype != np.int64 or stamped.ndim != 2 or stamped.shape[1] != 3:
                continue
            if len(stamped) < 2 or stamped[0].tolist() != stamp:
                continue
            if stamped[1, 0] == check_sum(stamped[2:]):
                return stamped[2:]
        except Exception:
            continue  # there is no file, or it is no array: numpy raises nearly anything then
    return None
