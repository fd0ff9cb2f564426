"""The forms in which people keep rows, each read as the LLaVA row that training takes.

    row = read_row({"messages": [{"role": "user", "content": "<image>Who?"}, ...],
                    "images": ["a.jpg"]}, where="rows.jsonl:line 1")
    row         {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>Who?"},
                ...]}
    row.notes   ("read as conversations = messages, image = images",): `data.py check` counts them

A raw row is what a file holds: an object of JSON, a line of a table, a row of a parquet file. Its
form is recognised by its keys, the first of these that has a value:

    conversations   turns {"from", "value"} or {"role", "content"}, under conversations,
                    conversation or messages; content is text, or typed parts
    texts           [{"user": ..., "assistant": ...}, ...], as The Cauldron and FineVision have them
    question        question and answer; of several answers the most frequent one is trained
    caption         a picture with its caption or text, of several the first: CAPTION_PROMPT asks

Pictures stand under image, images, video, videos or another name of KEYS: a file's name, a data:
URL, bytes, {"bytes", "path"}, or a list of these. `columns` maps what has other names. If it maps
the turns or the pictures, they are looked for nowhere else.

null, an empty text, an empty list and a missing key are the same. Pictures and <image> marks must
agree. A row without any mark shows its pictures first, in order, once: that is a note. Anything
else is an error, as is a row of no known form, and a row that has a picture where nothing reads it.

`read_row` is the whole way of a row. Below it: keys, pictures, turns of each form, marks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from config import UserError, printable
from inputs.conversation import EXAMPLE, IMAGE, TURNS
from inputs.media import Medium, is_empty, picture_in, read_medium

CAPTION_PROMPT = "Describe the image."
VIDEO = "<video>"  # how some projects mark the place of a video

# The names under which a raw row may have each part, the first choice first. Large and small
# letters are the same.
KEYS = {
    "id": ["id"],
    "image": (
        "image images img imgs picture pictures image_path image_paths image_file file_name"
        " file_names image_url image_urls"
    ).split(),
    "video": "video videos video_path video_paths video_file video_url video_urls".split(),
    "conversations": ["conversations", "conversation", "messages"],
    "texts": ["texts"],
    "question": ["question"],
    "answer": ["answer", "answers"],
    "caption": ["caption", "text"],
}
PART_OF = {name: part for part, names in KEYS.items() for name in names}

# The parts of each form, in the order in which they are looked for.
FORMS = (("conversations",), ("texts",), ("question", "answer"), ("caption",))
MEDIA = ("image", "video")

TURN_KEYS = ("from", "role", "value", "content")
PAIR = ("user", "assistant")
ANSWER_KEYS = ("answer", "text")

# Keys beside a question that hold what its answer may be.
OPTIONS = ("options", "choices")

SPEAKERS = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "system": "system",
}

# Notes on rows.
READ_AS = "read as "  # followed by the parts
MARKS_FIRST = "no <image> mark, pictures stand first"
NO_VIDEO = "<video> in a row without a video, which is a text"
LEFT_OUT = "an answer before the first question, left out"

ROW_FIX = f"write a row as {EXAMPLE}, or map its keys with columns"
INNER_FIX = 'name it under "image" or "video" of the row, or as a part of the content'


class Row(dict):
    """A LLaVA row {"id", "image" or "video", "conversations"}, and what is known of it besides.

    sources: of each picture or video its bytes, or None where its name leads to a file.
    notes: what was done to read it.
    keys: {part: key}, what was read, and under which key of the raw row it stood.
    unread: the other keys that have a value. They are in the row as well.
    """

    def __init__(
        self,
        values: dict,
        sources: Iterable[bytes | None] = (),
        notes: Iterable[str] = (),
        keys: dict[str, str] | None = None,
        unread: Iterable[str] = (),
    ):
        super().__init__(values)
        self.sources = list(sources)
        self.notes = tuple(notes)
        self.keys_read = keys or {}
        self.unread = tuple(unread)


class Turns(NamedTuple):
    """What a form makes of a raw row."""

    turns: list  # as LLaVA has them
    media: list[Medium]  # those that stand among typed parts
    notes: list[str]
    answers: list[str]  # all that it has of one question, where it has a list of them


def read_row(raw: dict, where: str, columns: dict[str, str] | None = None) -> Row:
    """Return a raw row as a LLaVA row. Raise UserError at `where` if it cannot be one.

    columns: {part: key}, for parts of KEYS that have another key in this row.
    """
    columns = columns or {}
    keys = find_keys(raw, where, columns)
    media = media_of_keys(raw, keys, where)
    form = find_form(keys, columns, has_media=bool(media))
    turns, in_parts, notes, answers = read_turns(raw, keys, form, where)
    media = join_media(media, in_parts, keys, where)
    turns, marked = agree(turns, media)

    # A picture that nothing reads would be missing. If `columns` names some, no others are meant.
    read = [keys[part] for part in ("id", *MEDIA, *form) if part in keys]
    unread = [key for key in raw if key not in read and not is_empty(raw[key])]
    if not any(part in columns for part in MEDIA):
        check_unread(raw, unread, where, named=not media)

    # What the form has read gives way to what it says; the rest of the raw row stays.
    row = {key: raw[key] for key in raw if key not in read and key not in MEDIA}
    if "conversations" in unread:
        del row["conversations"]  # `columns` names other turns
    if "id" in keys:
        row["id"] = raw[keys["id"]]
    if media:
        names = [medium.name for medium in media]
        row[media[0].kind] = names[0] if len(names) == 1 else names
    if form:
        row["conversations"] = turns
        notes = [read_as(keys, form), *notes]
        if form == ("conversations",):
            notes += marked
    if answers:
        row["answers"] = answers
    return Row(row, [medium.content for medium in media], notes, keys, unread)


def read_as(keys: dict[str, str], form: tuple[str, ...]) -> str:
    """Return the note that says how a row was read, with the keys that are not LLaVA's own."""
    said = []
    for part in (*form, *MEDIA):
        key = keys.get(part, part)
        if key != part:
            said.append(f"{part} = {printable(key, 60)}")
        elif part in form:
            said.append(part)
    return READ_AS + ", ".join(said)


