"""Rows of parquet files: one file, or the many shards of a data set, with pictures as bytes.

    rows = open_rows("data/*.parquet")       # or a folder of them, or one file
    rows[7], rows.media(7, rows[7])          # as every format has them (rows.py)
    rows.blocks                              # how rows lie in row groups
    rows.numbers("relevance_min")            # (n,) float64: one column of all rows

A parquet file keeps its rows in row groups, and a row group column by column, compressed. To read a
row is to read the columns of its row group. So a worker holds the last few row groups that it
read: as many as fit into HELD bytes, at least one. `blocks` says how many, and data.Order shuffles
so that all their rows are used before others are read. An epoch then reads a row group once in each
worker of each rank. That is cheap beside decoding pictures: 7 MB take 7 ms, and the 100 photographs
in them half a second. Row groups of some megabytes are best: one of a gigabyte takes a gigabyte in
each worker. A mixture holds as much of each of its sources.

Only columns that a row needs are read: those that forms.py asks for by their name, and texts,
numbers and truth values, which stay in the row as what it also has. The others are left out.

Where row groups lie is kept beside each file (index.py), so that a later start parses no footers.

The file in order: the class; what is read of a file; errors. It needs pyarrow.
"""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from checkpoints.files import open_regular
from config import UserError, printable
from inputs.file_rows import Blocks, FileRows, file_state, named
from inputs.forms import PART_OF, Row, maps_media, read_row
from inputs.index import cached_array
from inputs.media import MEDIA
from inputs.sniff import HEAD, looks_like, reason
from inputs.turns import OPTIONS

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, DataType, Schema, Table
    from pyarrow.parquet import FileMetaData, ParquetFile

HELD = 2**26  # bytes of row groups that a worker holds, before compression

# A column chunk of fewer bytes, besides the numbers of its values, may be a dictionary only. Its
# values are not written out then: a picture that many rows share is in memory once.
DICTIONARY = 2**21

LAST = 8  # bytes of a file: the length of its footer, and PAR1

FIX = "write or fetch the file again"


class RowGroup(NamedTuple):
    """Rows that are read together."""

    names: list[str]  # of all columns
    table: Table  # of those that rows need


