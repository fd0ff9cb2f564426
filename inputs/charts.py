"""Charts as SVG, for pages that need no network and no script: axes, rules, numbers and lines.

    x = Linear(0, 600, Frame.LEFT, Frame.RIGHT)
    y = Log(0.1, 4.5, Frame.BOTTOM, Frame.TOP)
    parts = [opening("loss over steps"), *rules(y), *numbers_below(x, "optimizer steps")]
    parts.append(line("curve", [(0, 4.5), (600, 0.1)], x, y))

Lengths are in the units of the SVG, whose y grows downwards. The page's CSS says how an `axis`, a
`curve` or a `point` is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape


class Frame:
    """The size of a chart, and where its axes begin and end."""

    WIDTH = 440
    HEIGHT = 250
    LEFT = 44
    RIGHT = WIDTH - 8
    TOP = 8
    BOTTOM = HEIGHT - 34


class Linear:
    """An axis from `low` to `high`, between two places of the SVG."""

    def __init__(self, low: float, high: float, begin: float, end: float):
        self.low = low
        self.high = high
        self.begin = begin
        self.end = end

    def at(self, value: float) -> float:
        """Return where a value lies; a tenth of a pixel is exact enough."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.begin + (self.end - self.begin) * share, 1)

    def ticks(self) -> list[float]:
        """Return round numbers within the axis, at most six."""
        span = self.high - self.low
        size = 10 ** math.floor(math.log10(span))

        # Take the smallest round distance that leaves room between the numbers.
        for factor in (0.1, 0.2, 0.5, 1, 2, 5):
            distance = size * factor
            if span / distance <= 5:
                break

        first = math.ceil(self.low / distance)
        last = math.floor(self.high / distance)
        ticks = []
        for i in range(first, last + 1):
            tick = distance * i
            ticks.append(round(tick, 10))  # 0.3, not 0.30000000000000004
        return ticks


class Log(Linear):
    """An axis whose equal steps are equal factors."""

    def at(self, value: float) -> float:
        """Return where a value lies."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.begin + (self.end - self.begin) * share, 1)

    def ticks(self) -> list[float]:
        """Return powers of ten within the axis, at most seven; on a short one 1, 2 and 5 times."""
        first = math.floor(math.log10(self.low))
        last = math.ceil(math.log10(self.high))
        digits = (1,)
        if last - first <= 3:
            digits = (1, 2, 5)

        # Of many powers only every second, or third, ...
        apart = max(1, math.ceil((last - first) / 6))
        ticks = []
        for decade in range(first, last + 1, apart):
            for digit in digits:
                tick = digit * 10.0**decade
                if self.low <= tick <= self.high:
                    ticks.append(tick)
        return ticks


def opening(what: str) -> str:
    """Return the opening tag of a chart. what: its description, for who does not see it."""
    size = f"{Frame.WIDTH} {Frame.HEIGHT}"
    return f'<svg viewBox="0 0 {size}" role="img" aria-label="{escape(what)}">'


def rules(y: Linear) -> list[str]:
    """Return a horizontal rule at each tick, with its number on the left."""
    parts = []
    for tick in y.ticks():
        place = y.at(tick)
        ends = f'x1="{Frame.LEFT}" x2="{Frame.RIGHT}" y1="{place}" y2="{place}"'
        parts.append(f'<line class="axis" {ends}/>')

        # Half a line lower, to be level with the rule.
        parts.append(text(Frame.LEFT - 7, place + 4, f"{tick:g}", "end"))
    return parts


def numbers_below(x: Linear, name: str) -> list[str]:
    """Return the number of each tick below the chart, and below them the name of the axis."""
    numbers = {}
    for tick in x.ticks():
        numbers[x.at(tick)] = f"{tick:g}"
    return names_below(numbers, name)


def names_below(names: dict[float, str], name: str) -> list[str]:
    """Return names below the chart, {place: name}, and below them the name of the axis."""
    parts = []
    for place, shown in names.items():
        parts.append(text(place, Frame.BOTTOM + 17, shown))
    middle = (Frame.LEFT + Frame.RIGHT) / 2
    parts.append(text(middle, Frame.HEIGHT - 2, name))
    return parts


def text(x: float, y: float, shown: str, anchor: str = "middle") -> str:
    """Return a text at a place."""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(shown)}</text>'


def line(kind: str, points: Iterable[tuple[float, float]], x: Linear, y: Linear) -> str:
    """Return a line through points, (value on x, value on y). kind: its class."""
    places = " ".join(f"{x.at(a)},{y.at(b)}" for a, b in points)
    return f'<polyline class="{kind}" points="{places}"/>'
