"""What the README and the scripts' own help promise."""

import re
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

import config
from checkpoints import layouts, weights
from model import LLaVA
from tests.tools.environment import ROOT, run
from training import planner

README = (ROOT / "README.md").read_text()
SCRIPTS = [
    "train.py",
    "generate.py",
    "evaluate.py",
    "export.py",
    "data.py",
    "serve.py",
    "visualize.py",
    "lab.py",
    "-m demo.report",
    "-m demo.world",
    "-m demo.moving",
]


def reading_path() -> list[str]:
    """Return the files of the README's reading path, in its order."""
    return re.findall(r"^\| \d+ \| \[`([\w./]+)`\]", README, re.M)


def test_the_reading_path_is_as_long_as_the_readme_says():
    files = reading_path()
    stated = re.search(r"These (\w+) files.*?have ([\d,]+)\s+lines", README, re.S)
    numbers = {"ten": 10, "eleven": 11, "twelve": 12}
    assert len(files) == numbers[stated.group(1)]
    lines = sum(len((ROOT / file).read_text().splitlines()) for file in files)
    assert round(lines, -2) == int(stated.group(2).replace(",", ""))


def test_every_wing_is_in_the_readme():
    wings = {folder.parent.name for folder in ROOT.glob("*/__init__.py")}
    assert {"inputs", "checkpoints", "inference", "training", "kernels", "evals", "demo"} <= wings
    assert [wing for wing in wings if f"`{wing}/`" not in README] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_and_a_wrong_option_is_one_line(script):
    text = run(*script.split(), "--help").stdout
    assert f"python {script}" in text or f"torchrun {script}" in text
    wrong = run(*script.split(), "--no-such-option", ok=False).stderr.strip().splitlines()
    assert wrong[-1].startswith("error: ") and "; fix: " in wrong[-1] and len(wrong) == 1


def test_a_python_that_cannot_install_is_one_line(tmp_path):
    for file in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / file).write_text((ROOT / file).read_text())
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\n')
    python.chmod(0o755)

    for name, what in ((str(python), "without venv or pip"), ("/no/python", "not Python 3.11")):
        command = ["make", "--no-print-directory", f"PYTHON={name}", "demo"]
        made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert made.returncode != 0
        error, *rest = made.stdout.splitlines()
        assert error.startswith(f"error: {name}: ") and what in error and "; fix: " in error
        assert rest == []


def test_files_and_recipes_that_the_readme_names_exist():
    named = set(re.findall(r"\b(?:[\w-]+/)*[\w.-]+\.(?:py|png|toml|md)\b", README))
    assert {
        "recipes/tinyllama-clip-base.toml",
        "recipes/qwen2-siglip-base.toml",
        "assets/report.png",
    } <= named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_reads_and_is_written_back_equal(recipe, tmp_path):
    loaded, _ = config.load([str(recipe)], recipe)
    again = tmp_path / "again.toml"
    again.write_text(config.dumps(loaded))
    assert config.load([str(again)], recipe)[0] == loaded
    assert tomllib.loads(again.read_text())["train"]["output"].startswith("out/")


def layouts_of(recipe: config.Recipe, scratch: Path) -> set[str]:
    """Return to which layouts the model of a recipe exports; its parts are known by name."""
    scratch.mkdir()
    _, folders = planner.find_files(recipe, scratch, None)
    parts = {part: str(folder) for part, folder in folders.items() if part != "tokenizer"}
    template = list(recipe.stage.values())[-1].template
    made = layouts.config_from_recipe(replace(recipe.model, **parts), template, False)
    with weights.empty():
        return set(layouts.exports_to(LLaVA(made)))


def test_the_readme_says_to_which_layouts_each_recipe_exports(tmp_path):
    """As its dry run does. Of a recipe that goes on from a model it is what that one can."""
    said = {}
    table = README.partition("| recipe | `export.py --to` |")[2].partition("\n\n")[0]
    for row in table.splitlines()[2:]:
        _, recipes, names, _ = row.split("|")
        for recipe in re.findall("`([^`]+)`", recipes):
            said[recipe] = {"barellava", *re.findall("`([^`]+)`", names)}

    found = {}
    for file in (ROOT / "recipes").glob("*.toml"):
        recipe, _ = config.load([str(file)], file)
        if recipe.model.llm or recipe.model.llm_config:
            found[file.stem] = layouts_of(recipe, tmp_path / file.stem)
    assert found == said


@pytest.mark.parametrize("name", ["qwen2-siglip-base", "phi2-siglip-base", "gemma-siglip-base"])
def test_with_all_patches_a_recipe_with_siglip_goes_to_llama_cpp(name, tmp_path):
    file = ROOT / "recipes" / f"{name}.toml"
    recipe, _ = config.load([str(file), "model.feature_select=cls_patch"], file)
    assert "gguf" in layouts_of(recipe, tmp_path / "parts")
