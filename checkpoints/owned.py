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

# A folder with nothing but these counts as empty. A demo's folder may get its data, which is named
# world, before the run: nothing of that name is ever written, moved or deleted by a run.
HARMLESS = {".lock", ".DS_Store", "lost+found", "world"}


def own(folder: Path, kind: str):
    """Make `folder` ours, for one kind of work.

    Raises UserError if it holds something and has no mark of this kind, or cannot be written.
    """
    with writing(folder):
        if folder.is_symlink() and not folder.exists():
            raise UserError(folder, "a link to nowhere", "name another folder")
        if folder.exists() and not folder.is_dir():
            raise UserError(folder, "a file, not a folder", "name another folder")

        found = marked(folder)
        if found == kind:
            return
        if found is not None:
            what = f"holds {printable(found or 'an empty mark', 40)}, which is not {kind}"
            raise UserError(folder, what, "name another folder")

        folder.mkdir(parents=True, exist_ok=True)
        others = _others(folder)
        if others:
            shown = printable(others[0], 80)
            what = f"holds {shown} and other things that this program did not write"
            if len(others) == 1:
                what = f"holds {shown}, which this program did not write"
            fix = "name a new or an empty folder; of an older version's own folder, "
            fix += f"write the word {kind} into {folder / MARK}"
            raise UserError(folder, what, fix)
        write_file(folder / MARK, kind)


def _others(folder: Path) -> list[str]:
    """Return the names in a folder that count, sorted."""
    others = []
    for path in folder.iterdir():
        # A start that was killed while it wrote the mark leaves the mark's temporary file.
        is_unfinished_mark = path.name.startswith(f".{MARK}.")
        if path.name not in HARMLESS and not is_unfinished_mark:
            others.append(path.name)
    return sorted(others)


def marked(folder: Path) -> str | None:
    """Return the kind of work that a folder is marked for; None if it has no mark."""
    mark = folder / MARK
    try:
        if not mark.is_file():
            return None
        return mark.read_text(encoding="utf-8", errors="replace")[:100].strip()
    except OSError:
        return None
