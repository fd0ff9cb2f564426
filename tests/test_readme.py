"""What the README and the scripts' own help promise."""

import re
import tomllib

import pytest

import config
from tests.tools.environment import ROOT, run

README = (ROOT / "README.md").read_text()
SCRIPTS = [
    "train.py",
    "generate.py",
    "evaluate.py",
    "export.py",
    "report.py",
    "world.py",
    "moving.py",
    "data.py",
    "templates.py",
    "serve.py",
    "visualize.py",
]
LIMITS = {"model.py": 600, "encoders.py": 300, "connectors.py": 300, "train.py": 400}


def lines(path) -> int:
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    return sum(len(f.read_text().splitlines()) for f in files)


def test_stated_sizes_are_true_and_within_their_limits():
    stated = dict(re.findall(r"^\| `([\w./]+)` \| (\d+) \|", README, re.M))
    top = {f.name for f in ROOT.glob("*.py")} | {"kernels/"}
    assert set(stated) == top
    assert {name: int(n) for name, n in stated.items()} == {
        name: lines(ROOT / name) for name in stated
    }
    for name, limit in LIMITS.items():
        assert lines(ROOT / name) <= limit
    for kernel in (ROOT / "kernels").glob("*.py"):
        assert lines(kernel) <= 400


def test_the_loop_is_short():
    source = (ROOT / "train.py").read_text()
    loop = source[
        source.index("    for step, (part, wait) in enumerate(loader") : source.index(
            "# ---", source.index("loader(steps, start")
        )
    ]
    assert len(loop.splitlines()) <= 60


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_and_a_wrong_option_is_one_line(script):
    text = run(script, "--help").stdout
    assert f"python {script}" in text or f"torchrun {script}" in text
    wrong = run(script, "--no-such-option", ok=False).stderr.strip().splitlines()
    assert wrong[-1].startswith("error: ") and "; fix: " in wrong[-1] and len(wrong) == 1


def test_files_and_recipes_that_the_readme_names_exist():
    named = set(re.findall(r"\b(?:recipes/[\w.-]+\.toml|[\w]+\.(?:py|png))\b", README))
    assert {
        "recipes/tinyllama-clip-base.toml",
        "recipes/qwen2-siglip-base.toml",
        "report.png",
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
