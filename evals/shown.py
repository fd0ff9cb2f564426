"""What a question shows: the pictures or videos of an example, and where each of them is.

shown_names(example)                       # ["a.jpg", "b.jpg"]
list(sources(example, data_dir))           # [Path("DATA/a.jpg"), b"..."]: files, or their bytes
load_shown(example, data_dir, load)        # load(source, "image") of each
check_examples(examples, data_dir)         # all are there: before a model is loaded
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from config import UserError
from evals import Example
from evals.files import exists
from inputs.pictures import load_image
from inputs.sample import user_error
from inputs.video import probe

RESTORE = "restore it"


def shown_name(example: Example) -> str | list[str] | None:
    """Return the name or the names of what an example shows, as the example has them."""
    return example.get("video") or example["image"]


def shown_names(example: Example) -> list[str]:
    """Return the same as a list; an empty one for an example that shows nothing."""
    named = shown_name(example) or []
    if isinstance(named, str):
        return [named]
    return named


def shown_kind(example: Example) -> str:
    """Return "image" or "video": no example shows both."""
    if example.get("video"):
        return "video"
    return "image"


def sources(example: Example, data_dir) -> Iterator[Path | bytes]:
    """Yield where each picture or video is that an example shows: its file, or its bytes."""
    if "pictures" in example:
        yield from example["pictures"]
    else:
        for name in shown_names(example):
            yield Path(data_dir) / name


def load_shown(example: Example, data_dir, load: Callable, fix: str = RESTORE) -> list:
    """Return load(source, kind, **part) of each of an example's pictures or videos.

    `source` is a path or the bytes of a picture; `part` has the span and rate of a video.
    Where `load` raises ValueError, raise UserError that names the example's row and the file.
    """
    kind = shown_kind(example)
    part = {key: example[key] for key in ("span", "rate") if key in example}

    loaded = []
    for name, source in zip(shown_names(example), sources(example, data_dir), strict=True):
        try:
            loaded.append(load(source, kind, **part))
        except UserError:
            raise
        except ValueError as error:
            path = Path(data_dir) / name
            if isinstance(source, Path):
                path = source
            where = example.get("where", path)
            raise user_error(where, error, fix, f"{path}: ") from None
    return loaded


def check_examples(examples: list[Example], data_dir, fix: str = RESTORE):
    """Raise UserError for two examples of one id, or a picture or video that is not there.

    fix: what to do about the latter.
    """
    if not examples:
        fix = "--data: name a folder with the benchmark's files, or fetch them again"
        raise UserError(data_dir, "no questions in it", fix)

    ids = set()
    checked = set()
    for example in examples:
        if example["id"] in ids:
            what = f"question {example['id']} is there twice"
            raise UserError(example["where"], what, "fetch the file again")
        ids.add(example["id"])

        # Questions may share what they show, which is checked once. Names are of one row, where
        # there are rows.
        shown = (example.get("row"), *shown_names(example))
        if shown in checked:
            continue
        checked.add(shown)

        # Opening is slow, so files that are there are taken on trust. This raises for one that is
        # missing, and looks into pictures that are no files but bytes in the example.
        for source in sources(example, data_dir):
            if isinstance(source, bytes) or not exists(source):
                load_shown(example, data_dir, open_media, fix)
                break


def open_media(source: Path | bytes, kind: str, **part):
    """Open a picture or a video without a model. Raise ValueError(what is wrong with it)."""
    if kind == "image":
        load_image(source)
    else:
        probe(source)
