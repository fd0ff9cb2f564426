"""TinyLLaVABench's layout, the one before TinyLLaVA Factory."""

import json

import torch

from checkpoints import weights
from export import export
from model import LLaVA
from packing import IMAGE_TOKEN
from tests.tools.small_llava import SIDE, VISION, small


def test_legacy_bench_phi_keeps_all_siglip_patches_and_has_no_head_bias(tmp_path):
    """TinyLLaVA-3.1B: a flat config, mm_* fields, the tower by name, its last block deleted."""
    model = small("phi", "siglip", feature_select="cls_patch", template="phi")
    model.language_model.lm_head.bias.data.zero_()
    state = {}
    lm = weights.tensors(model.language_model, model.language_model.rename)
    state |= {k: v for k, v in lm.items() if k != "lm_head.bias"}
    state |= {f"model.mm_projector.{k}": v for k, v in model.connector.state_dict().items()}
    tower = weights.tensors(model.vision_tower, model.vision_tower.rename)
    state |= {f"model.vision_tower.vision_tower.{k}": v for k, v in tower.items()}
    weights.save(tmp_path, state)
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "config.json").write_text(
        json.dumps({"model_type": "siglip_vision_model", **VISION})
    )
    config = {
        **model.config.text,
        "model_type": "tiny_llava_phi",
        "mm_vision_tower": str(tmp_path / "tower"),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_hidden_size": 32,
        "image_aspect_ratio": "pad",
        "tune_mm_mlp_adapter": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = LLaVA.from_pretrained(tmp_path)
    assert again.language_model.lm_head.bias is None and again.image_tokens == 9
    assert (again.config.image_mode, again.config.template) == ("pad", "phi")
    ids, images = torch.tensor([[1, IMAGE_TOKEN, 5]]), torch.randn(1, 3, SIDE, SIDE)
    assert torch.equal(again(ids, images).logits, model(ids, images).logits)
    export(
        again, None, "hf-llava", tmp_path / "hf"
    )  # and so this Phi, unlike others, can go to Hugging Face
    assert "language_model.lm_head.bias" not in weights.Checkpoint(tmp_path / "hf")
