"""The fuzzer of tokenizers finds nothing: a few inputs here, and many in `make test-full`."""

import pytest

from tests.tools.fuzz import fuzz, table
from tests.tools.fuzz.tokenizers import case


def test_a_few_wrong_tokenizers():
    result = fuzz(case, count=20, seed=0)
    assert not result.violations, table(result) + "\n".join(result.violations)


@pytest.mark.full
def test_many_wrong_tokenizers():
    result = fuzz(case, count=600, seed=10_000)
    assert not result.violations, table(result) + "\n".join(result.violations)
