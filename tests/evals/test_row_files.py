"""evals/row_files.py: the official scores of generated answers, and rows that are not as published.

The files of each benchmark are read, asked and scored in test_run.py.
"""

import json
import re

import pytest

import evaluate
from config import UserError
from evals import metrics, pope, row_files
from evals.files import read_parquet
from tests.evals.test_files import WRONG
from tests.tools import generated_rows
from tests.tools.benchmark_files import FILES, embedded, fake_pyarrow, files, parquet, png
from tests.tools.generated_answers import digests


@pytest.fixture(autouse=True)
def parquet_can_be_read(monkeypatch):
    fake_pyarrow(monkeypatch)


# ------------------------------------------------------------------------- generated answers

# Of what each of 2,000 to 3,000 answers earns, as the official code says.
OFFICIAL = {
    "relaxed": "ea502aa8 811199c0 2bc22408 bd7f495b 8d9465d3 488ed712",
    "anls": "73e52b9d 7ae9b2b9 6e036e9f 01dc506c 759eea1f 948cf278",
    "contains": "867507c4 a792e816 d4dbac11 c185c89a",
    "ai2d": "4be8bd83 3158bccd bff3033d 571f06a5 d543bf3a f7356015",
    "mmstar": "fc069cd4 e7688d4d 1f21f397 b8594f0d 0a7b72e5 8e796c12",
}


def test_generated_answers_earn_what_the_official_code_gives_them():
    """What they earn was written down from a run of the official code:

    relaxed_correctness of google-research/pix2struct 945f27e, metrics.py; infographicsvqa_eval.py
    of docvqa.org, as QwenLM/Qwen-VL has it; example.py of Yuliang-Liu/MultimodalOCR 794c36d;
    filter and exact_match of EvolvingLMMs-Lab/lmms-eval 75571cf for AI2D; evaluate/mmstar.py of
    MMStar-Benchmark/MMStar 88f243a.
    """
    earned = [metrics.relaxed(answer, truths) for truths, answer in numbers_and_texts()]
    assert digests(earned) == OFFICIAL["relaxed"].split()
    earned = [float(metrics.anls(answer, truths)) for truths, answer in texts()]
    assert digests(earned) == OFFICIAL["anls"].split()

    earned = [row_files.has_true_answer(answer, truths) for truths, answer in written(False)]
    earned += [row_files.has_true_formula(answer, truths) for truths, answer in written(True)]
    assert digests(earned) == OFFICIAL["contains"].split()

    for name, letter_of in (("ai2d", row_files.bare_letter), ("mmstar", row_files.first_letter)):
        earned = [float(letter_of(answer) == letter) for letter, answer in letters()]
        assert digests(earned) == OFFICIAL[name].split()


def numbers_and_texts():
    return list(generated_rows.numbers_and_texts())


def texts():
    return list(generated_rows.texts())


def written(formula):
    return list(generated_rows.written(formula))


def letters():
    return list(generated_rows.letters())


def scores_of(task, asked, groups_of, digits):
    """Return {name: score} of generated answers; groups_of: the groups of each."""
    examples = []
    for (label, _), groups in zip(asked, groups_of, strict=True):
        examples.append({"label": label, "groups": ["all", *groups], "choices": 4})
    scores = evaluate.TASKS[task].score(examples, [answer for _, answer in asked])
    return {name: round(score["score"], digits) for name, score in scores.items()}


def test_scores_of_chartqa_are_the_official_ones():
    """The numbers are those of chartqa_process_results of lmms-eval 75571cf and their means."""
    asked = numbers_and_texts()
    groups = [["human" if i % 3 else "augmented"] for i in range(len(asked))]
    scores = scores_of("chartqa", asked, groups, 10)
    assert scores == {"all": 29.0666666667, "human": 29.95, "augmented": 27.3}


