"""Primitives of the guide's figures: text, boxes, arrows, heat maps, bars and curves, as SVG text.

    body = box(20, 20, 120, 44, "encoder") + arrow(140, 42, 190, 42) + text(200, 46, "(n, C)")
    return figure(320, 90, body, "An encoder turns a picture into features.")

Every primitive returns a piece of SVG, and pieces are joined with +. Lengths are in units of the
picture, which is as wide as its text: a chapter is 720 wide. x grows to the right, y downwards; the
place of a text is the left end of its base line. The background is painted, so a picture is
readable on a dark page, too.
"""

import math
from collections.abc import Sequence
from html import escape

from inputs.charts import Linear, Log

# A palette that also those who see few colours can tell apart (Okabe and Ito, 2008), a bit darker.
INK = "#1d2430"
GREY = "#6b7280"
LIGHT = "#e5e7eb"
PAPER = "#ffffff"
BLUE = "#0b68a8"
ORANGE = "#c95f00"
GREEN = "#00795a"
PINK = "#b5568f"
YELLOW = "#b58900"
COLOURS = (BLUE, ORANGE, GREEN, PINK, YELLOW, GREY)

# Pale partners of the colours, to fill boxes with text in them.
PALE = {
    BLUE: "#dcebf7",
    ORANGE: "#fbe8d6",
    GREEN: "#d8efe7",
    PINK: "#f6e3ee",
    YELLOW: "#f6eecb",
    GREY: "#f0f1f3",
}

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'Liberation Mono', monospace"

# The two ends of heat maps, and the middle of those that have a sign.
WHITE_RGB = (255, 255, 255)
BLUE_RGB = (11, 104, 168)
ORANGE_RGB = (201, 95, 0)


def figure(width: float, height: float, body: str, title: str) -> str:
    """Return a whole picture; `title` says in a sentence what is seen."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {number(width)} {number(height)}" '
        f'width="{number(width)}" height="{number(height)}" role="img" '
        f'font-family="{FONT}" font-size="14">\n'
        f"<title>{escape(title)}</title>\n"
        f"{rectangle(0, 0, width, height, fill=PAPER, radius=8)}{body}</svg>\n"
    )


def number(value: float) -> str:
    """Return a length with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


# ------------------------------------------------------------------------------------ single marks


def text(
    x: float,
    y: float,
    words: str,
    size: float = 14,
    colour: str = INK,
    anchor: str = "start",
    bold: bool = False,
    mono: bool = False,
) -> str:
    """Return one line of text. anchor: start, middle or end, where x is."""
    style = ""
    if bold:
        style += ' font-weight="600"'
    if mono:
        style += f' font-family="{MONO}" xml:space="preserve"'
    return (
        f'<text x="{number(x)}" y="{number(y)}" font-size="{number(size)}" fill="{colour}" '
        f'text-anchor="{anchor}"{style}>{escape(words)}</text>\n'
    )


def lines(x: float, y: float, words: Sequence[str], size: float = 14, **style) -> str:
    """Return several lines of text, one below the other; y is the first one's base line."""
    found = ""
    for i, line in enumerate(words):
        found += text(x, y + i * size * 1.35, line, size, **style)
    return found


def rectangle(
    x: float,
    y: float,
    width: float,
    height: float,
    fill: str = "none",
    stroke: str = "none",
    radius: float = 0,
    opacity: float = 1,
) -> str:
    """Return a rectangle."""
    see_through = "" if opacity == 1 else f' opacity="{number(opacity)}"'
    return (
        f'<rect x="{number(x)}" y="{number(y)}" width="{number(width)}" '
        f'height="{number(height)}" rx="{number(radius)}" fill="{fill}" stroke="{stroke}"'
        f"{see_through}/>\n"
    )


def line(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    colour: str = GREY,
    width: float = 1.5,
    dashed: bool = False,
) -> str:
    """Return a straight line."""
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<line x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}" '
        f'stroke="{colour}" stroke-width="{number(width)}"{dashes}/>\n'
    )


def circle(x: float, y: float, radius: float, fill: str = BLUE, stroke: str = "none") -> str:
    """Return a circle around (x, y)."""
    return (
        f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(radius)}" '
        f'fill="{fill}" stroke="{stroke}"/>\n'
    )


