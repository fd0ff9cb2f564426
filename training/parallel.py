"""A model on several ranks: copied (DDP) or sharded (FSDP2), so that all of them make one step.

    mode = choose_mode("auto", model, ranks)
    parallel = ParallelModel(model, mode, ranks)
    for i, batch in enumerate(parallel.in_step(batches)):
        with parallel.accumulating(last=i + 1 == len(batches)):
            parallel.backward(parallel.loss(batch) / supervised)

    none   One process.
    ddp    Every rank holds the whole model. Gradients are averaged.
    fsdp   Weights, gradients and AdamW's moments are sharded over the ranks. A block of the
           language model is gathered when it is used; all the rest (towers, connector, embeddings,
           head) at the start of each forward pass. So every micro-batch runs the same collectives,
           with pictures or without, and a rank that has run out of micro-batches takes part with
           an empty one. Weights are gathered in the dtype in which one process would multiply with
           them (`_shard`): the arithmetic is that of one process.

Below the class: what may be a shard (`whole`, `local_part`, `shard_like`), and the gradient norm.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from config import UserError
from inference import generation
from kernels import has_bf16
from packing import EMPTY, Batch
from training.ranks import Ranks

# ------------------------------------------------------------------------------- what auto means


def use_bf16(precision: str, device: torch.device) -> bool:
    """Return whether a run computes in bfloat16. precision: auto, bf16 or fp32.

    auto takes it on GPUs and CPUs that have instructions for it; without them it is slower. Raises
    UserError for bf16 on a GPU that has none.
    """
    if device.type != "cpu" and precision == "bf16" and not has_bf16(device):
        what = "bf16, but this GPU has no instructions for it"
        raise UserError("train.precision", what, "write auto or fp32")
    if precision != "auto":
        return precision == "bf16"
    return has_bf16(device)


# The dtype in which a stage keeps a parameter. One that is missing stays as it is.
Dtypes = dict[nn.Parameter, torch.dtype]


def choose_mode(asked: str, model: nn.Module, ranks: Ranks, dtypes: Dtypes | None = None) -> str:
    """Return none, ddp or fsdp. asked: the recipe's train.parallel, one of these or auto.

    auto is ddp while weights, gradients and moments take no more than half of a GPU, else fsdp.
    dtypes: as ParallelModel will place the weights; files may hold fewer bytes.
    Raises UserError for none on several ranks.
    """
    if ranks.size == 1:
        return "none"
    if asked == "none":
        what = f"none, but {ranks.size} ranks"
        raise UserError("train.parallel", what, "start one process, or write auto")
    if asked != "auto":
        return asked
    if ranks.device.type == "cpu":
        return "ddp"

    # A gradient and two moments in float32 are 12 bytes.
    need = 0
    for p in model.parameters():
        dtype = (dtypes or {}).get(p, p.dtype)
        need += p.numel() * dtype.itemsize
        if p.requires_grad:
            need += p.numel() * 12
    for buffer in model.buffers():  # quantized weights, which fsdp would not shard
        need += buffer.nbytes
    room = torch.cuda.get_device_properties(ranks.device).total_memory / 2
    return "fsdp" if need > room else "ddp"


# -------------------------------------------------------------------------- the model on the ranks


class _Loss(nn.Module):
    """A module whose forward is `model.loss(batch)`.

    DDP and FSDP hook onto a module's forward. The model's own forward is the convenience call on
    padded batches; training needs the loss of a packed one.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return self.model.loss(batch)


