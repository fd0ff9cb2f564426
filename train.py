"""Train a small multimodal model, stage by stage, as a recipe says.

    torchrun train.py                                             # the demo: an embedded world, a few minutes on a CPU
    torchrun train.py recipes/tinyllama-clip-base.toml            # one GPU
    torchrun --nproc-per-node 8 train.py recipes/qwen2-siglip-base.toml train.output=out/mine
    python train.py RECIPE [section.key=value ...]                # without torchrun: one process
    python train.py --list                                        # every recipe and its published scores
    python train.py RECIPE [section.key=value ...] --dry-run      # its files, parameters, steps, memory, hours
    python train.py --help                                        # every field of a recipe

A killed run goes on where it stopped when the same command is given again, on any number of ranks. SIGTERM or SIGINT
let it finish the step, save and leave a file PREEMPTED (torchrun allows 30 seconds for that). What comes out
(train.output) is a folder that generate.py, evaluate.py and LLaVA.from_pretrained open.

One optimizer step is exactly `global_batch` samples. Its loss is the sum over all supervised tokens of the step
divided by their number, over micro-batches and ranks, so neither of them changes what is computed.
"""

from __future__ import annotations

import math
import shutil
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import config
import lora
from checkpoints import peft, resume, seal
from checkpoints.files import resolve, write_file
from config import Recipe, Stage, Tune, UserError
from data import Steps, loader, stage_spec, token_counts, validation_batches
from demo import world as demo_world
from inputs.rows import Mixture, files, open_rows
from inputs.tokenizer import load_tokenizer
from layers import RMSNorm
from model import LLaVA
from packing import EMPTY, Batch
from training import planner, ranks, run_log
from training.ranks import World, print0

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
                    f"tune.{part}",
                    f"{how}, but there are {len(module.blocks)} blocks",
                    "name an earlier one",
                )
            module.blocks[int(start) :].requires_grad_(True)
            if part == "llm":
                module.model.norm.requires_grad_(True)
                module.lm_head.requires_grad_(True)
        elif how in ("lora", *lora.QUANTIZED):
            lora.freeze(module)
        elif how != "frozen":
            ways = f"frozen, full, lora, {', '.join(lora.QUANTIZED)} or partial:N"
            raise UserError(f"tune.{part}", f"{how!r} is not a way to tune", f"write {ways}")
    return {
        part: [p for p in getattr(model, a).parameters() if p.requires_grad]
        for part, a in PARTS.items()
    }


def make_optimizer(model: LLaVA, stage: Stage) -> torch.optim.AdamW:
    """AdamW over what is trainable: one learning rate per part, no weight decay on biases and norms."""
    norms = {
        p
        for m in model.modules()
        if isinstance(m, (nn.LayerNorm, RMSNorm))
        for p in m.parameters(False)
    }
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
    total = ranks.gradient_norm(parameters)
    norm = total.item()
    if math.isfinite(norm):
        nn.utils.clip_grads_with_norm_(parameters, stage.max_grad_norm, total)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, steps, stage.warmup_ratio)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def round_frozen(model: LLaVA):
    """Frozen matrices in bfloat16, half the memory: autocast would round them the same way in every forward pass.
    The checkpoints and the final model take theirs from where they came from, unrounded."""
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    for m in model.modules():
        if isinstance(m, nn.Linear) and not m.weight.requires_grad and m.weight not in tables:
            m.weight = nn.Parameter(m.weight.bfloat16(), requires_grad=False)


# -------------------------------------------------------------------------------------------------- the loop


def validate(module: nn.Module, batches, world: World) -> float:
    """Mean loss over the supervised tokens of all held-out rows."""
    loss = count = 0.0
    with ranks.forward_only(module) as forward:
        for batch in ranks.together(batches, module, world):
            loss += forward(on_device(batch, world.device)).item()
            count += batch.supervised if batch else 0
    loss, count = ranks.total([loss, count], world)
    return loss / max(1, count)


def on_device(batch: Batch | None, device: torch.device) -> Batch:
    """The batch on the device. None, where other ranks have a batch: one token that teaches nothing."""
    return (batch or EMPTY).to(device)


