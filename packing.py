"""Packed rows: samples one after the other in one row of tokens, and what an <image> in it stands for.

T tokens, S samples, N items (pictures and videos), V views in all of them, H x W pixels. Ids hold IMAGE_TOKEN at each
of an item's positions, labels hold IGNORE where nothing is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kernels.attention import attention_packed
from kernels.cross_entropy import IGNORE

IMAGE_TOKEN = (
    -200
)  # TinyLLaVA's id for "an image goes here"; negative, so no vocabulary can contain it


class ItemShape(NamedTuple):
    """What of an item decides how many tokens it takes and in which order. Rows and columns only in anyres."""

    views: int = 1
    rows: int = 0  # of tiles, behind the first view
    columns: int = 0
    top: int = 0  # rows of tokens that are border, above and below
    left: int = 0


ONE_VIEW = ItemShape()


class Item(NamedTuple):
    pixels: Tensor  # (v, 3, H, W), uint8 or normalised
    shape: ItemShape = ONE_VIEW


def as_items(images: Tensor | Sequence[Item]) -> list[Item]:
    """Pictures (N, 3, H, W) as items of one view; items as they are."""
    return [Item(image[None]) for image in images] if isinstance(images, Tensor) else list(images)


def match_images(rows: list[Tensor], images: Tensor | Sequence[Item] | None) -> list[Item]:
    """The items that the placeholders in rows of ids call for, in their order; of as many images as rows, those of the
    rows with a placeholder. Raises ValueError."""
    counts = [int((row == IMAGE_TOKEN).sum()) for row in rows]
    items = as_items(images) if images is not None and sum(counts) else []
    if len(items) == sum(counts):
        return items
    if len(items) != len(rows) or max(counts) > 1:
        raise ValueError(f"{sum(counts)} image placeholders but {len(items)} images")
    return [item for item, count in zip(items, counts, strict=True) if count]


Attend = Callable[
    [nn.Module, Tensor, Tensor, Tensor], Tensor
]  # (layer, q, k, v) -> attention output, packed


def expand_images(ids: Tensor, counts: Sequence[int], labels: Tensor | None = None) -> Tensor:
    """One placeholder -> its image's `counts` positions; with labels, their expansion instead (-100 at images)."""
    image, repeats = ids == IMAGE_TOKEN, torch.ones_like(ids)
    repeats[image] = torch.tensor(counts, dtype=ids.dtype, device=ids.device)
    return (ids if labels is None else labels.masked_fill(image, IGNORE)).repeat_interleave(repeats)


def pack_prompts(rows: list[Tensor], counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, int]:
    """Rows of ids with single placeholders, images with so many positions -> packed ids, positions, cu_seqlens,
    max_seqlen."""
    counts, device, wide = iter(counts), rows[0].device, []
    for row in rows:
        wide.append(expand_images(row, list(islice(counts, int((row == IMAGE_TOKEN).sum())))))
    lengths = [len(r) for r in wide]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    return torch.cat(wide), positions, cu_seqlens, max(lengths)


def packed_attention(cu_seqlens: Tensor, max_seqlen: int) -> Attend:
    """Causal attention inside each sample of a packed row."""
    return lambda layer, q, k, v: attention_packed(q, k, v, cu_seqlens, max_seqlen)


@dataclass
class Batch:
    """S samples in one row of T tokens."""

    input_ids: Tensor  # (T,) int64, IMAGE_TOKEN at image positions
    labels: Tensor  # (T,) int64, NOT shifted, IGNORE where unsupervised
    positions: Tensor  # (T,) int64, from 0 in each sample
    cu_seqlens: Tensor  # (S+1,) int32, where samples begin; the last is T
    max_seqlen: int
    images: Tensor | None  # (V, 3, H, W) uint8, in order of occurrence
    shapes: list[ItemShape]  # of the N items
    rows: list[int]  # S row numbers

    @property
    def supervised(self) -> int:
        """Targets that count: no sample's first token is one, so the model's shift loses none. Waits for a GPU."""
        return int((self.labels != IGNORE).sum())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self, **{k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        )

    def to(self, device) -> Batch:
        return self._each(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(Tensor.pin_memory)

    def part(self, samples: slice, items: slice) -> Batch:
        """Some of its samples, with their items, as tensor views."""
        cu = self.cu_seqlens[samples.start : samples.stop + 1]
        t, cu = slice(int(cu[0]), int(cu[-1])), cu - cu[0]
        first, last = (
            sum(shape.views for shape in self.shapes[:i]) for i in (items.start, items.stop)
        )
        pixels = self.images[first:last] if last > first else None
        ids, labels, positions, shapes = (
            self.input_ids[t],
            self.labels[t],
            self.positions[t],
            self.shapes[items],
        )
        return Batch(
            ids, labels, positions, cu, int(cu.diff().max()), pixels, shapes, self.rows[samples]
        )


# One token that teaches nothing: what a rank without a batch computes while others have one.
EMPTY = Batch(
    input_ids=torch.zeros(1, dtype=torch.int64),
    labels=torch.full((1,), IGNORE),
    positions=torch.zeros(1, dtype=torch.int64),
    cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
    max_seqlen=1,
    images=None,
    shapes=[],
    rows=[],
)


def pack_samples(samples: list) -> Batch:
    """Samples one after the other, in the order given."""
    lengths = [len(s.ids) for s in samples]
    items = [item for s in samples for item in s.items]
    return Batch(
        input_ids=torch.cat([s.ids for s in samples]),
        labels=torch.cat([s.labels for s in samples]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        max_seqlen=max(lengths),
        images=torch.cat([item.pixels for item in items]) if items else None,
        shapes=[item.shape for item in items],
        rows=[s.row for s in samples],
    )


def split_by_tokens(lengths: list[int], world: int) -> list[list[int]]:
    """Which samples of a step each rank takes, so that all have as many tokens: longest first, to who has fewest."""
    shares, tokens = [[] for _ in range(world)], [0] * world
    for j in sorted(range(len(lengths)), key=lambda j: -lengths[j]):
        rank = min(range(world), key=lambda r: (tokens[r], len(shares[r])))
        shares[rank].append(j)
        tokens[rank] += lengths[j]
    return [sorted(s) for s in shares]


def bin_pack(lengths: list[int], budget: int) -> list[list[int]]:
    """Which samples share a micro-batch of at most `budget` tokens: the longest left, and of the others those that
    together come closest to filling it, which all sums that they can make show (bit t of `sums`: t tokens).

    A sample longer than the budget is alone; with budget 0 every one is. Inside, stream order.
    """
    bins, left = [], sorted(range(len(lengths)), key=lambda j: -lengths[j])
    while left:
        chosen, room, sums = left[:1], max(0, budget - lengths[left[0]]), [1]
        for j in left[1:]:
            sums.append((sums[-1] | sums[-1] << lengths[j]) & ((1 << room + 1) - 1))
        total = sums.pop().bit_length() - 1
        for j in reversed(left[1:]):
            if not sums.pop() >> total & 1:  # longer ones alone do not make this total
                chosen.append(j)
                total -= lengths[j]
        bins.append(sorted(chosen))
        left = [j for j in left if j not in chosen]
    return sorted(bins)
