"""What a folder holds: files of rows, pictures with a metadata file, or pictures with captions.

    find("data")   # Found(kind="table", files=[data/train/metadata.csv], what="an imagefolder ...")

    train/metadata.csv, train/a.jpg      Hugging Face's imagefolder: rows that name their pictures
    data/train-00000-of-00002.parquet    files of rows of one kind, in the order of their names
    a.jpg, a.txt, more/b.png, more/b.txt pictures, each with its caption beside it

Folders are searched with all that is in them. Where names of files or folders say so, what is found
is the split for training: those with the word train, or else all but those with validation, test
and the like. What is left out is said. A .json file of one object is passed over: it describes the
data, as dataset_infos.json does.

`find` is for folders on the disk. `choose_files` knows names only, so that it also serves for what
is not downloaded yet.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from config import UserError, printable
from inputs.kinds import ENDINGS, kind_of_rows
from inputs.media import ending_of, kind_by_ending
from inputs.sniff import reason

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

# The words by which names tell splits.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}


class Name(NamedTuple):
    """What a kind of files is called."""

    one: str
    several: str


NAMES = {
    "list": Name("a JSON list", "JSON lists"),
    "lines": Name("JSON lines", "files of JSON lines"),
    "object": Name("a JSON object", "JSON objects"),
    "table": Name("a table", "tables"),
    "tar": Name("a tar file", "tar files"),
    "parquet": Name("a parquet file", "parquet files"),
}
CAPTIONS = "captions"  # the kind of a folder of pictures with captions

MAKE_ROWS = "write a metadata.csv with a line file_name,text and one for each picture"


class Found(NamedTuple):
    """What is meant by the name of some data."""

    kind: str  # of kinds.py, or CAPTIONS
    files: list[Path]  # in order; of captions the folder
    what: str  # in words
    left_out: str = ""  # the splits that are not meant, in words


class Chosen(NamedTuple):
    """Which files of a folder are meant, by their names in it."""

    kind: str  # "metadata", "rows", CAPTIONS or "" if there are none
    names: list[str]  # the files of rows; of captions all pictures and texts
    left_out: str  # the other splits, in words


# ------------------------------------------------------------------------------------- by names


def choose_files(names: list[str]) -> Chosen:
    """Return which of all files of a folder hold its rows."""
    rows = files_of_rows(names)
    if not rows:
        return choose_captions(names)

    kind = "rows"
    metadata = [name for name in rows if os.path.basename(name) in METADATA]
    if metadata and has_pictures(names):
        kind = "metadata"
        rows = metadata
    return of_split(kind, {name: split_of(name) for name in rows})


def files_of_rows(names: list[str]) -> list[str]:
    """Return those of all files of a folder that may hold rows, in the order of their names."""
    rows = sorted(name for name in names if ending_of(name) in ENDINGS)

    # img2dataset writes what it knows of 00000.tar to 00000.parquet.
    tars = {stem_of(name) for name in rows if ending_of(name) == ".tar"}
    return [name for name in rows if ending_of(name) == ".tar" or stem_of(name) not in tars]


def choose_captions(names: list[str]) -> Chosen:
    """Return the pictures and texts of a folder; none if it has no pictures."""
    chosen = sorted(name for name in names if is_picture(name) or ending_of(name) == ".txt")
    if not has_pictures(chosen):
        return Chosen("", [], "")

    # A picture may show a train, or a test: only folders beside each other are splits.
    splits = {}
    for name in chosen:
        first, slash, _ = name.partition("/")
        splits[name] = ""
        if slash:
            splits[name] = SPLIT_OF.get(first.lower(), "other")
    if "other" in splits.values() or "train" not in splits.values():
        splits = dict.fromkeys(chosen, "")
    return of_split(CAPTIONS, splits)


def of_split(kind: str, splits: dict[str, str]) -> Chosen:
    """Return the files of the split for training, or else all that are of no split.

    splits: of each file its split, or "".
    """
    wanted = ""
    if "train" in splits.values():
        wanted = "train"
    chosen = []
    others = Counter()
    for name, split in splits.items():
        if split == wanted:
            chosen.append(name)
        else:
            others[split or "other"] += 1
    left_out = ", ".join(f"{split} ({count})" for split, count in sorted(others.items()))
    return Chosen(kind, chosen, left_out)


def split_of(name: str) -> str:
    """Return the split that the name of a file of rows or of its folders tells; "" for none."""
    for part in name.lower().split("/"):
        for word in re.split("[^a-z]+", part):
            if word in SPLIT_OF:
                return SPLIT_OF[word]
    return ""


def is_picture(name: str) -> bool:
    """Say whether a file's name is that of a picture."""
    return kind_by_ending(name) == "image"


def has_pictures(names: list[str]) -> bool:
    """Say whether one of these files is a picture."""
    return any(is_picture(name) for name in names)


def stem_of(name: str) -> str:
    """Return the name of a file without its last ending."""
    return os.path.splitext(name)[0]


