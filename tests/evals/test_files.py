"""Benchmark files that are not as published: each wrong value is named with file, row and key."""

import base64
import json
import os

import pytest

import evaluate
from config import UserError
from evals import mmbench as mmbench_task
from evals import mmmu as mmmu_task
from evals.files import Row, parse_list, read_rows, read_text, read_tsv
from tests.tools.benchmark_files import FILES, fake_pyarrow, files, parquet, png, put

NAN = float("nan")
WRONG = [None, True, NAN, -1, 10**30, "", [], [1], {"a": 1}, "\ud83d", "x" * 100_001]


@pytest.fixture(autouse=True)
def parquet_can_be_read(monkeypatch):
    fake_pyarrow(monkeypatch)


def change(file, at, key, value):
    """Set a key of a row of a JSON file, or of one with a row a line; ... takes it out."""
    if file.suffix == ".jsonl" or "coco_pope" in file.name:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    else:
        whole = json.loads(file.read_text())
        rows = whole
        for part in ("questions", "data", "annotations"):
            if part in whole:
                rows = whole[part]
    if value is ...:
        del rows[at][key]
    else:
        rows[at][key] = value
    if file.suffix == ".jsonl" or "coco_pope" in file.name:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        file.write_text(json.dumps(whole))


KEYS = [
    ("gqa", False, "questions1.2/testdev_balanced_questions.json", "202", "question"),
    ("gqa", False, "questions1.2/testdev_balanced_questions.json", "202", "types"),
    ("gqa", True, "llava_gqa_testdev_balanced.jsonl", 1, "image"),
    ("vqav2", True, "llava_vqav2_mscoco_test-dev2015.jsonl", 1, "text"),
    ("vqav2", False, "v2_OpenEnded_mscoco_test-dev2015_questions.json", 1, "image_id"),
    ("vqav2-val", False, "v2_mscoco_val2014_annotations.json", 1, "answers"),
    ("vqav2-val", False, "v2_mscoco_val2014_annotations.json", 1, "answer_type"),
    ("scienceqa", False, "problems.json", "9", "choices"),
    ("scienceqa", False, "problems.json", "9", "answer"),
    ("scienceqa", False, "problems.json", "9", "grade"),
    ("scienceqa", True, "llava_test_CQM-A.json", 1, "conversations"),
    ("textvqa", False, "TextVQA_0.5.1_val.json", 1, "answers"),
    ("textvqa", False, "TextVQA_Rosetta_OCR_v0.2_val.json", 0, "ocr_tokens"),
    ("pope", False, "coco_pope_popular.json", 1, "label"),
    ("pope", False, "coco_pope_popular.json", 1, "image"),
    ("pope", True, "llava_pope_test.jsonl", 1, "category"),
    ("mme", True, "llava_mme.jsonl", 1, "question_id"),
    ("mmmu", True, "anns_for_eval.json", 0, "index2ans"),
    ("mmmu", True, "eval/answer_dict_val.json", "validation_Art_1", "ground_truth"),
    ("mmvet", False, "mm-vet.json", "v1_1", "capability"),
    ("mmvet", True, "llava-mm-vet.jsonl", 1, "text"),
    ("llava_bench", True, "context.jsonl", 1, "caption"),
    ("llava_bench", True, "answers_gpt4.jsonl", 1, "text"),
    ("llava_bench", True, "questions.jsonl", 1, "category"),
    ("seedbench", False, "SEED-Bench.json", 1, "question_type_id"),
    ("seedbench", False, "SEED-Bench.json", 1, "data_id"),
    ("seedbench", True, "llava-seed-bench.jsonl", 2, "image"),
]

# Values that some files may have there: texts of any length, numbers in the place of texts.
GOOD = {
    "answers": ([1],),
    "ocr_tokens": ([], [1]),
    "capability": ([], [1]),
    "ground_truth": (-1, 10**30, "", [], [1], "x" * 100_001),
    "index2ans": ({"a": 1},),
    "caption": ([], [1], ""),
    "text": ("",),
    "question": ("",),
    "answer_type": ("",),
    "choices": ([1],),
}


