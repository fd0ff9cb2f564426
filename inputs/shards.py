"""Rows in tar shards, with the bytes of their pictures and videos: reading and writing them.

    python data.py shard rows.json NEW_FOLDER

Shards have the WebDataset layout: tar files in which each sample is KEY.json, followed by its media
KEY.jpg, or KEY.0.jpg, KEY.1.jpg ... where it has several. A few large files are kinder to a
cluster's file system than a million small ones, and are read from one end to the other.

Others write the same layout with less in the .json, or without one. Then KEY.txt is the caption, as
in img2dataset's shards, the pictures are all of the sample, and its id is KEY. Members of other
types (.cls, .npy) are passed over and counted. A key may stand in a folder and have dots.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from checkpoints.files import open_regular, writing
from checkpoints.owned import MARK, own
from config import UserError
from inputs.forms import Row, find_keys, has_form, read_row
from inputs.index import locked
from inputs.indexed_rows import IndexedRows, Location
from inputs.media import Media, bytes_of_url, ending_of, kind_by_ending, media_names
from inputs.sniff import HEAD, begins_as_medium, reason

if TYPE_CHECKING:
    from inputs.rows import Rows

# What members are that are no picture and no video, as their numbers in the index.
ROW = 0  # KEY.json, which begins a sample; it has no bytes where there is only a KEY.txt
CAPTION = -1  # KEY.txt
OTHER = -2  # passed over: KEY.cls, KEY.npy, ...

TEXTS = (".json", ".txt")  # endings of a row and of a caption
BLOCK = 512  # bytes; a member's header is one, and stands before its own bytes
HEADERS = 32 * BLOCK  # with the long or foreign name that may stand before it

# ------------------------------------------------------------------------------------------ reading


class Shards(IndexedRows):
    """The rows of a tar file, or of several.

    A sample's row is its .json. Where that is no row (forms.py) but says something about one, its
    .txt is the caption. A row that names no picture has all of its sample, in their order.
    """

    # A scan visits every member, which is slow on a network disk however small the file is.
    keeps_small_index = True
    holds_media = True

    def scan(self, file: Path) -> np.ndarray:
        return scan_tar(file)

    def first_entries(self, entries: np.ndarray) -> np.ndarray:
        rows = np.flatnonzero(entries[:, 2] == ROW)
        return np.append(rows, len(entries))

    def details(self) -> str:
        passed_over = sum(int((entries[:, 2] == OTHER).sum()) for entries in self.indexes)
        if not passed_over:
            return ""
        return f"; members of other types, passed over: {passed_over}"

    def raw_row(self, location: Location) -> Any:
        start, end, _ = location.entries[0].tolist()
        raw: Any = {}
        if end > start:
            raw = super().raw_row(location)
        if not isinstance(raw, dict):
            return raw

        # Shards of our own end here: their rows say everything.
        keys = find_keys(raw, location.place, self.columns or {})
        is_whole = has_form(keys)
        has_media = "image" in keys or "video" in keys
        members = np.flatnonzero(location.entries[:, 2] > ROW)
        if is_whole and (has_media or not len(members)):
            return raw

        if not is_whole:
            raw |= self._caption(location)
        if not has_media and len(members) and not self._names_media(raw, location):
            names = [self._name(location, int(entry)) for entry in members]
            kind = "image"
            if kind_by_ending(names[0]) == "video":
                kind = "video"
            raw[(self.columns or {}).get(kind, kind)] = names
            raw.setdefault("id", key_of(names))
        return raw

    def media(self, i: int, row: Row) -> list[Media]:
        kind, names = media_names(row)
        location = self._find(i)
        where = location.place

        # The media of a sample follow in the order of their names in the row.
        members = np.flatnonzero(location.entries[:, 2] > ROW)
        media = []
        for k, name in enumerate(names):
            if k >= len(members) and name.startswith("data:"):
                media.append(Media(kind, name, bytes_of_url(name, where)))
                continue
            if k >= len(members):
                what = f"{kind} {name}: not in the shard"
                raise UserError(where, what, "write the shard again, or remove the row")
            content = self._read(location, int(members[k]))
            media.append(Media(kind, name, content))
        return media

    def _names_media(self, raw: dict, location: Location) -> bool:
        """Say whether a row names pictures or videos somewhere in its turns."""
        try:
            row = read_row(raw, location.place, self.columns)
        except UserError:
            return False  # with its pictures it may be one, or else says what is wrong
        return bool(media_names(row)[1])

    def _caption(self, location: Location) -> dict:
        """Return what a sample's .txt says, as a part of its row; {} if it has none."""
        entries = np.flatnonzero(location.entries[:, 2] == CAPTION)
        if not len(entries):
            return {}
        text = self._read(location, int(entries[0]))
        try:
            return {"caption": text.decode("utf-8-sig").strip()}
        except UnicodeDecodeError as e:
            what = f".txt: not UTF-8 at byte {e.start}"
            raise UserError(location.place, what, "save it as UTF-8") from None

    def _name(self, location: Location, entry: int) -> str:
        """Return the name of a member, as the headers before it have it."""
        start = int(location.entries[entry, 0])
        headers = np.array([[max(0, start - HEADERS), start, OTHER]])
        return name_in(self._read(location._replace(entries=headers), 0))


