"""Chapter 1, labels: a solution."""

import torch
from torch import Tensor


def labels_of(
    ids: list[int], offsets: list[tuple[int, int]], answers: list[tuple[int, int]]
) -> list[int]:
    """Return the labels of a tokenized text: the id where it is supervised, else -100."""
    labels = []
    for token, (first, _) in zip(ids, offsets, strict=True):
        supervised = any(start <= first < end for start, end in answers)
        labels.append(token if supervised else -100)
    labels[0] = -100
    return labels


def pad_batch(
    samples: list[tuple[list[int], list[int]]], padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, labels and attention mask of a padded batch, three tensors (B, T)."""
    longest = max(len(ids) for ids, _ in samples)
    all_ids = torch.full((len(samples), longest), padding)
    all_labels = torch.full((len(samples), longest), -100)
    mask = torch.zeros(len(samples), longest, dtype=torch.int64)

    # What is padding follows from the lengths, and never from the ids.
    for row, (ids, labels) in enumerate(samples):
        all_ids[row, : len(ids)] = torch.tensor(ids)
        all_labels[row, : len(ids)] = torch.tensor(labels)
        mask[row, : len(ids)] = 1
    return all_ids, all_labels, mask