def refuse(part, losses: list[Tensor], steps: Steps, where: str, world: World):
    """Stop all ranks with the rows whose loss is not finite, or all of the step if only a gradient is not."""
    bad = [b.rows for b, loss in zip(part.batches, losses, strict=False) if not loss.isfinite()]
    named = ranks.collect(sorted(r for rows in bad for r in rows), world)
    named = named or ranks.collect(sorted(r for b in part.batches for r in b.rows), world)
    rows = ", ".join(steps.rows.where(r) for r in named[:16]) + f" and {len(named) - 16} more" * (
        len(named) > 16
    )
    raise UserError(
        rows, where, "lower the learning rate or mend these rows; the last checkpoint is good"
    )


def train_stage(
    model: LLaVA, index: int, recipe: Recipe, world: World, start: int, tensors: dict
) -> bool:
    """One pass of the loop: a stage from optimizer step `start`. `tensors` of the checkpoint that `model` comes from
    hold AdamW's moments if it is a resumed one. Saves what the next stage begins with; False: preempted."""
    name, run = list(recipe.stage)[index], recipe.train
    stage, output = recipe.stage[name], Path(run.output)
    spec = stage_spec(recipe.model, stage)
    rows = Mixture.of(stage, f"stage.{name}")
    counts = (
        token_counts(rows, spec, run.workers) if world.size > 1 else None
    )  # ranks share the tokens evenly
    steps = Steps(rows, spec, stage, run, world.rank, world.size, counts=counts)
    held_out = stage.validation and open_rows(stage.validation, stage.images)
    set_trainable(model, stage.tune)
    if world.rank == 0:
        check_room(model, recipe, output / "checkpoints")
    bf16, cuda = ranks.use_bf16(run.precision, world.device), world.device.type == "cuda"
    if bf16:
        round_frozen(model)
    model.to(world.device)
    share = planner.peak_share(model, stage, steps.rows, world.device) / world.size
    if run.compile:
        model.compile_blocks()
    mode = ranks.choose(run.parallel, model, world)
    module = ranks.wrap(model, world, mode)
    trainable = {
        part: [p for p in getattr(model, a).parameters() if p.requires_grad]
        for part, a in PARTS.items()
    }
    optimizer = make_optimizer(model, stage)
    restore_moments(optimizer, model, tensors, start)
    autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=bf16)
    log = run_log.Watch(output / "log.jsonl", name, len(steps), trainable, world, share)
    if world.rank == 0:
        log.record = run_log.recorder(run.log, output, recipe)
    announce(log, model, start, steps, mode, world)
    ranks.heed_signals()

    for step, (part, wait) in enumerate(loader(steps, start, run.workers, cuda), start):
        torch.manual_seed(
            hash((run.seed, index, step, world.rank))
        )  # dropout is a function of the position
        counts = [sum(b.supervised for b in part.batches), sum(len(b.input_ids) for b in part.batches),
                  sum(0 if b.images is None else len(b.images) for b in part.batches)]  # fmt: skip
        supervised, tokens, images = ranks.total(counts, world)
        losses = []
        for i, batch in enumerate(ranks.together(part.batches, module, world)):
            with ranks.accumulate(module, last=i + 1 == len(part.batches)), autocast:
                loss = module(on_device(batch, world.device)) / supervised
                (loss * world.size).backward()  # DDP and FSDP divide by the ranks
            losses.append(loss.detach())
        loss, stop = ranks.total([sum(losses).item(), len(ranks.asked())], world)
        last = step + 1 == len(steps)
        logs = last or (step + 1) % run.log_every == 0
        norms = log.gradient_norms() if logs else {}
        norm = update(optimizer, stage, step, len(steps)) if math.isfinite(loss) else loss
        if not math.isfinite(norm):
            what = (
                f"loss {loss}, gradient norm {norm} at {name} step {step + 1}: nothing was updated"
            )
            refuse(part, losses, steps, what, world)
        for message in part.skipped:
            log.write("skipped", step=step + 1, row=message)
            print(f"skipped {message}", flush=True)
        rate = optimizer.param_groups[0]["lr"]
        log.step(step, loss, tokens, images, wait, logs and {
            "learning_rate": rate, "grad_norm": norm, "grad_norms": norms, "weight_change": log.changes(),
            "cut_tokens": sum(n for _, n in part.cut)} or None)  # fmt: skip
        value = None
        if held_out and ((step + 1) % stage.validation_every == 0 or last):
            batches = validation_batches(held_out, spec, stage, run, world.rank, world.size, print)
            with autocast:
                value = validate(module, batches, world)
            log.validation(step + 1, value)
            if run.answers:
                with ranks.forward_only(module), autocast:
                    log.answers(step + 1, model, held_out, spec, run.answers)
        if (
            last
            or stop
            or (step + 1) % run.save_every == 0
            or (run.keep_best and value is not None)
        ):
            state = {
                "stage": index + last,
                "step": 0 if last else step + 1,
                "trained": name,
                "validation": value,
            }
            copies = snapshot(model, tensors, None if last else optimizer, world)
            if world.rank == 0:
                resume.save(output / "checkpoints", run.keep, copies, state, name * run.keep_best)
        if stop and not last:
            why = ", ".join(ranks.asked()) or "another rank was told to"
            print0(f"{name} {step + 1}/{len(steps)}  stops: {why}")
            return False
    log.write("end", seconds=time.perf_counter() - log.start)
    return True


