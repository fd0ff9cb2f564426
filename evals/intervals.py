"""95 % intervals: of a score, and of the difference of two models on the same questions.

    interval([1, 0, 1, 1], clusters=["a.jpg", "a.jpg", "b.jpg", "c.jpg"])    # (0.11, 0.99)
    difference(credits, of_another_model, clusters)     # Difference(mean, low, high)

A score is the mean of what the answers earn. Other questions of the same kind would have given
another mean. An interval says which true scores are compatible with this one: of 100 intervals, 95
have the truth inside. The formula of school is mean +- 1.96 s / sqrt(n), where s is the standard
deviation of n credits. Three things are wrong with it here, and each is mended:

1. Questions about one picture are no independent draws: a model that cannot read the picture fails
   them all, and ten such questions may say no more than one. So the variance of the mean is taken
   from the sums over clusters, that is over pictures (Liang and Zeger, 1986; for evaluations of
   language models Miller, 2024). It is expressed as the effective number of questions: so many
   independent ones would have a mean of this variance. In the formulas below it is n.
2. A variance that few pictures show is itself uncertain. So 1.96 becomes Student's t, which is 4.3
   for three pictures and 2.1 for twenty.
3. If all answers are right, s is 0 and so is the width; if nearly all are, the interval goes beyond
   100 %. So a score has Wilson's interval (1927), and a difference that of Bonett and Price (2012).
   Both have a width whatever the answers are, and stay within their bounds.

Wilson's interval with an effective number and Student's t is in Korn and Graubard (1998), and
compared with others in Franco, Little, Louis and Slud (2019). tests/evals/test_own_rows.py draws
questions of known truth, and counts how often it is inside.
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

    # Wilson: a true score p is inside if the mean is no farther from it than t sqrt(p (1 - p) / n),
    # the standard error that p itself has. Both ends are solutions of that quadratic equation.
    scale = 1 + t**2 / n
    centre = (mean + t**2 / (2 * n)) / scale
    half = t / scale * math.sqrt(mean * (1 - mean) / n + t**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def difference(
    credits: Sequence[float], other: Sequence[float], clusters: Sequence[Hashable]
) -> Difference:
    """Return how much more `credits` are than those of another model for the same questions.

    The gain at each question is what counts. What both models earn or miss together cancels, so
    this is more exact than a comparison of their two intervals.
    """
    gains = np.asarray(credits, float) - np.asarray(other, float)
    mean = float(gains.mean())
    won = float(gains.clip(min=0).mean())
    lost = float((-gains).clip(min=0).mean())
    n, t = effective(gains, won + lost - mean**2, clusters)

    # Bonett and Price: as if each model had won one more question. The mean of gains of 1, 0 and -1
    # is won - lost, and their variance won + lost - (won - lost)^2.
    won = (won * n + 1) / (n + 2)
    lost = (lost * n + 1) / (n + 2)
    centre = won - lost
    half = t * math.sqrt((won + lost - centre**2) / (n + 2))
    return Difference(mean, max(-1.0, centre - half), min(1.0, centre + half))


def effective(
    values: np.ndarray, variance: float, clusters: Sequence[Hashable]
) -> tuple[float, float]:
    """Return the effective number of questions of a mean of values, and t for its interval.

    variance: that of one question whose values are 0 and 1, or for gains -1, 0 and 1.
    """
    sums = sums_of_clusters(values - values.mean(), clusters)
    freedom = len(sums) - 1
    of_mean = float(values.var()) / len(values)

    # All answers are alike, and show no variance. Each cluster then counts as one question.
    if of_mean == 0:
        return len(sums), student(freedom)

    # Questions that share a picture: not less than if they were independent.
    if 1 < len(sums) < len(values) and sums.any():
        of_mean = max(of_mean, variance_between(sums) / len(values) ** 2)
        freedom = min(freedom, freedom_of(sums))
    return variance / of_mean, student(freedom)


def sums_of_clusters(values: np.ndarray, clusters: Sequence[Hashable]) -> np.ndarray:
    """Return the sum of the values of each cluster."""
    number = {}
    for cluster in clusters:
        number.setdefault(cluster, len(number))
    members = [number[cluster] for cluster in clusters]
    return np.bincount(members, values)


def variance_between(sums: np.ndarray) -> float:
    """Return the variance of the total of some independent sums, whose mean is 0."""
    count = len(sums)
    return count / (count - 1) * float((sums**2).sum())


def freedom_of(sums: np.ndarray) -> float:
    """Return from how many draws the variance of their total is known (Satterthwaite, 1946).

    That is the squared sum of the variances over the sum of their squares: the number of sums if
    they are alike, and few where few make up the total, as where nearly all answers are right. A
    square of a sum estimates its variance, and a third of the fourth power the square of that: the
    mean fourth power of a normal variable is 3 times its squared variance.
    """
    squares = sums**2
    return 3 * float(squares.sum()) ** 2 / float((squares**2).sum())


def student(freedom: float, confidence: float = CONFIDENCE) -> float:
    """Return Student's t: 95 % of his distribution, or another share, lie between -t and t.

    It is the normal distribution's 1.96 with the corrections in 1 / freedom of Cornish and Fisher's
    expansion (1960), to 3 % from 2 degrees of freedom on; fewer count as 2.
    """
    freedom = max(2.0, freedom)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
