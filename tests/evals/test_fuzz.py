"""Mutated benchmark files, kept answers and replies: each is used, or refused in one line."""

import pytest

from tests.tools.fuzz import fuzz
from tests.tools.fuzz.evaluation import case


@pytest.mark.parametrize("count", [30, pytest.param(500, marks=pytest.mark.full)])
def test_wrong_inputs_of_an_evaluation(count):
    assert fuzz(case, count, seed=7).violations == []
