"""Chapter 18, the laboratory: fill in both functions, then run

python -m pytest guide/exercises/test_ch18.py -o addopts=""
"""

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
    """Return the mean difference a - b and the ends of its 95 % interval over seeds.

    a, b: the scores of two recipes, run with the same seeds in the same order; at least two of each

    The interval is the mean of the differences, plus and minus t times their standard error. t is
    Student's, with one degree of freedom less than there are seeds.
    """
    raise NotImplementedError


def holm(levels: list[float], alpha: float = 0.05) -> list[bool]:
    """Return for each p of a list whether it counts by Holm's procedure (1979).

    Of m, the smallest p must be at most alpha / m, the next alpha / (m - 1), and so on. The first
    that is too large does not count, and none after it.
    """
    raise NotImplementedError
