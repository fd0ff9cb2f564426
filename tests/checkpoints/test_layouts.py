"""What a config.json must say, whatever its layout."""

import json

import pytest

from checkpoints import weights
from checkpoints.files import read_json
from checkpoints.layouts import LAYOUTS, config_from_recipe, exports_to, read_config
from config import Model, UserError
from export import export
from inputs.tiling_split import mark_names
from model import LLaVA, lm_config, tiling_of
from tests.tools.fuzz import places
from tests.tools.small_llava import NAFLEX, SIDE, VISION, small


def test_unknown_layout_and_incomplete_config_are_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llavaa"}')
    with pytest.raises(ValueError, match="no layout known here; fix: one of barellava, tinyllava"):
        LLaVA.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "tinyllava", "text_config": {}}')
    with pytest.raises(ValueError, match="vision_config: missing"):
        LLaVA.from_pretrained(tmp_path)


FEW = (None, True, -1, 2**40, float("nan"), "x", {"a": []})


@pytest.mark.parametrize("layout", ["barellava", "tinyllava", "hf-llava", "llava-onevision"])
def test_a_wrong_field_is_named_with_its_file(layout, tmp_path):
    """Each field of config.json and preprocessor_config.json with each odd value."""
    mode = "square"
    tower = "clip"
    select = "patch"
    if layout == "hf-llava":
        mode = "anyres"
    if layout == "llava-onevision":
        mode = "anyres_max"
        tower = "siglip"
        select = "cls_patch"
    folder = tmp_path / "model"
    model = small("qwen2", tower, image_mode=mode, image_grids="1x2 2x1", feature_select=select)
    export(model, None, layout, folder)

    for name in ("config.json", "preprocessor_config.json"):
        good = read_json(folder / name)
        for path in places(good)[1:]:
            for value in FEW:
                spoiled = json.loads(json.dumps(good))
                inner = spoiled
                for key in path[:-1]:
                    inner = inner[key]
                inner[path[-1]] = value
                text = json.dumps(spoiled).encode()
                (folder / name).write_bytes(text)
                try:
                    config = read_config(folder)
                    tiling_of(config).positions()
                    lm_config(config.text, config.places["text"])
                except UserError as e:
                    is_named = str(e).startswith((f"{folder}/", "model."))
                    assert is_named and "; fix: " in str(e), str(e)
        (folder / name).write_text(json.dumps(good))
    LLaVA.from_pretrained(folder)


# What a model is made of -> the layouts that can express it, beside our own.
EXPRESSED = (
    ({"tower": "clip"}, {"tinyllava", "hf-llava"}),
    ({"family": "phi"}, {"tinyllava"}),  # its head has a bias
    ({"tower": "clip", "connector": "resampler"}, {"tinyllava"}),
    (
        {"tower": "siglip", "image_mode": "anyres_max", "feature_select": "cls_patch"},
        {"llava-onevision"},
    ),
    (
        {
            "tower": "siglip",
            "connector": "pixel_shuffle",
            "connector_options": {"factor": 3},
            "feature_layer": -1,
            "feature_select": "cls_patch",
            "feature_norm": True,
            "image_mode": "split",
            "image_edge": 2 * SIDE,
            "image_marks": {name: [1] for name in mark_names(2 * SIDE, SIDE)},
            "template": "chat",
        },
        {"smolvlm", "idefics3"},
    ),
    (NAFLEX, set()),
)


@pytest.mark.parametrize("parts, expected", EXPRESSED)
def test_the_layouts_that_can_express_a_model_are_named(parts, expected, tmp_path):
    """From the plan without values too; and each writer refuses what its check refuses."""
    model = small(**parts)
    if model.language_model.lm_head.bias is not None:
        model.language_model.lm_head.bias.data.fill_(1)
    assert set(exports_to(model)) == {"barellava"} | expected
    with weights.empty():
        assert exports_to(LLaVA(model.config)) == exports_to(model)

    for layout in LAYOUTS.values():
        if layout.export_name in exports_to(model) or not layout.write:
            continue
        with pytest.raises(UserError):
            export(model, None, layout.export_name, tmp_path / layout.export_name)
        assert not (tmp_path / layout.export_name).exists()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_of_a_full_encoder_the_vision_half_counts(kind, tmp_path):
    """The published folders have a text half, too; Factory knows encoders by their half's name."""
    alone = small("llama", kind)
    full = {"model_type": kind, "text_config": {"hidden_size": 3}, "vision_config": VISION}
    (tmp_path / "config.json").write_text(json.dumps(full))
    images = json.dumps(alone.vision_tower.processor.to_hf())
    (tmp_path / "preprocessor_config.json").write_text(images)
    recipe = Model(llm_config=alone.config.text, vision=str(tmp_path), connector="mlp2x_gelu")
    made = config_from_recipe(recipe, "llama")
    assert made.vision == VISION | {"model_type": f"{kind}_vision_model"}
    with weights.empty():
        assert exports_to(LLaVA(made)) == ["barellava", "tinyllava", "hf-llava"]

    # So it is where a checkpoint of before says it.
    export(alone, None, "barellava", tmp_path / "own")
    config = read_json(tmp_path / "own" / "config.json")
    (tmp_path / "own" / "config.json").write_text(json.dumps(config | {"vision_config": full}))
    assert "tinyllava" in exports_to(LLaVA.from_pretrained(tmp_path / "own"))


def test_random_weights_that_no_machine_holds_are_refused():
    text = {"model_type": "llama", "vocab_size": 2**21, "hidden_size": 2**16, "head_dim": 128}
    text |= {"intermediate_size": 2**18, "num_hidden_layers": 8, "num_attention_heads": 512}
    vision = {"model_type": "siglip_vision_model", "patch_size": 56}
    with pytest.raises(UserError, match="GB of random weights; this machine has"):
        LLaVA.from_parts(Model(llm_config=text, vision_config=vision), "plain")
