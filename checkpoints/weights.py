"""Strict safetensors in and out: what a file holds is what the module gets, or an error names it.

    with weights.empty():
        model = LanguageModel.from_hf(config)               # shapes, no storage
    source = weights.Checkpoint(folder)                     # reads names, no tensors
    weights.load(model, source, model.rename)               # every key used, every parameter filled
    weights.save(folder, weights.tensors(model, model.rename))

A checkpoint is read lazily from memory-mapped files, and a tensor is assigned and not copied. So a
parameter that keeps the dtype of its file costs no memory until it is used. names.py explains the
rename tables.

Read `load` first. `Checkpoint` is one folder, `Joined` several folders as one.
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
from checkpoints.names import Table, as_tuple, matches, rename, reverse
from config import UserError

# Not fp8, which means nothing without its scales.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HEADER_BYTES = 100_000_000  # safetensors' own limit; a file of another kind may claim any length
SHARD_BYTES = 5_000_000_000  # the size of Hugging Face's own shards

Reader = Callable[[str], Tensor]  # from a key to its tensor

# ------------------------------------------------------------------------------------ one file


def open_safetensors(path: Path) -> tuple[list[str], Reader]:
    """Return the keys of a safetensors file, and a function that reads a tensor."""
    check_header(path)
    with safe_open(path, "pt") as file:
        keys = list(file.keys())

    def read(key: str) -> Tensor:
        # The file is opened for each tensor. One open file would keep every page that was ever
        # read in the memory of the process.
        return safe_open(path, "pt").get_tensor(key)

    return keys, read


def check_header(path: Path):
    """Raise UserError for a key that is twice in the header.

    JSON allows it, and safetensors would silently take the last one.
    """

    def refuse_twice(pairs):
        table = {}
        for key, value in pairs:
            if key in table:
                fix = "download the checkpoint again"
                raise UserError(f"{path}:{key}", "twice in the header", fix)
            table[key] = value
        return table

    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, HEADER_BYTES))
    json.loads(header, object_pairs_hook=refuse_twice)


def open_pickle(path: Path) -> tuple[list[str], Reader]:
    """Return the same of a torch.save file. `weights_only` refuses everything that could run."""
    is_zip = zipfile.is_zipfile(
        path
    )  # files of old versions of torch are not, and cannot be mapped
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(path, "not a table of names and tensors", "convert it to safetensors")
    return list(state), state.__getitem__


def read_file(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file. Raises UserError if it is missing or damaged."""
    try:
        return load_file(path)
    except Exception as e:  # safetensors and the system each have types of their own
        raise damaged(path, "a whole safetensors file", e) from None


# ------------------------------------------------------------------------------------ folders

OPENERS = {"model.safetensors": open_safetensors, "pytorch_model.bin": open_pickle}
AGAIN = "download the checkpoint again"


