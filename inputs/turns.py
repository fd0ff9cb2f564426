"""Turns of raw rows: what each form of forms.py says, in LLaVA's words, and where pictures stand.

    turns_of_conversation([{"role": "user", "content": [{"type": "image"}, ...]}, ...], where)
    turns_of_texts([{"user": "Who?", "assistant": "A dog."}], where)
    turns_of_answers("Who?", ["a dog", "a cat", "a dog"])    # the most frequent one is trained
    agree(turns, media)                                      # a mark for each picture

All turns are LLaVA's, {"from": "human", "value": "<image>Who?"}. What cannot be read is a UserError
at `where`, which is the row and the key. A key that nothing reads is passed over, unless it holds a
picture.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from config import UserError, printable
from inputs.conversation import IMAGE, TURNS
from inputs.media import MEDIA, Medium, as_list, check_unread, is_empty, read_medium

VIDEO = "<video>"  # how some projects mark the place of a video

# Keys of a turn, of a pair of texts, of an answer, and those beside a question that hold what its
# answer may be.
TURN_KEYS = ("from", "role", "value", "content")
PAIR = ("user", "assistant")
ANSWER_KEYS = ("answer", "text")
OPTIONS = ("options", "choices")

SPEAKERS = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "system": "system",
}

# Notes on rows, for `data.py check`.
MARKS_FIRST = "no <image> mark, pictures stand first"
NO_VIDEO = "<video> in a row without a video, which is a text"
LEFT_OUT = "an answer before the first question, left out"

INNER_FIX = 'name it under "image" or "video" of the row, or as a part of the content'


class Turns(NamedTuple):
    """What a form makes of a raw row."""

    turns: list  # as LLaVA has them
    media: Sequence[Medium] = ()  # those that stand among typed parts
    notes: Sequence[str] = ()
    answers: Sequence[str] = ()  # all that it has of one question, where it has a list of them


def first_of(values: dict, keys: Iterable[str]) -> Any:
    """Return what stands under the first of these keys that has a value; None if none has."""
    for key in keys:
        if not is_empty(values.get(key)):
            return values[key]
    return None


def other_keys(values: dict, read: Iterable[str], where: str) -> list[str]:
    """Return the keys that have a value and are not read. Raise UserError if it is a picture."""
    others = [key for key in values if key not in read and not is_empty(values[key])]
    check_unread(values, others, where, named=True, fix=INNER_FIX)
    return others


def text_of(value: Any, where: str) -> str:
    """Return a text, and a number as one. Raise UserError for anything else."""
    if isinstance(value, str):
        return value
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if is_whole or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    raise UserError(where, f"{printable(repr(value), 60)} is no text", "write a text")


# ------------------------------------------------------------------------------------ conversations


def turns_of_conversation(given: Any, where: str) -> Turns:
    """Return the turns of a list of {"from", "value"} or {"role", "content"}."""
    if not isinstance(given, list):
        return Turns(given)
    turns = []
    media = []
    for i, turn in enumerate(given):
        if isinstance(turn, dict):
            turn, found = read_turn(turn, f"{where}[{i}]")
            media += found
        turns.append(turn)
    return Turns(turns, media)


def read_turn(turn: dict, where: str) -> tuple[dict, list[Medium]]:
    """Return a turn as {"from", "value"}, and the pictures that stand among its parts."""
    speaker = first_of(turn, ("from", "role"))
    value = first_of(turn, ("value", "content"))
    others = other_keys(turn, TURN_KEYS, where)

    # An empty turn is one. A turn whose words have another name is none.
    if speaker is None or (value is None and others):
        has = printable(", ".join(sorted(turn)), 100)
        what = f"not a speaker and a text, it has {has}"
        raise UserError(where, what, f"write turns as {TURNS}")

    media = []
    if value is None:
        value = ""
    if isinstance(value, list):
        value, media = text_of_parts(value, where)
    if isinstance(speaker, str):
        speaker = SPEAKERS.get(speaker.strip().lower(), speaker)
    return {"from": speaker, "value": value}, media


def text_of_parts(parts: list, where: str) -> tuple[str, list[Medium]]:
    """Return typed parts as one text, a line for each, and the pictures that stand among them.

    A part {"type": "image"} without a file stands for the next picture of the row.
    """
    lines = []
    media = []
    for i, part in enumerate(parts):
        place = f"{where}: part {i}"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            what = f"{printable(repr(part), 60)} is no part"
            raise UserError(place, what, 'write {"type": "text", "text": ...}')

        kind = part["type"].removesuffix("_url")
        if kind == "text":
            names = ("text",)
        elif kind in MEDIA:
            names = (kind, f"{kind}_url", "url", "path", "bytes")
        else:
            what = f"a part of type {printable(part['type'], 60)!r}"
            raise UserError(place, what, "write text, image, image_url or video")

        found = first_of(part, names)
        others = other_keys(part, (*names, "type"), place)
        if found is None and others not in ([], ["index"]):
            what = f"no {kind}, it has {printable(', '.join(others), 100)}"
            raise UserError(place, what, f'write {{"type": "{kind}", "{kind}": ...}}')

        if kind in MEDIA:
            lines.append(IMAGE)
            if found is not None:
                media.append(read_medium(found, kind, place))
        elif found is not None:
            lines.append(text_of(found, place))
    return "\n".join(lines), media


# ---------------------------------------------------------------------------- questions and answers


def turns_of_texts(texts: Any, where: str) -> list[dict]:
    """Return the turns of [{"user": ..., "assistant": ...}, ...]."""
    turns = []
    for i, pair in enumerate(as_list(texts)):
        place = f"{where}[{i}]"
        if not isinstance(pair, dict) or any(is_empty(pair.get(key)) for key in PAIR):
            what = f"{printable(repr(pair), 60)} has no user and assistant"
            raise UserError(place, what, 'write {"user": ..., "assistant": ...}')
        other_keys(pair, PAIR, place)
        question = text_of(pair["user"], f"{place}.user")
        answer = text_of(pair["assistant"], f"{place}.assistant")
        turns += one_question(question, answer)
    return turns


def turns_of_answers(question: str, answers: list[str], is_caption: bool = False) -> Turns:
    """Return the turns of a question with its first caption, or its most frequent answer."""
    answer = answers[0]
    note = f"{len(answers)} captions, the first is trained"
    if not is_caption:
        answer = Counter(answers).most_common(1)[0][0]  # of equally frequent ones the first
        note = "several answers, the most frequent is trained"
    turns = one_question(question, answer)
    if len(set(answers)) == 1:
        return Turns(turns)
    return Turns(turns, notes=[note], answers=answers)


def one_question(question: str, answer: str) -> list[dict]:
    """Return the turns of one question and its answer."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def answers_of(value: Any, where: str) -> list[str]:
    """Return the answers to a question: of a text, or of a list of texts or {"answer": text}."""
    answers = []
    for one in as_list(value):
        if isinstance(one, dict):
            other_keys(one, ANSWER_KEYS, where)
            one = first_of(one, ANSWER_KEYS)
        if not is_empty(one):
            answers.append(text_of(one, where))
    if not answers:
        raise UserError(where, f"{printable(repr(value), 60)} has no answer", "write a text")
    return answers


