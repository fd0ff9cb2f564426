"""LoRA and QLoRA on any linear, over kernels/lora.py; merging; PEFT's adapter files in and out.

    lora.apply(lm, LoRA(r=16, targets="q_proj,v_proj"))                         # all else in lm is frozen
    lora.load_quantized(lm, weights.Checkpoint(folder), lm.rename, kind="nf4")  # of an `empty` lm; then apply: QLoRA
    lora.save_adapter(folder, lm)                                               # what PEFT loads
    lora.merge(lm)                                                              # plain linears again

    y = W x + b + s B A dropout(x)        s = alpha / r, or alpha / sqrt(r)          DoRA: y = m / |W + s B A| (...) + b

N outputs, K inputs, r rank. A and B are float32 whatever W is in. W stays where it was, as `base_layer`, so that the
names of what trains are PEFT's: `.lora_A`, `.lora_B`, `.lora_magnitude_vector`. A module is a language model, encoder,
connector or whole LLaVA. Every linear reads its own x: one read for q, k and v would take another call in the blocks.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoints import layouts, weights
from checkpoints.files import read_json, write_file
from checkpoints.names import Names, Table, matches, rename, reverse
from config import LoRA, UserError
from kernels import int8, nf4
from kernels.lora import dense, lora_linears

KINDS = {"nf4": nf4.quantize, "int8": int8.quantize}
QUANTIZED = {f"qlora-{kind}": kind for kind in KINDS}  # ways to tune

# ------------------------------------------------------------------------------------------------- modules


class Quantized(nn.Module):
    """A frozen linear in NF4 or int8. Its state dict is bitsandbytes', byte for byte; only its device may change."""

    def __init__(self, weight: nf4.NF4 | int8.Int8, bias: nn.Parameter | None):
        super().__init__()
        self.kind, self.bias = type(weight), bias
        self.out_features, self.in_features = (
            weight.weight if self.kind is int8.Int8 else weight
        ).shape
        self._hold(weight)

    def _hold(self, weight: nf4.NF4 | int8.Int8):
        self.rest = {k: v for k, v in weight._asdict().items() if not isinstance(v, Tensor)}
        for name, value in weight._asdict().items():
            if name not in self.rest:
                self.register_buffer(
                    f"field_{name}", value, persistent=False
                )  # state() has what lasts

    @property
    def weight(self) -> nf4.NF4 | int8.Int8:
        return self.kind(
            *(self.rest.get(k, getattr(self, f"field_{k}", None)) for k in self.kind._fields)
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + key: tensor for key, tensor in self.weight.state().items()})

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ):
        state = {
            key: state_dict.pop(prefix + key)
            for key in self.weight.state()
            if prefix + key in state_dict
        }
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )
        if state:
            self._hold(self.kind.from_state(state).to(self.weight[0].device))
        else:
            missing.append(f"{prefix}weight")

    def forward(self, x: Tensor) -> Tensor:
        A, B = (
            x.new_empty(0, self.in_features),
            x.new_empty(self.out_features, 0),
        )  # no adapter: of rank 0
        return lora_linears(x, [self.weight], [self.bias], [A], [B], [0.0])[0]


