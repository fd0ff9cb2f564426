"""CHAIR and AMBER: each against the official code, on generated pictures, captions and answers.

The expected numbers are what chair.py of shikiw/OPERA at 61426efe and inference.py of
junyangwang0410/AMBER at 534babf6 print for the files and answers of tests/tools/hallucination.py.
They were run twice: with that file's stand-in for nltk and spaCy, and with nltk itself. nltk and
its data are not needed here; where they are, the second numbers are checked, too.
"""

import json
import sys
from types import SimpleNamespace

import pytest

import evaluate
from config import UserError
from evals import amber, chair, words
from tests.tools import hallucination
from tests.tools.benchmark_files import evaluated, png, tiny_model
from tests.tools.hallucination import WORDS

CHAIR = {"stand-in": "82.2 44.3 36.4 25.7", "nltk": "80.5 42.8 37.6 23.5"}
DESCRIPTIONS = {"stand-in": "48.4 42.2 71.3 26.9", "nltk": "48.8 38.6 69.1 24.8"}
QUESTIONS = """
    25.0 56.2 29.9 39.0  30.0 100.0 30.0 46.1  24.3 46.1 31.4 37.4  21.6 40.9 25.0 31.0
    25.2 48.9 31.4 38.2  26.2 48.1 38.5 42.8  23.7 50.0 27.8 35.7
"""


@pytest.fixture
def stand_in(monkeypatch):
    for name, function in vars(WORDS).items():
        monkeypatch.setattr(words, name, function)


@pytest.fixture(params=["stand-in", pytest.param("nltk", marks=pytest.mark.full)])
def language(request, monkeypatch):
    """Read words with the stand-in, or with nltk and only the vectors of the stand-in."""
    if request.param == "stand-in":
        request.getfixturevalue("stand_in")
    else:
        try:
            words.check()
        except UserError as error:
            pytest.skip(str(error))
        monkeypatch.setattr(words, "similarity", WORDS.similarity)
        monkeypatch.setattr(words, "check", WORDS.check)
    return request.param


def printed(scores):
    return [f"{score['score']:.1f}" for score in scores.values()]


# ----------------------------------------------------------------------------------------- CHAIR


def test_chair_is_the_official_one(language, tmp_path):
    answers = hallucination.coco(tmp_path)
    examples = chair.examples(tmp_path)
    scores = chair.score(examples, answers)
    assert printed(scores) == CHAIR[language].split()
    assert list(scores) == ["CHAIRs", "CHAIRi", "recall", "length"] and len(answers) == 600
    assert all(score["n"] == 600 and score["chance"] is None for score in scores.values())
    assert chair.score(examples[:1], [""])["CHAIRi"]["score"] == 0


NAMES = {"cat": "cat", "kitten": "cat", "seat": "chair", "toilet": "toilet", "man": "person"}
NAMES |= {"tie": "tie", "elephant": "elephant", "baby": "person", "jet": "plane", "ski": "skis"}
NAMES |= {"teddy bear": "teddy bear", "bear": "bear", "hot dog": "hot dog", "dog": "dog"}


@pytest.mark.parametrize(
    "text, objects, tokens",
    [
        ("A cat, two Kittens.", ["cat", "cat"], 6),
        ("a baby elephant", ["elephant"], 2),
        ("adult bears", ["bear"], 1),
        ("a baby and an elephant", ["person", "elephant"], 5),
        ("passenger jets", ["plane"], 1),
        ("teddy bear dog, hot dog hot dogs", ["teddy bear", "dog", "hot dog", "hot dog"], 5),
        ("a bow tie", ["tie"], 2),
        ("the toilet seats", ["toilet"], 2),
        ("the seat of the toilet, a seat", ["toilet"], 8),
        ("seated skiing", ["chair", "skis"], 2),
        ("", [], 0),
    ],
)
def test_objects_of_a_caption(stand_in, text, objects, tokens):
    (caption,) = chair.read_captions([text], NAMES)
    assert (caption.objects, caption.tokens) == (objects, tokens)


