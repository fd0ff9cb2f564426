"""On a GPU the CPU does not wait within a step: seen on a device that is not there, fake_gpu.py."""

import json

import torch

from packing import IGNORE, IMAGE_TOKEN, Batch, send
from tests.tools.environment import run
from tests.tools.small_llava import small


def test_no_step_of_training_or_decoding_waits_for_the_gpu():
    """Full, checkpointing, LoRA, NF4, int8, tiles, a video, NaFlex, text alone; prefill and a step.

    The operations of a block are counted, too, as each takes the CPU some microseconds.
    """
    found = json.loads(run("-m", "tests.tools.gpu_steps", TRITON_INTERPRET="0").stdout)
    forward, backward = found.pop("operations")
    assert {name: waits for name, waits in found.items() if waits} == {}
    assert len(found) == 14
    assert forward <= 45 and backward <= 87


def test_what_is_sent_to_a_gpu_is_pinned_first(monkeypatch):
    """A copy from other memory waits. What is pinned already is not copied again."""
    done = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: done.append("pin") or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **k: done.append((a, k)) or x)
    send(torch.zeros(2), "cuda:1")
    assert done == ["pin", (("cuda:1",), {"non_blocking": True})]


def batch(**more) -> Batch:
    """Two samples: an image of two tokens and three of text, and three of text."""
    ids = torch.tensor([1, IMAGE_TOKEN, IMAGE_TOKEN, 4, 5, 1, 7, 8])
    labels = torch.tensor([IGNORE, IGNORE, IGNORE, 4, 5, IGNORE, 7, IGNORE])
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    cu_seqlens = torch.tensor([0, 5, 8], dtype=torch.int32)
    return Batch(ids, labels, positions, cu_seqlens, 5, None, [], [0, 1], **more)


def test_a_batch_knows_where_images_are_and_what_learns():
    """Also a part of it, where positions count from the part's first token."""
    whole = batch()
    assert whole.image_at.tolist() == [1, 2]
    assert whole.learns_at.tolist() == [2, 3, 5]

    first = whole.part(slice(0, 1), slice(0, 0))
    second = whole.part(slice(1, 2), slice(0, 0))
    assert first.image_at.tolist() == [1, 2] and first.learns_at.tolist() == [2, 3]
    assert second.image_at.tolist() == [] and second.learns_at.tolist() == [0]
    assert whole.to("cpu").learns_at.tolist() == [2, 3, 5]


def test_features_and_their_gradients_go_where_masks_would_put_them():
    """The positions give the bits that masked_scatter gave, forward and backward."""
    model = small()
    ids = batch().input_ids
    features = torch.randn(2, 48, requires_grad=True)
    weights = torch.randn(8, 48)

    results = []
    for image_at in (None, torch.tensor([1, 2])):
        x = model.embed(ids, features, image_at)
        results.append((x, *grads_of(x * weights, model, features)))
    x = model.embed(ids, None).masked_scatter((ids == IMAGE_TOKEN)[:, None], features)
    results.append((x, *grads_of(x * weights, model, features)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def grads_of(y, model, features) -> tuple[torch.Tensor, ...]:
    """Return the gradients of the features and of the embedding table."""
    table = model.language_model.model.embed_tokens.weight
    return torch.autograd.grad(y.sum(), (features, table))