def polygon(points: Sequence[tuple[float, float]], fill: str) -> str:
    """Return a filled polygon."""
    corners = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return f'<polygon points="{corners}" fill="{fill}"/>\n'


def arrow(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    colour: str = GREY,
    width: float = 1.5,
    dashed: bool = False,
) -> str:
    """Return a line with a head at its second end."""
    length = math.hypot(x2 - x1, y2 - y1)
    along_x = (x2 - x1) / length
    along_y = (y2 - y1) / length
    head = 8

    # The line ends inside the head. The head's base stands across the line.
    base_x = x2 - head * along_x
    base_y = y2 - head * along_y
    left = (base_x - head / 2 * along_y, base_y + head / 2 * along_x)
    right = (base_x + head / 2 * along_y, base_y - head / 2 * along_x)
    return line(x1, y1, base_x, base_y, colour, width, dashed) + polygon(
        [(x2, y2), left, right], colour
    )


def box(
    x: float,
    y: float,
    width: float,
    height: float,
    words: str | Sequence[str],
    colour: str = BLUE,
    size: float = 14,
) -> str:
    """Return a rounded box with one or several lines of text in its middle. colour: of COLOURS."""
    if isinstance(words, str):
        words = [words]
    step = size * 1.3
    first = y + height / 2 - (len(words) - 1) * step / 2 + size * 0.35
    found = rectangle(x, y, width, height, PALE[colour], colour, radius=6)
    for i, one in enumerate(words):
        found += text(x + width / 2, first + i * step, one, size, INK, "middle")
    return found


# ------------------------------------------------------------------------------------ many numbers


