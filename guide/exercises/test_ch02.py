"""Chapter 2's exercises are done when these tests pass."""

import math

import pytest
import torch

from encoders import build_encoder, vision_config
from guide.exercises import chosen

ch = chosen("ch02")

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}


def test_siglip_loss_of_two_pairs():
    # Both right pairs are sure to be right, and one wrong pair is as likely as not.
    similarity = torch.tensor([[50.0, 0.0], [-50.0, 50.0]])
    assert ch.siglip_loss(similarity, torch.tensor(0.0)).item() == pytest.approx(math.log(2) / 2)


def test_siglip_loss_has_a_bias_on_every_entry():
    similarity = torch.zeros(3, 3)
    yes = math.log(1 + math.exp(2.0))  # -log sigmoid(-2)
    no = math.log(1 + math.exp(-2.0))  # -log sigmoid(2)
    loss = ch.siglip_loss(similarity, torch.tensor(-2.0)).item()
    assert loss == pytest.approx((3 * yes + 6 * no) / 3)


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_states_are_what_feature_layer_chooses(kind):
    torch.manual_seed(0)
    side = {"height": 12, "width": 12}
    processor = {"size": side}
    if kind == "clip_vision_model":
        processor = {"size": {"shortest_edge": 12}, "crop_size": side}
    config = vision_config({"model_type": kind, **SIZES}, processor)
    deepest = build_encoder(config, -1, "cls_patch")
    pixels = torch.randn(2, 3, 12, 12)

    states = ch.hidden_states(deepest, pixels)
    assert len(states) == 4
    for layer in (0, 1, -2, -1):
        encoder = build_encoder(config, layer, "cls_patch")
        encoder.load_state_dict(deepest.state_dict(), strict=False)
        torch.testing.assert_close(encoder(pixels), states[layer])