def test_chair_counts_mentions_and_captions(stand_in):
    examples = [{"label": ["cat", "dog"], "names": NAMES}, {"label": ["person"], "names": NAMES}]
    scores = chair.score(examples, ["a cat and a kitten, a man", "a man"])
    assert {name: score["score"] for name, score in scores.items()} == {
        "CHAIRs": 50,
        "CHAIRi": 25,
        "recall": pytest.approx(200 / 3),
        "length": 5,
    }


def test_the_pictures_that_are_asked_about(stand_in, tmp_path):
    """Those of the list in its order; without a list, 500 that a fixed seed draws."""
    hallucination.coco(tmp_path)
    found = chair.examples(tmp_path)
    assert len(found) == 600 and [example["image_id"] for example in found[:3]] == [2, 9, 16]
    assert found[1]["image"] == "val2014/COCO_val2014_000000000009.jpg"
    assert found[1]["prompt"] == "Please describe this image in detail."
    truth = {example["id"]: example["label"] for example in found}

    listed = tmp_path / "chair_images.jsonl"
    listed.write_text('{"image_id": 16, "caption": "A cat."}\n{"image_id": 2}\n')
    assert [example["id"] for example in chair.examples(tmp_path)] == ["16", "2"]

    listed.unlink()
    drawn = chair.examples(tmp_path)
    assert [example["image_id"] for example in drawn[:5]] == [1157, 3061, 3810, 807, 2963]
    assert len({example["id"] for example in drawn}) == 500
    assert all(example["label"] == truth[example["id"]] for example in drawn)

    # COCO's files may also lie beside the pictures.
    for file in (tmp_path / "annotations").iterdir():
        file.rename(tmp_path / file.name)
    assert chair.examples(tmp_path)[0]["label"] == drawn[0]["label"]


@pytest.mark.parametrize(
    "file, change, said",
    [
        ("instances", lambda d: d.pop("categories"), "instances_val2014.json: not as"),
        ("instances", lambda d: d["images"][1].pop("id"), "val2014.json:1: not as published: it"),
        ("instances", lambda d: d["categories"][2].update(name="gnu"), "val2014.json:2: not as"),
        ("instances", lambda d: d["annotations"][3].update(category_id=999), "json:3: not as"),
        ("instances", lambda d: d["annotations"][3].update(image_id=None), "annotations.image_id"),
        ("captions", lambda d: d["annotations"][4].update(caption=["a"]), "annotations.caption"),
        ("captions", lambda d: d["annotations"].append(7), "json:1200: not as published: 7"),
    ],
)
def test_files_of_coco_that_are_not_as_published(stand_in, tmp_path, file, change, said):
    hallucination.coco(tmp_path)
    path = tmp_path / f"annotations/{file}_val2014.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as failure:
        chair.examples(tmp_path)
    assert said in str(failure.value) and "; fix: " in str(failure.value)


def test_a_list_with_another_picture_and_no_names_of_objects(stand_in, tmp_path):
    hallucination.coco(tmp_path, 3)
    (tmp_path / "chair_images.jsonl").write_text('{"image_id": 2}\n{"image_id": 3}\n')
    with pytest.raises(UserError, match=r"chair_images.jsonl:1: picture 3 is not in instances_"):
        chair.examples(tmp_path)
    (tmp_path / "synonyms.txt").unlink()
    with pytest.raises(UserError, match=r"fix: take data/synonyms.txt of github.com/LisaAnne/Ha"):
        chair.examples(tmp_path)


# ----------------------------------------------------------------------------------------- AMBER


