"""Chapter 5's exercises are done when these tests pass."""

import torch
import torch.nn.functional as F

from guide.exercises import chosen
from kernels.attention import attention_packed

ch = chosen("ch05")

ENDS = torch.tensor([0, 3, 4, 9], dtype=torch.int32)


def test_mask_of_a_small_row():
    mask = ch.block_diagonal_mask(torch.tensor([0, 2, 3], dtype=torch.int32))
    assert mask.tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_attention_with_the_mask_is_packed_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 9, 2, 8)
    heads_first = [x.transpose(0, 1) for x in (q, k, v)]
    masked = F.scaled_dot_product_attention(*heads_first, ch.block_diagonal_mask(ENDS))
    torch.testing.assert_close(masked.transpose(0, 1), attention_packed(q, k, v, ENDS, 5))


def test_unpack():
    packed = torch.randn(9, 4)
    padded, mask = ch.unpack(packed, ENDS)
    assert padded.shape == (3, 5, 4)
    assert mask.sum(1).tolist() == [3, 1, 5]
    assert torch.equal(padded[mask], packed)
    assert not padded[~mask].any()
    assert torch.equal(padded[2], packed[4:])
