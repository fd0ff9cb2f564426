"""Strict safetensors in and out: what a file holds is what the module gets, or an error names the key.

A checkpoint is read lazily from memory-mapped files and assigned, never copied: a parameter that keeps its
dtype costs no memory until it is touched. A rename table is a list of (theirs, ours) pairs in which `*` stands
for one dotted component and `**` for any tail; it is used forwards to load and backwards to save. Where `ours` is
a tuple of names, the file keeps those parameters as one tensor, stacked along dimension 0 (a fused qkv projection).
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from checkpoints.files import damaged, read_json, write_file
from checkpoints.names import Table, matches, rename, reverse
from config import UserError

FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
)  # fp8 means nothing without its scales
HEADER_BYTES = 100_000_000  # safetensors' own limit; a file of another kind may claim any length
SHARD_BYTES = 5_000_000_000  # Hugging Face's own shard size


def _inside(folder: Path, name: str) -> bool:
    """Whether an index may name this shard: a file of the folder, or a link into the Hugging Face cache it lies in."""
    target, home = (folder / name).resolve(), folder.resolve()
    cache = (
        target.parent.parent
    )  # .../models--org--name/{blobs/HASH, snapshots/REVISION/model.safetensors}
    linked = target.parent.name == "blobs" and cache / "snapshots" in home.parents
    return Path(name).name == name and (target.parent == home or linked)


def _open_safetensors(path: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    """A file's keys and what reads a tensor by its key."""

    def once(pairs):  # JSON allows a key twice, and safetensors would silently take the last
        table = {}
        for key, value in pairs:
            if key in table:
                raise UserError(
                    f"{path}:{key}", "twice in the header", "download the checkpoint again"
                )
            table[key] = value
        return table

    with open(path, "rb") as f:
        json.loads(
            f.read(min(int.from_bytes(f.read(8), "little"), HEADER_BYTES)), object_pairs_hook=once
        )
    # Opened for each tensor: one handle would keep every page that was ever read in the process's memory.
    return list(safe_open(path, "pt").keys()), lambda key: safe_open(path, "pt").get_tensor(key)


def read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises UserError for one that is missing or damaged."""
    try:
        return load_file(path)
    except Exception as e:  # safetensors and the system: each has its own type
        raise damaged(path, "a whole safetensors file", e) from None


def _open_pickle(path: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    """The same of a torch.save file; weights_only refuses everything that could run code."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(path, "not a table of names and tensors", "convert it to safetensors")
    return list(state), state.__getitem__