def mix(low: tuple, high: tuple, share: float) -> str:
    """Return the colour that lies `share` of the way between two, each (red, green, blue)."""
    share = min(max(share, 0.0), 1.0)
    parts = [round(a + (b - a) * share) for a, b in zip(low, high, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in parts)


def shade(value: float, low: float, high: float) -> str:
    """Return the colour of a number in a heat map.

    From white to blue between low and high. If low is below zero, zero is white, and numbers below
    it are orange.
    """
    if low < 0:
        most = max(-low, high)
        if value < 0:
            return mix(WHITE_RGB, ORANGE_RGB, -value / most)
        return mix(WHITE_RGB, BLUE_RGB, value / most)
    span = high - low
    if span == 0:
        span = 1.0
    return mix(WHITE_RGB, BLUE_RGB, (value - low) / span)


def heat_map(
    x: float,
    y: float,
    values: Sequence[Sequence[float]],
    cell: float = 14,
    low: float | None = None,
    high: float | None = None,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    size: float = 12,
) -> str:
    """Return a matrix as squares; see `shade` for its colours.

    values: rows of numbers; a tensor's .tolist(). low, high: the ends of the colours; None: those
    of the values. rows, columns: labels, at the left and (turned) above, for which the caller
    leaves room.
    """
    numbers = [value for row in values for value in row]
    if low is None:
        low = min(numbers)
    if high is None:
        high = max(numbers)

    found = ""
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            colour = shade(value, low, high)
            found += rectangle(x + j * cell, y + i * cell, cell, cell, colour, LIGHT)
    for i, name in enumerate(rows):
        found += text(x - 6, y + (i + 0.5) * cell + size * 0.35, name, size, INK, "end")
    for j, name in enumerate(columns):
        middle = x + (j + 0.5) * cell + size * 0.35
        place = f"translate({number(middle)} {number(y - 6)}) rotate(-90)"
        found += f'<g transform="{place}">{text(0, 0, name, size)}</g>\n'
    return found


def picture(x: float, y: float, pixels: Sequence, cell: float = 4) -> str:
    """Return a small picture as squares. pixels: rows of (red, green, blue), 0 to 255.

    Squares of one colour beside each other become one.
    """
    found = ""
    for i, row in enumerate(pixels):
        start = 0
        for j in range(1, len(row) + 1):
            if j == len(row) or tuple(row[j]) != tuple(row[start]):
                colour = mix(tuple(row[start]), WHITE_RGB, 0)
                width = (j - start) * cell
                found += rectangle(x + start * cell, y + i * cell, width, cell, colour)
                start = j
    return f'<g shape-rendering="crispEdges">\n{found}</g>\n'  # no seams between squares


def bars(
    x: float,
    y: float,
    width: float,
    names: Sequence[str],
    values: Sequence[float],
    form: str = "{:.2f}",
    colours: Sequence[str] = (BLUE,),
    most: float | None = None,
    label: float = 150,
    step: float = 26,
) -> str:
    """Return horizontal bars, one below the other, each with its name and its number.

    width: of all of it; label: of the names, at the left. form: of the numbers. most: the value of
    the longest bar; None: the largest. step: from one bar to the next.
    """
    if most is None:
        most = max(values)
    room = width - label - 60  # for the number behind the bar
    found = ""
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        top = y + i * step
        colour = colours[i % len(colours)]
        length = max(room * value / most, 1)
        found += text(x + label - 8, top + step * 0.58, name, 13, INK, "end")
        found += rectangle(x + label, top + 3, length, step - 8, colour, radius=2)
        found += text(x + label + length + 6, top + step * 0.58, form.format(value), 13)
    return found


def curves(
    x: float,
    y: float,
    width: float,
    height: float,
    series: dict[str, Sequence[tuple[float, float]]],
    x_label: str = "",
    y_label: str = "",
    logarithmic: bool = False,
    low: float | None = None,
    high: float | None = None,
) -> str:
    """Return curves with axes and a legend above them.

    series: a name -> its points (x, y). logarithmic: the y axis, whose values are then above zero.
    low, high: the ends of the y axis; None: those of the points. The axes' labels are inside
    width and height.
    """
    left = x + 52
    bottom = y + height - 40
    top = y + 26
    right = x + width - 12
    points = [point for one in series.values() for point in one]
    first = min(point[0] for point in points)
    last = max(point[0] for point in points)
    if low is None:
        low = min(point[1] for point in points)
    if high is None:
        high = max(point[1] for point in points)

    axis_x = Linear(first, last, left, right)
    axis_y = Linear(low, high, bottom, top)
    if logarithmic:
        axis_y = Log(low, high, bottom, top)

    # Round numbers at the axes, where there are any between their ends.
    found = line(left, bottom, right, bottom) + line(left, top, left, bottom)
    for value in axis_y.ticks():
        above = axis_y.at(value)
        found += line(left, above, right, above, LIGHT, 1)
        found += text(left - 6, above + 4, f"{value:.6g}", 12, GREY, "end")
    for place in axis_x.ticks():
        found += text(axis_x.at(place), bottom + 17, f"{place:.6g}", 12, GREY, "middle")
    found += text((left + right) / 2, bottom + 35, x_label, 12, GREY, "middle")
    found += text(x, y + 12, y_label, 12, GREY)

    legend = left + 8 + 7 * len(y_label)
    for i, (name, one) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{number(axis_x.at(a))},{number(axis_y.at(b))}" for a, b in one)
        found += (
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.2" '
            'stroke-linejoin="round"/>\n'
        )
        found += line(legend, y + 8, legend + 20, y + 8, colour, 3)
        found += text(legend + 26, y + 12, name, 13)
        legend += 50 + 7.4 * len(name)
    return found


def tokens(
    x: float,
    y: float,
    words: Sequence[str],
    colours: Sequence[str],
    below: Sequence[str] = (),
    width: float = 680,
    size: float = 12,
) -> str:
    """Return tokens as boxes in a row, with a text below each; rows are broken at `width`.

    colours: one of COLOURS for each token.
    """
    found = ""
    at = x
    top = y
    letter = size * 0.62
    for i, word in enumerate(words):
        under = below[i] if below else ""
        needed = max(len(word), len(under)) * letter + 10
        if at + needed > x + width:
            at = x
            top += size * 4 if below else size * 2.4
        found += rectangle(at, top, needed - 3, size * 1.8, PALE[colours[i]], colours[i], 3)
        middle = at + (needed - 3) / 2
        found += text(middle, top + size * 1.25, word, size, INK, "middle", mono=True)
        if under:
            found += text(middle, top + size * 3, under, size - 1, colours[i], "middle", mono=True)
        at += needed
    return found
