"""What a folder holds: files of rows, pictures with a metadata file, or pictures with captions.

    look("data")   # Found(kind="table", files=[data/train/metadata.csv], what="an imagefolder ...")

    train/metadata.csv, train/a.jpg      Hugging Face's imagefolder: rows that name their pictures
    data/train-00000-of-00002.parquet    files of rows of one kind, in the order of their names
    a.jpg, a.txt, more/b.png, more/b.txt pictures, each with its caption beside it

Folders are searched with all that is in them. Where names of files or folders say so, what is found
is the split for training: those with the word train, or else all but those with validation, test
and the like. What is left out is said. A .json file of one object is passed over: it describes the
data, as dataset_infos.json does.

A picture without a caption and a caption without a picture are left out and counted. Folders that
are named for what their pictures show are not read: a row has a text.

`look` is for folders on the disk. `choose` knows names only, and so it also serves for what is not
downloaded yet.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from checkpoints.files import open_regular, write_file, writing
from config import UserError, printable
from inputs.index import cache_folder
from inputs.json_rows import JsonLines
from inputs.kinds import ENDINGS, kind_of_rows
from inputs.shards import MEDIA, VIDEOS, ending_of
from inputs.sniff import reason

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
PICTURES = MEDIA - VIDEOS

# The words by which names tell splits.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}

# What is found in a file of one kind, and in several.
NAMES = {
    "list": ("a JSON list", "JSON lists"),
    "lines": ("JSON lines", "files of JSON lines"),
    "object": ("a JSON object", "JSON objects"),
    "table": ("a table", "tables"),
    "tar": ("a tar file", "tar files"),
    "parquet": ("a parquet file", "parquet files"),
}
CAPTIONS = "captions"  # the kind of a folder of pictures with captions

MAKE_ROWS = "write a metadata.csv with a line file_name,text and one for each picture"


class Found(NamedTuple):
    """What is meant by the name of some data."""

    kind: str  # of kinds.py, or CAPTIONS
    files: list[Path]  # in order; of captions the folder
    what: str  # in words


class Chosen(NamedTuple):
    """Which files of a folder are meant, by their names in it."""

    kind: str  # "metadata", "rows", CAPTIONS or "" if there are none
    names: list[str]  # the files of rows; of captions all pictures and texts
    left_out: str  # the other splits, in words


# ------------------------------------------------------------------------------------- by names


def choose(names: list[str]) -> Chosen:
    """Return which of all files of a folder hold its rows."""
    names = sorted(names)
    rows = [name for name in names if ending(name) in ENDINGS]

    # img2dataset writes what it knows of 00000.tar to 00000.parquet.
    tars = {os.path.splitext(name)[0] for name in rows if ending(name) == ".tar"}
    rows = [
        name for name in rows if ending(name) == ".tar" or os.path.splitext(name)[0] not in tars
    ]

    metadata = [name for name in rows if os.path.basename(name) in METADATA]
    if metadata and any(is_picture(name) for name in names):
        return of_split("metadata", metadata, {name: split_of(name) for name in metadata})
    if rows:
        return of_split("rows", rows, {name: split_of(name) for name in rows})

    # A picture may show a train, or a test: only folders beside each other are splits.
    named = [name for name in names if is_picture(name) or ending(name) == ".txt"]
    if not any(is_picture(name) for name in named):
        return Chosen("", [], "")
    splits = {}
    for name in named:
        first, slash, _ = name.partition("/")
        splits[name] = SPLIT_OF.get(first.lower(), "other") if slash else ""
    if "other" in splits.values() or "train" not in splits.values():
        splits = dict.fromkeys(named, "")
    return of_split(CAPTIONS, named, splits)


def of_split(kind: str, names: list[str], splits: dict[str, str]) -> Chosen:
    """Return the names of the split for training, or of all but the others."""
    wanted = "train" if "train" in splits.values() else ""
    chosen = [name for name in names if splits[name] == wanted]
    others = Counter(split for split in splits.values() if split != wanted)
    left_out = ", ".join(f"{split or 'other'} ({count})" for split, count in sorted(others.items()))
    return Chosen(kind, chosen, left_out)


def split_of(name: str) -> str:
    """Return the split that the name of a file of rows or of its folders tells; "" for none."""
    for part in name.lower().split("/"):
        for word in re.split("[^a-z]+", part):
            if word in SPLIT_OF:
                return SPLIT_OF[word]
    return ""


def ending(name: str) -> str:
    """Return the last ending of a name, with its dot, in small letters."""
    return os.path.splitext(name)[1].lower()


def is_picture(name: str) -> bool:
    """Say whether a file's name is that of a picture."""
    return ending_of(name) in PICTURES


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


# -------------------------------------------------------------------------------------- on the disk


