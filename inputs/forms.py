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

`read_row` is the whole way of a row. Below it: keys, pictures, and which turns (turns.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from config import UserError, printable
from inputs.conversation import EXAMPLE
from inputs.media import MEDIA, Medium, as_list, check_unread, is_empty, read_medium
from inputs.turns import (
    Turns,
    agree,
    answers_of,
    check_options,
    text_of,
    turns_of_answers,
    turns_of_conversation,
    turns_of_texts,
)

CAPTION_PROMPT = "Describe the image."

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

READ_AS = "read as "  # how the note on a row's form begins

ROW_FIX = (
    f'write a row as {EXAMPLE}, or map its keys with columns = {{question = "KEY", answer = "KEY"}}'
)


class Row(dict):
    """A LLaVA row {"id", "image" or "video", "conversations"}, and what is known of it besides.

    sources: of each picture or video its bytes, or None where its name leads to a file.
    notes: what was done to read it.
    keys_read: {part: key}, what was read, and under which key of the raw row it stood.
    unread: the other keys that have a value. They are in the row as well.
    """

    def __init__(
        self,
        values: dict,
        sources: Iterable[bytes | None] = (),
        notes: Iterable[str] = (),
        keys_read: dict[str, str] | None = None,
        unread: Iterable[str] = (),
    ):
        super().__init__(values)
        self.sources = list(sources)
        self.notes = tuple(notes)
        self.keys_read = keys_read or {}
        self.unread = tuple(unread)


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

    # What the form has read gives way to what it says; the rest of the raw row stays.
    read = [keys.get(part) for part in ("id", *MEDIA, *form)]
    row = {}
    unread = []
    for key, value in raw.items():
        if key in read:
            continue
        if not is_empty(value):
            unread.append(key)
        is_replaced = key in MEDIA or (key == "conversations" and key in unread)
        if not is_replaced:
            row[key] = value

    # A picture that nothing reads would be missing. If `columns` names some, no others are meant.
    # Those under two of its usual keys are the same (check_same).
    if not maps_media(columns):
        others = [key for key in unread if PART_OF.get(key.lower()) not in MEDIA]
        check_unread(raw, others, where, named=not media)

    if "id" in keys:
        row["id"] = raw[keys["id"]]
    names = [medium.name for medium in media]
    if len(names) == 1:
        row[media[0].kind] = names[0]
    elif names:
        row[media[0].kind] = names
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


def is_known(key: str) -> bool:
    """Say whether a key is one of KEYS."""
    return key.lower() in PART_OF


def has_form(keys: Iterable[str]) -> bool:
    """Say whether a row with these parts says something: whether it has one of FORMS."""
    return any(all(part in keys for part in form) for form in FORMS)


def find_keys(raw: dict, where: str, columns: dict[str, str]) -> dict[str, str]:
    """Return {part: key of the raw row} for the parts of KEYS that the row has a value of.

    Raise UserError if it has different pictures under several keys.
    """
    present: dict[str, list[str]] = {}
    for key, value in raw.items():
        part = PART_OF.get(key.lower())
        if part and not is_empty(value):
            present.setdefault(part, []).append(key)
    if maps_media(columns):
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


def maps_media(columns: dict[str, str]) -> bool:
    """Say whether `columns` names the pictures or the videos."""
    return any(part in columns for part in MEDIA)


def find_form(keys: dict[str, str], columns: dict[str, str], has_media: bool) -> tuple[str, ...]:
    """Return the entry of FORMS that a row with these parts has; () if none."""
    # If `columns` maps a part of a form, no other form is meant.
    mapped = [form for form in FORMS if any(part in columns for part in form)]
    for form in mapped or FORMS:
        has_all = all(part in keys for part in form)
        if has_all and (has_media or form != ("caption",)):
            return form
    return ()


def form_fix(row: Row) -> str:
    """Return what to do about a row of no form, by the parts of a form that it has."""
    if "question" in row.keys_read:
        return 'write its answer, or map it: columns = {answer = "KEY"}'
    if "answer" in row.keys_read:
        return 'write its question, or map it: columns = {question = "KEY"}'
    if "caption" in row.keys_read:
        return 'name its picture under "image", or map it: columns = {image = "KEY"}'
    return ROW_FIX


def check_same(raw: dict, keys: list[str], part: str, where: str):
    """Raise UserError if a row has different pictures under several keys."""
    first = as_list(raw[keys[0]])
    if any(as_list(raw[key]) != first for key in keys):
        named = " and ".join(repr(key) for key in keys)
        fix = f'name the key to read: columns = {{{part} = "{keys[0]}"}}'
        raise UserError(where, f"pictures under {named}, and not the same ones", fix)


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
        fix = f"name a key of the rows: {names_of_keys(rows)}"
        raise UserError(f"{rows.file}: columns.{part}", what, fix)


def names_of_keys(rows: Any) -> str:
    """Return the keys that the first rows have, for a message."""
    names: dict[str, None] = {}
    for i in range(min(len(rows), 20)):
        with suppress(UserError):
            row = rows[i]
            names.update(dict.fromkeys(row.unread))
            names.update(dict.fromkeys(row.keys_read.values()))
    return printable(", ".join(names), 300)


def columns_of(words: list[str]) -> dict[str, str]:
    """Return what --columns maps, {part: column}. Raise UserError for a word that maps nothing."""
    columns = {}
    for word in words:
        part, equals, column = word.partition("=")
        if not equals or part not in KEYS or not column:
            what = f"{printable(word, 60)!r} maps no column"
            parts = ", ".join(KEYS)
            fix = f"write part=column, as image=photo; a part is one of {parts}"
            raise UserError("--columns", what, fix)
        columns[part] = column
    return columns


# -------------------------------------------------------------------------- values of a raw row


def media_of_keys(raw: dict, keys: dict[str, str], where: str) -> list[Medium]:
    """Return the pictures and videos under the row's own keys."""
    media = []
    for kind in MEDIA:
        if kind not in keys:
            continue
        key = keys[kind]
        for value in as_list(raw[key]):
            if not is_empty(value):
                media.append(read_medium(value, kind, f"{where}: {key}"))
    return media


def join_media(
    media: list[Medium], in_parts: Sequence[Medium], keys: dict[str, str], where: str
) -> list[Medium]:
    """Return a row's pictures or videos, which stand under its keys or among parts of turns.

    Raise UserError if they stand in both places and are not the same, and for two kinds.
    """
    if media and in_parts and media != in_parts:
        what = f"pictures among the parts of a turn, and others under {keys[media[0].kind]!r}"
        raise UserError(where, what, "leave one of the two out")
    if not media:
        media = list(in_parts)
    if len({medium.kind for medium in media}) > 1:
        raise UserError(where, "an image and a video in one row", "make two rows of it")
    return media


def read_turns(raw: dict, keys: dict[str, str], form: tuple[str, ...], where: str) -> Turns:
    """Return the turns of a raw row of this form. Raise UserError."""
    # A row of no known form has no turns: making a sample of it says so (sample.encode_text).
    if not form:
        return Turns([])

    # The part that a form has alone, or its last one: the answer.
    key = keys[form[-1]]
    value = raw[key]
    place = f"{where}: {key}"
    if form == ("conversations",):
        return turns_of_conversation(value, place)
    if form == ("texts",):
        return Turns(turns_of_texts(value, place))
    if form == ("caption",):
        return turns_of_answers(CAPTION_PROMPT, answers_of(value, place), is_caption=True)

    question_key = keys["question"]
    question = text_of(raw[question_key], f"{where}: {question_key}")
    check_options(raw, question, value, place)
    return turns_of_answers(question, answers_of(value, place))
