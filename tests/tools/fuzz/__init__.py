"""What the fuzzers share: wrong values, a child that a case cannot escape from, and the counting.

    python -m tests.tools.fuzz.checkpoints --count 500 --seed 0

A fuzzer has one function, `case(rng, folder) -> Case`: it makes a wrong input in `folder` and says
what to run on it. The same seed makes the same input. `fuzz` runs each case in a fork of this
process, which has a time and a memory limit. A case ends well if it returns, or raises a UserError,
whose message is one line. Everything else is a violation:

    traceback    any other exception
    message      a UserError that is not one short line that can be printed
    hang         no end within the time limit
    memory       more memory than the limit
    died         a signal, or an exit without a reason
    wrong        a Violation that the case raised itself: NaN as a result, a file that changed ...
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import gc
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from config import UserError
from tests.tools import environment

SECONDS = 20
MEMORY = 2 * 2**30  # bytes that a case may take beyond what this process has already
LONGEST_MESSAGE = 4000  # characters

# ------------------------------------------------------------------------------------ wrong values

# What stands in a file in place of a value. Each is a mistake in most fields.
ODD = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    2**31,
    2**40,
    10**30,
    -(2**63),
    0.0,
    -0.5,
    1.5,
    1e-30,
    1e30,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "x",
    "12",
    "a\nerror: all is well; fix: nothing",
    "\x1b[2J\u202e",
    "\ud83d",
    "x" * 100_000,
    "../../../etc/passwd",
    [],
    [0],
    [None],
    ["x"],
    [[1]],
    [1] * 10_000,
    {},
    {"x": 1},
    {"": None},
)


class Mutated(NamedTuple):
    """A JSON value with one change, and the change in words."""

    value: object
    what: str


def places(value, path: tuple = ()) -> list[tuple]:
    """Return the path of every value inside a JSON value, its own empty path first."""
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value[:20]):
            found += places(inner, (*path, i))
    return found


def mutate(value, rng: random.Random, odd=ODD) -> Mutated:
    """Return a JSON value with one of its values changed, taken out, doubled or moved."""
    value = copy.deepcopy(value)
    path = rng.choice(places(value))
    where = ".".join(map(str, path)) or "all"
    if not path:
        return Mutated(rng.choice(odd), f"{where} replaced")

    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    old = parent[key]

    way = rng.choice(("replace", "replace", "replace", "remove", "scale", "wrap", "swap"))
    if way == "remove":
        del parent[key]
    elif way == "scale" and isinstance(old, (int, float)) and not isinstance(old, bool):
        parent[key] = rng.choice((old + 1, old - 1, old * 2, -old, old / 3, old * 2**20))
    elif way == "wrap":
        parent[key] = rng.choice(([old], {"x": old}, str(old), [old, old]))
    elif way == "swap" and isinstance(parent, dict):
        other = rng.choice(sorted(parent))
        parent[key], parent[other] = parent[other], old
    else:
        way = "replace"
        parent[key] = rng.choice(odd)
    return Mutated(value, f"{where} {way}: {str(parent)[:60]!r}")


def mutate_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return bytes that were cut off, flipped, filled, doubled or emptied, and what was done."""
    way = rng.choice(("cut", "flip", "flip", "zeros", "noise", "double", "empty", "insert"))
    at = rng.randrange(len(content) + 1)

    # The first bytes are the most interesting: that is where headers are.
    if rng.random() < 0.5:
        at = rng.randrange(min(len(content), 200) + 1)

    if way == "cut":
        return content[:at], f"cut at {at}"
    if way == "empty":
        return b"", "emptied"
    if way == "double":
        return content + content, "doubled"
    if way == "insert":
        return content[:at] + rng.randbytes(3) + content[at:], f"3 bytes inserted at {at}"

    changed = bytearray(content)
    for i in range(at, min(at + rng.choice((1, 8, 64)), len(content))):
        if way == "flip":
            changed[i] ^= 1 << rng.randrange(8)
        elif way == "zeros":
            changed[i] = 0
        else:
            changed[i] = rng.randrange(256)
    return bytes(changed), f"{way} at {at}"


