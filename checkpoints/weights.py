"""Strict safetensors in and out: what a file holds is what the module gets, or an error names it.

    with weights.empty():
        model = LanguageModel.from_hf(config)               # shapes, no storage
    source = weights.Checkpoint(folder)                     # reads names, no tensors
    weights.load(model, source, model.rename)               # every key used, every parameter filled
    weights.save(folder, weights.tensors(model, model.rename))

A checkpoint is read lazily from memory-mapped files, and a tensor is assigned and not copied. So a
parameter that keeps the dtype of its file costs no memory until it is used. names.py explains the
rename tables.

Read `load` first. The file, from top to bottom:

    open_safetensors, open_pickle    the keys of one file, and a function that reads a tensor
    Checkpoint, Joined               a folder as a mapping; several folders as one
    empty, load                      a module without storage; from the files to its parameters
    tensors, save                    from a module's parameters to the files
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from checkpoints.files import check_regular, damaged, read_json, write_file
from checkpoints.names import Table, as_tuple, matches, rename, reverse
from config import UserError

# Not fp8, which means nothing without its scales.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HEADER_BYTES = 100_000_000  # safetensors' own limit; a file of another kind may claim any length
SHARD_BYTES = 5_000_000_000  # the size of Hugging Face's own shards
AGAIN = "download the checkpoint again"  # the fix for damage that the user cannot mend

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
    check_regular(path)

    def to_dict(pairs: list[tuple[str, object]]) -> dict:
        table = {}
        for key, value in pairs:
            if key in table:
                raise UserError(f"{path}:{key}", "twice in the header", AGAIN)
            table[key] = value
        return table

    # A safetensors file begins with the length of its header, in 8 bytes. The header is JSON.
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, HEADER_BYTES))

    # json calls the hook for each of the header's objects. Its own dict would hide a second key.
    json.loads(header, object_pairs_hook=to_dict)


def open_pickle(path: Path) -> tuple[list[str], Reader]:
    """Return the keys of a torch.save file, and a function that reads a tensor."""
    check_regular(path)

    # Files of old versions of torch are no zip files and cannot be mapped into memory.
    is_zip = zipfile.is_zipfile(path)

    # A pickle can run any code when it is opened. weights_only refuses everything but tensors.
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    is_table = isinstance(state, dict)
    if not is_table or not all(is_named_tensor(*pair) for pair in state.items()):
        raise UserError(path, "not a table of names and tensors", "convert it to safetensors")
    return list(state), state.__getitem__


def is_named_tensor(name, tensor) -> bool:
    """Say whether an entry of a pickle is a text and a tensor of plain numbers.

    A pickle may also hold sparse and quantized tensors, and tensors that have a shape only.
    """
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        return False
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta


def read_file(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file. Raises UserError if it is missing or damaged."""
    try:
        check_header(path)
        return load_file(path)
    except UserError:
        raise
    except Exception as e:  # safetensors and the system each have types of their own
        raise damaged(path, "a whole safetensors file", e) from None


# ------------------------------------------------------------------------------------ folders

# A kind of weights has the name of its only file. If there are shards, it is in the index's name.
OPENERS = {"model.safetensors": open_safetensors, "pytorch_model.bin": open_pickle}


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

        kind = self._kind()
        if kind.endswith(".bin") and not allow_pickle:
            fix = "pass allow_pickle=true, or convert to safetensors"
            raise UserError(folder / kind, "only pickled weights", fix)

        # Without an index there is one file.
        index = folder / f"{kind}.index.json"
        if not index.exists():
            self._add(kind, kind)
            return

        listed = read_index(index)
        for shard in sorted(set(listed.values())):
            self._add(shard, kind)
        self._compare(index, listed)

    def _kind(self) -> str:
        """Return the kind of weights that the folder has; safetensors if it has none."""
        for kind in OPENERS:
            index = self.folder / f"{kind}.index.json"
            if (self.folder / kind).exists() or index.exists():
                return kind
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

        # Keys that only one of them has; if there are none, keys in another shard.
        odd = sorted(listed.keys() ^ self.where.keys())
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
    is_table = isinstance(listed, dict)
    if not is_table or not all(isinstance(shard, str) for shard in listed.values()):
        what = "not a table of key and shard"
        raise UserError(f"{index}:weight_map", what, "download it again")

    # A checkpoint from the net must not make us open any file of this machine.
    for key, shard in listed.items():
        if not is_inside(index.parent, shard):
            raise UserError(f"{index}:{key}", f"its shard {shard!r} lies outside the folder", AGAIN)
    return listed


