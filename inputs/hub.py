"""Data sets of the Hugging Face Hub by their id: from the local cache, or downloaded.

    find("user/dataset")                   # Found(kind="parquet", files=[...], ...)
    find("user/dataset/config")            # a folder of it
    find("user/dataset/data/val-*.json")   # files of it

The cache is searched as huggingface_hub keeps it, and without that package. What is not in it is
downloaded with huggingface_hub, and only the files of rows that folders.py chooses. They are
read as files on the disk are: no code of a data set is ever run.
"""

from __future__ import annotations

import glob
import os
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from config import UserError, printable
from inputs import folders
from inputs.folders import Found, choose_files, list_folder
from inputs.kinds import ENDINGS

NAME = r"[A-Za-z0-9][\w.-]*"
SHARD_OF = re.compile(r"-(\d{5})-of-(\d{5})")


class HubId(NamedTuple):
    """A data set of the Hub, or a part of it."""

    repo: str  # "user/dataset"
    inside: str  # a folder or files of it; "" for all


def parse_id(data: str | Path) -> HubId | None:
    """Return the id that some data's name may be; None if it is the name of a local file.

    The name of what is there locally is asked for nowhere else.
    """
    text = str(data).rstrip("/")
    match = re.fullmatch(rf"({NAME}/{NAME})(?:/(.+))?", text)
    if not match or os.path.isdir(text.split("/")[0]):
        return None
    repo, inside = match.groups(default="")
    name = HubId(repo, inside.strip("/"))

    # data/rows.json, or out/data/rows.json, is a file that is not there.
    if os.path.splitext(text)[1].lower() in ENDINGS and (not inside or cached(repo) is None):
        return None
    return name


def find(data: str | Path) -> Found:
    """Return what an id means. Raise UserError if it is neither cached nor to be downloaded."""
    name = parse_id(data)
    folder = cached(name.repo)
    what = "neither a file or folder here, nor in the Hugging Face cache, nor to be downloaded"
    if folder is not None:
        missing = missing_in(folder, name)
        if not missing:
            return find_in(folder, name, data)
        what = f"the Hugging Face cache lacks {missing} of it, and it cannot be downloaded"

    try:
        folder = download(name, data)
    except UserError:
        raise
    except Exception as e:  # no network, no such id, a gated data set: each fails in many ways
        fix = f"check the name, or run {command(name)}"
        raise UserError(data, f"{what} ({why(e)})", fix) from None
    return find_in(folder, name, data)


def command(name: HubId) -> str:
    """Return the command that downloads a data set."""
    said = f"hf download --repo-type dataset {name.repo}"
    if name.inside:
        said += f' --include "{name.inside}*"'
    return said


def why(error: Exception) -> str:
    """Return why a download failed, in a few words."""
    if isinstance(error, ModuleNotFoundError):
        return "huggingface_hub is not installed: pip install huggingface_hub"
    return printable(" ".join(str(error).split()), 100) or type(error).__name__


# ------------------------------------------------------------------------------------- the cache


def cache_folder() -> Path:
    """Return where huggingface_hub keeps what it downloads."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()

    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(home).expanduser() / "hub"


def cached(repo: str) -> Path | None:
    """Return the folder of a data set's current revision in the cache; None if there is none."""
    home = cache_folder() / f"datasets--{repo.replace('/', '--')}"
    try:
        revision = (home / "refs" / "main").read_text().strip()
        folder = home / "snapshots" / revision
        if re.fullmatch("[0-9A-Za-z]+", revision) and folder.is_dir():
            return folder
    except (OSError, UnicodeDecodeError):
        pass

    # It was downloaded by the name of a revision.
    try:
        snapshots = sorted(home.glob("snapshots/*"), key=lambda path: path.stat().st_mtime)
    except OSError:
        return None
    return snapshots[-1] if snapshots else None


def missing_in(folder: Path, name: HubId) -> str:
    """Return what a cached folder lacks of what is meant, in words; "" if nothing is known to be.

    Only names that count themselves tell: 00000-of-00004.
    """
    there = list_folder(folder)
    names = meant_by(name, there)
    if not names:
        return name.inside or "all files of rows"

    # Some have a hash behind the count: data/train-00000-of-00004-ab12.parquet.
    counted = set()
    for file in there:
        match = SHARD_OF.search(file)
        if match:
            counted.add(file[: match.end()])

    for file in names:
        match = SHARD_OF.search(file)
        if match:
            for number in range(int(match[2])):
                other = f"{file[: match.start()]}-{number:05d}-of-{match[2]}"
                if other not in counted:
                    return other
    return ""


def meant_by(name: HubId, names: list[str]) -> list[str]:
    """Return which of all files of a data set hold the rows that are meant."""
    if not name.inside:
        return choose_files(names).names

    # A folder of it, or else files.
    prefix = f"{name.inside}/"
    inside = [file.removeprefix(prefix) for file in names if file.startswith(prefix)]
    if inside:
        return [prefix + file for file in choose_files(inside).names]
    return [file for file in names if fnmatchcase(file, name.inside)]


def find_in(folder: Path, name: HubId, data: str | Path) -> Found:
    """Return what a downloaded data set holds. Raise UserError."""
    meant = meant_by(name, list_folder(folder))
    if name.inside and not (folder / name.inside).is_dir():
        return folders.of_files([folder / file for file in sorted(meant)], data)
    check_one_config(meant, name, data)
    return folders.find(folder / name.inside, data)


def check_one_config(names: list[str], name: HubId, data: str | Path):
    """Raise UserError if rows lie in folders that are data sets of their own."""
    if name.inside or folders.has_pictures(names):
        return
    tops = {file.split("/")[0] for file in names if "/" in file}
    configs = sorted(top for top in tops if not folders.split_of(top) and top != "data")
    if len(configs) > 1:
        listed = printable(", ".join(configs), 200)
        what = f"{len(configs)} data sets: {listed}"
        raise UserError(data, what, f"name one, such as {name.repo}/{configs[0]}")


# ---------------------------------------------------------------------------------- the download


def download(name: HubId, data: str | Path) -> Path:
    """Return the folder of a data set whose rows have been downloaded. Raise nearly anything."""
    from huggingface_hub import HfApi, snapshot_download

    # Other calls that list files try for half a minute where there is no network.
    files = HfApi().dataset_info(name.repo, timeout=10).siblings
    names = [file.rfilename for file in files or []]
    wanted = meant_by(name, names)
    if not wanted:
        what = f"the data set has no rows in {name.inside or 'it'}"
        raise UserError(data, what, f"see https://huggingface.co/datasets/{name.repo}/tree/main")
    check_one_config(wanted, name, data)

    # A metadata file names pictures, which may lie anywhere beside it.
    if any(os.path.basename(file) in folders.METADATA for file in wanted):
        wanted = names
    patterns = [glob.escape(file) for file in wanted]
    return Path(snapshot_download(name.repo, repo_type="dataset", allow_patterns=patterns))
