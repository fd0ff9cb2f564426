"""What a run is made from, besides its recipe: rows, pictures, tokenizer, weights, and this code.

    found = look(recipe, ["finetune"])     # {"stage.finetune rows": {"0 rows.json": ...}, ...}
    changes = compare(recorded, found)     # what is not as it was when the run began
    changes.deciding, changes.others, changes.key

A recipe names files. What is in them decides what is trained, so a run writes it down and compares
it whenever it goes on. Names and dates do not count: only sizes and hashes of contents do.

    rows          every byte of a .json or .jsonl file; of tar shards, where all members are and
                  every byte of the rows; of parquet files, every byte of up to 256 MiB in all. Of
                  larger ones the whole footer, which says the place and size of every column of
                  every row group, and 4 KiB at the beginning and in the middle of each row group.
                  So a row group that was replaced is noticed, and one word of it that was changed
                  to another of the same length may not be
    pictures      of up to 256 rows, evenly spaced through each data set: the size of each picture
                  or video, and its first and last 64 KiB (of parquet, 16 rows of a row group at a
                  time, as few row groups are read). So a set that was replaced or processed
                  anew is noticed, and a single picture among many thousands may not be
    held-out      the same of the validation rows. They decide what is reported, so a change is
                  said and not refused
    tokenizer     every byte of its files, chat template included
    weights       config.json and weights of each model that the recipe names, by
                  checkpoints/identity.py: every byte up to 64 MiB, a sample of a larger file
    code          the Python files of this project, and torch. A change is said and not refused

output.py keeps the record and decides what follows from a change.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from checkpoints.files import open_regular, resolve
from checkpoints.identity import changed_names, digest, identities, identity
from config import Recipe, Source, Stage, UserError
from inputs.holdout import validation_file
from inputs.parquet_rows import ParquetRows, read_footer
from inputs.rows import Rows, in_few_blocks, open_rows
from inputs.shards import CAPTION, ROW, Shards
from inputs.tokenizer import read_files

# Kind -> name of a file -> what is known of its content.
Contents = dict[str, dict[str, str]]

PICTURE_ROWS = 256  # of each data set, whose pictures are looked at
END = 2**16  # bytes at each end of a picture that are hashed
NOT_THERE = "not there"
WHOLE_PARQUET = 2**28  # bytes of parquet files up to which each of them is hashed
PIECE = 2**12  # bytes of a row group, at two places

# What a change of these alters is not what is trained.
HELD_OUT = " held-out"
CODE = "code"

ROOT = Path(__file__).resolve().parents[1]
CODE_FILES = (
    "*.py",
    "checkpoints/*.py",
    "inference/*.py",
    "inputs/*.py",
    "kernels/*.py",
    "training/*.py",
)

# The files that decide what the weights of a model are.
MODEL_FILES = ["config.json", "preprocessor_config.json", "adapter_config.json", "*.safetensors"]


# -------------------------------------------------------------------------------- what there is now


def look(recipe: Recipe, stages: Iterable[str]) -> Contents:
    """Return what these stages of a recipe are made from, as it is now.

    Raises UserError for what is missing or cannot be read, as training itself would.
    """
    found: Contents = {CODE: dict(code())}
    for name in stages:
        stage = recipe.stage[name]
        label = f"stage.{name}"
        for source_name, source in sources_of(stage).items():
            of_source = " ".join(filter(None, (label, source_name)))
            rows = open_rows(source.data, source.images, source.columns)
            found[f"{of_source} rows"] = contents_of_rows(rows)
            pictures = contents_of_pictures(rows)
            check_some_are_there(pictures, of_source, source)
            found[f"{of_source} pictures"] = pictures
        if validation_file(stage):
            rows = open_rows(stage.validation, stage.images, stage.columns)
            found[label + HELD_OUT] = contents_of_rows(rows) | contents_of_pictures(rows)
        if stage.lora.adapter:
            found[f"{label} adapter"] = contents_of_model(Path(stage.lora.adapter), False)

    model = recipe.model
    for key in ("checkpoint", "llm", "vision", "vision2"):
        name = getattr(model, key)
        if name:
            folder = resolve(name, f"model.{key}", model.allow_pickle)
            found[f"model.{key}"] = contents_of_model(folder, model.allow_pickle)
    if model.tokenizer_source:
        folder = resolve(model.tokenizer_source, small=True)
        found["tokenizer"] = {name: digest(data) for name, data in read_files(folder).items()}
    return found


def check_some_are_there(pictures: dict[str, str], name: str, source: Source):
    """Raise UserError if no picture of a data set is at its place.

    The folder is then a wrong one. That of a later stage would be found out only when that begins.
    """
    if pictures and set(pictures.values()) == {NOT_THERE}:
        folder = source.images or Path(source.data).parent
        what = f"none of its pictures is at its place, as {next(iter(pictures))} in {folder}"
        raise UserError(name, what, "name the folder that they lie in as its images")


def sources_of(stage: Stage) -> dict[str, Source]:
    """Return the data sets of a stage by name; the only one of a stage without a mixture is ""."""
    if stage.data:
        return {"": Source(stage.data, stage.images, stage.columns)}
    return stage.mixture


def contents_of_rows(rows: Rows) -> dict[str, str]:
    """Return what is in the files of rows. Names begin with a number, because the order counts."""
    found = {}
    size = sum(os.path.getsize(file) for file in rows.files)
    for k, file in enumerate(rows.files):
        if isinstance(rows, Shards):
            content = identity_of_shard(file, rows.indexes[k])
        elif isinstance(rows, ParquetRows) and size > WHOLE_PARQUET:
            content = identity_of_parquet(file, rows.indexes[k])
        else:
            content = as_text(identity(file, whole=True))
        found[f"{k} {file.name}"] = content
    return found


def identity_of_shard(file: Path, entries: np.ndarray) -> str:
    """Return the size of a tar file, and a hash of where its members are and of all its rows.

    entries: its index, an (m, 3) array of start, end and number (inputs/index.py).
    """
    hashed = hashlib.blake2b(entries.tobytes(), digest_size=16)
    with open_regular(file) as tar:
        for start, end, _ in entries[np.isin(entries[:, 2], (ROW, CAPTION))].tolist():
            tar.seek(start)
            hashed.update(tar.read(end - start))
        size = os.fstat(tar.fileno()).st_size
    return f"{size} bytes {hashed.hexdigest()}"


def identity_of_parquet(file: Path, entries: np.ndarray) -> str:
    """Return the size of a parquet file, and a hash of its footer and of pieces of its row groups.

    entries: its index, an (m, 3) array of which the second column is where row groups begin.
    """
    with open_regular(file) as opened:
        footer = read_footer(opened)
        hashed = hashlib.blake2b(footer, digest_size=16)
        size = os.fstat(opened.fileno()).st_size

        starts = entries[:, 1].tolist()
        ends = [*starts[1:], size - len(footer)]
        for start, end in zip(starts, ends, strict=True):
            for place in (start, (start + end) // 2):
                opened.seek(place)
                hashed.update(opened.read(PIECE))
    return f"{size} bytes {hashed.hexdigest()}"


def contents_of_pictures(rows: Rows) -> dict[str, str]:
    """Return what is in the pictures and videos of up to PICTURE_ROWS rows."""
    if isinstance(rows, Shards):
        return contents_of_members(rows)
    found = {}
    count = min(len(rows), PICTURE_ROWS)
    picks = [k * len(rows) // count for k in range(count)]
    for i in in_few_blocks(rows, picks):
        try:
            media = rows.media(i, rows[i])
        except UserError:
            continue  # training says what is wrong with the row
        for number, medium in enumerate(media[:PICTURE_ROWS]):
            if isinstance(medium.source, bytes):
                content = io.BytesIO(medium.source)
                name = f"row {i} {medium.kind} {number}"
                found[name] = identity_of_ends(content, 0, len(medium.source))
            else:
                found[medium.name] = identity_of_medium(medium.source)
    return found


def contents_of_members(rows: Shards) -> dict[str, str]:
    """Return what is in up to PICTURE_ROWS pictures and videos of tar shards.

    rows.media would read each of them whole, and a video may have gigabytes.
    """
    # All of them, and the file that each is in: arrays, because there may be millions.
    of_shards = [entries[entries[:, 2] > 0] for entries in rows.indexes]
    members = np.concatenate(of_shards)
    shards = np.repeat(np.arange(len(of_shards)), [len(entries) for entries in of_shards])

    found = {}
    count = min(len(members), PICTURE_ROWS)
    for j in range(count):
        i = j * len(members) // count
        start, end, _ = members[i].tolist()
        file = rows.files[shards[i]]
        with open_regular(file) as tar:
            found[f"{file.name} byte {start}"] = identity_of_ends(tar, start, end)
    return found


def identity_of_ends(file: BinaryIO, start: int, end: int) -> str:
    """Return the size of file[start:end], a picture or video, and a hash of both its ends."""
    file.seek(start)
    head = file.read(min(END, end - start))
    tail_start = max(start, end - END)
    file.seek(tail_start)
    tail = file.read(end - tail_start)
    return f"{end - start} bytes {digest(head + tail)}"


def identity_of_medium(source: Path) -> str:
    """Return the size of a picture or video, and a hash of both its ends; or that it is not there.

    A video may be a folder of frames: then the names and sizes of its files count.
    """
    try:
        if source.is_dir():
            frames = [(path.name, path.stat().st_size) for path in sorted(source.iterdir())]
            return f"{len(frames)} files {digest(repr(frames).encode())}"

        with open_regular(source) as file:
            return identity_of_ends(file, 0, os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        return NOT_THERE
    except OSError:
        return "not a file"


def contents_of_model(folder: Path, allow_pickle: bool) -> dict[str, str]:
    """Return what is in the configuration and the weights of a model's folder."""
    patterns = MODEL_FILES
    if allow_pickle:
        patterns = [*MODEL_FILES, "*.bin"]
    return {name: as_text(found) for name, found in identities(folder, patterns).items()}


