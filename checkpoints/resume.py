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
    somebody else's files there   they are not looked at, moved or removed, see seal.NAME
    a second run in the folder    `lock` refuses it

Rank 0 calls all of this but `read`. Tensors are gathered, not sharded: one file that any number of
ranks can read. It takes 12 bytes per trained parameter in rank 0's memory; models here have at most
a few billion of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from checkpoints import seal
from checkpoints.files import check_regular, read_json, writing
from checkpoints.seal import (
    ASIDE,
    MANIFEST,
    NAME,
    TEMPORARY,
    TENSORS,
    alone,
    listed,
    manifest,
    verify,
)
from config import UserError, printable

MADE_FROM = "made_from.json"

# ------------------------------------------------------------------------------- the output folder


def lock(folder: Path):
    """Claim an output folder until the returned file is closed.

    Raises UserError if another process has it. However a process ends, it then has it no more.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        check_regular(folder / ".lock")
        file = open(folder / ".lock", "a+", errors="replace")
        try:
            seal.lock(file, wait=False)
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
    with writing(folder):
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


def save(
    folder: Path,
    keep: int,
    tensors: dict[str, Tensor],
    state: dict,
    keep_best: str = "",
    origin: dict | None = None,
):
    """Write a checkpoint and start its seal, which ends beside the training.

    tensors: on the CPU. state: JSON, with `stage` and `step`. origin: JSON, what the run is made
    from. Afterwards the newest `keep` are left and, if `keep_best` names a stage, the best of it.
    Raises UserError if this one cannot be written, or the one before could not be sealed. If the
    folder of the run is gone, it is not made again: whoever removed it may want the run to end.
    """
    global _sealing
    wait()

    size = sum(tensor.nbytes for tensor in tensors.values())
    need_room(folder.parent, size, "a checkpoint")

    name = f"{state['stage']:02d}-{state['step']:08d}"
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    with writing(folder):
        try:
            folder.mkdir(exist_ok=True)
            temporary.mkdir()
            if origin is not None:
                (temporary / MADE_FROM).write_text(json.dumps(origin))
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, temporary / TENSORS)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

        # The rest goes on beside the training: seal.py explains the arguments.
        arguments = [temporary, name, str(keep), keep_best, json.dumps(state)]
        command = [sys.executable, seal.__file__, *arguments]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        _sealing = Sealing(process, folder)

        # It says a line when it holds its lock. If this run is killed from here on, the next start
        # waits for the seal, however soon it comes.
        process.stdout.readline()


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
    said = printable(said.strip())
    if code:
        with writing(last.folder):
            raise OSError(said or f"seal.py ended with {code}")
    if said:
        print(f"warning: {last.folder}: {said}", flush=True)


# ---------------------------------------------------------------------------------------- resuming


def pick(
    folder: Path, explicit: str = "", check: Callable[[Path | None], object] | None = None
) -> Path | None:
    """Return the checkpoint to go on from, or None: the newest whole one, or only `explicit`.

    Checkpoints that are newer than it are set aside, and the reason is printed: the run will write
    others of these names. check: it gets the one that was chosen, or None, and may raise UserError.
    Raises UserError if `explicit` is damaged. In both cases nothing is set aside.
    """
    wait()
    with writing(folder):
        _remove_leftovers(folder)
        if explicit:
            chosen = Path(explicit)
            passed = _newer_than(folder, chosen)
        else:
            chosen, passed = _newest(folder)

    if check is not None:
        check(chosen)
    with writing(folder):
        for path, why in passed:
            _set_aside(path, why)
    return chosen


def _newest(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest whole checkpoint, or None; and the newer ones, each with what is wrong."""
    damaged = []
    for path in reversed(listed(folder)):
        try:
            verify(path)
        except (OSError, ValueError) as e:
            damaged.append((path, str(e)))
        else:
            return path, damaged
    return None, damaged


def _newer_than(folder: Path, chosen: Path) -> list[tuple[Path, str]]:
    """Return the checkpoints of this run that are newer than `chosen`, each with why it goes.

    Raises UserError unless `chosen` is whole.
    """
    try:
        verify(chosen)
    except (OSError, ValueError) as e:
        fix = "name a whole checkpoint, or leave train.resume empty"
        raise UserError(f"train.resume={chosen}", e, fix) from None

    # It may be of this run, or of another one: then all of this run's are passed over.
    newer = []
    for path in reversed(listed(folder)):
        if path.resolve() == chosen.resolve():
            break
        newer.append((path, "train.resume names another one"))
    return newer


def _remove_leftovers(folder: Path):
    """Remove what a killed run had begun to write, once a seal that still goes on has ended."""
    if folder.exists():
        with alone(folder):
            for path in folder.iterdir():
                if TEMPORARY.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)


def discard(folder: Path):
    """Remove the checkpoints of a run that is finished, and nothing else."""
    if not folder.is_dir():
        return
    own = []
    others = []
    for path in folder.iterdir():
        is_own = any(name.fullmatch(path.name) for name in (NAME, TEMPORARY, ASIDE))
        if is_own:
            own.append(path)
        elif path.name != ".sealing":
            others.append(path)

    if not others:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in own:
        shutil.rmtree(path, ignore_errors=True)


def _set_aside(path: Path, why: str):
    """Hide a checkpoint, so that it never counts as one again. Its files stay to be looked at."""
    print(f"passing over {path}: {printable(why)}", flush=True)

    # An older one that was set aside under this name gives way.
    aside = path.with_name(f".{path.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Return tensors and state of a verified checkpoint; every rank calls this.

    The tensors are mapped into memory: only the pages that are used are read. Raises UserError on a
    node that does not see the folder that rank 0 wrote, and for a file without tensors.
    """
    if not (path / MANIFEST).exists():
        fix = "set train.output to a folder that all nodes share"
        raise UserError(path, "not to be seen on this node", fix)
    state = manifest(path)["state"]
    try:
        with safe_open(path / TENSORS, framework="pt") as file:
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except Exception as e:  # safetensors has a type of its own
        what = f"not the tensors of a run ({e})"
        raise UserError(path / TENSORS, what, "remove this checkpoint") from None
    return tensors, state


def made_from(path: Path) -> dict:
    """Return what the run of a verified checkpoint was made from; {} of an older version's."""
    return read_json(path / MADE_FROM, optional=True)
