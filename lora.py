"""LoRA and QLoRA on any linear: adapters, frozen weights in 4 or 8 bits, and merging.

    lora.apply(lm, LoRA(r=16, targets="q_proj,v_proj"))     # all else in lm is frozen
    lora.merge(lm)                                          # plain linears again

    with weights.empty():
        lm = LanguageModel.from_hf(config)
    source = weights.Checkpoint(folder)
    lora.load_quantized(lm, source, lm.rename, kind="nf4")  # then apply: QLoRA

    LoRA (Hu et al., 2021)           y = W x + b + s B A dropout(x)
        s = alpha / r; with rsLoRA (Kalajdzievski, 2023) alpha / sqrt(r)
    DoRA (Liu et al., 2024)          y = m (W + s B A) x / |W + s B A| + b, norms and m per row

N outputs, K inputs, r rank: W (N, K), A (r, K), B (N, r). A and B are float32, whatever W is in. W
stays where it was, as `base_layer` of the new module, so that the names of what trains are PEFT's:
`.lora_A`, `.lora_B`, `.lora_magnitude_vector`. A module may be a language model, an encoder, a
connector or a whole LLaVA. checkpoints/peft.py reads and writes PEFT's files.

In the order of the file: the modules that take the place of a linear; which linears they replace;
merging; quantizing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from checkpoints import weights
from checkpoints.names import Table, matches, rename, reverse
from config import LoRA, UserError
from kernels import int8, nf4
from kernels.lora import dense, lora_linears

# What quantizes a weight (N, K), by kind; and the ways to tune that a recipe can name.
KINDS = {"nf4": nf4.quantize, "int8": int8.quantize}
QUANTIZED = {"qlora-nf4": "nf4", "qlora-int8": "int8"}

# ------------------------------------------------------------------------------------ the modules


class Quantized(nn.Module):
    """A frozen linear in NF4 or int8, whose state dict is bitsandbytes', byte for byte.

    A quantized weight is a named tuple of tensors and numbers. The tensors are buffers, so that
    they move with the module; only their device may change.
    """

    def __init__(self, weight: nf4.NF4 | int8.Int8, bias: nn.Parameter | None):
        super().__init__()
        self.kind = type(weight)
        self.bias = bias
        if self.kind is int8.Int8:
            self.out_features, self.in_features = weight.weight.shape
        else:
            self.out_features, self.in_features = weight.shape
        self._store(weight)

    def _store(self, weight: nf4.NF4 | int8.Int8):
        """Keep the fields of a weight: tensors as buffers, the rest in a dict."""
        self.numbers = {}
        for name, value in weight._asdict().items():
            if isinstance(value, Tensor):
                # Not persistent, because the state dict has them under bitsandbytes' names.
                self.register_buffer(f"field_{name}", value, persistent=False)
            else:
                self.numbers[name] = value

    @property
    def weight(self) -> nf4.NF4 | int8.Int8:
        values = []
        for name in self.kind._fields:
            if name in self.numbers:
                values.append(self.numbers[name])
            else:
                values.append(getattr(self, f"field_{name}"))
        return self.kind(*values)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, tensor in self.weight.state().items():
            destination[prefix + key] = tensor

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ):
        # Our keys are taken out first: nn.Module would call them unexpected.
        state = {}
        for key in self.weight.state():
            if prefix + key in state_dict:
                state[key] = state_dict.pop(prefix + key)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )
        if state:
            self._store(self.kind.from_state(state).to(self.weight[0].device))
        else:
            missing.append(f"{prefix}weight")

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        # The kernel of LoRA multiplies with a quantized weight. Without an adapter its rank is 0.
        A = x.new_empty(0, self.in_features)
        B = x.new_empty(self.out_features, 0)
        return lora_linears(x, [self.weight], [self.bias], [A], [B], [0.0])[0]


class LoRALinear(nn.Module):
    """A linear and its adapter. A starts as PEFT's does, B at zero: at first it changes nothing."""

    def __init__(self, base: nn.Linear | Quantized, options: LoRA):
        super().__init__()
        self.base_layer = base
        self.options = options
        if options.rslora:
            self.scale = options.alpha / math.sqrt(options.r)
        else:
            self.scale = options.alpha / options.r

        device = base.weight[
            0
        ].device  # of a tensor's first row, or of a quantized weight's first field
        self.lora_A = nn.Parameter(torch.empty(options.r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, options.r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return W x + bias + s B A dropout(x), computed by one kernel."""
        dropout = 0.0
        seeds = None
        if self.training and self.lora_A.requires_grad and self.options.dropout:
            # The kernel draws its mask from a seed, and draws the same mask in backward.
            dropout = self.options.dropout
            seeds = torch.randint(2**62, (1,), device=x.device)

        # The kernel takes several linears of one input; here it is one.
        outputs = lora_linears(
            x,
            [self.base_layer.weight],
            [bias],
            [self.lora_A],
            [self.lora_B],
            [self.scale],
            dropout,
            seeds,
        )
        return outputs[0]

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        return self.product(x, self.base_layer.bias)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return W + s B A (N, K) in float32."""
        W = dense(self.base_layer.weight, torch.float32)
        return W.addmm(self.lora_B, self.lora_A, alpha=self.scale)


class DoRALinear(LoRALinear):
    """A LoRALinear that also trains the length m of each row of the weight.

    As in PEFT, no gradient passes through the norm. Dropout is the adapter's alone; PEFT's training
    also multiplies (m / norm - 1) W by the dropped x.
    """

    def __init__(self, base: nn.Linear | Quantized, options: LoRA):
        super().__init__(base, options)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """Return the norm of each row of W + s B A, (N,)."""
        return super().merged().norm(dim=1)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        y = self.product(x, None)
        # Autocast would round the norms, and so the lengths of all rows.
        with torch.autocast(x.device.type, enabled=False):
            factor = self.lora_magnitude_vector / self.row_norms()
            y = y * factor.to(y.dtype)

        bias = self.base_layer.bias
        if bias is None:
            return y
        return y + bias.to(y.dtype)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return m (W + s B A) / |W + s B A| (N, K) in float32."""
        W = super().merged()
        factor = self.lora_magnitude_vector / W.norm(dim=1)
        return W * factor[:, None]


def make_adapter(base: nn.Linear | Quantized, options: LoRA) -> LoRALinear:
    """Return a linear with a new adapter of the kind that the options name."""
    if options.dora:
        return DoRALinear(base, options)
    return LoRALinear(base, options)


# ------------------------------------------------------------------------------------ which linears


def adapters(module: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapters of a module by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, LoRALinear)}


def rename_table(module: nn.Module) -> Table:
    """Return a module's table of Hugging Face's names and ours.

    That of a LLaVA has the tables of its parts, each name behind the name of its part.
    """
    if not hasattr(module, "PARTS"):
        return getattr(module, "rename", ())

    table = []
    for name in module.PARTS:
        for theirs, ours in getattr(getattr(module, name), "rename", ()):
            if isinstance(ours, str):
                table.append((f"{name}.{theirs}", f"{name}.{ours}"))
            else:
                table.append((f"{name}.{theirs}", tuple(f"{name}.{one}" for one in ours)))
    return tuple(table)


def is_target(name: str, module: nn.Module) -> bool:
    """Say whether a module is a linear that may get an adapter.

    Not the head, whose weight the fused loss reads by itself, and not what already has one.
    """
    last = name.rpartition(".")[2]
    is_linear = isinstance(module, (nn.Linear, Quantized))
    return bool(name) and is_linear and last not in ("base_layer", "lm_head")


def is_below(name: str, parts: Iterable[str]) -> bool:
    """Say whether a module is one of the parts or lies in one; "" is the whole."""
    return any(part == "" or f"{name}.".startswith(f"{part}.") for part in parts)


def targets(module: nn.Module, patterns: str = "", parts: Iterable[str] = ("",)) -> list[str]:
    """Return the names of the linears of `parts` that get an adapter, in the module's order.

    patterns: separated by commas or spaces; none means all linears. A pattern is a glob (`*` one
    component, `**` any tail) or the end of a name, ours or Hugging Face's. Raises UserError for a
    pattern that matches nothing.
    """
    linears = []
    for name, m in module.named_modules():
        if is_target(name, m) and is_below(name, parts):
            linears.append(name)

    back = reverse(rename_table(module))
    theirs = {name: rename(f"{name}.weight", back).removesuffix(".weight") for name in linears}

    chosen = set()
    for pattern in patterns.replace(",", " ").split() or ["**"]:
        globs = (pattern, f"**.{pattern}")
        hits = [n for n in linears if matches(n, globs) or matches(theirs[n], globs)]
        if not hits:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none"
            fix = f"the linears here (no head): {known}"
            raise UserError("lora.targets", f"{pattern!r} matches no linear", fix)
        chosen.update(hits)
    return [name for name in linears if name in chosen]


def put(module: nn.Module, name: str, new: nn.Module):
    """Put a new module in the place of the one that has this name."""
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, new)


def freeze(module: nn.Module):
    """Freeze all parameters but those of adapters."""
    module.requires_grad_(False)
    for adapter in adapters(module).values():
        for p in adapter.parameters(recurse=False):
            p.requires_grad_(True)


def apply(module: nn.Module, options: LoRA, parts: Iterable[str] = ("",)) -> list[str]:
    """Put an adapter on every target in `parts` and freeze what else is in them.

    Returns the names of the linears. Draws A from torch's generator. Raises UserError as `targets`
    does, and for options out of range.
    """
    if options.r < 1 or not 0 <= options.dropout < 1:
        what = f"r {options.r}, dropout {options.dropout}"
        raise UserError("lora", what, "r is 1 or more, dropout below 1")

    names = targets(module, options.targets, parts)
    for name in names:
        put(module, name, make_adapter(module.get_submodule(name), options))
    for part in parts:
        freeze(module.get_submodule(part))
    return names


# ------------------------------------------------------------------------------------ merging


def merge(module: nn.Module, dtype: torch.dtype = torch.bfloat16):
    """Turn all adapters and quantized linears into plain linears, one by one.

    An adapter is added to its weight, in that weight's dtype; in `dtype` where it was quantized.
    """
    for name, m in list(module.named_modules()):
        if isinstance(m, LoRALinear):
            base = m.base_layer
            weight = m.merged()
        elif isinstance(m, Quantized) and not name.endswith(".base_layer"):
            base = m
            weight = dense(m.weight, dtype)
        else:
            continue

        if not isinstance(base, Quantized):
            weight = weight.to(base.weight.dtype)
        else:
            weight = weight.to(dtype)
        put(module, name, plain_linear(weight, base.bias))


def plain_linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """Return a frozen linear with this weight (N, K), which is not copied, and this bias."""
    with weights.empty():
        linear = nn.Linear(weight.size(1), weight.size(0))
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = bias
    return linear


# ------------------------------------------------------------------------------------ quantizing


@torch.no_grad()
def quantize(module: nn.Module, kind: str):
    """Quantize every linear but the head to `nf4` or `int8`, in place, one by one.

    A linear that is quantized already stays as it is. All is frozen.
    """
    module.requires_grad_(False)
    for name in targets(module):
        linear = module.get_submodule(name)
        if isinstance(linear, nn.Linear):
            put(module, name, Quantized(KINDS[kind](linear.weight), linear.bias))


def count(module: nn.Module) -> int:
    """Return how many parameters a module has, with those that are quantized."""
    total = sum(p.numel() for p in module.parameters())
    for m in module.modules():
        if isinstance(m, Quantized):
            total += m.in_features * m.out_features
    return total


def load_quantized(
    part: nn.Module,
    source: Mapping[str, Tensor],
    table: Table = (),
    prefix: str = "",
    kind: str = "nf4",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ignore: Iterable[str] = (),
) -> set[str]:
    """Do what weights.load does for an `empty` part, but leave every linear but the head in `kind`.

    Of the rest, tables of embeddings and the head keep the dtype of the file, vectors and
    convolutions come in `dtype`. One weight at a time is in memory unquantized, and it is quantized
    on `device` from the dtype of the file. All is frozen. Returns the keys that were used. Raises
    UserError as weights.load does, and for a weight that int8 cannot hold.
    """
    linears = {f"{name}.weight": name for name in targets(part)}
    quantized = {}

    def take(name: str, weight: Tensor, where: str) -> bool:
        if name not in linears:
            return False
        try:
            quantized[linears[name]] = KINDS[kind](weight.to(device))
        except ValueError as e:  # int8 cannot hold what is not finite
            raise UserError(where, str(e), "use nf4") from None
        return True

    used = weights.load(part, source, table, prefix, ignore=ignore, take=take)
    for name, weight in quantized.items():
        put(part, name, Quantized(weight, part.get_submodule(name).bias))

    # The matrices that are left: tables of embeddings, and the head.
    matrices = set()
    for m in part.modules():
        if isinstance(m, (nn.Embedding, nn.Linear)):
            matrices.add(m.weight)
    for p in part.requires_grad_(False).parameters():
        if p in matrices:
            p.data = p.data.to(device)
        else:
            p.data = p.data.to(device, dtype)
    return used
