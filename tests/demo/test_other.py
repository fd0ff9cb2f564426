"""demo/other.py: no word and no colour of the demo, and pictures that show what the rows say."""

import json
import re

import pytest
from PIL import Image

from demo import other, scenes, world
from inputs.tokenizer import load_tokenizer
from tests.tools.demo_world import asked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("other") / "data"
    world.write(out, seed=3, scenes=400, fill=other.fill_folder)
    return out


def rows(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_no_word_of_the_demo_is_said_and_none_is_split(folder):
    of_demo = set(scenes.COLOURS) | set(scenes.SHAPES) | {f"{shape}s" for shape in scenes.SHAPES}
    assert other.WORDS.keys() == of_demo
    assert not of_demo & set(other.WORDS.values())

    tokenizer = load_tokenizer(folder / "tokenizer")
    said = set()
    for name in ("pretrain", "finetune"):
        for row in rows(folder, name):
            for question, answer in asked(row):
                said.update(re.findall(r"\w+", f"{question} {answer}"))
    assert not of_demo & said
    for word in of_demo | set(other.WORDS.values()):
        assert len(tokenizer.encode(f" {word}")[0]) == 1, word


def test_the_picture_shows_what_the_row_says(folder):
    for row in rows(folder, "finetune")[:40]:
        image = Image.open(folder / "images" / row["image"])
        assert image.size == (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE)
        background = image.getpixel((0, 0))
        assert all(225 <= channel <= 250 for channel in background)

        for thing in row["scene"]:
            assert thing["colour"] in other.WORDS.values()
            assert thing["shape"] in other.WORDS.values()
            left, top, right, bottom = thing["box"]
            middle = image.getpixel((int((left + right) / 2), int((top + bottom) / 2)))
            corner = image.getpixel((int(left), int(top)))
            assert corner == background

            # Only a ring is open in its middle.
            assert (middle == background) == (thing["shape"] == "ring")


def test_colours_are_told_apart_and_are_not_the_demos():
    fills = {"red": [214, 40, 40], "green": [46, 150, 60], "blue": [40, 80, 210]}
    for colour, fill in fills.items():
        red, green, blue = other.fill_of({"colour": colour, "fill": fill})
        assert sum(abs(a - b) for a, b in zip(fill, (red, green, blue), strict=True)) > 60
