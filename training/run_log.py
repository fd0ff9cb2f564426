"""The log of a run: one line of log.jsonl per event, and the progress lines that a person watches.

    log = RunLog(file, "finetune", steps, trainable, ranks, recorder)
    log.step(step, loss, tokens, images, wait)               # every step
    log.line(step, learning_rate, ...)                       # every train.log_every steps
    log.validation(step + 1, loss)

log.jsonl has one JSON object a line, {"event": ..., "stage": ...}. An event is start, changed,
step, validation, answer, skipped, failed or end. Only rank 0 prints and writes.

`RunLog` is the log of one stage. A run that resumes drops what it will write again
(`forget_after`), and model_card.py draws the file at the end.

The log is for people, and no run depends on it. A line that cannot be read is passed over
(`read_log`), and what only reports may fail without an end of the training (`reporting`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from checkpoints.files import write_file
from checkpoints.json_lines import parse_row, read_lines
from config import UserError, printable
from inference import generation
from inference.answer import before_stop
from inputs.rows import Rows
from inputs.sample import SampleSpec, encode_text, load_items
from inputs.templates import IMAGE, encode_prompt, stop_id
from model import LLaVA
from packing import Item
from training import parallel
from training.ranks import Ranks, print0
from training.recorder import Recorder

try:
    import resource
except ImportError:  # Windows
    resource = None

PROBED = 64  # values of each trainable tensor that are watched: enough to see whether it moves


@contextlib.contextmanager
def reporting(what: str) -> Iterator[None]:
    """Go on if something fails in this context that only reports, and say so in one line."""
    try:
        yield
    except Exception as e:
        print0(f"warning: {what} failed, training goes on: {why(e)}")


def why(error: Exception) -> str:
    """Return in one line what an exception says."""
    return printable(f"{error}" or type(error).__name__)


@dataclass
class Window:
    """The sums over the steps since the last progress line."""

    begin: float  # seconds, as time.perf_counter counts them
    steps: int = 0
    loss: float = 0.0
    tokens: float = 0.0
    images: float = 0.0
    wait: float = 0.0  # seconds that the loop waited for data


class RunLog:
    """The numbers of one stage, and whether every trainable part moves."""

    def __init__(
        self,
        file: Path,
        name: str,
        steps: int,
        trainable: dict[str, list[nn.Parameter]],
        ranks: Ranks,
        recorder: Recorder | None = None,
        peak_share: float = 0.0,
    ):
        """name, steps: of the stage. trainable: the trainable parameters of each part.

        recorder: where else the numbers go. peak_share: what one token per second takes of the peak
        of all GPUs; 0 = unknown.
        """
        self.file = file
        self.name = name
        self.steps = steps
        self.trainable = {part: parameters for part, parameters in trainable.items() if parameters}
        self.ranks = ranks
        self.recorder = recorder
        self.peak_share = peak_share

        self.cannot_write = False  # whether the last event could not be written to log.jsonl
        self.begin = time.perf_counter()
        self.first_step: int | None = None  # not 0 where a run was resumed
        self.window = Window(self.begin)
        self.probed_at_begin = self._probe()

    def write(self, event: str, **values):
        """Append an event to log.jsonl. If that fails, say so once, and try again with the next."""
        if not self.ranks.is_first:
            return
        line = event_line(event, self.name, **values)

        # Of an event that did not fit on the disk, a part may be there.
        if self.cannot_write:
            line = "\n" + line
        try:
            append(self.file, line)
        except OSError as e:
            if not self.cannot_write:
                print0(f"warning: {self.file} cannot be written, training goes on: {why(e)}")
            self.cannot_write = True
        else:
            self.cannot_write = False

    def failed(self, step: int, what: str, why: str):
        """Report that something failed that only reports, after `step` steps."""
        self.write("failed", step=step, what=what, why=why)
        print0(f"warning: {self.name} {step}/{self.steps}: {what} failed, training goes on: {why}")

    def _record(self, step: int, numbers: dict[str, float]):
        """Pass numbers on to the recorder, under the name of the stage."""
        if self.recorder is None:
            return
        named = {f"{self.name}/{key}": value for key, value in numbers.items()}
        self.recorder.record(step, named)

    # ------------------------------------------------------------------------------ steps

    def step(self, step: int, loss: float, tokens: float, images: float, wait: float):
        """Count one step: its loss, tokens and images on all ranks, and the seconds of waiting.

        Steps count from 0 here and in `line`. What is written counts them from 1.
        """
        if self.first_step is None:
            self.first_step = step
        self.window.steps += 1
        self.window.loss += loss
        self.window.tokens += tokens
        self.window.images += images
        self.window.wait += wait

    def line(
        self,
        step: int,
        learning_rate: float,
        grad_norm: float,
        grad_norms: dict[str, float],
        cut_tokens: int,
    ):
        """Report the steps since the last line, and begin the next window.

        grad_norm: before clipping; grad_norms: the same per part. cut_tokens: in this step, tokens
        that over-long rows lost. All ranks must call it.
        """
        now = time.perf_counter()
        seconds = now - self.window.begin
        row = {
            "step": step + 1,
            "steps": self.steps,
            "loss": self.window.loss / self.window.steps,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "grad_norms": grad_norms,
            "weight_change": self._weight_change(),
            "cut_tokens": cut_tokens,
            "tokens_per_s": self.window.tokens / seconds,
            "images_per_s": self.window.images / seconds,
            "data_wait": self.window.wait / seconds,
        }
        memory = self._peak_memory()
        if memory is not None:
            row["memory_gb"] = memory / 2**30
        row["seconds"] = now - self.begin
        if self.peak_share:
            row["mfu"] = row["tokens_per_s"] * self.peak_share
        self.write("step", **row)

        # The recorder takes plain numbers, not the tables of norms and changes.
        numbers = {key: value for key, value in row.items() if isinstance(value, float)}
        self._record(step + 1, numbers)

        print0(self._progress(row))
        self._warn_of_parts_at_rest(step, row)
        self.window = Window(now)

    def _progress(self, row: dict) -> str:
        """Return the line that a person sees."""
        # The mean time of a step since the stage began, or since the run was resumed in it.
        done = row["step"] - self.first_step
        left = self.steps - row["step"]
        eta = int(row["seconds"] / done * left)

        columns = [
            f"{self.name} {row['step']}/{self.steps}",
            f"loss {row['loss']:.4f}",
            f"lr {row['learning_rate']:.2e}",
            f"|g| {row['grad_norm']:.2f}",
            speed(row["tokens_per_s"]),
            f"{row['images_per_s']:.0f} img/s",
        ]
        if "mfu" in row:
            columns.append(f"mfu {100 * row['mfu']:.0f}%")
        columns.append(f"data {100 * row['data_wait']:.0f}%")
        if "memory_gb" in row:
            columns.append(f"{row['memory_gb']:.1f} GB")
        columns.append(f"eta {eta // 60}:{eta % 60:02d}")
        return "  ".join(columns)

    def _peak_memory(self) -> int | None:
        """Return the most bytes that this process has used, of the GPU's memory if it has one.

        None: the system does not say.
        """
        if self.ranks.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.ranks.device)

        if resource is None:
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if sys.platform == "darwin":
            return peak
        return 1024 * peak  # Linux counts it in KiB

    # ------------------------------------------------------------------ does every part move?

    def gradient_norms(self) -> dict[str, float]:
        """Return the norm of each part's gradient. Call it before clipping, on all ranks."""
        norms = []
        for parameters in self.trainable.values():
            norms.append(parallel.gradient_norm(parameters))
        return dict(zip(self.trainable, parallel.numbers(norms), strict=True))

    def _probe(self) -> dict[str, list[Tensor]]:
        """Return copies of the first values of every trainable tensor, per part."""
        probed = {}
        for part, parameters in self.trainable.items():
            values = []
            for p in parameters:
                local = parallel.local_part(p.detach())
                values.append(local.flatten()[:PROBED].clone())
            probed[part] = values
        return probed

    def _weight_change(self) -> dict[str, float]:
        """Return the relative change of each part's probed values since the stage began."""
        sums = []
        for part, values in self._probe().items():
            for now, before in zip(values, self.probed_at_begin[part], strict=True):
                sums.append((now - before).square().sum())
                sums.append(before.square().sum())
        numbers = iter(parallel.numbers(sums))

        change = {}
        for part, values in self.probed_at_begin.items():
            moved = 0.0
            size = 0.0
            for _ in values:
                moved += next(numbers)
                size += next(numbers)

            # A part may begin as zeros, as LoRA's B does.
            change[part] = math.sqrt(moved / max(1e-30, size))
        return change

    def _warn_of_parts_at_rest(self, step: int, row: dict):
        """Print a warning for each part that trains and has not changed at all."""
        # With warm-up the first step has rate 0, so nothing moves.
        if step == 0 or row["learning_rate"] == 0:
            return
        for part, change in row["weight_change"].items():
            if change == 0:
                what = f"tune.{part} is trainable but has not moved; is its rate 0?"
                print0(f"warning: {self.name}: {what}")

    # ------------------------------------------------------------------------- validation

    def validation(self, step: int, loss: float):
        """Report the loss on the held-out rows after `step` steps."""
        self.write("validation", step=step, loss=loss)
        self._record(step, {"validation": loss})

        head = f"{self.name} {step}/{self.steps}"
        print0(f"{head}  validation loss {loss:.4f}")

    def answers(self, step: int, model: LLaVA, rows: Rows, spec: SampleSpec, count: int):
        """Report the model's answers to the first questions of `count` rows.

        A row that cannot be asked about is reported as such, and passed over. All ranks must call
        this: with fsdp they compute together.
        """
        generation.forget_engine(model)  # its cache is of the weights of the last validation
        for i in range(min(count, len(rows))):
            # A rank that cannot read a picture must not leave the others waiting for it.
            question = None
            failure = ""
            try:
                question = first_question(rows, i, spec)
            except Exception as e:
                failure = why(e)
            failures = [text for text in self.ranks.collect([failure]) if text]
            if failures:
                self.failed(step, f"the answer to held-out row {i}", failures[0])
                continue

            # With several ranks, one that fails here ends all: the others are in the same pass.
            try:
                said = answer_question(model, question, spec)
            except Exception as e:
                if self.ranks.size > 1:
                    raise
                self.failed(step, f"the answer to held-out row {i}", why(e))
                continue
            self._answer(step, rows.where(i), question, said)

    def _answer(self, step: int, where: str, question: Question, said: str):
        """Report an answer."""
        self.write(
            "answer",
            step=step,
            row=where,
            question=question.text,
            wanted=question.wanted,
            said=said,
        )
        short = printable(" ".join(question.text.replace(IMAGE, "").split()), 80)
        head = f"{self.name} {step}/{self.steps}"
        print0(f"{head}  {short!r}: {said[:80]!r}, wanted {question.wanted[:80]!r}")


