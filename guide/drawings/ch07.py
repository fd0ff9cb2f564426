"""Chapter 7: the soft words that a connector learns, and what tuning modes cost."""

from guide.drawings.replay import names_after
from guide.drawings.svg import BLUE, GREEN, GREY, ORANGE, PINK, bars, figure, heat_map, text

LAST = "costs[name] = operations"  # of the block that has all that is drawn


def soft_words() -> str:
    """Draw the cosines of the connector's outputs with the word embeddings, after stage 1."""
    names = names_after("07-stages.md", LAST)
    cell = 40
    left = 100
    top = 92
    body = text(24, 30, "cosine with the embedding of each word", 13, GREY)
    values = names["cosine"].tolist()
    body += heat_map(left, top, values, cell, -0.6, 0.6, names["COLOURS"], names["WORDS"])
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            middle = left + (j + 0.5) * cell
            body += text(middle, top + (i + 0.5) * cell + 4, f"{value:.2f}", 11, anchor="middle")
    return figure(
        720, 275, body, "The outputs of a connector lie nearest to the words they stand for."
    )


def cost() -> str:
    """Draw the operations of a row in four tuning modes."""
    costs = names_after("07-stages.md", LAST)["costs"]
    body = text(
        24, 30, "TFLOP for one row, forward and backward: TinyLlama-1.1B with CLIP-L", 13, GREY
    )
    values = [value / 1e12 for value in costs.values()]
    body += bars(24, 44, 660, list(costs), values, "{:.1f}", (BLUE, ORANGE, GREEN, PINK), label=190)
    return figure(
        720, 164, body, "Freezing the language model saves less than a third of the work."
    )


FIGURES = {"07-soft-words.svg": soft_words, "07-cost.svg": cost}
