"""Train a small multimodal model, stage by stage, as a recipe says.

A finished model learns your own pictures, from about thirty on. They are a folder with a table
metadata.csv, whose rows are

    file_name,question,answer
    bella.jpg,Who is this?,Bella

    python data.py check --data FOLDER
    torchrun train.py recipes/own.toml model.checkpoint=DIR stage.own.data=FOLDER

The number of rows decides batch, epochs, warm-up, rank and rate, which are printed. Everything that
can be trained:

    torchrun train.py                                           # the demo: a few minutes on a CPU
    torchrun train.py recipes/tinyllama-clip-base.toml          # one GPU
    torchrun --nproc-per-node 8 train.py recipes/qwen2-siglip-base.toml train.output=out/mine
    python train.py RECIPE [section.key=value ...]              # without torchrun: one process
    python train.py --list                                      # all recipes, published scores
    python train.py RECIPE [section.key=value ...] --dry-run    # files, steps, memory, hours
    python train.py RECIPE ... --dry-run --memory 24            # what to lower for GPUs of 24 GB
    python train.py --help                                      # every field of a recipe

The result is the folder train.output. generate.py, evaluate.py and LLaVA.from_pretrained open it.
A killed run goes on where it stopped when the same command is given again, on any number of ranks.
If what decides its result has changed (a field, rows, weights), it says what and refuses to.
SIGTERM or SIGINT lets it finish the step, save, and leave a file PREEMPTED; torchrun allows 30
seconds for that.

One optimizer step is exactly `global_batch` rows. Its loss is the sum over all supervised tokens
of the step, divided by their number. The sums run over all micro-batches and all ranks, so neither
the number of ranks nor the size of micro-batches changes what is computed.

This file, from top to bottom; the loop alone is worth reading first:

    set_trainable, make_optimizer, schedule, update    what trains, and how
    StageRun, train_stage                              the loop
    prepare                                            what the loop needs, made from a recipe
    run_stages, main                                   stage after stage; the command line

The files around it:

    config.py                  what a recipe says
    data.py                    rows -> steps of packed micro-batches
    model.py                   the model and its loss
    training/ranks.py          the processes of a run
    training/parallel.py       one model on all of them: DDP, FSDP
    training/run_log.py        what is reported
    training/state.py          a model from a checkpoint and into one
    training/output.py         the output folder, and whether a start may go on there
    training/small_sets.py     what a recipe leaves to the rows: batch, epochs, rank ...
    training/made_from.py      what rows, pictures and weights the run is made from
    training/planner.py        --list and --dry-run, by estimate.py and memory.py
"""

from __future__ import annotations

import contextlib
import gc
import math
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import command_line
import config
import lora
from checkpoints import peft, resume, weights
from checkpoints.files import write_file, writing
from checkpoints.layouts import config_from_recipe
from config import PARTS, Recipe, Stage, Train, Tune, UserError, printable
from data import Steps, loader, stage_spec, token_counts, validation_batches
from demo import world
from inputs import hub
from inputs.holdout import StageRows, check_validation, open_stage, validation_file
from inputs.rows import Rows, is_here
from inputs.sample import SampleSpec
from inputs.tiling import read_grids
from layers import RMSNorm
from model import LLaVA
from packing import Batch, views_in
from training import estimate, output, parallel, planner, run_log, signals, small_sets, state
from training.parallel import ParallelModel
from training.ranks import Ranks, last_word, print0
from training.recorder import Recorder
from training.run_log import RunLog

ROOT = Path(__file__).resolve().parent
DEMO = ROOT / "recipes" / "demo.toml"
TO_SAVE_MEMORY = "lower stage.NAME.micro_batch_tokens, or set train.gradient_checkpointing=true"

LOOKED_AT = 256  # rows of a stage, for whether they have pictures
FEW_STEPS = 10  # a stage of fewer optimizer steps is most likely a mistake


# ----------------------------------------------------------------------------- what trains, and how


