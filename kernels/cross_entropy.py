"""The language model's head and its loss in one operation, over supervised positions only.

    loss = sum_t  logsumexp(W h_t + b) - (W h_t + b)[y_t]        over t with y_t != -100

T tokens, D width, V vocabulary. Unsupervised rows are dropped before the product, so a row of 700 image
positions and 20 answer tokens computes 20 rows of logits. The sum (not the mean) is returned: the caller
divides by the number of supervised tokens of the whole optimizer step, over micro-batches and ranks.
"""

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """hidden (T, D), weight (V, D), bias (V,) or None, targets (T,) with -100 unsupervised -> scalar float32 sum."""
    rows = targets != IGNORE
    logits = F.linear(hidden[rows], weight, bias)
    return F.cross_entropy(logits.float(), targets[rows], reduction="sum")
