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
           an empty one. Weights are gathered in their own dtype: the arithmetic is that of one
           process.

Below the class: what may be a shard (`whole`, `local_part`, `shard_like`), and the gradient norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from config import UserError
from packing import EMPTY, Batch
from training.ranks import Ranks

# ------------------------------------------------------------------------------- what auto means


def use_bf16(precision: str, device: torch.device) -> bool:
    """Return whether a run computes in bfloat16. precision: auto, bf16 or fp32.

    auto takes it on GPUs and CPUs that have instructions for it; without them it is slower.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def choose_mode(asked: str, model: nn.Module, ranks: Ranks) -> str:
    """Return none, ddp or fsdp. asked: the recipe's train.parallel, one of these or auto.

    auto is ddp while weights, gradients and moments take no more than half of a GPU, else fsdp.
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
        need += p.numel() * p.element_size()
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

    With fsdp it replaces the parameters of `model` by shards. So the optimizer must be made
    afterwards.
    """

    def __init__(self, model: nn.Module, mode: str, ranks: Ranks):
        self.mode = mode
        self.ranks = ranks
        self.whole = _Loss(model)  # without DDP around it
        self.module: nn.Module = self.whole

        if mode == "ddp":
            device_ids = None
            if ranks.device.type == "cuda":
                device_ids = [ranks.device]
            self.module = DistributedDataParallel(
                self.whole,
                device_ids=device_ids,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # they are quantized weights, which never change
            )

        elif mode == "fsdp":
            _gather_in_order(model)

            # The blocks first: what is not sharded yet then goes with the whole.
            for block in model.language_model.blocks:
                fully_shard(block)
            fully_shard(self.whole)

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
        if self.mode == "fsdp":
            self.whole.unshard()
        self.module.eval()
        try:
            with torch.no_grad():
                yield self.whole
        finally:  # a validation may fail, and training goes on
            self.module.train()
            if self.mode == "fsdp":
                self.whole.reshard()


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
