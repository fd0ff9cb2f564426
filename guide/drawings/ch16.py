"""Chapter 16: the published scores of the recipes, and the learning rate over a stage."""

import config
from guide.blocks import ROOT
from guide.drawings.svg import BLUE, GREY, ORANGE, bars, curves, figure, rectangle, text
from train import schedule

BENCHMARK = "TextVQA"
ROWS = 665_000


def published() -> str:
    """Draw the TextVQA scores that the recipes of the kind "base" state."""
    found = []
    for file in sorted((ROOT / "recipes").glob("*-base.toml")):
        recipe, _ = config.load([str(file)], file)
        if BENCHMARK in recipe.published and "mof" not in file.stem:
            found.append((recipe.published[BENCHMARK], file.stem.removesuffix("-base")))
    found.sort()

    names = [name for _, name in found]
    scores = [score for score, _ in found]
    colours = [BLUE if "siglip" in name else ORANGE for name in names]
    body = bars(20, 44, 660, names, scores, "{:.1f}", colours, most=60, label=190)
    body += rectangle(210, 20, 14, 12, BLUE) + text(230, 31, "with SigLIP", 13)
    body += rectangle(330, 20, 14, 12, ORANGE) + text(350, 31, "with CLIP", 13)
    body += text(460, 31, f"published score on {BENCHMARK}", 13, GREY)
    title = f"Published scores on {BENCHMARK} of models trained with the base recipe."
    return figure(720, 60 + 26 * len(found), body, title)


def learning_rate() -> str:
    """Draw the learning rate over stage 2 of the base recipe."""
    recipe, _ = config.load([str(ROOT / "recipes" / "tinyllama-clip-base.toml")], "")
    stage = recipe.stage["finetune"]
    steps = ROWS // stage.global_batch
    points = []
    for step in [*range(0, 200, 20), *range(200, steps, 50), steps - 1]:
        factor = schedule(step, steps, stage.warmup_ratio)
        points.append((step, stage.learning_rate * factor))
    body = curves(20, 16, 680, 240, {"learning rate": points}, "optimizer step", "rate", low=0)
    return figure(720, 270, body, "The learning rate over the steps of stage 2.")


FIGURES = {"16-published.svg": published, "16-schedule.svg": learning_rate}