def name_in(headers: bytes) -> str:
    """Return the name of a member from what stands before its bytes and ends with its header.

    A name that is long or not ASCII stands in blocks of its own, and a header of theirs, before it.
    """
    begin = len(headers) - BLOCK
    name = headers[begin:][:100].split(b"\0", 1)[0].decode("utf-8", "replace")
    if headers[begin + 257 : begin + 262] != b"ustar":
        return name  # of before POSIX

    for first in range(begin - 2 * BLOCK, -1, -BLOCK):
        with suppress(tarfile.HeaderError):
            info = tarfile.TarInfo.frombuf(headers[first:][:BLOCK], "utf-8", "replace")
            blocks = -(-info.size // BLOCK)
            is_name = info.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)
            if is_name and first + BLOCK * (1 + blocks) == begin:
                begin = first
                break
    try:
        with tarfile.open(fileobj=io.BytesIO(headers[begin:]), errors="replace") as tar:
            return tar.next().name
    except Exception:  # it was no header, but the end of another member
        return name


def key_of(names: list[str]) -> str:
    """Return the key of a sample from the names of its media: KEY.jpg, or KEY.0.jpg, ..."""
    key = os.path.splitext(names[0])[0]
    if len(names) > 1:
        key = re.sub(r"\.[0-9]+$", "", key)
    return key.lstrip("/")


class Member(NamedTuple):
    """A file in a tar file: its bytes are tar[start:end]."""

    name: str  # without its folder
    start: int
    end: int
    is_medium: bool


def scan_tar(file: Path) -> np.ndarray:
    """Return (start, end, number) of each member, sample after sample, numbered in its sample.

    A sample begins with its .json, number 0. Its .txt and what is passed over come next, if there
    are any, then its media as 1, 2, ..., whatever order they have in the file. Raise UserError.
    """
    fix = "write or fetch the shard again"
    entries = array("q")
    try:
        with open_regular(file) as opened:
            for key, members in groups(opened):
                for sample_key, sample in samples_of(key, members):
                    number_members(f"{file}:{sample_key}", sample, entries)
    except (FileNotFoundError, UserError):
        raise  # whoever opens rows says of the first, for all formats
    except OSError as e:
        raise UserError(file, f"not a tar file, or a damaged one: {reason(e)}", fix) from None
    except Exception as e:  # tarfile raises nearly anything on a damaged file
        raise UserError(file, f"not a tar file, or a damaged one: {e}", fix) from None
    if not entries:
        raise UserError(file, "no rows", "write the shard again")
    return np.array(entries).reshape(-1, 3)


def groups(file: BinaryIO) -> Iterator[tuple[str, list[Member]]]:
    """Yield the members that stand together and have one name up to the first dot, with that name.

    Raise nearly anything.
    """
    key = None
    members: list[Member] = []
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

            # Notes that macOS leaves beside each file.
            folder, name = os.path.split(member.name)
            if name.startswith("._"):
                continue

            # A member with another key than the one before begins a group.
            stem, _, _ = name.partition(".")
            if key != f"{folder}/{stem}":
                if members:
                    yield key, members
                key = f"{folder}/{stem}"
                members = []

            start = member.offset_data

            # A name that does not tell: the file is looked at.
            is_medium = kind_by_ending(name) != ""
            if not is_medium and ending_of(name) not in TEXTS:
                file.seek(start)
                is_medium = begins_as_medium(file.read(min(HEAD, member.size)))
            members.append(Member(name, start, start + member.size, is_medium))
    if members:
        yield key, members


