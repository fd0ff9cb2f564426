"""Solutions of chapter 2."""

import torch
import torch.nn.functional as F
from torch import Tensor

from encoders import VisionEncoder


def siglip_loss(similarity: Tensor, bias: Tensor) -> Tensor:
    """Return SigLIP's loss of the similarities (N, N) of N pictures and N captions."""
    count = len(similarity)
    z = 2 * torch.eye(count) - 1  # 1 on the diagonal, -1 elsewhere

    # There are N - 1 wrong pairs for each right one. A bias below zero says so from the start:
    # "no" is the better guess.
    losses = -F.logsigmoid(z * (similarity + bias))
    return losses.sum() / count


def hidden_states(encoder: VisionEncoder, pixels: Tensor) -> list[Tensor]:
    """Return all states (N, n, C) of pixels: what enters each block, and the output."""
    x = encoder.pre_layrnorm(encoder.embeddings(pixels))
    states = [x]
    for block in encoder.blocks:
        x = block(x)
        states.append(x)
    return states