@functools.cache
def code() -> tuple[tuple[str, str], ...]:
    """Return what is known of this program as it was when the process began.

    It is looked at once: an edit of a file does not change a process that runs.
    """
    hashed = hashlib.blake2b(digest_size=16)
    for pattern in CODE_FILES:
        for file in sorted(ROOT.glob(pattern)):
            hashed.update(file.name.encode() + file.read_bytes())
    return ("source files", hashed.hexdigest()), ("torch", torch.__version__)


def as_text(found: dict) -> str:
    """Return a file's identity as one text."""
    return f"{found['size']} bytes {found['blake2b']}"


# --------------------------------------------------------------------------------- what has changed


class Changes(NamedTuple):
    """What is not as it was, each a text that names it."""

    deciding: list[str]  # it would train another model
    others: list[str]  # it would not: held-out rows, code
    key: str  # stands for these deciding changes and for no others; "" if there are none


def compare(recorded: Contents, found: Contents) -> Changes:
    """Return what has changed since a run was recorded, among what is needed from now on.

    A kind that the record does not have is new in the recipe, which is compared by itself.
    """
    deciding = []
    others = []
    changed_to = {}
    for kind, now in found.items():
        before = recorded.get(kind)
        if before is None or before == now:
            continue
        text = f"{kind} ({describe(before, now)})"
        if kind == CODE or kind.endswith(HELD_OUT):
            others.append(text)
        else:
            deciding.append(text)
            changed_to[kind] = now

    key = ""
    if deciding:
        key = digest(json.dumps(changed_to, sort_keys=True).encode())[:12]
    return Changes(deciding, others, key)


def describe(before: dict[str, str], now: dict[str, str]) -> str:
    """Return what changed of a kind, in a few words: the first file, and how many more."""
    names = changed_names(before, now)
    name = names[0]
    if name not in before:
        words = f"{name} is new"
    elif name not in now:
        words = f"{name} is gone"
    else:
        old = without_hash(before[name])
        new = without_hash(now[name])
        words = f"{name}: {old} -> {new}"
        if old == new:
            words = f"{name} has the same size and another content"
    if len(names) > 1:
        words += f" and {len(names) - 1} more"
    return words


def without_hash(content: str) -> str:
    """Return "9 bytes" for the content "9 bytes 5f0c..."; one that has no size stays as it is."""
    size, _, _ = content.rpartition(" ")
    if size.endswith((" bytes", " files")):
        return size
    return content
