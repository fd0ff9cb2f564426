"""What the cells of a grid take, before anything is trained: steps, parameters, operations, hours.

    costs = costs_of(grid)              # {cell: Cost}
    print_plan(grid, costs, workers=1)  # --dry-run

The numbers are those of `train.py --dry-run` (training/planner.py): the model is built without its
weights, and the operations are counted (training/estimate.py). Hours on a GPU follow from the peak
of its datasheet. No small model comes near the peak of a CPU, so there the baseline is trained for
a few steps, and each cell takes as much longer as it has more operations.
"""

from __future__ import annotations

import contextlib
import tempfile
from functools import partial
from pathlib import Path

import torch

import train
from checkpoints import peft
from config import PARTS, Recipe, UserError
from laboratory.cells import controls, environment, is_finished, launch, why
from laboratory.found import Cost
from laboratory.grid import OF_STEPS, Cell, Grid
from training import estimate, planner
from training.run_log import read_log

TIMED_STEPS = 8  # of each stage
FIRST_STEPS = 2  # of them that do not count: the memory is new to them
MOST_FOR_CPU = 1e16  # operations of a training that a CPU can be meant for: two days
ASSUMED_GPU = "H100"

SCRIPT = planner.Script(partial(peft.adapt, parts=PARTS), train.set_trainable, train.round_frozen)


def costs_of(grid: Grid) -> dict[Cell, Cost]:
    """Return what each cell takes, without cells whose models are not there or cannot be built.

    What is wrong with those their own runs will say.
    """
    costs = {}
    for cell in grid.cells:
        recipe = grid.recipe_of(grid.runs_of(cell, grid.seeds)[0])
        with contextlib.suppress(UserError):
            cost = cost_of(recipe)
            if cost is not None:
                costs[cell] = cost
    return costs


def cost_of(recipe: Recipe) -> Cost | None:
    """Return what a recipe takes; None if the config files of its models are not there."""
    with tempfile.TemporaryDirectory() as scratch:
        _, folders = planner.find_files(recipe, Path(scratch), None)
        plan = planner.make_plan(recipe, SCRIPT, folders)
        if plan is None:
            return None

        steps = {}
        step_flops = {}
        for name, stage in plan.recipe.stage.items():
            data = plan.data_of(name)
            model = plan.build(plan.recipe)
            train.set_trainable(model, stage.tune)
            row_flops = estimate.operations(model, stage, data.row, recompute=False)
            steps[name] = data.steps
            step_flops[name] = stage.global_batch * row_flops

    # The model of the last stage.
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = sum(p.numel() for p in model.parameters())
    return Cost(steps, trained, size, model.views.positions(), step_flops)


def check_steps(grid: Grid, costs: dict[Cell, Cost]):
    """Raise UserError if the steps of two cells differ and no axis says so.

    Rows make steps, so an axis of data may change them unseen. results.py looks again when all is
    trained; this is before anything is.
    """
    first = {}
    for cell, cost in costs.items():
        for name, steps in cost.steps.items():
            fields = [f"stage.{name}.{key}" for key in OF_STEPS]
            labels = grid.labels_that_decide(cell, fields)
            expected, other = first.setdefault((name, labels), (steps, cell))
            if steps != expected and steps and expected:
                what = f"{name} has {steps} steps in {cell} and {expected} in {other}"
                fix = f"make them equal, or name {' or '.join(fields)} in the overrides of an axis"
                raise UserError(grid.file, what, fix)


# ---------------------------------------------------------------------------------- --dry-run


