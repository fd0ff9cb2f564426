"""The part of a checkpoint that needs no torch: what makes it whole, and what finds that it is not.

A checkpoint is a folder STAGE-STEP with `tensors.safetensors` and, written last, `manifest.json`: the state of the run
as JSON, size and SHA-256 of every file, and the manifest's own SHA-256. The folder gets its name by one rename, so it
is whole or it is not there.

    python checkpoints/seal.py TEMPORARY NAME KEEP STAGE STATE      # what resume.save starts beside the training

flushes the files of TEMPORARY to the disk, hashes them, and gives the folder its NAME; then it removes all checkpoints
but the newest KEEP and, if STAGE is not empty, the best one of that stage. A process and not a thread: a data worker
that is forked while a thread ends hangs for good (CPython 3.11 and older leave the interpreter's own lock taken in the
child). It outlives a killed run by the seconds that it needs; the next start waits for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

TENSORS, MANIFEST = "tensors.safetensors", "manifest.json"


def digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def text(content: dict) -> str:
    """JSON with its own SHA-256 as the last key: the one text that holds this content."""
    own = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"sha256": own}, indent=1)


def manifest(path: Path) -> dict:
    """The manifest of a checkpoint. Raises OSError, or ValueError where it is not as it was written."""
    try:
        found = (path / MANIFEST).read_bytes().decode()
        content = json.loads(found)
        if text({k: v for k, v in content.items() if k != "sha256"}) == found:
            return content
    except (ValueError, AttributeError):  # not JSON, or JSON but no table
        pass
    raise ValueError(f"{MANIFEST} is damaged")


def verify(path: Path) -> dict:
    """The state of a checkpoint of which every byte is as it was written. Raises OSError or ValueError."""
    content = manifest(path)
    for name, (size, sha) in content["files"].items():
        if (found := (path / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found} bytes, not {size}")
        if digest(path / name) != sha:
            raise ValueError(f"{name} has changed since it was written")
    return content["state"]


def listed(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; hidden ones are half-written or set aside."""
    return sorted(p for p in folder.glob("*") if not p.name.startswith("."))


def best(folder: Path, stage: str) -> Path | None:
    """The checkpoint of a stage with the lowest validation loss; None if none has one."""
    states = {path: manifest(path)["state"] for path in listed(folder)}
    scored = [
        p
        for p, s in states.items()
        if s.get("trained") == stage and s.get("validation") is not None
    ]
    return min(scored, key=lambda p: states[p]["validation"], default=None)


def prune(folder: Path, keep: int, stage: str = ""):
    """Remove all but the newest `keep` and, if a stage is named, its best."""
    stays = {*listed(folder)[-keep:], stage and best(folder, stage)}
    for path in listed(folder):
        if path not in stays:
            shutil.rmtree(path)


def flush(path: Path):
    """Wait until a file, or what a folder says of its files, would survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def alone(folder: Path):
    """Waits for a seal that is under way; no other begins until the returned file is closed."""
    file = open(folder / ".sealing", "a")
    fcntl.lockf(file, fcntl.LOCK_EX)
    return file


def seal(temporary: Path, name: str, state: dict):
    """Make `temporary`, which holds the tensors, the checkpoint `name` beside it."""
    folder, files = temporary.parent, sorted(temporary.iterdir())
    for file in files:
        flush(file)
    content = {"state": state, "files": {f.name: [f.stat().st_size, digest(f)] for f in files}}
    (temporary / MANIFEST).write_text(text(content))
    flush(temporary / MANIFEST)
    flush(temporary)
    shutil.rmtree(folder / name, ignore_errors=True)
    os.rename(temporary, folder / name)
    flush(folder)


def main(temporary: str, name: str, keep: str, stage: str, state: str):
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
