"""The forms in which people keep rows, each read as the LLaVA row that training takes.

    row = read_row({"messages": [{"role": "user", "content": "<image>Who?"}, ...],
                    "images": ["a.jpg"]}, where="rows.jsonl:line 1")
    row         {"image": ["a.jpg"], "conversations": [{"from": "human", "value": "<image>Who?"},
                ...]}
    row.notes   ("read as messages",): what was done, which `data.py check` counts

A raw row is what a file holds: an object of JSON, a line of a table, a row of a parquet file. Its
form is recognised by its keys, the first of these that has a value:

    conversations   turns {"from", "value"} or {"role", "content"}, under conversations,
                    conversation or messages; content is text, or typed parts
    texts           [{"user": ..., "assistant": ...}, ...], as The Cauldron and FineVision have them
    question        question and answer or answers
    caption         a picture with its caption or text: CAPTION_PROMPT asks for it

Pictures stand under image, images, video, videos or another name of KEYS: a file's name, a data:
URL, bytes, {"bytes", "path"}, or a list of these. `columns` maps what has other names.

null, an empty text, an empty list and a missing key are the same. Pictures and <image> marks must
agree. A row without any mark shows its pictures first, in order, once: that is a note. Anything
else is an error, as is a row of no known form: its message names the keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from config import UserError, printable
from inputs.conversation import EXAMPLE, IMAGE

CAPTION_PROMPT = "Describe the image."
VIDEO = "<video>"  # how some projects mark the place of a video

# The names under which a raw row may have each part, the first choice first. Large and small
# letters are the same.
KEYS = {
    "id": ["id"],
    "image": (
        "image images img imgs picture pictures image_path image_paths image_file file_name"
        " image_url image_urls"
    ).split(),
    "video": "video videos video_path video_paths video_file video_url video_urls".split(),
    "conversations": ["conversations", "conversation", "messages"],
    "texts": ["texts"],
    "question": ["question"],
    "answer": ["answer", "answers"],
    "caption": ["caption", "text"],
}

SPEAKERS = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "system": "system",
}

MARKS_FIRST = "no <image> mark, pictures stand first"

FIX = f"write a row as {EXAMPLE}, or map its keys with columns"


class Row(dict):
    """A LLaVA row {"id", "image" or "video", "conversations"}, and what is known of it besides.

    sources: of each picture or video its bytes, or None where its name leads to a file.
    notes: what was done to read it.
    """

    def __init__(
        self, values: dict, sources: Iterable[bytes | None] = (), notes: Iterable[str] = ()
    ):
        super().__init__(values)
        self.sources = list(sources)
        self.notes = tuple(notes)


class Medium(NamedTuple):
    """A picture or video of a raw row."""

    kind: str  # "image" or "video"
    name: str
    content: bytes | None  # None: it is the file of that name


class Turns(NamedTuple):
    """What a form makes of a raw row."""

    turns: list  # as LLaVA has them
    media: list[Medium]  # those that stand among typed parts
    note: str  # how they were read; "" for LLaVA's own form


def read_row(raw: dict, where: str, columns: dict[str, str] | None = None) -> Row:
    """Return a raw row as a LLaVA row. Raise UserError at `where` if it cannot be one.

    columns: {part: key}, for parts of KEYS that have another key in this row.
    """
    keys = find_keys(raw, where, columns or {})
    media = media_of_keys(raw, keys, where)
    turns, in_parts, note = read_turns(raw, keys, media, where)
    notes = [note] if note else []

    # Pictures come from one place.
    if media and in_parts:
        what = f"pictures among the parts of a turn, and more under {keys[media[0].kind]!r}"
        raise UserError(where, what, "leave one of the two out")
    media = media or in_parts
    kinds = {medium.kind for medium in media}
    if len(kinds) > 1:
        raise UserError(where, "an image and a video in one row", "make two rows of it")

    # Turns that are none are left as they are: templates.encode says what is wrong with them.
    if media and isinstance(turns, list) and turns and all(is_turn(turn) for turn in turns):
        if "conversations" in keys and not has_mark(turns):
            notes.append(MARKS_FIRST)
        turns = place_marks(turns, len(media))

    # What the form has read gives way to what it says; the rest of the row stays.
    row = {key: value for key, value in raw.items() if key not in keys.values()}
    if "id" in keys:
        row["id"] = raw[keys["id"]]
    if "answer" in keys and isinstance(raw[keys["answer"]], list):
        row["answers"] = raw[keys["answer"]]  # all are right, which evaluation looks at
    if media:
        names = [medium.name for medium in media]
        row[media[0].kind] = names[0] if len(names) == 1 else names
    if turns or "conversations" in raw:
        row["conversations"] = turns
    return Row(row, [medium.content for medium in media], notes)


# ----------------------------------------------------------------------------------------- keys


def is_empty(value: Any) -> bool:
    """Say whether a value stands for nothing: null, "", [] or {}."""
    return value is None or value in ("", [], {})


def find_keys(raw: dict, where: str, columns: dict[str, str]) -> dict[str, str]:
    """Return {part: key of the raw row} for the parts of KEYS that the row has a value of."""
    by_name: dict[str, list[str]] = {}
    for key, value in raw.items():
        if not is_empty(value):
            by_name.setdefault(key.lower(), []).append(key)

    found = {}
    for part, names in KEYS.items():
        if part in columns:
            # A row may lack it, as it may lack a picture.
            if not is_empty(raw.get(columns[part])):
                found[part] = columns[part]
            continue
        present = [key for name in names for key in by_name.get(name, [])]
        if len(present) > 1 and part in ("image", "video"):
            check_same(raw, present, where)
        if present:
            found[part] = present[0]
    return found


def check_same(raw: dict, keys: list[str], where: str):
    """Raise UserError if a row has different pictures under several keys."""
    listed = []
    for key in keys:
        value = raw[key]
        listed.append(value if isinstance(value, list) else [value])
    if any(value != listed[0] for value in listed[1:]):
        named = " and ".join(repr(key) for key in keys)
        what = f"pictures under {named}, and not the same ones"
        raise UserError(
            where, what, 'leave one out, or name the one to read: columns = {image = "..."}'
        )


# ---------------------------------------------------------------------------- pictures and videos


def media_of_keys(raw: dict, keys: dict[str, str], where: str) -> list[Medium]:
    """Return the pictures and videos under the row's own keys."""
    media = []
    for kind in ("image", "video"):
        if kind in keys:
            key = keys[kind]
            values = raw[key] if isinstance(raw[key], list) else [raw[key]]
            for value in values:
                media.append(read_medium(value, kind, f"{where}: {key}"))
    return media


