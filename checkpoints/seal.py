"""What a checkpoint is, how it becomes whole, and how damage is found.

    OUTPUT/checkpoints/
        00-00000200/                    stage 0, after 200 steps
            tensors.safetensors         trained weights and the optimizer's moments
            manifest.json               written last: the run's state, the size and SHA-256 of each
                                        file, and the manifest's own SHA-256
        .00-00000400.1234.tmp/          one that process 1234 is still writing
        .00-00000300.aside/             one that a later start has passed over
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
child). It outlives a killed run by the seconds that it needs; the next start waits for it at
`.sealing`.

This file imports the standard library alone. So it starts at once, without torch, and an edit of
another file of the project cannot stop a run that is going on from saving.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

TENSORS = "tensors.safetensors"
MANIFEST = "manifest.json"

# ------------------------------------------------------------------------------------ the manifest


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def text(content: dict) -> str:
    """Return a manifest's text: the content as JSON, with its own SHA-256 as the last key.

    There is one such text for a content, so any other one is damaged.
    """
    own = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"sha256": own}, indent=1)


def manifest(path: Path) -> dict:
    """Return the manifest of a checkpoint. Raises OSError, or ValueError if it is damaged."""
    damaged = ValueError(f"{MANIFEST} is damaged")
    try:
        found = (path / MANIFEST).read_bytes().decode()
        content = json.loads(found)
    except ValueError:
        raise damaged from None
    if not isinstance(content, dict):
        raise damaged

    rest = {key: value for key, value in content.items() if key != "sha256"}
    if text(rest) != found:
        raise damaged
    return content


def verify(path: Path) -> dict:
    """Return the state of a checkpoint of which every byte is as it was written.

    Raises OSError or ValueError for any other one.
    """
    content = manifest(path)
    for name, (size, sha256) in content["files"].items():
        found = (path / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes, not {size}")
        if digest(path / name) != sha256:
            raise ValueError(f"{name} has changed since it was written")
    return content["state"]


# ------------------------------------------------------------------------ the checkpoints of a run


def listed(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first. Hidden ones are unfinished or set aside."""
    return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def best(folder: Path, stage: str) -> Path | None:
    """Return the checkpoint of a stage with the lowest validation loss; None if none has one.

    Of equal ones it is the oldest.
    """
    lowest = None
    chosen = None
    for path in listed(folder):
        state = manifest(path)["state"]
        loss = state.get("validation")
        if state.get("trained") != stage or loss is None:
            continue
        if chosen is None or loss < lowest:
            lowest = loss
            chosen = path
    return chosen


def prune(folder: Path, keep: int, stage: str = ""):
    """Remove all checkpoints but the newest `keep` and, if a stage is named, its best."""
    kept = set(listed(folder)[-keep:])
    if stage:
        kept.add(best(folder, stage))
    for path in listed(folder):
        if path not in kept:
            shutil.rmtree(path)


# ------------------------------------------------------------------------------------- sealing one


def flush(path: Path):
    """Wait until a file, or a folder's list of files, would survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def alone(folder: Path):
    """Wait for a seal that is under way. No other one begins until the returned file is closed."""
    file = open(folder / ".sealing", "a")
    fcntl.lockf(file, fcntl.LOCK_EX)
    return file


def seal(temporary: Path, name: str, state: dict):
    """Make the folder `temporary`, which holds the tensors, the checkpoint `name` beside it."""
    folder = temporary.parent
    files = sorted(temporary.iterdir())

    # What the manifest will vouch for must be on the disk before it.
    for file in files:
        flush(file)
    sizes_and_hashes = {file.name: [file.stat().st_size, digest(file)] for file in files}

    content = {"state": state, "files": sizes_and_hashes}
    (temporary / MANIFEST).write_text(text(content))
    flush(temporary / MANIFEST)
    flush(temporary)

    # A rename happens or it does not. If there is a checkpoint of that name, this one takes its
    # place.
    shutil.rmtree(folder / name, ignore_errors=True)
    os.rename(temporary, folder / name)
    flush(folder)


def main(temporary: str, name: str, keep: str, stage: str, state: str):
    """Seal a checkpoint and prune the others, or remove it and exit with the reason on stderr."""
    where = Path(temporary)
    try:
        with alone(where.parent):
            seal(where, name, json.loads(state))
            prune(where.parent, int(keep), stage)
    except BaseException as e:
        shutil.rmtree(where, ignore_errors=True)
        sys.exit(getattr(e, "strerror", None) or repr(e))


if __name__ == "__main__":
    main(*sys.argv[1:])
