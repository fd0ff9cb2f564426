"""Options with letters: how a prompt lists them, and which letter an answer means.

    choices = with_letters(["a cat", "a dog"])    # {"A": "a cat", "B": "a dog"}
    list_options(choices.values())                # "\\nA. a cat\\nB. a dog"
    parse_choice("The answer is (B).", choices)   # "B"

WORD and LETTER end the prompts of LLaVA's evaluation, of short answers and of multiple choice.
"""

from __future__ import annotations

from collections.abc import Iterable

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

# An answer of so many words is searched for the text of an option.
LONG_ANSWER = 6


def with_letters(texts: Iterable[str]) -> dict[str, str]:
    """Return {"A": first text, "B": second ...}."""
    return {chr(ord("A") + i): text for i, text in enumerate(texts)}


def list_options(texts: Iterable[str]) -> str:
    """Return the options as LLaVA lists them, a line each: "\\nA. ...\\nB. ..."."""
    return "".join(f"\n{letter}. {text}" for letter, text in with_letters(texts).items())


def parse_choice(answer: str, choices: dict[str, str]) -> str | None:
    """Return the letter among `choices` {letter: text} that an answer gives.

    This is MMMU's rule (parse_multi_choice_response of eval_utils.py, github.com/MMMU-Benchmark/
    MMMU), without its last step: it guesses where this returns None. It looks for "(B)", then for
    a B between spaces, then, in a long answer, for the text of an option. The one mentioned last
    counts, also in "not (C)".
    """
    # The spaces let a letter at either end stand between spaces too.
    padded = f" {strip_marks(answer)} "

    in_brackets = {letter: f"({letter})" for letter in choices}
    said = last_mentioned(in_brackets, padded)
    if said:
        return said

    between_spaces = {letter: f" {letter} " for letter in choices}
    said = last_mentioned(between_spaces, padded)
    if said:
        return said

    # A short answer without a letter is no sentence about an option.
    if len(padded.split()) < LONG_ANSWER:
        return None
    texts = {letter: str(text).lower() for letter, text in choices.items()}
    return last_mentioned(texts, padded.lower())


def strip_marks(text: str) -> str:
    """Return the text without the punctuation marks at its ends.

    One mark after the other, as MMMU does it: of "B.'" the quotation mark goes, but the period,
    whose turn is over, stays.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    return text


def last_mentioned(wanted: dict[str, str], text: str) -> str | None:
    """Return the letter whose text in `wanted` begins last in `text`, the first of equals."""
    last = None
    last_place = -1
    for letter, part in wanted.items():
        place = text.rfind(part)
        if place > last_place:
            last = letter
            last_place = place
    return last
