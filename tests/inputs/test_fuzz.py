"""What comes in as data may be anything: it makes samples, or is refused with one line."""

import pytest

pytest.importorskip("av")

from tests.tools.fuzz import data, fuzz  # noqa: E402


def test_a_few_wrong_inputs_make_no_traceback():
    result = fuzz(data.case, count=40, seed=0)
    assert not result.violations, "\n".join(result.violations)


@pytest.mark.full
def test_many_wrong_inputs_make_no_traceback():
    result = fuzz(data.case, count=600, seed=1000)
    assert not result.violations, "\n".join(result.violations)
