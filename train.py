"""Train a small multimodal model, stage by stage, as a recipe says.

    torchrun train.py                                             # the demo: an embedded world, a few minutes on a CPU
    torchrun train.py recipes/tinyllama-clip-base.toml            # one GPU
    torchrun --nproc-per-node 8 train.py recipes/qwen2-siglip-base.toml train.output=out/mine
    python train.py RECIPE [section.key=value ...]                # without torchrun: one process
    python train.py --list                                        # every recipe and its published scores
    python train.py RECIPE [section.key=value ...] --dry-run      # its files, parameters, steps, memory, hours
    python train.py --help                                        # every field of a recipe

A killed run goes on where it stopped when the same command is given again. What comes out (train.output) is a
folder that generate.py, evaluate.py and LLaVA.from_pretrained open.

One optimizer step is exactly `global_batch` samples. Its loss is the sum over all supervised tokens of the step
divided by their number, over micro-batches and ranks, so neither of them changes what is computed.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import config
import parallel
import plan
import weights
import world as demo_world
from config import Recipe, Stage, Tune, UserError
from data import Rows, Steps, loader, stage_spec, validation_batches
from layers import RMSNorm
from model import LLaVA
from parallel import World, print0
from templates import load_tokenizer

ROOT = Path(__file__).resolve().parent
DEMO = ROOT / "recipes" / "demo.toml"
PARTS = {"llm": "language_model", "vision": "vision_tower", "connector": "connector"}


# --------------------------------------------------------------------------------------- what trains, and how


def set_trainable(model: LLaVA, tune: Tune) -> dict[str, list[nn.Parameter]]:
    """Freeze and thaw as `tune` says -> the trainable parameters of each part. Raises UserError for a bad value."""
    model.requires_grad_(False)
    for part, attribute in PARTS.items():
        how, module = getattr(tune, part), getattr(model, attribute)
        kind, _, start = how.partition(":")
        if how == "full":
            module.requires_grad_(True)
        elif kind == "partial" and start.isdigit() and part != "connector":
            if int(start) >= len(module.blocks):
                raise UserError(
                    f"tune.{part}", f"{how}, but there are {len(module.blocks)} blocks", "name an earlier one"
                )
            module.blocks[int(start) :].requires_grad_(True)
            if part == "llm":
                module.model.norm.requires_grad_(True)
                module.lm_head.requires_grad_(True)
        elif how != "frozen":
            raise UserError(f"tune.{part}", f"{how!r} is not a way to tune", "write frozen, full or partial:N")
    return {part: [p for p in getattr(model, a).parameters() if p.requires_grad] for part, a in PARTS.items()}


def make_optimizer(model: LLaVA, stage: Stage) -> torch.optim.AdamW:
    """AdamW over what is trainable: one learning rate per part, no weight decay on biases and norms."""
    norms = {p for m in model.modules() if isinstance(m, (nn.LayerNorm, RMSNorm)) for p in m.parameters(False)}
    groups = []
    for part, attribute in PARTS.items():
        decayed, plain = [], []
        for name, p in getattr(model, attribute).named_parameters():
            if p.requires_grad:
                (plain if p in norms or name.endswith("bias") else decayed).append(p)
        peak = getattr(stage.rate, part) or stage.learning_rate
        groups += [{"params": decayed, "peak": peak, "weight_decay": stage.weight_decay},
                   {"params": plain, "peak": peak, "weight_decay": 0.0}]  # fmt: skip
    groups = [g for g in groups if g["params"]]
    if not groups:
        raise UserError("tune", "nothing is trainable in this stage", "set one part to full")
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, stage.beta2), eps=1e-8, fused=True)


def schedule(step: int, steps: int, warmup_ratio: float) -> float:
    """Linear warm-up from 0, then cosine to 0: the factor on the learning rate of step 0, 1, ..."""
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def update(optimizer: torch.optim.AdamW, stage: Stage, step: int, steps: int) -> float:
    """Clip, set the rates, step, clear. Returns the gradient norm before clipping; not finite = nothing was updated."""
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, stage.max_grad_norm).item()
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, steps, stage.warmup_ratio)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def use_bf16(precision: str, device: torch.device) -> bool:
    """auto: bf16 on GPUs and on CPUs with bf16 instructions; without them it is slower than fp32."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return any(torch.cpu.get_capabilities().get(flag) for flag in ("avx512_bf16", "amx_bf16"))


# --------------------------------------------------------------------------------------------- watching a run


