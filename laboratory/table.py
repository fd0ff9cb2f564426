"""The table of a grid: what each cell scores, what that is worth, and what it cost.

    table = make_table(grid, results, costs)    # {"results": ..., "costs": ...}
    print(markdown(table))

"results" has the same digits whatever killed the runs on the way and however many went on at once.
"costs" has seconds and memory, which are of this machine and this day.
"""

from __future__ import annotations

import json

from checkpoints.files import write_file, writing
from laboratory.costs import Cost
from laboratory.grid import Cell, Grid
from laboratory.results import Answers, CellResult, Results
from laboratory.statistics import LEVEL, compare, holm, mean_and_deviation

DIGITS = 6  # of what table.json holds


# ----------------------------------------------------------------------------------- as data


def make_table(grid: Grid, results: Results, costs: dict[Cell, Cost]) -> dict:
    """Return the table of a grid, as JSON has it."""
    baseline = results.cells[0]
    floor = {}
    for name, answers in baseline.noise.items():
        found = compare(baseline.answers[name], answers, paired=False)
        floor[name] = rounded(found._asdict())

    # The comparisons: every score of every cell but the baseline.
    rows = {result.cell: cell_row(result) for result in results.cells}
    compared = []
    for result in results.cells[1:]:
        for name, answers in result.answers.items():
            found = compare(answers, baseline.answers[name])
            score = rows[result.cell]["scores"][name]
            score["difference"] = rounded(found._asdict())
            if found.p is not None:
                compared.append((found.p, score["difference"]))
    for counts, (_, difference) in zip(holm([p for p, _ in compared]), compared, strict=True):
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


# ------------------------------------------------------------------------------- as Markdown


def markdown(table: dict) -> str:
    """Return the table as Markdown: the noise floor, each score, then what the cells cost."""
    results = table["results"]
    seeds = ", ".join(map(str, results["seeds"]))
    lines = [f"# {results['grid']}", "", f"Seeds {seeds}. Percent; mean ± deviation over seeds."]
    lines += [f"Note: {note}." for note in results["notes"]]
    lines += ["", *noise_lines(results), ""]
    names = list(next(row for row in results["cells"] if "scores" in row)["scores"])
    for name in names:
        lines += [f"## {name}", "", *score_lines(results, name), ""]
    lines += [*comparison_lines(results), "", "## What it cost", "", *cost_lines(table), ""]
    return "\n".join(lines)


def noise_lines(results: dict) -> list[str]:
    """Return the noise floor: what the baseline differs from itself, with other seeds."""
    if not results["noise_floor"]:
        return ["No noise floor: the grid has no noise_seeds."]
    seeds = ", ".join(map(str, results["noise_seeds"]))
    lines = [
        "Noise floor: the baseline differs from itself, with the seeds "
        f"{seeds} in place of its own, by so much:",
        "",
        "| score | difference | 95 % interval |",
        "|---|--:|--:|",
    ]
    for name, found in results["noise_floor"].items():
        lines.append(f"| {name} | {found['mean']:+.2f} | {interval(found)} |")
    return lines


def score_lines(results: dict, name: str) -> list[str]:
    """Return the table of one score."""
    axes = list(results["cells"][0]["labels"])
    has_blank = False
    for row in results["cells"]:
        has_blank = has_blank or "blank" in row.get("scores", {}).get(name, {})
    heads = [*axes, "score", "blanked"] if has_blank else [*axes, "score"]
    heads += ["chance", "difference", "95 % interval", "p", ""]
    lines = [as_row(heads), as_row(["---"] * len(axes) + ["--:"] * (len(heads) - len(axes)))]

    for row in results["cells"]:
        labels = list(row["labels"].values())
        if "error" in row:
            lines.append(as_row([*labels, cell_text(row["error"])]))
            continue
        score = row["scores"][name]
        cells = [*labels, with_deviation(score)]
        if has_blank:
            cells.append(number(score.get("blank")))
        cells += [number(score["chance"]), *difference_cells(score.get("difference"))]
        lines.append(as_row(cells))
    return lines


def difference_cells(difference: dict | None) -> list[str]:
    """Return the cells of a difference: itself, its interval, p, and whether it counts."""
    if difference is None:
        return ["baseline", "", "", ""]
    mark = "*" if difference.get("counts") else ""
    p = difference["p"]
    if p is None:
        return [f"{difference['mean']:+.2f}", "", "", ""]
    shown = f"{p:.4f}" if p >= 0.0001 else "< 0.0001"
    return [f"{difference['mean']:+.2f}", interval(difference), shown, mark]


def comparison_lines(results: dict) -> list[str]:
    """Return how many comparisons there are, and what that asks of each."""
    count = results["comparisons"]
    if count == 0:
        return ["Nothing is compared: that takes two seeds and two cells."]
    return [
        f"{count} comparisons. An interval excludes zero by chance in one of twenty. *: this one "
        f"counts among all of them by Holm's procedure, whose first threshold is p = {LEVEL} / "
        f"{count} = {LEVEL / count:.2g}."
    ]


def cost_lines(table: dict) -> list[str]:
    """Return the table of what the cells cost."""
    axes = list(table["costs"][0]["labels"])
    heads = [*axes, "steps", "trained", "size", "tokens per picture", "FLOPs", "s", "GB"]
    lines = [as_row(heads), as_row(["---"] * len(axes) + ["--:"] * (len(heads) - len(axes)))]
    is_marked = False
    for row in table["costs"]:
        seconds = number(row["seconds"], "{:.0f}")
        if row["interrupted"]:
            seconds += f" ({row['interrupted']} left out)"
            is_marked = True
        cells = [
            *row["labels"].values(),
            number(row["steps"], "{:,}"),
            number(row["trained"], "{:,}"),
            number(row["size"], "{:,}"),
            number(row["tokens"], "{}"),
            number(row["flops"], "{:.2e}"),
            seconds,
            number(row["memory_gb"], "{:.2f}"),
        ]
        lines.append(as_row(cells))
    lines += [
        "",
        "trained: parameters of the last stage; size: of the model; FLOPs: of one training, "
        "forward and backward, by training/estimate.py; s: of training, mean of the seeds; GB: the "
        "peak.",
    ]
    if is_marked:
        lines.append("Left out of the seconds: runs that were interrupted within a stage.")
    return lines


def as_row(cells: list[str]) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |"


def cell_text(text: str) -> str:
    """Return a text as it may stand in a cell."""
    return text.replace("|", "\\|")


def interval(found: dict) -> str:
    """Return [low, high]; nothing where there is none."""
    if found["low"] is None:
        return ""
    return f"[{found['low']:+.2f}, {found['high']:+.2f}]"


def with_deviation(score: dict) -> str:
    """Return mean ± deviation."""
    if score["deviation"] is None:
        return f"{score['mean']:.2f}"
    return f"{score['mean']:.2f} ± {score['deviation']:.2f}"


def number(value: float | None, form: str = "{:.2f}") -> str:
    """Return a number in a form; a dash for none."""
    if value is None:
        return "–"
    return form.format(value)
