"""Whose folder it is: this program writes into a folder that it made, or that is empty.

    own(folder, "run")          # before the first file is written

A name on a command line may be wrong. A folder that holds somebody else's files is refused,
whatever their names: none of them is overwritten, moved or deleted. A folder becomes ours by a
mark that the first start leaves in it, and stays ours however that start ends.
"""

from __future__ import annotations

from pathlib import Path

from checkpoints.files import write_file, writing
from config import UserError, printable

MARK = ".barellava"  # its content is the kind: run, export, shards, evaluation ...
HARMLESS = {".lock", ".DS_Store", "lost+found"}  # a folder with nothing but these counts as empty


def own(folder: Path, kind: str):
    """Make `folder` ours, for one kind of work.

    Raises UserError if it holds something and has no mark of this kind, or cannot be written.
    """
    where = str(folder)
    if folder.is_symlink() and not folder.exists():
        raise UserError(where, "a link to nowhere", "name another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(where, "a file, not a folder", "name another folder")

    found = marked(folder)
    if found == kind:
        return
    if found is not None:
        what = f"holds {printable(found, 40)}, which is not {kind}"
        raise UserError(where, what, "name another folder")

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in folder.iterdir() if path.name not in HARMLESS]
        if others:
            shown = printable(sorted(others)[0], 80)
            what = f"holds {shown} and other things that this program did not write"
            if len(others) == 1:
                what = f"holds {shown}, which this program did not write"
            raise UserError(where, what, "name a new or an empty folder; nothing was changed")
        write_file(folder / MARK, kind)


def marked(folder: Path) -> str | None:
    """Return the kind of work that a folder is marked for; None if it has no mark."""
    try:
        return (folder / MARK).read_text(encoding="utf-8", errors="replace")[:100]
    except OSError:
        return None