def set_trainable(model: LLaVA, tune: Tune):
    """Freeze the model, then make trainable what `tune` says.

    Raises UserError for a way that does not exist, or a block that the model does not have.
    """
    model.requires_grad_(False)
    for part, attribute in PARTS.items():
        module = getattr(model, attribute)
        how = getattr(tune, part)
        is_partial = re.fullmatch("partial:[0-9]{1,6}", how) and part != "connector"

        if how == "frozen":
            continue
        elif how == "full":
            module.requires_grad_(True)
        elif how == "lora" or how in lora.QUANTIZED:
            lora.freeze(module)
        elif is_partial:
            first = int(how.removeprefix("partial:"))
            if first >= len(module.blocks):
                what = f"{how}, but there are {len(module.blocks)} blocks"
                raise UserError(f"tune.{part}", what, "name an earlier one")
            module.blocks[first:].requires_grad_(True)

            # What comes after the blocks trains with them. An encoder has nothing there.
            if part == "llm":
                module.model.norm.requires_grad_(True)
                module.lm_head.requires_grad_(True)
        else:
            ways = f"frozen, full, lora, {', '.join(lora.QUANTIZED)} or partial:N"
            raise UserError(f"tune.{part}", f"{how!r} is not a way to tune", f"write {ways}")


def trainable_parameters(model: LLaVA) -> dict[str, list[nn.Parameter]]:
    """Return the trainable parameters of each part."""
    trainable = {}
    for part, attribute in PARTS.items():
        parameters = getattr(model, attribute).parameters()
        trainable[part] = [p for p in parameters if p.requires_grad]
    return trainable


def make_optimizer(model: LLaVA, stage: Stage) -> torch.optim.AdamW:
    """Return AdamW over what is trainable.

    Each part of the model may have its own learning rate. `peak` of a group is its rate at the end
    of the warm-up; `update` scales it by the schedule. Biases and the parameters of norms have no
    weight decay.
    """
    of_norms = set()
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, RMSNorm)):
            of_norms.update(module.parameters(recurse=False))

    groups = []
    for part, attribute in PARTS.items():
        decayed = []
        not_decayed = []
        for name, p in getattr(model, attribute).named_parameters():
            if not p.requires_grad:
                continue
            if p in of_norms or name.endswith("bias"):
                not_decayed.append(p)
            else:
                decayed.append(p)

        peak = learning_rate(stage, part)
        if decayed:
            groups.append({"params": decayed, "peak": peak, "weight_decay": stage.weight_decay})
        if not_decayed:
            groups.append({"params": not_decayed, "peak": peak, "weight_decay": 0.0})

    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, stage.beta2), eps=1e-8, fused=True)


def learning_rate(stage: Stage, part: str) -> float:
    """Return the peak of the learning rate of one of PARTS."""
    return getattr(stage.rate, part) or stage.learning_rate


