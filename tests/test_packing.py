"""packing.py: expanded images, packed rows and their parts, shares of ranks, micro-batches."""

import random

import numpy as np
import pytest
import torch

from inputs.sample import Sample
from packing import (
    IGNORE,
    IMAGE_TOKEN,
    ONE_VIEW,
    Item,
    ItemShape,
    bin_pack,
    expand_images,
    match_images,
    pack_prompts,
    pack_samples,
    split_by_tokens,
    without_padding,
)

# ---- images


def test_a_placeholder_becomes_the_positions_of_its_image():
    ids = torch.tensor([5, IMAGE_TOKEN, 6, IMAGE_TOKEN])
    labels = torch.tensor([IGNORE, 1, 6, 2])
    expanded = [5, *[IMAGE_TOKEN] * 3, 6, *[IMAGE_TOKEN] * 2]
    assert expand_images(ids, [3, 2]).tolist() == expanded
    assert expand_images(ids, [3, 2], labels).tolist() == [IGNORE] * 4 + [6] + [IGNORE] * 2
    assert expand_images(torch.tensor([5, 6]), []).tolist() == [5, 6]


def test_images_are_one_for_each_placeholder_or_one_for_each_row():
    with_image = torch.tensor([1, IMAGE_TOKEN])
    with_two = torch.tensor([IMAGE_TOKEN, IMAGE_TOKEN])
    text = torch.tensor([1, 2])
    pictures = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 4, 4)

    def shown(rows, images):
        return [item.pixels.mean().item() for item in match_images(rows, images)]

    assert shown([with_two, text], pictures) == [0, 1]
    assert shown([text, with_image], pictures) == [1]  # the row of text ignores its own
    assert shown([text, with_image], [Item(pictures[:1])]) == [0]
    assert shown([text, text], pictures) == shown([text], None) == []
    assert match_images([with_image], pictures[:1])[0].shape == ONE_VIEW
    with pytest.raises(ValueError, match="3 image placeholders but 2 images"):
        match_images([with_image, with_two], pictures)


# ---- packed rows


def sample(length, i=0, images=0):
    ids = torch.arange(length) + 100 * i
    labels = torch.where(torch.arange(length) % 2 == 0, IGNORE, ids)
    return Sample(ids, labels, [Item(torch.full((1, 3, 2, 2), float(i)))] * images, i, 0)


def test_prompts_are_packed_with_their_images_expanded():
    rows = [torch.tensor([5, IMAGE_TOKEN, 6]), torch.tensor([7]), torch.tensor([IMAGE_TOKEN])]
    row = pack_prompts(rows, [2, 3])
    assert row.input_ids.tolist() == [5, IMAGE_TOKEN, IMAGE_TOKEN, 6, 7, *[IMAGE_TOKEN] * 3]
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 0, 1, 2]
    assert row.cu_seqlens.tolist() == [0, 4, 5, 8] and row.cu_seqlens.dtype == torch.int32
    assert row.max_seqlen == 4


