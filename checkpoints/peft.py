"""PEFT's adapter files, read and written: adapter_model.safetensors and adapter_config.json.

    save_adapter(folder, lm)        # what PEFT loads onto transformers' model
    load_adapter(folder, lm)        # what PEFT wrote
    adapt(model, stages, PARTS)     # what a recipe says: new adapters, or those of a folder
    finish(model, output, base)     # a trained model without adapters; these go to output/adapter

    base_model.model.<path>.lora_A.weight                 (r, K)
    base_model.model.<path>.lora_B.weight                 (N, r)
    base_model.model.<path>.lora_magnitude_vector         (N,) of DoRA
    base_model.model.<path>.weight                        whatever else was trained: modules_to_save

Paths are Hugging Face's names of the modules. N outputs, K inputs, r rank.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoints import hf_llava, tinyllava
from checkpoints.files import read_json, write_file
from checkpoints.names import Table, as_tuple, rename, reverse
from checkpoints.weights import read_file
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

# The names that a whole LLaVA may have in a file: those of transformers and of TinyLLaVA Factory.
# What we write has the newer ones of transformers.
ADAPTED = hf_llava.TABLE + tinyllava.TABLE

# A parameter of an adapter, and how its name ends in the file.
ENDINGS = {
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    "lora_magnitude_vector": ".lora_magnitude_vector",
}

# The values of adapter_config.json that we compute. Any other one is another function of x, or
# changes the base weights, which the file does not have.
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
        ways = {getattr(stage.tune, part) for stage in stages} - {"frozen"}
        options = {stage.lora for stage in stages if "lora" in getattr(stage.tune, part)}
        if not options:
            continue
        if len(ways) > 1 or len(options) > 1:
            what = f"{', '.join(sorted(ways))} with {len(options)} sets of adapter options"
            fix = "tune it so in every stage that trains it, with equal options"
            raise UserError(f"tune.{part}", what, fix)

        (one,) = options
        if not one.adapter:
            apply(model, one, [attribute])
            continue

        # A folder holds the adapters of all parts, so an earlier part may have brought them.
        if not adapters(model.get_submodule(attribute)):
            load_adapter(Path(one.adapter), model, ADAPTED)
        if not adapters(model.get_submodule(attribute)):
            what = f"adapts nothing of the {part}"
            raise UserError(one.adapter, what, f"leave tune.{part} frozen")


def finish(model: nn.Module, output: Path, base: str) -> nn.Module:
    """Return a trained model with plain linears; its adapters, if any, go to `output`/adapter.

    base: the name of the model that the adapters are for.
    """
    if adapters(model):
        save_adapter(output / "adapter", model, hf_llava.NEWER, base)
        merge(model, torch.float32)
    return model


# ------------------------------------------------------------------------------------ writing


def untied_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that have one name.

    PEFT would save and train two copies of an embedding that is tied to the head.
    """
    uses = Counter(p for _, p in module.named_parameters(remove_duplicate=False))
    return {name: p for name, p in module.named_parameters() if uses[p] == 1}


