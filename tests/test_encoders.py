"""Image transforms against the published processors; encoders from Hugging Face folders."""

import json

import pytest
import torch
from conftest import shared
from PIL import Image
from safetensors.torch import save_file

import weights
from config import UserError
from connectors import CONNECTORS, build_connector
from encoders import ImageTransform, VisionEncoder, load_encoder, vision_config

PROCESSORS = {
    "clip-vit-large-patch14-336": "openai--clip-vit-large-patch14-336",
    "clip-vit-large-patch14": "openai--clip-vit-large-patch14",
    "siglip-so400m-patch14-384": "google--siglip-so400m-patch14-384",
}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 2, "patch_size": 4, "image_size": 12}  # fmt: skip


def test_pixels_equal_the_published_processors():
    golden = json.loads(shared("assets/images/golden_preprocess.json").read_text())["cases"]
    checked = 0
    for case in golden:
        if case["processor"] not in PROCESSORS:
            continue
        folder = shared("assets/configs") / PROCESSORS[case["processor"]]
        files = ("config.json", "preprocessor_config.json")
        config = vision_config(*(json.loads((folder / name).read_text()) for name in files))
        image = Image.open(shared("assets/images") / case["image"]).convert("RGB")
        pixels = config.transform(image, "pad" if case["pad"] else "square")
        assert list(pixels.shape) == case["shape"], case["image"]
        assert pixels.mean((1, 2)).tolist() == pytest.approx(case["mean"], abs=1e-5)
        for c, y, x, value in case["points"]:
            assert pixels[c, y, x].item() == pytest.approx(value, abs=1e-5), (case["image"], case["processor"])
        checked += 1
    assert checked >= 80 and {c["processor"] for c in golden} >= set(PROCESSORS)


def test_the_real_photograph_gives_exactly_its_pixels():
    folder = shared("assets/weights/tinyllava--TinyLLaVA-Phi-2-SigLIP-3.1B-golden")
    want = torch.frombuffer(bytearray((folder / "image_tensor_f32_3x384x384.bin").read_bytes()), dtype=torch.float32)
    got = ImageTransform(384)(Image.open(folder / "test.jpg"))
    assert (got.flatten() - want).abs().max() <= 1e-6


def test_the_processor_survives_a_round_trip():
    for transform in (ImageTransform(384), ImageTransform(256, 224, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))):
        assert ImageTransform.from_hf(transform.to_hf(), ImageTransform()) == transform


def folder_of(tmp_path, config: dict, prefix: str = "vision_model.", **extra):
    """A Hugging Face folder with random weights, and the encoder they came from (all blocks run)."""
    torch.manual_seed(0)
    encoder = VisionEncoder(vision_config(config), -1, "cls_patch")
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.2)
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {prefix + k: v.contiguous() for k, v in encoder.state_dict().items()} | extra
    save_file(state, tmp_path / "model.safetensors")
    return encoder


def test_feature_layer_and_selection(tmp_path):
    whole = folder_of(tmp_path, CLIP)
    pixels = torch.randn(2, 3, 12, 12)
    x = whole.pre_layrnorm(whole.embeddings(pixels))
    states = [x]
    for block in whole.blocks:
        states.append(block(states[-1]))
    for layer in (-1, -2, 0, 2):
        got = load_encoder(tmp_path, feature_layer=layer, feature_select="cls_patch")(pixels)
        assert torch.equal(got, states[layer])
    assert torch.equal(load_encoder(tmp_path)(pixels), states[-2][:, 1:])
    assert vision_config(CLIP).tokens("patch") == 9 and vision_config(CLIP).tokens("cls_patch") == 10
    with pytest.raises(UserError, match="feature_layer"):
        load_encoder(tmp_path, feature_layer=-5)


def test_siglip_loses_its_first_patch_as_tinyllava_has_it(tmp_path):
    config = CLIP | {"model_type": "siglip_vision_model"}
    folder_of(tmp_path, config)
    pixels = torch.randn(1, 3, 12, 12)
    every = load_encoder(tmp_path, feature_select="cls_patch")(pixels)
    assert every.shape[1] == 9
    assert torch.equal(load_encoder(tmp_path)(pixels), every[:, 1:])


def test_the_text_half_of_a_full_checkpoint_is_left_where_it_is(tmp_path):
    whole = folder_of(tmp_path, CLIP, logit_scale=torch.ones(()), **{"text_model.x.weight": torch.ones(3)})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": CLIP}))
    pixels = torch.randn(1, 3, 12, 12)
    assert torch.equal(load_encoder(tmp_path, feature_layer=-1, feature_select="cls_patch")(pixels), whole(pixels))


def test_spares_go_back_under_their_names(tmp_path):
    folder_of(tmp_path, CLIP, **{"vision_model.post_layernorm.weight": torch.ones(32)})
    encoder = load_encoder(tmp_path)
    assert len(encoder.blocks) == 2 and any(k.startswith("encoder.layers.2.") for k in encoder.spares)
    assert set(weights.tensors(encoder, (("vision_model.**", "**"),))) == set(weights.Checkpoint(tmp_path))


@pytest.mark.parametrize("change, message", [
    ({"model_type": "clip_vison_model"}, "no vision encoder known"), ({"hidden_act": "relu"}, "hidden_act"),
])  # fmt: skip
def test_an_encoder_we_do_not_know_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        vision_config(CLIP | change)


def test_connectors():
    x = torch.randn(2, 5, 8)
    for spec in CONNECTORS:
        connector = build_connector(spec, 8, 8 if spec == "identity" else 12)
        assert connector(x).shape == (2, 5, 8 if spec == "identity" else 12)
    assert len([m for m in build_connector("mlp3x_gelu", 8, 12) if isinstance(m, torch.nn.Linear)]) == 3
    mlp = build_connector("mlp2x_gelu", 8, 12)
    want = torch.nn.functional.gelu(x @ mlp[0].weight.T + mlp[0].bias) @ mlp[2].weight.T + mlp[2].bias
    assert (mlp(x) - want).abs().max() < 1e-6
    for spec in ("identity", "mlp2x_gelo"):
        with pytest.raises(UserError, match="model.connector"):
            build_connector(spec, 8, 12)
