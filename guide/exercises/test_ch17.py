"""Chapter 17: eight bits a weight, and rows that turn as neighbours."""

from types import SimpleNamespace

import torch

from checkpoints.gguf import neighbours
from guide.exercises import chosen

ch = chosen("ch17")


def test_quantized_weights_are_within_half_a_step():
    torch.manual_seed(0)
    weight = torch.randn(8, 96)
    weight[3, 32:64] = 0
    numbers, scales = ch.quantize_q8_0(weight)
    assert numbers.dtype == torch.int8 and numbers.shape == (8, 96) and scales.shape == (8, 3)

    blocks = numbers.unflatten(-1, (3, 32)).float()
    again = blocks * scales[..., None]
    error = (again - weight.unflatten(-1, (3, 32))).abs()
    assert (error <= 0.501 * scales[..., None]).all()

    # The largest of each block uses the whole range.
    largest = blocks.abs().amax(-1)
    assert largest[3, 1] == 0 and scales[3, 1] == 0
    assert (largest.flatten().sort().values[1:] == 127).all()


def test_rows_become_pairs_of_neighbours():
    weight = torch.arange(12.0)[:, None].expand(12, 5)
    assert ch.to_pairs(weight, heads=2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]

    # As the files for llama.cpp have them.
    lm = SimpleNamespace(config=SimpleNamespace(head_dim=8))
    weight = torch.randn(32, 7)
    assert torch.equal(ch.to_pairs(weight, heads=4), neighbours(weight, lm))
