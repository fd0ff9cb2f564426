"""demo/parts.py: a recipe loads the parts of a model and gets their weights."""

import shutil
from dataclasses import replace

import torch

import config
from demo import parts, world
from model import LLaVA
from tests.tools.environment import ROOT


def test_a_recipe_that_names_the_parts_has_their_weights(tmp_path):
    file = ROOT / "recipes" / "demo.toml"
    recipe, _ = config.load([str(file)], file)
    whole = LLaVA.from_parts(recipe.model, "plain", seed=1)
    whole.save(tmp_path / "whole")
    rows = [{"conversations": [{"from": "human", "value": "Is there a red circle?"}]}]
    world.train_tokenizer(rows, tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "whole", dirs_exist_ok=True)

    parts.main([str(tmp_path / "whole"), str(tmp_path / "parts")])
    named = {
        "llm": str(tmp_path / "parts" / "llm"),
        "vision": str(tmp_path / "parts" / "vision"),
        "tokenizer": "",
        "llm_config": {},
        "vision_config": {},
    }
    joined = LLaVA.from_parts(replace(recipe.model, **named), "plain", seed=2)

    of_whole = whole.state_dict()
    for name, tensor in joined.state_dict().items():
        is_new = name.startswith("connector.") and name.endswith("weight")
        assert torch.equal(tensor, of_whole[name]) != is_new, name
    processors = [model.vision_tower.processor.to_hf() for model in (joined, whole)]
    assert processors[0] == processors[1]
    assert (tmp_path / "parts" / "llm" / "tokenizer.json").is_file()
