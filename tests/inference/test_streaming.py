"""Streaming text: what may still change is not shown, and nothing is shown twice or lost."""

import random

import pytest

from inference.streaming import TextStream, first_stop, possible_stop


def decode(tokens: list[int]) -> str:
    """Tokens are the bytes of UTF-8, as in a byte-level tokenizer."""
    return bytes(tokens).decode("utf-8", errors="replace")


def stream(text: str, stop=()) -> tuple[list[str], TextStream]:
    """Return what each byte of a text shows, with the rest at the end, and the stream."""
    said = TextStream(decode, stop)
    tokens, pieces = [], []
    for byte in text.encode():
        tokens.append(byte)
        pieces.append(said.update(tokens))
        if said.stopped:
            break
    pieces.append(said.finish())
    return pieces, said


def test_text_is_shown_as_it_is_made():
    pieces, said = stream("abc")
    assert pieces == ["a", "b", "c", ""]
    assert said.text == "abc" and not said.stopped


def test_half_of_a_character_waits_for_its_other_bytes():
    pieces, said = stream("né€")
    assert pieces == ["n", "", "é", "", "", "€", ""]
    assert said.text == "né€"


def test_a_character_that_never_gets_complete_comes_out_at_the_end():
    said = TextStream(decode)
    euro = list("€".encode())
    assert said.update([97]) == "a"
    assert said.update([97, *euro[:2]]) == ""
    assert said.finish() == "\ufffd" and said.text == "a\ufffd"


def test_a_stop_string_that_is_split_over_tokens_is_never_shown():
    pieces, said = stream("I say stop, now", ["stop"])
    assert pieces == ["I", " ", "", "sa", "y", " ", "", "", "", "", ""]
    assert said.text == "I say " and said.stopped


def test_what_only_began_like_a_stop_string_is_shown_after_all():
    pieces, said = stream("a sto", ["stop"])
    assert pieces == ["a", " ", "", "", "", "sto"] and not said.stopped
    pieces, _ = stream("stool stop", ["stop"])
    assert pieces[:5] == ["", "", "", "stoo", "l"] and "".join(pieces) == "stool "


def test_a_stop_string_inside_one_token_ends_the_answer_in_front_of_it():
    said = TextStream(lambda tokens: "".join(["red", ". Blue.\n"][i] for i in tokens), ["Blue"])
    assert said.update([0]) == "red" and not said.stopped
    assert said.update([0, 1]) == ". "
    assert said.stopped and said.text == "red. " and said.finish() == ""


def test_the_first_of_several_stop_strings_ends_the_answer():
    pieces, said = stream("one two three", ["three", "two"])
    assert "".join(pieces) == "one " == said.text
    assert first_stop("one two three", ["three", "two"]) == 4
    assert first_stop("one", ["two"]) is None and first_stop("one", []) is None


def test_a_stop_string_may_have_characters_of_several_bytes():
    pieces, said = stream("1 € = 1,1 $", ["€ ="])
    assert "".join(pieces) == "1 " and said.stopped


def test_the_text_that_is_held_back_is_the_longest_beginning_of_a_stop_string():
    assert possible_stop("I say sto", ["stop", "to go"]) == 3
    assert possible_stop("I say t", ["stop", "to go"]) == 1
    assert possible_stop("I say stop", ["stop"]) == 0
    assert possible_stop("a", []) == 0


@pytest.mark.parametrize("seed", range(5))
def test_the_pieces_are_the_text_however_it_is_cut_into_tokens(seed):
    """Many texts of few letters, so that stop strings begin, fail and happen all the time."""
    draw = random.Random(seed)
    for _ in range(200):
        text = "".join(draw.choice("ab€") for _ in range(draw.randint(0, 12)))
        stop = ["".join(draw.choice("ab€") for _ in range(draw.randint(1, 4))) for _ in range(2)]
        data = text.encode()
        said, pieces, at = TextStream(decode, stop), [], 0
        while at < len(data) and not said.stopped:
            at = min(len(data), at + draw.randint(1, 4))
            pieces.append(said.update(list(data[:at])))
        pieces.append(said.finish())

        # What had been decoded when a stop string was complete, or else all of the text.
        decoded = decode(list(data[:at]))
        ends = [decoded.find(s) for s in stop if s in decoded]
        assert "".join(pieces) == decoded[: min(ends, default=len(decoded))] == said.text
        assert said.stopped == bool(ends) == any(s in text for s in stop)
