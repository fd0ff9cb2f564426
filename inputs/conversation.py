"""Conversations as LLaVA's rows have them: checked, and brought into the order that is written.

    conversation  [{"from": "human", "value": "Who? <image>"}, {"from": "gpt", "value": "A dog."}]
    turns         [Turn("human", "<image>\\nWho?"), Turn("gpt", "A dog.")]

    check_turns(conversation, prompt=False)             # UserError unless it is a list of turns
    turns = arrange_turns(conversation, prompt=False)   # they alternate, images in their places

A template (templates.py, chat_template.py) writes the turns out as one text, which is a `Rendered`.
A mistake in a row is a UserError "conversations[i]: <what>; fix: <action>", and the caller puts
file and row before it.
"""

from __future__ import annotations

from typing import NamedTuple

from config import UserError
from inputs.tokenizer import Mark

IMAGE = "<image>"

SPEAKERS = ("human", "gpt", "system")

# What messages show of the form of a row.
TURNS = '{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}'
EXAMPLE = f'{{"image": "a.jpg", "conversations": [{TURNS}]}}'


class Turn(NamedTuple):
    """One turn of a conversation."""

    speaker: str  # "human", "gpt" or, as the first, "system"
    value: str | None  # None: the answer that a prompt asks for


class Span(NamedTuple):
    """The characters text[start:end]."""

    start: int
    end: int


class Rendered(NamedTuple):
    """A conversation as one text, and what is known of places in it."""

    text: str
    answers: list[Span]  # what is supervised: each answer, its end token included
    marks: list[Mark]  # what is structure: images and control tokens, in order


def check_turns(conversation: list, prompt: bool):
    """Raise UserError unless the conversation is a list of turns with texts."""
    if not isinstance(conversation, list) or not conversation:
        raise UserError("conversations", "empty, or not a list", "give a human turn and a gpt turn")

    for i, turn in enumerate(conversation):
        where = f"conversations[{i}]"
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            what = 'not {"from": ..., "value": ...}'
            fix = "write the turn so"
            if isinstance(turn, dict) and "role" in turn:
                what = f'it has "role" and "content", {what}'
                fix = f"write turns as {TURNS}"
            raise UserError(where, what, fix)

        # A prompt may say that an answer is to come: a last turn of the model without a text.
        is_last = i == len(conversation) - 1
        is_open = prompt and is_last and turn["from"] == "gpt" and turn["value"] is None
        if not isinstance(turn["value"], str) and not is_open:
            kind = type(turn["value"]).__name__
            raise UserError(where, f"its value is {kind}, not text", "make it a string")


def arrange_turns(conversation: list, prompt: bool) -> list[Turn]:
    """Return the turns that are written, with images in their places.

    A leading "system" turn stays, human and gpt alternate behind it. Raise UserError unless they
    do, or if nothing would be supervised.
    """
    turns = [Turn(turn["from"], turn["value"]) for turn in conversation]
    arranged = []

    # `first` is the first question. As in TinyLLaVA, an answer before it is left out: ShareGPT's
    # rows have them.
    first = 0
    if turns[0].speaker == "system":
        arranged.append(turns[0])
        first = 1
    if first < len(turns) and turns[first].speaker == "gpt":
        first += 1

    due = "human"
    for i in range(first, len(turns)):
        speaker, value = turns[i]
        if speaker != due:
            what = f"from {speaker!r}, {due!r} was due"
            fix = "alternate the two"
            if speaker not in SPEAKERS:
                fix = f"write turns as {TURNS}"
            raise UserError(f"conversations[{i}]", what, fix)
        if speaker == "human":
            arranged.append(Turn(speaker, image_to_front(value)))
            due = "gpt"
        else:
            if value is not None:
                arranged.append(turns[i])
            due = "human"

    # A prompt ends with a question, or with an answer that is still to come.
    waits = turns[-1].speaker == "human" or turns[-1].value is None
    where = f"conversations[{len(turns) - 1}]"
    has_no_question = first == len(turns)
    if has_no_question and turns[-1].speaker == "gpt" and not prompt:
        what = "an answer without a question, no human turn is before it"
        raise UserError(where, what, "write the question as a human turn before it")
    if has_no_question or waits != prompt:
        last = "a human turn" if prompt else "a gpt turn"
        raise UserError(where, "wrong last turn", f"end with {last}")

    has_answer = any(turn.speaker == "gpt" and turn.value.strip() for turn in arranged)
    if not prompt and not has_answer:
        what = "nothing is supervised, every answer is empty"
        raise UserError("conversations", what, "remove the row")
    return arranged


def image_to_front(value: str) -> str:
    """Return what a human says with a single image moved to its front, as TinyLLaVA does.

    Several images stay where they are.
    """
    count = value.count(IMAGE)
    if count == 0:
        return value
    if count == 1:
        words = value.replace(IMAGE, "").strip()
        value = f"{IMAGE}\n{words}"
    return value.strip()
