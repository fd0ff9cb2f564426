"""A grid: which trainings are compared, by what, and beside which baseline.

    grid = read_grid(Path("recipes/lab/first.toml"))
    grid.cells                          # all combinations of the axes' labels, the baseline first
    grid.runs()                         # each of them with each seed: the trainings to be done

A grid is a TOML file. Its paths are relative to the current directory, as those of recipes are.

    base = "recipes/demo.toml"          # the recipe that every cell changes
    output = "out/lab/first"            # each run has a folder in it
    seeds = [0, 1, 2]                   # every cell is trained with each of them
    noise_seeds = [3, 4, 5]             # the baseline alone also with these, for the noise floor
    baseline = { share = "all", size = "small" }    # the cell that the others are compared with
    overrides = ["train.precision=fp32"]            # for every cell; optional
    cells = [{ share = "all", size = "small" }, ...]    # optional; without it the axes are crossed
    threads = 1                         # of the CPU, for each training; optional

    [axis.share]                        # label -> overrides, written as on train.py's command line
    "all" = ['stage.finetune.tune.vision="full"']
    "none" = ['stage.finetune.tune.vision="frozen"']
    [axis.size]
    "small" = []
    "large" = ["model.llm_config.num_hidden_layers=8"]

    [prepare]                           # file or folder -> the command that makes it; optional.
    "out/lab/world" = "python -m demo.world out/lab/world --seed 1"  # Each is run if it is absent

    [[measure]]                         # what evaluate.py asks each model
    task = "world"                      # its --task
    data = "out/lab/world"              # its --data
    arguments = ["--limit", "300"]      # further ones; optional
    blank = true                        # whether to ask again with blanked pictures; optional
    name = "world"                      # of two measures with the same task each needs one
    scores = ["relation", "count"]      # those that are compared; optional, else all of them

    [[plot]]                            # of the page; optional
    x = "share"                         # an axis, or trained, size, tokens, steps, flops, seconds
    y = "relation"                      # a score; "NAME.relation" where several measures have it
    by = "size"                         # an axis that makes the lines, if x is a column; optional

A seed is train.seed: it decides the initial weights that are random, the order of the samples and
dropout. The data, and weights that are loaded, are the same for all seeds. Whatever a grid compares
must be in an axis. If steps differ between cells, then an axis must say so by its overrides.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import config
from checkpoints.fields import Fields
from config import Recipe, UserError, printable

# The fields of a stage that say how many steps it has.
OF_STEPS = ("epochs", "steps", "global_batch")

FIX = "correct the grid; laboratory/grid.py says what it may hold"
MOST_CELLS = 10_000
MOST_THREADS = 1024
LARGEST_SEED = 2**63 - 1  # as of train.seed

KEYS = {
    "base",
    "output",
    "seeds",
    "noise_seeds",
    "baseline",
    "overrides",
    "cells",
    "threads",
    "axis",
    "prepare",
    "measure",
    "plot",
}


@dataclass(frozen=True)
class Cell:
    """One combination of labels: what is trained once for each seed."""

    labels: tuple[tuple[str, str], ...]  # (axis, label), in the order of the axes
    overrides: tuple[str, ...]  # of the grid, then of the labels

    def __str__(self) -> str:
        """Return the labels for a reader: share 25 %, size small."""
        said = [f"{axis} {label}" for axis, label in self.labels]
        return ", ".join(said) or "base"

    @property
    def folder_name(self) -> str:
        """Return the name of the folder of its runs: share-25_size-small."""
        parts = [as_file_name(f"{axis}-{label}") for axis, label in self.labels]
        return "_".join(parts) or "base"


@dataclass(frozen=True)
class Run:
    """One training: a cell with one seed."""

    cell: Cell
    seed: int
    folder: Path  # train.output

    def __str__(self) -> str:
        return f"{self.cell}, seed {self.seed}"


@dataclass(frozen=True)
class Measure:
    """What evaluate.py asks every model."""

    name: str
    task: str
    data: str
    arguments: tuple[str, ...]
    blank: bool  # whether to ask again with blanked pictures
    scores: tuple[str, ...]  # the names of those that are compared; () = all


@dataclass(frozen=True)
class Plot:
    """One plot of the page."""

    x: str  # an axis, or a column of costs
    y: str  # a score
    by: str  # where x is a column, an axis that makes the lines, or ""


@dataclass(frozen=True)
class Grid:
    """What a grid's file says."""

    file: Path
    base: str
    output: Path
    seeds: tuple[int, ...]
    noise_seeds: tuple[int, ...]
    threads: int
    axes: dict[str, dict[str, tuple[str, ...]]]  # axis -> label -> overrides
    cells: tuple[Cell, ...]  # the baseline first
    prepare: dict[str, str]  # path -> command
    measures: tuple[Measure, ...]
    plots: tuple[Plot, ...]

    @property
    def baseline(self) -> Cell:
        """Return the cell that the others are compared with."""
        return self.cells[0]

    def runs(self) -> list[Run]:
        """Return all trainings: those of the baseline first, then cell after cell."""
        found = []
        for cell in self.cells:
            seeds = self.seeds
            if cell == self.baseline:
                seeds += self.noise_seeds
            found += self.runs_of(cell, seeds)
        return found

    def runs_of(self, cell: Cell, seeds: tuple[int, ...]) -> list[Run]:
        """Return the trainings of a cell with these seeds."""
        folder = self.output / cell.folder_name
        return [Run(cell, seed, folder / f"seed-{seed}") for seed in seeds]

    def labels_that_decide(self, cell: Cell, fields: Iterable[str]) -> tuple[str, ...]:
        """Return the labels of a cell on the axes whose overrides name one of these fields.

        A field is also named by the table that it is in, and by a key in it.
        """
        found = []
        for axis, label in cell.labels:
            overrides = itertools.chain(*self.axes[axis].values())
            names = [override.partition("=")[0] for override in overrides]
            if any(are_nested(name, field) for name in names for field in fields):
                found.append(label)
        return tuple(found)

    def arguments_of(self, run: Run) -> list[str]:
        """Return the command line of train.py for a run."""
        own = [f"train.seed={run.seed}", f"train.output={run.folder}"]
        return [self.base, *run.cell.overrides, *own]

    def recipe_of(self, run: Run) -> Recipe:
        """Return the recipe of a run. Raises UserError, which names the cell, if it is none."""
        try:
            recipe, _ = config.load(self.arguments_of(run), self.base)
        except UserError as e:
            what, _, fix = str(e).rpartition("; fix: ")
            raise UserError(f"{self.file}: {run.cell}", what, fix) from None
        return recipe


