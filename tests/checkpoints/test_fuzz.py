"""The fuzzer of checkpoints finds nothing: a few inputs here, and many in `make test-full`."""

import pytest

from tests.tools.fuzz import check


def test_a_few_wrong_checkpoints():
    check("checkpoints", "--count", 20)


@pytest.mark.full
def test_many_wrong_checkpoints():
    check("checkpoints", "--count", 600, "--seed", 10_000)