class ParquetRows(FileRows):
    """The rows of a parquet file, or of several; see rows.Rows for what its methods promise."""

    def open_files(self) -> list[int]:
        """Raise UserError, also if pyarrow is not installed."""
        check_pyarrow(self.file)
        self.indexes = [load_index(file) for file in self.files]
        rows_of_files = [number_of_rows(index) for index in self.indexes]
        if not sum(rows_of_files):
            raise UserError(self.file, "no rows", "write the rows again")

        # The same for all files: group_ends[g] is the end of row group g, which is one of the file
        # group_files[g].
        ends = []
        begin = 0
        for index, rows in zip(self.indexes, rows_of_files, strict=True):
            ends.append(begin + index[:, 0])
            begin += rows
        self.group_ends = np.concatenate(ends)
        groups_of_files = [len(index) for index in self.indexes]
        self.group_files = np.repeat(np.arange(len(self.files)), groups_of_files)

        # The largest row group decides, so that memory is bounded whichever are read.
        largest = max(int(index[:, 2].max(initial=1)) for index in self.indexes)
        self.blocks = Blocks(self.group_ends, max(1, HELD // max(1, largest)))
        self.held: OrderedDict[int, RowGroup] = OrderedDict()
        return rows_of_files

    def __getitem__(self, i: int) -> Row:
        i = range(len(self))[i]
        place = self.place(*self.find_row(i))
        group = int(np.searchsorted(self.group_ends, i, side="right"))
        names, table = self._row_group(group)

        # The row group and its table end together.
        number = table.num_rows - int(self.group_ends[group]) + i
        try:
            [values] = table.slice(number, 1).to_pylist()
        except Exception as e:  # a text that is not UTF-8, a time that Python does not have
            raise UserError(place, f"cannot be read: {one_line(e)}", FIX) from None

        # A null stands for nothing, as NaN does that pandas may write in its place.
        raw = {}
        for name, value in values.items():
            if value is not None and not is_nan(value):
                raw[name] = value
        row = read_row(raw, named(place, raw), self.columns)

        # It is of no known form: the message of that names the columns there are.
        if "conversations" not in row:
            for name in names:
                row.setdefault(name)
        return row

    def numbers(self, column: str) -> np.ndarray:
        """Return a column of all rows, (n,) float64, without reading the others.

        A value that is missing is NaN. Raise UserError if no file has the column, or it has no
        numbers.
        """
        found = []
        names: set[str] = set()
        for k, (file, begin, end) in enumerate(self.file_spans()):
            with self._opened(k) as parquet:
                here = parquet.schema_arrow.names
                names.update(here)
                if column in here:
                    values = parquet.read([column], use_threads=False).column(column)
                    found.append(to_numbers(values, f"{file}: {column}"))
                else:
                    found.append(np.full(end - begin, np.nan))

        if column not in names:
            what = f"no column {column!r}, only {printable(', '.join(sorted(names)), 200)}"
            raise UserError(self.file, what, "name one of them")
        return np.concatenate(found)

    def _row_group(self, group: int) -> RowGroup:
        """Return a row group, read unless it is held. Raise UserError."""
        if group in self.held:
            self.held.move_to_end(group)
            return self.held[group]

        # Let go of the one that was not used for longest, before the next takes its memory.
        while len(self.held) >= self.blocks.at_once:
            self.held.popitem(last=False)

        k = int(self.group_files[group])
        number = group - int(np.searchsorted(self.group_files, k))
        rows = int(np.diff(self.indexes[k][:, 0], prepend=0)[number])
        with self._opened(k, number) as parquet:
            names = parquet.schema_arrow.names
            wanted = wanted_columns(parquet.schema_arrow, self.columns or {})
            table = parquet.read_row_group(number, wanted, use_threads=False)
            if table.num_rows != rows:
                raise ValueError(f"row group {number} has {table.num_rows} rows, not {rows}")
        self.held[group] = RowGroup(names, table)
        return self.held[group]

    @contextmanager
    def _opened(self, k: int, group: int | None = None) -> Iterator[ParquetFile]:
        """Open file k, to read one of its row groups or all. What goes wrong is a UserError."""
        from pyarrow import parquet

        file = self.files[k]
        with readable(file), open_regular(file) as opened:
            if file_state(os.fstat(opened.fileno())) != self.states[file]:
                raise UserError(file, "has changed since it was opened", "start again")
            footer = parquet.read_metadata(opened)
            shared = []
            if group is not None:
                shared = dictionaries(footer, group)
            yield parquet.ParquetFile(
                opened,
                metadata=footer,
                read_dictionary=shared,
                page_checksum_verification=True,  # of files that have them
            )


# ---------------------------------------------------------------------------------- what is read


def load_index(file: Path) -> np.ndarray:
    """Return the index of a file: (end, start, size) of each row group, (m, 3) int64.

    end: where its rows end, counted from 0 in the file; start: the byte of the file where it
    begins; size: its bytes before compression.

    Raise UserError, or OSError if there is no such file.
    """
    index = cached_array(file, "index", lambda: scan(file), read_footer)
    rows = np.diff(index[:, 0], prepend=0)
    if (rows < 0).any() or (index < 0).any():
        raise UserError(f"{file}.index", "not the index of this file", "remove it")
    return index


def scan(file: Path) -> np.ndarray:
    """Return the index of a file, by its footer. Raise UserError."""
    from pyarrow import parquet

    entries = []
    end = 0
    with readable(file), open_regular(file) as opened:
        footer = parquet.read_metadata(opened)
        check_names(footer.schema.to_arrow_schema().names)
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            first = group.column(0)
            start = first.data_page_offset
            if first.has_dictionary_page:
                start = first.dictionary_page_offset
            if min(group.num_rows, start, group.total_byte_size) < 0:
                raise ValueError(f"row group {number} has a size below zero")
            end += group.num_rows
            entries.append((end, start, group.total_byte_size))
        if end != footer.num_rows:
            raise ValueError(f"{footer.num_rows} rows, and its row groups have {end}")
    return np.array(entries, np.int64).reshape(-1, 3)


def number_of_rows(index: np.ndarray) -> int:
    """Return how many rows a file has, by its index."""
    return int(index[:, 0].max(initial=0))


def read_footer(file: BinaryIO) -> bytes:
    """Return the footer of an open file, on which its index depends."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - LAST))
    last = file.read(LAST)

    # A damaged file may say any length.
    length = int.from_bytes(last[:4], "little")
    file.seek(max(0, size - LAST - length))
    return file.read()


def wanted_columns(schema: Schema, columns: dict[str, str]) -> list[str]:
    """Return the names of the columns that rows need, in the order of the file.

    They are those that may be a part of a row (forms.KEYS, `columns`), and those of plain values.
    Where `columns` names no pictures, also those that may hold some, so that forms.py refuses a row
    whose pictures nothing would read.
    """
    has_pictures = maps_media(columns)
    if not has_pictures and not any(PART_OF.get(name.lower()) in MEDIA for name in schema.names):
        return schema.names  # forms.py looks for pictures in all of them

    wanted = []
    for field in schema:
        name = field.name.lower()
        part = PART_OF.get(name)
        is_part = part is not None and part not in columns
        is_asked = is_part or name in OPTIONS or field.name in columns.values()
        may_be_picture = not has_pictures and has_bytes(field.type)
        if is_asked or may_be_picture or is_plain(field.type):
            wanted.append(field.name)
    return wanted


def has_bytes(kind: DataType) -> bool:
    """Say whether a type holds bytes, also inside of lists and structs."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return has_bytes(kind.value_type)
    if types.is_binary(kind) or types.is_large_binary(kind):
        return True
    if types.is_binary_view(kind) or types.is_fixed_size_binary(kind):
        return True
    return any(has_bytes(kind.field(i).type) for i in range(kind.num_fields))


def is_plain(kind: DataType) -> bool:
    """Say whether values of a type are texts, numbers or truth values."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_number = types.is_integer(kind) or types.is_floating(kind)
    return is_text or is_number or types.is_boolean(kind)


def dictionaries(footer: FileMetaData, group: int) -> list[str]:
    """Return the columns of a row group that are to stay dictionaries, by their paths."""
    found = []
    for i in range(footer.num_columns):
        column = footer.schema.column(i)
        chunk = footer.row_group(group).column(i)
        is_bytes = column.physical_type == "BYTE_ARRAY"
        is_text_or_bytes = is_bytes and column.converted_type in ("NONE", "UTF8")
        if is_text_or_bytes and chunk.total_uncompressed_size < DICTIONARY + 4 * chunk.num_values:
            found.append(column.path)
    return found


def is_nan(value: Any) -> bool:
    """Say whether a value is the number NaN."""
    return isinstance(value, float) and value != value


def to_numbers(values: ChunkedArray, where: str) -> np.ndarray:
    """Return a column as (n,) float64, with NaN for what is missing. Raise UserError at `where`."""
    from pyarrow import ArrowException

    try:
        return values.cast("float64", safe=False).to_numpy()
    except ArrowException:
        what = f"its values are {printable(values.type, 60)}, not numbers"
        raise UserError(where, what, "name a column of numbers") from None


# ---------------------------------------------------------------------------------------- errors


def check_pyarrow(file: Path):
    """Raise UserError if pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("pyarrow", f"reads {file}, not installed", "pip install pyarrow") from None


def check_names(names: list[str]):
    """Raise ValueError if two columns have the same name."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"several columns named {printable(twice[0], 60)!r}")


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Make one line of what goes wrong inside, where a file is read. Raise UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # pyarrow has errors of many kinds, not all of them its own
        raise UserError(file, damage(file, e), FIX) from None


def damage(file: Path, error: Exception) -> str:
    """Return what is wrong with a file, by what reading it raised."""
    with suppress(OSError), open_regular(file) as opened:
        other = looks_like(opened.read(HEAD))
        if other:
            return f"no parquet file but {other}"
    return f"not a parquet file, or a damaged one: {one_line(error)}"


def one_line(error: Exception) -> str:
    """Return what an error says, in at most 200 characters of one line."""
    if isinstance(error, OSError) and error.strerror:
        return reason(error)
    return printable(" ".join(str(error).split()), 200)
