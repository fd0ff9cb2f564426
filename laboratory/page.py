"""The page of a grid: its plots and its table, in one file that needs no network and no script.

    write_page(grid, table)             # OUTPUT/table.html

A plot has a score on y: a large dot is the mean of a cell, a bar its deviation over seeds, a small
dot one seed. On x is an axis, whose labels stand in the order of the grid, or a column of costs. It
is drawn with inputs/charts.py, as the demo's report is, and has that report's style.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

from checkpoints.files import write_file, writing
from config import UserError
from inputs import charts
from inputs.charts import Frame, Linear, Log
from inputs.preview import html_page
from laboratory.grid import FIX, Grid, Plot
from laboratory.table import Section, introduction, sections, with_deviation

DEMO_STYLE = Path(__file__).resolve().parents[1] / "demo" / "report.css"

# The columns of costs, and what an axis of them is called.
COLUMNS = {
    "trained": "parameters of the last stage that train",
    "size": "parameters of the model",
    "tokens": "tokens per picture",
    "steps": "optimizer steps",
    "flops": "FLOPs of a training",
    "seconds": "seconds of a training",
}
COLOURS = 6  # of lines, in page.css
WIDE = 8  # times from the least to the most: then x is logarithmic
ROOM = 0.06  # of the axes, beyond the outermost points


class Point(NamedTuple):
    """A cell in a plot."""

    x: float
    label: str  # on x, where that is an axis
    line: str  # the label of the axis that makes the lines, or ""
    score: dict


def write_page(grid: Grid, table: dict):
    """Write table.html into the folder of the grid."""
    style = DEMO_STYLE.read_text() + Path(__file__).with_suffix(".css").read_text()
    with writing(grid.output):
        write_file(grid.output / "table.html", html_page(str(grid.file), body(grid, table), style))


def body(grid: Grid, table: dict) -> str:
    """Return what is on the page: the plots above the tables."""
    parts = [f"<h1>{escape(str(grid.file))}</h1>"]
    parts.append(f"<p>{escape(introduction(table['results']))}</p>")
    plots = [figure(grid, plot, table) for plot in grid.plots]
    if plots:
        parts.append(f'<div class="charts">{"".join(plots)}</div>')
    parts += [section_html(section) for section in sections(table)]
    return "\n".join(parts)


# -------------------------------------------------------------------------------------- plots


def figure(grid: Grid, plot: Plot, table: dict) -> str:
    """Return one plot with its heading and what its lines are."""
    name = plot.x
    if plot.x not in grid.axes:
        name = COLUMNS.get(plot.x, "")
    if not name:
        known = ", ".join([*grid.axes, *COLUMNS])
        raise UserError(f"{grid.file}:plot", f"x = {plot.x!r}: no axis, no column", f"one: {known}")

    points = points_of(grid, plot, table)
    lines = list(dict.fromkeys(point.line for point in points))
    caption = ""
    if any(lines):
        keys = [key(i, line) for i, line in enumerate(lines)]
        caption = f"<figcaption>{''.join(keys)}</figcaption>"

    heading = f"<h3>{escape(plot.y)}, %, by {escape(name)}</h3>"
    drawn = "<p>No cell has both.</p>"
    if points:
        drawn = chart(plot.x in grid.axes, points, lines, name)
    return f"<figure>{heading}{drawn}{caption}</figure>"


def key(number: int, text: str) -> str:
    """Return the mark of a line with its meaning."""
    mark = f'<svg width="10" height="10"><circle class="{colour(number)}" cx="5" cy="5" r="4"/>'
    return f'<span class="key">{mark}</svg>{escape(text)}</span>'


def colour(number: int) -> str:
    """Return the classes of the marks of a line."""
    return f"mean line{number % COLOURS}"


def points_of(grid: Grid, plot: Plot, table: dict) -> list[Point]:
    """Return the cells that have both coordinates. Raises UserError for a score that is not."""
    costs = {}
    for row in table["costs"]:
        costs[tuple(row["labels"].items())] = row

    points = []
    names = set()
    for row in table["results"]["cells"]:
        scores = row.get("scores", {})
        names.update(scores)
        if plot.y not in scores:
            continue

        labels = row["labels"]
        if plot.x in grid.axes:
            label = labels[plot.x]
            x = list(grid.axes[plot.x]).index(label)
        else:
            label = ""
            x = costs[tuple(labels.items())][plot.x]
        if x is not None:
            points.append(Point(float(x), label, line_of(plot, labels), scores[plot.y]))

    if plot.y not in names:
        what = f"y = {plot.y!r}: no such score"
        raise UserError(f"{grid.file}:plot", what, f"one of: {', '.join(sorted(names))}; {FIX}")
    return points


def line_of(plot: Plot, labels: dict[str, str]) -> str:
    """Return the line of a cell: "batch 16, epochs 0.2".

    Where x is an axis, cells with the same label of it differ in another one: each combination of
    the others is a line. Else plot.by is the axis that makes the lines.
    """
    axes = [plot.by]
    if plot.x in labels:
        axes = list(labels)
        axes.remove(plot.x)
    return ", ".join(f"{axis} {labels[axis]}" for axis in axes if axis)


def chart(is_axis: bool, points: list[Point], lines: list[str], name: str) -> str:
    """Return the SVG of a plot. is_axis: whether x is an axis of the grid, of this name."""
    x = axis_of_x(points, is_axis)
    y = axis_of_y(points)
    parts = [charts.opening(f"scores by {name}"), *charts.rules(y)]
    if is_axis:
        names = {x.at(point.x): point.label for point in points}
        parts += charts.names_below(names, name)
    else:
        parts += charts.numbers_below(x, name)

    for number, line in enumerate(lines):
        of_line = [point for point in points if point.line == line]
        of_line.sort(key=lambda point: point.x)

        # Neighbours in a column need have nothing in common but the line's label.
        if is_axis:
            means = [(point.x, point.score["mean"]) for point in of_line]
            parts.append(charts.line(f"curve line{number % COLOURS}", means, x, y))
        for point in of_line:
            parts += marks(point, number, x, y)
    return "".join(parts) + "</svg>"


def axis_of_x(points: list[Point], is_axis: bool) -> Linear:
    """Return the axis of x: logarithmic for a column that spans much."""
    values = [point.x for point in points]
    low = min(values)
    high = max(values)
    if not is_axis and low > 0 and high / low > WIDE:
        factor = (high / low) ** ROOM
        return Log(low / factor, high * factor, Frame.LEFT, Frame.RIGHT)
    room = room_of(values)
    return Linear(low - room, high + room, Frame.LEFT, Frame.RIGHT)


def axis_of_y(points: list[Point]) -> Linear:
    """Return the axis of y, with room for deviations and for each seed."""
    values = []
    for point in points:
        mean = point.score["mean"]
        deviation = point.score["deviation"] or 0.0
        values += [mean - deviation, mean + deviation, *point.score["of_seeds"]]
    room = room_of(values)
    return Linear(min(values) - room, max(values) + room, Frame.BOTTOM, Frame.TOP)


def room_of(values: list[float]) -> float:
    """Return how far an axis goes on beyond these values."""
    span = max(values) - min(values)
    if span == 0:
        return 0.5
    return ROOM * span


def marks(point: Point, number: int, x: Linear, y: Linear) -> list[str]:
    """Return the seeds of a cell, the bar of their deviation, and their mean."""
    at = x.at(point.x)
    parts = []
    for score in point.score["of_seeds"]:
        parts.append(f'<circle class="seed" cx="{at}" cy="{y.at(score)}" r="1.8"/>')

    mean = point.score["mean"]
    deviation = point.score["deviation"]
    if deviation is not None:
        ends = f"M{at},{y.at(mean - deviation)}V{y.at(mean + deviation)}"
        parts.append(f'<path class="whisker" d="{ends}"/>')

    said = f"{point.label} {point.line} {with_deviation(point.score)}"
    title = f"<title>{escape(said.strip())}</title>"
    circle = f'class="{colour(number)}" cx="{at}" cy="{y.at(mean)}" r="4"'
    parts.append(f"<circle {circle}>{title}</circle>")
    return parts


# ------------------------------------------------------------------------------------- tables


def section_html(section: Section) -> str:
    """Return a section of the table as HTML."""
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.above:
        parts.append(f"<p>{escape(section.above)}</p>")
    if section.rows:
        heads = ""
        for i, head in enumerate(section.heads):
            kind = ""
            if i < section.texts:
                kind = ' class="label"'
            heads += f"<th{kind}>{escape(head)}</th>"
        rows = "".join(row_html(row, section) for row in section.rows)
        table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        parts.append(f'<div class="wide">{table}</div>')
    if section.below:
        parts.append(f'<p class="dim">{escape(section.below)}</p>')
    return "\n".join(parts)


def row_html(row: tuple[str, ...], section: Section) -> str:
    """Return a row. The last cell of a short one, an error, takes the columns that are left."""
    cells = []
    for i, cell in enumerate(row):
        kind = "th" if i < section.texts else "td"
        attributes = ""
        if i + 1 == len(row) < len(section.heads):
            attributes = f' class="error" colspan="{len(section.heads) - i}"'
        cells.append(f"<{kind}{attributes}>{escape(cell)}</{kind}>")
    return f"<tr>{''.join(cells)}</tr>"