def test_padding_is_left_out_wherever_it_is():
    padded = torch.tensor([[0, 1, 2], [3, 4, 0]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert [row.tolist() for row in without_padding(padded, mask)] == [[1, 2], [3, 4]]
    assert [row.tolist() for row in without_padding(padded)] == [[0, 1, 2], [3, 4, 0]]


def test_a_pack_keeps_samples_apart():
    batch = pack_samples([sample(4, 1, images=2), sample(3, 2), sample(5, 3, images=1)])
    assert batch.input_ids.tolist() == [100, 101, 102, 103, 200, 201, 202, 300, 301, 302, 303, 304]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 12] and batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 5 and batch.rows == [1, 2, 3] and batch.supervised == 2 + 1 + 2
    assert batch.images[:, 0, 0, 0].tolist() == [1, 1, 3] and batch.images.shape == (3, 3, 2, 2)
    assert pack_samples([sample(3)]).images is None
    moved = batch.to("meta")
    tensors = [moved.input_ids, moved.labels, moved.positions, moved.cu_seqlens, moved.images]
    assert all(t.is_meta for t in tensors) and moved.rows == batch.rows
    part = batch.part(slice(1, 3), slice(2, 3))
    alone = pack_samples([sample(3, 2), sample(5, 3, images=1)])
    for name, value in vars(alone).items():
        other = getattr(part, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other), name
        else:
            assert value == other, name
    assert batch.part(slice(1, 2), slice(2, 2)).images is None


def test_the_items_of_a_batch_are_those_of_its_samples():
    clip = Item(torch.randn(3, 3, 2, 2), ItemShape(3))
    picture = Item(torch.randn(1, 3, 2, 2))
    first, second = sample(4), sample(3)
    first.items, second.items = [clip, picture], [picture]
    items = pack_samples([first, second]).items
    assert len(items) == 3 and pack_samples([sample(3)]).items == []
    for got, want in zip(items, [clip, picture, picture], strict=True):
        assert torch.equal(got.pixels, want.pixels) and got.shape == want.shape


# ---- shares of ranks


def test_shares_are_balanced_and_complete():
    r = np.random.default_rng(0)
    for world in (1, 2, 3, 8):
        lengths = r.integers(50, 2048, 128).tolist() + [0, 0]
        shares = split_by_tokens(lengths, world)
        assert sorted(j for share in shares for j in share) == list(range(130))
        assert shares == split_by_tokens(lengths, world)
        tokens = [sum(lengths[j] for j in share) for share in shares]
        assert max(tokens) - min(tokens) < 0.02 * sum(tokens) / world
        assert all(share == sorted(share) for share in shares)
    assert split_by_tokens([5, 9, 1], 3) == [[1], [0], [2]]
    assert split_by_tokens([0, 0], 2) == [[0], [1]]


# ---- micro-batches


def test_bin_packing_holds_the_budget_and_loses_nothing():
    lengths = np.random.default_rng(0).integers(50, 1500, 300).tolist() + [9000]
    bins = bin_pack(lengths, 8192)
    assert sorted(j for b in bins for j in b) == list(range(301))
    assert all(sum(lengths[j] for j in b) <= 8192 or len(b) == 1 for b in bins)
    assert len(bins) == 1 + -(-sum(lengths[:-1]) // 8192)  # and that is the fewest possible
    assert all(b == sorted(b) for b in bins) and bins == sorted(bins) == bin_pack(lengths, 8192)
    assert bin_pack([3, 3, 7, 7], 10) == [[0, 2], [1, 3]]  # in stream order it would take three
    assert bin_pack([3, 3, 3], 0) == [[0], [1], [2]] and bin_pack([5, 6, 4], 9) == [[0, 2], [1]]


def test_micro_batches_are_the_fewest_possible_or_one_more():
    r = np.random.default_rng(1)
    for n in (16, 64, 128):
        lengths = r.choice([610, 640, 700, 900, 1500], n) + r.integers(-20, 20, n)
        lengths = np.clip(lengths, 1, 2048).tolist()
        bins = bin_pack(lengths, 8192)
        assert sorted(j for b in bins for j in b) == list(range(n))
        assert max(sum(lengths[j] for j in b) for b in bins) <= 8192
        assert len(bins) <= -(-sum(lengths) // 8192) + 1


def llava_lengths(count: int) -> list[int]:
    """Lengths like LLaVA-665k's: nine of ten rows with a picture, answers of a word to a page."""
    draw = random.Random(0)
    lengths = []
    for _ in range(count):
        turns = draw.choice([1, 1, 1, 4, 5, 10])
        words = sum(draw.lognormvariate(3.3, 0.8) for _ in range(turns))
        picture = 576 if draw.random() < 0.9 else 0
        lengths.append(min(2048, int(35 + picture + 1.3 * words)))
    return lengths


def test_micro_batches_of_8192_tokens_are_95_percent_full():
    """Of steps of 256 samples, about 25 micro-batches. The last one of a step is what costs most:
    a step's tokens are no multiple of the budget, so not even the fewest possible are full."""
    lengths = llava_lengths(16 * 256)
    assert 650 < sum(lengths) / len(lengths) < 950 and max(lengths) > 1500
    used = fewest = 0
    for first in range(0, len(lengths), 256):
        step = lengths[first : first + 256]
        used += len(bin_pack(step, 8192))
        fewest += -(-sum(step) // 8192)
    assert sum(lengths) / (used * 8192) >= 0.95
    assert used <= 1.02 * fewest
