"""The choice of the next token from its logits: greedy, or sampled with top-k and nucleus sampling.

B sequences, V vocabulary.
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
    if temperature == 0:
        # In float32: argmax of bfloat16 is slow on a CPU.
        return logits.float().argmax(-1)

    probabilities = (logits.float() / temperature).softmax(-1)  # (B, V)
    token_ids = None
    if top_k or top_p < 1:
        probabilities, token_ids = _nucleus(probabilities, top_k, top_p)

    # Draw by the inverse of the cumulative distribution, which need not sum to 1: `point` lies
    # somewhere on [0, total), and the token is the first whose cumulative probability passes it.
    cumulative = probabilities.cumsum(-1)
    point = _uniform(len(logits), generator).to(logits.device) * cumulative[:, -1:]
    index = (cumulative <= point).sum(-1, keepdim=True)  # (B, 1)
    # A rounding can put the point on the total, behind the last token.
    index = index.clamp(max=probabilities.size(-1) - 1)

    if token_ids is not None:
        index = token_ids.gather(-1, index)
    return index[:, 0]


def _nucleus(probabilities: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the likeliest probabilities (B, k), largest first, and their token ids (B, k).

    k is top_k, or V if that is 0. What the nucleus of top_p leaves out has probability 0.
    """
    vocabulary = probabilities.size(-1)
    kept = min(top_k or vocabulary, vocabulary)
    probabilities, token_ids = probabilities.topk(kept)

    if top_p < 1:
        # A token is left out when the likelier ones before it reach top_p already.
        before = probabilities.cumsum(-1) - probabilities
        total = probabilities.sum(-1, keepdim=True)
        probabilities = probabilities.masked_fill(before >= top_p * total, 0)
    return probabilities, token_ids


def _uniform(rows: int, generator: torch.Generator | list[torch.Generator]) -> Tensor:
    """Return a number from [0, 1) for each row, (B, 1)."""
    if isinstance(generator, torch.Generator):
        return torch.rand(rows, 1, generator=generator)
    return torch.cat([torch.rand(1, 1, generator=g) for g in generator])