def save_adapter(folder: Path, module: nn.Module, layout: Table = (), base: str = ""):
    """Write the adapters as PEFT does, whatever else trains as `modules_to_save`, the config last.

    Names are Hugging Face's for the module; `layout` is a table over them, for a whole LLaVA. base:
    the name of the model. Raises UserError for what PEFT cannot hold: no adapter, adapters of two
    kinds, one of several linears that are one in Hugging Face's model, a trained embedding that is
    tied to the head.
    """
    found = adapters(module)
    kinds = {(a.options.rslora, a.options.dora, a.options.dropout) for a in found.values()}
    if len(kinds) != 1:
        what = f"adapters of {len(kinds)} kinds"
        raise UserError(folder, what, "PEFT's files hold one kind; apply one LoRA")
    ((rslora, dora, dropout),) = kinds

    table = rename_table(module)
    state = {}

    # The adapters, and the rank and alpha of each.
    ranks = {}
    alphas = {}
    for name, adapter in found.items():
        path = name_in_file(f"{name}.weight", table, layout).removesuffix(".weight")
        ranks[path] = adapter.options.r
        alphas[path] = adapter.options.alpha
        for parameter, tensor in adapter.named_parameters(recurse=False):
            state[f"{ROOT}{path}{ENDINGS[parameter]}"] = tensor

    # Whatever else was trained, whole.
    untied = untied_parameters(module)
    modules_to_save = set()
    trained = {name.rpartition(".")[0] for name, p in module.named_parameters() if p.requires_grad}
    for owner in sorted(trained - found.keys()):
        for name, tensor in module.get_submodule(owner).named_parameters(owner, recurse=False):
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

    tensors = {key: tensor.detach().contiguous().cpu() for key, tensor in state.items()}
    write_file(
        folder / "adapter_model.safetensors",
        lambda temporary: save_file(tensors, temporary, {"format": "pt"}),
    )
    write_file(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def name_in_file(name: str, table: Table, layout: Table) -> str:
    """Return Hugging Face's name of a parameter. Raises UserError if it is part of a tensor."""
    theirs = rename(name, reverse(table))
    if not isinstance(rename(theirs, table), str):
        what = f"one of several that are one tensor in {theirs}: PEFT has no twin"
        raise UserError(name, what, "merge instead")
    return rename(theirs, reverse(layout))


# ------------------------------------------------------------------------------------ reading


class AdapterFile:
    """The folder of an adapter, opened for a module: its options, and where its tensors belong."""

    def __init__(self, folder: Path, module: nn.Module, layout: Table):
        self.file = folder / "adapter_model.safetensors"
        self.layout = layout
        self.table = rename_table(module)

        where = folder / "adapter_config.json"
        self.config = read_json(where)
        for key, values in KNOWN.items():
            if self.config.get(key) not in values:
                what = f"{self.config.get(key)!r} is not supported"
                raise UserError(f"{where}:{key}", what, "merge it with PEFT first")
        self.tensors = read_file(self.file)

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
        alpha = self.config.get("lora_alpha", 8)
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = value
                break
        return LoRA(
            r=r,
            alpha=alpha,
            dropout=self.config.get("lora_dropout", 0),
            rslora=bool(self.config.get("use_rslora", 0)),
            dora=bool(self.config.get("use_dora", 0)),
        )


@torch.no_grad()
def load_adapter(folder: Path, module: nn.Module, layout: Table = ()) -> list[str]:
    """Put a PEFT adapter on a model; what is in the file trains, nothing else.

    Returns the names of the linears. An adapter of a linear that is several here (OpenELM's qkv)
    becomes one for each, with copies of A. Raises UserError for what the module has no place for,
    another shape, or what is not plain LoRA or DoRA; the module is then as it was.
    """
    file = AdapterFile(folder, module, layout)
    linears = {f"{name}.weight": module.get_submodule(name) for name in targets(module)}
    whole = untied_parameters(module)
    rest = dict(file.tensors)

    # Everything is checked before the module changes: new adapters, and (parameter, its value).
    new: dict[str, LoRALinear] = {}
    changes: list[tuple[Tensor, Tensor]] = []
    for key in [key for key in file.tensors if key.endswith(ENDINGS["lora_A"])]:
        path = key.removeprefix(ROOT).removesuffix(ENDINGS["lora_A"])
        names = file.our_names(key, f"{path}.weight", linears)
        given = {}
        for parameter, ending in ENDINGS.items():
            given[parameter] = rest.pop(f"{ROOT}{path}{ending}", torch.empty(0))

        options = file.options(path, r=len(given["lora_A"]))
        rows = [linears[name].out_features for name in names]
        columns = linears[names[0]].in_features
        check_shapes(file, key, given, options, sum(rows), columns)

        # Each linear gets its rows of B and of the magnitudes, and the whole of A.
        for i, name in enumerate(names):
            new[name] = make_adapter(linears[name], options)
            for parameter, p in new[name].named_parameters(recurse=False):
                if parameter == "lora_A":
                    changes.append((p, given["lora_A"]))
                else:
                    changes.append((p, given[parameter].split(rows)[i]))

    # What is left in the file are parameters that were trained whole.
    for key, tensor in rest.items():
        old = [whole[name] for name in file.our_names(key, key.removeprefix(ROOT), whole)]
        lengths = [len(p) for p in old]
        shape = [sum(lengths), *old[0].shape[1:]]
        if list(tensor.shape) != shape:
            file.refuse(key, f"shape {list(tensor.shape)}, the model has {shape}")
        changes += zip(old, tensor.split(lengths), strict=True)

    for name, adapter in new.items():
        put(module, name.removesuffix(".weight"), adapter)
    freeze(module)
    for p, tensor in changes:
        p.copy_(tensor).requires_grad_(True)
    return list(adapters(module))


def check_shapes(
    file: AdapterFile, key: str, given: dict[str, Tensor], options: LoRA, rows: int, columns: int
):
    """Raise UserError unless an adapter fits a linear of `rows` outputs and `columns` inputs."""
    magnitudes = rows if options.dora else 0
    needed = [[options.r, columns], [rows, options.r], [magnitudes]]
    shapes = [list(tensor.shape) for tensor in given.values()]
    if shapes != needed:
        file.refuse(key, f"adapter of shapes {shapes}, the model needs {needed}")