def samples_of(key: str, members: list[Member]) -> list[tuple[str, list[Member]]]:
    """Return the samples of a group, each with its key: one, unless names have dots of their own.

    The members photo.1.json, photo.1.jpg, photo.2.json and photo.2.jpg are two samples.
    """
    texts = {os.path.splitext(member.name)[0] for member in members if is_text(member)}
    if len(texts) <= 1:
        return [(key, members)]

    # Each belongs to the text whose name is the longest beginning of its own: photo.1.0.jpg to
    # photo.1.json.
    samples: dict[str, list[Member]] = {}
    for member in members:
        stem = os.path.splitext(member.name)[0]
        while stem not in texts and "." in stem:
            stem = os.path.splitext(stem)[0]
        samples.setdefault(stem, []).append(member)

    # A text without media beside photo.json, as photo.meta.json, is no sample of its own.
    main = os.path.basename(key)
    if main in samples:
        for stem in list(samples):
            has_media = any(member.is_medium for member in samples[stem])
            if stem != main and not has_media:
                for member in samples.pop(stem):
                    samples[main].append(member._replace(name=f"{stem}.other"))
    folder = os.path.dirname(key)
    return [(f"{folder}/{stem}", sample) for stem, sample in samples.items()]


def is_text(member: Member) -> bool:
    """Say whether a member is a row or a caption."""
    return ending_of(member.name) in TEXTS


def number_members(where: str, members: list[Member], entries: array):
    """Add (start, end, number) of the members of a sample to `entries`. Raise UserError."""
    rows = [member for member in members if ending_of(member.name) == ".json"]
    captions = [member for member in members if ending_of(member.name) == ".txt"]
    if len(rows) > 1 or len(captions) > 1:
        what = "not exactly one .json among its members, or not one .txt"
        raise UserError(where, what, "write the shard again")
    if not rows and not captions:
        what = "neither a .json nor a .txt among its members"
        raise UserError(where, what, "write the shard again, with a text for each picture")

    # Without a row, the place of one.
    first = captions[0].start if captions else 0
    for row in rows or [Member("", first, first, False)]:
        entries.extend((row.start, row.end, ROW))
    for caption in captions:
        entries.extend((caption.start, caption.end, CAPTION))

    media = []
    for member in members:
        if member.is_medium:
            media.append(member)
        elif not is_text(member):
            entries.extend((member.start, member.end, OTHER))

    # Python sorts stably: those of one number stay in the order of the file.
    media.sort(key=number_of)
    for number, member in enumerate(media, 1):
        entries.extend((member.start, member.end, number))


def number_of(member: Member) -> int:
    """Return which of several media a member is: 2 for KEY.2.jpg, 0 for KEY.jpg."""
    _, _, ending = member.name.partition(".")
    first, _, _ = ending.partition(".")
    if re.fullmatch("[0-9]{1,9}", first):
        return int(first)
    return 0


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
            # Read them back, which also leaves the index beside each.
            Shards(temporary, sorted(temporary.glob("*.tar")))
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
        is_inside = real.is_relative_to(home_of(images))
    except (OSError, ValueError, RuntimeError):
        return  # it is no name of a file: opening it says so
    if not is_inside and real.exists():
        what = f"{media}: lies outside of {images}, and a shard is handed on"
        fix = "copy it there, or name with --images a folder that holds all of them"
        raise UserError(where, what, fix)


def home_of(images: Path) -> Path:
    """Return the folder that may be handed on: that of images, where all links end.

    In the Hugging Face cache, files are links to the blobs of their data set.
    """
    real = images.resolve()
    for folder in (real, *real.parents):
        if folder.name.startswith("datasets--") and (folder / "blobs").is_dir():
            return folder
    return real


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
