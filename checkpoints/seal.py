"""What a checkpoint is, how it becomes whole, and how damage is found.

    OUTPUT/checkpoints/
        00-00000200/                    stage 0, after 200 steps
            tensors.safetensors         trained weights and the optimizer's moments
            made_from.json              what the run is made from (training/made_from.py)
            manifest.json               written last: the run's state, the size and SHA-256 of each
                                        file, and the manifest's own SHA-256
        .00-00000400.1234.tmp/          a checkpoint that process 1234 is still writing
        .00-00000300.aside/             a checkpoint that a later start has passed over
        .sealing                        locked while a checkpoint is sealed

A checkpoint is sealed in this order, so that at every moment its folder is whole or has no name:

    1. training writes the tensors to the hidden temporary folder           (resume.save)
    2. the tensors are flushed to the disk, and hashed                      (seal)
    3. the manifest is written and flushed, then the folder
    4. the folder gets its name by one rename, and that is flushed
    5. checkpoints that are no longer kept are removed                      (prune)

Steps 2 to 5 take seconds. They run in a process of their own, beside the training:

    python checkpoints/seal.py TEMPORARY NAME KEEP STAGE STATE

It keeps the newest KEEP and, if STAGE is not empty, the best of that stage. STATE is the run's
state as JSON. This is a process and not a thread because a data worker that is forked while a
thread ends hangs for good (CPython 3.11 and older leave a lock of the interpreter taken in the
child). The training goes on when this process has locked `.sealing` and says so. If the run is then
killed, this process still ends its work, and the next start waits for it at `.sealing`.

This file imports the standard library alone. So it starts at once, without torch, and an edit of
another file of the project cannot stop a run that is going on from saving.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
import time
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt  # what Windows has in its place
except ImportError:
    msvcrt = None

WINDOWS = os.name == "nt"

# With O_NONBLOCK, opening a FIFO does not wait. Windows has neither, but must be told of bytes.
NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

TENSORS = "tensors.safetensors"
MANIFEST = "manifest.json"

# Our names. Nothing else that lies beside the checkpoints counts, and nothing else is removed.
NAME = re.compile(r"\d{2,}-\d{8,}")  # STAGE-STEP
TEMPORARY = re.compile(r"\.\d{2,}-\d{8,}(\.\d+)?\.tmp")
ASIDE = re.compile(r"\.\d{2,}-\d{8,}\.aside")

# ------------------------------------------------------------------------------------ the manifest


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Return a file descriptor. Raises OSError, also for all that is no regular file.

    Opening a FIFO waits for a writer, and a device may never end. files.py has a like function.
    """
    fd = os.open(path, flags | NO_WAIT, 0o644)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return fd


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(open_regular(path), "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def text(content: dict) -> str:
    """Return a manifest's text: the content as JSON, with its own SHA-256 as the last key.

    A content has exactly one such text. So a manifest with any other text is damaged.
    """
    own = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"sha256": own}, indent=1)


def manifest(path: Path) -> dict:
    """Return the manifest of a checkpoint. Raises OSError, or ValueError if it is damaged."""
    damaged = ValueError(f"{MANIFEST} is damaged")
    with open(open_regular(path / MANIFEST), "rb") as f:
        found = f.read()
    try:
        content = json.loads(found.decode())
        if not isinstance(content, dict):
            raise damaged

        # Every byte counts, also those between the values: the text is made again and compared.
        rest = {key: value for key, value in content.items() if key != "sha256"}
        if text(rest) != found.decode():
            raise damaged
    except (ValueError, RecursionError):  # the second is what json says of deep nesting
        raise damaged from None

    # Whoever writes a text with a hash of its own may still write anything.
    if not describes_checkpoint(content):
        raise ValueError(f"{MANIFEST} does not describe a checkpoint")
    return content


def describes_checkpoint(content: dict) -> bool:
    """Say whether a manifest has the fields that `seal` and the run write, each of its kind."""
    state = content.get("state")
    files = content.get("files")
    if not isinstance(state, dict) or not isinstance(files, dict):
        return False

    # Where the run goes on. `type`, because True is an integer for isinstance.
    for key in ("stage", "step"):
        if type(state.get(key)) is not int or state[key] < 0:
            return False

    # What `best` compares.
    loss = state.get("validation")
    if loss is not None and (type(loss) is not float or not math.isfinite(loss)):
        return False

    # The files: the tensors, and others of this folder.
    for name, value in files.items():
        if name in ("", ".", "..") or "/" in name or not isinstance(value, list):
            return False
        if [type(part) for part in value] != [int, str]:
            return False
    return TENSORS in files


