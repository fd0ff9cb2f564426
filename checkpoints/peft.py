"""PEFT's adapter files, read and written: adapter_model.safetensors and adapter_config.json.

    adapt(model, stages, PARTS)     # what a recipe says: new adapters, or those of a folder
    merge_and_save_adapters(...)    # a trained model without adapters; these go to output/adapter
    merge_adapter(model, folder)    # adds the adapters of a folder to the weights, once
    save_adapter(folder, lm)        # what PEFT loads onto transformers' model
    load_adapter(folder, lm)        # what PEFT wrote

The first two are steps of a run, the third is one of export.py, the others read and write the
files. lora.py has the arithmetic. The tensors of a file:

    base_model.model.<path>.lora_A.weight                 (r, K)
    base_model.model.<path>.lora_B.weight                 (N, r)
    base_model.model.<path>.lora_magnitude_vector         (N,) of DoRA
    base_model.model.<path>.weight                        whatever else was trained: modules_to_save

A path is Hugging Face's name of a module. N outputs, K inputs, r rank.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from checkpoints import hf_llava, tinyllava
from checkpoints.fields import ALPHA, MOST_RANK, Fields
from checkpoints.files import read_json, write_file
from checkpoints.names import Table, as_tuple, rename, reverse
from checkpoints.weights import FLOATS, read_file, write_tensors
from config import LoRA, UserError
from lora import (
    LoRALinear,
    adapters,
    apply,
    freeze,
    make_adapter,
    merge,
    put,
    rename_table,
    targets,
)

ROOT = "base_model.model."
MOST_PATTERNS = 2000  # entries of alpha_pattern: one for each linear of a large model

# The names that a whole LLaVA may have in a file: those of transformers and of TinyLLaVA Factory.
# What we write has the newer ones of transformers.
ADAPTED = hf_llava.TABLE + tinyllava.TABLE

# A parameter of an adapter, and how its name ends in the file.
ENDINGS = {
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    "lora_magnitude_vector": ".lora_magnitude_vector",
}

# The fields of adapter_config.json that change what is computed, each with the values that we can
# compute. Any other value is another function of x, or changes the base weights, which the file
# does not have.
KNOWN = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "alora_invocation_tokens": (None, False),
    "arrow_config": (None, False),
    "kasa_config": (None, False),
    "layer_replication": (None, False),
    "monteclora_config": (None, False),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


# ------------------------------------------------------------------------------------ in a run


def adapt(model: nn.Module, stages: list, parts: dict[str, str]):
    """Put adapters on every part that one of the stages tunes as `lora` or `qlora-KIND`.

    parts: the name of a part in a recipe -> the model's attribute. Raises UserError as `lora.apply`
    does, for a part that another stage trains otherwise, and for options that differ.
    """
    for part, attribute in parts.items():
        # The ways in which the stages train this part, and the options of those that adapt it.
        ways = set()
        options = set()
        for stage in stages:
            how = getattr(stage.tune, part)
            if how != "frozen":
                ways.add(how)
            if "lora" in how:
                options.add(stage.lora)

        if not options:
            continue
        if len(ways) > 1 or len(options) > 1:
            what = f"{', '.join(sorted(ways))} with {len(options)} sets of adapter options"
            fix = "tune it so in every stage that trains it, with equal options"
            raise UserError(f"tune.{part}", what, fix)

        (lora,) = options
        if not lora.adapter:
            apply(model, lora, [attribute])
            continue

        # A folder holds the adapters of all parts, so an earlier part may have brought them.
        module = model.get_submodule(attribute)
        if not adapters(module):
            load_adapter(Path(lora.adapter), model, ADAPTED)
        if not adapters(module):
            what = f"adapts nothing of the {part}"
            raise UserError(lora.adapter, what, f"leave tune.{part} frozen")


def merge_and_save_adapters(model: nn.Module, output: Path, base: str) -> nn.Module:
    """Return a trained LLaVA with plain linears; its adapters, if any, go to `output`/adapter.

    base: the name of the model that the adapters are for.
    """
    if adapters(model):
        save_adapter(output / "adapter", model, hf_llava.NEWER, base)
        merge(model, torch.float32)
        _note_merged(model, output / "adapter")
    return model


def merge_adapter(model: nn.Module, folder: Path):
    """Add the adapters of a folder to the weights of a LLaVA.

    Raises UserError as load_adapter does; an adapter that is in the weights already is refused.
    """
    load_adapter(folder, model, ADAPTED)
    merge(model)
    _note_merged(model, folder)


def _note_merged(model: nn.Module, folder: Path):
    """Write into a model's config that its weights hold the adapter of a folder."""
    digest = tensors_digest(read_file(folder / "adapter_model.safetensors"))
    merged = (*model.config.merged_adapters, digest)
    model.config = replace(model.config, merged_adapters=merged)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors by name; it is the same in every file that holds them."""
    sha256 = hashlib.sha256()
    for key in sorted(tensors):
        sha256.update(key.encode())
        sha256.update(tensors[key].float().contiguous().numpy().tobytes())
    return sha256.hexdigest()


# ------------------------------------------------------------------------------------ writing


def untied_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that have only one name.

    An embedding that is tied to the head has two. PEFT would save and train two copies of it.
    """
    names = Counter(p for _, p in module.named_parameters(remove_duplicate=False))
    return {name: p for name, p in module.named_parameters() if names[p] == 1}