class Watch:
    """The progress line, log.jsonl, and whether every trainable part moves. Only rank 0 prints and writes."""

    def __init__(self, file: Path, name: str, steps: int, trainable: dict[str, list[nn.Parameter]], world: World):
        self.file, self.name, self.steps, self.world = file, name, steps, world
        self.trainable = {part: ps for part, ps in trainable.items() if ps}
        self.start = self.last = time.perf_counter()
        self.tokens = self.images = self.wait = self.loss = self.count = 0.0
        self.first: int | None = None
        self.before = self._probe()

    def _probe(self) -> dict[str, list[Tensor]]:
        """A few values of every trainable tensor: enough to see whether it moves, at no memory."""
        return {part: [p.detach().flatten()[:64].clone() for p in ps] for part, ps in self.trainable.items()}

    def write(self, event: str, **values):
        if self.world.rank == 0:
            with open(self.file, "a") as f:
                f.write(json.dumps({"event": event, "stage": self.name, **values}) + "\n")

    def gradient_norms(self) -> dict[str, float]:
        """Per part, of the gradient that is about to be clipped."""
        return {
            part: torch.stack([p.grad.norm() for p in ps if p.grad is not None] or [torch.zeros(())]).norm().item()
            for part, ps in self.trainable.items()
        }

    def changes(self) -> dict[str, float]:
        """Per part, relative change of the probed weights since the stage began."""
        out = {}
        for part, now in self._probe().items():
            pairs = list(zip(now, self.before[part], strict=True))
            moved = sum((a - b).square().sum().item() for a, b in pairs)
            out[part] = math.sqrt(moved / max(1e-30, sum(b.square().sum().item() for _, b in pairs)))
        return out

    def step(self, step: int, loss: float, tokens: float, images: float, wait: float, log: dict | None):
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
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row = {
            "step": step + 1, "steps": self.steps, "loss": loss, **log, "tokens_per_s": self.tokens / seconds,
            "images_per_s": self.images / seconds, "data_wait": self.wait / seconds, "memory_gb": peak / 2**30,
            "seconds": now - self.start,
        }  # fmt: skip
        self.write("step", **row)
        print0(
            f"{self.name} {step + 1}/{self.steps}  loss {loss:.4f}  lr {log['learning_rate']:.2e}  "
            f"|g| {log['grad_norm']:.2f}  {row['tokens_per_s'] / 1000:.1f}k tok/s  {row['images_per_s']:.0f} img/s  "
            f"data {100 * row['data_wait']:.0f}%  {row['memory_gb']:.1f} GB  eta {int(eta) // 60}:{int(eta) % 60:02d}"
        )
        for part, change in log["weight_change"].items():
            if change == 0 and step > 0 and log["learning_rate"] > 0:
                print0(f"warning: {self.name}: tune.{part} is trainable but has not moved; is its rate 0?")
        self.last, self.loss, self.count, self.wait, self.tokens, self.images = now, 0.0, 0.0, 0.0, 0.0, 0.0


def forget_after(file: Path, stages: list[str], stage: int, step: int):
    """Drop the log rows that a resumed run will write again."""
    if not file.exists():
        return
    rows = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def stays(row: dict) -> bool:
        at = stages.index(row["stage"]) if row["stage"] in stages else len(stages)
        return at < stage or (at == stage and row.get("step", 0) <= step and row["event"] not in ("start", "end"))

    weights.write_file(file, "".join(line for line in rows if stays(json.loads(line))))


# -------------------------------------------------------------------------------------------------- the loop


@torch.no_grad()
def validate(model: LLaVA, batches, world: World) -> float:
    """Mean loss over the supervised tokens of all held-out rows."""
    loss = count = 0.0
    for batch in batches:
        loss += model.loss(*packed_arguments(batch, world.device)).item()
        count += batch.supervised
    loss, count = parallel.total([loss, count], world)
    return loss / max(1, count)


def packed_arguments(batch, device: torch.device) -> tuple:
    """What LLaVA.loss takes, on the device."""
    b = batch.to(device)
    return b.input_ids, b.labels, b.positions, b.cu_seqlens, b.max_seqlen, b.images


