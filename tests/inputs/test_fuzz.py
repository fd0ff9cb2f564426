"""What comes in may be anything: it makes samples, or is refused with one line."""

import pytest

from tests.tools.fuzz import check


def test_a_few_wrong_rows_pictures_and_shards():
    pytest.importorskip("av")
    check("data", "--count", 40)


@pytest.mark.full
@pytest.mark.parametrize(
    "kind", ["csv", "metadata.csv", "metadata.jsonl", "captions", "tar", "parquet"]
)
def test_many_wrong_containers(kind):
    pytest.importorskip("av")
    pytest.importorskip("pyarrow")
    check("data", "--count", 200, "--seed", 2000, "--kind", kind)


@pytest.mark.full
def test_many_wrong_rows_pictures_and_shards():
    pytest.importorskip("av")
    check("data", "--count", 600, "--seed", 1000)


def test_a_few_changed_rows_of_each_form():
    pytest.importorskip("pyarrow")
    check("forms", "--count", 24)


@pytest.mark.full
def test_many_changed_rows_of_each_form():
    pytest.importorskip("pyarrow")
    check("forms", "--count", 500, "--seed", 1000)


def test_a_few_wrong_tokenizers():
    check("tokenizers", "--count", 20)


@pytest.mark.full
def test_many_wrong_tokenizers():
    check("tokenizers", "--count", 600, "--seed", 10_000)