class Checkpoint(Mapping):
    """The tensors of a folder by key, each read when it is asked for.

    The folder has `model.safetensors`, or an index and its shards. With allow_pickle a folder
    without safetensors may have `pytorch_model.bin`, or its index and shards; only tensors are read
    from those. Raises UserError for a file that is missing, damaged, outside the folder or at odds
    with the index, and for a key that is stored twice.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False):
        self.folder = folder
        self.where: dict[str, str] = {}  # key -> the file that has it
        self._readers: dict[str, Reader] = {}  # file -> what reads from it

        name = self._choose_file()
        if name.endswith(".bin") and not allow_pickle:
            fix = "pass allow_pickle=true, or convert to safetensors"
            raise UserError(folder / name, "only pickled weights", fix)

        index = folder / f"{name}.index.json"
        if not index.exists():
            self._add(name, name)
            return
        listed = read_index(index)
        for shard in sorted(set(listed.values())):
            self._add(shard, name)
        self._compare(index, listed)

    def _choose_file(self) -> str:
        """Return the kind of weights that the folder has; safetensors if it has none."""
        for name in OPENERS:
            index = self.folder / f"{name}.index.json"
            if (self.folder / name).exists() or index.exists():
                return name
        return "model.safetensors"

    def _add(self, shard: str, kind: str):
        """Open a file of a kind in OPENERS and note where its keys are."""
        path = self.folder / shard
        try:
            keys, self._readers[shard] = OPENERS[kind](path)
        except FileNotFoundError:
            raise UserError(path, "missing", f"give a folder with {kind} or its shards") from None
        except UserError:
            raise
        except Exception as e:  # safetensors, zip, unpickling and the system have their own types
            raise damaged(path, f"a whole {path.suffix[1:]} file", e) from None

        for key in keys:
            if key in self.where:
                raise UserError(f"{path}:{key}", f"also in {self.where[key]}", AGAIN)
            self.where[key] = shard

    def _compare(self, index: Path, listed: dict[str, str]):
        """Raise UserError if the index and the shards do not say the same."""
        if listed == self.where:
            return
        odd = sorted(set(listed) ^ set(self.where))
        if not odd:
            odd = [key for key in listed if listed[key] != self.where[key]]
        raise UserError(f"{index}:{odd[0]}", "index and shards disagree", AGAIN)

    def __getitem__(self, key: str) -> Tensor:
        return self._readers[self.where[key]](key)

    def __iter__(self):
        return iter(self.where)

    def __len__(self):
        return len(self.where)

    def file(self, key: str) -> Path:
        """Return the file that holds a key; the folder for a key that is missing."""
        return self.folder / self.where.get(key, "")

    def locate(self, key: str) -> str:
        """Return `file:key`, for messages."""
        return f"{self.file(key)}:{key}"


def read_index(index: Path) -> dict[str, str]:
    """Return {key: shard} of an index. Raises UserError for a shard outside of its folder."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(n, str) for n in listed.values()):
        what = "not a table of key and shard"
        raise UserError(f"{index}:weight_map", what, "download it again")
    for key, shard in listed.items():
        if not is_inside(index.parent, shard):
            raise UserError(f"{index}:{key}", f"its shard {shard!r} lies outside the folder", AGAIN)
    return listed


def is_inside(folder: Path, name: str) -> bool:
    """Say whether an index may name this shard: a file of the folder, or of its cache.

    In the cache of Hugging Face a model's folder is CACHE/models--org--name/snapshots/REVISION,
    and its files are links to CACHE/models--org--name/blobs/HASH.
    """
    if Path(name).name != name:
        return False
    home = folder.resolve()
    target = (folder / name).resolve()
    if target.parent == home:
        return True
    model = target.parent.parent
    return target.parent.name == "blobs" and model / "snapshots" in home.parents


class Joined(Mapping):
    """Several checkpoints as one, each under a prefix: {"language_model.": Checkpoint(a), ...}."""

    def __init__(self, parts: Mapping[str, Checkpoint]):
        self.parts = dict(parts)
        self.where: dict[str, tuple[Checkpoint, str]] = {}  # key -> the part, and its own key
        for prefix, part in self.parts.items():
            for key in part:
                if prefix + key in self.where:
                    other, _ = self.where[prefix + key]
                    what = f"also in {other.folder}"
                    raise UserError(part.locate(key), what, "remove one of the two")
                self.where[prefix + key] = part, key

    def __getitem__(self, key: str) -> Tensor:
        part, own_key = self.where[key]
        return part[own_key]

    def __iter__(self):
        return iter(self.where)

    def __len__(self):
        return len(self.where)

    def _find(self, key: str) -> tuple[Checkpoint, str]:
        """Return the part that a key belongs to, also if it is missing, and the key there."""
        if key in self.where:
            return self.where[key]
        prefixes = [prefix for prefix in self.parts if key.startswith(prefix)]
        prefix = max(prefixes, key=len, default=next(iter(self.parts)))
        return self.parts[prefix], key.removeprefix(prefix)

    def file(self, key: str) -> Path:
        """Return the file that holds a key; the folder for a key that is missing."""
        part, own_key = self._find(key)
        return part.file(own_key)

    def locate(self, key: str) -> str:
        """Return `file:key`, with the key as it stands in that file."""
        part, own_key = self._find(key)
        return part.locate(own_key)


