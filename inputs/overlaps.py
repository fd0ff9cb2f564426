"""Rows whose pictures also occur in a benchmark: what `data.py check ... --against` names.

    benchmark = Benchmark.of(Path("mmbench.parquet"))
    print_overlaps(rows, benchmark)    # rows with a picture that is in there

A benchmark is a folder of pictures, of parquet files or of tar files, or one such file, or a file
of rows. Any column and any member that holds a picture counts. Its pictures and those of the rows
are compared in three ways, the first that finds something:

    the same file           every byte
    the same pixels         as inputs/pictures.py decodes them: a PNG that was saved anew is found
    looks the same          the perceptual hash of ImageHash (phash, 64 bits of the lowest
                            frequencies) differs in at most 4 bits: a JPEG that was resized or saved
                            anew is found. In our photos such copies differ in 0 to 4 bits, and
                            other photos in 22 or more. Simple drawings, which have next to no
                            frequencies, may look the same to it and be others

The third needs ImageHash (pip install 'barellava[dedupe]', or ImageHash). Videos are not compared.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from tqdm import tqdm  # comes with tokenizers

from checkpoints.files import open_regular
from config import UserError, printable
from inputs.content import digest
from inputs.kinds import ENDINGS, PARQUET
from inputs.parquet_rows import check_pyarrow, has_bytes
from inputs.pictures import load_image
from inputs.rows import Rows, open_rows
from inputs.sniff import reason

# Bits of two perceptual hashes, of 64, that may differ.
LOOKS_SAME = 4

# A picture of one colour has no frequencies: its perceptual hash has this many bits or none, as
# that of any other such picture.
FLAT = 1


def print_overlaps(rows: Rows, benchmark: Benchmark, workers: int = 0):
    """Print each row with a picture that also occurs in a benchmark, and how many there are."""
    loaded = DataLoader(
        Overlaps(rows, benchmark),
        batch_size=None,
        num_workers=min(workers, len(rows) // 64),  # each takes a moment to start
        generator=torch.Generator(),  # as in data.loader
    )
    found = 0
    for i, lines in enumerate(tqdm(loaded, unit="row", disable=None, leave=False)):
        for line in lines:
            tqdm.write(f"{printable(rows.where(i), 1000)}: {line}")
        if lines:
            found += 1
    of = f"one of the {len(benchmark.names)} pictures of {printable(benchmark.where, 1000)}"
    print(f"  against: {found} of {len(rows)} rows have {of}")


class Looks(NamedTuple):
    """What a picture is compared by."""

    file: bytes  # the hash of its bytes
    pixels: bytes  # the hash of its size and its pixels
    perceptual: int | None  # 64 bits; None without ImageHash, and for a picture of one colour


@dataclass
class Benchmark:
    """The pictures of a benchmark, and what they look like."""

    where: Path
    names: list[str]
    looks: list[Looks]

    @classmethod
    def of(cls, where: Path, workers: int = 0) -> Benchmark:
        """Read all pictures of a folder or file. Raise UserError if there are none."""
        loaded = DataLoader(
            BenchmarkPictures(where, has_imagehash()),
            batch_size=None,
            num_workers=workers,
            generator=torch.Generator(),  # as in data.loader
        )
        found = []
        for name, looks in tqdm(loaded, desc=f"pictures of {where}", disable=None, leave=False):
            if looks is None:
                # An error, a complete line: UserError(...) would want its three parts.
                raise UserError.__new__(UserError, name)
            found.append((name, looks))
        if not found:
            fix = "name a folder of pictures, a parquet or tar file, or rows"
            raise UserError(where, "no pictures in it", fix)

        found.sort(key=lambda pair: pair[0])  # workers find them in another order
        return cls(where, [name for name, _ in found], [looks for _, looks in found])

    def find(self, looks: Looks) -> str:
        """Return which picture of the benchmark looks so, in words; "" if none does."""
        if looks.file in self.by_file:
            return f"{self.by_file[looks.file]} (the same file)"
        if looks.pixels in self.by_pixels:
            return f"{self.by_pixels[looks.pixels]} (the same pixels)"
        if looks.perceptual is None or not len(self.perceptual):
            return ""

        differ = count_bits(self.perceptual ^ np.uint64(looks.perceptual))
        nearest = int(differ.argmin())
        if differ[nearest] > LOOKS_SAME:
            return ""
        why = f"looks the same, {differ[nearest]} of 64 bits differ"
        return f"{self.with_perceptual[nearest]} ({why})"

    @cached_property
    def by_file(self) -> dict[bytes, str]:
        """The pictures by the hashes of their files."""
        return {looks.file: name for name, looks in zip(self.names, self.looks, strict=True)}

    @cached_property
    def by_pixels(self) -> dict[bytes, str]:
        """The pictures by the hashes of their pixels."""
        return {looks.pixels: name for name, looks in zip(self.names, self.looks, strict=True)}

    @cached_property
    def with_perceptual(self) -> list[str]:
        """The pictures that have a perceptual hash."""
        pairs = zip(self.names, self.looks, strict=True)
        return [name for name, looks in pairs if looks.perceptual is not None]

    @cached_property
    def perceptual(self) -> np.ndarray:
        """(m,) uint64: the perceptual hashes of those."""
        found = [looks.perceptual for looks in self.looks if looks.perceptual is not None]
        return np.array(found, np.uint64)


def count_bits(numbers: np.ndarray) -> np.ndarray:
    """Return how many bits are set in each of (m,) uint64."""
    return np.unpackbits(numbers.view(np.uint8).reshape(-1, 8), axis=1).sum(1)


class Overlaps(Dataset):
    """`overlaps[i]` says which pictures of row i are in a benchmark, a line for each."""

    def __init__(self, rows: Rows, benchmark: Benchmark):
        self.rows = rows
        self.benchmark = benchmark

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> list[str]:
        """Return the lines. A row or picture that cannot be read has none: `check` names it."""
        lines = []
        try:
            media = self.rows.media(i, self.rows[i])
        except UserError:
            return []
        for medium in media:
            if medium.kind == "image":
                looks = look_at(medium.source, len(self.benchmark.perceptual) > 0)
                if looks is None:
                    continue
                found = self.benchmark.find(looks)
                if found:
                    lines.append(f"{printable(str(medium), 1000)} is {found}")
        return lines


class BenchmarkPictures(IterableDataset):
    """(name, looks) of each picture of a benchmark. Each worker takes its share of them."""

    def __init__(self, where: Path, perceptual: bool):
        self.where = where
        self.perceptual = perceptual

    def __iter__(self) -> Iterator[tuple[str, Looks | None]]:
        """Yield them. The last one may be an error, which says why there are no more, and None."""
        worker, workers = 0, 1
        info = get_worker_info()
        if info:
            worker, workers = info.id, info.num_workers
        try:
            for number, (name, source) in enumerate(pictures_of(self.where)):
                if number % workers == worker:
                    looks = look_at(source, self.perceptual)
                    if looks:
                        yield printable(name, 1000), looks
        except UserError as e:
            yield str(e), None


def look_at(source: Path | bytes, perceptual: bool) -> Looks | None:
    """Return what a picture is compared by; None if it is no picture or cannot be read."""
    try:
        image = load_image(source)
        content = source
        if not isinstance(content, bytes):
            with open_regular(source) as file:
                content = file.read()
    except (ValueError, OSError):
        return None
    pixels = digest(repr(image.size).encode() + image.tobytes())
    bits = None
    if perceptual:
        bits = perceptual_hash(image)
    return Looks(digest(content), pixels, bits)


def has_imagehash() -> bool:
    """Say whether ImageHash is installed."""
    try:
        import imagehash  # noqa: F401
    except ImportError:
        return False
    return True


def perceptual_hash(image: Image.Image) -> int | None:
    """Return the 64 bits of a picture's perceptual hash; None for a picture of one colour."""
    import imagehash

    bits = imagehash.phash(image).hash  # (8, 8) bool
    if bits.sum() <= FLAT:
        return None
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