def verify(path: Path) -> dict:
    """Return the state of a checkpoint of which every byte is as it was written.

    Raises OSError or ValueError for any other one.
    """
    content = manifest(path)
    for name, (size, sha256) in content["files"].items():
        file = path / name

        # The size first: a file that was cut off need not be read.
        found = file.stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes, not {size}")
        if digest(file) != sha256:
            raise ValueError(f"{name} has changed since it was written")
    return content["state"]


# ------------------------------------------------------------------------ the checkpoints of a run


def listed(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first. Hidden ones are unfinished or set aside."""
    # The names begin with stage and step, so their order is that of time.
    found = []
    for path in folder.glob("*"):
        if NAME.fullmatch(path.name) and path.is_dir():
            found.append(path)
    return sorted(found)


def best(folder: Path, stage: str) -> Path | None:
    """Return the checkpoint of a stage with the lowest validation loss; None if none has one.

    Of equal ones it is the oldest. One without a readable manifest is passed over.
    """
    lowest = None
    chosen = None
    for path in listed(folder):
        try:
            state = manifest(path)["state"]
        except (OSError, ValueError):
            continue
        loss = state.get("validation")
        if state.get("trained") != stage or loss is None:
            continue

        if chosen is None or loss < lowest:
            lowest = loss
            chosen = path
    return chosen


def prune(folder: Path, keep: int, stage: str = ""):
    """Remove all checkpoints but the newest `keep` and, if a stage is named, its best."""
    found = listed(folder)
    kept = set(found[-keep:])
    if stage:
        kept.add(best(folder, stage))

    for path in found:
        if path not in kept:
            shutil.rmtree(path)


# ------------------------------------------------------------------------------------- sealing one


def flush(path: Path):
    """Wait until a file, or a folder's list of files, would survive a power cut."""
    # Windows flushes files that are open for writing, and no folders.
    flags = os.O_RDONLY
    if WINDOWS:
        if path.is_dir():
            return
        flags = os.O_RDWR
    fd = os.open(path, flags | NO_WAIT)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(file: IO, wait: bool):
    """Let no other process lock this file until it is closed, or this process ends.

    wait: until another one has closed it; otherwise raise BlockingIOError or PermissionError. This
    is a record lock and not flock: data workers inherit a flock, and they outlive a killed run by
    seconds. A system without such locks does without.
    """
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        return

    # Windows lets nobody else read the bytes that are locked: so it is one far behind the end.
    while msvcrt is not None:
        os.lseek(file.fileno(), 2**30, os.SEEK_SET)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            return
        except PermissionError:
            if not wait:
                raise
        time.sleep(0.1)


def alone(folder: Path):
    """Wait for a seal that is under way, and let no other one begin.

    That holds until the returned file is closed: use it in a `with`.
    """
    fd = open_regular(folder / ".sealing", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    file = open(fd, "a")
    lock(file, wait=True)
    return file


def seal(temporary: Path, name: str, state: dict):
    """Make the folder `temporary`, which holds the tensors, the checkpoint `name` beside it."""
    folder = temporary.parent

    # What the manifest will vouch for must be on the disk before it.
    files = {}
    for file in sorted(temporary.iterdir()):
        flush(file)
        files[file.name] = [file.stat().st_size, digest(file)]

    content = {"state": state, "files": files}
    file = temporary / MANIFEST
    file.write_text(text(content))
    flush(file)
    flush(temporary)

    # A rename happens or it does not. If there is a checkpoint of that name, this one takes its
    # place.
    shutil.rmtree(folder / name, ignore_errors=True)
    os.rename(temporary, folder / name)
    flush(folder)


def main(temporary: str, name: str, keep: str, stage: str, state: str):
    """Seal a checkpoint and prune the others, or remove it and exit with the reason on stderr.

    Where only the pruning fails, the reason is on stderr and the exit code is 0.

    The arguments are those of the command line, all of them text.
    """
    unsealed = Path(temporary)
    folder = unsealed.parent
    try:
        with alone(folder):
            # The run waits for this line. Nobody reads it if the run has been killed.
            with contextlib.suppress(BrokenPipeError):
                print("sealing", flush=True)
            seal(unsealed, name, json.loads(state))

            # The checkpoint is whole now. That an old one stays is no reason to stop a run.
            try:
                prune(folder, int(keep), stage)
            except OSError as e:
                print(f"an old checkpoint cannot be removed: {e}", file=sys.stderr)
    except BaseException as e:
        # The run prints what stands on stderr in a message of its own, so this is one line.
        shutil.rmtree(unsealed, ignore_errors=True)
        sys.exit(getattr(e, "strerror", None) or repr(e))


if __name__ == "__main__":
    main(*sys.argv[1:])