def save_adapter(folder: Path, module: nn.Module, layout: Table = (), base: str = ""):
    """Write the adapters as PEFT does, whatever else trains as `modules_to_save`, the config last.

    Names are Hugging Face's for the module; `layout` is a table over them, for a whole LLaVA. base:
    the name of the model. Raises UserError for what PEFT cannot hold: no adapter, adapters of two
    kinds, one of several linears that are one in Hugging Face's model, a trained embedding that is
    tied to the head.
    """
    found = adapters(module)

    # PEFT's config states these once for all linears.
    kinds = set()
    for adapter in found.values():
        options = adapter.options
        kinds.add((options.rslora, options.dora, options.dropout))
    if len(kinds) != 1:
        what = f"adapters of {len(kinds)} kinds"
        raise UserError(folder, what, "PEFT's files hold one kind; apply one LoRA")
    ((rslora, dora, dropout),) = kinds

    table = rename_table(module)
    state: dict[str, Tensor] = {}  # what the file will hold, by key

    # The adapters, and the rank and alpha of each.
    ranks = {}
    alphas = {}
    for name, adapter in found.items():
        path = name_in_file(f"{name}.weight", table, layout).removesuffix(".weight")
        ranks[path] = adapter.options.r
        alphas[path] = adapter.options.alpha
        for parameter, tensor in adapter.named_parameters(recurse=False):
            state[f"{ROOT}{path}{ENDINGS[parameter]}"] = tensor

    # PEFT saves whole modules. So a module goes with all its parameters if any of them trains.
    trained = set()
    for name, p in module.named_parameters():
        if p.requires_grad:
            trained.add(name.rpartition(".")[0])

    untied = untied_parameters(module)
    modules_to_save = set()
    for owner in sorted(trained - found.keys()):
        submodule = module.get_submodule(owner)
        for name, tensor in submodule.named_parameters(owner, recurse=False):
            if name not in untied:
                what = "trained, and tied to the head: PEFT would train two copies"
                raise UserError(name, what, "merge instead")
            path = name_in_file(name, table, layout)
            state[ROOT + path] = tensor
            modules_to_save.add(path.rpartition(".")[0])

    # PEFT has one rank and one alpha for most linears, and patterns for those that differ.
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "use_dora": dora,
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != r},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(modules_to_save) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }

    # The config comes last: who finds it finds the tensors, too.
    tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in state.items()}
    write_tensors(folder / "adapter_model.safetensors", tensors)
    write_file(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def name_in_file(name: str, table: Table, layout: Table) -> str:
    """Return Hugging Face's name of a parameter.

    Raises UserError if it is one of several that are one tensor there.
    """
    theirs = rename(name, reverse(table))
    is_one_tensor = isinstance(rename(theirs, table), str)
    if not is_one_tensor:
        what = f"one of several that are one tensor in {theirs}: PEFT has no twin"
        raise UserError(name, what, "merge instead")
    return rename(theirs, reverse(layout))


# ------------------------------------------------------------------------------------ reading


class AdapterFile:
    """The folder of an adapter, opened for a module: its options, and where its tensors belong.

    tensors: those of the file by key. `load_adapter` takes out what it has found a place for.
    """

    def __init__(self, folder: Path, module: nn.Module, layout: Table):
        self.file = folder / "adapter_model.safetensors"
        self.layout = layout
        self.table = rename_table(module)

        where = folder / "adapter_config.json"
        fix = "merge it with PEFT first"
        config = Fields(read_json(where), where, fix=fix)
        for key, values in KNOWN.items():
            value = config.values.get(key)
            if value not in values:
                raise UserError(config.name(key), f"{value!r} is not supported", fix)

        # Every pattern is one that cannot take long.
        self.alpha = config.number("lora_alpha", *ALPHA, default=8)
        self.alpha_patterns = []
        patterns = config.table("alpha_pattern", optional=True)
        if len(patterns.values) > MOST_PATTERNS:
            raise config.refuse("alpha_pattern", f"a table of more than {MOST_PATTERNS}")
        for pattern in patterns.values:
            compiled = compile_path_pattern(pattern)
            if compiled is None:
                raise patterns.refuse(pattern, "the alpha of no pattern that can be used")
            self.alpha_patterns.append((compiled, patterns.number(pattern, *ALPHA)))

        self.dropout = config.number("lora_dropout", 0.0, 0.999, default=0)
        self.rslora = config.flag("use_rslora", default=False)
        self.dora = config.flag("use_dora", default=False)

        self.tensors = read_file(self.file)
        for key, tensor in self.tensors.items():
            if tensor.dtype not in FLOATS or not tensor.isfinite().all():
                self.refuse(key, "not a tensor of finite numbers")

    def refuse(self, key: str, what: str):
        """Raise the UserError that names a tensor of the file."""
        raise UserError(f"{self.file}:{key}", what, "give the model that it was made for")

    def our_names(self, key: str, path: str, known: Mapping) -> tuple[str, ...]:
        """Return our names of a path: several where the file has one tensor and we have several."""
        theirs = rename(path, self.layout)
        names = as_tuple(rename(theirs, self.table))
        if not set(names) <= known.keys():
            self.refuse(key, "the model has no place for it")
        return names

    def options(self, path: str, r: int) -> LoRA:
        """Return the options of the adapter of a linear, whose rank is r."""
        alpha = self.alpha

        # The first pattern that the end of the path matches, as in PEFT.
        for pattern, value in self.alpha_patterns:
            if pattern.match(path):
                alpha = value
                break
        return LoRA(r=r, alpha=alpha, dropout=self.dropout, rslora=self.rslora, dora=self.dora)


def compile_path_pattern(pattern: str) -> re.Pattern | None:
    """Return what finds the paths that end with a pattern of PEFT; None if it cannot be used.

    A regular expression from a file may take for ever: one that repeats a group, or repeats often.
    """
    repetitions = re.findall(r"[*+?{]", pattern)
    if len(pattern) > 1000 or len(repetitions) > 3 or re.search(r"\)[*+{]", pattern):
        return None
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError):
        return None


