"""Mutated benchmark files, kept answers and replies: each is used, or refused in one line."""

import pytest

from tests.tools.fuzz import check


@pytest.mark.parametrize("count", [30, pytest.param(500, marks=pytest.mark.full)])
def test_wrong_inputs_of_an_evaluation(count):
    check("evaluation", "--count", count, "--seed", 7)
