"""Answers on disk: appended as they are made, resumed after a kill, shared by ranks.

    answers = answer_examples(examples, chosen, answer, file, batch=64)

A file has one answer a line: {"id", "question", "answer", "label", "image"}. An answer counts for a
question if id, question and picture are the same. Whether it is of the same model, and the pictures
are the same behind their names, is origin.py's to say.

The file is kept for people and other programs too, so it does not decide whether an evaluation can
go on: lines that are no answers (half of one after a kill, zeros after a power cut) are left out,
the file as it was is kept beside it, and a line says so.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from checkpoints.files import write_file, writing
from checkpoints.json_lines import parse_row, read_lines
from evals import Example
from evals.origin import parts_of
from evals.shown import shown_name

# Seconds between two lines of progress where there is no terminal.
QUIET_SECONDS = 30


def no_barrier():
    """Wait for nobody: there is one rank."""


class Ranks(NamedTuple):
    """The processes that share the questions, and which of them this one is."""

    rank: int = 0
    size: int = 1
    barrier: Callable = no_barrier


def answer_examples(
    examples: list[Example],
    chosen: list[Example],
    answer: Callable[[list[Example]], list[str]],
    file: Path,
    batch: int = 64,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable = no_barrier,
) -> list[str] | None:
    """Return the answers to the examples `chosen`, in their order; on ranks other than 0 None.

    `examples` are all of the task's: answers to those not chosen now stay in the file. Each rank
    appends to a file of its own, so that nothing has to travel between them; rank 0 puts them
    together.
    """
    if rank == 0:
        for part in parts_of(file):
            leave_out_damage(part)
    barrier()

    # Every rank has read what is there before any of them writes.
    known = read_answers(file, examples)
    barrier()

    # Answer this rank's part of the rest.
    mine = chosen[rank::world_size]
    todo = [example for example in mine if example["id"] not in known]
    own = file
    if rank > 0:
        own = file.with_name(f"{file.name}.rank{rank}")
    append_answers(todo, answer, own, batch, done=len(mine) - len(todo), quiet=rank > 0)
    barrier()
    if rank > 0:
        return None

    # One file, in the order of the examples.
    known |= read_answers(file, examples)
    rows = [known[example["id"]] for example in examples if example["id"] in known]
    with writing(file):
        write_file(file, "".join(json.dumps(row) + "\n" for row in rows))
        for part in parts_of(file)[1:]:
            part.unlink()
    return [known[example["id"]]["answer"] for example in chosen]


def read_answers(file: Path, examples: list[Example]) -> dict[str, dict]:
    """Return {id: row} of the answers to these examples, of all ranks.

    An answer to another question or about another picture does not count, whatever its id.
    """
    asked = {example["id"]: example for example in examples}
    found = {}
    for part in parts_of(file):
        for _, row in read_lines(part, parse_answer):
            if row is None or row["id"] not in asked:
                continue
            example = asked[row["id"]]
            if row["question"] == example["prompt"] and row.get("image") == shown_name(example):
                found[row["id"]] = row
    return found


def parse_answer(line: bytes) -> dict | None:
    """Return the row of a line; None if it is no answer. "label" and "image" are not looked at."""
    return parse_row(line, ("id", "question", "answer"))


def leave_out_damage(file: Path):
    """Write a file anew without the lines that are no answers; keep the old one beside it."""
    good = []
    damaged = 0
    for line, row in read_lines(file, parse_answer):
        if row is None:
            damaged += 1
        else:
            good.append(line)
    if damaged == 0:
        return

    with writing(file):
        number = 0
        kept = file
        while kept.exists():
            number += 1
            kept = file.with_name(f"{file.stem}.damaged-{number}{file.suffix}")
        write_file(kept, file.read_bytes())
        write_file(file, b"".join(good))
    print(f"{file.name}: {damaged} damaged lines left out, the file as it was is {kept.name}")


def append_answers(
    todo: list[Example],
    answer: Callable[[list[Example]], list[str]],
    file: Path,
    batch: int,
    done: int = 0,
    quiet: bool = False,
):
    """Answer the examples `todo` and append each batch to the file before the next is asked.

    done: how many examples had an answer before, for the printed progress; quiet: print none.
    """
    # Shortest questions first: so those of a batch are of about the same length.
    todo = sorted(todo, key=lambda example: (len(example["prompt"]), example["id"]))
    progress = Progress(done, len(todo), quiet)

    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = open(file, "a+b")
    with lines:
        end_last_line(lines)
        for begin in range(0, len(todo), batch):
            part = todo[begin : begin + batch]
            rows = []
            for example, text in zip(part, answer(part), strict=True):
                row = {
                    "id": example["id"],
                    "question": example["prompt"],
                    "answer": text,
                    "label": example["label"],
                    "image": shown_name(example),
                }
                rows.append(json.dumps(row).encode() + b"\n")
            with writing(file):
                lines.write(b"".join(rows))
                lines.flush()
            progress.show(begin + len(part))


def end_last_line(lines):
    """End the last line of a file opened for appending, where a killed run has left half of it."""
    if lines.tell() == 0:
        return
    lines.seek(-1, os.SEEK_END)
    if lines.read(1) != b"\n":
        lines.write(b"\n")


class Progress:
    """The line that says how many answers there are: one that changes on a terminal, else some."""

    def __init__(self, done: int, todo: int, quiet: bool):
        self.done = done
        self.todo = todo
        self.quiet = quiet
        self.started = time.monotonic()
        self.shown = 0.0  # when a line was last shown, in seconds since the start

    def show(self, count: int):
        """Print that `count` of those to do are done, unless it is too soon for another line."""
        if self.quiet:
            return
        terminal = sys.stdout.isatty()
        finished = count == self.todo
        seconds = time.monotonic() - self.started
        if not (terminal or finished or seconds - self.shown > QUIET_SECONDS):
            return
        self.shown = seconds

        rate = count / max(seconds, 1e-9)
        left = (self.todo - count) / rate
        of_all = f"{self.done + count}/{self.done + self.todo}"
        line = f"{of_all} answers, {rate:.1f}/s, {left:.0f} s left"
        if not terminal:
            print(line, flush=True)
        elif finished:
            print(f"\r{line}   ", flush=True)
        else:
            print(f"\r{line}   ", end="", flush=True)
