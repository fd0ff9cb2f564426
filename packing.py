"""Packed rows: samples one behind the other in one row of tokens, for training and inference alike.

    row = pack_prompts([ids, other_ids], counts=[576])   # one <image> in them, of 576 tokens
    batch = pack_samples([sample, other_sample])         # the same with labels and pixels

Nothing is padded. A row of T tokens comes with `cu_seqlens`, which says where its samples begin,
and with positions that restart in every sample. Attention stays inside a sample, so the numbers of
a sample do not depend on its neighbours.

In the order of reading:
    Item, ItemShape              what an <image> stands for: its pixels, and how its views lie
    expand_images                one placeholder -> as many positions as the image takes
    PackedRow, pack_rows         the row itself; pack_prompts and pack_samples are built on it
    Attend                       how a layer of a model reads a packed row
    Batch, EMPTY                 a packed row to learn from
    split_by_tokens, bin_pack    which rank and which micro-batch takes a sample

T tokens of a packed row, t of one sample, S samples, N items (pictures and videos), V views of all
of them, H query heads, K key-value heads, d head width. Ids hold IMAGE_TOKEN at each position of an
item, labels hold IGNORE where nothing is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.attention import attention_packed
from kernels.cross_entropy import IGNORE

# TinyLLaVA's id for "an image goes here". It is negative, so no vocabulary contains it.
IMAGE_TOKEN = -200

# ------------------------------------------------------------------------------------------ items


class ItemShape(NamedTuple):
    """How many views an item has and how they lie. It decides how many tokens the item takes.

    Rows and columns are for image modes anyres, anyres_max and split, where the tiles together show
    one large picture. Height and width are for image mode native, where pictures have sizes of
    their own.
    """

    views: int = 1

    # The grid of tiles. In anyres they come after the first view, in split before the last one.
    rows: int = 0
    columns: int = 0

    # The border around the picture in anyres: how many rows of tokens show it above and again
    # below, and how many columns left and again right.
    top: int = 0
    left: int = 0

    # The grid of patches of each view in native; 0 in the other modes, where all have the same.
    height: int = 0
    width: int = 0

    @property
    def length(self) -> int:
        """Return the length of the item's pixels: how many views, in native how many patches."""
        if self.height == 0:
            return self.views
        return self.views * self.height * self.width


ONE_VIEW = ItemShape()


class Item(NamedTuple):
    """What one <image> stands for: a picture, a picture and its tiles, or the frames of a video."""

    # (views, 3, height, width), or the patches (length, patch dim) of all views in image mode
    # native; uint8 or normalised.
    pixels: Tensor
    shape: ItemShape = ONE_VIEW


def views_in(shapes: Sequence[ItemShape]) -> int:
    """Return how many views items of these shapes have together."""
    return sum(shape.views for shape in shapes)


def length_of(shapes: Sequence[ItemShape]) -> int:
    """Return how long the pixels of items of these shapes are together."""
    return sum(shape.length for shape in shapes)


def as_items(images: Tensor | Sequence[Item], one_view: ItemShape = ONE_VIEW) -> list[Item]:
    """Return pictures (N, 3, height, width) as items of one view each, and items as they are.

    one_view: the shape of a picture without tiles, which the image mode decides.
    """
    if isinstance(images, Tensor):
        return [Item(image[None], one_view) for image in images]
    return list(images)


def match_images(
    rows: list[Tensor], images: Tensor | Sequence[Item] | None, one_view: ItemShape = ONE_VIEW
) -> list[Item]:
    """Return the items that the placeholders in `rows` of ids stand for, in their order.

    There is one image for each placeholder, or one for each row. In the second case a row without a
    placeholder ignores its image. one_view: as in `as_items`. Raises ValueError when images and
    placeholders disagree.
    """
    placeholders = [count_images(row) for row in rows]
    total = sum(placeholders)
    items = []
    if images is not None and total > 0:
        items = as_items(images, one_view)

    # One image for each placeholder.
    if len(items) == total:
        return items

    # One image for each row, of which some have no placeholder.
    if len(items) != len(rows) or max(placeholders) > 1:
        raise ValueError(f"{total} image placeholders but {len(items)} images")
    used = []
    for item, count in zip(items, placeholders, strict=True):
        if count == 1:
            used.append(item)
    return used


def count_images(ids: Tensor) -> int:
    """Return the number of placeholders in ids (t,) that are not expanded yet."""
    return int((ids == IMAGE_TOKEN).sum())


def expand_images(ids: Tensor, counts: Sequence[int], labels: Tensor | None = None) -> Tensor:
    """Return ids (t,) with the placeholder of image i repeated `counts[i]` times.

    With labels (t,), return them as long as those ids instead, with IGNORE at the images.
    """
    is_image = ids == IMAGE_TOKEN
    repeats = torch.ones_like(ids)  # a token of text stays one
    repeats[is_image] = torch.tensor(counts, dtype=ids.dtype, device=ids.device)

    if labels is None:
        return ids.repeat_interleave(repeats)
    labels = labels.masked_fill(is_image, IGNORE)
    return labels.repeat_interleave(repeats)


