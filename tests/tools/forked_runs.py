"""Runs of train.main in forked children, for the long matrices: a second each, not ten.

`launch` starts one child per rank. What it calls first in each child breaks something or watches.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # every optimizer imports it: here once, not in each child

import command_line
import train
from training.ranks import last_word

torch.set_num_threads(1)
ports = iter(range(20000 + os.getpid() % 20000, 65536))  # one for each launch


def launch(
    recipe: str,
    out: Path,
    ranks: int = 1,
    arguments: tuple[str, ...] = (),
    before: Callable[[int], None] | None = None,
) -> list[int]:
    """Train in the folder `out` and return the exit codes of the ranks; `before` gets the rank.

    What rank N says goes to the file out.N.txt.
    """
    port = next(ports)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue

        # A collection here need not look through all that the tests have made. It would copy their
        # memory page by page.
        gc.freeze()

        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        log = os.open(said_file(out, rank), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)

        # Under pytest the two names stand for other files.
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        if before is not None:
            before(rank)
        sys.argv = ["train.py", recipe, f"train.output={out}", "train.workers=0", *arguments]
        with last_word():
            command_line.cli(train.main, train.__doc__, fields_help=True)
        os._exit(0)

    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def said_file(out: Path, rank: int = 0) -> str:
    """Return the name of the file that holds what a rank said."""
    return f"{out}.{rank}.txt"


def said(out: Path) -> str:
    """Return what the first rank said."""
    return Path(said_file(out)).read_text()


def losses(out: Path) -> list[float]:
    """Return the loss of each step in the log of a run."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["event"] == "step"]


def largest_difference(a: list[float], b: list[float]) -> float:
    """Return the largest relative difference of two equally long lists of losses."""
    return max(abs(x - y) / y for x, y in zip(a, b, strict=True))
