"""evals/world_hallucination.py: which objects a description names, and the rates of invention."""

import pytest

from demo import world as demo_world
from evals import world_hallucination
from evals.world_hallucination import objects_named

NAMES = {"colour": {"red", "blue"}, "shape": {"circle", "square"}}
RED_CIRCLE = ("red", "circle")
BLUE_CIRCLE = ("blue", "circle")
BLUE_SQUARE = ("blue", "square")


@pytest.mark.parametrize(
    "text, named",
    [
        ("top left: red circle. middle right: blue square.", [RED_CIRCLE, BLUE_SQUARE]),
        ("Blue square middle right, red circle top left.", [BLUE_SQUARE, RED_CIRCLE]),
        ("a red circle and a red circle", [RED_CIRCLE, RED_CIRCLE]),
        ("circle red. green circle. redcircle", []),
        ("", []),
    ],
)
def test_objects_that_a_description_names(text, named):
    assert objects_named(text, NAMES) == named


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "data"
    demo_world.write(out, scenes=40)
    return out


def caption(label):
    return {"split": "captions", "label": label, "names": NAMES}


def test_rates():
    examples = [
        {"split": "existence_random", "label": "no"},
        {"split": "existence_random", "label": "no"},
        {"split": "existence_popular", "label": "no"},
        caption([RED_CIRCLE, BLUE_SQUARE]),
        caption([RED_CIRCLE, RED_CIRCLE]),
        caption([BLUE_SQUARE]),
    ]
    answers = ["Yes.", "no", "no", "a red circle, a blue circle", "a red circle", "nothing"]
    scores = world_hallucination.score(examples, answers)
    assert {name: score["n"] for name, score in scores.items()} == {
        "false_yes_random": 2,
        "false_yes_popular": 1,
        "CHAIRs": 3,
        "CHAIRi": 3,
        "recall": 3,
    }
    reached = {name: score["score"] for name, score in scores.items()}
    assert reached["false_yes_random"] == 50 and reached["false_yes_popular"] == 0
    assert reached["CHAIRs"] == pytest.approx(100 / 3)  # one caption of three
    assert reached["CHAIRi"] == pytest.approx(100 / 3)  # one object of the three that are named

    # The two red circles of a picture are one name.
    assert reached["recall"] == pytest.approx(100 * 2 / 4)


def test_nothing_said_is_nothing_invented():
    scores = world_hallucination.score([caption([RED_CIRCLE])], [""])
    assert {name: score["score"] for name, score in scores.items()} == {
        "CHAIRs": 0,
        "CHAIRi": 0,
        "recall": 0,
    }


def test_what_is_asked_of_the_worlds_benchmark(folder):
    examples = world_hallucination.examples(folder)
    captions = [example for example in examples if example["split"] == "captions"]
    questions = examples[: -len(captions)]

    assert {example["label"] for example in questions} == {"no"}
    assert len(questions) == 3 * demo_world.EXISTENCE_QUESTIONS / 2
    assert len({example["image"] for example in captions}) == len(captions)
    assert len({example["id"] for example in examples}) == len(examples)

    # The world's own list of a scene names all of its objects, and no other.
    for example in captions[:50]:
        listed = " and ".join(f"a small {colour} {shape}" for colour, shape in example["label"])
        assert world_hallucination.score([example], [listed])["CHAIRs"]["score"] == 0
        assert world_hallucination.score([example], [listed])["recall"]["score"] == 100


def test_the_prompt_is_the_one_of_the_worlds_captions(folder):
    assert f"\\n{world_hallucination.PROMPT}" in (folder / "pretrain.json").read_text()
