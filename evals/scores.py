"""Scores: the mean of what answers earn, for each group of questions, beside its chance level.

A score is {"score": percent, "chance": percent, "n": questions}. Chance is what somebody reaches
who does not look at the picture. With options it is one over their number. For open answers it is
what the best constant answer earns: the same word to all questions of the group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from config import printable


@dataclass(frozen=True)
class Result:
    """What one answer earns, and the names of the scores that it counts in."""

    groups: Sequence[str]
    credit: float  # 0 to 1, or a bool
    chance: float = 0.0  # what a guess earns on average


@dataclass(frozen=True)
class OpenResult:
    """The same for a question without options: no guess, but what each answer would have earned."""

    groups: Sequence[str]
    credit: float
    credit_of: dict[str, float]  # {answer: its credit}, of all answers that earn any


def group_scores(results: Iterable[Result]) -> dict[str, dict]:
    """Return {group: score}, groups in the order of their first appearance."""
    # A result counts in all of its groups.
    groups = {}
    for result in results:
        for name in result.groups:
            groups.setdefault(name, []).append(result)

    scores = {}
    for name, group in groups.items():
        credit = sum(result.credit for result in group)
        chance = sum(result.chance for result in group)
        scores[name] = {
            "score": 100 * credit / len(group),
            "chance": 100 * chance / len(group),
            "n": len(group),
        }
    return scores


def open_scores(results: Sequence[OpenResult]) -> dict[str, dict]:
    """Return {group: score} of open answers; chance is what the best constant answer earns."""
    scores = group_scores(Result(result.groups, result.credit) for result in results)

    # Each group has a best constant answer of its own.
    credits = {}
    for result in results:
        for name in result.groups:
            credits.setdefault(name, []).append(result.credit_of)

    for name, score in scores.items():
        _, credit = best_constant(credits[name])
        score["chance"] = 100 * credit
    return scores


def best_constant(credits: Sequence[dict[str, float]]) -> tuple[str, float]:
    """Return the best single answer to all questions and what it earns, 0 to 1; ("", 0) if none.

    credits: for each question {answer: its credit}.
    """
    totals = {}
    for credit_of in credits:
        for answer, credit in credit_of.items():
            totals[answer] = totals.get(answer, 0) + credit
    if not totals:
        return "", 0.0
    best = max(totals, key=totals.get)
    return best, totals[best] / len(credits)


def in_order(scores: dict[str, dict], names: Iterable[str]) -> dict[str, dict]:
    """Return the scores of these names, in this order; a name without a score is left out."""
    return {name: scores[name] for name in names if name in scores}


def mean_score(scores: dict[str, dict]) -> dict:
    """Return the mean of some scores, each counting the same, over all their questions."""
    parts = list(scores.values())
    mean = {}
    for key in ("score", "chance"):
        mean[key] = sum(part[key] for part in parts) / len(parts)
    mean["n"] = sum(part["n"] for part in parts)
    return mean


# -------------------------------------------------------------------------------------- the table


class Column(NamedTuple):
    """A column of the table of scores."""

    head: str
    width: int
    form: str


COLUMNS = {
    "score": Column("score", 11, "{:.2f}"),
    "interval": Column("95 % interval", 17, "[{0[0]:.2f}, {0[1]:.2f}]"),
    "chance": Column("chance", 11, "{:.2f}"),
    "text_only": Column("text only", 11, "{:.2f}"),
    "loss": Column("loss", 11, "{:.4f}"),
    "published": Column("published", 11, "{:.2f}"),
}


def score_table(scores: dict[str, dict]) -> str:
    """Return the scores as lines of text; a column only where there is something in it."""
    columns = []
    for key in COLUMNS:
        if any(key in score for score in scores.values()):
            columns.append(key)

    # Some names are of the benchmark's files.
    names = {name: printable(name, 60) for name in scores}
    width = max(24, *(len(name) + 1 for name in names.values()))
    head = " " * width
    for key in columns:
        head += f"{COLUMNS[key].head:>{COLUMNS[key].width}}"
    lines = [head + f"{'n':>8}"]

    for name, score in scores.items():
        line = f"{names[name]:{width}}"
        for key in columns:
            cell = ""
            if score.get(key) is not None:
                cell = COLUMNS[key].form.format(score[key])
            line += f"{cell:>{COLUMNS[key].width}}"
        lines.append(line + f"{score['n']:8}")

    for score in scores.values():
        if "published" in score:
            lines.append(f"published: {score['published_of']}")
    return "\n".join(lines)
