"""Chapter 18: what a recipe differs from itself."""

from guide.drawings.replay import names_after
from guide.drawings.svg import BLUE, GREY, LIGHT, ORANGE, circle, figure, line, text


def noise() -> str:
    """Draw the scores of the chapter's sixteen runs in two groups, with the groups' means."""
    scores = names_after("18-laboratory.md", "noise = 100 * run_recipe")["noise"]
    groups = {"recipe A": (scores[:8], BLUE), "the same again": (scores[8:], ORANGE)}
    low = int(min(scores)) - 1
    high = int(max(scores)) + 2

    def across(score: float) -> float:
        return 150 + (score - low) / (high - low) * 530

    body = ""
    for tick in range(low, high + 1):
        body += line(across(tick), 30, across(tick), 140, LIGHT, 1)
        body += text(across(tick), 160, str(tick), 12, GREY, "middle")
    body += text(415, 182, "score of a run, percent", 12, GREY, "middle")
    for row, (name, (of_group, colour)) in enumerate(groups.items()):
        y = 60 + 50 * row
        body += text(130, y + 5, name, 14, anchor="end")
        for score in of_group:
            body += circle(across(score), y, 6, colour)
        mean = across(of_group.mean())
        body += line(mean, y - 18, mean, y + 18, colour, 3)
    return figure(720, 196, body, "Eight runs and eight more of one recipe: their scores differ.")


FIGURES = {"18-noise.svg": noise}
