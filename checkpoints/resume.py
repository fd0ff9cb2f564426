"""Checkpoints that survive: a run killed at any moment, a cut file, a flipped bit, a full disk, a second run.

seal.py says what one is and makes it whole, in a process beside the training; here its tensors are written and read,
and it is decided which one to go on from. Tensors are gathered, not sharded: one file that any number of ranks reads,
and that holds no more than rank 0's memory does (12 bytes per trained parameter); models here have at most a few
billion of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoints import seal
from checkpoints.seal import MANIFEST, TENSORS, alone, listed, manifest, verify
from config import UserError
from training.ranks import print0

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
        raise UserError(
            path, what, "make room or allow writing there, or set train.output"
        ) from None


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


# ---------------------------------------------------------------------------------------------- written and read


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors (mapped into memory: the pages that are used get read) and state of a verified checkpoint.

    Raises UserError where it is not there: on a node that does not see the folder that rank 0 wrote.
    """
    if not (path / MANIFEST).exists():
        raise UserError(
            path, "not to be seen on this node", "set train.output to a folder that all nodes share"
        )
    with safe_open(path / TENSORS, framework="pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, manifest(path)["state"]  # noqa: SIM118


_sealing: subprocess.Popen | None = None


def save(folder: Path, keep: int, tensors: dict[str, Tensor], state: dict, keep_best: str = ""):
    """Write a checkpoint of tensors on the CPU; until `wait` a process flushes, hashes and names it, and removes those
    that are no longer kept. keep_best: the stage whose best one stays. Raises UserError if this one cannot be written,
    or the one before could not."""
    global _sealing
    wait()
    name = f"{state['stage']:02d}-{state['step']:08d}"
    need_room(folder.parent, sum(t.nbytes for t in tensors.values()), "a checkpoint")
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    with writing(folder):
        try:
            temporary.mkdir(parents=True)
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / TENSORS)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        command = [
            sys.executable,
            seal.__file__,
            temporary,
            name,
            str(keep),
            keep_best,
            json.dumps(state),
        ]
        _sealing = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait():
    """Until the last checkpoint is whole. Raises UserError if it could not be made so."""
    global _sealing
    if _sealing:
        process, _sealing = _sealing, None
        said = process.communicate()[1].strip()
        with writing(Path(process.args[2]).parent):
            if process.returncode:
                raise OSError(said or f"seal.py ended with {process.returncode}")


# -------------------------------------------------------------------------------------------- which to go on from


def pick(folder: Path, explicit: str = "") -> Path | None:
    """The checkpoint to go on from: the newest whole one, or `explicit` and no other. None = there is none.

    Says which ones it passes over and why; they are hidden, so that none of them is ever counted as a checkpoint
    again. Waits for a seal of the run before. Raises UserError if `explicit` is damaged.
    """
    wait()
    if folder.exists():
        with alone(folder):
            for left in folder.glob(".*.tmp"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
    own, why = listed(folder), "train.resume names another one"
    if explicit:
        path = Path(explicit)
        try:
            verify(path)
        except (OSError, ValueError) as e:
            raise UserError(
                f"train.resume={path}", e, "name a whole checkpoint, or leave train.resume empty"
            ) from None
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
