"""Processes: what a loop needs to run on several ranks, and to end well when told to or when one of them fails.

Started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK in the environment) or as a plain `python`, which is one rank.

    none   one process
    ddp    every rank holds the model, gradients are averaged
    fsdp   weights, gradients and AdamW's moments are sharded over the ranks (FSDP2). A block of the language model is
           gathered when it is used; all the rest (towers, connector, embeddings, head) at the start of each forward
           pass. So every micro-batch runs the same collectives, with pictures or without, and a rank that has run out
           of micro-batches takes part with an empty one. Gathered in the dtype of the parameters: the arithmetic is
           that of one process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from config import UserError
from packing import Batch


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device


_store: dist.Store | None = None  # torchrun's: it outlives a rank that fails


def setup(device: str) -> World:
    """Join the process group of torchrun: NCCL on GPUs, gloo on CPUs. Raises UserError for a missing GPU."""
    global _store
    rank, size, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                "train.device",
                f"no GPU {local} on this machine",
                "lower --nproc-per-node, or device=cpu",
            )
        torch.cuda.set_device(local)
    where = torch.device(device, local) if device == "cuda" else torch.device(device)
    if size > 1 and not dist.is_initialized():
        _store, *_ = next(dist.rendezvous("env://"))
        backend = (
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        )  # numbers travel by gloo: the GPU need not wait
        dist.init_process_group(
            backend, store=_store, rank=rank, world_size=size, timeout=timedelta(minutes=30),
            device_id=where if device == "cuda" else None,
        )  # fmt: skip
    return World(rank, size, where)


def use_bf16(precision: str, device: torch.device) -> bool:
    """auto: bf16 on GPUs and on CPUs with bf16 instructions; without them it is slower than fp32."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return any(torch.cpu.get_capabilities().get(flag) for flag in ("avx512_bf16", "amx_bf16"))


# --------------------------------------------------------------------------------------------- between ranks


def print0(*text, **kwargs):
    """Print on rank 0 only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*text, **kwargs, flush=True)


def total(values: list[float], world: World) -> list[float]:
    """The sum of each value over all ranks, in float64."""
    if world.size == 1:
        return values
    t = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(t)
    return t.tolist()


def barrier(world: World):
    total([0.0], world)


def share(value, world: World):
    """Rank 0's value, on every rank."""
    if world.size > 1:
        box = [value]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        (value,) = box
    return value


def collect(values: list, world: World) -> list:
    """The values of all ranks in one list."""
    if world.size == 1:
        return values
    boxes = [None] * world.size
    dist.all_gather_object(boxes, values)
    return [value for box in boxes for value in box]


# ---------------------------------------------------------------------------------------------- sharded models


