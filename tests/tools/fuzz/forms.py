"""Fuzz raw rows of every form: each is read as it says, or refused with a line that names it.

    python -m tests.tools.fuzz.forms --count 500 --seed 0

A case is ten rows of a form, each with a few changes: values replaced, removed, doubled, nested or
exchanged, keys of another name. They stand in a JSON list, in JSON lines, or, with bytes as
pictures, in parquet files or as values of Python.

The fuzzer finds the pictures and videos that a row has, wherever they stand. A row that is accepted
must have made an item of each: none may be missing in silence. A row that is refused has its file,
its number and a key in the message.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import random
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from config import UserError
from inputs.forms import KEYS, Row, read_row
from inputs.media import Media, media_of_row
from inputs.rows import open_rows
from tests.tools.fuzz import ODD, Case, Violation, main, mutate, places
from tests.tools.sample_rows import make_sample, mean_colour_spec, turns

NAMES = ("a.png", "b.png", "a.mp4")  # files that rows name

# Keys that another key becomes. "id" is none: names of files are often the ids of rows.
OTHER_KEYS = (*KEYS, "images", "photo", "messages", "text", "role", "content", "width", "IMAGE")


@cache
def picture(name: str) -> bytes:
    """Return a picture file of this name."""
    file = io.BytesIO()
    colour = (10, 20, 30) if name == "a.png" else (40, 50, 60)
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def part(kind: str, value: Any) -> dict:
    """Return a typed part of a message's content."""
    return {"type": kind, kind: value}


