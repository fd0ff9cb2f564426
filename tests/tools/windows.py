"""A system without fcntl, resource, poll and pidfd_open, as Windows; and msvcrt's locks for it."""

import fcntl
import os
import select
import sys

LK_NBLCK = 2


def locking(fd: int, mode: int, count: int):
    """Lock `count` bytes from the place in the file on. Raises PermissionError, as msvcrt does."""
    start = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, count, start)
    except BlockingIOError:
        raise PermissionError(13, "Permission denied") from None


def take_away():
    """Take away from this process what Windows lacks, before anything else is imported."""
    sys.modules["fcntl"] = None
    sys.modules["resource"] = None
    del select.poll, os.pidfd_open

    # Not in sys.modules: Python's own modules would take this for Windows.
    from checkpoints import seal

    seal.msvcrt = sys.modules[__name__]
