"""Watching a run: the progress line, log.jsonl, TensorBoard or Weights & Biases, and what lies beside a finished model.

log.jsonl has one JSON object a line, {"event": ..., "stage": ...}, where an event is start, step, validation, answer,
skipped or end. Only rank 0 prints and writes.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

import config
from checkpoints import resume
from checkpoints.files import write_file
from config import Recipe, UserError
from inputs.rows import Rows
from inputs.sample import SampleSpec, load_items
from inputs.templates import IMAGE, encode_prompt, stop_id
from model import LLaVA
from training import ranks
from training.ranks import World, print0

COLOURS = ("#3366cc", "#dc3912", "#109618", "#990099", "#ff9900")


def recorder(kind: str, output: Path, recipe: Recipe) -> Callable[[int, dict[str, float]], None]:
    """What takes (step, numbers) to TensorBoard or Weights & Biases. Raises UserError where it is not installed.

    Anything else that fails there (no network, no login) is said once, and training goes on: log.jsonl has it all.
    """

    def quietly(function):
        def call(*args):
            nonlocal send
            try:
                return function(*args)
            except ImportError:
                raise UserError(
                    "train.log", f"{kind} is not installed", f"pip install {kind}"
                ) from None
            except Exception as e:
                print0(f"warning: train.log: {kind} failed ({e}); log.jsonl has everything")
                send = None

        return call

    def connect():
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(output / "tensorboard"))
            return lambda step, row: (
                [writer.add_scalar(k, v, step) for k, v in row.items()] and writer.flush()
            )
        import wandb

        run = wandb.init(
            project="barellava",
            name=output.name,
            dir=str(output),
            config={"recipe": config.dumps(recipe)},
        )
        return lambda step, row: run.log(row, step=step)

    send = quietly(connect)() if kind != "none" else None
    return lambda step, row: send and quietly(send)(step, row)


class Watch:
    """The numbers of one stage, and whether every trainable part moves."""

    def __init__(
        self,
        file: Path,
        name: str,
        steps: int,
        trainable: dict[str, list[nn.Parameter]],
        world: World,
        peak_share=0.0,
    ):
        """peak_share: of all GPUs' peak, what one token per second takes; 0 = unknown."""
        self.file, self.name, self.steps, self.world = file, name, steps, world
        self.trainable = {part: ps for part, ps in trainable.items() if ps}
        self.start = self.last = time.perf_counter()
        self.tokens = self.images = self.wait = self.loss = self.count = 0.0
        self.first: int | None = None
        self.before = self._probe()
        self.record: Callable[[int, dict[str, float]], None] = lambda step, row: None
        self.peak_share = peak_share

    def _probe(self) -> dict[str, list[Tensor]]:
        """A few values of every trainable tensor: enough to see whether it moves, at no memory."""
        return {
            p: [ranks.local(t.detach()).flatten()[:64].clone() for t in ts]
            for p, ts in self.trainable.items()
        }

    def write(self, event: str, **values):
        if self.world.rank == 0:
            with resume.writing(self.file), open(self.file, "a") as f:
                f.write(json.dumps({"event": event, "stage": self.name, **values}) + "\n")

    def gradient_norms(self) -> dict[str, float]:
        """Per part, of the gradient that is about to be clipped."""
        return {part: ranks.gradient_norm(ps).item() for part, ps in self.trainable.items()}

    def changes(self) -> dict[str, float]:
        """Per part, relative change of the probed weights since the stage began."""
        out = {}
        for part, now in self._probe().items():
            pairs = list(zip(now, self.before[part], strict=True))
            moved = sum((a - b).square().sum().item() for a, b in pairs)
            out[part] = math.sqrt(
                moved / max(1e-30, sum(b.square().sum().item() for _, b in pairs))
            )
        return out

    def validation(self, step: int, loss: float):
        self.write("validation", step=step, loss=loss)
        self.record(step, {f"{self.name}/validation": loss})
        print0(f"{self.name} {step}/{self.steps}  validation loss {loss:.4f}")

    def answers(self, step: int, model: LLaVA, rows: Rows, spec: SampleSpec, count: int):
        """What the model now says to the first question of `count` rows, beside what they say. All ranks must call."""
        stop = stop_id(spec.tokenizer, spec.template)
        for i in range(min(count, len(rows))):
            row = rows[i]
            asked, wanted = row["conversations"][:2]
            items = load_items(rows, i, spec, row)[: asked["value"].count(IMAGE)]
            ids = torch.tensor(
                encode_prompt(
                    [asked, {"from": "gpt", "value": None}], spec.tokenizer, spec.template
                )
            )
            made = model.generate([ids], items, max_new_tokens=64, eos_token_id=stop)[0].tolist()
            said = spec.tokenizer.decode(made[: made.index(stop)] if stop in made else made).strip()
            self.write(
                "answer",
                step=step,
                row=rows.where(i),
                question=asked["value"],
                wanted=wanted["value"],
                said=said,
            )
            question = " ".join(asked["value"].replace(IMAGE, "").split())[:80]
            print0(
                f"{self.name} {step}/{self.steps}  {question!r}: {said[:80]!r}, wanted {wanted['value'][:80]!r}"
            )

    def step(
        self, step: int, loss: float, tokens: float, images: float, wait: float, log: dict | None
    ):
        """Count one step; `log` (learning_rate, grad_norm, ...) closes a window with a line."""
        self.first = step if self.first is None else self.first
        self.loss, self.count, self.wait = self.loss + loss, self.count + 1, self.wait + wait
        self.tokens, self.images = self.tokens + tokens, self.images + images
        if log is None:
            return
        now = time.perf_counter()
        seconds, loss = now - self.last, self.loss / self.count
        eta = (now - self.start) / (step + 1 - self.first) * (self.steps - step - 1)
        cuda = self.world.device.type == "cuda"
        peak = (
            torch.cuda.max_memory_allocated()
            if cuda
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        row = {
            "step": step + 1, "steps": self.steps, "loss": loss, **log, "tokens_per_s": self.tokens / seconds,
            "images_per_s": self.images / seconds, "data_wait": self.wait / seconds, "memory_gb": peak / 2**30,
            "seconds": now - self.start,
        }  # fmt: skip
        if self.peak_share:
            row["mfu"] = row["tokens_per_s"] * self.peak_share
        self.write("step", **row)
        self.record(
            step + 1, {f"{self.name}/{k}": v for k, v in row.items() if isinstance(v, float)}
        )
        print0(
            f"{self.name} {step + 1}/{self.steps}  loss {loss:.4f}  lr {log['learning_rate']:.2e}  "
            f"|g| {log['grad_norm']:.2f}  {row['tokens_per_s'] / 1000:.1f}k tok/s  {row['images_per_s']:.0f} img/s  "
            + (f"mfu {100 * row['mfu']:.0f}%  " if "mfu" in row else "")
            + f"data {100 * row['data_wait']:.0f}%  {row['memory_gb']:.1f} GB  "
            f"eta {int(eta) // 60}:{int(eta) % 60:02d}"
        )
        for part, change in log["weight_change"].items():
            if change == 0 and step > 0 and log["learning_rate"] > 0:
                print0(
                    f"warning: {self.name}: tune.{part} is trainable but has not moved; is its rate 0?"
                )
        self.last, self.loss, self.count, self.wait, self.tokens, self.images = (
            now,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
        )


def forget_after(file: Path, stages: list[str], stage: int, step: int):
    """Drop the log rows that a resumed run will write again."""
    if not file.exists():
        return
    rows = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def stays(row: dict) -> bool:
        at = stages.index(row["stage"]) if row["stage"] in stages else len(stages)
        return at < stage or (
            at == stage and row.get("step", 0) <= step and row["event"] not in ("start", "end")
        )

    write_file(file, "".join(line for line in rows if stays(json.loads(line))))


def draw_losses(rows: list[dict], file: Path, width: int = 900, height: int = 420, edge: int = 50):
    """loss.png: the training loss of each stage one after the other, and as dots the validation loss."""
    points = [r for r in rows if r["event"] in ("step", "validation")]
    if not points:
        return
    names = list(dict.fromkeys(r["stage"] for r in points))
    ends = {n: max(r["step"] for r in points if r["stage"] == n) for n in names}
    begins = {n: sum(ends[m] for m in names[:i]) for i, n in enumerate(names)}
    high = max(r["loss"] for r in points)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)

    def at(row: dict) -> tuple[float, float]:
        x = (begins[row["stage"]] + row["step"]) / sum(ends.values())
        return edge + x * (width - 2 * edge), height - edge - row["loss"] / high * (
            height - 2 * edge
        )

    draw.line([(edge, edge), (edge, height - edge), (width - edge, height - edge)], "black")
    draw.text((4, edge - 6), f"{high:.2f}", "black")
    draw.text((4, height - edge - 6), "0.00", "black")
    draw.text((width - edge - 30, height - edge + 6), f"{sum(ends.values())} steps", "black")
    for i, name in enumerate(names):
        colour = COLOURS[i % len(COLOURS)]
        draw.line([at(r) for r in points if r["stage"] == name and r["event"] == "step"], colour, 2)
        for x, y in (at(r) for r in points if r["stage"] == name and r["event"] == "validation"):
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
        draw.text((edge + 10 + 160 * i, 14), f"{name} (dots: validation)", colour)
    write_file(file, lambda path: image.save(path, "PNG"))


