"""inputs/preview.py: supervised characters for a terminal and a page, pictures inside a page."""

import base64
import io
import re

import pytest
from PIL import Image

from inputs.preview import (
    encode_png,
    html_page,
    image_tag,
    mark_supervised,
    show_supervised,
)
from packing import IGNORE

LABELS, OFFSETS = [IGNORE, 5, IGNORE], [(0, 1), (1, 2), (2, 4)]


def test_supervised_characters_are_green_or_in_brackets():
    """And an escape character of the data reaches no terminal."""
    text = "ab\033c"
    assert show_supervised(text, LABELS, OFFSETS, True) == "a\033[32mb\033[0m\\033c"
    assert show_supervised(text, LABELS, OFFSETS, False) == "a[[b]]\\033c"


def test_no_control_character_reaches_a_terminal():
    text = "a\x1b[2J\x9b1m\r\b\u202e\n\t\u3000\u00a0\U0001f600"
    shown = show_supervised(text, [IGNORE], [(0, len(text))], False)
    assert shown == "a\\033[2J\\2331m\\015\\010\\u202e\n\t\u3000\u00a0\U0001f600"


def test_supervised_characters_on_a_page():
    assert mark_supervised("<&\033c", LABELS, OFFSETS) == "&lt;<mark>&amp;</mark>\\033c"
    assert mark_supervised("", [], []) == show_supervised("", [], [], True) == ""


def test_tokens_of_one_character_are_marked_once():
    """The bytes of a character are tokens that share it, or stand behind it without width."""
    labels, offsets = [7, 8, 9, IGNORE], [(0, 1), (0, 1), (1, 1), (1, 2)]
    assert show_supervised("你b", labels, offsets, False) == "[[你]]b"


def test_neighbours_are_one_run():
    assert (
        show_supervised("abcd", [1, 2, 3, 4], [(0, 1), (1, 2), (2, 3), (3, 4)], False) == "[[abcd]]"
    )


def test_labels_and_offsets_belong_together():
    with pytest.raises(ValueError):
        show_supervised("ab", [1], [(0, 1), (1, 2)], False)


def test_an_image_is_inside_its_tag():
    image = Image.new("RGB", (3, 2), (200, 10, 30))
    tag = image_tag(image, 240)
    assert 'width="240"' in tag and image_tag(encode_png(image), 240) == tag
    (data,) = re.findall('src="data:image/png;base64,([^"]*)"', tag)
    again = Image.open(io.BytesIO(base64.b64decode(data)))
    assert again.size == (3, 2) and again.getpixel((2, 1)) == (200, 10, 30)


def test_a_page_escapes_its_title_alone():
    page = html_page("a < b", "<p>text</p>", "p { color: red }")
    assert page.startswith("<!doctype html>") and '<meta charset="utf-8">' in page
    assert "<title>a &lt; b</title>" in page and "<p>text</p>" in page
    assert "<style>p { color: red }</style>" in page