def test_scores_of_infovqa_are_the_official_ones():
    """The numbers are those that infographicsvqa_eval.py -a True prints of the same answers."""
    answer_types = ("image span", "question span", "multiple spans", "non span")
    evidence = ("table/list", "textual", "photo/pciture/visual_objects", "figure", "map")
    operations = ("comparison", "arithmetic", "counting")
    asked = texts()
    groups = []
    for i in range(len(asked)):
        of_row = [answer_types[i % 4], evidence[i % 5], evidence[(i + i // 5 % 3 + 1) % 5]]
        if i % 2:
            of_row.append(operations[i % 3])
        groups.append(of_row)
    scores = scores_of("infovqa", asked, groups, 2)
    assert scores.pop("all") == 66.78
    printed = (70.24, 67.34, 65.42, 64.12, 66.48, 66.98, 66.06, 67.10, 67.28, 66.08, 65.74, 65.36)
    assert scores == dict(zip((*answer_types, *evidence, *operations), printed, strict=True))


def test_scores_of_ocrbench_are_the_official_ones():
    """The numbers are those that example.py of MultimodalOCR 794c36d prints of 1,000 answers."""
    printed = [38, 39, 36, 34, 33, 32, 146, 135, 138, 61]
    totals = [50] * 6 + [200] * 3 + [100]
    of_kind = row_files.TABLE["ocrbench"].scores_of
    asked = written(False)[:900] + written(True)[:100]
    groups = []
    for kind, total in zip(of_kind, totals, strict=True):
        groups += [of_kind[kind]] * total
    scores = scores_of("ocrbench", asked, groups, 10)
    assert list(scores)[:3] == ["all", "Text Recognition", "Regular Text Recognition"]
    assert (scores.pop("all"), scores.pop("Text Recognition")) == (692, 212)
    assert list(scores.values()) == printed


def test_scores_of_mmstar_are_the_official_ones():
    """The numbers are those that evaluate/mmstar.py of MMStar 88f243a gives of 1,500 answers."""
    printed = {
        "coarse perception": (0.432, 0.47619047619, 0.361445783133, 0.457831325301),
        "fine-grained perception": (0.44, 0.48192771084, 0.392857142857, 0.44578313253),
        "instance reasoning": (0.476, 0.457831325301, 0.493975903614, 0.47619047619),
        "logical reasoning": (0.5, 0.52380952381, 0.397590361446, 0.578313253012),
        "science & technology": (0.444, 0.457831325301, 0.464285714286, 0.409638554217),
        "math": (0.46, 0.385542168675, 0.469879518072, 0.52380952381),
    }
    expected = {"all": 45.8666666667}
    groups = []
    for core, numbers in printed.items():
        details = row_files.MMSTAR[core]
        groups += [(core, details[len(groups + [0] * i) % 3]) for i in range(250)]
        for name, number in zip((core, *details), numbers, strict=True):
            expected[name] = round(100 * number, 10)
    scores = scores_of("mmstar", letters()[:1500], groups, 10)
    assert list(scores) == list(expected) and scores == pytest.approx(expected, abs=1e-9)


def test_chance_is_one_of_the_options_or_the_best_constant_answer():
    examples = [
        {"label": [truth], "groups": ["all", name]}
        for truth, name in (("5", "human"), ("5.1", "human"), ("Yes", "augmented"))
    ]
    scores = evaluate.TASKS["chartqa"].score(examples, ["5", "6", "no"])
    assert scores["all"] == pytest.approx({"score": 100 / 3, "chance": 200 / 3, "n": 3})
    assert scores["human"]["chance"] == 100 == scores["augmented"]["chance"]

    examples = [{"label": "A", "groups": ["all"], "choices": n} for n in (2, 4)]
    scores = evaluate.TASKS["ai2d"].score(examples, ["A.", "(a)"])
    assert scores == {"all": {"score": 100, "chance": 37.5, "n": 2}}


# ------------------------------------------------------------------- files that are not whole


def test_a_shard_that_is_missing_is_not_left_out_silently(tmp_path):
    FILES["docvqa"][0](tmp_path, True)
    (tmp_path / "DocVQA/validation-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="00000-of-00002.parquet: of 2 files like it 1 are there"):
        evaluate.TASKS["docvqa"].examples(tmp_path)


def test_half_of_chartqa_is_not_asked_as_the_whole(tmp_path):
    FILES["chartqa"][0](tmp_path, False)
    (tmp_path / "test_augmented.json").unlink()
    with pytest.raises(UserError, match="not all of .*test_augmented.json; fix: --data: "):
        evaluate.TASKS["chartqa"].examples(tmp_path)


def test_questions_about_one_document_share_its_bytes(tmp_path, monkeypatch):
    """A document has four questions on average: kept four times, DocVQA would be 2.5 GB."""
    FILES["docvqa"][0](tmp_path, True)
    first, second, third = evaluate.TASKS["docvqa"].examples(tmp_path)
    assert first["pictures"][0] is third["pictures"][0] != second["pictures"][0]
    assert first["image"] == third["image"] == "validation-00000-of-00002.parquet:0"

    # It is decoded once by the check before the model is loaded.
    opened = []
    monkeypatch.setattr("evals.shown.open_media", lambda source, kind: opened.append(source))
    evaluate.check_examples([first, second, third], tmp_path)
    assert opened == [first["pictures"][0], second["pictures"][0]]


def test_parquet_is_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr("evals.files.ROWS_AT_ONCE", 2)
    parquet(tmp_path / "a.parquet", [{"a": i, "b": str(i), "c": None} for i in range(5)])
    rows = read_parquet(tmp_path / "a.parquet", ["b", "none"])
    assert next(rows)[1].values == {"b": "0"}
    assert [(where.rpartition(":")[2], row.values["b"]) for where, row in rows] == [
        (str(i), str(i)) for i in range(1, 5)
    ]


@pytest.mark.parametrize("as_published", ["struct", "bytes"])
def test_pictures_in_parquet_are_bytes_or_structs(as_published, tmp_path):
    pytest.importorskip("pyarrow")
    picture = embedded(2)
    if as_published == "bytes":
        picture = picture["bytes"]
    row = {"question": "?", "options": ["a", "b"], "answer": 1, "image": picture}
    parquet(tmp_path / "data/test-00000-of-00001.parquet", [row])
    (example,) = evaluate.TASKS["ai2d"].examples(tmp_path)
    assert example["pictures"] == [png(2)] and example["label"] == "B"


# ----------------------------------------------------------------------- values that are wrong

NOT_A_PICTURE = {"bytes": None, "path": "a.png"}
ROWS = [
    ("chartqa", "type", ["human", 3, None], "its type|no 'type'"),
    ("chartqa", "question", [None, 3], "question"),
    ("chartqa", "answer", [None], "no 'answer'"),
    ("chartqa", "image", [None, NOT_A_PICTURE, "x.png"], "image"),
    ("docvqa", "questionId", ["x", "", "1.5", None], "questionId|invalid literal"),
    ("docvqa", "answers", [[], None, [None]], "answers"),
    ("docvqa", "question_types", ["form", 3], "question_types"),
    ("ai2d", "answer", ["4", "-1", "B", "", None], "its answer|invalid literal|no 'answer'"),
    ("ai2d", "options", [None, [], ["x"] * 27], "options"),
    ("ocrbench", "question_type", ["Text Recognition", None], "question_type"),
    ("mmstar", "answer", ["E", "a", "", None], "answer"),
    ("mmstar", "l2_category", ["math", None], "l2_category"),
    ("mmstar", "index", ["x", None], "index|invalid literal"),
]


@pytest.mark.parametrize("task, key, values, why", ROWS)
def test_a_wrong_value_in_parquet_is_named_with_file_row_and_key(
    task, key, values, why, tmp_path, monkeypatch
):
    FILES[task][0](tmp_path, True)
    file = tmp_path / files(task, True)
    rows = [row.values for _, row in read_parquet(file)]
    for value in values:
        # The file itself cannot hold a value of another type beside the others.
        def changed(file, columns, value=value):
            for number, row in enumerate(rows):
                where = f"{file}:{number}"
                yield where, row_files.Row(row | {key: value} if number == 0 else row, where)

        monkeypatch.setattr(row_files, "read_parquet", changed)
        with pytest.raises(UserError) as failure:
            evaluate.check_examples(evaluate.TASKS[task].examples(tmp_path), tmp_path)
        said = str(failure.value)
        assert said.startswith(f"{file}:0: ") and "; fix: " in said and "\n" not in said
        assert re.search(why, said), said


@pytest.mark.parametrize(
    "task, name, key",
    [
        ("chartqa", "test_human.json", "imgname"),
        ("docvqa", "val_v1.0_withQT.json", "questionId"),
        ("infovqa", "infographicsVQA_val_v1.0_withQT.json", "image_local_name"),
        ("infovqa-test", "infographicsVQA_test_v1.0.json", "question"),
        ("ocrbench", "OCRBench.json", "type"),
    ],
)
def test_a_wrong_value_in_json_is_named_with_file_row_and_key(task, name, key, tmp_path):
    FILES[task][0](tmp_path, False)
    file = tmp_path / name
    published = json.loads(file.read_text())
    for value in (10**400, *WRONG):
        if key == "question" and value == "":
            continue
        if key == "questionId" and value in (-1, 10**30, 10**400):
            continue
        whole = json.loads(json.dumps(published))
        rows = whole
        if isinstance(whole, dict):
            rows = whole["data"]
        rows[1][key] = value
        file.write_text(json.dumps(whole))
        with pytest.raises(UserError) as failure:
            evaluate.check_examples(evaluate.TASKS[task].examples(tmp_path), tmp_path)
        said = str(failure.value)
        assert said.startswith(f"{file}:1: ") and "\n" not in said, (value, said)


# --------------------------------------------------------------------------------------- POPE


def test_pope_shows_how_many_answers_are_neither_yes_nor_no():
    """They are in the official share of yes, and stand beside it."""
    labels = ["yes", "no", "yes", "no"]
    examples = [{"label": label, "split": "random"} for label in labels]
    scores = pope.score(examples, ["yes", "A dog.", "", "NO"])
    assert scores["random says yes"]["score"] == 100
    assert scores["random says neither"] == {"score": 50, "chance": 0, "n": 4}
    assert pope.unread(examples, ["yes", "A dog.", "", "NO"]) == 2
    assert "random says neither" in evaluate.score_table(scores)