class Change(NamedTuple):
    """A parameter, and the value that it gets from the file."""

    parameter: nn.Parameter
    value: Tensor


@torch.no_grad()
def load_adapter(folder: Path, module: nn.Module, layout: Table = ()) -> list[str]:
    """Put a PEFT adapter on a model; what is in the file trains, nothing else.

    Returns the names of the linears. An adapter of a linear that is several here (OpenELM's qkv)
    becomes one for each, with copies of A. Raises UserError for what the module has no place for,
    another shape, or what is not plain LoRA or DoRA; the module is then as it was.
    """
    file = AdapterFile(folder, module, layout)

    # Only a whole LLaVA has such a note.
    merged = getattr(getattr(module, "config", None), "merged_adapters", ())
    if tensors_digest(file.tensors) in merged:
        what = "these adapters are in the weights of the model already"
        raise UserError(folder, what, "leave them out, or give the model that they were made for")

    # Everything is checked before the module changes.
    new_adapters, changes = _read_adapters(file, module)
    changes += _read_whole_parameters(file, module)

    for name, adapter in new_adapters.items():
        put(module, name, adapter)
    freeze(module)
    for parameter, value in changes:
        parameter.copy_(value).requires_grad_(True)
    return list(adapters(module))


def _read_adapters(
    file: AdapterFile, module: nn.Module
) -> tuple[dict[str, LoRALinear], list[Change]]:
    """Return a new adapter for each linear that the file adapts, by name, and their values.

    Takes the tensors of adapters out of `file.tensors`.
    """
    linears = {f"{name}.weight": module.get_submodule(name) for name in targets(module)}
    new_adapters = {}
    changes = []

    for key in list(file.tensors):
        if not key.endswith(ENDINGS["lora_A"]):
            continue
        path = key.removeprefix(ROOT).removesuffix(ENDINGS["lora_A"])
        names = file.our_names(key, f"{path}.weight", linears)

        if new_adapters.keys() & {name.removesuffix(".weight") for name in names}:
            file.refuse(key, "a second adapter for one linear")

        # What the file lacks is empty, and of a wrong shape if it is needed.
        given = {}
        for parameter, ending in ENDINGS.items():
            given[parameter] = file.tensors.pop(f"{ROOT}{path}{ending}", torch.empty(0))

        # Linears that are one in the file have the same inputs; their outputs are stacked.
        A = given["lora_A"]
        if A.dim() != 2 or not 0 < len(A) <= MOST_RANK:
            file.refuse(key, f"shape {list(A.shape)}, (rank, inputs) is needed")
        options = file.options(path, r=len(A))
        rows = [linears[name].out_features for name in names]
        columns = linears[names[0]].in_features
        check_shapes(file, key, given, options, sum(rows), columns)

        # Each linear gets its rows of B and of the magnitudes, and the whole of A.
        for i, name in enumerate(names):
            adapter = make_adapter(linears[name], options)
            new_adapters[name.removesuffix(".weight")] = adapter
            for kind, parameter in adapter.named_parameters(recurse=False):
                value = given[kind]
                if kind != "lora_A":
                    value = value.split(rows)[i]
                changes.append(Change(parameter, value))
    return new_adapters, changes


