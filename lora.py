"""LoRA and QLoRA on any linear: adapters, frozen weights in 4 or 8 bits, and merging.

LoRA, for training and afterwards:

    lora.apply(lm, LoRA(r=16, targets="q_proj,v_proj"))     # all else in lm is frozen
    lora.merge(lm)                                          # plain linears again

QLoRA (Dettmers et al., 2023): load the weights quantized, then apply.

    with weights.empty():
        lm = LanguageModel.from_hf(config)
    source = weights.Checkpoint(folder)
    lora.load_quantized(lm, source, lm.rename, kind="nf4")
    lora.apply(lm, LoRA(r=16))

The arithmetic, for a linear of N outputs and K inputs, with rank r: W (N, K), A (r, K), B (N, r).

    LoRA (Hu et al., 2021)             y = W x + b + s B A dropout(x), s = alpha / r
    rsLoRA (Kalajdzievski, 2023)       the same with s = alpha / sqrt(r)
    DoRA (Liu et al., 2024)            y = m (W + s B A) x / |W + s B A| + b, norms and m per row

A and B are float32, whatever W is in. W stays in the module `base_layer` of the new one, so that
the names of what trains are PEFT's: `.lora_A`, `.lora_B`, `.lora_magnitude_vector`. A module may be
a language model, an encoder, a connector or a whole LLaVA. checkpoints/peft.py reads and writes
PEFT's files.

The file, from top to bottom:

    Quantized, LoRALinear, DoRALinear    the modules that take the place of a linear
    targets, apply, freeze               which linears they replace
    merge                                back to plain linears
    quantize, load_quantized, count      4 and 8 bits
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

# The function that quantizes a weight (N, K), by kind.
KINDS = {"nf4": nf4.quantize, "int8": int8.quantize}

# The ways to tune that quantize, as [stage.NAME.tune] names them, and their kinds.
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
        """Keep the fields of a weight: tensors as buffers, numbers in a dict."""
        self.numbers = {}
        for name, value in weight._asdict().items():
            if isinstance(value, Tensor):
                # Not persistent, because the state dict has them under bitsandbytes' names.
                self.register_buffer(f"field_{name}", value, persistent=False)
            else:
                self.numbers[name] = value

    @property
    def weight(self) -> nf4.NF4 | int8.Int8:
        """The quantized weight, put together from the buffers, wherever they are now."""
        values = []
        for name in self.kind._fields:
            if name in self.numbers:
                values.append(self.numbers[name])
            else:
                values.append(getattr(self, f"field_{name}"))
        return self.kind(*values)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Add the weight to a state dict. nn.Module calls this with the module's prefix."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, tensor in self.weight.state().items():
            destination[prefix + key] = tensor

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ):
        """Take the weight from a state dict. nn.Module calls this with the module's prefix."""
        # Our keys are taken out first: nn.Module would call them unexpected.
        state = {}
        for key in self.weight.state():
            if prefix + key in state_dict:
                state[key] = state_dict.pop(prefix + key)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )

        if not state:
            missing.append(f"{prefix}weight")
            return
        try:
            weight = self.kind.from_state(state)
        except ValueError as e:
            errors.append(f"{prefix}weight: {e}")  # nn.Module raises them all at the end
            return

        # The weight stays on its device, as a parameter would.
        device = self.weight[0].device  # of its first tensor
        self._store(weight.to(device))

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + bias, (..., K) -> (..., N)."""
        # The kernel that multiplies with quantized weights is LoRA's. Rank 0 is no adapter.
        A = x.new_empty(0, self.in_features)
        B = x.new_empty(self.out_features, 0)
        outputs = lora_linears(x, [self.weight], [self.bias], [A], [B], [0.0])
        return outputs[0]


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

        # weight[0] is a row of a tensor, or the first field of a quantized weight.
        device = base.weight[0].device
        A = torch.empty(options.r, base.in_features, device=device)
        B = torch.zeros(base.out_features, options.r, device=device)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return W x + bias + s B A dropout(x), computed by one kernel."""
        dropout = 0.0
        seeds = None
        learns = self.training and self.lora_A.requires_grad
        if learns and self.options.dropout:
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

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + bias + s B A dropout(x), (..., K) -> (..., N)."""
        return self.product(x, self.base_layer.bias)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return W + s B A (N, K) in float32."""
        W = dense(self.base_layer.weight, torch.float32)
        return W.addmm(self.lora_B, self.lora_A, alpha=self.scale)


