"""Small files and folders: a name to a folder, JSON in, anything out atomically."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path

from checkpoints.seal import flush
from config import UserError


def resolve(
    name: str, where: str = "command line", allow_pickle: bool = False, small: bool = False
) -> Path:
    """A folder from a name: a local folder, else the Hugging Face cache, else a download through huggingface_hub.

    allow_pickle also downloads pytorch_model*.bin, of a model without safetensors; small asks for the configuration
    and tokenizer files alone. Raises UserError when none of the three has it.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    local_only = name.count("/") != 1 or name.startswith((".", "/", "~"))
    if not name or local_only:
        raise UserError(
            f"{where}:{name!r}",
            "no such folder",
            "give a folder or a Hugging Face id like org/name",
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model", "*.jinja", "*.txt"] + ["*.safetensors"] * (not small)
    for offline in (True, False):
        with contextlib.suppress(Exception):  # not cached; then: no network, no such id, gated
            folder = Path(
                snapshot_download(name, allow_patterns=patterns, local_files_only=offline)
            )
            if not small and allow_pickle and not any(folder.rglob("*.safetensors")):
                snapshot_download(
                    name,
                    allow_patterns=[*patterns, "*pytorch_model*.bin"],
                    local_files_only=offline,
                )
            kinds = ["*.safetensors"] + ["*.bin"] * allow_pickle
            if small or not offline or any(file for kind in kinds for file in folder.rglob(kind)):
                return folder  # and not a cache without the weights
    raise UserError(
        f"{where}:{name!r}",
        "neither a folder, nor cached, nor to be downloaded",
        "check name and network",
    )


def damaged(path: Path, kind: str, error: Exception) -> UserError:
    """The error for a file that is not what its name says, by what most often lies in such a file's place."""
    try:
        with open(path, "rb") as f:
            head = f.read(64).lstrip()
    except OSError as e:
        return UserError(path, f"cannot be read ({e.strerror})", "give a folder of readable files")
    if not head:
        return UserError(path, "an empty file", "download it again")
    if head.startswith(b"version https://git-lfs"):
        return UserError(
            path, "a Git LFS pointer, not the file itself", "run git lfs pull, or download it again"
        )
    if head.startswith(b"<"):
        return UserError(
            path, f"an HTML page, not {kind}", "download it again; a gated model needs a login"
        )
    return UserError(
        path, f"not {kind} ({' '.join(str(error).split())[:120]})", "download it again"
    )


def read_json(path: Path, optional: bool = False) -> dict:
    """A JSON object from a file; {} for an optional file that is absent."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if optional:
            return {}
        raise UserError(path, "missing", "give the folder of a complete checkpoint") from None
    except (OSError, ValueError) as e:
        raise damaged(path, "JSON", e) from None
    if not isinstance(value, dict):
        raise UserError(path, "not a JSON object", "download it again")
    return value


def write_file(path: Path, write):
    """Atomically create or replace a file: `write(temporary_path)`, fsync, rename. `write` may also be str or bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(fd)
    try:
        if callable(write):
            write(temporary)
        else:
            Path(temporary).write_bytes(write.encode() if isinstance(write, str) else write)
        flush(Path(temporary))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