@pytest.mark.parametrize("task, llava, name, at, key", KEYS)
def test_a_wrong_value_is_named_with_file_row_and_key(task, llava, name, at, key, tmp_path):
    FILES[task][0](tmp_path, llava)
    file = tmp_path / name
    published = file.read_bytes()
    for value in (..., *WRONG):
        if value in GOOD.get(key, ()):
            continue
        file.write_bytes(published)
        change(file, at, key, value)
        with pytest.raises(UserError) as failure:
            evaluate.check_examples(evaluate.TASKS[task].examples(tmp_path), tmp_path)
        said = str(failure.value)
        assert said.isprintable() and len(said) < 4000 and "; fix: " in said
        if isinstance(value, str) and key in ("image", "category", "label", "question_id"):
            continue  # a name of nothing that there is
        assert said.startswith(f"{file}:{at}: ") and key in said, (value, said)


def test_numbers_in_the_place_of_names_and_answers_are_taken(tmp_path):
    FILES["gqa"][0](tmp_path, True)
    change(tmp_path / "llava_gqa_testdev_balanced.jsonl", 0, "question_id", 201)
    change(tmp_path / "data/testdev_balanced_questions.json", "202", "answer", 7)
    found = evaluate.TASKS["gqa"].examples(tmp_path)
    assert [(e["id"], e["label"]) for e in found] == [("201", "no"), ("202", "7")]


def test_a_question_without_a_picture(tmp_path):
    """A benchmark that has such questions asks them; another one names the row."""
    FILES["scienceqa"][0](tmp_path / "s", False)
    assert [e["image"] for e in evaluate.TASKS["scienceqa"].examples(tmp_path / "s")][1] is None
    FILES["pope"][0](tmp_path / "p", False)
    change(tmp_path / "p/coco_pope_random.json", 1, "image", None)
    with pytest.raises(UserError, match="random.json:1: not as published: it has no 'image'"):
        evaluate.TASKS["pope"].examples(tmp_path / "p")


def test_a_file_without_questions(tmp_path):
    put(tmp_path / "validation.json", "[]")
    with pytest.raises(UserError, match="no questions in it; fix: --data"):
        evaluate.check_examples(evaluate.TASKS["mmvu"].examples(tmp_path), tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 50,
        b"\xff\xfe",
        b"[" * 100_000,
        b"[" + b"9" * 5000 + b"]",
        b"7",
        b"[1]",
        b'{"questions": 3}',
        b"<html></html>",
    ],
)
def test_files_that_are_no_rows(content, tmp_path):
    file = tmp_path / "q.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"q.json(:\w+)?: (cannot be read|not as published)"):
        read_rows(file)
        read_rows(file, part="questions")


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n\r\n')
    assert [row.integer("a", 0, 9) for _, row in read_rows(file)] == [1, 2]


def test_a_fifo_is_not_waited_for(tmp_path):
    for name in ("q.json", "q.tsv"):
        os.mkfifo(tmp_path / name)
    for read in (
        lambda: read_rows(tmp_path / "q.json"),
        lambda: list(read_tsv(tmp_path / "q.tsv")),
    ):
        with pytest.raises(UserError, match="not a file"):
            read()
    with pytest.raises(UserError, match="cannot be read: .*No such file"):
        read_text(tmp_path / "absent")


# ------------------------------------------------------------------------ tables and lists in cells


def table(tmp_path, **cells):
    """MMBench's file of two rows, with cells of the second changed; ... ends the row there."""
    FILES["mmbench"][0](tmp_path, False)
    file = tmp_path / "MMBench_DEV_EN.tsv"
    head, first, *_ = file.read_text().splitlines()
    names = head.split("\t")
    row = ["5", "Which?", "", "red", "blue", "", "", "A", "colour", picture(), "m", "p", "", "dev"]
    for name, cell in cells.items():
        at = names.index(name)
        row[at:] = [] if cell is ... else [cell, *row[at + 1 :]]
    file.write_text("\n".join([head, first, "\t".join(row)]) + "\n", errors="surrogatepass")
    return file


def picture():
    return base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    "cells, why",
    [
        ({"index": "x"}, "invalid literal for int"),
        ({"index": "9" * 5000}, "for integer string conversion"),
        ({"A": ""}, "its A, '', is no option"),
        ({"image": "7"}, "it has no 7"),
        ({"image": "A" * 101}, "Incorrect padding|data characters"),
        ({"answer": ...}, "not 14 cells, as the first line"),
        ({"split": "dev\tx"}, "not 14 cells, as the first line"),
    ],
)
def test_a_row_of_a_table_that_is_not_as_published(cells, why, tmp_path):
    file = table(tmp_path, **cells)
    with pytest.raises(UserError, match=rf"{file}:1: not as published: .*({why})"):
        mmbench_task.examples(tmp_path)


