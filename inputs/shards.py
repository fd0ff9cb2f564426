"""Rows in tar shards, with the bytes of their pictures and videos: reading and writing them.

    python data.py shard rows.json NEW_FOLDER

Shards have the WebDataset layout: tar files in which each sample is KEY.json, followed by its media
KEY.jpg, or KEY.0.jpg, KEY.1.jpg ... where it has several. A few large files are kinder to a
cluster's file system than a million small ones, and are read from one end to the other.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from checkpoints.files import open_regular, writing
from checkpoints.owned import MARK, own
from config import UserError
from inputs.forms import Row
from inputs.index import locked
from inputs.indexed_rows import IndexedRows
from inputs.media import Media, media_names
from inputs.sniff import reason

if TYPE_CHECKING:
    from inputs.rows import Rows

# The number of the member with the row, which sorts it before the media.
ROW = -1

# ------------------------------------------------------------------------------------------ reading


class Shards(IndexedRows):
    """The rows of a tar file, or of several."""

    # A scan visits every member, which is slow on a network disk however small the file is.
    keeps_small_index = True

    def scan(self, file: Path) -> np.ndarray:
        return scan_tar(file)

    def first_entries(self, entries: np.ndarray) -> np.ndarray:
        rows = np.flatnonzero(entries[:, 2] == 0)  # a sample's entry 0 is its row
        return np.append(rows, len(entries))

    def media(self, i: int, row: Row) -> list[Media]:
        kind, names = media_names(row)
        location = self._find(i)
        where = location.place

        # Entry 0 is the row itself, its media follow in the order of their names in the row.
        media = []
        for entry, name in enumerate(names, 1):
            if entry >= len(location.entries):
                what = f"{kind} {name}: not in the shard"
                raise UserError(where, what, "write the shard again, or remove the row")
            content = self._read(location, entry)
            media.append(Media(kind, name, content))
        return media


class Member(NamedTuple):
    """A file in a tar file: its bytes are tar[start:end]."""

    number: int  # ROW, or which of the sample's media it is
    start: int
    end: int


class TarSample(NamedTuple):
    """The members of a tar file that stand together and have one name up to the first dot."""

    key: str  # that name, with its folder
    members: list[Member]


def scan_tar(file: Path) -> np.ndarray:
    """Return (start, end, number) of each member, sample after sample, numbered in its sample.

    One member of a sample is its .json. It gets number 0 and the media follow, whatever order they
    have in the file. Raise UserError.
    """
    fix = "write or fetch the shard again"
    try:
        with open_regular(file) as opened:
            samples = list_samples(opened)
    except FileNotFoundError:
        raise  # whoever opens rows says so, for all formats
    except OSError as e:
        raise UserError(file, f"not a tar file, or a damaged one: {reason(e)}", fix) from None
    except Exception as e:  # tarfile raises nearly anything on a damaged file
        raise UserError(file, f"not a tar file, or a damaged one: {e}", fix) from None
    if not samples:
        raise UserError(file, "no rows", "write the shard again")

    entries = []
    for key, members in samples:
        members.sort(key=lambda member: member.number)
        numbers = [member.number for member in members]
        if numbers.count(ROW) != 1:
            what = "not exactly one .json among its members"
            raise UserError(f"{file}:{key}", what, "write the shard again")
        for number, member in enumerate(members):
            entries.append((member.start, member.end, number))
    return np.array(entries, np.int64)


def list_samples(file: BinaryIO) -> list[TarSample]:
    """Return the samples of a tar file, in the order of the file. Raise nearly anything."""
    samples: list[TarSample] = []
    at = -1
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            tar.members.clear()  # else it would hold the headers of all members

            # A header may say any size, also a negative one, which leads back for ever.
            if member.size < 0 or tar.offset <= at:
                raise tarfile.ReadError(f"a member of {member.size} bytes")
            at = tar.offset

            # Links, FIFOs and devices have no bytes here, those of a sparse file lie elsewhere.
            if not member.isfile() or member.issparse():
                continue

            # A member with another key than the one before begins a sample.
            folder, name = os.path.split(member.name)
            stem, _, ending = name.partition(".")
            key = f"{folder}/{stem}"
            if not samples or samples[-1].key != key:
                samples.append(TarSample(key, []))

            # KEY.json is the row, KEY.2.jpg the medium 2 of several, KEY.jpg the only one.
            first, _, _ = ending.partition(".")
            if ending == "json":
                number = ROW
            elif re.fullmatch("[0-9]{1,9}", first):
                number = int(first)
            else:
                number = 0
            start = member.offset_data
            end = start + member.size
            samples[-1].members.append(Member(number, start, end))
    return samples


# ------------------------------------------------------------------------------------------ writing


def shard(rows: Rows, out: Path, size: int) -> int:
    """Write rows and their media, as they are, to tar files of about `size` bytes in a new folder.

    Return how many files. A shard is made to be handed on, so it gets no file from outside of the
    rows' folder of images, wherever a name or a link leads. Raise UserError for such a file and for
    one that is not there, before anything is written.
    """
    if out.exists() or out.is_symlink():
        raise UserError(out, "exists already", "name another folder, or remove it")

    # Before hours of writing, and not in the middle of them.
    check_media(rows)

    # All or nothing: the folder gets its name when it is complete. What a killed start left in the
    # temporary one is written anew.
    temporary = out.with_name(f".{out.name}.part")
    own(temporary, "shards")
    try:
        with open_regular(temporary / MARK) as mark, locked(mark):
            if out.exists():  # made by another process, while this one waited for the lock
                raise UserError(out, "exists already", "name another folder, or remove it")
            remove_shards(temporary)
            count = write_shards(rows, temporary, size)
            Shards(temporary)  # read them back, which also leaves the index beside each
            temporary.rename(out)
    except OSError:
        with writing(out):
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return count


def remove_shards(folder: Path):
    """Remove the tar files and indexes in a folder that is marked as ours."""
    for pattern in ("*.tar", "*.tar.index", ".*.tar.index.*"):
        for file in folder.glob(pattern):
            file.unlink()


def check_media(rows: Rows):
    """Raise UserError for the first picture or video that cannot be packed."""
    for i in range(len(rows)):
        row = rows[i]
        where = rows.where(i, row)
        for media in rows.media(i, row):
            if not isinstance(media.source, bytes):
                check_inside(media, rows.images, where)
                open_media(media, where).close()


def check_inside(media: Media, images: Path, where: str):
    """Raise UserError unless a file lies in the folder of images, where all links end."""
    try:
        real = media.source.resolve()
        is_inside = real.is_relative_to(images.resolve())
    except (OSError, ValueError, RuntimeError):
        return  # it is no name of a file: opening it says so
    if not is_inside and real.exists():
        what = f"{media}: lies outside of {images}, and a shard is handed on"
        fix = "copy it there, or name with --images a folder that holds all of them"
        raise UserError(where, what, fix)


def open_media(media: Media, where: str) -> BinaryIO:
    """Open the file of a picture or video. Raise UserError at `where`."""
    try:
        return open_regular(media.source)
    except FileNotFoundError:
        what = "no such file"
    except IsADirectoryError:
        what = "a folder, which no shard holds"  # a video as a folder of frames
    except OSError as e:
        what = reason(e)
    raise UserError(where, f"{media}: {what}", "fetch it, or remove the row")


def write_shards(rows: Rows, folder: Path, size: int) -> int:
    """Write 00000.tar, 00001.tar, ..., each until it has `size` bytes. Return how many."""
    count = 0
    tar = None
    for i in range(len(rows)):
        if tar is None:
            name = folder / f"{count:05d}.tar"
            tar = tarfile.open(name, "w", format=tarfile.USTAR_FORMAT)
            count += 1

        # The key is the row's number, so the names of all shards together are unique.
        for ending, content in sample_members(rows, i):
            info = tarfile.TarInfo(f"{i:09d}.{ending}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        is_last = i == len(rows) - 1
        if tar.offset >= size or is_last:
            tar.close()
            tar = None
    return count


def sample_members(rows: Rows, i: int) -> list[tuple[str, bytes]]:
    """Return the members of row i as (what follows the key in its name, content)."""
    row = rows[i]
    where = rows.where(i, row)
    members = [("json", json.dumps(row).encode())]

    all_media = rows.media(i, row)
    for number, media in enumerate(all_media):
        ending = member_ending(media.name)
        if len(all_media) > 1:
            ending = f"{number}.{ending}"

        content = media.source
        if not isinstance(content, bytes):
            check_inside(media, rows.images, where)
            with open_media(media, where) as file:
                content = file.read()
        members.append((ending, content))
    return members


def member_ending(name: str) -> str:
    """Return the ending of a medium's name, as that of its member; "jpg" if it has none that fits.

    A shard's reader goes by it: "json" is the row, and a number says which medium it is.
    """
    ending = Path(name).suffix.lower().removeprefix(".")
    if ending == "json" or not re.fullmatch("[a-z][a-z0-9]{0,9}", ending):
        return "jpg"
    return ending
