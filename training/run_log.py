"""The log of a run: one line of log.jsonl per event, and the progress lines that a person watches.

    log = RunLog(file, "finetune", steps, trainable, ranks, recorder)
    log.step(step, loss, tokens, images, wait)               # every step
    log.line(step, learning_rate, ...)                       # every train.log_every steps
    log.validation(step + 1, loss)

log.jsonl has one JSON object a line, {"event": ..., "stage": ...}. An event is start, step,
validation, answer, skipped or end. Only rank 0 prints and writes.

`RunLog` is the log of one stage. A run that resumes drops what it will write again
(`forget_after`), and model_card.py draws the file at the end.
"""

from __future__ import annotations

import json
import math
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.files import write_file, writing
from inference import generation
from inference.answer import answer
from inputs.rows import Rows
from inputs.sample import SampleSpec, load_items
from inputs.templates import IMAGE
from model import LLaVA
from training import parallel
from training.ranks import Ranks, print0
from training.recorder import Recorder

PROBED = 64  # values of each trainable tensor that are watched: enough to see whether it moves


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

        self.begin = time.perf_counter()
        self.first_step: int | None = None  # not 0 where a run was resumed
        self.window = Window(self.begin)
        self.probed_at_begin = self._probe()

    def write(self, event: str, **values):
        """Append an event to log.jsonl."""
        if self.ranks.is_first:
            row = {"event": event, "stage": self.name, **values}
            line = json.dumps(row)
            with writing(self.file), open(self.file, "a") as f:
                f.write(line + "\n")

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
            "memory_gb": self._peak_memory() / 2**30,
            "seconds": now - self.begin,
        }
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
            f"{row['tokens_per_s'] / 1000:.1f}k tok/s",
            f"{row['images_per_s']:.0f} img/s",
        ]
        if "mfu" in row:
            columns.append(f"mfu {100 * row['mfu']:.0f}%")
        columns += [
            f"data {100 * row['data_wait']:.0f}%",
            f"{row['memory_gb']:.1f} GB",
            f"eta {eta // 60}:{eta % 60:02d}",
        ]
        return "  ".join(columns)

    def _peak_memory(self) -> int:
        """Return the most bytes that this process has used, of the GPU's memory if it has one."""
        if self.ranks.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.ranks.device)

        # Linux counts it in KiB.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

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

        All ranks must call it: with fsdp they compute together.
        """
        generation.forget_engine(model)  # its cache is of the weights of the last validation
        for i in range(min(count, len(rows))):
            turns = rows[i]["conversations"]
            question = turns[0]["value"]
            wanted = turns[1]["value"]
            said = answer_first_question(model, rows, i, spec)
            self.write(
                "answer",
                step=step,
                row=rows.where(i),
                question=question,
                wanted=wanted,
                said=said,
            )
            short = " ".join(question.replace(IMAGE, "").split())[:80]
            head = f"{self.name} {step}/{self.steps}"
            print0(f"{head}  {short!r}: {said[:80]!r}, wanted {wanted[:80]!r}")


def answer_first_question(model: LLaVA, rows: Rows, i: int, spec: SampleSpec) -> str:
    """Return the model's answer to the first question of row i, in the stage's own template.

    The finished model has the template of the last stage, and the stages before may have another.
    """
    row = rows[i]
    question = row["conversations"][0]["value"]

    # Pictures of later turns are left out.
    items = load_items(rows, i, spec, row)
    items = items[: question.count(IMAGE)]

    texts = answer(
        model,
        spec.tokenizer,
        [question],
        [items],
        template=spec.template,
        max_new_tokens=64,
    )
    return texts[0]


def forget_after(file: Path, stages: list[str], stage: int, step: int):
    """Drop the rows of log.jsonl that a resumed run writes again.

    stages: the names of all stages. stage: the index of the one in which the run goes on, after
    `step` steps of it. Earlier stages keep all their rows. The last line is dropped too if a kill
    cut it short.
    """
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines(keepends=True):
        is_cut_short = not line.endswith("\n")
        if is_cut_short:
            continue

        row = json.loads(line)
        index = len(stages)
        if row["stage"] in stages:
            index = stages.index(row["stage"])

        if index < stage:
            kept.append(line)
        elif index == stage:
            # The run writes start and end of this stage again.
            is_done = row.get("step", 0) <= step
            if is_done and row["event"] not in ("start", "end"):
                kept.append(line)
    write_file(file, "".join(kept))