def read_medium(value: Any, kind: str, where: str) -> Medium:
    """Return a picture or video from what stands for it: a name, bytes, or an object of these.

    Raise UserError at `where` if it is nothing of the kind.
    """
    if isinstance(value, str) and value:
        return Medium(kind, value, None)
    if isinstance(value, bytes) and value:
        return Medium(kind, kind, value)
    if isinstance(value, dict):
        name = value.get("path") or value.get("url") or value.get("file_name") or ""
        content = value.get("bytes")
        if isinstance(name, str) and isinstance(content, bytes) and content:
            return Medium(kind, name or kind, content)
        if isinstance(name, str) and name and content is None:
            return Medium(kind, name, None)
    what = f"{printable(repr(value), 60)} is no {kind}"
    raise UserError(where, what, "write a file name, or a list of file names")


# ---------------------------------------------------------------------------------------- turns


def read_turns(raw: dict, keys: dict[str, str], media: list[Medium], where: str) -> Turns:
    """Return the turns of a raw row, of the first form that it has. Raise UserError."""
    if "conversations" in keys:
        return turns_of_conversation(raw, keys["conversations"], where)

    if "texts" in keys:
        key = keys["texts"]
        return Turns(turns_of_texts(raw[key], f"{where}: {key}"), [], f"read as {key}")

    if "question" in keys and "answer" in keys:
        question = text_of(raw[keys["question"]], f"{where}: {keys['question']}")
        answer = answer_of(raw[keys["answer"]], f"{where}: {keys['answer']}")
        note = f"read as {keys['question']} and {keys['answer']}"
        return Turns(one_question(question, answer), [], note)

    if "caption" in keys and media:
        key = keys["caption"]
        caption = answer_of(raw[key], f"{where}: {key}")
        return Turns(one_question(CAPTION_PROMPT, caption), [], f"read as a picture and its {key}")

    # It has none: making a sample of it says so (sample.encode_text).
    given = []
    if "conversations" in raw:
        given = raw["conversations"]
    return Turns(given, [], "")


