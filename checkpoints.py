"""Checkpoints that survive: a run killed at any moment, a cut file, a flipped bit, a full disk, a second run.

A checkpoint is a folder STAGE-STEP with `tensors.safetensors` and, written last, `manifest.json`: the state of the run
as JSON, size and SHA-256 of every file, and the manifest's own SHA-256. The folder gets its name by one rename, so it
is whole or it is not there. Tensors are gathered, not sharded: one file that any number of ranks reads, and that holds
no more than rank 0's memory does (12 bytes per trained parameter); models here have at most a few billion of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import weights
from config import UserError
from parallel import print0

TENSORS, MANIFEST = "tensors.safetensors", "manifest.json"


# ------------------------------------------------------------------------------------------ the output folder


@contextlib.contextmanager
def writing(path: Path):
    """What cannot be written (full disk, read-only folder) ends the run with one line, not with a traceback."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # OSError, or what safetensors makes of one
        what = f"cannot be written: {getattr(e, 'strerror', None) or e}"
        raise UserError(path, what, "make room or allow writing there, or set train.output") from None


def lock(folder: Path):
    """Claim an output folder until the returned file is closed. Raises UserError if another process has claimed it.

    The kernel lets go of it when the process ends, however that ends. A record lock, not flock: that one would pass to
    the loader's workers, which outlive a killed run by seconds.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            what = f"another run is training here ({file.read().strip()})"
            raise UserError(folder, what, "wait for it, or set train.output") from None
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
    return file


def need_room(folder: Path, size: int, what: str):
    """Raise UserError unless the disk has `size` bytes left for `what`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(folder, f"{free / 1e9:.3f} GB free, {what} takes {size / 1e9:.3f} GB",
                        "make room, lower train.keep, or set train.output")  # fmt: skip


# ------------------------------------------------------------------------------------------------ one of them


def _digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _seal(content: dict) -> str:
    """JSON with its own SHA-256 as the last key: the one text that holds this content."""
    own = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"sha256": own}, indent=1)


def _manifest(path: Path) -> dict:
    try:
        text = (path / MANIFEST).read_bytes().decode()
        content = json.loads(text)
        if _seal({k: v for k, v in content.items() if k != "sha256"}) == text:
            return content
    except (ValueError, AttributeError):  # not JSON, or JSON but no table
        pass
    raise ValueError(f"{MANIFEST} is damaged")


def verify(path: Path) -> dict:
    """The state of a checkpoint of which every byte is as it was written. Raises OSError or ValueError."""
    manifest = _manifest(path)
    for name, (size, digest) in manifest["files"].items():
        if (found := (path / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found} bytes, not {size}")
        if _digest(path / name) != digest:
            raise ValueError(f"{name} has changed since it was written")
    return manifest["state"]


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors (mapped into memory: the pages that are used get read) and state of a verified checkpoint.

    Raises UserError where it is not there: on a node that does not see the folder that rank 0 wrote.
    """
    if not (path / MANIFEST).exists():
        raise UserError(path, "not to be seen on this node", "set train.output to a folder that all nodes share")
    with safe_open(path / TENSORS, framework="pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, _manifest(path)["state"]  # noqa: SIM118


def write(folder: Path, name: str, tensors: dict[str, Tensor], state: dict):
    """Write folder/name whole, or leave nothing. Tensors are on the CPU."""
    temporary = folder / f".{name}.tmp"
    with writing(folder):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            file = temporary / TENSORS
            weights.write_file(file, lambda path: save_file({k: v.contiguous() for k, v in tensors.items()}, path))
            files = {file.name: [file.stat().st_size, _digest(file)]}
            weights.write_file(temporary / MANIFEST, _seal({"state": state, "files": files}))
            shutil.rmtree(folder / name, ignore_errors=True)
            os.rename(temporary, folder / name)
            weights.fsync_folder(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


# -------------------------------------------------------------------------------------------- many of them


def listed(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; hidden ones are half-written or set aside."""
    return sorted(p for p in folder.glob("*") if not p.name.startswith("."))


def pick(folder: Path, explicit: str = "") -> Path | None:
    """The checkpoint to go on from: the newest whole one, or `explicit` and no other. None = there is none.

    Says which ones it passes over and why; they are hidden, so that none of them is ever counted as a checkpoint
    again. Raises UserError if `explicit` is damaged.
    """
    own, why = listed(folder), "train.resume names another one"
    if explicit:
        path = Path(explicit)
        try:
            verify(path)
        except (OSError, ValueError) as e:
            raise UserError(f"train.resume={path}", e, "name a whole checkpoint, or leave train.resume empty") from None
        older = [p for p in own if p.resolve() == path.resolve()]
        own = own[own.index(older[0]) + 1 :] if older else own
    for path in reversed(own):
        try:
            if not explicit:
                verify(path)
                return path
        except (OSError, ValueError) as e:
            why = e
        print0(f"passing over {path}: {why}")
        aside = folder / f".{path.name}.aside"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
    return Path(explicit) if explicit else None


def best(folder: Path, stage: str) -> Path | None:
    """The checkpoint of a stage with the lowest validation loss; None if none has one."""
    states = {path: _manifest(path)["state"] for path in listed(folder)}
    scored = [p for p, s in states.items() if s.get("trained") == stage and s.get("validation") is not None]
    return min(scored, key=lambda p: states[p]["validation"], default=None)


def prune(folder: Path, keep: int, stage: str = ""):
    """Remove all but the newest `keep` and, if a stage is named, its best."""
    stays = {*listed(folder)[-keep:], stage and best(folder, stage)}
    for path in listed(folder):
        if path not in stays:
            shutil.rmtree(path)


def save(folder: Path, keep: int, tensors: dict[str, Tensor], state: dict, keep_best: str = ""):
    """Write a checkpoint and remove those that are no longer kept. keep_best: the stage whose best one stays.

    Not in a thread beside the training: a data worker that is forked while such a thread ends hangs for good
    (CPython 3.11 and older leave the interpreter's own lock taken in the child).
    """
    name = f"{state['stage']:02d}-{state['step']:08d}"
    need_room(folder.parent, sum(t.nbytes for t in tensors.values()), "a checkpoint")
    write(folder, name, tensors, state)
    prune(folder, keep, keep_best)