def is_inside(folder: Path, name: str) -> bool:
    """Say whether an index may name this shard: a file of the folder, or of its cache.

    In the cache of Hugging Face a model's folder is CACHE/models--org--name/snapshots/REVISION,
    and its files are links to CACHE/models--org--name/blobs/HASH.
    """
    has_folders = Path(name).name != name
    if has_folders or not name.isprintable():
        return False

    # Links are followed: what counts is where the file really lies. Unlike Path.resolve, realpath
    # takes a link to itself, which whoever opens the file reports.
    home = folder.resolve()
    target = Path(os.path.realpath(folder / name))
    if target.parent == home:
        return True

    model = target.parent.parent  # CACHE/models--org--name
    return target.parent.name == "blobs" and model / "snapshots" in home.parents


class Joined(Mapping):
    """Several checkpoints as one, each under a prefix: {"language_model.": Checkpoint(a), ...}."""

    def __init__(self, parts: Mapping[str, Checkpoint]):
        self.parts = dict(parts)
        self.where: dict[str, tuple[Checkpoint, str]] = {}  # key -> the part, and the key there

        for prefix, part in self.parts.items():
            for own_key in part:
                key = prefix + own_key
                if key in self.where:
                    other, _ = self.where[key]
                    what = f"also in {other.folder}"
                    raise UserError(part.locate(own_key), what, "remove one of the two")
                self.where[key] = part, own_key

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

        # A missing key belongs to the longest prefix that fits; if none does, to the first part.
        first = next(iter(self.parts))
        fitting = [prefix for prefix in self.parts if key.startswith(prefix)]
        prefix = max(fitting, key=len, default=first)
        return self.parts[prefix], key.removeprefix(prefix)

    def file(self, key: str) -> Path:
        """Return the file that holds a key; the folder for a key that is missing."""
        part, own_key = self._find(key)
        return part.file(own_key)

    def locate(self, key: str) -> str:
        """Return `file:key`, with the key as it stands in that file."""
        part, own_key = self._find(key)
        return part.locate(own_key)


class Grown(Mapping):
    """A checkpoint whose tables of tokens have rows for some that it does not know.

    Each new row is the mean of all others. So a token that nobody has trained yet is no likelier
    than the average one.
    """

    def __init__(
        self,
        source: Mapping[str, Tensor],
        names: Table,
        tables: Iterable[str],
        known: int,
        rows: int,
    ):
        """Grow `tables`, our names by the rename table `names`, from `known` rows to `rows`."""
        self.source = source
        self.names = names
        self.tables = tuple(tables)
        self.known = known
        self.rows = rows

    def __getitem__(self, key: str) -> Tensor:
        tensor = self.source[key]
        is_table = rename(key, self.names) in self.tables
        if not is_table or len(tensor) != self.known:
            return tensor  # where it has to have more rows, `load` refuses it
        mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
        return torch.cat([tensor, mean.expand(self.rows - self.known, *tensor.shape[1:])])

    def __iter__(self):
        return iter(self.source)

    def __len__(self):
        return len(self.source)

    def locate(self, key: str) -> str:
        """Return `file:key`, for messages."""
        return locate(self.source, key)


# ------------------------------------------------------------------------------------ loading