class ParallelModel:
    """A model that all ranks train together.

    It moves the model to the rank's device. With fsdp it replaces the parameters of `model` by
    shards. So the optimizer must be made afterwards.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: str,
        ranks: Ranks,
        bf16: bool = False,
        dtypes: Dtypes | None = None,
    ):
        """model: on the CPU or the rank's device. bf16: whether it computes under autocast.

        dtypes: in which to place parameters.
        """
        dtypes = dtypes or {}
        self.mode = mode
        self.ranks = ranks
        self.model = model
        self.whole = _Loss(model)  # without DDP around it
        self.module: nn.Module = self.whole

        # fsdp moves the blocks one by one, because all of them may not fit.
        if mode != "fsdp":
            place(model.parameters(), ranks.device, dtypes)
            model.to(ranks.device)  # its buffers

        if mode == "ddp":
            device_ids = None
            if ranks.device.type == "cuda":
                device_ids = [ranks.device]
            with warnings.catch_warnings():
                # torch 2.13 has another name for it, which 2.11 does not know.
                warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
                self.module = DistributedDataParallel(
                    self.whole,
                    device_ids=device_ids,
                    gradient_as_bucket_view=True,
                    broadcast_buffers=False,  # they are quantized weights, which never change
                )
            if ranks.size > 2:
                self._settle_buckets(bf16)

        elif mode == "fsdp":
            _gather_in_order(model)
            self.module = _shard(self.whole, ranks, bf16, dtypes)

    def _settle_buckets(self, bf16: bool):
        """Make a backward pass of one token that teaches nothing, and forget it.

        DDP sums gradients in buckets, and puts them into other buckets after its first pass, in
        the order in which they came. Sums over three ranks or more depend on that in their last
        bit. So the first step of a resumed run must find the buckets that a whole run has by then.
        """
        device = self.ranks.device
        generators = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(generators):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = self.loss(EMPTY.to(device))
            self.backward(loss)
        for parameter in self.whole.parameters():
            parameter.grad = None

    def loss(self, batch: Batch) -> Tensor:
        """Return the sum of the token losses of a micro-batch, ready for `backward`."""
        return self.module(batch)

    def backward(self, loss: Tensor):
        """Add the gradients of this rank's share of the step's loss.

        DDP and FSDP average gradients over the ranks. The step's loss is a sum over them.
        """
        (loss * self.ranks.size).backward()

    def in_step(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches. With fsdp then yield EMPTY for as long as another rank still has one.

        Each forward pass of fsdp gathers shards from all ranks, so all must make as many.
        """
        if self.mode != "fsdp":
            yield from batches
            return

        batches = iter(batches)
        while True:
            batch = next(batches, None)
            has_one = batch is not None
            ranks_with_one = self.ranks.total(int(has_one))
            if ranks_with_one == 0:
                return
            if batch is None:
                batch = EMPTY
            yield batch

    def accumulating(self, last: bool) -> contextlib.AbstractContextManager:
        """Return the context of one micro-batch. last: it is the last one of this rank in the step.

        With ddp, gradients travel once a step, with the last micro-batch. With fsdp they travel
        with each one: to wait, a rank would have to keep the unsharded gradients, which do not fit.
        """
        if self.mode == "ddp" and not last:
            return self.module.no_sync()
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def forward_only(self) -> Iterator[nn.Module]:
        """Validate in this context, without gradients and dropout. Yields a module of the loss.

        Each rank may call that module, or parts of the model, as often as it likes. So it is
        without ddp, which would count the calls. With fsdp, what is not in the blocks is gathered
        here, once, and sharded again at the end.
        """
        gathered = []
        if self.mode == "fsdp":
            gathered = [self.module, self.whole]
        for module in gathered:
            module.unshard()
        self.module.eval()
        try:
            with torch.no_grad():
                yield self.whole
        finally:
            self.module.train()
            for module in gathered:
                module.reshard()

            # What answers keep is of weights that the next step changes, and takes its memory.
            generation.forget_engine(self.model)


def place(parameters: Iterable[nn.Parameter], device: torch.device | str, dtypes: Dtypes):
    """Put parameters onto a device, each in its dtype; one that is there already is not copied."""
    for p in parameters:
        p.data = p.data.to(device, dtypes.get(p, p.dtype))


