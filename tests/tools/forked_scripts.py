"""Scripts of the laboratory in forks of this process, in place of new Pythons: a second, not ten.

`launch` stands for laboratory.cells.launch. `train` and `evaluate` are imported here already.
"""

import gc
import os
import sys
from typing import BinaryIO

import torch
import torch._dynamo  # every optimizer imports it: here once, not in each child

import command_line
import evaluate
import train
from training.ranks import last_word

MAINS = {"train.py": train.main, "evaluate.py": evaluate.main}


class Forked:
    """A script in a fork, with what is used of subprocess.Popen."""

    def __init__(self, pid: int):
        self.pid = pid

    def wait(self) -> int:
        """Return the exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def terminate(self):
        os.kill(self.pid, 15)


def launch(command: list[str], said: BinaryIO, variables: dict[str, str]) -> Forked:
    """Start train.py or evaluate.py; what it says goes to a file."""
    pid = os.fork()
    if pid:
        return Forked(pid)

    # A collection here need not look through all that the tests have made.
    gc.freeze()
    torch.set_num_threads(1)
    os.environ.update(variables)
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    sys.argv = command
    code = 1
    try:
        with last_word():
            command_line.cli(MAINS[command[0]], command[0])
        code = 0
    except SystemExit as e:
        code = e.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    finally:
        sys.stderr.flush()
        os._exit(code or 0)
