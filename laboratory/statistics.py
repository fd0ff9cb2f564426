"""What a difference between two cells is worth: its interval over questions and seeds.

    found = compare(cell, baseline)                # Difference(mean, low, high, p)
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
has 4.3 in place of 2: tests/laboratory/test_statistics.py draws models and questions of known truth
and finds the truth within such a 95 % interval in 80 to 90 of 100 tries, and in this one in 95 or
more. The price of three seeds is a wide interval. More seeds make it narrower: t_s is 2.8 with five
and 2.3 with ten.

A score that is no mean over questions has an interval over seeds alone. With one seed there is no
interval: nobody knows then what another seed would have made.

p is the level at which the interval would just reach zero.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from laboratory.results import Answers

LEVEL = 0.05  # 1 - confidence
DRAWS = 2000  # of the bootstrap
MANY = 100  # degrees of freedom from which Student's t counts as normal


class Difference(NamedTuple):
    """How many points a cell scores more than another one."""

    mean: float
    low: float | None  # of the 95 % interval; None with one seed
    high: float | None
    p: float | None


def mean_and_deviation(scores: np.ndarray) -> tuple[float, float | None]:
    """Return the mean over seeds and the standard deviation; None for the latter of one seed."""
    if len(scores) == 1:
        return float(scores[0]), None
    return float(scores.mean()), float(scores.std(ddof=1))


def compare(cell: Answers, other: Answers, paired: bool = True) -> Difference:
    """Return the difference of one score in two cells, over questions and seeds.

    paired: the runs of both have the same seeds, in one order. Otherwise the seeds are others, as
    in the two sets of the noise floor.
    """
    mean = float(cell.scores.mean() - other.scores.mean())
    if min(len(cell.scores), len(other.scores)) < 2:
        return Difference(mean, None, None, None)

    # Over seeds. Of two sets the smaller one says how well the variance is known.
    if paired:
        of_seeds = variance_of_mean(cell.scores - other.scores)
    else:
        of_seeds = variance_of_mean(cell.scores) + variance_of_mean(other.scores)
    freedom_of_seeds = min(len(cell.scores), len(other.scores)) - 1

    # Over questions.
    of_questions = 0.0
    freedom_of_questions = 1
    if cell.credits is not None and other.credits is not None:
        pictures = len(np.unique(cell.clusters))
        freedom_of_questions = max(1, pictures - 1)
        of_questions = float(np.var(drawn(cell) - drawn(other)))
        of_questions = max(of_questions, 2 * (100 / (pictures + 2)) ** 2)

    def half(level: float) -> float:
        t_seeds = student(level, freedom_of_seeds)
        t_questions = student(level, freedom_of_questions)
        return math.sqrt(t_seeds**2 * of_seeds + t_questions**2 * of_questions)

    width = half(LEVEL)
    return Difference(mean, mean - width, mean + width, level_of(abs(mean), half))


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
    generator = np.random.default_rng(0)
    times = generator.multinomial(pictures, np.full(pictures, 1 / pictures), DRAWS)  # (DRAWS, n)

    means = np.zeros(DRAWS)
    for earned, weights in zip(answers.credits, answers.weights, strict=True):
        sums = np.bincount(members, earned * weights, pictures)  # (n,)
        totals = np.bincount(members, weights, pictures)
        means += 100 * (times @ sums) / np.maximum(times @ totals, 1e-9)
    return means / len(answers.credits)


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


def level_of(size: float, half) -> float:
    """Return the level at which `half`, half the width of an interval, is `size`: by bisection."""
    low = 1e-12
    high = 1.0
    if half(low) <= size:
        return low
    for _ in range(60):
        middle = math.sqrt(low * high)
        if half(middle) > size:
            low = middle
        else:
            high = middle
    return high


def student(level: float, freedom: int) -> float:
    """Return t: beyond -t and t lies `level` of Student's distribution; by bisection."""
    if level >= 1:
        return 0.0
    if freedom > MANY:
        return NormalDist().inv_cdf(1 - level / 2)
    low = 0.0
    high = 1.0
    while 1 - within(high, freedom) > level and high < 1e15:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if 1 - within(middle, freedom) > level:
            low = middle
        else:
            high = middle
    return high


def within(t: float, freedom: int) -> float:
    """Return the share of Student's distribution between -t and t.

    It is a finite sum of powers of the cosine for a whole number of degrees of freedom (Abramowitz
    and Stegun, 1964, 26.7.3 and 26.7.4).
    """
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)

    # Odd: 1, 2/3, 2/3 * 4/5 ...; even: 1, 1/2, 1/2 * 3/4 ...
    is_odd = freedom % 2 == 1
    term = cosine if is_odd else 1.0
    total = 0.0
    for k in range(2 if is_odd else 1, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    if is_odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