def _shard(whole: _Loss, ranks: Ranks, bf16: bool, dtypes: Dtypes) -> nn.Module:
    """Shard the model of a loss over the ranks; return the module to call in its place.

    What one module gathers is placed on the device, sharded and forgotten before the next one's. So
    besides its shards a rank holds the whole of a block, or of all that is outside of the blocks.

    Autocast rounds the weights of a linear for its product, and keeps what it has rounded until the
    end: with shards, a bfloat16 copy of the whole model on each rank. So blocks that train gather
    their linears in bfloat16, and there is nothing to round. Gradients are bfloat16 either way, and
    are added up in float32. All other parameters stay as they are, because autocast does not round
    them: norms and tables by what it is, the head and adapters because their kernels do it.
    """
    model = whole.model
    blocks = model.language_model.blocks
    linears = set()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.language_model.lm_head:
            linears.update(module.parameters(recurse=False))

    # Who gathers what: a block its parameters, or only its linears if these are rounded. `whole`
    # has the linears of towers and connector, and a module around it all the rest.
    rounds = []  # of each block
    elsewhere = set(linears)  # not with the rest
    for block in blocks:
        of_block = set(block.parameters())
        rounded = any(p.requires_grad for p in of_block & linears)
        rounds.append(rounded)
        if not rounded:
            elsewhere |= of_block

    # The mesh is of the device of these ranks. By default it would be of the accelerator that torch
    # was built for, even without one.
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    multiplies_in = torch.bfloat16 if bf16 else None
    policy = MixedPrecisionPolicy(multiplies_in, torch.float32, cast_forward_inputs=False)

    def shard(module: nn.Module, ignored: set[nn.Parameter], **options):
        """Shard the parameters of a module that are neither ignored nor shards already."""
        own = [p for p in module.parameters() if p not in ignored and not isinstance(p, DTensor)]
        place(own, ranks.device, dtypes)
        fully_shard(module, mesh=mesh, ignored_params=ignored, **options)

        # The module has shards in their place. Whoever still knows the parameters must not keep
        # their values, too.
        for p in own:
            p.data = p.data.new_empty(0)

    # The outermost comes first, since it does not look into modules that are sharded already.
    outermost = nn.Sequential(whole)
    shard(outermost, elsewhere)
    rest = set(model.parameters()) - elsewhere
    for block, rounded in zip(blocks, rounds, strict=True):
        if rounded:
            shard(block, rest, mp_policy=policy)
        else:
            shard(block, rest)

    # As the outermost, it is kept between forward and backward.
    shard(whole, rest, mp_policy=policy, reshard_after_forward=False)
    return outermost


def _gather_in_order(model: nn.Module):
    """Make the backward pass of text alone gather the same blocks as one with pictures.

    Where encoder or connector train, the backward pass goes through the blocks of the language
    model to their features. Without pictures nothing below the first trainable block needs a
    gradient, so the pass would end earlier, and the ranks would wait for each other in different
    places. A hook therefore lets the embeddings of text alone require a gradient, too.
    """
    features_train = False
    for part in (model.vision_tower, model.connector):
        if any(p.requires_grad for p in part.parameters()):
            features_train = True

    # Detached, the embeddings are a leaf: their gradient is computed, and then dropped.
    def hook(_module, args: tuple) -> tuple:
        embeddings, *rest = args
        if features_train and torch.is_grad_enabled() and not embeddings.requires_grad:
            embeddings = embeddings.detach().requires_grad_()
        return embeddings, *rest

    model.language_model.model.register_forward_pre_hook(hook)


# ----------------------------------------------------------------------- tensors that may be shards


def whole(t: Tensor) -> Tensor:
    """Return the full tensor, gathered from all ranks if `t` is a shard. All ranks must call it."""
    if isinstance(t, DTensor):
        return t.full_tensor()
    return t


def local_part(t: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: its shard, or all of it."""
    if isinstance(t, DTensor):
        return t.to_local()
    return t


def shard_like(t: Tensor, p: Tensor) -> Tensor:
    """Return a full tensor, which all ranks have, on p's device and sharded as p is."""
    t = t.to(p.device)
    if not isinstance(p, DTensor):
        return t

    # No source rank: each rank cuts its shard from its own copy, and nothing is sent.
    return distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm of all their gradients, over all shards. All ranks must call it."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return whole(nn.utils.get_total_norm(gradients))


def numbers(scalars: list[Tensor]) -> list[float]:
    """Return the values of tensors of one number each, with one transfer from the GPU."""
    if not scalars:
        return []
    return torch.stack(scalars).tolist()
