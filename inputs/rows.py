"""Where rows, pictures and videos come from: a JSON list, lines of JSON, tar shards, or a weighted mixture of them.

Shards have the WebDataset layout: tar files in which each sample is KEY.json, followed by its pictures, KEY.jpg or
KEY.0.jpg, KEY.1.jpg ..., or videos, as the bytes that they were.
"""

from __future__ import annotations

import glob
import io
import json
import os
import shutil
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from config import Stage, UserError
from inputs.index import SMALL, index, looks_like, parse

MAX_RATIO = 500  # of an image's sides: with the shortest resized to 384, still within Pillow's limit of pixels


def load_image(source: str | Path | bytes) -> Image.Image:
    """A picture file, or its bytes: the first frame in RGB as Pillow converts it, upright by its EXIF.

    Raises ValueError(what is wrong with it).
    """

    def pixels(image: Image.Image) -> Image.Image:
        image.load()
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except Exception:
            pass  # damaged EXIF (SyntaxError, TypeError, struct.error ...): good pixels, as stored
        return image.copy() if image.mode == "RGB" else image.convert("RGB")

    return _of_image(source, pixels)


def image_size(source: str | Path | bytes) -> tuple[int, int]:
    """The width and height of what load_image makes of it, from its first bytes. Raises ValueError as that does."""

    def size(image: Image.Image) -> tuple[int, int]:
        try:
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        except Exception:
            turned = False
        return image.size[::-1] if turned else image.size

    return _of_image(source, size)


def _of_image(source: str | Path | bytes, what: Callable[[Image.Image], Any]):
    """`what` of an opened picture. Raises ValueError(what is wrong with it)."""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            head = file.read(256)
            if wrong := looks_like(head):
                raise ValueError(wrong)
            file.seek(0)
            made, size = _opened(file, what)
    except OSError as e:  # of opening or reading: the decoder's own are ValueErrors by now
        raise ValueError(e.strerror.lower()) from None
    if max(size) > MAX_RATIO * min(size):
        raise ValueError(f"{size[0]} x {size[1]} pixels, a side ratio over {MAX_RATIO}")
    return made


def _opened(file, what: Callable[[Image.Image], Any]) -> tuple[Any, tuple[int, int]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # odd palettes and metadata: the pixels are right all the same
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return what(image), image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(
            f"more than {Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit against bombs"
        ) from None
    except UnidentifiedImageError:
        raise ValueError(
            "not an image, or one with a damaged header or a side of zero pixels"
        ) from None
    except Exception as e:  # Pillow's decoders raise nearly anything on a damaged file
        what = (
            "truncated" if "truncated" in str(e).lower() else f"damaged: {' '.join(str(e).split())}"
        )
        raise ValueError(what) from None


def media(row: dict, where: str) -> tuple[str, list[str]]:
    """ "image" or "video", and the names of a row's. Raises UserError if it has both, or no names of files."""
    if row.get("image") and row.get("video"):
        raise UserError(where, "an image and a video in one row", "make two rows of it")
    kind = "video" if row.get("video") else "image"
    names = row.get(kind) or []
    names = names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) for name in names):
        raise UserError(where, f'"{kind}" is {row[kind]!r}', "write a file name or a list of them")
    return kind, names


def files(data: str | Path) -> list[Path]:
    """The files that a folder of shards, a glob or a file's own name stand for, in order; [] = there is none."""
    return sorted(
        Path(data).glob("*.tar") if Path(data).is_dir() else map(Path, glob.glob(str(data)))
    )


