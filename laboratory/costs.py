"""What the cells of a grid take, before anything is trained: steps, parameters, operations, hours.

    costs = costs_of(grid)              # {cell: Cost}
    print_plan(grid, workers=1)         # --dry-run

The numbers are those of `train.py --dry-run` (training/planner.py): the model is built without its
weights, and the operations are counted (training/estimate.py). Hours on a GPU follow from the peak
of its datasheet. No small model comes near the peak of a CPU, so there the baseline is trained for
a few steps, and each cell takes as much longer as it has more operations.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import train
from checkpoints import peft
from config import PARTS, Recipe, UserError
from laboratory.cells import controls, environment, is_finished, launch, why
from laboratory.grid import Cell, Grid
from training import estimate, planner
from training.run_log import read_log

TIMED_STEPS = 8  # of each stage
FIRST_STEPS = 2  # of them that do not count: the memory is new to them
MOST_FOR_CPU = 1e16  # operations of a training that a CPU can be meant for: two days
ASSUMED_GPU = "H100"

SCRIPT = planner.Script(partial(peft.adapt, parts=PARTS), train.set_trainable, train.round_frozen)


@dataclass(frozen=True)
class Cost:
    """What one training of a cell takes, by its recipe."""

    steps: dict[str, int]  # of each stage; 0 where the data that decide it are not there
    trained: int  # parameters that the last stage trains
    size: int  # parameters of the model, without blocks that never run
    tokens: int  # that a picture takes in the text
    step_flops: dict[str, float]  # of one optimizer step of each stage

    @property
    def all_steps(self) -> int | None:
        """The steps of all stages; None if one is not known."""
        if not all(self.steps.values()):
            return None
        return sum(self.steps.values())

    @property
    def flops(self) -> float | None:
        """The operations of all steps; None if their number is not known."""
        if self.all_steps is None:
            return None
        return sum(steps * self.step_flops[name] for name, steps in self.steps.items())


def costs_of(grid: Grid) -> dict[Cell, Cost]:
    """Return what each cell takes; a cell whose models are not there is left out."""
    costs = {}
    for cell in grid.cells:
        recipe = grid.recipe_of(grid.runs_of(cell, grid.seeds)[0])
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


# ---------------------------------------------------------------------------------- --dry-run


def print_plan(grid: Grid, workers: int):
    """Print the cells with their steps, parameters, operations and hours, and the sum of those."""
    costs = costs_of(grid)
    runs = grid.runs()
    left = [run for run in runs if not is_finished(grid, run)]
    asked = sum(len(controls(measure)) for measure in grid.measures)
    print(f"{grid.file}: {len(grid.cells)} cells, {len(runs)} runs, {len(left)} of them to be done")
    print(f"each is trained, then asked {asked} times by evaluate.py; folder: {grid.output}")
    for path, command in grid.prepare.items():
        state = "is there" if Path(path).exists() else f"will be made by: {command}"
        print(f"  {path} {state}")

    rate, source = seconds_of_operation(grid, costs.get(grid.baseline))
    hours = 0.0
    unknown = 0
    for cell in grid.cells:
        cost = costs.get(cell)
        todo = sum(run.cell == cell for run in left)
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
        return "its models are not there"
    said = f"trains {cost.trained:,} of {cost.size:,} parameters, {cost.tokens} tokens a picture"
    if cost.flops is None:
        return f"{said}, steps unknown: its data are not there"
    stages = ", ".join(f"{name} {steps}" for name, steps in cost.steps.items())
    return f"{said}, steps: {stages}, {cost.flops:.2e} FLOPs, {cost.flops * rate / 3600:.3f} h"


def seconds_of_operation(grid: Grid, cost: Cost | None) -> tuple[float, str]:
    """Return how long an operation takes, and what that is based on."""
    is_for_cpu = cost is not None and cost.flops is not None and cost.flops < MOST_FOR_CPU
    if torch.cuda.is_available() or not is_for_cpu:
        name = ASSUMED_GPU
        for known in estimate.GPUS:
            if torch.cuda.is_available() and known.split("-")[0] in torch.cuda.get_device_name():
                name = known
        rate = 1 / (estimate.GPUS[name].peak * estimate.SHARE)
        return rate, f"at {estimate.SHARE:.0%} of the peak of one {name} (training/estimate.py)"
    return time_baseline(grid, cost)


def time_baseline(grid: Grid, cost: Cost) -> tuple[float, str]:
    """Train the baseline for a few steps of each stage, and return the seconds of an operation."""
    run = grid.runs()[0]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "timed"
        few = [f"train.output={folder}", "train.log_every=1", "train.keep_best=false"]
        for name in cost.steps:
            few += [f"stage.{name}.steps={TIMED_STEPS}", f"stage.{name}.validation="]
        said = Path(scratch) / "said.txt"
        command = ["train.py", *grid.arguments_of(run), *few]
        with open(said, "wb") as file:
            code = launch(command, file, environment(grid.threads)).wait()
        if code != 0:
            what = why(said, "train.py", code)
            raise UserError(f"{grid.file}: {run.cell}", what, "mend that first")
        log = read_log(folder / "log.jsonl")

    # The log has the seconds since a stage began, at each step.
    seconds = 0.0
    flops = 0.0
    for name in cost.steps:
        at = {r["step"]: r["seconds"] for r in log if r["event"] == "step" and r["stage"] == name}
        seconds += at[TIMED_STEPS] - at[FIRST_STEPS]
        flops += (TIMED_STEPS - FIRST_STEPS) * cost.step_flops[name]
    counted = TIMED_STEPS - FIRST_STEPS
    based = f"based on {counted} steps of the baseline here, {seconds / counted:.2f} s each"
    return seconds / flops, f"{based} with {grid.threads} threads; the rest by its FLOPs"
