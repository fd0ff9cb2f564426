"""demo/rewrite.py: captions with wrong or missing words, terse ones, and fewer rows."""

import json
import random

import pytest

from demo import rewrite

THREE = "top left: red circle. middle centre: green triangle. middle right: blue square."
TWO = "top left: red circle. middle right: blue square."
SCENE = [{"colour": "red", "shape": "circle"}, {"colour": "blue", "shape": "square"}]


def row(caption):
    turns = [("human", "<image>\nWhat is where?"), ("gpt", caption)]
    conversation = [{"from": who, "value": text} for who, text in turns]
    return {"id": "a", "image": "a.png", "conversations": conversation, "scene": SCENE}


def rewritten(tmp_path, rows, *options):
    (tmp_path / "in.json").write_text(json.dumps(rows))
    rewrite.main([str(tmp_path / "in.json"), str(tmp_path / "new" / "out.json"), *options])
    return json.loads((tmp_path / "new" / "out.json").read_text())


@pytest.mark.parametrize("caption", [THREE, TWO])
def test_every_word_that_names_something_can_be_wrong(caption):
    wrong = rewrite.with_wrong_words(caption, random.Random(0), 1.0)
    for before, after in zip(caption.split(), wrong.split(), strict=True):
        before = before.strip(".,:")
        after = after.strip(".,:")
        groups = [group for group in rewrite.GROUPS if before in group]
        if groups:
            assert after != before and after in groups[0]
        else:
            assert after == before
    assert rewrite.with_wrong_words(caption, random.Random(0), 0.0) == caption


def test_about_the_share_of_the_words_is_wrong():
    words = " ".join(["red"] * 1000)
    wrong = rewrite.with_wrong_words(words, random.Random(0), 0.25).split()
    assert 0.2 < sum(word != "red" for word in wrong) / 1000 < 0.3


def test_missing_statements():
    rng = random.Random(0)
    one = {"top left: red circle.", "middle right: blue square."}
    assert {rewrite.with_missing_statements(TWO, rng, 0.5) for _ in range(50)} == one | {TWO}

    kept = {rewrite.with_missing_statements(THREE, rng, 0.5) for _ in range(200)}
    assert len(kept) == 7 and THREE in kept and "middle centre: green triangle." in kept

    # Never nothing: a row without an answer would train nothing.
    assert rewrite.with_missing_statements(THREE, rng, 1.0) in kept


def test_rows_keep_all_but_the_words_of_the_caption(tmp_path):
    rows = [row(THREE), row(TWO)]
    for options in (["--wrong", "0.9"], ["--missing", "0.9"], ["--terse"]):
        found = rewritten(tmp_path, rows, *options)
        assert found != rows
        for before, after in zip(rows, found, strict=True):
            assert after["conversations"][0] == before["conversations"][0]
            after["conversations"][1] = before["conversations"][1]
            assert after == before
    assert rewritten(tmp_path, rows, "--rows", "1") == rows[:1]


def test_terse_captions_name_the_objects_and_nothing_else(tmp_path):
    (found,) = rewritten(tmp_path, [row(TWO)], "--terse")
    assert found["conversations"][1]["value"] in (
        "red circle, blue square.",
        "blue square, red circle.",
    )


def test_the_same_command_writes_the_same_bytes(tmp_path):
    rows = [row(THREE)] * 20
    assert rewritten(tmp_path, rows, "--wrong", "0.5") == rewritten(
        tmp_path, rows, "--wrong", "0.5"
    )