# ----------------------------------------------------------------------------------------- keys


def find_keys(raw: dict, where: str, columns: dict[str, str]) -> dict[str, str]:
    """Return {part: key of the raw row} for the parts of KEYS that the row has a value of.

    Raise UserError if it has different pictures under several keys.
    """
    present: dict[str, list[str]] = {}
    for key, value in raw.items():
        part = PART_OF.get(key.lower())
        if part and not is_empty(value):
            present.setdefault(part, []).append(key)
    if any(part in columns for part in MEDIA):
        for part in MEDIA:
            present.pop(part, None)

    keys = {}
    for part, found in present.items():
        found.sort(key=lambda key: KEYS[part].index(key.lower()))
        keys[part] = found[0]
        if part in MEDIA:
            check_same(raw, found, part, where)

    # A row may lack what is mapped, as it may lack a picture.
    for part, key in columns.items():
        keys.pop(part, None)
        if not is_empty(raw.get(key)):
            keys[part] = key
    return keys


def find_form(keys: dict[str, str], columns: dict[str, str], has_media: bool) -> tuple[str, ...]:
    """Return the entry of FORMS that a row with these parts has; () if none."""
    forms = [form for form in FORMS if any(part in columns for part in form)] or FORMS
    for form in forms:
        has_all = all(part in keys for part in form)
        if has_all and (has_media or form != ("caption",)):
            return form
    return ()


def check_same(raw: dict, keys: list[str], part: str, where: str):
    """Raise UserError if a row has different pictures under several keys."""
    listed = [as_list(raw[key]) for key in keys]
    if any(value != listed[0] for value in listed[1:]):
        named = " and ".join(repr(key) for key in keys)
        fix = f'name the key to read: columns = {{{part} = "{keys[0]}"}}'
        raise UserError(where, f"pictures under {named}, and not the same ones", fix)


def check_unread(values: dict, keys: list[str], where: str, named: bool, fix: str = ""):
    """Raise UserError if one of these keys, which nothing reads, plainly holds a picture or video.

    named: a text that ends as the name of such a file is one.
    """
    for key in keys:
        kind = picture_in(values[key], named)
        if kind:
            key = printable(key, 60)
            fix = fix or f'name the key of the {kind}s: columns = {{{kind} = "{key}"}}'
            raise UserError(where, f"nothing reads the {kind} under {key!r}", fix)


def check_columns(rows: Any, columns: dict[str, str]):
    """Raise UserError for columns that name no part or no key, and for a key that no row has.

    Mostly the first row has all of them, and no other is read.
    """
    for part, key in columns.items():
        where = f"{rows.file}: columns.{part}"
        if part not in KEYS:
            raise UserError(where, "unknown part", f"one of: {', '.join(KEYS)}")
        if not isinstance(key, str) or not key:
            raise UserError(where, f"{key!r} is no key", 'write it in quotes: image = "photo"')

    missing = dict(columns)
    for i in range(len(rows)):
        if not missing:
            return
        with suppress(UserError):
            for part in rows[i].keys_read:
                missing.pop(part, None)
    for part, key in missing.items():
        what = f"no row that can be read has anything under {key!r}"
        raise UserError(f"{rows.file}: columns.{part}", what, "name a key of the rows")


# -------------------------------------------------------------------------- values of a raw row


def as_list(value: Any) -> list:
    """Return a list as it is, and anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def first_of(values: dict, keys: Iterable[str]) -> Any:
    """Return what stands under the first of these keys that has a value; None if none has."""
    for key in keys:
        if not is_empty(values.get(key)):
            return values[key]
    return None


def text_of(value: Any, where: str) -> str:
    """Return a text, and a number as one. Raise UserError for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise UserError(where, f"{printable(repr(value), 60)} is no text", "write a text")


def media_of_keys(raw: dict, keys: dict[str, str], where: str) -> list[Medium]:
    """Return the pictures and videos under the row's own keys."""
    media = []
    for kind in MEDIA:
        if kind in keys:
            key = keys[kind]
            for value in as_list(raw[key]):
                if not is_empty(value):
                    media.append(read_medium(value, kind, f"{where}: {key}"))
    return media


