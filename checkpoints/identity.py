"""Which file it is, whatever its name and its date say: its size and a hash of its content.

    identity(Path("model.safetensors"))     # {"size": 988097824, "blake2b": "5f0c..."}

A run and an evaluation write down what they were made from, and compare it when they go on. Names
and dates do not tell: a model that is put in the place of another may well be the older one.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from config import UserError

WHOLE = 2**26  # files up to this size, 64 MiB, are hashed to the last byte
BLOCK = 2**12  # of a larger one, blocks of 4 KiB
SPACING = 2**20  # whose beginnings are at most 1 MiB apart,
MOST_BLOCKS = 2**14  # unless that made more blocks than this: at most 64 MiB are read


def identity(path: Path | str, whole: bool = False) -> dict:
    """Return {"size": bytes, "blake2b": 32 hexadecimal digits} of a regular file.

    A file of up to 64 MiB is hashed whole. Of a larger one the hash is of evenly spaced blocks of
    4 KiB, the first and the last among them, whose beginnings lie at most 1 MiB apart (more than
    that above 16 GiB). So every tensor of more than 1 MiB is in the sample, and a model of which
    only the connector was trained has another identity. At most 64 MiB are read.
    whole: hash every byte of a large file, too, which takes a second per gigabyte.

    Raises UserError for what is missing, cannot be read, or is no regular file. A FIFO or a device
    is not read.
    """
    try:
        # A FIFO without a writer blocks whoever opens it, but not with this flag.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(path, "not a regular file", "put the file itself there")
            digest = hashlib.blake2b(digest_size=16)
            for start, length in _blocks(status.st_size, whole):
                digest.update(os.pread(fd, length, start))
        finally:
            os.close(fd)
    except UserError:
        raise
    except (OSError, ValueError) as e:  # ValueError: a name with a zero byte
        what = f"cannot be read ({getattr(e, 'strerror', None) or e})"
        raise UserError(path, what, "restore it, and allow reading it") from None
    return {"size": status.st_size, "blake2b": digest.hexdigest()}


def _blocks(size: int, whole: bool = False) -> list[tuple[int, int]]:
    """Return (start, length) of what is hashed of a file of `size` bytes."""
    if whole or size <= WHOLE:
        return [(start, SPACING) for start in range(0, size, SPACING)]

    # Both ends are blocks: n blocks have n - 1 spaces between their beginnings.
    last = size - BLOCK
    spaces = min(-(-last // SPACING), MOST_BLOCKS - 1)
    return [(last * i // spaces, BLOCK) for i in range(spaces + 1)]