def odd_json(rng: random.Random) -> tuple[bytes, str]:
    """Return a text that is no JSON, or JSON that a reader may choke on, and what it is."""
    texts = {
        "nothing": b"",
        "half": b'{"a": ',
        "not UTF-8": b'{"a": "\xff\xfe"}',
        "deep lists": b"[" * 100_000,
        "deep objects": b'{"a":' * 100_000,
        "5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
        "a BOM": b'\xef\xbb\xbf{"a": 1}',
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "zero bytes": b"\0" * 100,
        "HTML": b"<html><body>404</body></html>",
        "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }
    what = rng.choice(sorted(texts))
    return texts[what], what


# ---------------------------------------------------------------------------------------- one case


class Violation(Exception):
    """What a case raises when the result is wrong, with the reason."""


class Case(NamedTuple):
    """A wrong input and what to run on it."""

    kind: str  # a row of the table: which file, which mutation
    what: str  # the change, for whoever repeats it
    run: Callable[[], object]


class Outcome(NamedTuple):
    """How a case ended."""

    kind: str  # "accepted", "refused", or a violation's kind, as above
    text: str  # the message, or the traceback


def run_case(run: Callable[[], object], seconds: float = SECONDS, memory: int = MEMORY) -> Outcome:
    """Run a function in a fork of this process with limits, and return how it ended."""
    reader, writer = os.pipe()
    trace = tempfile.TemporaryFile()  # where a child that gets a signal writes what it was doing
    child = os.fork()
    if child == 0:
        os.close(reader)
        _be_the_child(run, writer, trace, memory)
    os.close(writer)

    # The pipe ends when the child has written its outcome, or has died.
    received = b""
    deadline = time.monotonic() + seconds
    timed_out = False
    while True:
        left = deadline - time.monotonic()
        ready, _, _ = select.select([reader], [], [], max(0.0, left))
        if not ready:
            timed_out = True
            break
        piece = os.read(reader, 65536)
        if not piece:
            break
        received += piece
    os.close(reader)

    # The child leads a group of its own, so whatever it started goes with it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if timed_out:
        return Outcome("hang", f"no end within {seconds} s")
    if received:
        return Outcome(*json.loads(received))
    trace.seek(0)
    return Outcome("died", f"status {status}\n{trace.read().decode(errors='replace')}")


def _be_the_child(run: Callable[[], object], writer: int, trace: IO[bytes], memory: int):
    """Run the function, write the outcome to the pipe and end this process."""
    os.setsid()
    faulthandler.enable(trace)

    # What the parent has left as garbage may own threads, which a fork does not have. To collect it
    # here would wait for them, or crash.
    gc.freeze()

    devnull = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(devnull, stream)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    outcome = _outcome(run)
    os.write(writer, json.dumps([outcome.kind, outcome.text[-3000:]]).encode())
    os._exit(0)


def _outcome(run: Callable[[], object]) -> Outcome:
    """Call the function and return how it ended."""
    try:
        run()
    except Violation as e:
        return Outcome("wrong", str(e))
    except UserError as e:
        message = str(e)
        if not message.isprintable() or len(message) > LONGEST_MESSAGE or "; fix: " not in message:
            return Outcome("message", repr(message))
        return Outcome("refused", message)
    except MemoryError:
        return Outcome("memory", traceback.format_exc())
    except BaseException as e:  # a panic of a Rust library is a BaseException
        text = traceback.format_exc()
        if "allocate memory" in str(e) or "out of memory" in str(e):
            return Outcome("memory", text)
        return Outcome("traceback", text)
    return Outcome("accepted", "")


# --------------------------------------------------------------------------------------- all cases

GOOD = ("accepted", "refused")


class Result(NamedTuple):
    """What a fuzzer found: how each kind of input ended, and its violations."""

    counts: dict[str, Counter]  # kind of input -> kind of outcome -> how often
    violations: list[str]


def fuzz(
    case: Callable[[random.Random, Path], Case],
    count: int,
    seed: int = 0,
    seconds: float = SECONDS,
    memory: int = MEMORY,
    show: bool = False,
) -> Result:
    """Run `count` cases, of the seeds `seed`, `seed + 1`, ..., and return what they came to."""
    counts: dict[str, Counter] = {}
    violations = []
    for i in range(seed, seed + count):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            made = case(random.Random(i), Path(folder))
            outcome = run_case(made.run, seconds, memory)
        counts.setdefault(made.kind, Counter())[outcome.kind] += 1
        if outcome.kind not in GOOD:
            violations.append(
                f"--seed {i} --count 1: {made.kind}, {made.what}: {outcome.kind}\n{outcome.text}"
            )
        if show and sys.stdout.isatty():
            done = i - seed + 1
            print(f"\r{done}/{count}, {len(violations)} violations", end="", flush=True)
    return Result(counts, violations)


def check(module: str, *arguments: object):
    """Run a fuzzer, as its command does, in a Python of its own, and assert that it finds nothing.

    The process of a test may have threads and memory of any test before it, and a fork of it is no
    place to judge a program by.
    """
    ran = environment.run("-m", f"tests.tools.fuzz.{module}", *map(str, arguments))
    print(ran.stdout)


def table(result: Result) -> str:
    """Return the table of a result, a line for each kind of input, and the sums."""
    lines = [f"{'input':32} {'cases':>6} {'accepted':>9} {'refused':>8} {'violations':>11}"]
    total = Counter()
    for kind, counts in sorted(result.counts.items()):
        lines.append(_line(kind, counts))
        total += counts
    lines.append(_line("all", total))
    return "\n".join(lines)


def _line(kind: str, counts: Counter) -> str:
    cases = counts.total()
    wrong = cases - counts["accepted"] - counts["refused"]
    return f"{kind:32} {cases:6} {counts['accepted']:9} {counts['refused']:8} {wrong:11}"


def main(
    case: Callable[[random.Random, Path], Case],
    doc: str,
    kinds: Mapping[str, Callable[[random.Random, Path], Case]] | None = None,
    **limits,
):
    """Be the command line of a fuzzer: run it, print table and violations, exit 1 if any.

    kinds: what --kind may ask for in place of `case`.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    if kinds:
        parser.add_argument("--kind", choices=sorted(kinds), help="cases of this kind alone")
    args = parser.parse_args()
    if kinds and args.kind:
        case = kinds[args.kind]

    result = fuzz(case, args.count, args.seed, show=True, **limits)
    print()
    for violation in result.violations:
        print(violation.encode(errors="backslashreplace").decode())
    print(table(result))
    sys.exit(1 if result.violations else 0)
