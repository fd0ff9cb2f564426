"""What comes in may be anything: it makes samples, or is refused with one line."""

from functools import partial

import pytest

from tests.tools.fuzz import forms, fuzz, table, tokenizers


def check(case, count: int, seed: int):
    """Assert that no case of a fuzzer is a violation."""
    result = fuzz(case, count=count, seed=seed)
    assert not result.violations, table(result) + "\n".join(result.violations)


def test_a_few_wrong_rows_pictures_and_shards():
    pytest.importorskip("av")
    from tests.tools.fuzz import data

    check(data.case, count=40, seed=0)


@pytest.mark.full
@pytest.mark.parametrize(
    "kind", ["csv", "metadata.csv", "metadata.jsonl", "captions", "tar", "parquet"]
)
def test_many_wrong_containers(kind):
    pytest.importorskip("av")
    pytest.importorskip("pyarrow")
    from tests.tools.fuzz import data

    check(partial(data.case_of_container, kind=kind), count=200, seed=2000)


@pytest.mark.full
def test_many_wrong_rows_pictures_and_shards():
    pytest.importorskip("av")
    from tests.tools.fuzz import data

    check(data.case, count=600, seed=1000)


def test_a_few_changed_rows_of_each_form():
    pytest.importorskip("pyarrow")
    check(forms.case, count=24, seed=0)


@pytest.mark.full
def test_many_changed_rows_of_each_form():
    pytest.importorskip("pyarrow")
    check(forms.case, count=500, seed=1000)


def test_a_few_wrong_tokenizers():
    check(tokenizers.case, count=20, seed=0)


@pytest.mark.full
def test_many_wrong_tokenizers():
    check(tokenizers.case, count=600, seed=10_000)
