"""A model and its optimizer, from a checkpoint and into one.

    model = build(recipe, tensors, stage)                   # tensors: {}, or a checkpoint's
    restore_moments(optimizer, model, tensors, step)
    tensors = snapshot(model, tensors, optimizer, ranks)    # what the next checkpoint holds

A checkpoint's tensors are named KIND.PARAMETER. The kinds are weight, exp_avg and exp_avg_sq. A
checkpoint holds only what has been trained; all else is made again as the recipe says.

checkpoints/resume.py writes and reads these tensors, output.py makes the finished model with
`build`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

import lora
from checkpoints import peft, weights
from config import PARTS, Recipe, Stage, UserError
from model import LLaVA
from training import parallel
from training.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch names them


def build(recipe: Recipe, tensors: dict[str, Tensor], stage: Stage, mapped: bool = False) -> LLaVA:
    """Return the recipe's model, quantized as `stage` says, with the weights of a checkpoint.

    tensors: of the checkpoint; {} at the start of a run.
    mapped: what comes from files stays there, mapped into memory and in the dtype of the file, and
    takes no memory of this rank. `parallel.place` must then give each parameter its dtype of
    `full_precision`. Without it, parameters are in these dtypes and in memory of their own.
    Raises UserError if a weight does not fit.
    """
    quantized = {}  # the attribute of a part -> nf4 or int8
    for part, attribute in PARTS.items():
        how = getattr(stage.tune, part)
        if how in lora.QUANTIZED:
            quantized[attribute] = lora.QUANTIZED[how]

    # A part that comes from a file is quantized while it is read, one tensor at a time. A part with
    # random weights is quantized afterwards.
    load = {}
    if mapped:
        load = dict.fromkeys(PARTS.values(), load_as_stored)
    for attribute, kind in quantized.items():
        load[attribute] = partial(lora.load_quantized, kind=kind)

    # The finished model has the chat template of the last stage.
    stages = list(recipe.stage.values())
    template = stages[-1].template
    model = LLaVA.from_parts(recipe.model, template, recipe.train.seed, load)
    for attribute, kind in quantized.items():
        lora.quantize(getattr(model, attribute), kind)

    recompute = recipe.train.gradient_checkpointing
    model.language_model.model.gradient_checkpointing = recompute
    model.vision_tower.gradient_checkpointing = recompute

    # Adapters come before the weights of the checkpoint, because it has theirs, too.
    peft.adapt(model, stages, PARTS)

    parameters = dict(model.named_parameters())
    full = full_precision(model)
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind != "weight":
            continue
        p = parameters.get(name)
        if p is None or p.shape != tensor.shape:
            what = f"{list(tensor.shape)} has no place in this model"
            raise UserError(f"checkpoint:{name}", what, "give its own recipe")
        if mapped and p in full:
            p.data = tensor.to(full[p])
        else:
            p.data.copy_(tensor)
    return model


def load_as_stored(part: nn.Module, *arguments, dtype: torch.dtype, **options) -> set[str]:
    """Load a part as weights.load does, but in the dtype of the file: nothing is copied."""
    return weights.load(part, *arguments, dtype=None, **options)


def full_precision(model: LLaVA) -> dict[nn.Parameter, torch.dtype]:
    """Return float32 for each parameter that a run keeps so: all but those of quantized parts."""
    dtypes = {}
    for attribute in PARTS.values():
        part = getattr(model, attribute)
        if not any(isinstance(m, lora.Quantized) for m in part.modules()):
            dtypes |= dict.fromkeys(part.parameters(), torch.float32)
    return dtypes


def snapshot(
    model: LLaVA,
    tensors: dict[str, Tensor],
    optimizer: torch.optim.AdamW | None,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Return what a checkpoint holds, as copies on rank 0's CPU. All ranks must call it.

    tensors: of the checkpoint that this stage began with. Weights that only an earlier stage
    trained are taken from it. optimizer: None leaves out the moments, at the end of a stage.
    """
    snapshot = {key: t for key, t in tensors.items() if key.startswith("weight.")}
    for name, p in model.named_parameters():
        kinds = {}
        if p.requires_grad:
            kinds["weight"] = p
        if optimizer is not None and p in optimizer.state:
            for moment in MOMENTS:
                kinds[moment] = optimizer.state[p][moment]

        # Gathering shards takes all ranks. Only the first one keeps what comes out, and copies it:
        # training goes on while the checkpoint is written.
        for kind, t in kinds.items():
            gathered = parallel.whole(t.detach())
            if ranks.is_first:
                snapshot[f"{kind}.{name}"] = _start_copy(gathered)

    # The other ranks are back in training by now.
    if ranks.is_first and ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    return snapshot


def _start_copy(t: Tensor) -> Tensor:
    """Return a copy on the CPU. From a GPU it is only complete when the GPU is waited for."""
    # Pinned memory is what a GPU writes to by itself.
    copy = torch.empty_like(t, device="cpu", pin_memory=t.is_cuda)
    return copy.copy_(t, non_blocking=True)


def restore_moments(
    optimizer: torch.optim.AdamW, model: LLaVA, tensors: dict[str, Tensor], step: int
):
    """Give the optimizer the moments of a checkpoint that was saved after `step` steps."""
    for name, p in model.named_parameters():
        # A checkpoint from the end of a stage has none: the next stage begins with a new optimizer.
        if f"exp_avg.{name}" not in tensors:
            continue

        # AdamW corrects the bias of its moments by this number.
        state = {"step": torch.tensor(float(step), device=p.device)}
        for moment in MOMENTS:
            saved = tensors[f"{moment}.{name}"]
            state[moment] = parallel.shard_like(saved, p)
        optimizer.state[p] = state
