"""Small files and folders: from a name to a folder, JSON in, any file out atomically.

    folder = resolve("org/name")                     # a local folder, or a Hugging Face id
    config = read_json(folder / "config.json")
    write_file(folder / "notes.txt", "text")         # a crash leaves the old file or the new one

`damaged` makes the error for a file that is not what its name says. What comes from outside is
opened with `open_regular`.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from checkpoints.seal import flush
from config import UserError

SMALL_FILES = ("*.json", "*.model", "*.jinja", "*.txt")  # configuration and tokenizer
SAFETENSORS = "*.safetensors"
PICKLES = "*pytorch_model*.bin"

# ----------------------------------------------------------------------------------------- folders


def resolve(
    name: str, where: str = "command line", allow_pickle: bool = False, small: bool = False
) -> Path:
    """Return the folder that a name means: local, else in the Hugging Face cache, else downloaded.

    where: what gave the name, for messages. allow_pickle: of a model without safetensors, download
    pytorch_model*.bin. small: configuration and tokenizer files are enough. Raises UserError if
    there is no such folder.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path

    is_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not is_id:
        fix = "give a folder or a Hugging Face id like org/name"
        raise UserError(f"{where}:{name!r}", "no such folder", fix)

    # First what is in the cache, so that nothing needs the network twice.
    for offline in (True, False):
        # Each way fails in many ways: not in the cache; no network, no such id, a gated model.
        with contextlib.suppress(Exception):
            folder = _snapshot(name, offline, allow_pickle, small)

            # The cache may hold the small files of a model and not its weights.
            if small or not offline or _has_weights(folder, allow_pickle):
                return folder
    what = "neither a folder, nor cached, nor to be downloaded"
    raise UserError(f"{where}:{name!r}", what, "check name and network")


def _snapshot(name: str, offline: bool, allow_pickle: bool, small: bool) -> Path:
    """Return the cache's folder of a Hugging Face id. Downloads what it lacks, unless offline."""
    from huggingface_hub import snapshot_download

    patterns = list(SMALL_FILES)
    if not small:
        patterns.append(SAFETENSORS)
    folder = snapshot_download(name, allow_patterns=patterns, local_files_only=offline)
    folder = Path(folder)

    # Pickles are the last resort: a model that has both kinds is downloaded once.
    if not small and allow_pickle and not any(folder.rglob(SAFETENSORS)):
        patterns.append(PICKLES)
        snapshot_download(name, allow_patterns=patterns, local_files_only=offline)
    return folder


def _has_weights(folder: Path, allow_pickle: bool) -> bool:
    """Say whether a folder has weights of a kind that may be opened."""
    if any(folder.rglob(SAFETENSORS)):
        return True
    return allow_pickle and any(folder.rglob("*.bin"))


# ----------------------------------------------------------------------------------------- reading


def open_regular(path: Path | str) -> BinaryIO:
    """Open a file to read its bytes. Raises OSError, also for all that is no regular file.

    Nobody knows what a name from outside means: opening a FIFO waits for a writer, a device may
    never end. Neither is opened to be read here.
    """
    # With O_NONBLOCK, opening a FIFO does not wait. Windows has neither FIFOs nor this flag.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        fd = os.open(path, flags)
    except ValueError:  # a zero byte or half a surrogate pair in it
        raise OSError(errno.EINVAL, "Not a file name", str(path)) from None

    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
        raise OSError(errno.EINVAL, "Not a regular file, but a FIFO or a device", str(path))
    return open(fd, "rb")


def read_json(path: Path, optional: bool = False) -> dict:
    """Return the JSON object in a file; {} if it is optional and absent. Raises UserError."""
    try:
        with open_regular(path) as file:
            content = file.read()
    except FileNotFoundError:
        if optional:
            return {}
        raise UserError(path, "missing", "give the folder of a complete checkpoint") from None
    except OSError as e:
        raise damaged(path, "JSON", e) from None
    try:
        value = parse_json(content)
    except ValueError as e:
        raise damaged(path, "JSON", e) from None
    if not isinstance(value, dict):
        raise UserError(path, "not a JSON object", "download it again")
    return value


