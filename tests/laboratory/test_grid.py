"""Grids: what they say, and how each mistake in one is named."""

import re
from pathlib import Path

import pytest

from config import UserError
from laboratory.grid import Plot, read_grid
from laboratory.page import line_of
from tests.tools.environment import ROOT
from tests.tools.toy_grid import write_grid

TWO_AXES = """
[axis.rate]
"right" = []
"worse" = ["stage.finetune.learning_rate=0.2"]
[axis.size]
"1 layer" = []
"2 layers" = ["model.llm_config.num_hidden_layers=2", 'model.connector="linear"']
"""


def two_axes(folder: Path, **changes: str) -> Path:
    """Write a grid of two axes and one measure."""
    file = write_grid(folder)
    head, _, rest = file.read_text().partition("[axis.rate]")
    head = head.replace('{ rate = "right" }', '{ rate = "right", size = "2 layers" }')
    text = head + TWO_AXES + "[[measure]]" + rest.partition("[[measure]]")[2]
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    return file


def test_axes_are_crossed_and_the_baseline_comes_first(tmp_path):
    grid = read_grid(two_axes(tmp_path))
    assert [str(cell) for cell in grid.cells] == [
        "rate right, size 2 layers",
        "rate right, size 1 layer",
        "rate worse, size 1 layer",
        "rate worse, size 2 layers",
    ]
    names = [run.folder.relative_to(tmp_path / "out") for run in grid.runs()]
    assert len(names) == 6 + 3 * 3
    assert names[5] == Path("rate-right_size-2-layers/seed-5")
    assert names[-1] == Path("rate-worse_size-2-layers/seed-2")


def test_a_run_has_the_overrides_of_all_its_labels(tmp_path):
    grid = read_grid(two_axes(tmp_path))
    recipe = grid.recipe_of(grid.runs()[-1])
    assert recipe.train.precision == "fp32" and recipe.train.seed == 2
    assert recipe.stage["finetune"].learning_rate == 0.2
    assert recipe.model.llm_config["num_hidden_layers"] == 2
    assert recipe.model.connector == "linear"  # which is in quotes there


def test_listed_cells_are_those_alone(tmp_path):
    listed = 'seeds = [0, 1, 2]\ncells = [{ rate = "worse", size = "1 layer" }]\n'
    grid = read_grid(two_axes(tmp_path, **{"seeds = [0, 1, 2]\n": listed}))
    assert len(grid.cells) == 2 and grid.cells[1].labels[0] == ("rate", "worse")


def test_an_axis_names_the_fields_around_and_in_its_own(tmp_path):
    grid = read_grid(two_axes(tmp_path))
    cell = grid.cells[0]
    assert grid.labels_that_decide(cell, ["model.llm_config"]) == ("2 layers",)
    assert grid.labels_that_decide(cell, ["stage.finetune.learning_rate.x"]) == ("right",)
    assert grid.labels_that_decide(cell, ["stage.finetune", "model"]) == ("right", "2 layers")
    assert grid.labels_that_decide(cell, ["model.llm", "stage.fine"]) == ()


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("seeds = [0, 1, 2]", "seeds = [0, 1, 1]", "seeds: [0, 1, 1] is a list that has a seed"),
        ("seeds = [0, 1, 2]", "seeds = []", "seeds: [] is without a seed"),
        ("seeds = [0, 1, 2]", "seeds = [0, 3]", "not disjoint from seeds: both have 3"),
        ("seeds = [0, 1, 2]", "seeds = 3", "seeds: 3 is not a list of"),
        ("seeds = [0, 1, 2]", "seeds = [0, -1]", "seeds.1: -1 is not a whole number from 0"),
        ("seeds = [0, 1, 2]", "seed = [0]", "seed: unknown key; fix: one of: axis, base,"),
        ('rate = "right"', 'rate = "wrong"', "baseline.rate: 'wrong' is not one of right, worse"),
        ('rate = "right", ', "", "baseline.rate: missing"),
        ('rate = "right", ', 'x = "right", rate = "right", ', "baseline.x: unknown key"),
        ('task = "toy"', "", "measure.0.task: missing"),
        ("[[measure]]", "[[measured]]", "measured: unknown key"),
        ('data = "nowhere"', 'data = "nowhere"\nname = "a b"', "'a b' is not a name of letters"),
        ("base.toml", "none.toml", "base: no such file"),
        ("rate=0.2", "rates=0.2", "learning_rates: unknown key; fix: did you mean"),
        ("rate=0.2", "rate=-1", "-1.0 is out of range"),
        ('"worse"', '"RIGHT"', "would have one folder"),
        ('by = "rate"', 'by = "colour"', "'colour' is not an axis: rate, size"),
        ('x = "flops"', 'x = "size"', "'rate' is needed beside a column only"),
        ("seeds = [0, 1, 2]", "seeds = [0, 1, 2]]", "not TOML"),
        ("seeds = [0, 1, 2]", "threads = 0\nseeds = [0]", "threads: 0 is not a whole number"),
    ],
)
def test_a_mistake_in_a_grid_is_named(tmp_path, old, new, said):
    file = two_axes(tmp_path, **{old: new})
    with pytest.raises(UserError, match=re.escape(said)) as error:
        read_grid(file)
    assert str(error.value).startswith(str(file))


def test_two_measures_of_one_task_need_names(tmp_path):
    more = '[[measure]]\ntask = "toy"\ndata = "other"\n\n[[measure]]'
    with pytest.raises(UserError, match="a second measure 'toy'; fix: give each a name"):
        read_grid(two_axes(tmp_path, **{"[[measure]]": more}))
    named = more.replace('"other"', '"other"\nname = "others"')
    grid = read_grid(two_axes(tmp_path, **{"[[measure]]": named}))
    assert [measure.name for measure in grid.measures] == ["others", "toy"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none.toml: cannot be read: No such file"):
        read_grid(tmp_path / "none.toml")


def test_the_grid_that_the_readme_names_is_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    grid = read_grid(Path("recipes/lab/first.toml"))
    assert [str(cell) for cell in grid.cells] == ["encoder tuned", "encoder frozen"]
    assert len(grid.runs()) == 9


def test_a_plot_has_a_line_for_each_combination_of_the_axes_that_x_is_not():
    """Else cells with the same label of x would lie above each other on one line."""
    labels = {"rate": "1e-3", "batch": "16", "epochs": "0.2"}
    assert line_of(Plot(x="rate", y="score", by=""), labels) == "batch 16, epochs 0.2"
    assert line_of(Plot(x="tokens", y="score", by="batch"), labels) == "batch 16"
    assert line_of(Plot(x="tokens", y="score", by=""), labels) == ""
