"""What a difference between two cells is worth: its interval over questions and seeds.

    found = compare(cell, baseline)                # found.mean, found.interval, found.p
    apart = holm([found.p, ...])                   # which of many count, all at 5 % together

Two things would come out otherwise another time: other questions would have been asked, and other
seeds would have made other models. Both are estimated, and both are paired: the two cells have the
same questions and the same seeds, so what is common to them cancels.

    questions    a bootstrap (Efron, 1979) that draws pictures with all their questions, in both
                 cells and all seeds at once. The variance of the drawn differences is V_q. It is at
                 least that of one question won and one lost (Bonett and Price, 2012): where all
                 answers are alike, others need not be
    seeds        the S differences, one for each seed, have the variance s^2. V_s = s^2 / S

The interval is the difference +- sqrt(t_q^2 V_q + t_s^2 V_s). t_q is Student's t with as many
degrees of freedom as there are pictures less one, t_s with S - 1 (Cochran's combination of
variances with few degrees of freedom, 1964). Why not draw seeds as well, and take percentiles? Of
three seeds a bootstrap sees two thirds of the variance, and a normal distribution where Student's
t is 4.3 and not 2. tests/laboratory/test_statistics.py draws models and questions of known truth,
400 times. Such percentiles call cells of equal truth a difference in 47 of them, where 20 were
promised; this interval in 1 to 12, by how much seeds and questions matter. It errs on the wide
side, because the chance in single answers is in both variances, and three seeds are few. Five make
it much narrower: t_s is 2.8 then.

A score that is no mean over questions has an interval over seeds alone. With one seed there is no
interval: nobody knows then what another seed would have made.

p is the level at which the interval would just reach zero.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from evals import intervals

LEVEL = 0.05  # 1 - confidence
DRAWS = 1000  # of the bootstrap: the variance is known to 5 % then
FEW = 30  # degrees of freedom up to which Student's t is found by bisection
LEAST_LEVEL = 1e-12  # below it nobody tells levels apart


@dataclass
class Answers:
    """One score of some runs of a cell, and what every question earned in it."""

    name: str
    scores: np.ndarray  # (seeds,), percent
    chance: float | None
    questions: int
    blank: np.ndarray | None = None  # (seeds,), percent: the same with blanked pictures
    credits: np.ndarray | None = None  # (seeds, questions), 0 to 1; None if it is no mean
    weights: np.ndarray | None = None  # (seeds, questions): how much each question counts
    clusters: np.ndarray | None = None  # (questions,): the number of its picture


class Part(NamedTuple):
    """One part of a difference's variance."""

    variance: float
    freedom: int  # from how many independent draws it is known, less one


@dataclass(frozen=True)
class Difference:
    """How many points a cell scores more than another one."""

    mean: float
    seeds: Part
    questions: Part | None  # None: the score is no mean over questions

    def half(self, level: float) -> float:
        """Return half the width of the interval that misses the truth in `level` of all cases."""
        squared = student(level, self.seeds.freedom) ** 2 * self.seeds.variance
        if self.questions is not None:
            squared += student(level, self.questions.freedom) ** 2 * self.questions.variance
        return math.sqrt(squared)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        half = self.half(LEVEL)
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float:
        """The level at which the interval just reaches zero, by bisection."""
        low = LEAST_LEVEL
        high = 1.0
        if self.half(low) <= abs(self.mean):
            return low
        for _ in range(50):
            middle = math.sqrt(low * high)
            if self.half(middle) > abs(self.mean):
                low = middle
            else:
                high = middle
        return high


def mean_and_deviation(scores: np.ndarray) -> tuple[float, float | None]:
    """Return the mean over seeds and the standard deviation; None for the latter of one seed."""
    if len(scores) == 1:
        return float(scores[0]), None
    return float(scores.mean()), float(scores.std(ddof=1))


