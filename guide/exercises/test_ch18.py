"""Chapter 18: the interval of a difference over seeds, and many comparisons."""

import random

import pytest

from guide.exercises import chosen

ch = chosen("ch18")


def test_paired_interval():
    mean, low, high = ch.paired_interval([71.0, 74.0, 78.0], [70.0, 72.0, 75.0])
    assert mean == pytest.approx(2)

    # The differences 1, 2, 3 have the standard deviation 1, so the error is 1 / sqrt(3).
    assert high - mean == pytest.approx(4.303 / 3**0.5)
    assert mean - low == pytest.approx(4.303 / 3**0.5)


def test_what_is_common_to_both_cancels():
    # All differences are one, whatever the seeds do.
    _, low, high = ch.paired_interval([61.0, 80.0, 70.0], [60.0, 79.0, 69.0])
    assert low == pytest.approx(1) and high == pytest.approx(1)


def test_the_interval_has_the_truth_in_19_of_20():
    rng = random.Random(0)
    inside = 0
    for _ in range(1000):
        a = [rng.gauss(70, 2) for _ in range(4)]
        b = [rng.gauss(70, 2) for _ in range(4)]
        _, low, high = ch.paired_interval(a, b)
        inside += int(low <= 0 <= high)
    assert 930 <= inside <= 970


def test_holm():
    # Thresholds: 0.0125, 0.0167, 0.025, 0.05.
    assert ch.holm([0.03, 0.012, 0.9, 0.016]) == [False, True, False, True]
    assert ch.holm([0.04]) == [True]
    assert ch.holm([0.04, 0.04]) == [False, False]

    # 0.02 is not below 0.0125, so nothing counts, not even what would be below its own threshold.
    assert ch.holm([0.02, 0.022, 0.024, 0.04]) == [False] * 4