def speed(tokens_per_s: float) -> str:
    """Return a speed in a few characters: 812 tok/s, 21.4k tok/s."""
    if tokens_per_s < 9999.5:
        return f"{tokens_per_s:.0f} tok/s"
    return f"{tokens_per_s / 1000:.1f}k tok/s"


# ------------------------------------------------------------------------------ a held-out question


class Question(NamedTuple):
    """The first question of a row."""

    turns: list[dict]  # what the prompt is made of: a system turn if the row has one, the question
    text: str
    items: list[Item]  # its pictures and videos
    wanted: str  # the row's answer


def first_question(rows: Rows, i: int, spec: SampleSpec) -> Question:
    """Return the first question of row i. Raises UserError if it has none, or a bad picture.

    A row may begin with a system turn, and then with an answer to nothing, which is left out.
    """
    row = rows[i]
    where = rows.where(i, row)

    # The row is one that can be trained on, so it has turns in their order, and an answer.
    encode_text(row, where, spec)
    conversation = row["conversations"]
    turns = [turn for turn in conversation[:1] if turn["from"] == "system"]
    first = next(k for k, turn in enumerate(conversation) if turn["from"] == "human")
    turns.append(conversation[first])
    text = conversation[first]["value"]

    # Pictures of later turns are left out.
    items = load_items(rows, i, spec, row, text.count(IMAGE))
    return Question(turns, text, items, conversation[first + 1]["value"])


