"""Compare many trainings, and say what their differences are worth.

    python lab.py GRID.toml --dry-run           # the cells, their steps, the hours
    python lab.py GRID.toml [--workers 2]       # trains and measures all, then prints the table
    python lab.py GRID.toml --table             # the table of what is finished by now
    python lab.py GRID.toml --commands          # a line of shell for each run, for a cluster

A grid has a base recipe, axes and seeds: laboratory/grid.py says how it is written, and
recipes/lab/first.toml is one. Each combination of labels is a cell. A cell is trained once with
each seed, by train.py in a folder of its own, and asked by evaluate.py, once as it is and once with
its pictures blanked. If the laboratory is killed, the same command goes on. A run that fails is a
line in the table with its error, and stops no other one; the next start tries it again.

Each run has one CPU thread unless the grid says more, so a cell and a seed give the same bits
however many --workers there are. With several GPUs each worker has one.

The table has the mean and deviation over seeds of every score, and its difference to the baseline
with an interval over questions and seeds (laboratory/statistics.py). On top of it is the noise
floor: what the baseline differs from itself, with other seeds. At its end is what each cell costs.
Cells in which something differs that no axis names are refused. OUTPUT/table.md, table.json and
table.html have all of it; in the .json, "results" has the same digits however often the laboratory
was killed.
"""

from __future__ import annotations

from pathlib import Path

import command_line
from checkpoints.owned import own
from config import UserError
from laboratory import cells, costs
from laboratory.found import Cost
from laboratory.grid import Cell, Grid, read_grid
from laboratory.page import write_page
from laboratory.results import check_tasks, read_results
from laboratory.table import make_table, write_table


def main(argv: list[str]):
    """Do what the command line says."""
    parser = command_line.parser(__doc__)
    option = parser.add_argument
    option("grid", metavar="GRID.toml", help="what is compared")
    workers = command_line.within(int, 1, 1024)
    option("--workers", type=workers, default=1, metavar="N", help="runs at once (default 1)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="train nothing, say what it takes")
    what.add_argument("--table", action="store_true", help="train nothing, print the table")
    what.add_argument("--commands", action="store_true", help="train nothing, print the commands")
    args = parser.parse_args(argv)

    grid = read_grid(Path(args.grid))
    check_tasks(grid)
    if args.commands:
        cells.print_commands(grid)
        return
    if args.table or args.dry_run:
        of_cells = costs.costs_of(grid)
    else:
        of_cells = run(grid, args.workers)
    if args.dry_run:
        costs.check_steps(grid, of_cells)
        costs.print_plan(grid, of_cells, args.workers)
    else:
        print_table(grid, of_cells)


def run(grid: Grid, workers: int) -> dict[Cell, Cost]:
    """Do what is left of a grid, and return what its cells take."""
    own(grid.output, "laboratory")
    with cells.alone(grid):
        cells.prepare(grid)
        of_cells = costs.costs_of(grid)
        costs.check_steps(grid, of_cells)
        cells.run_all(grid, workers)
    return of_cells


def print_table(grid: Grid, of_cells: dict[Cell, Cost]):
    """Print and write the table. Raises UserError, after that, if a run has failed."""
    results = read_results(grid)
    table = make_table(grid, results, of_cells)
    print(write_table(grid, table))
    write_page(grid, table)
    print(f"the table: {grid.output}/table.md, table.json, and with plots table.html")
    if results.errors:
        cell, error = next(iter(results.errors.items()))
        what = f"{len(results.errors)} of {len(grid.cells)} cells are not compared; {cell}: {error}"
        fix = "mend what it says; the same command goes on"
        raise UserError(grid.file, what, fix)


if __name__ == "__main__":
    command_line.cli(main, __doc__)