class SkipInit(TorchFunctionMode):
    """A mode in which the functions of torch.nn.init do nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # The getter of a property is a function without a module.
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs)


@contextlib.contextmanager
def empty():
    """Build modules that have shapes and no storage; `load` brings it.

    Modules are made on the meta device, and nothing of nn.init runs. A random number on the meta
    device would make torch import sympy, which takes a second and 150 MB.
    """
    with torch.device("meta"), SkipInit():
        yield


# Called with (our name, tensor, place for messages). Returns whether it keeps the tensor itself.
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

    dtype: None keeps the file's. take: called with each tensor before it is stored. If it returns
    True, it has kept the tensor itself, and the parameter stays as it is: lora.py quantizes in it.

    Returns the keys that were used. Raises UserError for a tensor that is missing, unexpected or
    there twice, and for a wrong shape or dtype; the module is then as it was.
    """
    tied: dict[str, str] = getattr(module, "tied", {})
    spare: tuple[str, ...] = getattr(module, "spare", ())

    # What the module needs, by name. keep_vars: the parameters themselves, as nothing is copied.
    wanted = module.state_dict(keep_vars=True)
    for alias in tied:
        wanted.pop(alias, None)

    # What the source has: its key -> our name, or our names if they are one tensor in the file.
    renamed = {}
    key_of = {}
    for key in source:
        if key.startswith(prefix):
            names = rename(key.removeprefix(prefix), table)
            renamed[key] = names
            key_of.setdefault(names, key)  # if there is a second one, it is refused below

    # Each key gets its place. The module is not touched before all of them are checked.
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    spares: dict[str, Tensor] = {}
    for key, names in renamed.items():
        where = locate(source, key)

        # An alias may stand in the file beside its owner, or in its owner's place.
        if names in tied and tied[names] in wanted:
            owner = tied[names]
            if owner in key_of:
                check_tied(source, key, key_of[owner])
            else:
                names = owner

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

    # Not strict, because what was taken is not in `found`. assign: no copy is made.
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
    is_copy = torch.equal(source[key], source[owner])
    if not is_copy:
        what = f"differs from {owner}, to which the config ties it"
        fix = "set tie_word_embeddings to false in config.json"
        raise UserError(locate(source, key), what, fix)


def split_rows(tensor: Tensor, targets: list[Tensor]) -> list[Tensor]:
    """Return the part of a tensor, stacked along dimension 0, that belongs to each target."""
    # A scalar has no dimension to split.
    if len(targets) == 1:
        return [tensor]
    rows = [len(target) for target in targets]
    return list(tensor.split(rows))


def check_fit(tensor: Tensor, targets: list[Tensor], where: str):
    """Raise UserError unless the tensor has the shape and the kind of number of the targets.

    The shape is that of the targets stacked along dimension 0.
    """
    found = list(tensor.shape)
    shape = list(targets[0].shape)
    if len(targets) > 1:
        shape[0] = sum(len(target) for target in targets)
    if found != shape:
        what = f"shape {found}, the config needs {shape}"
        raise UserError(where, what, "use the config.json that belongs to these weights")

    # Any float will do, because `load` converts. A buffer of integers has to be exactly that.
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
    state = module.state_dict()
    for alias in tied:
        state.pop(alias, None)
    state |= getattr(module, "spares", {})

    named = {}
    back = reverse(table)
    for ours, tensor in state.items():
        theirs = rename(ours, back)

        # Renaming back and forth gives all of our parameters that are one tensor in the file.
        parts = rename(theirs, table)
        is_one_tensor = isinstance(parts, str) or ours not in parts
        if is_one_tensor:
            named[prefix + theirs] = tensor.detach()
        elif ours == parts[0]:
            stacked = torch.cat([state[part] for part in parts])
            named[prefix + theirs] = stacked.detach()
    return named


def save(folder: Path, state: dict[str, Tensor], shard_bytes: int = SHARD_BYTES):
    """Write tensors as `model.safetensors`, or as shards and, after them, their index."""
    # A shard is full when the next tensor would not fit. A larger tensor is a shard by itself.
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in state.items():
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor.contiguous().cpu()
        size += tensor.nbytes

    # An index that is left from an earlier save would hide the one file.
    index = folder / "model.safetensors.index.json"
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", shards[0])
        index.unlink(missing_ok=True)
        return

    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shard)
        for key in shard:
            weight_map[key] = name

    total = sum(tensor.nbytes for tensor in state.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_file(index, json.dumps(content, indent=1))


def write_tensors(path: Path, state: dict[str, Tensor]):
    """Write one safetensors file, whole or not at all."""
    write_file(path, lambda temporary: save_file(state, temporary, metadata={"format": "pt"}))