def test_amber_is_the_official_one(language, tmp_path):
    answers = hallucination.amber(tmp_path)
    examples = amber.examples(tmp_path)
    scores = amber.score(examples, answers)
    expected = DESCRIPTIONS[language].split() + QUESTIONS.split()
    assert printed(scores)[1:] == expected and len(answers) == 1455
    assert list(scores)[:9] == "AMBER CHAIR Cover Hal Cog accuracy precision recall F1".split()
    names = "existence attribute state number action relation".split()
    assert list(scores)[9::4] == [f"{name} accuracy" for name in names]
    mean = (100 - scores["CHAIR"]["score"] + scores["F1"]["score"]) / 2
    assert scores["AMBER"] == {"score": mean, "chance": None, "n": 1455}

    # Chance is the answer No throughout: of existence all of it is right.
    always_no = amber.score(examples, ["No"] * len(examples))
    for name in list(scores)[5:]:
        assert scores[name]["chance"] == always_no[name]["score"]
    assert scores["existence F1"]["chance"] == 100 and scores["relation recall"]["chance"] == 100

    # Either part alone has the same scores.
    for name, first in (("amber-g", 0), ("amber-d", 540)):
        task = evaluate.TASKS[name]
        part = task.examples(tmp_path)
        said = answers[first : first + len(part)]
        assert len(part) == (915 if first else 540)
        assert task.score(part, said) == {n: scores[n] for n in task.score(part, said)}


VOCABULARY = amber.Vocabulary(
    {"tree": ["wood"], "street": ["road"], "cup": [], "sun": [], "orange": []},
    frozenset(["tree", "wood", "street", "road", "cup", "sun", "orange"]),
    frozenset(["orange"]),
)


@pytest.mark.parametrize(
    "nouns, truth, hallu, found",
    [
        (["tree", "wood", "gnu"], ["cup", "tree"], [], (2, 0, {1}, set())),
        (["orange", "sun"], ["cup"], [], (2, 1, set(), set())),
        (["road"], ["street", "street"], [], (1, 0, {0}, set())),
        (["tree"], ["street"], ["sun"], (1, 0, {0}, set())),  # 6 of 7 letters: the same
        (["tree"], ["cup"], ["street", "tree"], (1, 1, set(), {0, 1})),  # of hallu both count
        (["road"], ["sun"], ["street"], (1, 1, set(), {0})),
        ([], ["sun"], ["street"], (0, 0, set(), set())),
    ],
)
def test_nouns_of_a_description(stand_in, nouns, truth, hallu, found):
    objects = {"truth": truth, "hallu": hallu}
    assert amber.read_description(nouns, objects, VOCABULARY) == amber.Found(*found)


def test_answers_that_are_not_just_yes_or_no():
    questions = [{"kind": "relation", "label": "no"}] * 5
    answers = ["No", "Yes", "No.", "no", ""]
    assert amber.unread([*questions, {"kind": "generative"}], [*answers, "A cat."]) == 3
    assert amber.score(questions, answers)["accuracy"]["score"] == 20


def test_questions_need_neither_nltk_nor_the_words_of_descriptions(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "nltk", None)
    hallucination.amber(tmp_path, 3, 20)
    (tmp_path / "data/relation.json").unlink()
    found = evaluate.TASKS["amber-d"].examples(tmp_path)
    assert len(found) == 20 and found[0]["image"] == "image/AMBER_1.jpg"
    assert found[0]["id"] == "4" and found[0]["prompt"].endswith("\n" + amber.WORD.strip())

    # A yes or no needs no room for a description, so more questions are answered at once.
    lengths = [evaluate.TASKS[name].MAX_NEW_TOKENS for name in ("amber", "amber-g", "amber-d")]
    assert lengths == [512, 512, 16]


