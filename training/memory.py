"""What a stage takes of a GPU's memory, by a micro-batch that is computed with nothing in it.

    memory = measure(model, stage, row, options)       # requires_grad says what trains
    memory.total                                       # bytes of a GPU that holds the whole model
    sharded(memory, model, gpus).total                 # bytes of each, where fsdp shards it

No formula knows what autograd keeps of a model. So forward and backward run here as they do in
training, on tensors that have a shape and no memory (torch's FakeTensor), and every tensor that
comes and goes is counted. The tensors pose as a GPU's: Triton's operations are taken, of which the
sizes of the results are known. What an operation takes for itself is added where it is much.

Measured are the activations, the copies that autocast makes, and the gradients. Weights and AdamW's
moments are counted from the parameters.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from config import Stage
from inputs.sample import Sample
from kernels.cross_entropy import CHUNK
from model import LLaVA
from packing import IMAGE_TOKEN, Item, constant, pack_samples
from training.estimate import RowSize, samples_of_micro_batch, samples_of_step

SPARE = 1.5e9  # bytes for CUDA's and NCCL's own use and for fragments

# Bytes of a weight in a quantized linear, its scales included.
QUANTIZED = {"qlora-nf4": 0.516, "qlora-int8": 1}


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, by what they are for."""

    weights: float  # as training keeps them: float32, frozen matrices in bfloat16 or quantized
    gradients: float
    AdamW: float  # two moments in float32
    copies: float  # autocast's bfloat16 copies of the matrices that train
    activations: float  # all else that is there when there is most
    spare: float = SPARE

    @property
    def by_kind(self) -> dict[str, float]:
        """The bytes by the names of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def total(self) -> float:
        """All bytes together."""
        return sum(self.by_kind.values())


def measure(model: LLaVA, stage: Stage, row: RowSize, bf16: bool) -> Memory:
    """Return what a stage takes of a GPU that holds the whole model.

    model: on any device, the meta device too; its frozen matrices are rounded as training rounds
    them. bf16: whether the stage computes under autocast.
    """
    samples = samples_of_micro_batch(stage, row)
    batch = typical_batch(model, row, samples)
    several = samples < samples_of_step(stage, row)  # gradients of an earlier micro-batch are there
    peak, copies = simulate(model, batch, bf16, several)

    trained = 0
    for p in model.parameters():
        if p.requires_grad:
            trained += p.numel() * p.element_size()
    weights = weight_bytes(model, stage)

    # A quantized matrix is unpacked for its product, one at a time.
    if {stage.tune.llm, stage.tune.vision} & set(QUANTIZED):
        peak += 2 * max(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return Memory(
        weights=weights,
        gradients=trained,
        AdamW=2 * trained,
        copies=copies,
        activations=max(0, peak - copies - trained),
    )


def sharded(memory: Memory, model: LLaVA, gpus: int) -> Memory:
    """Return what each of several GPUs takes if fsdp shards the model over them.

    memory: of a GPU that holds the whole model. A block of the language model is gathered when it
    is used, while the next one is fetched; all that is in no block stays gathered.
    """
    blocks = model.language_model.blocks
    in_block = max(_count(block.parameters()) for block in blocks)
    elsewhere = _count(model.parameters()) - sum(_count(block.parameters()) for block in blocks)

    # Gathered in bfloat16, with their gradients before these are summed over the GPUs.
    gathered = 2 * (elsewhere + 2 * in_block)
    if memory.gradients:
        gathered *= 2
    return Memory(
        weights=memory.weights / gpus,
        gradients=memory.gradients / gpus,
        AdamW=memory.AdamW / gpus,
        copies=gathered,
        activations=memory.activations,
    )


def _count(parameters) -> int:
    """Return how many numbers the parameters hold."""
    return sum(p.numel() for p in parameters)


def weight_bytes(model: LLaVA, stage: Stage) -> float:
    """Return the bytes of all parameters; those of linears that a stage quantizes take less."""
    bytes_of = {}  # a linear's weight -> bytes of one of its values
    for part, how in (
        (model.language_model, stage.tune.llm),
        (model.vision_tower, stage.tune.vision),
    ):
        for name, module in part.named_modules():
            is_linear = isinstance(module, nn.Linear)
            if is_linear and name != "lm_head" and how in QUANTIZED:
                bytes_of[module.weight] = QUANTIZED[how]

    size = 0.0
    for p in model.parameters():
        bytes_per_value = p.element_size()
        if not p.requires_grad:
            bytes_per_value = bytes_of.get(p, bytes_per_value)
        size += p.numel() * bytes_per_value
    return size


# ------------------------------------------------------------------------------- the simulation


def typical_batch(model: LLaVA, row: RowSize, rows: int):
    """Return a micro-batch of `rows` average rows. Its pixels are not initialised."""
    items = round(rows * row.items)
    supervised = round(row.supervised)
    samples = []
    for r in range(rows):
        # The items are dealt to the rows in turn.
        here = items // rows
        if r < items % rows:
            here += 1
        positions = here * model.views.positions(row.shape)
        text = max(1, round(row.text))

        ids = torch.zeros(positions + text, dtype=torch.int64)
        ids[:positions] = IMAGE_TOKEN
        labels = torch.full_like(ids, -100)
        labels[len(labels) - min(supervised, text) :] = 0
        labels[0] = -100

        pixels = torch.empty(model.views.pixels_size(row.shape), dtype=model.views.dtype)
        samples.append(Sample(ids, labels, [Item(pixels, row.shape)] * here, r, 0))
    return pack_samples(samples)


def simulate(model: LLaVA, batch, bf16: bool, several: bool) -> tuple[int, int]:
    """Return the most bytes that a micro-batch has at one time, and autocast's copies among them.

    The weights do not count. several: whether gradients are there from the start.
    """
    supervised = batch.supervised  # under FakeTensorMode nothing can be counted
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, kernels.pretending():
        model = _without_storage(model)
        if several:
            for p in model.parameters():
                if p.requires_grad:
                    p.grad = torch.empty_like(p)

        ledger = Ledger(model, supervised)
        batch = batch._with_each_tensor(fake.from_tensor)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), ledger:
            model.loss(batch).backward()

    # What was kept in there has no values. A real step would read nothing from it, silently.
    constant.cache_clear()
    return ledger.peak, ledger.copies


def _without_storage(model: nn.Module) -> nn.Module:
    """Return a copy of a model with the shapes of its tensors, and nothing in them."""
    # deepcopy takes from `copies` what it finds there. So nothing is copied, and tied weights stay
    # one.
    copies = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, tensor.requires_grad)
        copies[id(tensor)] = empty
    return copy.deepcopy(model, copies)


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors that are made under it, from when they come until they go."""

    def __init__(self, model: nn.Module, supervised: int):
        super().__init__()
        self.supervised = supervised  # tokens
        self.live = 0
        self.peak = 0
        self.copies = 0  # of weights in another type
        self._counted = weakref.WeakKeyDictionary()  # the storages that are in the books
        self._weights = weakref.WeakKeyDictionary()

        # Weights are counted by others. Gradients that are there belong to the micro-batch.
        for tensor in [*model.parameters(), *model.buffers()]:
            self._counted[tensor.untyped_storage()] = True
            self._weights[tensor.untyped_storage()] = True
        for p in model.parameters():
            if p.grad is not None:
                self._enter(p.grad)

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        """Run one operation and enter what it returns."""
        result = operation(*arguments, **(keywords or {}))
        name = operation._schema.name
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            entered = self._enter(tensor)
            if name == "aten::_to_copy" and arguments[0].untyped_storage() in self._weights:
                self.copies += entered

        # The loss has a chunk of logits for itself, and its head in the type of the products.
        if name == "barellava::linear_cross_entropy":
            names = [argument.name for argument in operation._schema.arguments]
            given = dict(zip(names, arguments, strict=True))
            weight = given["weight"]
            size = given["dtype"].itemsize
            inside = min(CHUNK, self.supervised * len(weight) * size)
            if given["dtype"] != weight.dtype:
                inside += weight.numel() * size
            self.peak = max(self.peak, self.live + inside)
        return result

    def _enter(self, tensor: Tensor) -> int:
        """Count a tensor's storage, unless it has been. Return its bytes, or 0."""
        storage = tensor.untyped_storage()
        if storage in self._counted:
            return 0
        size = storage.nbytes()
        self._counted[storage] = True
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, size)
        return size

    def _leave(self, size: int):
        """Take a storage that is gone out of the books."""
        self.live -= size
