"""Chapter 8: CHAIR of descriptions, and what can be answered blind."""

import pytest

from guide.exercises import chosen

ch = chosen("ch08")


def test_chair():
    described = [["dog", "cat", "dog"], ["chair"], [], ["tree", "bird"]]
    present = [{"dog", "ball"}, {"chair"}, {"car"}, {"bird", "tree"}]
    found = ch.chair(described, present)

    # Six are named and the cat is not there; one of four descriptions has it.
    assert found["CHAIRi"] == pytest.approx(100 / 6)
    assert found["CHAIRs"] == pytest.approx(25)

    # Of dog, ball, chair, car, bird and tree, four are named. The dog counts once.
    assert found["recall"] == pytest.approx(100 * 4 / 6)


def test_who_says_little_invents_little():
    present = [{"dog"}, {"cat"}]
    quiet = ch.chair([["dog"], []], present)
    assert quiet["CHAIRs"] == 0
    assert quiet["recall"] == 50


def test_blind_accuracy():
    seen = (
        [("banana?", "yellow")] * 3 + [("banana?", "green")] + [("sky?", "grey"), ("sky?", "blue")]
    )
    asked = [("banana?", "yellow"), ("banana?", "green"), ("sky?", "blue"), ("sea?", "blue")]
    assert ch.blind_accuracy(seen, asked) == 0.5


def test_balanced_questions_leave_chance():
    colours = ("blue", "green", "red", "yellow")
    seen = [("colour?", "red")] * 5 + [("colour?", "blue")] * 2
    assert ch.blind_accuracy(seen, [("colour?", colour) for colour in colours]) == 0.25