# ------------------------------------------------------------------------------------ packed rows


class PackedRow(NamedTuple):
    """S samples in one row of T tokens."""

    input_ids: Tensor  # (T,) int64, IMAGE_TOKEN at image positions
    positions: Tensor  # (T,) int64, from 0 in each sample
    cu_seqlens: Tensor  # (S+1,) int32, where samples begin; the last is T
    max_seqlen: int  # tokens of the longest sample
    image_at: Tensor | None = None  # (P,) int64, the positions of images, where they are known

    def to(self, device: torch.device | str) -> PackedRow:
        """Return it on a device."""
        return self._make(send(x, device) if isinstance(x, Tensor) else x for x in self)


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device, from the CPU without waiting for what a GPU has to do.

    Only from pinned memory a copy runs beside the program, so it is copied there first.
    """
    if torch.device(device).type == "cuda" and x.is_cpu:
        x = x.pin_memory()  # x itself if it is there
    return x.to(device, non_blocking=True)


@cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers as a float32 tensor. It is kept: a captured step cannot copy from the CPU."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def image_positions(ids: Tensor) -> Tensor:
    """Return which of packed ids (T,) are positions of images, (P,). On a GPU this waits for it."""
    return (ids == IMAGE_TOKEN).nonzero()[:, 0]


def pack_rows(rows: Sequence[Tensor]) -> PackedRow:
    """Join samples in the order given, each of them a row of ids (t,) whose images are expanded."""
    device = rows[0].device
    lengths = [len(row) for row in rows]

    # Positions begin again in each sample, as if it were alone.
    positions = [torch.arange(length, device=device) for length in lengths]

    # Cumulative lengths: the kernels take them as int32.
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)

    return PackedRow(
        input_ids=torch.cat(list(rows)),
        positions=torch.cat(positions),
        cu_seqlens=cu_seqlens.to(torch.int32),
        max_seqlen=max(lengths),
    )


def pack_prompts(rows: list[Tensor], counts: Sequence[int]) -> PackedRow:
    """Join rows of ids with one placeholder per image; `counts` are the tokens of each image."""
    expanded = []
    first = 0  # the first image of this row
    for row in rows:
        end = first + count_images(row)
        expanded.append(expand_images(row, counts[first:end]))
        first = end
    packed = pack_rows(expanded)
    return packed._replace(image_at=image_positions(packed.input_ids))


def without_padding(padded: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
    """Return the rows of a padded batch (B, T) without the places where the mask (B, T) is 0."""
    if attention_mask is None:
        return list(padded)

    rows = []
    for row, mask in zip(padded, attention_mask, strict=True):
        rows.append(row[mask.bool()])
    return rows


# How a layer attends. attend(layer, q, k, v) takes the queries (T, H, d) of a layer and its new
# keys and values (T, K, d), q and k already rotated, and returns (T, H, d). A model gets it with
# every row, so that the same forward pass serves training, which attends inside the packed row, and
# decoding, where inference/cache.py keeps k and v under layer.index and attends to older ones too.
# The layer also says by what its scores are scaled (layer.scale) and how many keys a query sees
# (layer.window).
Attend = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def packed_attention(cu_seqlens: Tensor, max_seqlen: int) -> Attend:
    """Return the causal attention of a packed row, in which no sample sees another one."""

    def attend(layer: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_packed(q, k, v, cu_seqlens, max_seqlen, layer.scale, layer.window)

    return attend


# ---------------------------------------------------------------------------------------- batches


def positions_in(positions: Tensor, tokens: slice) -> Tensor:
    """Return those of ascending positions that are among the tokens, counted from the first."""
    ends = positions.new_tensor([tokens.start, tokens.stop])
    first, last = torch.searchsorted(positions, ends).tolist()
    return positions[first:last] - tokens.start


@dataclass
class Batch:
    """A packed row to learn from: a PackedRow with labels and with the pixels of its items."""

    input_ids: Tensor  # (T,) int64, IMAGE_TOKEN at image positions
    labels: Tensor  # (T,) int64, NOT shifted, IGNORE where unsupervised
    positions: Tensor  # (T,) int64, from 0 in each sample
    cu_seqlens: Tensor  # (S+1,) int32, where samples begin; the last is T
    max_seqlen: int
    images: Tensor | None  # (V, 3, height, width), the pixels of all items in order; see Item
    shapes: list[ItemShape]  # of the N items
    rows: list[int]  # S row numbers

    # Found when the batch is made, while its tensors are on the CPU. On a GPU the CPU would have to
    # wait for their number.
    image_at: Tensor | None = None  # (P,) int64, the positions of images
    learns_at: Tensor | None = None  # (n,) int64, the positions whose next token is supervised

    def __post_init__(self):
        if self.image_at is None:
            self.image_at = image_positions(self.input_ids)
        if self.learns_at is None:
            self.learns_at = (self.labels[1:] != IGNORE).nonzero()[:, 0]

    @property
    def supervised(self) -> int:
        """Return how many tokens are learned. On a GPU this waits for the work queued there.

        The model shifts labels by one, and a sample's first token is never supervised, so the shift
        loses none.
        """
        return int((self.labels != IGNORE).sum())

    @property
    def items(self) -> list[Item]:
        """Return the N items. Their pixels are slices of `images`."""
        items = []
        first = 0
        for shape in self.shapes:
            items.append(Item(self.images[first : first + shape.length], shape))
            first += shape.length
        return items

    def to(self, device: torch.device | str) -> Batch:
        """Return it on a device, without waiting for what a GPU has to do."""
        return self._with_each_tensor(lambda t: send(t, device))

    def pin_memory(self) -> Batch:
        """Return it in pinned memory, from which copies to a GPU need not be waited for."""
        return self._with_each_tensor(Tensor.pin_memory)

    def _with_each_tensor(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return it with `change` applied to all of its tensors."""
        changed = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                changed[name] = change(value)
        return replace(self, **changed)

    def part(self, samples: slice, items: slice) -> Batch:
        """Return some of the samples, to which the given items belong. Its tensors are slices."""
        # S samples have S + 1 boundaries.
        cu_seqlens = self.cu_seqlens[samples.start : samples.stop + 1]
        tokens = slice(int(cu_seqlens[0]), int(cu_seqlens[-1]))
        lengths = cu_seqlens.diff()

        images = None
        shapes = self.shapes[items]
        if shapes:
            first = length_of(self.shapes[: items.start])
            end = first + length_of(shapes)
            images = self.images[first:end]

        return Batch(
            input_ids=self.input_ids[tokens],
            labels=self.labels[tokens],
            positions=self.positions[tokens],
            cu_seqlens=cu_seqlens - tokens.start,
            max_seqlen=int(lengths.max()),
            images=images,
            shapes=shapes,
            rows=self.rows[samples],
            image_at=positions_in(self.image_at, tokens),
            learns_at=positions_in(self.learns_at, slice(tokens.start, tokens.stop - 1)),
        )


