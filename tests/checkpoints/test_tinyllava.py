"""TinyLLaVA Factory and -Video: files come back key for key; what they cannot hold is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import tinyllava
from checkpoints.files import read_json
from config import UserError
from connectors import CONNECTORS
from export import export
from model import LLaVA
from packing import IMAGE_TOKEN, Item, ItemShape
from tests.tools.environment import shared
from tests.tools.small_llava import GOLDEN, SIDE, small


@pytest.mark.parametrize(
    "config, message",
    [
        ({"connector": "mean_mlp2x_gelu"}, "no mean_mlp2x_gelu"),
        ({"image_mode": "tiles"}, "no tiles"),
        (
            {"tower": "siglip", "feature_norm": True, "feature_layer": -1},
            "no norm behind the encoder's last block",
        ),
        ({"family": "gemma", "image_scale": 0.5}, "image features scaled otherwise"),
        ({"family": "phi", "head": False}, "a Phi without a bias on its head"),
    ],
)
def test_what_factory_cannot_express_is_refused(config, message, tmp_path):
    model = small(**{k: v for k, v in config.items() if k != "head"})
    if "head" in config:
        model.config.text["lm_head_bias"] = config["head"]
    with pytest.raises(ValueError, match=message) as error:
        export(model, None, "tinyllava", tmp_path / "out")
    assert "; fix: " in str(error.value) and not (tmp_path / "out").exists()


def test_a_connector_that_factory_does_not_know_is_refused(tmp_path, monkeypatch):
    """One that is added to connectors.py later, and an option of one that Factory knows."""
    monkeypatch.setitem(CONNECTORS, "pooled", CONNECTORS["mlp2x_gelu"])
    pooled = small(connector="pooled")
    with pytest.raises(UserError, match="TinyLLaVA Factory has no pooled; fix: use --to barellava"):
        export(pooled, None, "tinyllava", tmp_path / "out")

    model = small(connector="resampler", connector_options={"num_queries": 6})
    model.config.connector_options["heads"] = 4
    with pytest.raises(UserError, match="connector_options: .* no heads of a resampler; fix: "):
        export(model, None, "tinyllava", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_table_of_connectors_states_options_that_exist():
    for name, options in tinyllava.OPTIONS.items():
        assert set(options) == CONNECTORS[name].options.keys(), name


@pytest.mark.parametrize("case", GOLDEN)
def test_factory_round_trip_is_key_for_key_and_bit_for_bit(case, tmp_path):
    source = shared(f"golden/{case}")
    model = LLaVA.from_pretrained(source, dtype=None)
    export(model, None, "tinyllava", tmp_path / "factory")
    export(model, None, "barellava", tmp_path / "ours")
    again = LLaVA.from_pretrained(tmp_path / "ours", dtype=None)
    export(again, None, "tinyllava", tmp_path / "again")
    before = load_file(source / "model.safetensors")
    for folder in ("factory", "again"):
        after = load_file(tmp_path / folder / "model.safetensors")
        assert after.keys() == before.keys()
        assert all(
            torch.equal(after[k], before[k]) and after[k].dtype == before[k].dtype for k in before
        )
    want, got = (
        read_json(source / "config.json"),
        read_json(tmp_path / "again" / "config.json"),
    )
    same = (
        "connector_type",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "image_aspect_ratio",
        "text_config",
        "llm_model_name_or_path",
        "vision_model_name_or_path",
        "vision_model_name_or_path2",
    )
    assert {k: got[k] for k in same} == {k: want[k] for k in same}
    LLaVA.from_pretrained(tmp_path / "again")


LATENTS = {
    "latents",
    "linear.weight",
    "linear.bias",
    "norm.weight",
    "norm.bias",
    "layers.0.0.norm_media.weight",
    "layers.0.0.norm_media.bias",
    "layers.0.0.norm_latents.weight",
    "layers.0.0.norm_latents.bias",
    "layers.0.0.to_q.weight",
    "layers.0.0.to_kv.weight",
    "layers.0.0.to_out.weight",
    "layers.0.1.0.weight",
    "layers.0.1.0.bias",
    "layers.0.1.1.weight",
    "layers.0.1.3.weight",
}


@pytest.mark.parametrize(
    "kind, options", [("groupresampler", {"group": 3}), ("naiveresampler", {})]
)
def test_tinyllava_videos_round_trip(kind, options, tmp_path):
    """Its names and settings of the two resamplers, and the older name of one."""
    sizes = {"num_queries": 6, "num_resampler_layers": 1}
    model = small(
        "qwen2", "siglip", connector=kind, connector_options=sizes | options, frames=5, fps=2.0
    )
    export(model, None, "tinyllava", tmp_path / "1")
    config, state = (
        read_json(tmp_path / "1" / "config.json"),
        load_file(tmp_path / "1" / "model.safetensors"),
    )
    said = {k: config[k] for k in ("connector_type", "group", *sizes) if k in config}
    assert said == {"connector_type": kind, **sizes, **options} and f"{kind}_config" not in config
    prefix = "connector._connector."
    assert {k.removeprefix(prefix) for k in state if k.startswith("connector.")} == LATENTS
    latents = 6 // options.get("group", 1)
    assert (
        torch.equal(state[f"{prefix}latents"], model.connector.latents)
        and len(model.connector.latents) == latents
    )
    card = (tmp_path / "1" / "README.md").read_text()
    assert "- frames of a video: 5 at most, 2 a second\n" in card and "TinyLLaVA-Video" in card
    again = LLaVA.from_pretrained(tmp_path / "1", dtype=None)
    export(again, None, "tinyllava", tmp_path / "2")
    assert read_json(tmp_path / "2" / "config.json") == config
    if kind == "naiveresampler":  # has had another name, and may have a `group` that says nothing
        for change in ({"connector_type": "resamplerwithpe"}, {"group": None}, {"group": 16}):
            (tmp_path / "1" / "config.json").write_text(json.dumps(config | change))
            again = LLaVA.from_pretrained(tmp_path / "1", dtype=None)
            assert again.config.connector == kind
    ids, clip = (
        torch.tensor([[1, IMAGE_TOKEN, 5]]),
        [Item(torch.randn(5, 3, SIDE, SIDE), ItemShape(5))],
    )
    logits = again(ids, clip).logits
    assert logits.size(1) == 2 + 6 and torch.equal(logits, model(ids, clip).logits)


def pickled(folder, state):
    folder.mkdir(parents=True)
    torch.save(state, folder / "pytorch_model.bin")


def test_factorys_three_folders_of_pickles_load_when_allowed(tmp_path):
    source = shared("golden/stablelm-clip-resampler")
    state = load_file(source / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    for folder, prefix in (
        ("language_model", "language_model."),
        ("vision_tower", "vision_tower._vision_tower."),
        ("connector", "connector."),
    ):
        pickled(
            tmp_path / folder,
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)},
        )
    with pytest.raises(ValueError, match="allow_pickle"):
        LLaVA.from_pretrained(tmp_path)
    a, b = LLaVA.from_pretrained(source), LLaVA.from_pretrained(tmp_path, allow_pickle=True)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
