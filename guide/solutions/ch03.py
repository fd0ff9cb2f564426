"""Solutions of chapter 3."""

from torch import Tensor, nn

from connectors import mlp


def unshuffle(tokens: Tensor, factor: int, rows: int, columns: int) -> Tensor:
    """Return the grid (M, h, w, C) of pixel-shuffled tokens (M, rows * columns, r * r * C)."""
    x = tokens.unflatten(1, (rows, columns))  # (M, rows, columns, r * r * C)
    x = x.unflatten(3, (factor, factor, -1))  # (M, rows, columns, r, r, C)
    x = x.transpose(2, 3)  # (M, rows, r, columns, r, C)
    return x.flatten(3, 4).flatten(1, 2)


class Average(nn.Module):
    """A connector: the mean of every k tokens that follow each other, then an MLP."""

    def __init__(self, vision_dim: int, text_dim: int, every: int):
        super().__init__()
        self.every = every
        self.proj = mlp(vision_dim, text_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, n // every, D) of (N, n, C); tokens that are left over are dropped."""
        whole = one_of_every(x.size(1), self.every) * self.every
        groups = x[:, :whole].unflatten(1, (-1, self.every))  # (N, n // every, every, C)

        # It averages along a row of patches, and at the end of a row across the picture's border:
        # what is narrow and upright is blurred more than what lies flat.
        return self.proj(groups.mean(2))


def one_of_every(n: int, every: int) -> int:
    """Return how many tokens Average makes of n."""
    return n // every
