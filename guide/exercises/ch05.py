"""Exercises of chapter 5: boundaries as a mask, and the way back to a padded batch."""

from torch import Tensor


def block_diagonal_mask(cu_seqlens: Tensor) -> Tensor:
    """Return which token of a packed row may read which, (T, T) booleans: row reads column.

    cu_seqlens (S + 1,): where the samples begin; the last is T. A token reads itself and earlier
    tokens of its own sample.
    """
    raise NotImplementedError


def unpack(packed: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Return a packed row (T, D) as a padded batch (S, longest, D), and its mask (S, longest).

    Padding is zeros at the right, and the mask is False there.
    """
    raise NotImplementedError
