"""95 % intervals of a score and of the difference of two, for questions that come in clusters.

    interval([1, 0, 1, 1], clusters=["a.jpg", "a.jpg", "b.jpg", "c.jpg"])    # (0.11, 0.99)
    difference(credits, of_another_model, clusters)     # Difference(mean, low, high)

Several questions about one picture are no independent draws: a model that cannot read the picture
fails them all. So the variance is taken between clusters, and says of how many independent
questions it would be. With that number:

- a score has Wilson's interval (1927), which is never of no width, and never leaves 0 to 1. That
  this holds for clusters, with Student's t for the number of clusters, is in Korn and Graubard
  (1998) and, compared with others, in Franco, Little, Louis and Slud (2019).
- a difference of two models on the same questions has Bonett and Price's interval (2012): as if one
  more question were won by each model. So it has a width even where the two agree everywhere.

tests/evals/test_own_rows.py draws questions of known truth and counts how often it is inside.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Difference(NamedTuple):
    """How much more one model earns than another, on average: -1 to 1."""

    mean: float
    low: float
    high: float


def interval(credits: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """Return (low, high), the 95 % interval of a mean of credits from 0 to 1.

    clusters: what each of them belongs to, such as its picture.
    """
    credits = np.asarray(credits, float)
    mean = float(credits.mean())
    n, t = effective(credits, mean * (1 - mean), clusters)

    # Wilson's: all true means from which this one is no farther than t of their standard errors.
    centre = (mean + t**2 / (2 * n)) / (1 + t**2 / n)
    half = t / (1 + t**2 / n) * math.sqrt(mean * (1 - mean) / n + t**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def difference(
    credits: Sequence[float], other: Sequence[float], clusters: Sequence[Hashable]
) -> Difference:
    """Return how much more `credits` are than those of another model for the same questions."""
    gains = np.asarray(credits, float) - np.asarray(other, float)
    mean = float(gains.mean())
    won = float(gains.clip(min=0).mean())
    lost = float((-gains).clip(min=0).mean())
    n, t = effective(gains, won + lost - mean**2, clusters)

    # One more question is won, and one lost.
    won = (won * n + 1) / (n + 2)
    lost = (lost * n + 1) / (n + 2)
    centre = won - lost
    half = t * math.sqrt((won + lost - centre**2) / (n + 2))
    return Difference(mean, max(-1.0, centre - half), min(1.0, centre + half))


def effective(
    values: np.ndarray, variance: float, clusters: Sequence[Hashable]
) -> tuple[float, float]:
    """Return of how many independent questions a mean is, and Student's t for its interval.

    variance: that of a single independent question.
    """
    number = {}
    for cluster in clusters:
        number.setdefault(cluster, len(number))
    members = np.array([number[cluster] for cluster in clusters])
    count = len(number)

    # All answers are alike, so that no variance is seen. A cluster then counts as one question.
    spread = float(values.var())
    if spread == 0:
        return count, student(count - 1)
    independent = spread / len(values)
    if count == len(values):
        return variance / independent, student(count - 1)

    # The variance of the mean, from the sums of clusters; at least that of independent questions.
    sums = np.bincount(members, values - values.mean())
    squares = sums**2
    of_mean = independent
    if count > 1:
        between = count / (count - 1) * float(squares.sum()) / len(values) ** 2
        of_mean = max(independent, between)

    # It is known as well as from so many draws (Satterthwaite, 1946): if few clusters make it up,
    # as where nearly all answers are right, it is known less well. The mean fourth power of a
    # normal variable is 3 times the square of its variance.
    known = 3 * float(squares.sum()) ** 2 / max(float((squares**2).sum()), 1e-300)
    return variance / of_mean, student(min(count - 1, known))


def student(freedom: float) -> float:
    """Return the quantile of Student's t for a two-sided interval of CONFIDENCE.

    Cornish and Fisher's expansion (1960), to 3 % from 2 degrees of freedom on; fewer count as 2.
    """
    freedom = max(2.0, freedom)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