def test_bytes_in_a_table_that_are_no_picture(tmp_path):
    table(tmp_path, image=base64.b64encode(b"no picture" * 20).decode())
    found = mmbench_task.examples(tmp_path)
    with pytest.raises(UserError, match="DEV_EN.tsv:1: .*not an image"):
        evaluate.check_examples(found, tmp_path)


def test_a_large_picture_in_a_table_and_one_that_is_too_large(tmp_path, monkeypatch):
    """Python's csv takes cells of 131,072 characters, which is less than a photo."""
    large = base64.b64encode(png() + bytes(200_000)).decode()
    table(tmp_path, image=large)
    assert len(mmbench_task.examples(tmp_path)[1]["pictures"][0]) > 200_000
    monkeypatch.setattr("evals.files.LONGEST_CELL", 1000)
    with pytest.raises(UserError, match="field larger than field limit"):
        mmbench_task.examples(tmp_path)


def test_a_table_without_categories_has_a_score_without_them(tmp_path):
    file = table(tmp_path)
    file.write_text(file.read_text().replace("category", "other", 1))
    found = mmbench_task.examples(tmp_path)
    scores = mmbench_task.score(found, ["A", "A"])
    assert list(scores) == ["circular", "vanilla"] and evaluate.score_table(scores)


@pytest.mark.parametrize(
    "text",
    ["", "x", "[1", "1", "{}", "[" * 500, "__import__('os')", "[a]", "[" + "1," * 9999 + "]"],
)
def test_what_is_no_list(text):
    with pytest.raises(ValueError, match="list"):
        parse_list(text)


@pytest.mark.parametrize(
    "key, value, why",
    [
        ("options", "['a', ", "is not a list"),
        ("options", "[]", "not a list of 1 to 26 options"),
        ("options", "[{}]", "is not a text"),
        ("options", str(["x"] * 27), "not a list of 1 to 26 options"),
        ("answer", "[" * 300, "is not a list"),
        ("id", "validation_Alchemy_1", "it has no 'Alchemy'"),
        ("id", 7, "its id, 7, is not a text"),
        ("image_1", {"x": 1}, "its image_1, .*is not a picture"),
    ],
)
def test_mmmu_rows_that_are_not_as_published(key, value, why, tmp_path):
    row = {
        "id": "validation_Art_1",
        "question": "Which?",
        "options": "['a', 'b']",
        "answer": "A",
        "question_type": "multiple-choice",
        "image_1": {"bytes": png()},
    }
    row[key] = value
    with pytest.raises(UserError, match=f"here: not as published: .*{why}"):
        with mmmu_task.errors_at("here"):
            mmmu_task.original_example("here", Row(row, "here"))


def test_a_parquet_file_that_is_none(tmp_path):
    put(tmp_path / "Art/validation-0.parquet", b"PAR1 nothing")
    with pytest.raises(UserError, match="validation-0.parquet: cannot be read"):
        mmmu_task.examples(tmp_path)
    parquet(tmp_path / "Art/validation-0.parquet", [{"id": "validation_Art_1"}])
    with pytest.raises(UserError, match="validation-0.parquet:0: not as published: it has no"):
        mmmu_task.examples(tmp_path)
    assert files("mmmu", False).endswith(".parquet")


def test_a_number_in_the_place_of_a_text_may_have_any_length():
    row = Row({"long": 10**400, "inf": float("inf")}, "questions.json:2")
    assert row.words("long") == "1" + "0" * 400
    with pytest.raises(UserError, match="its inf, inf, is not a text"):
        row.words("inf")


def test_an_identifier_can_be_written():
    """Half a surrogate pair is no name of a question: answers could not be saved under it."""
    row = Row({"good": "häuser", "bad": "\ud83d"}, "questions.json:2")
    assert row.identifier("good") == "häuser"
    with pytest.raises(UserError, match=r"^questions\.json:2.*bad"):
        row.identifier("bad")