class Rows:
    """`rows[i]` is a dict, `rows.where(i)` its name in messages, `rows.image(...)` its pictures. They are of
    a .json list, of a .jsonl file, or of tar shards: one of them, a folder of them, or a glob.

    Of large files only offsets are held; a row is read when it is asked for. Messages count rows of a list from 0, as
    `json.load(file)[i]` does, and lines from 1, as editors do.
    """

    parts: tuple = ()  # a Mixture's

    def __init__(self, data: str | Path, images: str | Path = ""):
        self.given, self.file = (data, images), Path(data)
        self.files = files(data) or [self.file]
        if self.file.is_dir() and self.files == [self.file]:
            raise UserError(
                data,
                "a folder without .tar shards",
                "name a .json or .jsonl file of rows, or shards",
            )
        self.images = Path(images) if images else self.file.parent
        self.packed = self.files[0].suffix == ".tar"
        try:
            self.tables = [index(file) for file in self.files]
            stats = {file: file.stat() for file in self.files}
            small = not self.packed and stats[self.files[0]].st_size < SMALL
            self.held = self.files[0].read_bytes() if small else b""
            self.times = {file: (stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}
        except OSError as e:
            raise UserError(
                e.filename, e.strerror.lower(), "name a .json or .jsonl file of rows, or shards"
            ) from None
        if not self.packed and not self.images.is_dir():
            raise UserError(
                self.images, "no such folder of images", "set the stage's images, or --images"
            )
        self.firsts = [
            range(len(t) + 1) for t in self.tables
        ]  # row j's entries end where the next one's begin
        if self.packed:
            self.firsts = [np.append(np.flatnonzero(t[:, 2] == 0), len(t)) for t in self.tables]
        self.ends = np.cumsum([len(first) - 1 for first in self.firsts])

    def __reduce__(self):
        return Rows, self.given  # a spawned worker maps the index again, it is not sent

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _find(self, i: int) -> tuple[Path, np.ndarray, str]:
        """A row's file, its entries in the index, and its place in messages."""
        i = range(len(self))[i]
        k = int(np.searchsorted(self.ends, i, side="right"))
        j = i - (int(self.ends[k - 1]) if k else 0)
        entries, file = self.tables[k][self.firsts[k][j] : self.firsts[k][j + 1]], self.files[k]
        return (
            file,
            entries,
            f"{file}:" + (f"line {entries[0, 2]}" if file.suffix == ".jsonl" else f"row {j}"),
        )

    def _read(self, file: Path, start: int, end: int) -> bytes:
        if self.held:
            return self.held[start:end]
        with open(
            file, "rb", buffering=0
        ) as f:  # opened each time: a forked worker would share its position
            stat = os.fstat(f.fileno())
            if (stat.st_size, stat.st_mtime_ns) != self.times[file]:
                raise UserError(file, "has changed since it was opened", "start again")
            f.seek(start)
            return f.read(end - start)

    def __getitem__(self, i: int) -> dict:
        file, entries, place = self._find(i)
        row = parse(self._read(file, *map(int, entries[0, :2])), place, int(entries[0, 0]))
        if not isinstance(row, dict):
            raise UserError(
                place, f"a JSON {type(row).__name__}, not a row", "write {...}, or remove it"
            )
        return row

    def where(self, i: int, row: dict | None = None) -> str:
        name, place = (self[i] if row is None else row).get("id"), self._find(i)[2]
        return place if name is None else f"{place} (id {name})"

    def image(self, i: int, j: int, name: str) -> Path | bytes:
        """The j-th picture or video of row i, which the row calls `name`: what load_image or video.frames takes."""
        if not self.packed:
            return self.images / name
        file, entries, place = self._find(i)
        if j + 1 >= len(entries):
            raise UserError(
                place, f"image {name}: not in the shard", "write the shard again, or remove the row"
            )
        return self._read(file, *map(int, entries[j + 1, :2]))


class Mixture:
    """Several Rows as one, of which an epoch takes weight x len rows of each: below 1 other ones in each epoch until
    all were taken, above 1 all of them again. As Rows it has every row once, so that they can be checked.
    """

    def __init__(self, sources: list[Rows], weights: list[float]):
        self.sources, self.ends = sources, np.cumsum([len(s) for s in sources])
        self.file = ", ".join(str(s.file) for s in sources)
        self.parts = tuple(
            (len(s), round(w * len(s))) for s, w in zip(sources, weights, strict=True)
        )
        for source, weight, (n, count) in zip(sources, weights, self.parts, strict=True):
            if count < 1:
                raise UserError(
                    source.file,
                    f"weight {weight} takes none of {n} rows",
                    "raise it, or leave it out",
                )

    def __len__(self) -> int:
        return int(self.ends[-1])

    @classmethod
    def of(cls, stage: Stage, where: str) -> Rows | Mixture:
        """What a stage of a recipe trains on. Raises UserError where it names nothing, or what is not there."""
        if bool(stage.data) == bool(stage.mixture):
            what = "set beside a mixture" if stage.data else "not set"
            raise UserError(
                f"{where}.data",
                what,
                "name a .json or .jsonl file of rows, or sources of a mixture",
            )
        if stage.data:
            return Rows(stage.data, stage.images)
        sources = stage.mixture.values()
        return cls([Rows(s.data, s.images) for s in sources], [s.weight for s in sources])

    def _find(self, i: int) -> tuple[Rows, int]:
        k = int(np.searchsorted(self.ends, i, side="right"))
        return self.sources[k], i - (int(self.ends[k - 1]) if k else 0)

    def __getitem__(self, i: int) -> dict:
        source, j = self._find(i)
        return source[j]

    def where(self, i: int, row: dict | None = None) -> str:
        source, j = self._find(i)
        return source.where(j, row)

    def image(self, i: int, j: int, name: str) -> Path | bytes:
        source, row = self._find(i)
        return source.image(row, j, name)


def shard(rows: Rows | Mixture, out: Path, size: int) -> int:
    """Write rows and their pictures, as they are, as tar files of about `size` bytes into the new folder `out` -> how
    many files. Raises UserError for a picture that is not there, before anything is written."""
    if out.exists():
        raise UserError(out, "exists already", "name another folder, or remove it")
    total = len(rows)
    for i in range(total):
        kind, names = media(rows[i], rows.where(i))
        for j, name in enumerate(names):
            picture = rows.image(i, j, name)
            if isinstance(picture, Path) and not picture.is_file():
                what = "a folder, which no shard holds" if picture.is_dir() else "no such file"
                raise UserError(
                    rows.where(i), f"{kind} {picture}: {what}", "fetch it, or remove the row"
                )
    temporary, tar, count = out.with_name(f".{out.name}.{os.getpid()}"), None, 0
    try:
        temporary.mkdir(parents=True)
        for i in range(total):
            if tar is None:
                tar, count = (
                    tarfile.open(temporary / f"{count:05d}.tar", "w", format=tarfile.USTAR_FORMAT),
                    count + 1,
                )
            row = rows[i]
            _, names = media(row, rows.where(i, row))
            members = [("json", json.dumps(row).encode())]
            for j, name in enumerate(names):
                picture = rows.image(i, j, name)
                kind = (Path(name).suffix or ".jpg").lower()
                members.append((f"{j}{kind}" if len(names) > 1 else kind[1:],
                                picture if isinstance(picture, bytes) else picture.read_bytes()))  # fmt: skip
            for kind, content in members:
                info = tarfile.TarInfo(f"{i:09d}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            if tar.offset >= size or i + 1 == total:
                tar.close()
                tar = None
        Rows(temporary)  # reads them back, and leaves the index beside each
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return count