# One token that teaches nothing. The ranks of a step may have different numbers of micro-batches,
# but they put sharded weights together only if all take part: a rank that has none left computes
# this one.
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


def pack_samples(samples: Sequence) -> Batch:
    """Join samples (of inputs/sample.py: ids, labels, items and row) in the order given."""
    ids = []
    labels = []
    numbers = []
    pixels = []
    shapes = []
    for sample in samples:
        ids.append(sample.ids)
        labels.append(sample.labels)
        numbers.append(sample.row)
        for item in sample.items:
            pixels.append(item.pixels)
            shapes.append(item.shape)

    images = None
    if pixels:
        images = torch.cat(pixels)

    packed = pack_rows(ids)
    return Batch(
        input_ids=packed.input_ids,
        labels=torch.cat(labels),
        positions=packed.positions,
        cu_seqlens=packed.cu_seqlens,
        max_seqlen=packed.max_seqlen,
        images=images,
        shapes=shapes,
        rows=numbers,
    )


# ----------------------------------------------------------------- which rank, which micro-batch


def longest_first(lengths: list[int]) -> list[int]:
    """Return the indices of samples by falling length; of equal ones the earlier comes first."""
    return sorted(range(len(lengths)), key=lambda j: -lengths[j])


def split_by_tokens(lengths: list[int], ranks: int) -> list[list[int]]:
    """Return which samples of a step each rank takes, so that all have about as many tokens.

    The longest sample left goes to the rank with the fewest tokens (Graham, 1969: longest
    processing time first). The samples of a rank keep the order of the stream.
    """
    taken = [[] for _ in range(ranks)]  # the samples of each rank
    tokens = [0] * ranks

    def load(rank: int) -> tuple[int, int]:
        """Return what a rank has so far; among equal tokens, fewer samples are less."""
        return tokens[rank], len(taken[rank])

    for j in longest_first(lengths):
        rank = min(range(ranks), key=load)
        taken[rank].append(j)
        tokens[rank] += lengths[j]
    return [sorted(samples) for samples in taken]


def bin_pack(lengths: list[int], budget: int) -> list[list[int]]:
    """Return which samples share a micro-batch of at most `budget` tokens.

    First-fit decreasing (Johnson, 1973): the longest sample left goes into the first micro-batch
    that has room for it, or opens a new one. That never takes more than about 11/9 of the fewest
    possible micro-batches; for samples much shorter than the budget it takes hardly more than the
    fewest.

    A sample longer than the budget is alone; with budget 0 every sample is. The samples of a
    micro-batch keep the order of the stream, and micro-batches are sorted by their first sample.
    """
    bins = []
    room = []  # tokens that each bin can still take
    for j in longest_first(lengths):
        # The first bin with room.
        chosen = 0
        while chosen < len(bins) and room[chosen] < lengths[j]:
            chosen += 1

        # There is none: open a new one. An over-long sample leaves it less than no room.
        if chosen == len(bins):
            bins.append([])
            room.append(budget)

        bins[chosen].append(j)
        room[chosen] -= lengths[j]
    return sorted(sorted(samples) for samples in bins)
