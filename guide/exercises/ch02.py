"""Exercises of chapter 2: what SigLIP is trained by, and where features come from."""

from torch import Tensor

from encoders import VisionEncoder


def siglip_loss(similarity: Tensor, bias: Tensor) -> Tensor:
    """Return SigLIP's loss of the similarities (N, N) of N pictures and N captions (a scalar).

    Each entry is a question of its own: do picture i and caption j belong together? With z = 1
    where i == j and z = -1 elsewhere, an entry's loss is -log sigmoid(z * (similarity + bias)). The
    loss is their sum, divided by the number of pictures N (Zhai et al., 2023).
    """
    raise NotImplementedError


def hidden_states(encoder: VisionEncoder, pixels: Tensor) -> list[Tensor]:
    """Return all states (N, n, C) of pixels (N, 3, H, W): what enters each block, and the output.

    A depth of 3 gives 4 states. The last one is before encoder.post_layernorm. All tokens are
    there: feature_select is not applied. An encoder with a rotation (DINOv3) need not be handled.
    """
    raise NotImplementedError
