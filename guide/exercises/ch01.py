"""Chapter 1, labels: fill in both functions, then run

python -m pytest guide/exercises/test_ch01.py -o addopts=""
"""

from torch import Tensor


def labels_of(
    ids: list[int], offsets: list[tuple[int, int]], answers: list[tuple[int, int]]
) -> list[int]:
    """Return the labels of a tokenized text: the id where it is supervised, else -100.

    offsets: for each token the characters text[start:end] that it stands for
    answers: the characters text[start:end] of each answer, with its end token

    A token is supervised if its first character lies in an answer. The first token of the text
    never is, because nothing stands before it.
    """
    raise NotImplementedError


def pad_batch(
    samples: list[tuple[list[int], list[int]]], padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, labels and attention mask of a padded batch, three tensors (B, T).

    samples: ids and labels of each row; padding stands behind them
    padding: the id to pad with. It is the end token, too: ends within a row keep their labels and
        are attended to, padding has the label -100 and a mask of 0.
    """
    raise NotImplementedError
