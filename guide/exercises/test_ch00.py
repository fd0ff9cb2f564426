"""Chapter 0: how long a row is, and what its loss is."""

import torch

from config import LLaVAConfig
from guide.exercises import chosen
from model import LLaVA

ch = chosen("ch00")

TEXT = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 24,
}


def test_row_length():
    # LLaVA-1.5 with CLIP, and SigLIP at 384 pixels; a row without a picture; two in one row.
    assert ch.row_length(50, 1, 336, 14) == 625
    assert ch.row_length(50, 1, 384, 16) == 625
    assert ch.row_length(50, 0, 336, 14) == 50
    assert ch.row_length(50, 2, 224, 14) == 560


def test_supervised_loss_is_the_models_own():
    torch.manual_seed(0)
    model = LLaVA(LLaVAConfig(text=TEXT, vision=VISION, feature_select="cls_patch"))
    ids = torch.tensor([[5, -200, 6, 7, 8, 9]])
    labels = torch.tensor([[-100, -100, -100, -100, 8, 9]])
    out = model(ids, images=torch.randn(1, 3, 24, 24), labels=labels)

    # The picture takes nine positions in the place of one, and none of them is supervised.
    nothing = torch.full((9,), -100)
    expanded = torch.cat([labels[0, :1], nothing, labels[0, 2:]])
    loss = ch.supervised_loss(out.logits[0], expanded)
    torch.testing.assert_close(loss, out.loss)