def answer_question(model: LLaVA, question: Question, spec: SampleSpec) -> str:
    """Return the model's answer, in the stage's own template.

    The finished model has the template of the last stage, and the stages before may have another.
    """
    prompt = torch.tensor(encode_prompt(question.turns, spec.tokenizer, spec.template))
    stop = stop_id(spec.tokenizer, spec.template)
    tokens = model.generate([prompt], images=question.items, eos_token_id=stop, max_new_tokens=64)
    return spec.tokenizer.decode(before_stop(tokens[0].tolist(), stop)).strip()


# ------------------------------------------------------------------------------------ log.jsonl


def event_line(event: str, stage: str, **values) -> str:
    """Return a line of log.jsonl."""
    return json.dumps({"event": event, "stage": stage, **values}, default=str) + "\n"


def append(file: Path, line: str):
    """Write a line at the end of a file. Raises OSError."""
    with open(file, "a") as f:
        f.write(line)


def read_log(file: Path) -> list[dict]:
    """Return the events of log.jsonl, without the lines that cannot be read.

    Whatever lies there, nothing is raised: no file, a folder or zeros are a log without events.
    """
    try:
        return [row for _, row in read_lines(file, parse_event) if row is not None]
    except UserError:
        return []


def parse_event(line: bytes) -> dict | None:
    """Return the event of a line of log.jsonl; None if it is cut, damaged, or no event of ours."""
    row = parse_row(line, ("event", "stage"))
    if row is None or not line.endswith(b"\n"):
        return None

    # Readers count with these two.
    step = row.get("step", 0)
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= 10**12:
        return None
    if row["event"] in ("step", "validation"):
        loss = row.get("loss")
        is_number = isinstance(loss, (int, float)) and not isinstance(loss, bool)
        if step == 0 or not is_number or not abs(loss) < 1e30:  # NaN is not, either
            return None
    return row


