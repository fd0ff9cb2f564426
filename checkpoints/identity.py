"""Which file it is, whatever its name and its date say: its size and a hash of its content.

    identity(Path("model.safetensors"))             # {"size": 988097824, "blake2b": "5f0c..."}
    identities(folder, ["*.safetensors"])           # {name in the folder: identity}
    changed_names(before, now)                      # what is not as it was

A run and an evaluation write down what they were made from, and compare it when they go on. Names
and dates do not tell: a model that is put in the place of another may well be the older one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from checkpoints.files import open_regular
from config import UserError

WHOLE = 2**26  # files up to this size, 64 MiB, are hashed to the last byte
BLOCK = 2**12  # of a larger one, blocks of 4 KiB
SPACING = 2**20  # whose beginnings are at most 1 MiB apart,
MOST_BLOCKS = 2**14  # unless that made more blocks than this: at most 64 MiB are read

# Where the files of a model lie: in its folder, or in those of its parts, as TinyLLaVA Factory's.
PLACES = (".", "language_model", "vision_tower", "connector")


def identity(path: Path | str, whole: bool = False) -> dict:
    """Return {"size": bytes, "blake2b": 32 hexadecimal digits} of a regular file.

    A file of up to 64 MiB is hashed whole. Of a larger one the hash is of evenly spaced blocks, the
    first and the last among them. So every tensor of more than 1 MiB is in the sample, and a model
    of which only the connector was trained has another identity.
    whole: hash every byte of a large file, too, which takes a second per gigabyte.

    Raises UserError for what is missing, cannot be read, or is no regular file.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            hashed = hashlib.blake2b(digest_size=16)
            for start, length in _blocks(size, whole):
                # Past the buffer, which would read twice as much.
                file.raw.seek(start)
                hashed.update(file.raw.read(length))
    except OSError as e:
        what = f"not a regular file, or it cannot be read ({e.strerror})"
        raise UserError(path, what, "restore it, and allow reading it") from None
    return {"size": size, "blake2b": hashed.hexdigest()}


def identities(folder: Path, patterns: Iterable[str]) -> dict[str, dict]:
    """Return {name in the folder: identity} of the files of a model that have such names.

    Raises UserError for one that cannot be read.
    """
    files = set()
    for place in PLACES:
        for pattern in patterns:
            files.update((folder / place).glob(pattern))
    return {file.relative_to(folder).as_posix(): identity(file) for file in sorted(files)}


def digest(content: bytes) -> str:
    """Return the hash of a content, as 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def changed_names(before: dict, now: dict) -> list[str]:
    """Return the names, sorted, under which two records do not have the same."""
    return [name for name in sorted(before | now) if before.get(name) != now.get(name)]


def _blocks(size: int, whole: bool = False) -> list[tuple[int, int]]:
    """Return (start, length) of what is hashed of a file of `size` bytes."""
    if whole or size <= WHOLE:
        return [(start, SPACING) for start in range(0, size, SPACING)]

    # Both ends are blocks: n blocks have n - 1 spaces between their beginnings.
    last = size - BLOCK
    spaces = min(-(-last // SPACING), MOST_BLOCKS - 1)
    return [(last * i // spaces, BLOCK) for i in range(spaces + 1)]