def messages(question: Any, answer: Any) -> list[dict]:
    """Return messages of one question."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


URL = f"data:image/png;base64,{base64.b64encode(picture('a.png')).decode()}"
TWO = ["a.png", "b.png"]
ROWS = {
    "llava": {"id": 1, "image": "a.png", "conversations": turns("<image>\nq", "x", "r", "y")},
    "llava, no mark": {"image": TWO, "conversations": turns("q", "x")},
    "messages": {"messages": messages("<image>q", "x"), "images": ["a.png"]},
    "video": {"messages": messages("<video>q", "x"), "videos": ["a.mp4"]},
    "parts": {
        "messages": messages(
            [part("image", "a.png"), part("text", "q"), part("image_url", {"url": URL})],
            [part("text", "x")],
        )
    },
    "parts and a list": {
        "images": TWO,
        "messages": messages([{"type": "image"}, {"type": "image"}, part("text", "q")], "x"),
    },
    "texts": {
        "images": [{"path": "a.png"}, {"path": "b.png", "bytes": None}],
        "texts": [{"user": "q", "assistant": "x", "source": "s"}, {"user": "r", "assistant": "y"}],
        "relevance": [5, 4],
    },
    "question": {"image": "a.png", "question": "q", "answer": "x", "options": ["x", "y"]},
    "answers": {"image": "a.png", "question": "q", "answers": ["x", "y", "x"]},
    "VQA": {"image": "a.png", "question": "q", "answers": [{"answer": "x", "answer_id": 1}]},
    "caption": {"image": "a.png", "caption": ["x", "y"], "width": 3},
    "imagefolder": {"file_name": "a.png", "text": "x"},
}


class Values:
    """Rows that come from no file, with what `make_samples` asks of rows."""

    def __init__(self, raws: list, folder: Path):
        self.raws = raws
        self.file = folder / "rows.values"

    def __getitem__(self, i: int) -> Row:
        return read_row(self.raws[i], self.where(i))

    def where(self, i: int, row: Row | None = None) -> str:
        return f"{self.file}:row {i}"

    def media(self, i: int, row: Row) -> list[Media]:
        return media_of_row(row, self.file.parent, self.where(i))


def find_pictures(value: Any, key: str = "", level: int = 0) -> tuple[list, list]:
    """Return the pictures and videos of a raw row, and texts elsewhere that would name some.

    The first are bytes, and names and URLs under a key of pictures. `key` is that of the value, and
    `level` how many objects it stands in: any text under such a key of the row itself is a name.
    """
    if isinstance(value, list):
        found = [find_pictures(inner, key, level) for inner in value]
    elif isinstance(value, dict):
        # A path beside bytes is what the same picture is called.
        has_bytes = isinstance(value.get("bytes"), bytes)
        ignored = ("id", "path") if has_bytes else ("id",)
        found = [
            find_pictures(inner, k, level + 1) for k, inner in value.items() if k not in ignored
        ]
    elif isinstance(value, bytes):
        return [value], []
    elif isinstance(value, str):
        is_file = value in NAMES or value.startswith("data:image/")
        is_key = key.lower() in (*KEYS["image"], *KEYS["video"])
        if value and is_key and (is_file or level == 1):
            return [value], []
        if is_file:
            return ([value], []) if key.lower() in ("url", "path") else ([], [value])
        return [], []
    else:
        return [], []
    return sum((sure for sure, _ in found), []), sum((maybe for _, maybe in found), [])


def with_bytes(value: Any, rng: random.Random) -> Any:
    """Return a row with bytes, or structs of them, in the place of most names of pictures."""
    if isinstance(value, dict):
        return {key: with_bytes(inner, rng) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_bytes(inner, rng) for inner in value]
    if isinstance(value, str) and value in NAMES[:2]:
        content = picture(value)
        choices = (content, {"bytes": content, "path": value}, {"bytes": content, "path": None})
        return rng.choice((*choices, value))
    return value


def rename(value: Any, rng: random.Random) -> tuple[Any, str]:
    """Return a row in which one key has another name."""
    value = copy.deepcopy(value)
    paths = [path for path in places(value) if path and isinstance(path[-1], str)]
    if not paths:
        return value, "nothing renamed"
    path = rng.choice(paths)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    new = rng.choice([key for key in OTHER_KEYS if key not in parent and key != "id"])
    parent[new] = parent.pop(path[-1])
    return value, f"{path[-1]} is {new}"


def said_by(row: Row) -> list:
    """Return what the row reads as words: a name among them is a word, and names no picture."""
    said = [turn["value"] for turn in row["conversations"]]

    # Where the answer stands under another key, "answers" stays as it was and may be anything.
    answers = row.get("answers")
    if isinstance(answers, list):
        said += [answer for answer in answers if isinstance(answer, str)]
    return said


def use(rows: Any, raws: list):
    """Make the samples of all rows, and compare their items with the pictures of the raw rows."""
    refused = None
    for i, raw in enumerate(raws):
        # There is no film to open.
        pixels = "a.mp4" not in str(raw)
        try:
            sample = make_sample(rows, i, mean_colour_spec(), pixels)
        except UserError as e:
            refused = e
            check_message(str(e), rows.file, i, raw)
            continue

        # The same picture under two keys is one.
        pictures, others = find_pictures(raw)
        unique = {repr(one) for one in pictures}
        if len(sample.items) not in (len(pictures), len(unique)):
            raise Violation(f"{len(sample.items)} items of {len(pictures)} in {str(raw)[:300]}")
        if not sample.items and not set(others) <= set(said_by(rows[i])):
            raise Violation(f"no items, of {others} in {str(raw)[:300]}")
    if refused:
        raise refused


def check_message(message: str, file: Path, i: int, raw: Any):
    """Raise Violation unless a message names the file, the row, and a key or what it is."""
    if not message.startswith((f"{file}:row {i}", f"{file}:line {i + 1}")):
        raise Violation(f"the row is not named: {message[:200]}")
    keys = [str(path[-1]) for path in places(raw) if path]
    words = ("conversations", "not a row", "<image>", "image ", "video ", "Unicode", "supervised")
    if not any(word in message for word in (*keys, *words)):
        raise Violation(f"no key is named: {message[:200]}")


def read(file: Path, raws: list):
    """Use the rows of a file."""
    use(open_rows(file), raws)


def read_parquet(folder: Path, raws: list):
    """Use rows as parquet files of one row: together they would have to be of one type."""
    import pyarrow
    from pyarrow import parquet

    refused = None
    for i, raw in enumerate(raws):
        file = folder / f"{i}.parquet"
        try:
            parquet.write_table(pyarrow.Table.from_pylist([raw]), file)
        except (pyarrow.ArrowException, OverflowError, UnicodeError):
            continue  # no table holds it
        try:
            use(open_rows(file), [raw])
        except UserError as e:
            refused = e
    if refused:
        raise refused


def change(raw: Any, rng: random.Random) -> tuple[Any, str]:
    """Return a row with one or more changes, and the changes in words."""
    changes = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if isinstance(raw, dict) and rng.random() < 0.2:
            raw, what = rename(raw, rng)
        else:
            raw, what = mutate(raw, rng, (*ODD, *NAMES, URL))
        changes.append(what)
    return raw, ", ".join(changes)


def case(rng: random.Random, folder: Path) -> Case:
    """Make some rows of a form, each with a few changes, and say what to run on them."""
    for name in NAMES[:2]:
        (folder / name).write_bytes(picture(name))
    name = rng.choice(sorted(ROWS))
    changed = [change(ROWS[name], rng) for _ in range(10)]
    raws = [raw for raw, _ in changed]
    what = "; ".join(what for _, what in changed)

    ending = rng.choice(("json", "jsonl", "values", "parquet"))
    file = folder / f"rows.{ending}"
    if ending in ("values", "parquet"):
        raws = [with_bytes(raw, rng) for raw in raws if isinstance(raw, dict)]
        run = partial(use, Values(raws, folder), raws)
        if ending == "parquet":
            run = partial(read_parquet, folder, raws)
        return Case(name, f"{ending}: {what[:300]}", run)
    if ending == "json":
        file.write_text(json.dumps(raws))
    else:
        file.write_text("\n".join(json.dumps(raw) for raw in raws))
    return Case(name, f"{ending}: {what[:300]}", partial(read, file, raws))


if __name__ == "__main__":
    main(case, __doc__)