def list_folder(folder: Path) -> list[str]:
    """Return the names of all files below a folder, relative to it; hidden ones are passed over.

    Links to folders are followed, to each folder once. Raise OSError.
    """

    def fail(error: OSError):
        raise error

    seen = set()
    names = []
    for path, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        inside = Path(path).relative_to(folder).as_posix()
        for name in files:
            if not name.startswith("."):
                names.append(name if inside == "." else f"{inside}/{name}")
    return names


class Pairs(NamedTuple):
    """Pictures and captions that stand beside each other."""

    pairs: list[tuple[str, str]]  # (picture, caption)
    alone: list[str]  # pictures without a caption
    texts: list[str]  # texts without a picture


def pairs_of(names: list[str]) -> Pairs:
    """Return which pictures and captions belong together: those of one name but for the ending.

    names: of pictures and texts.
    """
    pictures = [name for name in names if is_picture(name)]
    captions = {stem_of(name): name for name in names if not is_picture(name)}

    pairs = []
    alone = []
    for picture in pictures:
        caption = captions.get(stem_of(picture))
        if caption:
            pairs.append((picture, caption))
        else:
            alone.append(picture)
    shown = {stem_of(picture) for picture in pictures}
    return Pairs(pairs, alone, [captions[stem] for stem in captions if stem not in shown])


# -------------------------------------------------------------------------------------- on the disk


def find(folder: Path, name: str | Path = "") -> Found:
    """Return what a folder holds. Raise UserError, at `name`, if that is no rows.

    `name` is what the user calls the folder.
    """
    name = name or folder
    kinds = {}
    try:
        names = list_folder(folder)
        chosen = choose_files(names)
        if chosen.kind != CAPTIONS:
            kinds = {file: kind_of_rows(folder / file) for file in chosen.names}
    except OSError as e:
        raise UserError(e.filename or name, reason(e), "make it readable") from None

    # A file of one object describes data, and is none: then pictures may have captions beside them.
    rows = [file for file in kinds if kinds[file] != "object"]
    captions = chosen
    if kinds and not rows:
        captions = choose_captions(names)
    if captions.kind == CAPTIONS:
        check_captions(captions.names, name)
        what = "a folder of pictures with captions"
        return Found(CAPTIONS, [folder], what, captions.left_out)
    if not rows:
        raise no_rows(name, names, chosen, list(kinds))

    kind = the_kind({file: kinds[file] for file in rows}, name)
    what = describe(kind, len(rows))
    if chosen.kind == "metadata":
        what = f"an imagefolder with {os.path.basename(rows[0])}"
        if len(rows) > 1:
            what = f"an imagefolder with {len(rows)} metadata files"
    return Found(kind, [folder / file for file in rows], what, chosen.left_out)


def of_files(files: list[Path], name: str | Path) -> Found:
    """Return what these files hold, in their order. Raise UserError at `name`, and OSError."""
    kinds = {str(file): kind_of_rows(file) for file in files}
    kind = the_kind(kinds, name)
    return Found(kind, files, describe(kind, len(files)))


def the_kind(kinds: dict[str, str], name: str | Path) -> str:
    """Return the kind that all files are of. Raise UserError at `name` if they are of several."""
    examples = {}
    for file, kind in kinds.items():
        examples.setdefault(kind, file)
    if len(examples) > 1:
        formats = [f"{NAMES[kind].several} ({examples[kind]})" for kind in sorted(examples)]
        what = f"files of several formats: {printable(', '.join(formats), 300)}"
        raise UserError(name, what, "name those of one, or make a mixture of them")
    [kind] = examples
    return kind


def describe(kind: str, count: int) -> str:
    """Return what so many files of a kind are, in words."""
    if count == 1:
        return NAMES[kind].one
    return f"{count} {NAMES[kind].several}"


def no_rows(name: str | Path, names: list[str], chosen: Chosen, objects: list[str]) -> UserError:
    """Return the error for a folder without rows."""
    if chosen.left_out:
        what = f"no rows but those of other splits: {chosen.left_out}"
        return UserError(name, what, "name the files themselves, with a glob such as FOLDER/*.json")
    if objects:
        what = f"no rows: {printable(objects[0], 100)} is one JSON object"
        return UserError(name, what, "write a JSON list of rows, or one row a line")
    what = "a folder without rows"
    if not names:
        what = "an empty folder"
    fix = "name one with files .json, .jsonl, .csv, .parquet or .tar, or of pictures with captions"
    return UserError(name, what, fix)


def check_captions(names: list[str], where: str | Path):
    """Raise UserError for a folder of pictures of which none has a caption."""
    if pairs_of(names).pairs:
        return
    pictures = [name for name in names if is_picture(name)]
    folders = {os.path.dirname(name) for name in pictures}
    what = f"{len(pictures)} pictures, and no text for any of them"
    if len(folders) > 1:
        what += "; the names of their folders are not read as classes"
    raise UserError(where, what, f"{MAKE_ROWS}, or KEY.txt beside each KEY.jpg")