def are_nested(name: str, other: str) -> bool:
    """Say whether two dotted names are one, or one is in the table of the other."""
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")


def as_file_name(text: str) -> str:
    """Return a text as a part of a file's name: letters, digits, dots, plus and minus signs."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-.")


# ------------------------------------------------------------------------------------ reading


def read_grid(file: Path) -> Grid:
    """Return the grid in a file. Raises UserError for what is no grid.

    The recipe of each cell is made, so an override that train.py would refuse is refused here.
    """
    fields = Fields(read_toml(file), file, fix=FIX)
    refuse_unknown(fields, KEYS)

    axes = read_axes(fields)
    everywhere = texts(fields, "overrides")
    baseline = read_labels(fields.table("baseline", optional=not axes), axes)
    grid = Grid(
        file=file,
        base=fields.text("base"),
        output=read_output(fields),
        seeds=read_seeds(fields, "seeds"),
        noise_seeds=read_seeds(fields, "noise_seeds", optional=True),
        threads=fields.integer("threads", 1, MOST_THREADS, default=1),
        axes=axes,
        cells=tuple(read_cells(fields, axes, everywhere, baseline)),
        prepare=read_prepare(fields),
        measures=tuple(read_measures(fields)),
        plots=tuple(read_plots(fields, axes)),
    )

    both = set(grid.seeds) & set(grid.noise_seeds)
    if both:
        raise fields.refuse("noise_seeds", f"not disjoint from seeds: both have {min(both)}")
    if not Path(grid.base).is_file():
        raise UserError(fields.name("base"), f"no such file {printable(grid.base)}", FIX)
    check_folders(grid)
    for cell in grid.cells:
        grid.recipe_of(grid.runs_of(cell, grid.seeds)[0])
    return grid


def read_toml(file: Path) -> dict:
    """Return the tables of a TOML file. Raises UserError for a file that has none."""
    fix = "name a grid's file, as recipes/lab/first.toml"
    try:
        return config.parse_toml(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(file, f"cannot be read: {e.strerror}", fix) from None
    except ValueError as e:  # also what is not UTF-8
        raise UserError(file, f"not TOML: {e}", "mend that line") from None


def refuse_unknown(fields: Fields, known: set[str]):
    """Raise UserError for a key that no grid has."""
    for key in fields.values:
        if key not in known:
            what = "unknown key"
            raise UserError(fields.name(key), what, f"one of: {', '.join(sorted(known))}")


def texts(fields: Fields, key: str) -> tuple[str, ...]:
    """Return an optional list of texts."""
    return tuple(fields.list(key, str, default=[]))


def tables(fields: Fields, key: str) -> Iterator[Fields]:
    """Yield the tables of an optional list of tables, named KEY.0, KEY.1 ... in messages."""
    for i, table in enumerate(fields.list(key, dict, default=[])):
        yield Fields(table, fields.where, f"{key}.{i}", FIX)


def read_output(fields: Fields) -> Path:
    """Return the folder of all runs."""
    text = fields.text("output")
    if not text.strip():
        raise fields.refuse("output", "no folder")
    return Path(text)


def read_seeds(fields: Fields, key: str, optional: bool = False) -> tuple[int, ...]:
    """Return a list of seeds, each of which is there once."""
    seeds = [] if optional and key not in fields else fields.integers(key, 0, LARGEST_SEED)
    if len(set(seeds)) < len(seeds):
        raise fields.refuse(key, "a list that has a seed twice")
    if not seeds and not optional:
        raise fields.refuse(key, "without a seed")
    return tuple(seeds)


def read_axes(fields: Fields) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return {axis: {label: overrides}}."""
    of_axes = fields.table("axis", optional=True)
    axes = {}
    for axis in of_axes.values:
        labels = of_axes.table(axis)
        axes[axis] = {label: texts(labels, label) for label in labels.values}
        if not axes[axis]:
            raise of_axes.refuse(axis, "an axis without labels")
    return axes


