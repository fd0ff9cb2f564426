"""Chapter 10: maps of attention and of occlusion on one picture."""

from guide.drawings.replay import names_after
from guide.drawings.svg import GREY, figure, heat_map, picture, rectangle, text


def maps() -> str:
    """Draw the picture, and for both questions the maps of the token that answers."""
    names = names_after("10-inside.md", "cells, colours = [6, 9]")
    shown = names["picture"]
    body = text(24, 30, "the picture", 14)
    body += picture(24, 44, shown.permute(1, 2, 0).tolist(), cell=4)
    body += rectangle(24, 44, 128, 128, stroke=GREY)

    for row, kind in enumerate(("plain", "striped")):
        answer = [5 + names["colours"][row]]
        seen = names["inspect_answer"](names["model"], names["question"](row), answer, shown)
        left = 190 + 270 * row
        word = names["WORDS"][answer[0]]
        body += text(left, 30, f"colour of {kind}: {word}", 14, bold=True)
        body += heat_map(left, 44, seen.attention_map()[0].tolist(), 30, low=0)
        body += heat_map(left + 130, 44, seen.occlusion[0].tolist(), 15, low=0)
        body += text(left, 184, "attention", 12, GREY)
        fall = f"occlusion ({seen.occlusion.max():.1f} nats)"
        body += text(left + 130, 184, fall, 11, GREY)
    return figure(720, 204, body, "Attention and occlusion for two questions about one picture.")


FIGURES = {"10-maps.svg": maps}
TRAINED = ("10-maps.svg",)  # of the model that the chapter trains, see figures.same_figure