class _Loss(nn.Module):
    """DDP and FSDP hook onto forward; a training step wants the loss of a packed batch, not the convenience call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return self.model.loss(batch)


def choose(mode: str, model: nn.Module, world: World) -> str:
    """What `auto` stands for: ddp while weights, gradients and moments take no more than half of a GPU."""
    if world.size == 1:
        return "none"
    if mode == "none":
        raise UserError(
            "train.parallel", f"none, but {world.size} ranks", "start one process, or write auto"
        )
    if mode != "auto" or world.device.type == "cpu":
        return "ddp" if mode == "auto" else mode
    need = sum(p.numel() * (p.element_size() + 12 * p.requires_grad) for p in model.parameters())
    need += sum(b.nbytes for b in model.buffers())  # quantized weights, which fsdp would not shard
    return (
        "fsdp" if need > torch.cuda.get_device_properties(world.device).total_memory / 2 else "ddp"
    )


def wrap(model: nn.Module, world: World, mode: str) -> nn.Module:
    """A module whose call is `model.loss(...)` and whose backward averages gradients over the ranks.

    fsdp replaces the parameters of `model` by shards: an optimizer comes after it.
    """
    loss = _Loss(model)
    if mode == "ddp":
        devices = [world.device] if world.device.type == "cuda" else None
        return DistributedDataParallel(
            loss, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False
        )  # the buffers are quantized weights, which never change
    if mode == "fsdp":
        features_train = any(
            p.requires_grad for m in (model.vision_tower, model.connector) for p in m.parameters()
        )

        def lead(_, args):
            """Without pictures backward ends where it would with them: it gathers the same blocks in the same order."""
            x, *rest = args
            text_only = features_train and torch.is_grad_enabled() and not x.requires_grad
            return x.detach().requires_grad_() if text_only else x, *rest

        model.language_model.model.register_forward_pre_hook(lead)
        for block in model.language_model.blocks:
            fully_shard(block)
        fully_shard(loss)
    return loss


def together(batches: Iterable, module: nn.Module, world: World) -> Iterator:
    """The batches; under fsdp, then None for as long as another rank still has one."""
    batches = iter(batches)
    while True:
        batch = next(batches, None)
        left = (
            total([batch is not None], world)[0]
            if isinstance(module, FSDPModule)
            else batch is not None
        )
        if not left:
            return
        yield batch


def accumulate(module: nn.Module, last: bool):
    """Context of one micro-batch: under ddp gradients travel with the last one of a step only. Under fsdp with each:
    whole gradients of all micro-batches would not fit."""
    ddp = isinstance(module, DistributedDataParallel)
    return module.no_sync() if ddp and not last else contextlib.nullcontext()


@contextlib.contextmanager
def forward_only(module: nn.Module):
    """What to call without gradients or dropout, any number of times, or parts of it: ddp is left out, fsdp has what
    its blocks do not hold whole from here, and shards it again after."""
    if isinstance(module, FSDPModule):
        module.unshard()
    module.eval()
    with torch.no_grad():
        yield module.module if isinstance(module, DistributedDataParallel) else module
    module.train()
    if isinstance(module, FSDPModule):
        module.reshard()


def whole(t: Tensor) -> Tensor:
    """The tensor of which this may be a shard. All ranks must ask together."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def local(t: Tensor) -> Tensor:
    """This rank's part of what may be a shard."""
    return t.to_local() if isinstance(t, DTensor) else t


def like(t: Tensor, p: Tensor) -> Tensor:
    """A whole tensor that all ranks have, on p's device and sharded as p is."""
    t = t.to(p.device)
    return (
        distribute_tensor(t, p.device_mesh, p.placements, src_data_rank=None)
        if isinstance(p, DTensor)
        else t
    )


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all their gradients, over all shards."""
    return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


# ------------------------------------------------------------------------------------------------- how it ends


STOP = {signal.SIGTERM, signal.SIGINT}
_asked: list[str] = []


def heed_signals():
    """From now on SIGTERM and SIGINT do not end the process: asked() tells of them.

    They are blocked too, which the loader's workers inherit: torchrun and terminals signal every process of a run, and
    a worker that dies of it would take the step with it.
    """
    for number in STOP:
        signal.signal(
            number, lambda n, _: _asked.append(signal.Signals(n).name)
        )  # threads from before take them
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)


def asked() -> list[str]:
    """The signals that have come since heed_signals."""
    return _asked + [signal.Signals(n).name for n in signal.sigpending() & STOP]


def shutdown():
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def last_word():
    """Of several ranks only the one that failed first says why; the others, which then fail for want of it, are silent.

    torchrun ends the rest and adds a summary of its own, which quotes the line. A rank that failed leaves at once: the
    group's teardown and the loader's workers would wait for what never comes.
    """
    try:
        yield
        shutdown()
    except BaseException as e:
        if isinstance(e, SystemExit) and not e.code:
            return shutdown()
        first = (
            int(os.environ.get("RANK", 0)) == 0
        )  # without a store: a mistake in the recipe, which all ranks find
        if _store is not None:
            with contextlib.suppress(
                Exception
            ):  # its host has gone: then nobody knows, and everyone speaks
                first = True
                first = _store.add("failed", 1) == 1
        if first:
            said = str(e) if isinstance(e, SystemExit) else traceback.format_exc().strip()
            sys.stdout.flush()
            print(said, file=sys.stderr, flush=True)
            if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
                with open(file, "w") as f:
                    json.dump({"message": said.splitlines()[-1]}, f)
        os._exit(1)
