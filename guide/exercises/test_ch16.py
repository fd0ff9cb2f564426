"""Chapter 16: the learning rate over a run, and the memory of training."""

import pytest

from guide.exercises import chosen
from train import schedule

ch = chosen("ch16")


def test_learning_rate_is_that_of_training():
    for steps, ratio in ((100, 0.03), (5195, 0.03), (20, 0.0), (7, 0.5)):
        for step in range(steps):
            expected = schedule(step, steps, ratio)
            assert ch.learning_rate(step, steps, ratio) == pytest.approx(expected)


def test_training_bytes():
    # A billion weights take 16 GB to train and 2 GB frozen, an eighth of it on each of eight GPUs.
    assert ch.training_bytes(10**9, 0, 1) == pytest.approx(16e9)
    assert ch.training_bytes(0, 10**9, 1) == pytest.approx(2e9)
    assert ch.training_bytes(10**9, 10**9, 8) == pytest.approx(18e9 / 8)
