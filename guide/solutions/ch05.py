"""Solutions of chapter 5."""

import torch
from torch import Tensor


def block_diagonal_mask(cu_seqlens: Tensor) -> Tensor:
    """Return which token of a packed row may read which, (T, T) booleans: row reads column."""
    lengths = cu_seqlens.diff().long()
    sample = torch.arange(len(lengths)).repeat_interleave(lengths)  # (T,), of each token
    same = sample[:, None] == sample
    return same.tril()


def unpack(packed: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return a packed row (T, D) as a padded batch (S, longest, D), and its mask (S, longest)."""
    lengths = cu_seqlens.diff().long()
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (S, longest)
    padded = packed.new_zeros(*mask.shape, packed.size(1))

    # The True entries of the mask, row by row, are the tokens in the order of the packed row.
    padded[mask] = packed
    return padded, mask
