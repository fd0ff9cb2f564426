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
import shutil
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from config import UserError
from inputs.indexed_rows import IndexedRows
from inputs.media import Media, media_names

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

    def media(self, i: int, row: dict) -> list[Media]:
        kind, names = media_names(row, self.where(i, row))
        location = self._find(i)

        # Entry 0 is the row itself, its media follow in the order of their names in the row.
        media = []
        for entry, name in enumerate(names, 1):
            if entry >= len(location.entries):
                what = f"image {name}: not in the shard"
                raise UserError(location.place, what, "write the shard again, or remove the row")
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
    try:
        samples = list_samples(file)
    except (tarfile.TarError, OSError) as e:
        what = f"not a tar file, or a damaged one: {e}"
        raise UserError(file, what, "write or fetch the shard again") from None
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


def list_samples(file: Path) -> list[TarSample]:
    """Return the samples of a tar file, in the order of the file."""
    samples: list[TarSample] = []
    with tarfile.open(file, "r:") as tar:
        while member := tar.next():
            tar.members.clear()  # else it would hold the headers of all members
            if not member.isfile():
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
            elif first.isdigit():
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

    Return how many files. Raise UserError for media that are not there, before anything is written.
    """
    if out.exists():
        raise UserError(out, "exists already", "name another folder, or remove it")

    # Before hours of writing, and not in the middle of them.
    check_media(rows)

    # All or nothing: the folder gets its name when it is complete.
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        count = write_shards(rows, temporary, size)
        Shards(temporary)  # read them back, which also leaves the index beside each
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return count


def check_media(rows: Rows):
    """Raise UserError for the first picture or video that is not there."""
    for i in range(len(rows)):
        row = rows[i]
        for media in rows.media(i, row):
            if isinstance(media.source, bytes) or media.source.is_file():
                continue
            if media.source.is_dir():
                what = f"{media}: a folder, which no shard holds"  # a video as a folder of frames
            else:
                what = f"{media}: no such file"
            raise UserError(rows.where(i, row), what, "fetch it, or remove the row")


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
    members = [("json", json.dumps(row).encode())]

    all_media = rows.media(i, row)
    for number, media in enumerate(all_media):
        ending = Path(media.name).suffix.lower() or ".jpg"
        if len(all_media) > 1:
            ending = f".{number}{ending}"

        content = media.source
        if not isinstance(content, bytes):
            content = content.read_bytes()
        members.append((ending.removeprefix("."), content))
    return members