def look(folder: Path, name: str | Path = "") -> Found:
    """Return what a folder holds. Raise UserError, at `name`, if that is no rows.

    `name` is what the user calls the folder.
    """
    name = name or folder
    try:
        names = list_folder(folder)
        chosen = choose(names)
        kinds = {}
        if chosen.kind in ("metadata", "rows"):
            kinds = {each: kind_of_rows(folder / each) for each in chosen.names}
    except OSError as e:
        raise UserError(e.filename or name, reason(e), "make it readable") from None

    # What describes data is no data.
    objects = [each for each in kinds if kinds[each] == "object"]
    for each in objects:
        del kinds[each]
    if objects and not kinds:
        others = choose([each for each in names if each not in objects])
        if others.kind == CAPTIONS:
            chosen = others

    if chosen.kind == CAPTIONS:
        check_captions(chosen.names, name)
        return Found(CAPTIONS, [folder], "")
    if not kinds:
        raise no_rows(name, names, chosen, objects)

    kind = the_kind(kinds, name)
    what = describe(kind, len(kinds))
    if chosen.kind == "metadata":
        what = f"an imagefolder with {os.path.basename(chosen.names[0])}"
        if len(kinds) > 1:
            what = f"an imagefolder with {len(kinds)} metadata files"
    if chosen.left_out:
        what += f"; splits left out: {chosen.left_out}"
    return Found(kind, [folder / each for each in kinds], what)


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
        said = [f"{NAMES[kind][1]} ({examples[kind]})" for kind in sorted(examples)]
        what = f"files of several formats: {printable(', '.join(said), 300)}"
        raise UserError(name, what, "name those of one, or make a mixture of them")
    [kind] = examples
    return kind


def describe(kind: str, count: int) -> str:
    """Return what so many files of a kind are, in words."""
    one, many = NAMES[kind]
    return one if count == 1 else f"{count} {many}"


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


class Pairs(NamedTuple):
    """Pictures and captions that stand beside each other."""

    pairs: list[tuple[str, str]]  # (picture, caption)
    alone: list[str]  # pictures without a caption
    texts: list[str]  # texts without a picture


def pairs_of(names: list[str]) -> Pairs:
    """Return which pictures and captions belong together: those of one name but for the ending."""
    captions = {os.path.splitext(name)[0]: name for name in names if ending(name) == ".txt"}
    unused = dict(captions)
    pairs = []
    alone = []
    for name in names:
        if is_picture(name):
            key = os.path.splitext(name)[0]
            if key in captions:
                pairs.append((name, captions[key]))
                unused.pop(key, None)
            else:
                alone.append(name)
    return Pairs(pairs, alone, list(unused.values()))


class CaptionFolder(JsonLines):
    """The rows of a folder of pictures with captions: {"id": KEY, "image": KEY.jpg, "caption"}.

    They are written to ~/.cache/barellava as lines, and read from there as such. Each opening reads
    all captions, and writes them again if one has changed.
    """

    def __init__(
        self,
        data: str | Path,
        images: str | Path = "",
        columns: dict[str, str] | None = None,
        found: list[Path] | None = None,
    ):
        """Raise UserError for a caption that cannot be read. found: [the folder]."""
        folder = Path(data)
        if found:
            folder = found[0]
        try:
            names = choose(list_folder(folder)).names
        except OSError as e:
            raise UserError(e.filename or data, reason(e), "make it readable") from None
        found_pairs = pairs_of(
            [name for name in names if is_picture(name) or ending(name) == ".txt"]
        )
        lines = [caption_line(folder, *pair) for pair in found_pairs.pairs]
        file = keep_lines(folder, "".join(lines))
        super().__init__(data, images or folder, columns, [file])
        self.given = (data, images, columns, found)
        self.recognised = describe_captions(found_pairs)

    def place(self, file: Path, number: int, entries) -> str:
        return f"{self.file}:row {number}"


def describe_captions(found: Pairs) -> str:
    """Return what a folder of pictures holds, in words."""
    what = f"a folder of pictures with captions, {len(found.pairs)}"
    if found.alone:
        what += f"; pictures without a caption, left out: {listed(found.alone)}"
    if found.texts:
        what += f"; texts without a picture, left out: {listed(found.texts)}"
    return what


def listed(names: list[str]) -> str:
    """Return how many names there are, and the first of them."""
    more = ", ..." if len(names) > 1 else ""
    return f"{len(names)} ({printable(names[0], 100)}{more})"


def caption_line(folder: Path, picture: str, caption: str) -> str:
    """Return the row of a picture and its caption, as a line of JSON. Raise UserError."""
    file = folder / caption
    try:
        with open_regular(file) as opened:
            text = opened.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as e:
        raise UserError(file, f"not UTF-8 at byte {e.start}", "save it as UTF-8") from None
    except OSError as e:
        raise UserError(file, reason(e), "make it readable, or remove it") from None
    key = os.path.splitext(picture)[0]
    return json.dumps({"id": key, "image": picture, "caption": text}) + "\n"


def keep_lines(folder: Path, lines: str) -> Path:
    """Return a file with these lines, which is written unless it is there."""
    content = lines.encode()
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    digest = hashlib.sha256(content).digest()
    with writing(folder, "set XDG_CACHE_HOME to a folder that may be written"):
        file = cache_folder() / f"{folder.resolve().name}-{place}.captions.jsonl"
        try:
            with open_regular(file) as opened:
                if opened.read() == content:
                    return file
        except OSError:
            pass  # it is not there

        # Ranks start together, and each may write it. So its time is a function of its content.
        def write(path: str):
            Path(path).write_bytes(content)
            time = int.from_bytes(digest[:4], "little")
            os.utime(path, (time, time))

        write_file(file, write)
    return file