class LoRALinear(nn.Module):
    """A linear and its adapter (Hu et al., 2021). A starts as PEFT's does, B at zero: at first it changes nothing."""

    def __init__(self, base: nn.Linear | Quantized, options: LoRA):
        super().__init__()
        self.base_layer, self.options = base, options
        self.scale = options.alpha / (math.sqrt(options.r) if options.rslora else options.r)
        device = base.weight[
            0
        ].device  # of a tensor's first row, or of the first field of a quantized weight
        self.lora_A = nn.Parameter(torch.empty(options.r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, options.r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        drops = self.training and self.lora_A.requires_grad and self.options.dropout
        seeds = torch.randint(2**62, (1,), device=x.device) if drops else None
        each = [self.base_layer.weight], [bias], [self.lora_A], [self.lora_B], [self.scale]
        return lora_linears(x, *each, self.options.dropout if drops else 0.0, seeds)[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.base_layer.bias)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """-> W + s B A (N, K), float32."""
        return dense(self.base_layer.weight, torch.float32).addmm(
            self.lora_B, self.lora_A, alpha=self.scale
        )


class DoRALinear(LoRALinear):
    """The same with a trained length m of each row (Liu et al., 2024). As in PEFT no gradient passes through the norm.

    Dropout is the adapter's alone; PEFT's training also multiplies (m / norm - 1) W by the dropped x.
    """

    def __init__(self, base: nn.Linear | Quantized, options: LoRA):
        super().__init__(base, options)
        self.lora_magnitude_vector = nn.Parameter(super().merged().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        y, bias = self.product(x, None), self.base_layer.bias
        with torch.autocast(x.device.type, enabled=False):
            y = y * (self.lora_magnitude_vector / super().merged().norm(dim=1)).to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    @torch.no_grad()
    def merged(self) -> Tensor:
        W = super().merged()
        return W * (self.lora_magnitude_vector / W.norm(dim=1))[:, None]


# ------------------------------------------------------------------------------------- which linears, and how


def _table(module: nn.Module) -> Table:
    """A module's table of Hugging Face's names and ours; of a LLaVA, those of its parts behind their names."""
    parts = {f"{p}.": getattr(module, p) for p in getattr(module, "PARTS", ())} or {"": module}
    return tuple(
        (p + theirs, p + ours if isinstance(ours, str) else tuple(p + name for name in ours))
        for p, part in parts.items() for theirs, ours in getattr(part, "rename", ())
    )  # fmt: skip


def _tuple(names: Names) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def adapters(module: nn.Module) -> dict[str, LoRALinear]:
    return {name: m for name, m in module.named_modules() if isinstance(m, LoRALinear)}


def targets(module: nn.Module, patterns: str = "", parts: Iterable[str] = ("",)) -> list[str]:
    """The linears of `parts` without an adapter that match any pattern; the head, whose weight the loss reads, never.

    A pattern is a glob (`*` one component, `**` any tail) or the end of a name, ours or Hugging Face's. Raises
    UserError for one that matches nothing.
    """
    linears = [
        name for name, m in module.named_modules()
        if name and isinstance(m, (nn.Linear, Quantized)) and name.rpartition(".")[2] not in ("base_layer", "lm_head")
        and any(not part or f"{name}.".startswith(f"{part}.") for part in parts)
    ]  # fmt: skip
    back, chosen = reverse(_table(module)), set()
    theirs = {name: rename(f"{name}.weight", back).removesuffix(".weight") for name in linears}
    for pattern in patterns.replace(",", " ").split() or ["**"]:
        globs = pattern, f"**.{pattern}"
        hits = [n for n in linears if matches(n, globs) or matches(theirs[n], globs)]
        if not hits:
            known = ", ".join(sorted({n.rpartition(".")[2] for n in linears})) or "none"
            raise UserError(
                "lora.targets",
                f"{pattern!r} matches no linear",
                f"the linears here (no head): {known}",
            )
        chosen.update(hits)
    return [name for name in linears if name in chosen]


def _put(module: nn.Module, name: str, new: nn.Module):
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, new)


def freeze(module: nn.Module):
    """Only adapters train."""
    module.requires_grad_(False)
    for adapter in adapters(module).values():
        for p in adapter.parameters(recurse=False):
            p.requires_grad_(True)


def apply(module: nn.Module, options: LoRA, parts: Iterable[str] = ("",)) -> list[str]:
    """Put an adapter on every target in `parts`, freeze what else is in them -> the names of the linears.

    Draws A from torch's generator. Raises UserError as `targets` does, and for options out of range.
    """
    if options.r < 1 or not 0 <= options.dropout < 1:
        raise UserError(
            "lora", f"r {options.r}, dropout {options.dropout}", "r is 1 or more, dropout below 1"
        )
    names = targets(module, options.targets, parts)
    for name in names:
        _put(
            module,
            name,
            (DoRALinear if options.dora else LoRALinear)(module.get_submodule(name), options),
        )
    for part in parts:
        freeze(module.get_submodule(part))
    return names


def adapt(model: nn.Module, stages: list, parts: dict[str, str]):
    """Adapters on every part (name in a recipe -> attribute) that one of the stages tunes as `lora` or `qlora-KIND`.

    Raises UserError as `apply` does, for a part that another stage trains otherwise, and for options that differ.
    """
    for part, attribute in parts.items():
        ways = {getattr(stage.tune, part) for stage in stages} - {"frozen"}
        options = {stage.lora for stage in stages if "lora" in getattr(stage.tune, part)}
        if options and len(ways) + len(options) > 2:
            raise UserError(f"tune.{part}", f"{', '.join(sorted(ways))} with {len(options)} sets of adapter options",
                            "tune it so in every stage that trains it, with equal options")  # fmt: skip
        for one in options:
            if not one.adapter:
                apply(model, one, [attribute])
            elif not adapters(
                model.get_submodule(attribute)
            ):  # an earlier part's turn may have brought it
                load_adapter(Path(one.adapter), model, layouts.ADAPTED)
                if not adapters(model.get_submodule(attribute)):
                    raise UserError(
                        one.adapter, f"adapts nothing of the {part}", f"leave tune.{part} frozen"
                    )


def merge(module: nn.Module, dtype: torch.dtype = torch.bfloat16):
    """Plain linears again, one by one: adapters added to their weights, in the weight's dtype; `dtype` if quantized."""
    for name, m in list(module.named_modules()):
        base = m.base_layer if isinstance(m, LoRALinear) else m
        if base is m and (not isinstance(m, Quantized) or name.endswith(".base_layer")):
            continue
        to = dtype if isinstance(base, Quantized) else base.weight.dtype
        with weights.empty():
            linear = nn.Linear(base.in_features, base.out_features)
        linear.weight = nn.Parameter(dense(m.weight, to) if base is m else m.merged().to(to), False)
        linear.bias = base.bias
        _put(module, name, linear)


def finish(model: nn.Module, output: Path, base: str) -> nn.Module:
    """A trained model as plain linears again; its adapters, if it has any, go to `output`/adapter as PEFT has them."""
    if adapters(model):
        save_adapter(output / "adapter", model, layouts.LAYOUTS["llava"].table[2:], base)
        merge(model, torch.float32)
    return model


# ------------------------------------------------------------------------------------------------ quantizing


@torch.no_grad()
def quantize(module: nn.Module, kind: str):
    """Every linear but the head to `nf4` or `int8`, in place, one by one, where it is not yet. All is frozen."""
    for name in targets(module.requires_grad_(False)):
        linear = module.get_submodule(name)
        if isinstance(linear, nn.Linear):
            _put(module, name, Quantized(KINDS[kind](linear.weight), linear.bias))


def count(module: nn.Module) -> int:
    """The parameters of a module, with those that are quantized."""
    packed = sum(
        m.in_features * m.out_features for m in module.modules() if isinstance(m, Quantized)
    )
    return packed + sum(p.numel() for p in module.parameters())


class _Read(dict):
    """Tensors, and where each was read, for weights.load's messages."""

    locate: Callable[[str], str]


def load_quantized(
    part: nn.Module, source: Mapping[str, Tensor], table: Table = (), prefix: str = "", kind: str = "nf4",
    dtype: torch.dtype | None = None, device: torch.device | str = "cpu", ignore: Iterable[str] = (),
) -> set[str]:  # fmt: skip
    """weights.load for an `empty` part that leaves every linear but the head in `kind`.

    Of the rest, tables of embeddings and the head keep the dtype of the file, vectors and convolutions come in `dtype`.
    One tensor is in memory unquantized at a time, and it is quantized on `device` from the dtype of the file. All is
    frozen. Raises UserError as weights.load does, and for weights that int8 cannot hold.
    """
    linears, made = {f"{name}.weight": part.get_submodule(name) for name in targets(part)}, {}
    locate = getattr(source, "locate", lambda key: f"checkpoint:{key}")

    def read(key: str) -> Tensor:
        tensor, names = source[key], _tuple(rename(key.removeprefix(prefix), table))
        rows = [linears[name].out_features for name in names if name in linears]
        if len(rows) < len(names) or tensor.shape != (sum(rows), linears[names[0]].in_features):
            return tensor  # another shape is weights.load's to refuse
        try:
            made.update(
                (n, KINDS[kind](t.to(device)))
                for n, t in zip(names, tensor.split(rows), strict=True)
            )
        except ValueError as e:
            raise UserError(locate(key), str(e), "use nf4") from None
        return tensor.new_empty(()).expand(tensor.shape)  # a shape and a type without storage

    tensors = _Read((key, read(key)) for key in source if key.startswith(prefix))
    tensors.locate = locate
    used = weights.load(part, tensors, table, prefix, ignore=ignore)
    for name, weight in made.items():
        name = name.removesuffix(".weight")
        _put(part, name, Quantized(weight, part.get_submodule(name).bias))
    large = {m.weight for m in part.modules() if isinstance(m, (nn.Embedding, nn.Linear))}
    for p in part.requires_grad_(False).parameters():
        p.data = p.data.to(device, None if p in large else dtype)
    return used


# ------------------------------------------------------------------------------------------ PEFT's adapter files

ROOT = "base_model.model."
TENSORS = {
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    "lora_magnitude_vector": ".lora_magnitude_vector",
}
# Any other value is another function of x, or changes the base weights, which the file does not have.
KNOWN = {"peft_type": ("LORA",), "bias": (None, "none"), **dict.fromkeys(
    ("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config", "use_bdlora",
     "use_qalora"), (None, False)), "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}  # fmt: skip


def _untied(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that have one name. PEFT would save and train two copies of an embedding tied to the head."""
    uses = Counter(p for _, p in module.named_parameters(remove_duplicate=False))
    return {name: p for name, p in module.named_parameters() if uses[p] == 1}


def save_adapter(folder: Path, module: nn.Module, layout: Table = (), base: str = ""):
    """Write the adapters as PEFT does, whatever else trains as `modules_to_save`, and the config last.

    Names are Hugging Face's for the module; `layout` is a table of layouts.LAYOUTS over them. base: the model's name.
    Raises UserError where PEFT has no twin: nothing adapted, adapters of two kinds, one of several linears that are one
    in Hugging Face's model, a trained embedding that is tied.
    """
    table, found, untied = _table(module), adapters(module), _untied(module)
    kinds = {(a.options.rslora, a.options.dora, a.options.dropout) for a in found.values()}
    if len(kinds) != 1:
        raise UserError(
            folder, f"adapters of {len(kinds)} kinds", "PEFT's files hold one kind; apply one LoRA"
        )

    def place(name: str) -> str:
        theirs = rename(name, reverse(table))
        if not isinstance(rename(theirs, table), str):
            raise UserError(
                name,
                f"one of several that are one tensor in {theirs}: PEFT has no twin",
                "merge instead",
            )
        return rename(theirs, reverse(layout))

    state, ranks, alphas, whole = {}, {}, {}, set()
    for name, adapter in found.items():
        path = place(f"{name}.weight").removesuffix(".weight")
        ranks[path], alphas[path] = adapter.options.r, adapter.options.alpha
        state |= {
            f"{ROOT}{path}{TENSORS[kind]}": p for kind, p in adapter.named_parameters(recurse=False)
        }
    trained = {name.rpartition(".")[0] for name, p in module.named_parameters() if p.requires_grad}
    for owner in sorted(trained - found.keys()):
        for name, p in module.get_submodule(owner).named_parameters(owner, recurse=False):
            if name not in untied:
                raise UserError(
                    name,
                    "trained, and tied to the head: PEFT would train two copies",
                    "merge instead",
                )
            state[ROOT + place(name)] = p
            whole.add(place(name).rpartition(".")[0])
    r, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    ((rslora, dora, dropout),) = kinds
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": r, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora, "use_dora": dora,
        "rank_pattern": {k: v for k, v in ranks.items() if v != r},
        "alpha_pattern": {k: v for k, v in alphas.items() if v != alpha},
        "target_modules": sorted(ranks), "modules_to_save": sorted(whole) or None, "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True,
    }  # fmt: skip
    tensors = {key: p.detach().contiguous().cpu() for key, p in state.items()}
    write_file(
        folder / "adapter_model.safetensors", lambda to: save_file(tensors, to, {"format": "pt"})
    )
    write_file(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def load_adapter(folder: Path, module: nn.Module, layout: Table = ()) -> list[str]:
    """Put a PEFT adapter on a model -> the names of the linears. What is in the file trains, nothing else.

    An adapter of a linear that is several here (OpenELM's qkv) becomes one for each, with copies of A. Raises
    UserError for what the module has no place for, another shape, or what is not plain LoRA or DoRA; the module is
    then as it was.
    """
    where, file, table = (
        folder / "adapter_config.json",
        folder / "adapter_model.safetensors",
        _table(module),
    )
    c = read_json(where)
    for key, values in KNOWN.items():
        if c.get(key) not in values:
            raise UserError(
                f"{where}:{key}", f"{c.get(key)!r} is not supported", "merge it with PEFT first"
            )
    tensors = weights.read_file(file)
    linears, whole = (
        {f"{name}.weight": module.get_submodule(name) for name in targets(module)},
        _untied(module),
    )
    dropout, rslora, dora = (c.get(key, 0) for key in ("lora_dropout", "use_rslora", "use_dora"))
    options, made = LoRA(dropout=dropout, rslora=bool(rslora), dora=bool(dora)), {}
    changes: list[tuple[Tensor, Tensor]] = []

    def need(true: bool, key: str, what: str):
        if not true:
            raise UserError(f"{file}:{key}", what, "give the model that it was made for")

    def ours(key: str, path: str, known: Mapping) -> tuple[str, ...]:
        names = _tuple(rename(rename(path, layout), table))
        need(set(names) <= known.keys(), key, "the model has no place for it")
        return names

    for key in [key for key in tensors if key.endswith(TENSORS["lora_A"])]:
        path, nothing = key.removeprefix(ROOT).removesuffix(TENSORS["lora_A"]), torch.empty(0)
        names = ours(key, f"{path}.weight", linears)
        given = {kind: tensors.pop(f"{ROOT}{path}{end}", nothing) for kind, end in TENSORS.items()}
        rows, r = [linears[name].out_features for name in names], len(given["lora_A"])
        shapes = (
            [r, linears[names[0]].in_features],
            [sum(rows), r],
            [sum(rows) if options.dora else 0],
        )
        there = [[*tensor.shape] for tensor in given.values()]
        need(there == [*shapes], key, f"adapter of shapes {there}, the model needs {[*shapes]}")
        alphas = (
            v
            for k, v in (c.get("alpha_pattern") or {}).items()
            if re.match(rf"(.*\.)?({k})$", path)
        )
        one = replace(options, r=r, alpha=next(alphas, c.get("lora_alpha", 8)))
        for i, name in enumerate(names):
            made[name] = (DoRALinear if one.dora else LoRALinear)(linears[name], one)
            for kind, p in made[name].named_parameters(recurse=False):
                changes.append((p, given[kind] if kind == "lora_A" else given[kind].split(rows)[i]))
    for key, tensor in tensors.items():
        old = [whole[name] for name in ours(key, key.removeprefix(ROOT), whole)]
        shape = [sum(map(len, old)), *old[0].shape[1:]]
        need([*tensor.shape] == shape, key, f"shape {[*tensor.shape]}, the model has {shape}")
        changes += zip(old, tensor.split([len(p) for p in old]), strict=True)
    for name, adapter in made.items():
        _put(module, name.removesuffix(".weight"), adapter)
    freeze(module)
    for p, tensor in changes:
        p.copy_(tensor).requires_grad_(True)
    return list(adapters(module))
