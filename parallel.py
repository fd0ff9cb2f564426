"""Processes and checkpoints: what a loop needs to run on several ranks and to survive being killed.

Started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK in the environment) or as a plain `python`, which is one rank.
A checkpoint is a folder with `tensors.safetensors` and, written last, `manifest.json`: the state as JSON and the
size of every file. The folder gets its name by one rename, so it is whole or it is not there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import weights
from config import UserError


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device


def setup(device: str) -> World:
    """Join the process group of torchrun: NCCL on GPUs, gloo on CPUs. Raises UserError for a missing GPU."""
    rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError("train.device", f"no GPU {local} on this machine", "lower --nproc-per-node, or device=cpu")
        torch.cuda.set_device(local)
    where = torch.device(device, local) if device == "cuda" else torch.device(device)
    if size > 1 and not dist.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30), device_id=where if backend == "nccl" else None)
    return World(rank, size, where)


def shutdown():
    if dist.is_initialized():
        dist.destroy_process_group()


def print0(*text, **kwargs):
    """Print on rank 0 only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*text, **kwargs, flush=True)


def barrier(world: World):
    if world.size > 1:
        dist.barrier()


def total(values: list[float], world: World) -> list[float]:
    """The sum of each value over all ranks, in float64."""
    if world.size == 1:
        return values
    t = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(t)
    return t.tolist()


class _Loss(nn.Module):
    """DDP hooks onto forward; a training step wants the loss of a packed batch, not the convenience call."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *batch) -> Tensor:
        return self.model.loss(*batch)


def wrap(model: nn.Module, world: World) -> nn.Module:
    """A module whose call is `model.loss(...)` and whose backward averages gradients over the ranks."""
    loss = _Loss(model)
    if world.size == 1:
        return loss
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(loss, device_ids=devices, gradient_as_bucket_view=True)


def accumulate(module: nn.Module, last: bool):
    """Context of one micro-batch: gradients travel with the last one of a step only."""
    ddp = isinstance(module, DistributedDataParallel)
    return module.no_sync() if ddp and not last else contextlib.nullcontext()


def save_checkpoint(folder: Path, name: str, tensors: dict[str, Tensor], state: dict, keep: int):
    """Write folder/name atomically, then remove all but the newest `keep`. Called on rank 0."""
    temporary = folder / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    file = temporary / "tensors.safetensors"
    weights.write_file(file, lambda path: save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, path))
    manifest = {"state": state, "files": {file.name: file.stat().st_size}}
    weights.write_file(temporary / "manifest.json", json.dumps(manifest, indent=1))
    shutil.rmtree(folder / name, ignore_errors=True)  # a damaged one of the same name
    os.rename(temporary, folder / name)
    weights.fsync_folder(folder)
    for old in sorted(p for p in folder.iterdir() if not p.name.startswith("."))[:-keep]:
        shutil.rmtree(old)


def newest_checkpoint(folder: Path, device: torch.device) -> tuple[dict[str, Tensor], dict] | None:
    """Tensors and state of the newest whole checkpoint in `folder`; says which it passes over and why."""
    names = sorted((p for p in folder.glob("*") if not p.name.startswith(".")), reverse=True)
    for path in names:
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            for name, size in manifest["files"].items():
                if (found := (path / name).stat().st_size) != size:
                    raise ValueError(f"{name} has {found} bytes, not {size}")
            with safe_open(path / "tensors.safetensors", framework="pt", device=str(device)) as f:
                return {k: f.get_tensor(k) for k in f.keys()}, manifest["state"]  # noqa: SIM118
        except (OSError, ValueError, KeyError) as e:
            print0(f"passing over {path}: {e}")
    return None
