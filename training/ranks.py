"""The processes of a run: which one this is, how they talk to each other, and how they end.

    ranks = Ranks.join("auto")                  # torchrun's process group, or this process alone
    tokens, images = ranks.totals([tokens, images])
    newest = ranks.broadcast(newest)            # rank 0's value, on every rank

torchrun starts the ranks and numbers them in the environment (RANK, WORLD_SIZE, LOCAL_RANK). A
plain `python train.py` is one rank. parallel.py says how a model is spread over them.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from config import UserError

# torchrun's key-value store. The launcher holds it, so it is still there when a rank has failed.
_store: dist.Store | None = None


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them. All ranks must call each method together."""

    rank: int  # the number of this process: 0 to size - 1
    size: int  # how many there are
    device: torch.device  # of this process

    @classmethod
    def join(cls, device: str) -> Ranks:
        """Join torchrun's process group. device: auto, cuda or cpu.

        GPUs exchange gradients by NCCL. Plain numbers travel by gloo even then, because those are
        on the CPU and need not wait for what the GPU has queued.

        Raises UserError if this process has no GPU of its own.
        """
        rank = int(os.environ.get("RANK", 0))
        size = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))

        if device == "auto":
            device = "cpu"
            if torch.cuda.is_available():
                device = "cuda"

        # One GPU for each process of a machine.
        if device == "cuda":
            if local_rank >= torch.cuda.device_count():
                what = f"no GPU {local_rank} on this machine"
                raise UserError("train.device", what, "lower --nproc-per-node, or device=cpu")
            torch.cuda.set_device(local_rank)
            ranks = cls(rank, size, torch.device("cuda", local_rank))
        else:
            ranks = cls(rank, size, torch.device(device))

        if size > 1 and not dist.is_initialized():
            ranks._start_group()
        return ranks

    def _start_group(self):
        """Start torch.distributed, and keep its store for `last_word`."""
        global _store
        _store, _, _ = next(dist.rendezvous("env://"))

        backend = "gloo"
        device_id = None
        if self.device.type == "cuda":
            backend = "cpu:gloo,cuda:nccl"
            device_id = self.device
        dist.init_process_group(
            backend,
            store=_store,
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(minutes=30),
            device_id=device_id,
        )

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that prints, logs and saves."""
        return self.rank == 0

    @property
    def size_here(self) -> int:
        """Return how many of the processes are on this machine, as torchrun says."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    def totals(self, values: list[float]) -> list[float]:
        """Return the sum of each value over all ranks, in float64."""
        if self.size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def total(self, value: float) -> float:
        """Return the sum of one value over all ranks."""
        return self.totals([value])[0]

    def barrier(self):
        """Wait until every rank has come here."""
        self.total(0.0)

    def broadcast(self, value):
        """Return rank 0's value on every rank. What the others pass is ignored."""
        if self.size == 1:
            return value

        # torch replaces what is in the list.
        box = [value]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def collect(self, values: list) -> list:
        """Return the values of all ranks in one list, rank 0's first."""
        if self.size == 1:
            return values
        lists: list = [None] * self.size
        dist.all_gather_object(lists, values)
        together = []
        for each in lists:
            together += each
        return together


def print0(*text, **kwargs):
    """Print on rank 0 only. Needs no Ranks, so that any file can say something."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*text, **kwargs, flush=True)


# -------------------------------------------------------------------------------------- how it ends


@contextlib.contextmanager
def last_word():
    """Leave the process group at the end; of ranks that fail, let only the first print its error.

    When one rank fails, the others fail a moment later because it no longer answers, each with a
    long traceback about its network connection. Those would bury the one line that matters.

    A rank that failed leaves at once, by os._exit: a normal exit would wait for the process group
    and for the loader's workers, which wait for ranks that are gone. torchrun then ends the other
    ranks, and its own summary quotes the line that was written to TORCHELASTIC_ERROR_FILE. A user's
    mistake is then said once more, below that summary (command_line.cli).
    """
    try:
        yield
        _leave_group()
    except BaseException as e:
        # sys.exit(0), after --help or at the end of a run.
        exits_normally = isinstance(e, SystemExit) and not e.code
        if exits_normally:
            _leave_group()
            return

        # command_line.cli chose another code than 1: it was stopped, or nobody reads what it says.
        if isinstance(e, SystemExit) and isinstance(e.code, int):
            os._exit(e.code)
        if _failed_first():
            _say(e)
        os._exit(1)


def _leave_group():
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _failed_first() -> bool:
    """Return whether this rank is the one to report its error."""
    # Before there is a store, all ranks find the same mistake in the recipe: rank 0 says it.
    if _store is None:
        return int(os.environ.get("RANK", 0)) == 0

    # The store counts the ranks that have failed.
    try:
        return _store.add("failed", 1) == 1
    except Exception:  # the store's host is gone, so nobody knows who was first: every rank speaks
        return True


def _say(e: BaseException):
    """Print the line that command_line.cli made of a user's mistake, or the traceback."""
    if isinstance(e, SystemExit):
        text = str(e)
    else:
        text = traceback.format_exc().strip()

    # os._exit flushes nothing, so both streams are flushed here.
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)

    # torchrun names a file for the message of its summary.
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        with open(error_file, "w") as f:
            json.dump({"message": text.splitlines()[-1]}, f)
