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

ROW = -1  # the number of the member with the row, so that it comes before the media when sorted

# ------------------------------------------------------------------------------------------ reading


class Shards(IndexedRows):
    """The rows of a tar file, or of several."""

    keeps_small_index = True  # a scan visits every member, which is slow on a network disk

    def scan(self, file: Path) -> np.ndarray:
        return scan_tar(file)

    def first_entries(self, table: np.ndarray) -> np.ndarray:
        return np.append(np.flatnonzero(table[:, 2] == 0), len(table))

    def media(self, i: int, row: dict) -> list[Media]:
        kind, names = media_names(row, self.where(i, row))
        found = self._find(i)
        media = []
        for entry, name in enumerate(names, 1):
            if entry >= len(found.entries):
                what = f"image {name}: not in the shard"
                raise UserError(found.place, what, "write the shard again, or remove the row")
            media.append(Media(kind, name, self._read(found, entry)))
        return media


class Member(NamedTuple):
    """A file in a tar file."""

    number: int  # ROW, or which of the sample's media it is
    start: int  # bytes of the tar file
    end: int


def scan_tar(file: Path) -> np.ndarray:
    """Return (start, end, number) of each member, sample after sample, numbered in its sample.

    The members of a sample stand together, have one name up to the first dot, and one of them is
    .json. It gets number 0, whatever order they have in the file. Raise UserError.
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
        if [member.number for member in members].count(ROW) != 1:
            what = "not exactly one .json among its members"
            raise UserError(f"{file}:{key}", what, "write the shard again")
        for number, member in enumerate(members):
            entries.append((member.start, member.end, number))
    return np.array(entries, np.int64)


def list_samples(file: Path) -> list[tuple[str, list[Member]]]:
    """Return (key, members) of each sample of a tar file, in the order of the file."""
    samples: list[tuple[str, list[Member]]] = []
    with tarfile.open(file, "r:") as tar:
        while member := tar.next():
            tar.members.clear()  # else it would hold the headers of all members
            if not member.isfile():
                continue

            # folder/KEY.json, folder/KEY.jpg, or folder/KEY.0.jpg
            folder, name = os.path.split(member.name)
            stem, _, ending = name.partition(".")
            key = f"{folder}/{stem}"
            if not samples or samples[-1][0] != key:
                samples.append((key, []))

            first = ending.partition(".")[0]
            if ending == "json":
                number = ROW
            elif first.isdigit():
                number = int(first)
            else:
                number = 0
            start = member.offset_data
            samples[-1][1].append(Member(number, start, start + member.size))
    return samples


# ------------------------------------------------------------------------------------------ writing


def shard(rows: Rows, out: Path, size: int) -> int:
    """Write rows and their media, as they are, to tar files of about `size` bytes in a new folder.

    Return how many files. Raise UserError for media that are not there, before anything is written.
    """
    if out.exists():
        raise UserError(out, "exists already", "name another folder, or remove it")
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
            what = "a folder, which no shard holds" if media.source.is_dir() else "no such file"
            fix = "fetch it, or remove the row"
            raise UserError(rows.where(i, row), f"{media}: {what}", fix)


def write_shards(rows: Rows, folder: Path, size: int) -> int:
    """Write 00000.tar, 00001.tar, ..., each until it has `size` bytes. Return how many."""
    count = 0
    tar = None
    for i in range(len(rows)):
        if tar is None:
            name = folder / f"{count:05d}.tar"
            tar = tarfile.open(name, "w", format=tarfile.USTAR_FORMAT)
            count += 1

        for ending, content in sample_members(rows, i):
            info = tarfile.TarInfo(f"{i:09d}.{ending}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        if tar.offset >= size or i + 1 == len(rows):
            tar.close()
            tar = None
    return count


def sample_members(rows: Rows, i: int) -> list[tuple[str, bytes]]:
    """Return the members of row i as (what follows the key in its name, content)."""
    row = rows[i]
    members = [("json", json.dumps(row).encode())]
    media = rows.media(i, row)
    for number, item in enumerate(media):
        ending = (Path(item.name).suffix or ".jpg").lower()
        if len(media) > 1:
            name = f"{number}{ending}"
        else:
            name = ending.removeprefix(".")
        content = item.source if isinstance(item.source, bytes) else item.source.read_bytes()
        members.append((name, content))
    return members