# ---------------------------------------------------------------------------------------- before and after it


def announce(log: run_log.Watch, model: LLaVA, start: int, steps: Steps, mode: str, world: World):
    parameters = {part: lora.count(getattr(model, a)) for part, a in PARTS.items()}
    trainable = {part: sum(p.numel() for p in ps) for part, ps in log.trainable.items()}
    rows, ranks = len(steps.rows), f"; {mode} on {world.size} ranks" * (world.size > 1)
    log.write(
        "start", step=start, steps=len(steps), rows=rows, parameters=parameters, trainable=trainable
    )
    shares = ", ".join(
        f"{part} {n / 1e6:.2f}M{'' if trainable.get(part) else ' (frozen)'}"
        for part, n in parameters.items()
    )
    print0(
        f"{log.name}: {rows} rows, {len(steps)} steps, {model.image_tokens} tokens per image; {shares}{ranks}"
    )


def build(recipe: Recipe, tensors: dict[str, Tensor], stage: Stage) -> LLaVA:
    """The recipe's own parts, quantized where `stage` says so, and over them the trained weights of a checkpoint.

    Raises UserError if they do not fit.
    """
    kinds = {
        PARTS[p]: lora.QUANTIZED[way]
        for p, way in vars(stage.tune).items()
        if way in lora.QUANTIZED
    }
    load = {name: partial(lora.load_quantized, kind=kind) for name, kind in kinds.items()}
    model = LLaVA.from_parts(
        recipe.model, list(recipe.stage.values())[-1].template, recipe.train.seed, load
    )
    for name, kind in kinds.items():
        lora.quantize(getattr(model, name), kind)  # what was not loaded
    model.language_model.model.gradient_checkpointing = recipe.train.gradient_checkpointing
    model.vision_tower.gradient_checkpointing = recipe.train.gradient_checkpointing
    peft.adapt(model, list(recipe.stage.values()), PARTS)
    own = dict(model.named_parameters())
    for key, t in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "weight":
            if name not in own or own[name].shape != t.shape:
                raise UserError(
                    f"checkpoint:{name}",
                    f"{[*t.shape]} has no place in this model",
                    "give its own recipe",
                )
            own[name].data.copy_(t)
    return model


