"""Chapter 0, the map: fill in both functions, then run

python -m pytest guide/exercises/test_ch00.py -o addopts=""
"""

from torch import Tensor


def row_length(text_tokens: int, pictures: int, image_size: int, patch_size: int) -> int:
    """Return how many positions a row takes in the language model.

    text_tokens: of the text, with one placeholder for each picture among them
    pictures: how many
    image_size, patch_size: the sides of the square pictures and of their patches, in pixels. Every
        patch becomes one position, and there is no class token.
    """
    raise NotImplementedError


def supervised_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of a row: the cross-entropy of its supervised tokens.

    logits (T, V): those at t are about the token at t + 1
    labels (T,): the id of the token at t where it is supervised, else -100. They are NOT shifted.
    """
    raise NotImplementedError