def check_regular(path: Path):
    """Raise UserError if something is at `path` that is neither a file nor a folder.

    To open a pipe waits for a writer, and a device may never end. A folder and a missing file have
    messages of their own, from whoever opens them.
    """
    # os.path takes every name; Path refuses one that is too long.
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(path, "no regular file", "put the file itself there")


def parse_json(text: str | bytes, make_object: Callable[[list], dict] | None = None):
    """Return the value of a JSON text. Raises ValueError, and nothing else, if it is none.

    All JSON that comes from outside is read here. Python's reader raises RecursionError for deep
    nesting. It takes NaN and Infinity, as pandas writes them: whoever uses a number checks that it
    is finite (fields.py does).

    make_object: from the pairs (key, value) of an object to its dict; of one key twice the last
    counts by default.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")  # UnicodeDecodeError is a ValueError
    try:
        return json.loads(text, object_pairs_hook=make_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def damaged(path: Path, kind: str, error: Exception) -> UserError:
    """Return the error for a file that is not what its name says.

    It names what often lies in the place of a downloaded file. Where it is none of that, it quotes
    `error`. kind: what the file should be, in words.
    """
    other = stand_in(path, kind)
    if other is not None:
        return other

    # A message is one line.
    reason = " ".join(str(error).split())[:120]
    return UserError(path, f"not {kind} ({reason})", "download it again")


def stand_in(path: Path, kind: str = "the file itself") -> UserError | None:
    """Return the error for what often lies in the place of a downloaded file; None if none does."""
    check_regular(path)
    try:
        with open_regular(path) as f:
            head = f.read(64).lstrip()
    except OSError as e:
        return UserError(path, f"cannot be read ({e.strerror})", "give a folder of readable files")

    if not head:
        return UserError(path, "an empty file", "download it again")
    if head.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer, not the file itself"
        return UserError(path, what, "run git lfs pull, or download it again")
    if head.startswith(b"<"):
        fix = "download it again; a gated model needs a login"
        return UserError(path, f"an HTML page, not {kind}", fix)
    return None


# ----------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def writing(path: Path, fix: str = "make room or allow writing there, or name another folder"):
    """Turn a failure to write (full disk, read-only folder) into a UserError, which is one line.

    Everything that writes for the user stands inside of one: with writing(folder): ...
    A name that begins with ~ is refused: a folder ~ is easily made, and rm -r ~ is a disaster.
    """
    first = Path(path).parts[:1]
    if first and first[0].startswith("~") and not Path(first[0]).exists():
        raise UserError(path, "begins with ~, which only a shell replaces", "write the whole path")
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # OSError, or what safetensors makes of one
        what = f"cannot be written: {getattr(e, 'strerror', None) or e}"
        raise UserError(path, what, fix) from None


def write_file(path: Path, write: Callable[[str], object] | str | bytes):
    """Create or replace a file, so that a crash at any moment leaves the old one or the new one.

    write: the content, or a function that writes it to the path of a temporary file. Raises
    OSError, also for a device or a FIFO: a file in its place would be no such thing any more.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "Not a regular file, but a FIFO or a device", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)

    # In the same folder, because a rename is atomic only within one file system.
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(fd)
    try:
        if callable(write):
            write(temporary)
        elif isinstance(write, str):
            Path(temporary).write_bytes(write.encode())
        else:
            Path(temporary).write_bytes(write)

        # The content must be on the disk before the name points to it.
        flush(Path(temporary))
        os.chmod(temporary, 0o644)  # mkstemp lets nobody else read it
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_temporaries(path: Path):
    """Remove what is left of writes of this file that were killed.

    Call it only where nobody else may write the file at this moment. Raises OSError.
    """
    # The names that mkstemp makes in `write_file`.
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        temporary.unlink(missing_ok=True)