def compare(cell: Answers, other: Answers, paired: bool = True) -> Difference | None:
    """Return the difference of one score in two cells; None if one of them has a single seed.

    paired: the runs of both have the same seeds, in one order. Otherwise the seeds are others, as
    in the two sets of the noise floor.
    """
    fewest = min(len(cell.scores), len(other.scores))
    if fewest < 2:
        return None

    # Over seeds. Of two sets the smaller one says how well the variance is known.
    if paired:
        of_seeds = variance_of_mean(cell.scores - other.scores)
    else:
        of_seeds = variance_of_mean(cell.scores) + variance_of_mean(other.scores)

    # Over questions.
    questions = None
    if cell.credits is not None and other.credits is not None:
        pictures = len(np.unique(cell.clusters))
        of_questions = float(np.var(drawn(cell) - drawn(other)))
        of_questions = max(of_questions, 2 * (100 / (pictures + 2)) ** 2)
        questions = Part(of_questions, max(1, pictures - 1))

    mean = float(cell.scores.mean() - other.scores.mean())
    return Difference(mean, Part(of_seeds, fewest - 1), questions)


def variance_of_mean(values: np.ndarray) -> float:
    """Return the variance of the mean of some independent values."""
    return float(values.var(ddof=1)) / len(values)


def drawn(answers: Answers) -> np.ndarray:
    """Return the mean score over seeds, (DRAWS,), each time with other pictures.

    The same pictures are drawn for every cell, because the draws begin with the same number. With
    all questions of a picture in one sum, a draw is a product with how often each picture came.
    """
    numbers, members = np.unique(answers.clusters, return_inverse=True)
    pictures = len(numbers)
    times = times_drawn(pictures)

    means = np.zeros(DRAWS)
    for earned, weights in zip(answers.credits, answers.weights, strict=True):
        sums = np.bincount(members, earned * weights, pictures)  # (n,)
        totals = np.bincount(members, weights, pictures)
        means += 100 * (times @ sums) / np.maximum(times @ totals, 1e-9)
    return means / len(answers.credits)


@functools.lru_cache(maxsize=4)
def times_drawn(pictures: int) -> np.ndarray:
    """Return how often each picture comes in each draw of as many pictures, (DRAWS, pictures)."""
    generator = np.random.default_rng(0)
    return generator.multinomial(pictures, np.full(pictures, 1 / pictures), DRAWS).astype(float)


def holm(levels: list[float]) -> list[bool]:
    """Return which p of many count, so that one in twenty such lists has a false one (Holm, 1979).

    The smallest is compared with 5 % / m, the next with 5 % / (m - 1), and so on up to the first
    that is too large.
    """
    order = sorted(range(len(levels)), key=lambda i: levels[i])
    counts = [False] * len(levels)
    for rank, i in enumerate(order):
        if levels[i] > LEVEL / (len(levels) - rank):
            break
        counts[i] = True
    return counts


# ------------------------------------------------------------------------------- Student's t


def student(level: float, freedom: int) -> float:
    """Return t: beyond -t and t lies `level` of Student's distribution.

    With many degrees of freedom it is the normal quantile with the corrections of evals/intervals.
    With few it is found by bisection.
    """
    if level >= 1:
        return 0.0
    if freedom > FEW:
        return intervals.student(freedom, 1 - level)
    low = 0.0
    high = 1.0
    while beyond(high, freedom) > level:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        if beyond(middle, freedom) > level:
            low = middle
        else:
            high = middle
    return high


def beyond(t: float, freedom: int) -> float:
    """Return the share of Student's distribution beyond -t and t.

    Within is a finite sum of powers of the cosine for a whole number of degrees of freedom
    (Abramowitz and Stegun, 1964, 26.7.3 and 26.7.4).
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine = math.sin(angle)
    cosine = math.cos(angle)

    # Odd: cos, 2/3 cos^3, 2/3 * 4/5 cos^5 ...; even: 1, 1/2 cos^2, 1/2 * 3/4 cos^4 ...
    total = 0.0
    if freedom % 2 == 1:
        term = cosine
        for k in range(2, freedom, 2):
            total += term
            term *= cosine**2 * k / (k + 1)
        return 1 - 2 / math.pi * (angle + sine * total)

    term = 1.0
    for k in range(1, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 1 - sine * total
