"""Chapter 9: what a cache saves, and how rows are refilled."""

from guide.drawings.replay import names_after
from guide.drawings.svg import COLOURS, GREY, INK, PALE, curves, figure, line, rectangle, text

LAST = "timeline = []"  # in the block that has all that is drawn


def cache_saves() -> str:
    """Draw how many tokens go through the blocks for each new token."""
    names = names_after("09-answering.md", LAST)
    series = {
        "without a cache": list(enumerate(names["without_cache"], 1)),
        "with a cache": list(enumerate(names["with_cache"], 1)),
    }
    label = "tokens through each block"
    body = curves(20, 16, 680, 240, series, "new token of the answer", label, low=0)
    return figure(
        720, 270, body, "Without a cache each token costs a whole row, with it only itself."
    )


def refill() -> str:
    """Draw which request each row of the engine works for, step by step."""
    timeline = names_after("09-answering.md", LAST)["timeline"]
    left = 70
    top = 40
    width = 26
    height = 34
    body = text(24, 24, "which request each row decodes, step after step", 13, GREY)
    rows = max(len(step) for step in timeline)
    for row in range(rows):
        body += text(left - 10, top + row * height + 21, f"row {row}", 12, GREY, "end")
    for at, step in enumerate(timeline):
        for row, request in enumerate(step):
            colour = COLOURS[request % len(COLOURS)]
            x = left + at * width
            y = top + row * height
            body += rectangle(x, y, width - 2, height - 4, PALE[colour], colour, radius=3)
            body += text(x + width / 2 - 1, y + 20, str(request), 12, INK, "middle")
    bottom = top + rows * height + 6
    body += line(left, bottom, left + len(timeline) * width, bottom)
    body += text(left, bottom + 18, f"{len(timeline)} steps", 12, GREY)
    return figure(
        720, bottom + 34, body, "A row takes the next request as soon as its answer ends."
    )


FIGURES = {"09-cache.svg": cache_saves, "09-refill.svg": refill}