def turns_of_conversation(raw: dict, key: str, where: str) -> Turns:
    """Return the turns of a list of {"from", "value"} or {"role", "content"}."""
    given = raw[key]
    if not isinstance(given, list):
        return Turns(given, [], "")

    turns = []
    media = []
    for i, turn in enumerate(given):
        place = f"{where}: {key}[{i}]"
        if not isinstance(turn, dict):
            turns.append(turn)
            continue
        speaker = turn.get("from", turn.get("role"))
        value = turn.get("value", turn.get("content"))
        if isinstance(value, list):
            value, found = text_of_parts(value, place)
            media.extend(found)
        if isinstance(speaker, str):
            speaker = SPEAKERS.get(speaker.strip().lower(), speaker)
        if isinstance(value, str):
            value = value.replace(VIDEO, IMAGE)
        turns.append({"from": speaker, "value": value})

    note = ""
    if key != "conversations" or turns != given:
        note = f"read as {key}"
    return Turns(turns, media, note)


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
            lines.append(text_of(part.get("text"), place))
        elif kind in ("image", "video"):
            lines.append(IMAGE)
            source = part.get(part["type"])
            for other in (kind, "url", "path"):
                if is_empty(source):
                    source = part.get(other)
            if not is_empty(source):
                media.append(read_medium(source, kind, place))
        else:
            what = f"a part of type {printable(part['type'], 60)!r}"
            raise UserError(place, what, "write text, image, image_url or video")
    return "\n".join(lines), media


def turns_of_texts(texts: Any, where: str) -> list[dict]:
    """Return the turns of [{"user": ..., "assistant": ...}, ...]."""
    if isinstance(texts, dict):
        texts = [texts]
    turns = []
    for i, pair in enumerate(texts if isinstance(texts, list) else [texts]):
        place = f"{where}[{i}]"
        if not isinstance(pair, dict) or "user" not in pair or "assistant" not in pair:
            what = f"{printable(repr(pair), 60)} has no user and assistant"
            raise UserError(place, what, 'write {"user": ..., "assistant": ...}')
        turns += one_question(text_of(pair["user"], place), text_of(pair["assistant"], place))
    return turns


def one_question(question: str, answer: str) -> list[dict]:
    """Return the turns of one question and its answer."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def text_of(value: Any, where: str) -> str:
    """Return a text; a number as a text, and nothing as an empty one. Raise UserError."""
    if is_empty(value):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise UserError(where, f"{printable(repr(value), 60)} is no text", "write a text")


def answer_of(value: Any, where: str) -> str:
    """Return the answer to train; of several the most frequent, and of these the first."""
    return Counter(answers_of(value, where)).most_common(1)[0][0]


def answers_of(value: Any, where: str) -> list[str]:
    """Return the texts of an answer, or of several. Raise UserError if they are none."""
    values = value if isinstance(value, list) else [value]
    answers = []
    for one in values:
        if isinstance(one, dict):
            one = one.get("answer", one.get("text"))
        answers.append(text_of(one, where))
    return answers


# ---------------------------------------------------------------------------------------- marks


def is_turn(turn: Any) -> bool:
    """Say whether a turn has a speaker and a text."""
    return isinstance(turn, dict) and isinstance(turn.get("value"), str) and "from" in turn


def has_mark(turns: list[dict]) -> bool:
    """Say whether a human says where a picture goes."""
    return any(turn["from"] == "human" and IMAGE in turn["value"] for turn in turns)


def place_marks(turns: list[dict], count: int) -> list[dict]:
    """Return the turns with `count` marks before the first question, if there are none at all."""
    if has_mark(turns):
        return turns
    placed = list(turns)
    for i, turn in enumerate(turns):
        if turn["from"] == "human":
            placed[i] = {**turn, "value": f"{IMAGE}\n" * count + turn["value"]}
            break
    return placed
