"""What answers were made from, written beside them: they are used again only for the same.

    made = origin(model_folder, examples, data_dir, options)
    go_on_or_set_aside(file, made)     # before anything is answered

A name and a date do not tell a model from another one, nor a picture: the other may have the same
name and be older. What counts is what the files hold (checkpoints/identity.py). Questions are not
in the record: each answer has its own beside it (kept.py).

Answers of anything else stay where they are under another name, STEM.aside-1.jsonl, with their
scores and their record. `check_file_of_answers` refuses a name that has files of somebody else.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from checkpoints.files import PICKLES, SAFETENSORS, read_json, write_file, writing
from checkpoints.identity import changed_names, digest, identities, identity
from checkpoints.owned import own
from config import UserError, printable
from evals import Example
from evals.shown import shown_names, sources
from inputs.tokenizer import OWN_FILES

# The files of a model that decide what it answers.
MODEL_FILES = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    *OWN_FILES,
    "*.tiktoken",
    "*.model",
    SAFETENSORS,
    PICKLES,
)

# Of pictures and videos all names and sizes are compared, and the content of so many, evenly
# spread: of all where that is little to read.
MOST_READ = 4096
LEAST_READ = 16
MOST_BYTES = 2**28

# What is told of each part of the record that has changed.
TOLD = {
    "model": "another model",
    "shown": "other pictures or videos",
    "options": "other options",
}


def origin(folder: Path, examples: list[Example], data_dir, options: dict) -> dict:
    """Return the record of what decides the answers, as JSON has it.

    options: what decides them besides the files, {name: value}.
    Raise UserError for a file that cannot be read.
    """
    return {
        "model": identities(folder, MODEL_FILES),
        "shown": identity_of_shown(examples, data_dir),
        "options": options,
    }


def identity_of_shown(examples: list[Example], data_dir) -> dict:
    """Return what identifies all that the examples show: a number, and two hashes.

    "names" is of the names and sizes of all, "content" of what MOST_READ and MOST_BYTES allow.
    Pictures that are no files, but bytes in the examples, are hashed whole.
    """
    names = hashlib.blake2b(digest_size=16)
    content = hashlib.blake2b(digest_size=16)

    # Pictures that are no files are at hand. The names of the others, each once, in their order.
    named = {}
    for example in examples:
        for name, source in zip(shown_names(example), sources(example, data_dir), strict=True):
            if isinstance(source, bytes):
                content.update(bytes.fromhex(digest(source)))
            else:
                named[name] = source

    # A file that is not there counts, too: it may be there the next time.
    there = []
    total = 0
    for name, source in named.items():
        for path in files_of(source):
            size = size_of(path)
            names.update(json.dumps([name, path.name, size]).encode())
            if size is not None:
                there.append(path)
                total += size
    for path in sample(there, total):
        content.update(identity(path)["blake2b"].encode())
    return {"files": len(there), "names": names.hexdigest(), "content": content.hexdigest()}


def files_of(path: Path) -> list[Path]:
    """Return the files of a picture or a clip: a clip may be a folder of frames."""
    try:
        if path.is_dir():
            return sorted(path.iterdir())
    except (OSError, ValueError):
        pass  # a name that no system takes, or a folder that may not be read
    return [path]


def size_of(path: Path) -> int | None:
    """Return the size of a file; None if it is not there, or is no file."""
    # os.path takes every name; Path refuses one that is too long.
    if os.path.isfile(path):
        return os.path.getsize(path)
    return None


def sample(paths: list[Path], size: int) -> Iterator[Path]:
    """Yield the paths of so many files, evenly spread, as are read; size: of all in bytes."""
    if not paths:
        return
    mean = max(1, size // len(paths))
    count = min(max(LEAST_READ, MOST_BYTES // mean), MOST_READ, len(paths))
    for i in range(count):
        yield paths[i * len(paths) // count]


# ---------------------------------------------------------------------------------------- records


def record_of(file: Path) -> Path:
    """Return the file of the record that belongs to a file of answers."""
    return file.with_name(f"{file.stem}-origin.json")


def go_on_or_set_aside(file: Path, made: dict):
    """Keep the answers in a file and those of other ranks if they are of `made`.

    If not, give them other names, and say so in a line. Then write the record. Raise UserError if
    that cannot be written.
    """
    with writing(file, "make room or allow writing there, or name another file with --out"):
        answers = [path for path in parts_of(file) if path.exists()]
        if answers:
            changed = what_changed(record_of(file), made)
            if not changed:
                return
            kept = set_aside(file, [*answers, file.with_suffix(".json"), record_of(file)])
            print(f"{file.name}: answers of {changed}, kept as {kept.name}; starting afresh")
        write_file(record_of(file), json.dumps(made, indent=1))


def parts_of(file: Path) -> list[Path]:
    """Return a file of answers, and those to which the other ranks append."""
    return [file, *sorted(file.parent.glob(f"{glob.escape(file.name)}.rank*"))]


def what_changed(record: Path, made: dict) -> str:
    """Return in words what is not as in a record; "" if nothing is."""
    try:
        known = read_json(record)
    except UserError:
        return "an unknown model"

    told = []
    for part, words in TOLD.items():
        if known.get(part) == made[part]:
            continue
        if part == "model":
            words += f" ({changed_file(known.get(part), made[part])})"
        told.append(words)
    return " and ".join(told)


def changed_file(known, made: dict) -> str:
    """Return the name of a file of a model that is not as it was; the weights before the others."""
    if not isinstance(known, dict):
        return "another folder"
    names = changed_names(known, made)
    weights = [name for name in names if name.endswith((".safetensors", ".bin"))]
    return printable([*weights, *names][0], 80)


def set_aside(file: Path, paths: list[Path]) -> Path:
    """Give the files that begin with the stem of `file` other names.

    Return that of `file`. STEM.jsonl becomes STEM.aside-1.jsonl, or the first number that is free.
    """
    number = 1
    while list(file.parent.glob(f"{glob.escape(file.stem)}.aside-{number}*")):
        number += 1
    stem = f"{file.stem}.aside-{number}"
    for path in paths:
        if not path.exists():
            continue
        name = stem + path.name.removeprefix(file.stem)
        if path.name.startswith(f"{file.name}.rank"):
            # Not .rank1 at the end: that is what the parts of a run under way are known by.
            name = f"{stem}-{path.name.removeprefix(file.name + '.')}{file.suffix}"
        path.rename(path.with_name(name))
    return file.with_name(f"{stem}{file.suffix}")


# --------------------------------------------------------------------------------------- ownership

# How the names of what evaluate.py and the tasks write beside STEM.jsonl end.
WRITTEN = (
    ".json",
    ".html",
    "-origin.json",
    "-judge.jsonl",
    "-answers.jsonl",
    "-captions.jsonl",
    "-predictions.jsonl",
    "-responses.json",
    "-results",
    "-results.json",
    "-reviews.jsonl",
    "-server.json",
    "-server.tsv",
    "-server.xlsx",
    "-testdev_balanced_predictions.json",
)


def check_file_of_answers(file: Path):
    """Raise UserError unless a file of answers is new, or an earlier start of ours wrote it.

    So are all the files whose names begin like it: nothing of somebody else's is overwritten.
    """
    fix = "--out: name another file; nothing was changed"
    if not file.name:
        raise UserError("--out", f"{str(file)!r} is no file", fix)
    if file.suffix == ".json":
        raise UserError(file, "is where the scores go", "--out: a name like answers.jsonl")
    try:
        if record_of(file).is_file():
            return
        beside = [file.with_name(file.stem + end) for end in WRITTEN]
        for path in [*parts_of(file), *beside]:
            if path.exists() or path.is_symlink():
                raise UserError(path, "is there, and no earlier start of this wrote it", fix)
    except OSError as error:
        raise UserError(file, f"cannot be written: {error.strerror}", fix) from None


def claim(file: Path, is_out: bool):
    """Raise UserError if answers and scores would go over what this program did not write.

    MODEL/eval is ours by a mark, as all folders are that this program writes into. A file that
    --out names may lie among others, so its own name decides.
    """
    if is_out:
        check_file_of_answers(file)
    else:
        own(file.parent, "evaluation")
