"""Strict safetensors in and out: what a file holds is what the module gets, or an error names the key.

A checkpoint is read lazily from memory-mapped files and assigned, never copied: a parameter that keeps its
dtype costs no memory until it is touched. A rename table is a list of (theirs, ours) pairs in which `*` stands
for one dotted component and `**` for any tail; it is used forwards to load and backwards to save.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from config import UserError

Table = tuple[tuple[str, str], ...]
SHARD_BYTES = 5_000_000_000  # Hugging Face's own shard size


def resolve(name: str, where: str = "command line") -> Path:
    """A folder from a name: a local folder, else the Hugging Face cache, else a download through huggingface_hub.

    Raises UserError when none of the three has it.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    local_only = name.count("/") != 1 or name.startswith((".", "/", "~"))
    if not name or local_only:
        raise UserError(f"{where}:{name!r}", "no such folder", "give a folder or a Hugging Face id like org/name")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    for offline in (True, False):
        with contextlib.suppress(Exception):  # not cached; then: no network, no such id, gated
            return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=offline))
    raise UserError(f"{where}:{name!r}", "neither a folder, nor cached, nor to be downloaded", "check name and network")


def read_json(path: Path, optional: bool = False) -> dict:
    """A JSON object from a file; {} for an optional file that is absent."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if optional:
            return {}
        raise UserError(path, "missing", "give the folder of a complete checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(path, f"not JSON ({e})", "download it again") from None
    if not isinstance(value, dict):
        raise UserError(path, "not a JSON object", "download it again")
    return value


@cache
def _pattern(glob: str) -> re.Pattern:
    parts = re.split(r"(\*\*|\*)", glob)
    return re.compile("".join({"**": "(.+)", "*": r"([^.]+)"}.get(p, re.escape(p)) for p in parts))


def rename(key: str, table: Iterable[tuple[str, str]]) -> str:
    """The first pair whose left side matches decides; a key that none matches keeps its name."""
    for left, right in table:
        if match := _pattern(left).fullmatch(key):
            groups = iter(match.groups())
            return re.sub(r"\*\*|\*", lambda _: next(groups), right)  # noqa: B023
    return key


def reverse(table: Table) -> Table:
    return tuple((ours, theirs) for theirs, ours in table)


def matches(key: str, globs: Iterable[str]) -> bool:
    return any(_pattern(g).fullmatch(key) for g in globs)


class Checkpoint(Mapping):
    """The tensors of a folder, by key, read when asked for: `model.safetensors` or an index and its shards."""

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        if index.exists():
            files = read_json(index).get("weight_map", {})
            names = sorted(set(files.values()))
            if any(Path(n).name != n for n in names):
                raise UserError(index, "a shard outside the folder", "download the checkpoint again")
        else:
            files, names = None, ["model.safetensors"]
        self.folder, self.where = folder, {}
        self._open = {}
        for name in names:
            path = folder / name
            try:
                self._open[name] = handle = safe_open(path, framework="pt")
                keys = list(handle.keys())
            except FileNotFoundError:
                raise UserError(path, "missing", "give a folder with model.safetensors or its shards") from None
            except (SafetensorError, OSError) as e:
                raise UserError(path, f"not a whole safetensors file ({e})", "download it again") from None
            for key in keys:
                if key in self.where:
                    raise UserError(f"{path}:{key}", f"also in {self.where[key]}", "download the checkpoint again")
                self.where[key] = name
        if files is not None and files != self.where:
            odd = sorted(set(files) ^ set(self.where)) or [k for k in files if files[k] != self.where[k]]
            raise UserError(f"{index}:{odd[0]}", "index and shards disagree", "download the checkpoint again")

    def __getitem__(self, key: str) -> Tensor:
        return self._open[self.where[key]].get_tensor(key)

    def __iter__(self):
        return iter(self.where)

    def __len__(self):
        return len(self.where)

    def file(self, key: str) -> Path:
        return self.folder / self.where[key]


def load(
    module: nn.Module,
    source: Mapping[str, Tensor],
    table: Table = (),
    prefix: str = "",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignore: Iterable[str] = (),
) -> set[str]:
    """Fill every parameter and buffer of `module` from the keys of `source` that start with `prefix`.

    The module may be on the meta device. A key must be a parameter (after renaming), or match `module.spare` (kept
    aside in `module.spares`, written back on saving: tensors that belong to the checkpoint but not to our forward
    pass), or match `ignore`. Tied parameters (`module.tied`: alias -> owner) need no key of their own.
    Returns the keys it used. Raises UserError for a missing, unexpected, duplicate or wrongly shaped tensor.
    """
    tied: dict[str, str] = getattr(module, "tied", {})
    spare: tuple[str, ...] = getattr(module, "spare", ())
    wanted = {k: v for k, v in module.state_dict(keep_vars=True).items() if k not in tied}
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    file = getattr(source, "file", lambda key: "checkpoint")
    for key in source:
        if not key.startswith(prefix):
            continue
        ours = rename(key.removeprefix(prefix), table)
        if ours in tied and tied[ours] in wanted:
            # Some files store the tied copy too. Fine while it is a copy; another value would be lost silently.
            owner = next((k for k in source if rename(k.removeprefix(prefix), table) == tied[ours]), None)
            if owner is None:
                ours = tied[ours]
            elif not torch.equal(source[key], source[owner]):
                raise UserError(f"{file(key)}:{key}", f"differs from {owner}, to which the config ties it",
                                "set tie_word_embeddings to false in config.json")  # fmt: skip
        used.add(key)
        if ours in wanted:
            if ours in found:
                raise UserError(f"{file(key)}:{key}", f"a second tensor for {ours}", "remove one of the two")
            tensor, want = source[key], wanted[ours]
            if tensor.shape != want.shape:
                raise UserError(f"{file(key)}:{key}", f"shape {[*tensor.shape]}, the config needs {[*want.shape]}",
                                "use the config.json that belongs to these weights")  # fmt: skip
            keep = dtype is None or not tensor.is_floating_point()
            found[ours] = tensor.to(device=device, dtype=tensor.dtype if keep else dtype)
        elif ours in tied or matches(ours, ignore):
            continue
        elif matches(ours, spare):
            module.spares[ours] = source[key]
        else:
            raise UserError(
                f"{file(key)}:{key}", "a tensor this model has no place for", "check config.json's model_type"
            )
    missing = sorted(set(wanted) - set(found))
    if missing:
        theirs = prefix + rename(missing[0], reverse(table))
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        folder = getattr(source, "folder", "checkpoint")
        raise UserError(
            f"{folder}:{theirs}",
            f"missing from the weights{more}",
            "give the folder of a complete checkpoint",
        )
    module.load_state_dict(found, strict=False, assign=True)
    for alias, owner in tied.items():
        parent, _, name = alias.rpartition(".")
        setattr(module.get_submodule(parent), name, module.get_parameter(owner))
    return used


def tensors(module: nn.Module, table: Table = (), prefix: str = "") -> dict[str, Tensor]:
    """The opposite of `load`: every tensor of the module (and its spares) under the file's names, tied ones once."""
    tied = getattr(module, "tied", {})
    state = {k: v for k, v in module.state_dict().items() if k not in tied} | getattr(module, "spares", {})
    return {prefix + rename(k, reverse(table)): v.detach() for k, v in state.items()}


def fsync_folder(folder: Path):
    """Make renames in a folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def copy_files(source: Path, target: Path, names: Iterable[str]):
    """Copy the named files that exist, atomically."""
    for name in names:
        if (source / name).exists():
            write_file(target / name, lambda tmp, name=name: shutil.copyfile(source / name, tmp))


def save(folder: Path, state: dict[str, Tensor], shard_bytes: int = SHARD_BYTES):
    """Write tensors as `model.safetensors`, or as shards and, last, their index."""
    shards, size = [{}], 0
    for key, tensor in state.items():
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor.contiguous().cpu()
        size += tensor.nbytes
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, lambda tmp, shard=shard: save_file(shard, tmp, metadata={"format": "pt"}))
    index = folder / "model.safetensors.index.json"
    if len(shards) == 1:
        index.unlink(missing_ok=True)
    else:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(t.nbytes for t in state.values())
        write_file(index, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))
