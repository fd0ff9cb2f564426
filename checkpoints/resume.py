"""Checkpoints to resume from: no run is lost, whatever kills it.

    claimed = lock(output)                               # no second run in this folder
    path = pick(output / "checkpoints")                  # the newest whole checkpoint, or None
    tensors, state = read(path)
    save(output / "checkpoints", keep, tensors, state)   # while training goes on
    wait()                                               # before the process ends

seal.py says what a checkpoint looks like on the disk and in which order it is written. Read it
first. What follows from that order:

    killed while writing          a hidden folder is left; `pick` removes it, takes the one before
    killed while it is sealed     the seal ends without the training; `pick` waits for it
    the seal is killed, too       a hidden folder is left, as above
    power cut                     a checkpoint was flushed to the disk before it got its name
    file cut or bit flipped       size or hash is wrong; `pick` sets it aside, takes the one before
    disk full                     `save` raises, or the next one; older checkpoints stay
    a second run in the folder    `lock` refuses it

Rank 0 calls all of this but `read`. Tensors are gathered, not sharded: one file that any number of
ranks can read. It takes 12 bytes per trained parameter in rank 0's memory; models here have at most
a few billion of them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoints import seal
from checkpoints.files import writing
from checkpoints.seal import MANIFEST, TENSORS, alone, listed, manifest, verify
from config import UserError

# ------------------------------------------------------------------------------- the output folder


def lock(folder: Path):
    """Claim an output folder until the returned file is closed.

    Raises UserError if another process has it. The kernel releases it when the process ends,
    however that ends. This is a record lock and not flock: data workers inherit a flock, and they
    outlive a killed run by seconds.
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

        # For the message of the one that comes second.
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()

    # The lock lasts as long as this file is open.
    return file


def need_room(folder: Path, size: int, what: str):
    """Raise UserError unless the disk has `size` bytes left for `what`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        free_gb = free / 1e9
        size_gb = size / 1e9
        problem = f"{free_gb:.3f} GB free, {what} takes {size_gb:.3f} GB"
        raise UserError(folder, problem, "make room, lower train.keep, or set train.output")


# ------------------------------------------------------------------------------------------ saving


@dataclass
class Sealing:
    """The seal that is under way: its process, and the folder of the run's checkpoints."""

    process: subprocess.Popen
    folder: Path


_sealing: Sealing | None = None  # one at a time: `save` and `pick` wait for the one before


def save(folder: Path, keep: int, tensors: dict[str, Tensor], state: dict, keep_best: str = ""):
    """Write a checkpoint and start its seal, which ends beside the training.

    tensors: on the CPU. state: JSON, with `stage` and `step`. Afterwards the newest `keep` are left
    and, if `keep_best` names a stage, the best of it. Raises UserError if this one cannot be
    written, or the one before could not be sealed.
    """
    global _sealing
    wait()

    size = sum(tensor.nbytes for tensor in tensors.values())
    need_room(folder.parent, size, "a checkpoint")

    name = f"{state['stage']:02d}-{state['step']:08d}"
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    with writing(folder):
        try:
            temporary.mkdir(parents=True)
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, temporary / TENSORS)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

        # The rest goes on beside the training: seal.py explains the arguments.
        arguments = [temporary, name, str(keep), keep_best, json.dumps(state)]
        command = [sys.executable, seal.__file__, *arguments]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        _sealing = Sealing(process, folder)


def wait():
    """Wait until the last checkpoint is sealed. Raises UserError if that failed."""
    global _sealing
    if _sealing is None:
        return

    # Forgotten before anything is raised, so that the next checkpoint may be tried.
    last = _sealing
    _sealing = None

    _, said = last.process.communicate()
    code = last.process.returncode
    if code:
        with writing(last.folder):
            raise OSError(said.strip() or f"seal.py ended with {code}")


# ---------------------------------------------------------------------------------------- resuming


def pick(folder: Path, explicit: str = "") -> Path | None:
    """Return the checkpoint to go on from, or None: the newest whole one, or only `explicit`.

    Checkpoints that are newer than it are set aside, and the reason is printed: the run will write
    others of these names. Raises UserError if `explicit` is damaged; nothing is set aside then.
    """
    wait()
    _remove_leftovers(folder)
    if explicit:
        return _pick_explicit(folder, Path(explicit))

    # From the newest back to the first that is whole.
    for path in reversed(listed(folder)):
        try:
            verify(path)
        except (OSError, ValueError) as e:
            _set_aside(path, str(e))
        else:
            return path
    return None


def _pick_explicit(folder: Path, chosen: Path) -> Path:
    """Return `chosen` if it is whole, and set aside the checkpoints of this run that are newer."""
    try:
        verify(chosen)
    except (OSError, ValueError) as e:
        fix = "name a whole checkpoint, or leave train.resume empty"
        raise UserError(f"train.resume={chosen}", e, fix) from None

    # It may be of this run, or of another one: then all of this run's are passed over.
    for path in reversed(listed(folder)):
        if path.resolve() == chosen.resolve():
            break
        _set_aside(path, "train.resume names another one")
    return chosen


def _remove_leftovers(folder: Path):
    """Remove what a killed run had begun to write, once a seal that still goes on has ended."""
    if folder.exists():
        with alone(folder):
            for temporary in folder.glob(".*.tmp"):
                shutil.rmtree(temporary, ignore_errors=True)


def _set_aside(path: Path, why: str):
    """Hide a checkpoint, so that it never counts as one again. Its files stay to be looked at."""
    print(f"passing over {path}: {why}", flush=True)

    # An older one that was set aside under this name gives way.
    aside = path.with_name(f".{path.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Return tensors and state of a verified checkpoint; every rank calls this.

    The tensors are mapped into memory: only the pages that are used are read. Raises UserError on a
    node that does not see the folder that rank 0 wrote.
    """
    if not (path / MANIFEST).exists():
        fix = "set train.output to a folder that all nodes share"
        raise UserError(path, "not to be seen on this node", fix)
    state = manifest(path)["state"]
    with safe_open(path / TENSORS, framework="pt") as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    return tensors, state
