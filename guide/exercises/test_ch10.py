"""Chapter 10: attention rollout, and occlusion of any score."""

import torch

from guide.exercises import chosen

ch = chosen("ch10")


def test_rollout_of_one_block():
    attention = torch.tensor([[[1.0, 0.0], [0.6, 0.4]]])
    expected = torch.tensor([[1.0, 0.0], [0.3, 0.7]])
    torch.testing.assert_close(ch.rollout(attention), expected)


def test_rollout_goes_through_tokens_between():
    # In the first block token 1 reads token 0, in the second token 2 reads token 1.
    first = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]])
    second = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 0]])
    found = ch.rollout(torch.stack([first, second]))
    torch.testing.assert_close(found[2], torch.tensor([0.25, 0.25, 0.5]))

    # In the other order nothing of token 0 comes to token 2.
    found = ch.rollout(torch.stack([second, first]))
    assert found[2, 0] == 0
    torch.testing.assert_close(found.sum(-1), torch.ones(3))


def test_occlusion_map():
    picture = torch.zeros(3, 4, 6)
    picture[0, 2:4, 4:6] = 1
    before = picture.clone()

    # How red it is: only the patch at the lower right counts.
    found = ch.occlusion_map(lambda p: float(p[0].sum()), picture, 2, torch.zeros(3))
    expected = torch.zeros(2, 3)
    expected[1, 2] = 4
    torch.testing.assert_close(found, expected)
    assert torch.equal(picture, before)

    # A red cover can only make it redder.
    found = ch.occlusion_map(lambda p: float(p[0].sum()), picture, 2, torch.tensor([1.0, 0, 0]))
    assert (found == 0).all()
