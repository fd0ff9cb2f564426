"""Which kind of rows a file holds: its content decides, and not its name.

kind_of_rows(Path("rows.json"))   # "list", "lines", "object", "table", "tar" or "parquet"

list      a JSON list of rows
lines     one row, a JSON object, a line
object    one JSON object, which is no list of rows, and one row in a file .jsonl
table     rows of cells that are parted by commas, semicolons or tabs; the first line names them
tar       shards in the WebDataset layout
parquet   row groups of Apache Parquet
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import BinaryIO

from checkpoints.files import open_regular, parse_json
from inputs.forms import is_known
from inputs.sniff import check_may_be_rows
from inputs.table_rows import BOM, header_of

HEAD = 1 << 16  # bytes of a file that are enough to tell lines from an object of many lines
LONGEST_LINE = 1 << 26  # bytes of the first line that are looked at: rows may hold pictures
TAR_HEADER = 512  # bytes
PARQUET = b"PAR1"  # how such a file begins

# By the ending of a file's name, where the content does not tell.
ENDINGS = {
    ".json": "list",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".csv": "table",
    ".tsv": "table",
    ".tar": "tar",
    ".parquet": "parquet",
}


def kind_of_rows(file: Path) -> str:
    """Return what kind of rows a file holds.

    Where the content does not tell, as in an empty or a damaged file, the name's ending does: that
    format says what is wrong with the file. Raise UserError for what holds no rows, and OSError if
    it cannot be read.
    """
    with open_regular(file) as opened:
        head = opened.read(HEAD)
        if head.startswith(PARQUET):
            return "parquet"
        if is_tar(head):
            return "tar"
        by_name = ENDINGS.get(file.suffix.lower(), "list")
        if by_name in ("tar", "parquet"):
            return by_name

        check_may_be_rows(head, file)
        text = head.removeprefix(BOM).lstrip()
        if text.startswith(b"["):
            # In lines, a row that is a list is one bad row.
            is_list = text[1:].lstrip().startswith((b"{", b"]"))
            if by_name == "lines" and not is_list:
                return "lines"
            return "list"
        if text.startswith(b"{"):
            return kind_of_objects(opened, by_name)

    if by_name == "list" and is_table(head):
        return "table"
    return by_name


def is_tar(head: bytes) -> bool:
    """Say whether a file begins with the header of a member of a tar file, by its check sum.

    Files of before POSIX have no other mark.
    """
    header = head[:TAR_HEADER]
    if len(header) < TAR_HEADER or not header.strip(b"\0"):
        return False
    written = re.match(rb"[ \0]*([0-7]+)", header[148:156])
    if not written:
        return False
    # The sum counts itself as blanks. Some old writers took bytes as signed.
    counted = header[:148] + b" " * 8 + header[156:]
    negative = sum(256 for byte in counted if byte > 127)
    return int(written[1], 8) in (sum(counted), sum(counted) - negative)


def kind_of_objects(opened: BinaryIO, by_name: str) -> str:
    """Return the kind of a text that begins with {: one object, or one in each line."""
    if by_name == "lines":
        return "lines"
    opened.seek(0)
    first = b""
    while not first.removeprefix(BOM).strip():
        first = opened.readline(LONGEST_LINE)
    rest = opened.read(HEAD)
    try:
        parse_json(first)
    except ValueError:
        # Either an object of many lines, or a bad row that others follow.
        following = re.search(rb"^[{]\s*\"", rest, re.MULTILINE)
        return "lines" if following else "object"
    return "lines" if rest.strip() else "object"


def is_table(head: bytes) -> bool:
    """Say whether a text begins with a line that names columns, of which one at least is known."""
    try:
        names, _ = header_of(head)
    except ValueError:
        return False
    return len(names) > 1 and any(is_known(name) for name in names)