def _read_whole_parameters(file: AdapterFile, module: nn.Module) -> list[Change]:
    """Return the new values of parameters that were trained whole: all that is left in the file."""
    untied = untied_parameters(module)
    changes = []

    for key, tensor in file.tensors.items():
        names = file.our_names(key, key.removeprefix(ROOT), untied)
        parameters = [untied[name] for name in names]

        # Parameters that are one tensor in the file are stacked along dimension 0.
        lengths = [len(p) for p in parameters]
        shape = [sum(lengths), *parameters[0].shape[1:]]
        if list(tensor.shape) != shape:
            file.refuse(key, f"shape {list(tensor.shape)}, the model has {shape}")

        for parameter, value in zip(parameters, tensor.split(lengths), strict=True):
            changes.append(Change(parameter, value))
    return changes


def check_shapes(
    file: AdapterFile, key: str, given: dict[str, Tensor], options: LoRA, rows: int, columns: int
):
    """Raise UserError unless an adapter fits a linear of `rows` outputs and `columns` inputs."""
    magnitudes = rows if options.dora else 0
    needed = [[options.r, columns], [rows, options.r], [magnitudes]]
    shapes = [list(tensor.shape) for tensor in given.values()]
    if shapes != needed:
        file.refuse(key, f"adapter of shapes {shapes}, the model needs {needed}")