def forget_after(file: Path, stages: list[str], stage: int, step: int):
    """Drop the rows of log.jsonl that a resumed run writes again.

    stages: the names of all stages. stage: the index of the one in which the run goes on, after
    `step` steps of it. Earlier stages keep all their rows; at the very beginning of a run none is
    kept. Lines that cannot be read are dropped, too: then the whole file stays as
    log.jsonl.damaged, and one line says so.
    """
    if not file.exists():
        return
    kept = []
    damaged = 0
    try:
        for line, row in read_lines(file, parse_event):
            if row is None:
                damaged += 1
            elif is_done(row, stages, stage, step):
                kept.append(line)
    except UserError:
        damaged += 1

    if damaged:
        aside = set_aside(file)
        print0(f"{file}: {damaged} lines cannot be read; it is kept as {aside.name}")
    write_file(file, b"".join(kept))


def is_done(row: dict, stages: list[str], stage: int, step: int) -> bool:
    """Say whether a run that goes on there (see forget_after) does not write this event again."""
    is_new_run = stage == 0 and step == 0
    if is_new_run or row["stage"] not in stages:
        return False
    index = stages.index(row["stage"])
    if index != stage:
        return index < stage

    # The run writes start and end of this stage again.
    return row.get("step", 0) <= step and row["event"] not in ("start", "end")


def set_aside(file: Path) -> Path:
    """Rename a damaged file to FILE.damaged, or with a number if there is one. Return the name."""
    aside = file.with_name(f"{file.name}.damaged")
    number = 2
    while aside.exists():
        aside = file.with_name(f"{file.name}.damaged{number}")
        number += 1
    os.rename(file, aside)
    return aside