def read_labels(fields: Fields, axes: dict) -> dict[str, str]:
    """Return the labels of one cell, {axis: label}: one of each axis, in the order of the axes."""
    refuse_unknown(fields, set(axes))
    return {axis: fields.text(axis, choices=set(axes[axis])) for axis in axes}


def read_cells(
    fields: Fields, axes: dict, everywhere: tuple[str, ...], baseline: dict[str, str]
) -> Iterator[Cell]:
    """Yield the cells, the baseline first: those that are listed, or all combinations."""
    if "cells" in fields:
        chosen = [read_labels(one, axes) for one in tables(fields, "cells")]
    else:
        names = [list(axis) for axis in axes.values()]
        chosen = [dict(zip(axes, labels, strict=True)) for labels in itertools.product(*names)]
    if len(chosen) > MOST_CELLS:
        raise UserError(fields.where, f"{len(chosen)} cells", f"at most {MOST_CELLS:,}")

    # A cell that is listed twice is one.
    done = []
    for labels in [baseline, *chosen]:
        if labels in done:
            continue
        done.append(labels)
        overrides = list(everywhere)
        for axis, label in labels.items():
            overrides += axes[axis][label]
        yield Cell(tuple(labels.items()), tuple(overrides))


def read_prepare(fields: Fields) -> dict[str, str]:
    """Return {path: the command that makes it}, in the order of the file."""
    of_paths = fields.table("prepare", optional=True)
    return {path: of_paths.text(path) for path in of_paths.values}


def read_measures(fields: Fields) -> Iterator[Measure]:
    """Yield the measures. Raises UserError if there is none, or two have one name."""
    names = set()
    for one in tables(fields, "measure"):
        refuse_unknown(one, {"task", "data", "arguments", "blank", "name", "scores"})
        task = one.text("task")
        measure = Measure(
            name=one.text("name", default=task),
            task=task,
            data=one.text("data"),
            arguments=texts(one, "arguments"),
            blank=one.flag("blank", default=True),
            scores=texts(one, "scores"),
        )
        if as_file_name(measure.name) != measure.name:
            raise one.refuse("name", "not a name of letters, digits, dots, plus and minus signs")
        if measure.name in names:
            what = f"a second measure {measure.name!r}"
            raise UserError(one.name("name"), what, "give each a name of its own")
        names.add(measure.name)
        yield measure
    if not names:
        raise UserError(fields.name("measure"), "nothing is measured", FIX)


def read_plots(fields: Fields, axes: dict) -> Iterator[Plot]:
    """Yield the plots."""
    for one in tables(fields, "plot"):
        refuse_unknown(one, {"x", "y", "by"})
        plot = Plot(one.text("x"), one.text("y"), one.text("by", default=""))
        if plot.by and plot.by not in axes:
            raise one.refuse("by", f"not an axis: {', '.join(axes)}")
        if plot.by and plot.x in axes:
            raise one.refuse("by", "needed beside a column only: here all other axes make lines")
        yield plot


def check_folders(grid: Grid):
    """Raise UserError if the runs of two cells would be in one folder."""
    of_name = {}
    for cell in grid.cells:
        other = of_name.setdefault(cell.folder_name.lower(), cell)
        if other != cell:
            what = f"the cells {other!s} and {cell!s} would have one folder, {cell.folder_name}"
            raise UserError(grid.file, what, "choose labels that differ in letters or digits")