# ------------------------------------------------------------------------------------ loading


class SkipInit(TorchFunctionMode):
    """Functions of torch.nn.init do nothing while this is active."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # The getter of a property is a function without a module.
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs)


@contextlib.contextmanager
def empty():
    """Build modules that have shapes and no storage; `load` brings it.

    This is the meta device without nn.init. A random number on the meta device would make torch
    import sympy, which takes a second and 150 MB.
    """
    with torch.device("meta"), SkipInit():
        yield


# Is offered (our name, tensor, place for messages); returns whether it keeps the tensor itself.
Taker = Callable[[str, Tensor, str], bool]


def load(
    module: nn.Module,
    source: Mapping[str, Tensor],
    table: Table = (),
    prefix: str = "",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignore: Iterable[str] = (),
    take: Taker | None = None,
) -> set[str]:
    """Fill all parameters and buffers of `module` from keys of `source` that begin with `prefix`.

    The module may be `empty`. After renaming, each key must be one of these:
    - a parameter or buffer of the module
    - one of `module.tied` (alias -> owner), which need no key of their own
    - a match of `module.spare`: part of the checkpoint, not of our forward pass. These tensors are
      kept in `module.spares` and written back on saving
    - a match of `ignore`

    dtype None keeps the file's. take: is offered every parameter's tensor before it is stored.
    Where it returns True it has the tensor, and the parameter stays as it is. lora.py quantizes so.

    Returns the keys that were used. Raises UserError for a tensor that is missing, unexpected or
    there twice, and for a wrong shape or dtype; the module is then as it was.
    """
    tied: dict[str, str] = getattr(module, "tied", {})
    spare: tuple[str, ...] = getattr(module, "spare", ())
    state = module.state_dict(keep_vars=True)
    wanted = {name: tensor for name, tensor in state.items() if name not in tied}

    renamed = {}
    for key in source:
        if key.startswith(prefix):
            renamed[key] = rename(key.removeprefix(prefix), table)

    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    spares: dict[str, Tensor] = {}
    for key, names in renamed.items():
        where = locate(source, key)
        if names in tied and tied[names] in wanted:
            owner = tied[names]
            if owner not in renamed.values():
                names = owner  # the file has the parameter under the name of its alias
            else:
                check_tied(source, key, next(k for k, n in renamed.items() if n == owner))

        # One tensor of the file may be several parameters.
        parts = as_tuple(names)
        if wanted.keys() >= set(parts):
            again = (found.keys() | taken) & set(parts)
            if again:
                what = f"a second tensor for {min(again)}"
                raise UserError(where, what, "remove one of the two")
            tensor = source[key]
            targets = [wanted[name] for name in parts]
            check_fit(tensor, targets, where)
            for name, part in zip(parts, split_rows(tensor, targets), strict=True):
                if take is not None and take(name, part, where):
                    taken.add(name)
                elif dtype is None or not part.is_floating_point():
                    found[name] = part.to(device)
                else:
                    found[name] = part.to(device, dtype)
        elif names in tied or matches(parts[0], ignore):
            continue
        elif matches(parts[0], spare):
            spares[parts[0]] = source[key]
        else:
            what = "a tensor this model has no place for"
            raise UserError(where, what, "check config.json's model_type")

    missing = sorted(wanted.keys() - found.keys() - taken)
    if missing:
        what = "missing from the weights"
        if len(missing) > 1:
            what += f" and {len(missing) - 1} more"
        theirs = prefix + rename(missing[0], reverse(table))
        raise UserError(locate(source, theirs), what, "give the folder of a complete checkpoint")

    module.load_state_dict(found, strict=False, assign=True)
    if spares:
        module.spares.update(spares)

    # Assigning replaced the owner's parameter, so the aliases get it again.
    for alias, owner in tied.items():
        parent, _, name = alias.rpartition(".")
        setattr(module.get_submodule(parent), name, module.get_parameter(owner))
    return set(renamed)


def locate(source: Mapping[str, Tensor], key: str) -> str:
    """Return the place of a key for messages; a plain dict has no file to name."""
    if hasattr(source, "locate"):
        return source.locate(key)
    return f"checkpoint:{key}"


def check_tied(source: Mapping[str, Tensor], key: str, owner: str):
    """Raise UserError unless the tensor of a tied parameter is a copy of its owner's.

    Some files store the copy, too. Another value would be lost silently.
    """
    if not torch.equal(source[key], source[owner]):
        what = f"differs from {owner}, to which the config ties it"
        fix = "set tie_word_embeddings to false in config.json"
        raise UserError(locate(source, key), what, fix)


def split_rows(tensor: Tensor, targets: list[Tensor]) -> list[Tensor]:
    """Return the part of a tensor, stacked along dimension 0, that belongs to each target."""
    if len(targets) == 1:
        return [tensor]
    return list(tensor.split([len(target) for target in targets]))


def check_fit(tensor: Tensor, targets: list[Tensor], where: str):
    """Raise UserError unless the tensor has the shape and the kind of number of the targets.

    The shape is that of the targets stacked along dimension 0.
    """
    shape = list(targets[0].shape)
    if len(targets) > 1:
        shape[0] = sum(len(target) for target in targets)
    if list(tensor.shape) != shape:
        what = f"shape {list(tensor.shape)}, the config needs {shape}"
        raise UserError(where, what, "use the config.json that belongs to these weights")

    dtypes = (targets[0].dtype,)
    if targets[0].is_floating_point():
        dtypes = FLOATS
    if tensor.dtype not in dtypes:
        has = dtype_name(tensor.dtype)
        needs = " or ".join(dtype_name(dtype) for dtype in dtypes)
        fix = "give the original weights, neither quantized nor converted"
        raise UserError(where, f"type {has}, the model needs {needs}", fix)


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------ saving


def tensors(module: nn.Module, table: Table = (), prefix: str = "") -> dict[str, Tensor]:
    """Return every tensor of the module, and its spares, under the names of a file.

    This is the opposite of `load`. Tied parameters are there once, under their owner's name.
    """
    tied = getattr(module, "tied", {})
    state = {name: tensor for name, tensor in module.state_dict().items() if name not in tied}
    state |= getattr(module, "spares", {})

    out = {}
    back = reverse(table)
    for ours, tensor in state.items():
        theirs = rename(ours, back)
        parts = rename(theirs, table)
        if isinstance(parts, str) or ours not in parts:
            out[prefix + theirs] = tensor.detach()
        elif ours == parts[0]:
            # The file has several of our parameters as one tensor.
            stacked = torch.cat([state[part] for part in parts])
            out[prefix + theirs] = stacked.detach()
    return out


def save(folder: Path, state: dict[str, Tensor], shard_bytes: int = SHARD_BYTES):
    """Write tensors as `model.safetensors`, or as shards and, after them, their index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in state.items():
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor.contiguous().cpu()
        size += tensor.nbytes

    index = folder / "model.safetensors.index.json"
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", shards[0])
        index.unlink(missing_ok=True)
        return

    where = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shard)
        where |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in state.values())
    content = {"metadata": {"total_size": total}, "weight_map": where}
    write_file(index, json.dumps(content, indent=1))


def write_tensors(path: Path, state: dict[str, Tensor]):
    """Write one safetensors file, whole or not at all."""
    write_file(path, lambda temporary: save_file(state, temporary, metadata={"format": "pt"}))