def print_plan(grid: Grid, costs: dict[Cell, Cost], workers: int):
    """Print the cells with their steps, parameters, operations and hours, and the sum of those."""
    runs = grid.runs()
    left = [run for run in runs if not is_finished(grid, run)]
    print(f"{grid.file}: {len(grid.cells)} cells, {len(runs)} runs, {len(left)} of them to be done")

    asked = 0
    for measure in grid.measures:
        asked += len(controls(measure))
    print(f"each is trained, then asked {asked} times by evaluate.py; folder: {grid.output}")

    for path, command in grid.prepare.items():
        if Path(path).exists():
            print(f"  {path} is there")
        else:
            print(f"  {path} will be made by: {command}")

    # The cells, and the sum of their hours.
    rate, source = seconds_of_operation(grid, costs.get(grid.baseline))
    hours = 0.0
    unknown = 0
    for cell in grid.cells:
        todo = 0
        for run in left:
            if run.cell == cell:
                todo += 1
        cost = costs.get(cell)
        print(f"{cell}: {todo} runs, {describe(cost, rate)}")
        if cost is None or cost.flops is None:
            unknown += todo
        else:
            hours += todo * cost.flops * rate / 3600

    print(f"hours of training, one run after the other: {hours:.2f}; {source}")
    if workers > 1:
        print(f"with {workers} workers down to {hours / workers:.2f}, if as many cores are free")
    if unknown:
        print(f"without {unknown} runs whose data or models are not there")


def describe(cost: Cost | None, rate: float) -> str:
    """Return what a run of a cell takes, for people. rate: seconds for each operation."""
    if cost is None:
        return "what they take is not known: train.py --dry-run says why"
    said = f"trains {cost.trained:,} of {cost.size:,} parameters, {cost.tokens} tokens a picture"
    if cost.flops is None:
        return f"{said}, steps unknown: its data are not there"

    stages = ", ".join(f"{name} {steps}" for name, steps in cost.steps.items())
    hours = cost.flops * rate / 3600
    return f"{said}, steps: {stages}, {cost.flops:.2e} FLOPs, {hours:.3f} h"


def seconds_of_operation(grid: Grid, cost: Cost | None) -> tuple[float, str]:
    """Return how long an operation takes, and what that is based on."""
    is_for_cpu = cost is not None and cost.flops is not None and cost.flops < MOST_FOR_CPU
    if is_for_cpu and not torch.cuda.is_available():
        return time_baseline(grid, cost)

    # The GPU that is here, if the table has it.
    name = ASSUMED_GPU
    if torch.cuda.is_available():
        here = torch.cuda.get_device_name()
        for known in estimate.GPUS:
            if known.split("-")[0] in here:
                name = known
    rate = 1 / (estimate.GPUS[name].peak * estimate.SHARE)
    return rate, f"at {estimate.SHARE:.0%} of the peak of one {name} (training/estimate.py)"


def time_baseline(grid: Grid, cost: Cost) -> tuple[float, str]:
    """Train the baseline for a few steps of each stage, and return the seconds of an operation."""
    run = grid.runs()[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "timed"
        command = ["train.py", *grid.arguments_of(run)]
        command += [f"train.output={folder}", "train.log_every=1", "train.keep_best=false"]
        for name in cost.steps:
            command.append(f"stage.{name}.steps={TIMED_STEPS}")
            command.append(f"stage.{name}.validation=")

        said = Path(scratch) / "said.txt"
        with open(said, "wb") as file:
            process = launch(command, file, environment(grid.threads))
            code = process.wait()
        if code != 0:
            what = why(said, "train.py", code)
            raise UserError(f"{grid.file}: {run.cell}", what, "mend that first")
        log = read_log(folder / "log.jsonl")

    # The log has the seconds since a stage began, at each step. The first steps do not count.
    seconds = 0.0
    for row in log:
        if row["event"] != "step":
            continue
        if row["step"] == FIRST_STEPS:
            seconds -= row["seconds"]
        elif row["step"] == TIMED_STEPS:
            seconds += row["seconds"]
    counted = TIMED_STEPS - FIRST_STEPS
    flops = counted * sum(cost.step_flops.values())

    mean = seconds / counted / len(cost.steps)
    based = f"based on {counted} steps of each stage of the baseline here, {mean:.2f} s each"
    return seconds / flops, f"{based} with {grid.threads} threads; the rest by its FLOPs"