def schedule(step: int, steps: int, warmup_ratio: float) -> float:
    """Return the factor on the learning rate of step 0, 1, ..., steps - 1.

    It rises linearly from 0 to 1 during the warm-up, then falls to 0 along half a cosine. That is
    Hugging Face's schedule, whose first step has rate 0 if there is any warm-up. A stage of one
    step would learn nothing by it, so there that step has the full rate.
    """
    if steps == 1:
        return 1.0
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def update(optimizer: torch.optim.AdamW, stage: Stage, step: int, steps: int) -> float:
    """Clip the gradients, set the learning rates, step, and clear the gradients.

    Returns the gradient norm before clipping. If it is not finite, nothing was updated.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total_norm = parallel.gradient_norm(parameters)
    norm = total_norm.item()  # the same on all ranks
    if not math.isfinite(norm):
        return norm

    nn.utils.clip_grads_with_norm_(parameters, stage.max_grad_norm, total_norm)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * schedule(step, steps, stage.warmup_ratio)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def frozen_matrices(model: LLaVA) -> set[nn.Parameter]:
    """Return the frozen matrices that autocast would round to bfloat16 in every forward pass.

    Keeping them rounded halves their memory. Checkpoints and the final model are not affected: they
    take frozen weights unrounded from where those came from.
    """
    # Autocast leaves embeddings as they are, because they are looked up and not multiplied. The
    # weight of a head may be tied to them, and then it must stay, too.
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    return {p for p in matrices - tables if not p.requires_grad}


def round_frozen(model: LLaVA):
    """Round frozen matrices where they are. In a run, `ParallelModel` does it on the way."""
    for p in frozen_matrices(model):
        p.data = p.data.bfloat16()


# ----------------------------------------------------------------------------------------- the loop


@dataclass
class StageRun:
    """What the loop of one stage works with, made by `prepare`."""

    # What the recipe says, and who does it.
    name: str  # of the stage
    index: int  # of the stage in the recipe
    stage: Stage
    options: Train
    ranks: Ranks

    # The data.
    steps: Steps  # this rank's share of each optimizer step
    spec: SampleSpec  # how a row becomes a sample
    held_out: Rows | None  # the rows of the validation loss

    # What learns.
    model: LLaVA
    parallel: ParallelModel  # the same model, as all ranks train it
    optimizer: torch.optim.AdamW
    autocast: torch.autocast

    # What is reported and saved.
    log: RunLog
    begun_with: dict[str, Tensor]  # the tensors of the checkpoint that the model comes from
    origin: dict  # what the run is made from, for its checkpoints; only rank 0 knows it


def train_stage(run: StageRun, start: int) -> bool:
    """Train one stage from optimizer step `start`. Return False if told to stop before its end.

    The end of a stage is saved, too: the next one begins with that checkpoint.
    """
    options, ranks, log = run.options, run.ranks, run.log
    on_gpu = ranks.device.type == "cuda"
    loaded = loader(run.steps, start, options.workers, pin_memory=on_gpu)

    for step, (share, waited) in enumerate(loaded, start):
        done = step + 1  # steps, with this one
        is_last = done == len(run.steps)

        # Dropout depends on the place in the run and on nothing before it, so a resumed run draws
        # what an uninterrupted one draws. Integers hash alike in every process.
        torch.manual_seed(hash((options.seed, run.index, step, ranks.rank)))

        # Gather: every loss is divided by the supervised tokens of the whole step, on all ranks.
        batches = share.batches
        supervised, tokens, images = ranks.totals(count_batches(batches))

        # Forward and backward, one micro-batch at a time.
        losses = []
        for i, batch in enumerate(run.parallel.in_step(batches)):
            is_last_batch = i + 1 == len(batches)
            with run.parallel.accumulating(last=is_last_batch), run.autocast:
                loss = run.parallel.loss(batch.to(ranks.device)) / supervised
                run.parallel.backward(loss)
            losses.append(loss.detach())

        # All ranks must agree on these two, or they would wait for each other for ever.
        loss, stops = ranks.totals([sum(losses).item(), len(signals.heard())])

        # The update clears the gradients, so the norms that are logged of each part come first.
        logs = is_last or done % options.log_every == 0
        norms_of_parts = {}
        if logs:
            norms_of_parts = log.gradient_norms()

        # Update. A loss or gradient that is not finite stops all ranks before the weights change.
        if math.isfinite(loss):
            norm = update(run.optimizer, run.stage, step, len(run.steps))
        else:
            norm = loss  # the gradients are no better
        if not math.isfinite(norm):
            refuse(run, batches, losses, f"loss {loss}, gradient norm {norm}", step)

        # Log.
        for message in share.skipped:
            log.write("skipped", step=done, row=message)
            print(f"skipped {message}", flush=True)
        log.step(step, loss, tokens, images, waited)
        if logs:
            learning_rate = run.optimizer.param_groups[0]["lr"]
            log.line(step, learning_rate, norm, norms_of_parts, share.cut)

        # Validate.
        validation = None
        if run.held_out and (is_last or done % run.stage.validation_every == 0):
            validation = validate_and_log(run, step)

        # Save.
        may_be_best = options.keep_best and validation is not None
        if is_last or stops or may_be_best or done % options.save_every == 0:
            save_checkpoint(run, step, validation)
        if stops and not is_last:
            why = ", ".join(signals.heard()) or "another rank was told to"
            print0(f"{run.name} {done}/{len(run.steps)}  stops: {why}")
            return False

    log.write("end", seconds=time.perf_counter() - log.begin)
    return True


def count_batches(batches: list[Batch]) -> list[int]:
    """Return the numbers of supervised tokens, of all tokens, and of images (tiles, frames)."""
    supervised = tokens = images = 0
    for batch in batches:
        supervised += batch.supervised
        tokens += len(batch.input_ids)
        images += views_in(batch.shapes)
    return [supervised, tokens, images]


def refuse(run: StageRun, batches: list[Batch], losses: list[Tensor], found: str, step: int):
    """Stop all ranks with a UserError that names the rows of micro-batches without a finite loss.

    If only a gradient is not finite, no row can be told from the others: all of the step are named.
    """
    own_bad = []
    own_all = []
    for batch, loss in zip(batches, losses, strict=False):  # fsdp has losses of empty batches, too
        own_all += batch.rows
        if not loss.isfinite():
            own_bad += batch.rows

    # A row of several samples is named once.
    named = run.ranks.collect(sorted(set(own_bad)))
    if not named:
        named = run.ranks.collect(sorted(set(own_all)))

    rows = ", ".join(run.steps.rows.where(row) for row in named[:16])
    if len(named) > 16:
        rows += f" and {len(named) - 16} more"
    what = f"{found} at {run.name} step {step + 1}: nothing was updated"
    fix = "lower the learning rate or mend these rows; the last checkpoint is good"
    raise UserError(rows, what, fix)


def validate(model: ParallelModel, batches: Iterable[Batch]) -> float:
    """Return the mean loss over the supervised tokens of all held-out rows; NaN without any."""
    loss = supervised = 0.0
    with model.forward_only() as forward:
        for batch in model.in_step(batches):
            loss += forward(batch.to(model.ranks.device)).item()
            supervised += batch.supervised

    loss, supervised = model.ranks.totals([loss, supervised])
    if not supervised:
        return math.nan
    return loss / supervised


def validate_and_log(run: StageRun, step: int) -> float | None:
    """Return the loss on the held-out rows after this step, and report it and a few answers.

    Held-out rows only report. If one of them is bad and may not be skipped, there is no loss this
    time: that is said, training goes on, and None is returned.
    """
    ranks, log = run.ranks, run.log
    failures: list[str] = []
    batches = validation_batches(
        run.held_out,
        run.spec,
        run.stage,
        run.options,
        ranks.rank,
        ranks.size,
        print,
        pin_memory=ranks.device.type == "cuda",
    )
    loss = 0.0
    try:
        with run.autocast:
            loss = validate(run.parallel, until_failure(batches, failures))
    except Exception as e:
        # With several ranks, a failed forward pass ends the run: the others wait in theirs.
        if ranks.size > 1:
            raise
        failures.append(run_log.why(e))

    # All ranks must agree on whether there is a loss.
    failures = ranks.collect(failures)
    if not failures and not math.isfinite(loss):
        failures = [f"no row is usable, or a loss is not finite ({loss})"]

    validation = None
    if failures:
        log.failed(step + 1, "validation", failures[0])
    else:
        log.validation(step + 1, loss)
        validation = loss

    if run.options.answers:
        with run.parallel.forward_only(), run.autocast:
            log.answers(step + 1, run.model, run.held_out, run.spec, run.options.answers)
    return validation


def until_failure(batches: Iterable[Batch], failures: list[str]) -> Iterator[Batch]:
    """Yield the batches up to one that cannot be made, and note why in `failures`.

    An exception would leave the other ranks waiting for this one.
    """
    try:
        yield from batches
    except Exception as e:
        failures.append(run_log.why(e))


def save_checkpoint(run: StageRun, step: int, validation: float | None):
    """Write a checkpoint, from which a run goes on after this step. All ranks must call it."""
    optimizer: torch.optim.AdamW | None = run.optimizer
    if step + 1 < len(run.steps):
        place = {"stage": run.index, "step": step + 1}
    else:
        # The next stage begins, and makes an optimizer of its own.
        place = {"stage": run.index + 1, "step": 0}
        optimizer = None

    tensors = state.snapshot(run.model, run.begun_with, optimizer, run.ranks)
    if run.ranks.is_first:
        folder = Path(run.options.output) / "checkpoints"
        keep_best_of = ""
        if run.options.keep_best:
            keep_best_of = run.name
        described = {**place, "trained": run.name, "validation": validation}
        resume.save(folder, run.options.keep, tensors, described, keep_best_of, run.origin)


# --------------------------------------------------------------------------- before and after it


def prepare(
    model: LLaVA,
    index: int,
    recipe: Recipe,
    ranks: Ranks,
    start: int,
    tensors: dict[str, Tensor],
    origin: dict,
) -> StageRun:
    """Return what the loop needs to train a stage of the recipe from optimizer step `start`.

    model: on the CPU. It is frozen, rounded, moved to the device and spread over the ranks as the
    recipe says.
    tensors: of the checkpoint that it comes from, with AdamW's moments if start > 0.
    origin: what the run is made from.
    """
    name = list(recipe.stage)[index]
    stage, options = recipe.stage[name], recipe.train
    folder = Path(options.output)

    # The data. To share the tokens of a step evenly, ranks must know the length of each row. One
    # of them counts, with as many processes as this machine has ranks: the others wait for it.
    spec = stage_spec(recipe.model, stage)
    opened = open_stage(stage, f"stage.{name}", options.workers)
    rows = opened.training
    print0(f"{name}: {printable(describe_rows(opened, stage), 1000)}")
    counts = None
    if ranks.size > 1:
        counts = token_counts(rows, spec, max(options.workers, ranks.size_here))
    steps = Steps(rows, spec, stage, options, ranks.rank, ranks.size, counts=counts)
    if start >= len(steps):
        what = f"after {start} steps of {name}, which has {len(steps)}"
        raise UserError("checkpoint", what, "give its own recipe")

    # What trains.
    set_trainable(model, stage.tune)
    if ranks.is_first:
        output.check_room(model, recipe)

    # On the device, and over the ranks. Blocks are compiled before DDP or FSDP wraps them.
    bf16 = parallel.use_bf16(options.precision, ranks.device)
    dtypes = state.full_precision(model)
    if bf16:
        dtypes |= dict.fromkeys(frozen_matrices(model), torch.bfloat16)
    peak_share = estimate.peak_share(model, stage, rows, ranks.device) / ranks.size
    if options.compile:
        model.compile_blocks()
    mode = parallel.choose_mode(options.parallel, model, ranks, dtypes)
    parallel_model = ParallelModel(model, mode, ranks, bf16, dtypes)

    # The optimizer comes after that, because fsdp replaces the parameters.
    trainable = trainable_parameters(model)
    optimizer = make_optimizer(model, stage)
    state.restore_moments(optimizer, model, tensors, start)
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16)

    # What is reported.
    recorder = None
    if ranks.is_first:
        recorder = Recorder(options.log, folder, recipe, name, start)
    log = RunLog(folder / "log.jsonl", name, len(steps), trainable, ranks, recorder, peak_share)
    announce(log, model, start, steps, mode, list(recipe.stage.values())[: index + 1])
    warn_of_small_stage(steps, stage, name)

    return StageRun(
        name=name,
        index=index,
        stage=stage,
        options=options,
        ranks=ranks,
        steps=steps,
        spec=spec,
        held_out=opened.held_out,
        model=model,
        parallel=parallel_model,
        optimizer=optimizer,
        autocast=autocast,
        log=log,
        begun_with=tensors,
        origin=origin,
    )


def describe_rows(opened: StageRows, stage: Stage) -> str:
    """Return what the rows of a stage were recognised as, which are left out, which held out."""
    said = [opened.training.recognised, *opened.notes]
    if validation_file(stage):
        said.append(f"validation: {opened.held_out.recognised}")
    return "; ".join(said)


def announce(log: RunLog, model: LLaVA, start: int, steps: Steps, mode: str, stages: list[Stage]):
    """Log the start of a stage: its rows and steps, and which parts of the model train.

    stages: those up to this one.
    """
    # For log.jsonl. A part that is frozen is not in log.trainable. Adapters of a later stage are in
    # the model already, and not counted: they change nothing before that.
    parameters = {}
    for part, attribute in PARTS.items():
        module = getattr(model, attribute)
        parameters[part] = lora.count(module)
        if not any(lora_trains(stage, part) for stage in stages):
            parameters[part] -= count_adapters(module)

    trainable = {}
    for part, tensors in log.trainable.items():
        trainable[part] = sum(p.numel() for p in tensors)

    log.write(
        "start",
        step=start,
        steps=len(steps),
        rows=len(steps.rows),
        parameters=parameters,
        trainable=trainable,
    )

    # For the terminal.
    sizes = []
    for part, n in parameters.items():
        size = f"{part} {n / 1e6:.2f}M"
        if part not in trainable:
            size += " (frozen)"
        sizes.append(size)

    line = f"{log.name}: {len(steps.rows)} rows, {len(steps)} steps, "
    line += f"{model.views.tokens_per_image}; {', '.join(sizes)}"
    if log.ranks.size > 1:
        line += f"; {mode} on {log.ranks.size} ranks"
    print0(line)


def lora_trains(stage: Stage, part: str) -> bool:
    """Say whether a stage trains adapters of a part."""
    how = getattr(stage.tune, part)
    return how == "lora" or how in lora.QUANTIZED


def count_adapters(module: nn.Module) -> int:
    """Return how many parameters the adapters of a module have."""
    total = 0
    for adapter in lora.adapters(module).values():
        total += sum(p.numel() for p in adapter.parameters(recurse=False))
    return total


def warn_of_small_stage(steps: Steps, stage: Stage, name: str):
    """Print a warning if a stage has so few steps that it learns next to nothing.

    A step has global_batch rows, and few rows make few steps: thirty rows make one of 128. Who
    has written the number of steps knows it.
    """
    if len(steps) < FEW_STEPS and not stage.steps:
        what = f"{len(steps.rows)} rows make only {len(steps)} optimizer steps of {steps.size}"
        fix = f"write stage.{name}.global_batch=auto and stage.{name}.epochs=auto"
        print0(f"warning: {name}: {what}, which hardly train anything; {fix}")


def check_recipe(recipe: Recipe, path: Path):
    """Raise UserError for what would stop the run later, before anything is loaded."""
    read_grids(recipe.model.image_grids)
    for name, stage in recipe.stage.items():
        sources = [source.data for source in stage.mixture.values()]
        check_validation(stage, f"{path}:stage.{name}")
        for file in [stage.data, validation_file(stage), *sources]:
            if file and not is_here(file) and not hub.parse_id(file):
                what = f"no such file {file}"
                raise UserError(f"{path}:stage.{name}", what, "correct data or validation")

    # OUTPUT/best is the best of the last stage, so that one must be measured.
    last_stage = list(recipe.stage.values())[-1]
    if recipe.train.keep_best and not last_stage.validation:
        what = "it needs a last stage with validation"
        raise UserError(f"{path}:train.keep_best", what, "write stage.NAME.validation")


def fill_recipe(recipe: Recipe, ranks: Ranks) -> Recipe:
    """Return the recipe with a number for each "auto", the same on all ranks."""
    filled = recipe
    if ranks.is_first:
        filled = small_sets.fill(recipe, output.earlier_recipe(recipe), ranks.size)
    return ranks.broadcast(filled)


def check_that_it_changes(recipe: Recipe, index: int = 0):
    """Raise UserError for a stage that would change no weight, before any of them has trained.

    index: the first of the stages that are still to train.
    """
    # The model without weights shows which parameters a stage trains.
    stages = list(recipe.stage.values())
    with weights.empty():
        model = LLaVA(config_from_recipe(recipe.model, stages[-1].template))
        peft.adapt(model, stages, PARTS)

    for name, stage in list(recipe.stage.items())[index:]:
        set_trainable(model, stage.tune)
        trains = [part for part, tensors in trainable_parameters(model).items() if tensors]
        if not trains:
            fix = "set one part to full or lora"
            raise UserError(f"stage.{name}.tune", "no part of the model would train", fix)
        if not any(learning_rate(stage, part) for part in trains):
            what = f"0 for all that trains ({', '.join(trains)}), so no weight would change"
            raise UserError(f"stage.{name}.learning_rate", what, "write a rate above 0")
        if "llm" not in trains and not has_pictures(stage, name):
            what = "no row has a picture, and nothing else would train"
            raise UserError(f"stage.{name}.tune", what, "train the llm, or name rows with pictures")


def has_pictures(stage: Stage, name: str) -> bool:
    """Say whether some of a stage's rows have pictures or videos, by up to LOOKED_AT of them."""
    rows = open_stage(stage, f"stage.{name}").training
    count = min(len(rows), LOOKED_AT)
    for k in range(count):
        try:
            row = rows[k * len(rows) // count]
        except UserError:
            return True  # training says what is wrong with it
        if row.get("image") or row.get("video"):
            return True
    return False


class Place(NamedTuple):
    """Where a start of the run, or a stage of it, begins."""

    tensors: dict[str, Tensor]  # of the checkpoint that it goes on from; {} at the very beginning
    stage: int  # the index of the stage
    step: int  # its first optimizer step
    origin: output.Origin  # what the run is made from; on other ranks than the first an empty one


def newest_checkpoint(recipe: Recipe, explicit: str, ranks: Ranks) -> Place:
    """Return where the run goes on. Before its first checkpoint, that is step 0 of stage 0.

    explicit: a checkpoint to take instead of the newest one, or "". Raises UserError if what
    decides the result has changed since it was made.
    """
    # Rank 0 decides, because ranks that look at different times may see different files.
    chosen = None
    origin = output.Origin({}, [])
    if ranks.is_first:

        def compare(checkpoint: Path | None):
            nonlocal origin
            origin = output.begin(recipe, checkpoint)

        chosen = resume.pick(Path(recipe.train.output) / "checkpoints", explicit, compare)
    chosen = ranks.broadcast(chosen)

    if not chosen:
        return Place({}, 0, 0, origin)
    tensors, place = resume.read(chosen)
    if (place["stage"], place["step"]) > (len(recipe.stage), 0):
        what = f"in stage {place['stage'] + 1}, and the recipe has {len(recipe.stage)}"
        raise UserError(chosen, what, "give its own recipe")
    return Place(tensors, place["stage"], place["step"], origin)


def run_stages(recipe: Recipe, ranks: Ranks):
    """Train the stages of a recipe from its newest checkpoint on, and export the finished model.

    A stage begins with what a restart would begin with: the checkpoint at the end of the one
    before. So a run that was stopped and one that was not compute the same.
    """
    stages = list(recipe.stage.values())
    folder = Path(recipe.train.output)

    # Where this start begins.
    tensors, index, start, origin = newest_checkpoint(recipe, recipe.train.resume, ranks)
    if tensors:
        print0(f"resumed: {index} of {len(stages)} stages done, {start} steps of the next")

    # A template that does not fit is named now, and not when the stages before it are trained.
    for stage in stages[index:]:
        stage_spec(recipe.model, stage)
    check_that_it_changes(recipe, index)

    while True:
        if ranks.is_first:
            output.write_origin(recipe, origin, index, start)
        if index == len(stages):
            break

        # Weights leave the files when they go to a GPU or are sharded. Else they stay where they
        # are: so they are copied, and the arithmetic does not depend on their place in a file.
        shards = ranks.size > 1 and recipe.train.parallel == "fsdp"
        mapped = shards or ranks.device.type != "cpu"
        model = state.build(recipe, tensors, stages[index], mapped)
        run = prepare(model, index, recipe, ranks, start, tensors, origin.record)
        signals.hold()
        is_done = train_stage(run, start)

        # All of this stage's memory must be free before the next stage's model is built.
        # FSDP's hooks and modules hold each other, so that only the collector frees them.
        del model, run, tensors
        gc.collect()
        if not is_done:
            if ranks.is_first:
                resume.wait()
                with run_log.reporting("writing PREEMPTED"):
                    write_file(folder / "PREEMPTED", "the same command goes on from here\n")
            print0(f"preempted: saved in {folder}/checkpoints; the same command goes on from there")
            return

        # The next stage begins with what this one saved last.
        ranks.barrier()
        tensors, index, start, origin = newest_checkpoint(recipe, "", ranks)

    if ranks.is_first:
        output.export_model(recipe, tensors, folder)
    ranks.barrier()
    print0(f'done: {folder}   try: python generate.py --model {folder} --image FILE --prompt "..."')


@contextlib.contextmanager
def naming_killed_worker() -> Iterator[None]:
    """Turn the end of a data worker that was killed into a UserError.

    torch raises it wherever the main process is at that moment. It has no type of its own.
    """
    try:
        yield
    except RuntimeError as e:
        first_line = str(e).splitlines()[0]
        if not first_line.startswith("DataLoader worker (pid"):
            raise
        fix = "give it more memory or lower train.workers; the same command goes on from the last "
        raise UserError("a data worker", first_line, f"{fix}checkpoint") from None


def main(argv: list[str]):
    """Do what the command line says: list the recipes, plan one, or train it."""
    if argv == ["--list"]:
        planner.print_recipes(DEMO.parent)
        return

    is_dry_run, memory, recipe_and_overrides = planner.options(argv)
    recipe, path = config.load(recipe_and_overrides, DEMO)

    # The demo makes its own data, if it is not there.
    demo_data = None
    if path.resolve() == DEMO:
        first_stage = next(iter(recipe.stage.values()))
        demo_data = Path(first_stage.data).parent

    if is_dry_run:
        script = planner.Script(partial(peft.adapt, parts=PARTS), set_trainable, round_frozen)
        planner.dry_run(recipe, path, script, demo_data, memory)
        return

    ranks = Ranks.join(recipe.train.device)
    parallel.use_bf16(recipe.train.precision, ranks.device)  # refuses before anything is loaded

    # Rank 0 holds the folder until the end, so that no second run writes there.
    folder = Path(recipe.train.output)
    lock = nullcontext()
    if ranks.is_first:
        output.own_folder(recipe)
        lock = resume.lock(folder)
    with lock:
        if demo_data and ranks.is_first and not demo_data.exists():
            with writing(demo_data):
                world.write(demo_data)
        ranks.barrier()
        check_recipe(recipe, path)
        recipe = fill_recipe(recipe, ranks)

        if not output.claim(recipe, ranks):
            what = "this recipe's model is there; set train.output for another run"
            print0(f"{recipe.train.output} is finished: {what}")
            return
        with naming_killed_worker():
            run_stages(recipe, ranks)


if __name__ == "__main__":
    with last_word():
        command_line.cli(main, __doc__, fields_help=True, to_save_memory=TO_SAVE_MEMORY)
