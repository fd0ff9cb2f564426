"""Figures of chapter 6: how often a token counts, and the schedule of the learning rate."""

import random

from demo.scenes import draw_scene
from guide.drawings import svg
from inputs.templates import byte_tokenizer, encode
from packing import IGNORE
from train import schedule

GROUPS = [[0, 2], [4, 6], [1, 3], [5, 7]]
NAMES = ["two counts", "two more counts", "two descriptions", "two more descriptions"]


def supervised(row: int) -> int:
    """Return how many tokens of one of the chapter's samples are learned."""
    scene = draw_scene(random.Random(row), "train")
    answer = str(len(scene))
    if row % 2:
        names = [f"a {thing['colour']} {thing['shape']}" for thing in scene]
        answer = ", ".join(names)
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": answer}]
    _, labels = encode(turns, byte_tokenizer(), "plain")
    return sum(label != IGNORE for label in labels)


def weights() -> str:
    """Draw how often a token of each micro-batch counts, with one mean and with a mean of means."""
    tokens = []  # of each micro-batch
    names = []
    for name, group in zip(NAMES, GROUPS, strict=True):
        count = sum(map(supervised, group))
        tokens.append(count)
        names.append(f"{name}, {count} tokens")

    # Where means are averaged, every micro-batch counts as much as the average one.
    average = sum(tokens) / len(tokens)
    factors = [average / count for count in tokens]
    most = max(factors)

    body = svg.text(20, 28, "How often a token counts", bold=True)
    body += svg.text(20, 54, "divided by the tokens of the step", 13, svg.GREY)
    ones = [1.0] * len(names)
    body += svg.bars(20, 62, 680, names, ones, most=most, label=245)
    body += svg.text(20, 194, "a mean of each micro-batch, and the mean of these", 13, svg.GREY)
    body += svg.bars(20, 202, 680, names, factors, colours=(svg.ORANGE,), most=most, label=245)
    return svg.figure(720, 322, body, "How often a token counts in each of four micro-batches")


def rates() -> str:
    """Draw the factor on the learning rate over a run of 300 steps."""
    points = [(step, schedule(step, 300, 0.03)) for step in range(301)]
    body = svg.curves(20, 16, 680, 260, {"warm-up of 3 %": points}, "step", "factor", low=0.0)
    return svg.figure(720, 290, body, "The factor on the learning rate over 300 steps")


FIGURES = {"06-weights.svg": weights, "06-schedule.svg": rates}
