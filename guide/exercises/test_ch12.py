"""Chapter 12: a loss block by block, and mistakes in a kernel."""

import pytest
import torch
import torch.nn.functional as F

from guide.exercises import chosen

pytest.importorskip("triton", reason="Triton exists for Linux")
from guide.exercises.ch12_kernels import BLOCK, VERSIONS, average  # noqa: E402

ch = chosen("ch12")


@pytest.mark.parametrize("size, block", [(100, 32), (7, 16), (64, 1), (96, 32)])
def test_online_cross_entropy(size, block):
    generator = torch.Generator().manual_seed(0)
    logits = 200 * torch.randn(size, generator=generator)  # some powers would overflow
    for target in (0, size // 2, size - 1):
        loss = ch.online_cross_entropy(logits, target, block)
        expected = F.cross_entropy(logits[None], torch.tensor([target]))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)


def is_right(version: str, scores: torch.Tensor) -> bool:
    """Say whether a version gives what torch does."""
    values = torch.randn(len(scores), 8, generator=torch.Generator().manual_seed(1))
    expected = scores.softmax(0) @ values
    return torch.allclose(average(version, scores, values), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("version", VERSIONS)
def test_scores_that_show(version):
    scores = ch.scores_that_show(version)
    if scores is not None:
        assert 1 <= len(scores) <= 200 and scores.abs().max() <= 1e4
        assert not is_right(version, scores), "this version is right on these scores"
        return

    # Scores of every kind: nothing may be wrong with the version.
    steep = torch.linspace(-5000, 5000, 70)
    hard = [torch.zeros(20), steep, steep.flip(0), steep[:BLOCK], steep[-5:]]
    assert all(is_right(version, one) for one in hard), "there are scores on which it is wrong"