def train_stage(model: LLaVA, name: str, index: int, recipe: Recipe, world: World, start: int, moments: dict):
    """One pass of the loop: stage `name` from optimizer step `start`, with AdamW's `moments` if it is a resumed one."""
    stage, run = recipe.stage[name], recipe.train
    spec = stage_spec(recipe.model, stage)
    steps = Steps(Rows(stage.data, stage.images), spec, stage, run, world.rank, world.size)
    held_out = stage.validation and Rows(stage.validation, stage.images)
    trainable = set_trainable(model, stage.tune)
    optimizer = make_optimizer(model, stage)
    restore_moments(optimizer, model, moments, start)
    module = parallel.wrap(model, world)
    autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=use_bf16(run.precision, world.device))
    watch = Watch(Path(run.output) / "log.jsonl", name, len(steps), trainable, world)
    announce(watch, model, start, len(steps), steps)
    cuda = world.device.type == "cuda"

    for step, (part, wait) in enumerate(loader(steps, start, run.workers, cuda), start):
        torch.manual_seed(hash((run.seed, index, step, world.rank)))  # dropout etc. is a function of the position
        counts = [sum(b.supervised for b in part.batches), sum(len(b.input_ids) for b in part.batches),
                  sum(0 if b.images is None else len(b.images) for b in part.batches)]  # fmt: skip
        supervised, tokens, images = parallel.total(counts, world)
        loss = torch.zeros((), device=world.device)
        for i, batch in enumerate(part.batches):
            with parallel.accumulate(module, last=i == len(part.batches) - 1), autocast:
                part_loss = module(*packed_arguments(batch, world.device)) / supervised
                (part_loss * world.size).backward()  # DDP divides by the ranks
            loss += part_loss.detach()
        logs = (step + 1) % run.log_every == 0 or step + 1 == len(steps)
        norms = watch.gradient_norms() if logs else {}
        norm = update(optimizer, stage, step, len(steps))
        (loss,) = parallel.total([loss.item()], world)
        if not math.isfinite(norm):
            rows = sorted(r for b in part.batches for r in b.rows)
            what = f"loss {loss} and gradient norm {norm} at {name} step {step + 1}"
            fix = "lower the learning rate or look at these rows; the last checkpoint is good"
            raise UserError(f"{stage.data}:rows {rows}", what, fix)
        for message in part.skipped:
            watch.write("skipped", step=step + 1, row=message)
            print(f"skipped {message}", flush=True)
        rate = optimizer.param_groups[0]["lr"]
        watch.step(step, loss, tokens, images, wait, logs and {
            "learning_rate": rate, "grad_norm": norm, "grad_norms": norms, "weight_change": watch.changes(),
            "cut_tokens": sum(n for _, n in part.cut)} or None)  # fmt: skip
        if held_out and ((step + 1) % stage.validation_every == 0 or step + 1 == len(steps)):
            with autocast:
                batches = validation_batches(held_out, spec, stage, run, world.rank, world.size, print)
                value = validate(model, batches, world)
            watch.write("validation", step=step + 1, loss=value)
            print0(f"{name} {step + 1}/{len(steps)}  validation loss {value:.4f}")
        if (step + 1) % run.save_every == 0 and step + 1 < len(steps):
            save_checkpoint(model, recipe, index, step + 1, optimizer, world)
    watch.write("end", seconds=time.perf_counter() - watch.start)


# ---------------------------------------------------------------------------------------- before and after it


def announce(watch: Watch, model: LLaVA, start: int, steps: int, data: Steps):
    parameters = {part: sum(p.numel() for p in getattr(model, a).parameters()) for part, a in PARTS.items()}
    trainable = {part: sum(p.numel() for p in ps) for part, ps in watch.trainable.items()}
    watch.write("start", step=start, steps=steps, rows=len(data.rows), parameters=parameters, trainable=trainable)
    shares = ", ".join(
        f"{part} {n / 1e6:.2f}M{'' if trainable.get(part) else ' (frozen)'}" for part, n in parameters.items()
    )
    print0(f"{watch.name}: {len(data.rows)} rows, {steps} steps, {model.image_tokens} tokens per image; {shares}")


