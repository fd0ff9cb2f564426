"""Choose the next token from its logits: greedily, or at random with top-k and nucleus sampling.

    tokens = sample_tokens(logits, temperature=0.7, top_p=0.9, generator=generators)

B sequences, V vocabulary, k likeliest tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample_tokens(
    logits: Tensor,
    temperature: float,
    top_p: float,
    generator: torch.Generator | list[torch.Generator],
    top_k: int = 0,
) -> Tensor:
    """Return one token (B,) for each row of logits (B, V).

    At temperature 0 it is the likeliest. Otherwise it is drawn from the top_k likeliest tokens (0:
    from all), and of these from the fewest whose probabilities reach top_p (Holtzman et al., 2020).

    generator: one for each row, or one that all rows draw from, on the CPU. A row takes exactly one
    number of its generator, so neither the other rows nor the device change what is drawn.
    """
    logits = logits.float()  # argmax of bfloat16 is slow on a CPU, and softmax is inexact in it
    if temperature == 0:
        return logits.argmax(-1)

    probabilities = (logits / temperature).softmax(-1)  # (B, V)
    if top_k == 0 and top_p >= 1:
        return _draw(probabilities, generator)

    candidates = _likeliest(probabilities, top_k)
    probabilities = candidates.values  # (B, k), the largest first
    if top_p < 1:
        probabilities = _nucleus(probabilities, top_p)

    # What is drawn is a place among the candidates, which say what token it is.
    places = _draw(probabilities, generator)[:, None]
    tokens = candidates.indices.gather(-1, places)  # (B, 1)
    return tokens[:, 0]


def _likeliest(probabilities: Tensor, top_k: int) -> torch.return_types.topk:
    """Return the values and the indices of the top_k largest probabilities; of all for 0."""
    kept = probabilities.size(-1)
    if top_k != 0:
        kept = min(top_k, kept)
    return probabilities.topk(kept)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Return falling probabilities (B, k) with 0 for all that the nucleus of top_p leaves out."""
    # A token is left out when the likelier ones before it reach top_p already. After top-k their
    # sum may be less than 1, and top_p is a share of that sum.
    before = probabilities.cumsum(-1) - probabilities
    total = probabilities.sum(-1, keepdim=True)
    return probabilities.masked_fill(before >= top_p * total, 0)


def _draw(probabilities: Tensor, generator: torch.Generator | list[torch.Generator]) -> Tensor:
    """Return the index (B,) of one probability (B, k) in each row, drawn at random.

    This is the inverse of the cumulative distribution: a point is drawn between 0 and the sum of
    the row, which need not be 1, and the first cumulative probability beyond the point counts.
    """
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    uniform = _uniform(len(probabilities), generator)  # (B, 1)
    point = uniform.to(total.device) * total
    index = (cumulative <= point).sum(-1)

    # A rounding can put the point on the total, behind the last token.
    last = probabilities.size(-1) - 1
    return index.clamp(max=last)


def _uniform(rows: int, generator: torch.Generator | list[torch.Generator]) -> Tensor:
    """Return a number from [0, 1) for each row, (B, 1)."""
    if isinstance(generator, torch.Generator):
        return torch.rand(rows, 1, generator=generator)

    numbers = [torch.rand(1, 1, generator=g) for g in generator]
    return torch.cat(numbers)
