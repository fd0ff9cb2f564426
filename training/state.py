"""A model and its optimizer, from a checkpoint and into one.

    model = build(recipe, tensors, stage)                   # tensors: {}, or a checkpoint's
    restore_moments(optimizer, model, tensors, step)
    tensors = snapshot(model, tensors, optimizer, ranks)    # what the next checkpoint holds

A checkpoint's tensors are named KIND.PARAMETER; the kinds are weight, exp_avg and exp_avg_sq. It
holds only what has been trained. All else comes from where the recipe says, unrounded.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import lora
from checkpoints import peft
from config import PARTS, Recipe, Stage, UserError
from model import LLaVA
from training import parallel
from training.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch names them


def build(recipe: Recipe, tensors: dict[str, Tensor], stage: Stage) -> LLaVA:
    """Return the recipe's model, quantized as `stage` says, with the weights of a checkpoint.

    Raises UserError if a weight does not fit.
    """
    stages = list(recipe.stage.values())
    quantized = {}  # the attribute of a part -> nf4 or int8
    for part, attribute in PARTS.items():
        how = getattr(stage.tune, part)
        if how in lora.QUANTIZED:
            quantized[attribute] = lora.QUANTIZED[how]

    # A part that comes from a file is quantized while it is read, one tensor at a time. A part with
    # random weights is quantized afterwards.
    load = {name: partial(lora.load_quantized, kind=kind) for name, kind in quantized.items()}
    model = LLaVA.from_parts(recipe.model, stages[-1].template, recipe.train.seed, load)
    for name, kind in quantized.items():
        lora.quantize(getattr(model, name), kind)

    model.language_model.model.gradient_checkpointing = recipe.train.gradient_checkpointing
    model.vision_tower.gradient_checkpointing = recipe.train.gradient_checkpointing
    peft.adapt(model, stages, PARTS)

    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind != "weight":
            continue
        if name not in parameters or parameters[name].shape != tensor.shape:
            what = f"{[*tensor.shape]} has no place in this model"
            raise UserError(f"checkpoint:{name}", what, "give its own recipe")
        parameters[name].data.copy_(tensor)
    return model


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
    made = {key: t for key, t in tensors.items() if key.startswith("weight.")}
    for name, p in model.named_parameters():
        of_parameter = {}
        if p.requires_grad:
            of_parameter["weight"] = p
        if optimizer is not None and p in optimizer.state:
            for moment in MOMENTS:
                of_parameter[moment] = optimizer.state[p][moment]

        for kind, t in of_parameter.items():
            t = parallel.whole(t.detach())
            if ranks.is_first:
                made[f"{kind}.{name}"] = t.to("cpu", copy=True)
    return made


def restore_moments(
    optimizer: torch.optim.AdamW, model: LLaVA, tensors: dict[str, Tensor], step: int
):
    """Give the optimizer the moments of a checkpoint that was saved after `step` steps."""
    for name, p in model.named_parameters():
        if f"exp_avg.{name}" not in tensors:
            continue
        state = {"step": torch.tensor(float(step), device=p.device)}
        for moment in MOMENTS:
            state[moment] = parallel.shard_like(tensors[f"{moment}.{name}"], p)
        optimizer.state[p] = state
