"""Arrays that are derived from a file once and kept beside it: where its rows are, their lengths.

    cached_array(file, "index", make)   # FILE.index, or what `make` returns, written to FILE.index

Scanning a file of a million rows takes minutes. So the result is kept as FILE.index, a numpy array
that every rank and worker maps into memory: it costs a process next to nothing. Where the folder
is read-only, it is kept in ~/.cache/barellava.

An index is an (m, 3) int64 array. An entry of it, (start, end, number), stands for the bytes
file[start:end]:

    .json     an entry a row; number is the row's, from 0
    .jsonl    an entry a row; number is the line's, from 1
    .tar      an entry a member, sample by sample; number 0 is the row, 1, 2, ... are its media
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from checkpoints.files import remove_temporaries, write_file

# A JSON file of fewer bytes is scanned in half a second, so no index is left beside it.
SMALL = 1 << 25

# Raise it when the scans find something else in the same file: kept arrays are then made again.
VERSION = b"1"


def is_small(file: Path) -> bool:
    """Say whether a file is scanned faster than an index is worth keeping. Raise OSError."""
    return file.stat().st_size < SMALL


def cached_array(file: Path, kind: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the (m, 3) int64 array that `make` derives from a file, as a memory map of FILE.kind.

    It is made, and written, if it is not there or belongs to an older state of the file. Where
    it can be written nowhere, return it as it was made. Raise OSError if there is no such file.
    """
    stamp = file_stamp(file)
    places = cache_places(file, kind)
    with open(file, "rb") as lock:
        # Ranks start together: one makes the array while the others wait, and then find it.
        is_alone = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            is_alone = False  # no locks here: each makes it, they are equal, the last one stays

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
                return read_cached(places, stamp)
            except OSError:
                continue  # read-only or full
    return made


def file_stamp(file: Path) -> list[int]:
    """Return three numbers that change with a file: size, time, and a hash of its head and tail."""
    with open(file, "rb") as f:
        stat = os.fstat(f.fileno())
        head = f.read(4096)
        f.seek(max(0, stat.st_size - 4096))
        tail = f.read()

    # Seven bytes of the hash, as they fit into a signed integer of eight.
    digest = hashlib.sha256(VERSION + head + tail).digest()
    return [stat.st_size, stat.st_mtime_ns, int.from_bytes(digest[:7], "little")]


def cache_places(file: Path, kind: str) -> list[Path]:
    """Return where an array of this file may be, the first choice first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")

    # Files of the same name in other folders must not meet in the cache.
    path_hash = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]
    return [
        Path(f"{file}.{kind}"),
        cache / "barellava" / f"{file.name}-{path_hash}.{kind}",
    ]


def to_npy(array: np.ndarray, stamp: list[int]) -> bytes:
    """Return the content of a .npy file: the stamp as first row, then the array.

    It is stored column by column, so that reading one column leaves the others on the disk.
    """
    stamped = np.concatenate([np.array([stamp]), array])
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(stamped))
    return buffer.getvalue()


def read_cached(places: list[Path], stamp: list[int]) -> np.ndarray | None:
    """Return a memory map of the first array with this stamp, without the stamp; None if none."""
    for place in places:
        try:
            stamped = np.load(place, mmap_mode="r")
            if stamped[0].tolist() == stamp:
                return stamped[1:]
        except (OSError, ValueError, EOFError, IndexError):
            continue  # there is no file, or it is no array
    return None
