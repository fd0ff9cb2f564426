"""The table of a grid: what each cell scores, what that is worth, and what it cost.

    table = make_table(grid, results, costs)    # {"results": ..., "costs": ...}
    print(markdown(table))

"results" has the same digits whatever killed the runs on the way and however many went on at once.
"costs" has seconds and memory, which are of this machine and this day.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from checkpoints.files import write_file, writing
from laboratory.found import CellResult, Cost, Results
from laboratory.grid import Cell, Grid
from laboratory.statistics import LEVEL, Answers, compare, holm, mean_and_deviation

DIGITS = 6  # of what table.json holds


# ----------------------------------------------------------------------------------- as data


def make_table(grid: Grid, results: Results, costs: dict[Cell, Cost]) -> dict:
    """Return the table of a grid, as JSON has it."""
    baseline = results.cells[0]
    floor = {}
    for name, answers in baseline.noise.items():
        floor[name] = as_json(baseline.answers[name], answers, paired=False)

    # The comparisons: every score of every cell but the baseline.
    rows = {result.cell: cell_row(result) for result in results.cells}
    compared = []
    for result in results.cells[1:]:
        for name, answers in result.answers.items():
            difference = as_json(answers, baseline.answers[name])
            rows[result.cell]["scores"][name]["difference"] = difference
            if difference["p"] is not None:
                compared.append(difference)
    levels = [difference["p"] for difference in compared]
    for difference, counts in zip(compared, holm(levels), strict=True):
        difference["counts"] = counts

    # In the order of the grid.
    cells = []
    for cell in grid.cells:
        row = rows.get(cell)
        if row is None:
            row = {"labels": dict(cell.labels), "error": results.errors[cell]}
        cells.append(row)
    return {
        "results": {
            "grid": str(grid.file),
            "seeds": list(grid.seeds),
            "noise_seeds": list(grid.noise_seeds),
            "noise_floor": floor,
            "comparisons": len(compared),
            "cells": cells,
            "notes": results.notes,
        },
        "costs": [cost_row(result, costs.get(result.cell)) for result in results.cells],
    }


def as_json(answers: Answers, other: Answers, paired: bool = True) -> dict:
    """Return how many points one score has more than another; of a single seed that alone."""
    found = compare(answers, other, paired)
    if found is None:
        mean = float(answers.scores.mean() - other.scores.mean())
        return rounded({"mean": mean, "low": None, "high": None, "p": None})
    low, high = found.interval
    return rounded({"mean": found.mean, "low": low, "high": high, "p": found.p})


def cell_row(result: CellResult) -> dict:
    """Return the scores of a cell over its seeds."""
    return {
        "labels": dict(result.cell.labels),
        "scores": {name: score_row(answers) for name, answers in result.answers.items()},
    }


def score_row(answers: Answers) -> dict:
    """Return one score: its mean and deviation over seeds, the seeds, chance, and the control."""
    mean, deviation = mean_and_deviation(answers.scores)
    row = {
        "mean": mean,
        "deviation": deviation,
        "of_seeds": answers.scores.tolist(),
        "chance": answers.chance,
        "questions": answers.questions,
    }
    if answers.blank is not None:
        row["blank"] = float(answers.blank.mean())
    return rounded(row)


def cost_row(result: CellResult, cost: Cost | None) -> dict:
    """Return what a cell takes by its recipe, and what its runs have taken.

    cost: None if the models that the recipe names are not there any more.
    """
    seconds = [one.seconds for one in result.costs if one.seconds is not None]
    memory = [one.memory_gb for one in result.costs if one.memory_gb is not None]
    row = {"labels": dict(result.cell.labels), "steps": result.costs[0].steps}
    for name in ("trained", "size", "tokens", "flops"):
        row[name] = None if cost is None else getattr(cost, name)
    row["seconds"] = sum(seconds) / len(seconds) if seconds else None
    row["interrupted"] = len(result.costs) - len(seconds)
    row["memory_gb"] = max(memory) if memory else None
    return rounded(row)


def rounded(value):
    """Return a value of JSON with all its numbers rounded."""
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return value


def write_table(grid: Grid, table: dict) -> str:
    """Write table.json and table.md into the folder of the grid, and return the latter."""
    text = markdown(table)
    with writing(grid.output):
        write_file(grid.output / "table.json", json.dumps(table, indent=1) + "\n")
        write_file(grid.output / "table.md", text)
    return text


# ------------------------------------------------------------------------------ for a reader


@dataclass(frozen=True)
class Section:
    """A heading, and a table of texts with a note above or below it; any of them may be empty."""

    title: str
    above: str = ""
    heads: tuple[str, ...] = ()
    texts: int = 0  # how many columns are no numbers: the first ones
    rows: tuple[tuple[str, ...], ...] = ()  # a short one ends with a message over the other columns
    below: str = ""


def sections(table: dict) -> list[Section]:
    """Return the table for a reader: the noise floor, each score, then what the cells cost."""
    results = table["results"]
    names = []
    for row in results["cells"]:
        names = names or list(row.get("scores", {}))

    found = [noise_section(results)]
    found += [score_section(results, name) for name in names]
    found.append(Section("Comparisons", comparisons(results["comparisons"])))
    found.append(cost_section(table["costs"]))
    return found


def noise_section(results: dict) -> Section:
    """Return the noise floor: what the baseline differs from itself, with other seeds."""
    title = "Noise floor"
    if not results["noise_floor"]:
        return Section(title, "Not known: the grid has no noise_seeds.")
    mine = ", ".join(map(str, results["seeds"]))
    others = ", ".join(map(str, results["noise_seeds"]))
    above = f"The baseline with the seeds {mine} less the same with the seeds {others}."
    rows = []
    for name, found in results["noise_floor"].items():
        rows.append((name, signed(found["mean"]), interval(found)))
    return Section(title, above, ("score", "difference", "95 % interval"), 1, tuple(rows))


def score_section(results: dict, name: str) -> Section:
    """Return the table of one score."""
    axes = tuple(results["cells"][0]["labels"])
    heads = ("score", "blanked", "chance", "difference", "95 % interval", "p", "")
    rows = []
    for row in results["cells"]:
        labels = tuple(row["labels"].values())
        if "error" in row:
            rows.append((*labels, row["error"]))
            continue
        score = row["scores"][name]
        own = (with_deviation(score), number(score.get("blank")), number(score["chance"]))
        rows.append((*labels, *own, *difference_cells(score.get("difference"))))
    return Section(name, "", (*axes, *heads), len(axes), tuple(rows))


def difference_cells(difference: dict | None) -> tuple[str, ...]:
    """Return the cells of a difference: itself, its interval, p, and whether it counts."""
    if difference is None:
        return ("baseline", "", "", "")
    mean = signed(difference["mean"])
    p = difference["p"]
    if p is None:
        return (mean, "", "", "")
    shown = "< 0.0001"
    if p >= 0.0001:
        shown = f"{p:.4f}"
    mark = "*" if difference["counts"] else ""
    return (mean, interval(difference), shown, mark)


def comparisons(count: int) -> str:
    """Return how many comparisons there are, and what that asks of each."""
    if count == 0:
        return "Nothing is compared: that takes two cells and two seeds."
    return (
        f"{count}. By chance one in twenty intervals excludes zero. A difference with a * counts "
        f"among all {count} by Holm's procedure: its first threshold is p = {LEVEL} / {count} = "
        f"{LEVEL / count:.2g}."
    )


def cost_section(costs: list[dict]) -> Section:
    """Return the table of what the cells cost."""
    axes = tuple(costs[0]["labels"])
    heads = ("steps", "trained", "size", "tokens per picture", "FLOPs", "seconds", "GB")
    rows = []
    for row in costs:
        cells = (
            number(row["steps"], "{:,}"),
            number(row["trained"], "{:,}"),
            number(row["size"], "{:,}"),
            number(row["tokens"], "{}"),
            number(row["flops"], "{:.2e}"),
            number(row["seconds"], "{:.0f}"),
            number(row["memory_gb"], "{:.2f}"),
        )
        rows.append((*row["labels"].values(), *cells))

    below = (
        "Trained: parameters of the last stage. Size: of the model, without blocks that never run. "
        "FLOPs: of one training, by training/estimate.py. Seconds: of training, mean of the runs. "
        "GB: peak memory of the process."
    )
    left_out = sum(row["interrupted"] for row in costs)
    if left_out:
        below += f" {left_out} runs were interrupted within a stage: their seconds are left out."
    return Section("What it cost", "", (*axes, *heads), len(axes), tuple(rows), below)


def introduction(results: dict) -> str:
    """Return what the numbers of the scores are."""
    seeds = ", ".join(map(str, results["seeds"]))
    said = f"Seeds {seeds}. Scores in percent: mean ± standard deviation over seeds."
    for note in results["notes"]:
        said += f" Note: {note}."
    return said


def markdown(table: dict) -> str:
    """Return the table as Markdown."""
    results = table["results"]
    lines = [f"# {results['grid']}", "", introduction(results)]
    for section in sections(table):
        lines += ["", f"## {section.title}"]
        if section.above:
            lines += ["", section.above]
        if section.rows:
            numbers = len(section.heads) - section.texts
            lines += ["", as_row(section.heads)]
            lines.append(as_row(("---",) * section.texts + ("--:",) * numbers))
            lines += [as_row(row) for row in section.rows]
        if section.below:
            lines += ["", section.below]
    return "\n".join(lines) + "\n"


def as_row(cells: tuple[str, ...]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def signed(value: float) -> str:
    """Return a difference with its sign."""
    return f"{value:+.2f}"


def interval(found: dict) -> str:
    """Return [low, high]; nothing where there is none."""
    if found["low"] is None:
        return ""
    return f"[{signed(found['low'])}, {signed(found['high'])}]"


def with_deviation(score: dict) -> str:
    """Return mean ± deviation."""
    if score["deviation"] is None:
        return number(score["mean"])
    return f"{number(score['mean'])} ± {number(score['deviation'])}"


def number(value: float | None, form: str = "{:.2f}") -> str:
    """Return a number in a form; a dash for none."""
    if value is None:
        return "–"
    return form.format(value)