def join_media(
    media: list[Medium], in_parts: list[Medium], keys: dict[str, str], where: str
) -> list[Medium]:
    """Return a row's pictures or videos, which stand under its keys or among parts of turns.

    Raise UserError if they stand in both places and are not the same, and for two kinds.
    """
    if media and in_parts and media != in_parts:
        what = f"pictures among the parts of a turn, and others under {keys[media[0].kind]!r}"
        raise UserError(where, what, "leave one of the two out")
    media = media or in_parts
    if len({medium.kind for medium in media}) > 1:
        raise UserError(where, "an image and a video in one row", "make two rows of it")
    return media


# ---------------------------------------------------------------------------------------- turns


def read_turns(raw: dict, keys: dict[str, str], form: tuple[str, ...], where: str) -> Turns:
    """Return the turns of a raw row of this form. Raise UserError."""
    # A row of no known form has no turns: making a sample of it says so (sample.encode_text).
    if not form:
        return Turns([], [], [], [])

    values = [raw[keys[part]] for part in form]
    places = [f"{where}: {keys[part]}" for part in form]
    if form == ("conversations",):
        return turns_of_conversation(values[0], places[0])
    if form == ("texts",):
        return Turns(turns_of_texts(values[0], places[0]), [], [], [])
    if form == ("caption",):
        return turns_of_answers(CAPTION_PROMPT, answers_of(values[0], places[0]), is_caption=True)

    question = text_of(values[0], places[0])
    check_options(raw, question, values[1], places[1])
    return turns_of_answers(question, answers_of(values[1], places[1]))


def one_question(question: str, answer: str) -> list[dict]:
    """Return the turns of one question and its answer."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def turns_of_answers(question: str, answers: list[str], is_caption: bool = False) -> Turns:
    """Return the turns of a question with its first caption, or its most frequent answer."""
    answer = answers[0]
    note = f"{len(answers)} captions, the first is trained"
    if not is_caption:
        answer = Counter(answers).most_common(1)[0][0]  # of equally frequent ones the first
        note = "several answers, the most frequent is trained"
    turns = one_question(question, answer)
    if len(set(answers)) == 1:
        return Turns(turns, [], [], [])
    return Turns(turns, [], [note], answers)


def answers_of(value: Any, where: str) -> list[str]:
    """Return the answers to a question: of a text, or of a list of texts or {"answer": text}."""
    answers = []
    for one in as_list(value):
        if isinstance(one, dict):
            others = [key for key in one if key not in ANSWER_KEYS]
            check_unread(one, others, where, named=True, fix=INNER_FIX)
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


def turns_of_texts(texts: Any, where: str) -> list[dict]:
    """Return the turns of [{"user": ..., "assistant": ...}, ...]."""
    turns = []
    for i, pair in enumerate(as_list(texts)):
        place = f"{where}[{i}]"
        if not isinstance(pair, dict) or any(is_empty(pair.get(key)) for key in PAIR):
            what = f"{printable(repr(pair), 60)} has no user and assistant"
            raise UserError(place, what, 'write {"user": ..., "assistant": ...}')
        others = [key for key in pair if key not in PAIR]
        check_unread(pair, others, place, named=True, fix=INNER_FIX)
        question, answer = (text_of(pair[key], f"{place}.{key}") for key in PAIR)
        turns += one_question(question, answer)
    return turns


def turns_of_conversation(given: Any, where: str) -> Turns:
    """Return the turns of a list of {"from", "value"} or {"role", "content"}."""
    if not isinstance(given, list):
        return Turns(given, [], [], [])
    turns = []
    media = []
    for i, turn in enumerate(given):
        if isinstance(turn, dict):
            turn, found = read_turn(turn, f"{where}[{i}]")
            media += found
        turns.append(turn)
    return Turns(turns, media, [], [])


def read_turn(turn: dict, where: str) -> tuple[dict, list[Medium]]:
    """Return a turn as {"from", "value"}, and the pictures that stand among its parts."""
    speaker = first_of(turn, ("from", "role"))
    value = first_of(turn, ("value", "content"))
    others = [key for key in turn if key not in TURN_KEYS and not is_empty(turn[key])]
    check_unread(turn, others, where, named=True, fix=INNER_FIX)

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
        others = [key for key in part if key not in (*names, "type") and not is_empty(part[key])]
        check_unread(part, others, place, named=True, fix=INNER_FIX)
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


# ---------------------------------------------------------------------------------------- marks


def is_turn(turn: Any) -> bool:
    """Say whether a turn has a speaker and a text."""
    return isinstance(turn, dict) and isinstance(turn.get("value"), str)


def has_mark(turns: list[dict]) -> bool:
    """Say whether a turn says where a picture goes."""
    return any(IMAGE in turn["value"] for turn in turns)


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


def begins_with_answer(turns: list[dict]) -> bool:
    """Say whether an answer stands before the first question: training leaves it out."""
    speakers = [turn["from"] for turn in turns if turn["from"] != "system"]
    return speakers[:1] == ["gpt"] and "human" in speakers


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