class Checkpoint(Mapping):
    """The tensors of a folder, by key, read when asked for: `model.safetensors`, or an index and its shards.

    allow_pickle also reads `pytorch_model.bin` (or its index and shards), tensors only and only where there is no
    safetensors file. Raises UserError for a file that is missing, damaged, outside the folder or at odds with the
    index, and for a key that is stored twice.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False):
        self.folder, self.where = folder, {}
        self._read: dict[str, Callable[[str], Tensor]] = {}
        kinds = {"model.safetensors": _open_safetensors, "pytorch_model.bin": _open_pickle}
        there = [n for n in kinds if (folder / n).exists() or (folder / f"{n}.index.json").exists()]
        name = there[0] if there else "model.safetensors"
        if name.endswith(".bin") and not allow_pickle:
            raise UserError(
                folder / name,
                "only pickled weights",
                "pass allow_pickle=true, or convert to safetensors",
            )
        index, files = folder / f"{name}.index.json", None
        if index.exists():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(n, str) for n in files.values()):
                raise UserError(
                    f"{index}:weight_map", "not a table of key and shard", "download it again"
                )
            if outside := [k for k, n in files.items() if not _inside(folder, n)]:
                raise UserError(f"{index}:{outside[0]}", f"its shard {files[outside[0]]!r} lies outside the folder",
                                "download the checkpoint again")  # fmt: skip
        for shard in [name] if files is None else sorted(set(files.values())):
            path = folder / shard
            try:
                keys, self._read[shard] = kinds[name](path)
            except FileNotFoundError:
                raise UserError(
                    path, "missing", f"give a folder with {name} or its shards"
                ) from None
            except UserError:
                raise
            except Exception as e:  # safetensors, zip, unpickling, system: each has its own type
                raise damaged(path, f"a whole {path.suffix[1:]} file", e) from None
            for key in keys:
                if key in self.where:
                    raise UserError(
                        f"{path}:{key}",
                        f"also in {self.where[key]}",
                        "download the checkpoint again",
                    )
                self.where[key] = shard
        if files is not None and files != self.where:
            odd = sorted(set(files) ^ set(self.where)) or [
                k for k in files if files[k] != self.where[k]
            ]
            raise UserError(
                f"{index}:{odd[0]}", "index and shards disagree", "download the checkpoint again"
            )

    def __getitem__(self, key: str) -> Tensor:
        return self._read[self.where[key]](key)

    def __iter__(self):
        return iter(self.where)

    def __len__(self):
        return len(self.where)

    def file(self, key: str) -> Path:
        """The file that holds a key; the folder for a key that is missing."""
        return self.folder / self.where.get(key, "")

    def locate(self, key: str) -> str:
        """`file:key`, for messages."""
        return f"{self.file(key)}:{key}"


class Joined(Mapping):
    """Several checkpoints as one, each under its prefix: {"language_model.": Checkpoint(a), ...}."""

    def __init__(self, parts: Mapping[str, Checkpoint]):
        self.parts = dict(parts)
        self.where: dict[str, tuple[Checkpoint, str]] = {}
        for prefix, part in self.parts.items():
            for key in part:
                if prefix + key in self.where:
                    other = self.where[prefix + key][0].folder
                    raise UserError(part.locate(key), f"also in {other}", "remove one of the two")
                self.where[prefix + key] = part, key

    def __getitem__(self, key: str) -> Tensor:
        part, own = self.where[key]
        return part[own]

    def __iter__(self):
        return iter(self.where)

    def __len__(self):
        return len(self.where)

    def _find(self, key: str) -> tuple[Checkpoint, str]:
        """The part that has a key, or that a missing key belongs to; the key as that part calls it."""
        prefix = max(
            (p for p in self.parts if key.startswith(p)), key=len, default=next(iter(self.parts))
        )
        return self.where.get(key) or (self.parts[prefix], key.removeprefix(prefix))

    def file(self, key: str) -> Path:
        part, own = self._find(key)
        return part.file(own)

    def locate(self, key: str) -> str:
        """`file:key`, the key as it stands in that file."""
        part, own = self._find(key)
        return part.locate(own)


class _SkipInit(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        skip = getattr(func, "__module__", "") == "torch.nn.init"  # a property's getter has none
        return kwargs["tensor"] if skip else func(*args, **kwargs)


@contextlib.contextmanager
def empty():
    """Modules built inside have shapes but no storage: `load` brings it.

    That is the meta device without nn.init: a random number there makes torch import sympy, a second and 150 MB.
    """
    with torch.device("meta"), _SkipInit():
        yield


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

    The module may be `empty`. A key must be a parameter (after renaming), or match `module.spare` (kept
    aside in `module.spares`, written back on saving: tensors that belong to the checkpoint but not to our forward
    pass), or match `ignore`. Tied parameters (`module.tied`: alias -> owner) need no key of their own.
    Returns the keys it used. Raises UserError for a missing, unexpected or duplicate tensor and one of a wrong shape
    or type; the module is then as it was.
    """
    tied: dict[str, str] = getattr(module, "tied", {})
    spare: tuple[str, ...] = getattr(module, "spare", ())
    wanted = {k: v for k, v in module.state_dict(keep_vars=True).items() if k not in tied}
    names = {
        key: rename(key.removeprefix(prefix), table) for key in source if key.startswith(prefix)
    }
    found: dict[str, Tensor] = {}
    spares: dict[str, Tensor] = {}
    locate = getattr(source, "locate", lambda key: f"checkpoint:{key}")
    for key, ours in names.items():
        if ours in tied and tied[ours] in wanted:
            # Some files store the tied copy too. Fine while it is a copy; another value would be lost silently.
            owner = next((k for k, name in names.items() if name == tied[ours]), None)
            if owner is None:
                ours = tied[ours]
            elif not torch.equal(source[key], source[owner]):
                raise UserError(locate(key), f"differs from {owner}, to which the config ties it",
                                "set tie_word_embeddings to false in config.json")  # fmt: skip
        parts = (ours,) if isinstance(ours, str) else ours
        if wanted.keys() >= set(parts):
            if again := found.keys() & set(parts):
                raise UserError(
                    locate(key), f"a second tensor for {min(again)}", "remove one of the two"
                )
            tensor, want = source[key], [wanted[name] for name in parts]
            _fits(tensor, want, locate(key))
            keep = dtype is None or not tensor.is_floating_point()
            rows = tensor.split([len(w) for w in want]) if len(parts) > 1 else [tensor]
            for name, part in zip(parts, rows, strict=True):
                found[name] = part.to(device=device, dtype=part.dtype if keep else dtype)
        elif ours in tied or matches(parts[0], ignore):
            continue
        elif matches(parts[0], spare):
            spares[parts[0]] = source[key]
        else:
            raise UserError(
                locate(key),
                "a tensor this model has no place for",
                "check config.json's model_type",
            )
    missing = sorted(set(wanted) - set(found))
    if missing:
        theirs = prefix + rename(missing[0], reverse(table))
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            locate(theirs),
            f"missing from the weights{more}",
            "give the folder of a complete checkpoint",
        )
    module.load_state_dict(found, strict=False, assign=True)
    if spares:
        module.spares.update(spares)
    for alias, owner in tied.items():
        parent, _, name = alias.rpartition(".")
        setattr(module.get_submodule(parent), name, module.get_parameter(owner))
    return set(names)