def check_options(raw: dict, question: str, answer: Any, where: str):
    """Raise UserError if an answer is the number or letter of options that are not asked for."""
    for key, value in raw.items():
        if key.lower() not in OPTIONS or is_empty(value):
            continue
        options = as_list(value)
        is_short = isinstance(answer, str) and len(answer.strip(" .()")) == 1
        are_shown = all(str(option) in question for option in options)
        is_letter = is_short and answer not in options and not are_shown
        if is_letter or isinstance(answer, int):
            what = f"{answer!r} stands for one of {key}"
            raise UserError(where, what, "write the option's text, and all of them in the question")


# -------------------------------------------------------------------------------------------- marks


def agree(turns: Any, media: list[Medium]) -> tuple[Any, list[str]]:
    """Return turns that have a mark for each picture, if they had none, and notes on them.

    Turns that are none are left as they are: templates.encode says what is wrong with them.
    """
    if not isinstance(turns, list) or not all(is_turn(turn) for turn in turns):
        return turns, []

    notes = []
    if media and media[0].kind == "video":
        turns = read_video_marks(turns)
    if media and not has_mark(turns):
        turns = place_marks(turns, len(media))
        notes.append(MARKS_FIRST)
    if not media and any(VIDEO in turn["value"] for turn in turns):
        notes.append(NO_VIDEO)
    if begins_with_answer(turns):
        notes.append(LEFT_OUT)
    return turns, notes


def is_turn(turn: Any) -> bool:
    """Say whether a turn has a speaker and a text."""
    return isinstance(turn, dict) and isinstance(turn.get("value"), str)


def has_mark(turns: list[dict]) -> bool:
    """Say whether a turn says where a picture goes."""
    return any(IMAGE in turn["value"] for turn in turns)


def read_video_marks(turns: list[dict]) -> list[dict]:
    """Return the turns with <image> for <video>, unless they say <image> already."""
    if has_mark(turns):
        return turns
    return [{**turn, "value": turn["value"].replace(VIDEO, IMAGE)} for turn in turns]


def place_marks(turns: list[dict], count: int) -> list[dict]:
    """Return the turns with `count` marks before the first question."""
    placed = list(turns)
    for i, turn in enumerate(turns):
        if turn["from"] == "human":
            placed[i] = {**turn, "value": f"{IMAGE}\n" * count + turn["value"]}
            break
    return placed


def begins_with_answer(turns: list[dict]) -> bool:
    """Say whether an answer stands before the first question: training leaves it out."""
    speakers = [turn["from"] for turn in turns if turn["from"] != "system"]
    return speakers[:1] == ["gpt"] and "human" in speakers