class DoRALinear(LoRALinear):
    """A LoRALinear that also trains the length m of each row of the weight.

    As in PEFT, no gradient passes through the norm. Dropout is on the adapter's input alone; PEFT
    in training also multiplies (m / norm - 1) W by the dropped x.
    """

    def __init__(self, base: nn.Linear | Quantized, options: LoRA):
        super().__init__(base, options)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """Return the norm of each row of W + s B A, (N,)."""
        return super().merged().norm(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return m / |W + s B A| (W x + s B A dropout(x)) + bias, (..., K) -> (..., N)."""
        # The bias comes last, because the lengths of the rows do not scale it.
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
    is_llava = hasattr(module, "PARTS")
    if not is_llava:
        return getattr(module, "rename", ())

    table = []
    for part in module.PARTS:
        part_table = getattr(getattr(module, part), "rename", ())
        for theirs, ours in part_table:
            if isinstance(ours, str):
                with_part = f"{part}.{ours}"
            else:  # one tensor of theirs is several of ours
                with_part = tuple(f"{part}.{name}" for name in ours)
            table.append((f"{part}.{theirs}", with_part))
    return tuple(table)


def is_target(name: str, module: nn.Module) -> bool:
    """Say whether a module is a linear that may get an adapter."""
    # A linear that is the whole module has no name, and nothing to be put into.
    if not name or not isinstance(module, (nn.Linear, Quantized)):
        return False

    # The fused loss reads the weight of the head by itself. A base_layer has an adapter already.
    _, _, last = name.rpartition(".")
    return last not in ("base_layer", "lm_head")


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

    # Hugging Face's name of each. The tables rename parameters, so a weight's name stands for it.
    to_theirs = reverse(rename_table(module))
    theirs = {}
    for name in linears:
        theirs[name] = rename(f"{name}.weight", to_theirs).removesuffix(".weight")

    chosen = set()
    for pattern in patterns.replace(",", " ").split() or ["**"]:
        globs = (pattern, f"**.{pattern}")  # a whole name, or the end of one
        hits = [n for n in linears if matches(n, globs) or matches(theirs[n], globs)]
        if not hits:
            last_components = {name.rpartition(".")[2] for name in linears}
            known = ", ".join(sorted(last_components)) or "none"
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
        linear = module.get_submodule(name)
        put(module, name, make_adapter(linear, options))

    # Adapters are there now, so this leaves them trainable.
    for part in parts:
        freeze(module.get_submodule(part))
    return names


# ------------------------------------------------------------------------------------ merging


def merge(module: nn.Module, dtype: torch.dtype = torch.bfloat16):
    """Turn all adapters and quantized linears into plain linears, one by one.

    A weight and its adapter are added in float32. The sum has the weight's dtype, or `dtype` where
    the weight was quantized.
    """
    # A list, because the modules change on the way.
    for name, m in list(module.named_modules()):
        if isinstance(m, LoRALinear):
            base = m.base_layer
            weight = m.merged()
        elif isinstance(m, Quantized) and not name.endswith(".base_layer"):
            base = m
            weight = dense(m.weight, dtype)
        else:
            continue

        if isinstance(base, Quantized):
            weight = weight.to(dtype)
        else:
            weight = weight.to(base.weight.dtype)
        put(module, name, plain_linear(weight, base.bias))


def plain_linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """Return a frozen linear with this weight (N, K), which is not copied, and this bias."""
    # On the meta device, so that no memory is filled with random numbers first.
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
            weight = KINDS[kind](linear.weight)
            put(module, name, Quantized(weight, linear.bias))


def count(module: nn.Module) -> int:
    """Return how many parameters a module has, with those that are quantized."""
    # A quantized weight is in buffers, and two of its values may share a byte.
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
    """Load an `empty` part as weights.load does, but quantize every linear except the head.

    One weight at a time is in memory unquantized. It is quantized to `kind` on `device`, from the
    dtype of the file. Of the rest, tables of embeddings and the head keep the dtype of the file;
    vectors and convolutions come in `dtype`. All is frozen. Returns the keys that were used. Raises
    UserError as weights.load does, and for a weight that int8 cannot hold.
    """
    linears = {f"{name}.weight": name for name in targets(part)}
    quantized = {}

    def take(name: str, weight: Tensor, where: str) -> bool:
        """Quantize a weight and return True if it is a linear's; weights.load skips it then."""
        if name not in linears:
            return False
        try:
            quantized[linears[name]] = KINDS[kind](weight.to(device))
        except ValueError as e:  # int8 cannot hold what is not finite
            raise UserError(where, str(e), "use nf4") from None
        return True

    # The linears keep empty weights until all is read; the biases are loaded by then.
    used = weights.load(part, source, table, prefix, ignore=ignore, take=take)
    for name, weight in quantized.items():
        bias = part.get_submodule(name).bias
        put(part, name, Quantized(weight, bias))

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
