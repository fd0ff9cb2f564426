"""Chapter 0, the map: a solution."""

import torch.nn.functional as F
from torch import Tensor


def row_length(text_tokens: int, pictures: int, image_size: int, patch_size: int) -> int:
    """Return how many positions a row takes in the language model."""
    patches_a_side = image_size // patch_size

    # Each placeholder gives way to the patches of its picture.
    return text_tokens - pictures + pictures * patches_a_side**2


def supervised_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of a row: the cross-entropy of its supervised tokens."""
    # The last logits are about a token that does not exist, the first label has no logits.
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100)