def _fits(tensor: Tensor, want: list[Tensor], where: str):
    """Raise UserError unless the tensor has the shape (stacked along dimension 0) and the kind of number wanted."""
    shape = want[0].shape if len(want) == 1 else (sum(len(w) for w in want), *want[0].shape[1:])
    if tensor.shape != torch.Size(shape):
        raise UserError(where, f"shape {[*tensor.shape]}, the config needs {[*shape]}",
                        "use the config.json that belongs to these weights")  # fmt: skip
    types = FLOATS if want[0].is_floating_point() else (want[0].dtype,)
    if tensor.dtype not in types:
        types = " or ".join(str(t).removeprefix("torch.") for t in types)
        raise UserError(where, f"type {str(tensor.dtype).removeprefix('torch.')}, the model needs {types}",
                        "give the original weights, neither quantized nor converted")  # fmt: skip


def tensors(module: nn.Module, table: Table = (), prefix: str = "") -> dict[str, Tensor]:
    """The opposite of `load`: every tensor of the module (and its spares) under the file's names, tied ones once."""
    tied = getattr(module, "tied", {})
    state = {k: v for k, v in module.state_dict().items() if k not in tied} | getattr(
        module, "spares", {}
    )
    out, back = {}, reverse(table)
    for ours, tensor in state.items():
        theirs = rename(ours, back)
        parts = rename(theirs, table)
        if isinstance(parts, str) or ours not in parts:
            out[prefix + theirs] = tensor.detach()
        elif ours == parts[0]:
            out[prefix + theirs] = torch.cat([state[p] for p in parts]).detach()
    return out


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
        write_file(
            folder / name, lambda tmp, shard=shard: save_file(shard, tmp, metadata={"format": "pt"})
        )
    index = folder / "model.safetensors.index.json"
    if len(shards) == 1:
        index.unlink(missing_ok=True)
    else:
        where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(t.nbytes for t in state.values())
        write_file(
            index, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1)
        )