# ------------------------------------------------------------------------ pictures of a benchmark


def pictures_of(where: Path) -> Iterator[tuple[str, Path | bytes]]:
    """Yield (name, source) of whatever may be a picture in a folder or a file. Raise UserError."""
    try:
        if not where.is_dir():
            yield from pictures_of_file(where, is_alone=True)
            return
        for path in sorted(where.rglob("*")):
            if path.is_file():
                yield from pictures_of_file(path, is_alone=False)
    except OSError as e:
        raise UserError(e.filename or where, reason(e), "make it readable") from None


def pictures_of_file(path: Path, is_alone: bool) -> Iterator[tuple[str, Path | bytes]]:
    """Yield (name, source) of whatever may be a picture in a file.

    is_alone: the file itself was named. Then rows are opened for the pictures that they name; in a
    folder the pictures are files as well.
    """
    with open_regular(path) as file:
        head = file.read(len(PARQUET))
    kind = ENDINGS.get(path.suffix.lower())
    if head == PARQUET:
        yield from pictures_of_parquet(path)
    elif kind == "tar":
        yield from pictures_of_tar(path)
    elif kind is None:
        yield str(path), path
    elif is_alone:
        rows = open_rows(path)
        for i in range(len(rows)):
            for medium in rows.media(i, rows[i]):
                if medium.kind == "image":
                    yield f"{rows.where(i)}: {medium.name}", medium.source


def pictures_of_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of each member of a tar file. Raise UserError."""
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile():
                    yield f"{path}:{member.name}", tar.extractfile(member).read()
    except tarfile.TarError as e:
        what = f"not a tar file, or a damaged one: {e}"
        raise UserError(path, what, "fetch it again") from None


def pictures_of_parquet(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of each value of bytes in a parquet file, row group by row group.

    Raise UserError, also if pyarrow is not installed.
    """
    check_pyarrow(path)
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        columns = [field.name for field in file.schema_arrow if has_bytes(field.type)]
        number = 0
        for batch in file.iter_batches(batch_size=16, columns=columns):
            for row in batch.to_pylist():
                for column, value in row.items():
                    for content in bytes_in(value):
                        yield f"{path}:row {number} {column}", content
                number += 1
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(path, printable(f"cannot be read: {e}", 300), "fetch it again") from None


def bytes_in(value: Any) -> Iterator[bytes]:
    """Yield each value of bytes inside of lists and structs."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from bytes_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from bytes_in(inner)
