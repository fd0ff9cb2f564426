"""Programs from outside run in a child process that has limits: chat templates, tokenizers' rules.

    reply = bounded.ask({"job": "render", "source": source, ...})

A chat template is a program. It can loop for ever or ask for all memory, and Python cannot stop it
from inside; likewise the regular expressions of a tokenizer.json. Here such a program can only end
its own process, which `ask` says as an OverLimit. bounded_child.py is that process, and lists what
can be asked.

A process has one child, which starts with the first request and ends with its parent. A fork of
this process, such as a data worker, starts its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

# A rendering computes for milliseconds and needs megabytes; one that needs so much is a mistake.
SECONDS = 2
MEMORY = 2**30  # bytes of addresses
FACTOR = 64  # the characters that come of it, for each character of the request, and ...
SPARE = 2**20  # ... these for any


class OverLimit(Exception):
    """A request that needs more than the child has, in words that follow "it"."""


class Child:
    """The child of one process."""

    def __init__(self):
        self.owner = os.getpid()
        self.lock = threading.Lock()  # one request at a time: a server has many threads
        self.process = None

    def ask(self, request: dict) -> dict:
        """Return the reply to a request. Raise OverLimit."""
        line = json.dumps(request).encode() + b"\n"
        with self.lock:
            # What ends all processes of a job at once, as Ctrl-C does, also ends this one. It is
            # not the request's fault, so it gets a second child.
            for _ in range(2):
                reply = self._exchange(line)
                if reply:
                    break
        if not reply:
            raise OverLimit("ends its process")

        reply = json.loads(reply)
        if reply.get("over") == "memory":
            raise OverLimit(f"needs more than {MEMORY >> 30} GB of memory")
        if reply.get("over") == "output":
            raise OverLimit(f"makes more than {FACTOR} times as much text as it gets")
        return reply

    def _exchange(self, line: bytes) -> bytes:
        """Send a request and return the reply, empty if the child ended. Raise OverLimit."""
        if self.process is None:
            self.process = start()
        done = False
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
            done = reply.endswith(b"\n")
        except BrokenPipeError:
            reply = b""
        finally:
            # Also where Ctrl-C came between: the next request would get this one's reply.
            if not done:
                process, self.process = self.process, None
                process.kill()
                process.communicate()
        if done:
            return reply
        if process.returncode == -getattr(signal, "SIGPROF", 0):
            raise OverLimit(f"computes for more than {SECONDS} seconds")
        return b""


def start() -> subprocess.Popen:
    """Start a child."""
    limits = {
        "seconds": SECONDS,
        "memory": MEMORY,
        "factor": FACTOR,
        "spare": SPARE,
        "path": [path for path in sys.path if path],
    }
    file = Path(__file__).with_name("bounded_child.py")
    return subprocess.Popen(
        # -I and -S: neither settings of this environment nor a site's own code.
        [sys.executable, "-I", "-S", str(file), json.dumps(limits)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Each thread of a pool would take addresses from the limit.
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"},
    )


_child = Child()


def ask(request: dict) -> dict:
    """Return the reply of this process's child to a request. Raise OverLimit."""
    global _child
    if _child.owner != os.getpid():
        _child = Child()
    return _child.ask(request)
