"""Chapter 8: what a blind answerer reaches, on careless questions and on balanced ones."""

from guide.drawings.replay import names_after
from guide.drawings.svg import GREEN, GREY, ORANGE, bars, figure, text


def blind_scores() -> str:
    """Draw chance and the blind answerer's scores, for both ways of asking."""
    names = names_after("08-seeing.md", "balanced_scores = percent_of_kinds")
    body = ""
    for column, (title, scores) in enumerate(
        {
            "careless questions": names["careless_scores"],
            "the demo's benchmark": names["balanced_scores"],
        }.items()
    ):
        left = 20 + 350 * column
        body += text(left, 30, title, 15, bold=True)
        for row, (kind, (chance, reached)) in enumerate(sorted(scores.items())):
            label = [f"{kind}: chance", "blind"]
            colours = (GREY, (ORANGE, GREEN)[column])
            body += bars(
                left,
                44 + 58 * row,
                350,
                label,
                [chance, reached],
                "{:.0f} %",
                colours,
                most=100,
                label=140,
                step=24,
            )
    return figure(720, 350, body, "Careless questions can be answered blind, balanced ones not.")


FIGURES = {"08-blind.svg": blind_scores}