def trained_tensors(model: LLaVA, recipe: Recipe, upto: int) -> dict[str, Tensor]:
    """Every parameter that a stage up to this one trains; the others come from the recipe's own sources."""
    names = {}
    for stage in list(recipe.stage.values())[: upto + 1]:
        set_trainable(model, stage.tune)
        names |= {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return names


def save_checkpoint(model: LLaVA, recipe: Recipe, stage: int, step: int, optimizer, world: World):
    """Weights, AdamW's moments and the position: enough to go on as if nothing had happened."""
    if world.rank == 0:
        wanted = {p: p.requires_grad for p in model.parameters()}
        state = {f"weight.{n}": p for n, p in trained_tensors(model, recipe, stage).items()}
        for p, flag in wanted.items():
            p.requires_grad_(flag)
        if optimizer:
            for name, p in model.named_parameters():
                if p in optimizer.state:
                    state[f"exp_avg.{name}"] = optimizer.state[p]["exp_avg"]
                    state[f"exp_avg_sq.{name}"] = optimizer.state[p]["exp_avg_sq"]
        folder = Path(recipe.train.output) / "checkpoints"
        parallel.save_checkpoint(
            folder, f"{stage:02d}-{step:08d}", state, {"stage": stage, "step": step}, recipe.train.keep
        )
    parallel.barrier(world)


def restore_moments(optimizer: torch.optim.AdamW, model: LLaVA, moments: dict[str, Tensor], step: int):
    for name, p in model.named_parameters():
        if f"exp_avg.{name}" in moments:
            optimizer.state[p] = {
                "step": torch.tensor(float(step), device=p.device),
                "exp_avg": moments[f"exp_avg.{name}"],
                "exp_avg_sq": moments[f"exp_avg_sq.{name}"],
            }


def open_output(recipe: Recipe, world: World) -> bool:
    """Claim the output folder; False if this very run is finished. Raises UserError if another recipe lives there."""
    output, text = Path(recipe.train.output), config.dumps(recipe)
    saved = output / "recipe.toml"
    begun = (output / "log.jsonl").exists()  # a start that failed on a mistake has claimed nothing
    if begun and saved.exists() and saved.read_text() != text:
        odd = next(
            (b for a, b in zip(saved.read_text().splitlines(), text.splitlines(), strict=False) if a != b), "its length"
        )
        raise UserError(
            saved, f"another recipe was trained here (now: {odd})", "set train.output, or remove the folder"
        )
    if (output / "config.json").exists():
        return False
    if world.rank == 0:
        weights.write_file(saved, text)
    parallel.barrier(world)
    return True


def main(argv: list[str]):
    if argv == ["--list"]:
        return plan.print_recipes(DEMO.parent)
    recipe, path = config.load([a for a in argv if a != "--dry-run"], DEMO)
    made = Path(next(iter(recipe.stage.values())).data).parent if path.resolve() == DEMO else None
    if "--dry-run" in argv:
        return plan.dry_run(recipe, path, set_trainable, made)
    run = recipe.train
    world = parallel.setup(run.device)
    if made and world.rank == 0 and not made.exists():
        demo_world.write(made)
    parallel.barrier(world)
    for name, stage in recipe.stage.items():  # before anything is loaded: what is missing later is missing now
        for file in filter(None, (stage.data, stage.validation)):
            if not Path(file).is_file():
                raise UserError(f"{path}:stage.{name}", f"no such file {file}", "correct data or validation")
    if not open_output(recipe, world):
        print0(f"{run.output} is finished: this recipe's model is there; set train.output for another run")
        return
    output, stages = Path(run.output), list(recipe.stage)
    model = LLaVA.from_parts(recipe.model, recipe.stage[stages[-1]].template, run.seed)
    model.language_model.model.gradient_checkpointing = run.gradient_checkpointing
    model.vision_tower.gradient_checkpointing = run.gradient_checkpointing
    moments, first, start = {}, 0, 0
    if resumed := parallel.newest_checkpoint(output / "checkpoints", torch.device("cpu")):
        tensors, state = resumed
        first, start = state["stage"], state["step"]
        with torch.no_grad():
            for name, p in model.named_parameters():
                if f"weight.{name}" in tensors:
                    p.copy_(tensors.pop(f"weight.{name}"))
        moments = {k: v.to(world.device) for k, v in tensors.items()}
        print0(f"resumed: {first} of {len(stages)} stages done, {start} steps of the next")
    model.to(world.device)
    if world.rank == 0:
        forget_after(output / "log.jsonl", stages, first, start)
    for index in range(first, len(stages)):
        train_stage(model, stages[index], index, recipe, world, start, moments)
        save_checkpoint(model, recipe, index + 1, 0, None, world)
        moments, start = {}, 0
    if world.rank == 0:
        load_tokenizer(weights.resolve(recipe.model.tokenizer or recipe.model.llm, small=True)).save(output)
        model.save(output)
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    print0(f'done: {output}   try: python generate.py --model {output} --image FILE --prompt "..."')


if __name__ == "__main__":
    try:
        config.cli(main, __doc__, fields_help=True)
    finally:
        parallel.shutdown()