@pytest.mark.parametrize(
    "file, change, said",
    [
        ("annotations", lambda d: d[1].update(type="x"), "annotations.json:1: not as published"),
        ("annotations", lambda d: d[1]["truth"].append("gnu"), "json:1: 'gnu' is not in relation"),
        ("annotations", lambda d: d[1].update(hallu=None), "annotations.json:1: not as published"),
        ("annotations", lambda d: d[4].update(truth="maybe"), "annotations.json:4: not as"),
        ("annotations", lambda d: d.pop(), "query_all.json:22: not as published"),
        ("query/query_all", lambda d: d[2].pop("query"), "query_all.json:2: not as published"),
        ("query/query_all", lambda d: d[2].update(id=True), "query_all.json:2: not as published"),
        ("relation", lambda d: d.update(sea="lake"), "relation.json: not as published: its sea"),
    ],
)
def test_files_of_amber_that_are_not_as_published(stand_in, tmp_path, file, change, said):
    hallucination.amber(tmp_path, 3, 20)
    path = tmp_path / f"data/{file}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as failure:
        amber.examples(tmp_path)
    assert said in str(failure.value) and "; fix: " in str(failure.value)


# ------------------------------------------------------------------------ the command, the packages


def test_a_model_is_measured_and_its_answers_are_written(stand_in, tmp_path):
    """The files that are written are those that the official scripts read."""
    model = tiny_model(tmp_path / "model")
    coco = tmp_path / "coco"
    hallucination.coco(coco, 3)
    for image in (2, 9, 16):
        (coco / f"val2014/COCO_val2014_{image:012d}.jpg").parent.mkdir(exist_ok=True)
        (coco / f"val2014/COCO_val2014_{image:012d}.jpg").write_bytes(png(image))
    rows = evaluated(model, "chair", coco, tmp_path / "c")
    written = (tmp_path / "c/a-captions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == [
        {"image_id": int(row["id"]), "caption": row["answer"]} for row in rows
    ]
    scores = json.loads((tmp_path / "c/a.json").read_text())["scores"]
    assert list(scores) == ["CHAIRs", "CHAIRi", "recall", "length"]
    assert scores["CHAIRs"]["published"] == 45.0

    data = tmp_path / "amber"
    hallucination.amber(data, 2, 4)
    for file in (data / "image").iterdir():
        file.write_bytes(png())
    rows = evaluated(model, "amber", data, tmp_path / "a")
    assert json.loads((tmp_path / "a/a-responses.json").read_text()) == [
        {"id": int(row["id"]), "response": row["answer"]} for row in rows
    ]
    scores = json.loads((tmp_path / "a/a.json").read_text())["scores"]
    assert scores["AMBER"]["published"] == 83.5 and scores["accuracy"]["n"] == 4
    assert len(evaluated(model, "amber", data, tmp_path / "l", "--limit", "3")) == 3


@pytest.fixture
def nothing_loaded():
    """Forget which packages were found, before a test and after it."""
    loaders = (words._nltk, words._spacy, words._vectors)
    for load in loaders:
        load.cache_clear()
    yield
    for load in loaders:
        load.cache_clear()


def test_what_is_not_installed_is_said_in_one_line(monkeypatch, nothing_loaded, tmp_path):
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setitem(sys.modules, "spacy", None)
    hallucination.coco(tmp_path / "c", 2)
    with pytest.raises(UserError, match=r"nltk: .*not installed; fix: pip install nltk$"):
        chair.examples(tmp_path / "c")
    hallucination.amber(tmp_path / "a", 1, 1)
    with pytest.raises(UserError, match=r"fix: pip install nltk$"):
        amber.examples(tmp_path / "a")

    def find(words):
        raise LookupError("Resource punkt_tab not found.")

    monkeypatch.setitem(sys.modules, "nltk", SimpleNamespace(word_tokenize=find, pos_tag=None))
    with pytest.raises(UserError, match=r"fix: python -m nltk.downloader punkt_tab averaged_perc"):
        words.check()

    monkeypatch.setattr(words, "_nltk", lambda: None)
    with pytest.raises(UserError, match=r"spacy: .*not installed; fix: pip install spacy$"):
        amber.examples(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace())
    monkeypatch.setattr(words, "VECTORS", "no_such_model")
    with pytest.raises(UserError, match=r"fix: python -m spacy download no_such_model$"):
        amber.examples(tmp_path / "a")