def card(recipe: Recipe, rows: list[dict]) -> str:
    """README.md of a finished model: what it is made of, what it saw, how it scored, how to open it."""
    m = recipe.model
    lines = [
        "# " + Path(recipe.train.output).name, "",
        *([f"- all of {m.checkpoint}, trained on"] if m.checkpoint else [
            f"- language model: {m.llm or 'random weights, ' + str(m.llm_config.get('model_type'))}",
            f"- vision encoder: {' + '.join(filter(None, (m.vision, m.vision2))) or 'random weights'}",
            f"- connector: {m.connector}"]), "", "| stage | data | trains | steps | loss | validation loss |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, stage in recipe.stage.items():
        mine = [r for r in rows if r["stage"] == name]
        last = {
            event: ([r for r in mine if r["event"] == event] or [{}])[-1]
            for event in ("step", "validation")
        }
        trains = ", ".join(
            f"{k} {v}" for k, v in vars(stage.tune).items() if isinstance(v, str) and v != "frozen"
        )
        loss, held_out = (f"{r['loss']:.4f}" if r else "-" for r in last.values())
        data = stage.data or ", ".join(f"{s.data} x {s.weight}" for s in stage.mixture.values())
        lines.append(
            f"| {name} | {data} | {trains} | {last['step'].get('step', 0)} | {loss} | {held_out} |"
        )
    lines += [
        "", "`recipe.toml` is the whole recipe, `log.jsonl` and `loss.png` tell how it went.", "",
        '    python generate.py --model THIS_FOLDER --image FILE --prompt "..."',
        '    LLaVA.from_pretrained("THIS_FOLDER")        # model.py', "",
    ]  # fmt: skip
    return "\n".join(lines)


def finish(output: Path, recipe: Recipe):
    """loss.png and README.md."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    draw_losses(rows, output / "loss.png")
    write_file(output / "README.md", card(recipe, rows))
