"""Chapter 7: what trains in a stage, and what a frozen part costs."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from config import LLaVAConfig, Tune
from guide.exercises import chosen
from model import LLaVA

ch = chosen("ch07")

TEXT = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 24,
}


def test_shares():
    model = LLaVA(LLaVAConfig(text=TEXT, vision=VISION))
    stage_1 = ch.shares(model, Tune())
    assert stage_1 == {"language_model": 0, "vision_tower": 0, "connector": 1}

    tuned = ch.shares(model, Tune(llm="full", vision="partial:2"))
    assert tuned["language_model"] == 1

    # Half of the blocks, but less of the encoder: in one as small as this, the patch embedding is
    # most of it.
    assert 0.2 < tuned["vision_tower"] < 0.25

    # What one stage says does not stay for the next.
    assert ch.shares(model, Tune()) == stage_1


def test_nothing_trains():
    assert ch.operations_per_token([(6, False), (12, False)]) == 36


@pytest.mark.parametrize("trains", list(itertools.product((False, True), repeat=3))[1:])
def test_operations_are_those_that_torch_counts(trains):
    widths = (8, 16, 4, 32)
    chain = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)))
    parts = []
    for part, is_trained in zip(chain, trains, strict=True):
        part.requires_grad_(is_trained)
        parts.append((part.weight.numel(), is_trained))

    with FlopCounterMode(display=False) as counter:
        chain(torch.randn(1, 8)).sum().backward()
    assert ch.operations_per_token(parts) == counter.get_total_flops()
