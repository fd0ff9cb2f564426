"""recipes/lab/: the grids are read, and each cell at the scale of the demo's world can be built."""

from pathlib import Path

import pytest
import torch

import config
from config import PARTS
from demo import parts, world
from laboratory.grid import read_grid
from model import LLaVA
from tests.tools.environment import ROOT
from train import set_trainable

LAB = ROOT / "recipes" / "lab"
GRIDS = ("tower-share", "connectors", "hallucination", "data-quality", "hyperparameters")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder in which the recipes lie, and what the grids start from, untrained."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    rows = [{"conversations": [{"from": "human", "value": "Is there a red circle?"}]}]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("start", "start-small", "start-large"):
            file = LAB / f"{name}.toml"
            recipe, _ = config.load([str(file)], file)
            out = Path(recipe.train.output)
            LLaVA.from_parts(recipe.model, "plain").save(out)
            world.train_tokenizer(rows, out / "tokenizer")
            for one in (out / "tokenizer").iterdir():
                one.rename(out / one.name)
            if name == "start":
                parts.take_apart(out, out.with_name("parts"))
    return folder


@pytest.mark.parametrize("name", GRIDS)
def test_every_cell_has_something_to_train(place, name, monkeypatch):
    monkeypatch.chdir(place)
    grid = read_grid(Path(f"recipes/lab/{name}.toml"))
    pixels = torch.zeros(1, 3, 72, 72, dtype=torch.uint8)
    for cell in grid.cells:
        recipe = grid.recipe_of(grid.runs_of(cell, grid.seeds)[0])
        model = LLaVA.from_parts(recipe.model, "plain")
        assert model.encode_images(pixels).shape[1] in (9, 36)
        for stage in recipe.stage.values():
            set_trainable(model, stage.tune)
            assert model.language_model.lm_head.weight.requires_grad


def test_the_shares_are_those_of_the_encoders_blocks(place, monkeypatch):
    monkeypatch.chdir(place)
    grid = read_grid(Path("recipes/lab/tower-share.toml"))
    for cell in grid.cells:
        recipe = grid.recipe_of(grid.runs_of(cell, grid.seeds)[0])
        model = LLaVA.from_parts(recipe.model, "plain")
        set_trainable(model, recipe.stage["finetune"].tune)

        trained = []
        for block in model.vision_tower.blocks:
            trained.append(all(p.requires_grad for p in block.parameters()))
        labels = dict(cell.labels)
        share = int(labels["share"].removesuffix(" %")) / 100
        assert sum(trained) == share * len(trained)
        assert trained == sorted(trained)  # from the last one down


@pytest.mark.parametrize("name", GRIDS)
def test_each_question_has_a_grid_over_the_published_recipes(name, monkeypatch):
    """Their parts are on the Hub, so that no model is built here."""
    monkeypatch.chdir(ROOT)
    ours = read_grid(Path(f"recipes/lab/{name}.toml"))
    real = read_grid(Path(f"recipes/lab/real/{name}.toml"))
    assert len(real.seeds) == len(ours.seeds) == 3
    assert real.noise_seeds == ours.noise_seeds == (3, 4, 5)
    assert real.output != ours.output
    for cell in real.cells:
        recipe = real.recipe_of(real.runs_of(cell, real.seeds)[0])
        for stage in recipe.stage.values():
            for part in PARTS:
                how = getattr(stage.tune, part)
                assert how in ("frozen", "full") or how.startswith("partial:")
