"""Chapter 10, looking inside: fill in both functions, then run

python -m pytest guide/exercises/test_ch10.py -o addopts=""
"""

from collections.abc import Callable

from torch import Tensor


def rollout(attention: Tensor) -> Tensor:
    """Return how much of each token is in each token's state behind the last block, (T, T).

    attention (L, T, T): of each block, averaged over heads; row t is the query's, and sums to 1

    Attention rollout (Abnar and Zuidema, 2020): a block adds what it attends to, to what was there,
    so it mixes tokens by half its attention and half the identity. The blocks follow each other,
    and so the mixtures are multiplied, that of the last block from the left.
    """
    raise NotImplementedError


def occlusion_map(
    score: Callable[[Tensor], float], picture: Tensor, patch: int, cover: Tensor
) -> Tensor:
    """Return by how much a score falls where each patch of a picture is covered, (rows, columns).

    score: a function of a picture; more is better
    picture (3, H, W): it is not changed. H and W are multiples of `patch`, the side of a patch
    cover (3,): the colour that is painted over a patch

    A patch whose cover makes the score larger has a fall of 0.
    """
    raise NotImplementedError
