"""inputs/charts.py: the numbers at the axes."""

import pytest

from inputs.charts import Linear, Log


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1, 20, [5, 10, 15, 20]),
        (-0.3, 1, [0, 0.5, 1]),
        (0, 2e-5, [0, 5e-6, 1e-5, 1.5e-5, 2e-5]),
    ],
)
def test_numbers_of_an_axis_are_round(low, high, expected):
    assert Linear(low, high, 0, 100).ticks() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.03, 4, [0.05, 0.1, 0.2, 0.5, 1, 2]),
        (1, 1, [1]),
        (1e-3, 1e3, [1e-3, 1e-2, 1e-1, 1, 10, 100, 1000]),
        (1e-12, 1e4, [1e-12, 1e-9, 1e-6, 1e-3, 1, 1000]),
    ],
)
def test_a_long_logarithmic_axis_has_few_numbers(low, high, expected):
    assert Log(low, high, 0, 100).ticks() == pytest.approx(expected)