def snapshot(
    model: LLaVA, tensors: dict[str, Tensor], optimizer, world: World
) -> dict[str, Tensor]:
    """Every weight trained so far, and AdamW's moments: copies on rank 0's CPU. Weights that only an earlier stage
    trained are those of its checkpoint, as read."""
    out = {k: v for k, v in tensors.items() if k.startswith("weight.")}
    for name, p in model.named_parameters():
        named = {"weight": p} if p.requires_grad else {}
        if optimizer and p in optimizer.state:
            named |= {k: optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq")}
        for kind, t in named.items():
            t = ranks.whole(t.detach())
            if world.rank == 0:
                out[f"{kind}.{name}"] = t.to("cpu", copy=True)
    return out


def restore_moments(
    optimizer: torch.optim.AdamW, model: LLaVA, moments: dict[str, Tensor], step: int
):
    for name, p in model.named_parameters():
        if f"exp_avg.{name}" in moments:
            both = {k: ranks.like(moments[f"{k}.{name}"], p) for k in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **both}


def check_room(model: LLaVA, recipe: Recipe, folder: Path):
    """Raise UserError unless the disk takes this stage's checkpoints and the final model."""
    run, one = recipe.train, 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    more = max(
        1, run.keep + 1 + run.keep_best - len(seal.listed(folder))
    )  # one while it is being written
    resume.need_room(
        folder.parent, one * more + 4 * lora.count(model), f"{more} checkpoints and the model"
    )


def export(recipe: Recipe, tensors: dict[str, Tensor], output: Path):
    """The finished model with all that belongs to it; config.json, written last, says that it is finished."""
    folder, c, last = output / "checkpoints", recipe.model, list(recipe.stage.values())[-1]
    start = c.llm or c.checkpoint
    tokenizer = load_tokenizer(resolve(c.text, small=True))
    with resume.writing(output):
        if recipe.train.keep_best and (best := seal.best(folder, list(recipe.stage)[-1])):
            tokenizer.save(output / "best")
            peft.finish(build(recipe, resume.read(best)[0], last), output / "best", start).save(
                output / "best"
            )
        tokenizer.save(output)
        run_log.finish(output, recipe)
        peft.finish(build(recipe, tensors, last), output, start).save(output)
        shutil.rmtree(folder, ignore_errors=True)


def open_output(recipe: Recipe, world: World) -> bool:
    """Claim the output folder; False if this very run is finished. Raises UserError if another recipe lives there."""
    output, text = Path(recipe.train.output), config.dumps(recipe)
    saved = output / "recipe.toml"
    begun = (output / "log.jsonl").exists()  # a start that failed on a mistake has claimed nothing
    if begun and saved.exists() and saved.read_text() != text:
        odd = next(
            (
                b
                for a, b in zip(saved.read_text().splitlines(), text.splitlines(), strict=False)
                if a != b
            ),
            "its length",
        )
        raise UserError(
            saved,
            f"another recipe was trained here (now: {odd})",
            "set train.output, or remove the folder",
        )
    if (output / "config.json").exists():
        return False
    if world.rank == 0:
        write_file(saved, text)
    ranks.barrier(world)
    return True


def main(argv: list[str]):
    if argv == ["--list"]:
        return planner.print_recipes(DEMO.parent)
    recipe, path = config.load([a for a in argv if a != "--dry-run"], DEMO)
    made = Path(next(iter(recipe.stage.values())).data).parent if path.resolve() == DEMO else None
    if "--dry-run" in argv:
        return planner.dry_run(recipe, path, partial(peft.adapt, parts=PARTS), set_trainable, made)
    run, stages, output = recipe.train, list(recipe.stage), Path(recipe.train.output)
    world = ranks.setup(run.device)
    if made and world.rank == 0 and not made.exists():
        demo_world.write(made)
    ranks.barrier(world)
    for (
        name,
        stage,
    ) in recipe.stage.items():  # before anything is loaded: what is missing later is missing now
        for file in filter(
            None, (stage.data, stage.validation, *(s.data for s in stage.mixture.values()))
        ):
            if not files(file):
                raise UserError(
                    f"{path}:stage.{name}", f"no such file {file}", "correct data or validation"
                )
    if run.keep < 1 or (run.keep_best and not recipe.stage[stages[-1]].validation):
        raise UserError(f"{path}:train", "keep is at least 1, and keep_best needs a last stage with validation",
                        "correct keep, or write stage.NAME.validation")  # fmt: skip
    claimed = resume.lock(output) if world.rank == 0 else None
    if not open_output(recipe, world):
        print0(
            f"{run.output} is finished: this recipe's model is there; set train.output for another run"
        )
        return
    folder, explicit = output / "checkpoints", run.resume
    while True:  # a stage begins with what a restart would begin with
        chosen = ranks.share(resume.pick(folder, explicit) if world.rank == 0 else None, world)
        tensors, state = resume.read(chosen) if chosen else ({}, {"stage": 0, "step": 0})
        index, start = state["stage"], state["step"]
        if chosen and explicit is not None:
            print0(f"resumed: {index} of {len(stages)} stages done, {start} steps of the next")
        if world.rank == 0:
            run_log.forget_after(output / "log.jsonl", stages, index, start)
            (output / "PREEMPTED").unlink(missing_ok=True)
        if index == len(stages):
            break
        explicit = None
        model = build(recipe, tensors, list(recipe.stage.values())[index])
        if not train_stage(model, index, recipe, world, start, tensors):
            if world.rank == 0:
                resume.wait()
                write_file(output / "PREEMPTED", "the same command goes on from here\n")
            print0(f"preempted: saved in {folder}; the same command goes on from there")
            return
        ranks.barrier(world)
    if world.rank == 0:
        export(recipe, tensors, output)
    ranks.barrier(world)
    print0(f'done: {output}   try: python generate.py --model {output} --image FILE --prompt "..."')
    del claimed  # held until here


if __name__ == "__main__":
    with ranks.last_word():
        config.cli(main, __doc__, fields_help=True)
