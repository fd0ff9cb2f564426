"""Chapter 18, the laboratory: a solution."""

import math

# Student's t: beyond -t and t lie 5 % of the distribution, by degrees of freedom.
STUDENT = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}


def paired_interval(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Return the mean difference a - b and the ends of its 95 % interval over seeds."""
    gains = [x - y for x, y in zip(a, b, strict=True)]
    n = len(gains)
    mean = sum(gains) / n
    variance = sum((gain - mean) ** 2 for gain in gains) / (n - 1)
    half = STUDENT[n - 1] * math.sqrt(variance / n)
    return mean, mean - half, mean + half


def holm(levels: list[float], alpha: float = 0.05) -> list[bool]:
    """Return for each p of a list whether it counts by Holm's procedure (1979)."""
    counts = [False] * len(levels)
    order = sorted(range(len(levels)), key=levels.__getitem__)
    for rank, i in enumerate(order):
        if levels[i] > alpha / (len(levels) - rank):
            break
        counts[i] = True
    return counts
