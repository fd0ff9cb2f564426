"""The laboratory with train.py and evaluate.py themselves, on a tiny world: kills, a null axis."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lab
from config import UserError
from laboratory import cells, costs
from tests.tools import forked_scripts
from tests.tools.environment import ROOT
from tests.tools.training_runs import RECIPE

GRID = """
base = "{folder}/base.toml"
output = "{folder}/out"
seeds = [0, 1]
baseline = {{ rows = "all" }}
overrides = [
    "train.workers=0",
    "train.save_every=2",
    "stage.pretrain.steps=2",
    "stage.finetune.steps=6",
    "stage.finetune.validation=",
]

[axis.rows]
"all" = []
"the same" = ["stage.finetune.learning_rate=1e-3"]
"broken" = ["stage.finetune.tune.llm=nonsense"]

[[measure]]
task = "world"
data = "{world}"
arguments = ["--limit", "40"]
"""

# Answers of other questions, and a rate that teaches nothing in so few steps.
PLANTED = """
base = "{folder}/base.toml"
output = "{folder}/out"
seeds = [0, 1, 2]
noise_seeds = [3, 4, 5]
baseline = {{ planted = "nothing" }}
overrides = [
    "train.workers=0",
    "stage.pretrain.steps=20",
    "stage.finetune.steps=150",
    "stage.finetune.validation=",
    "stage.finetune.learning_rate=3e-3",
    "stage.finetune.tune.llm=full",
]

[axis.planted]
"nothing" = []
"a small rate" = ["stage.finetune.learning_rate=1e-6"]
"shuffled answers" = ["stage.finetune.data={folder}/shuffled.json"]

[[measure]]
task = "world"
data = "{world}"
scores = ["attributes"]
"""


@pytest.fixture(autouse=True)
def forks(monkeypatch):
    """Start the scripts as forks of this process."""
    monkeypatch.setattr(cells, "launch", forked_scripts.launch)
    monkeypatch.setattr(costs, "launch", forked_scripts.launch)


def write_grid(folder: Path, world: Path, text: str = GRID) -> Path:
    """Write a grid over the tiny recipe to a new folder."""
    folder.mkdir(exist_ok=True)
    (folder / "base.toml").write_text(RECIPE.format(world=world, out=folder / "unused"))
    (folder / "grid.toml").write_text(text.format(folder=folder, world=world))
    return folder / "grid.toml"


def end(grid: Path, *arguments: str):
    """Run the laboratory to its end, which says that one cell is broken."""
    with pytest.raises(UserError, match="1 of 3 cells are not compared; rows broken"):
        lab.main([str(grid), *arguments])


def results_of(grid: Path) -> dict:
    """Return what the table says whatever was killed on the way."""
    table = json.loads((grid.parent / "out" / "table.json").read_text())
    return {**table["results"], "grid": ""}


@pytest.fixture(scope="module")
def undisturbed(tiny_world, tmp_path_factory):
    """Return the grid of a laboratory that was never killed."""
    grid = write_grid(tmp_path_factory.mktemp("lab") / "undisturbed", tiny_world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "launch", forked_scripts.launch)
        end(grid)
    return grid


def test_runs_are_those_of_train_py_and_evaluate_py(undisturbed):
    everything, same, broken = results_of(undisturbed)["cells"]
    folder = undisturbed.parent / "out" / "rows-all" / "seed-1"
    written = json.loads((folder / "eval" / "world.json").read_text())["scores"]
    for name, score in written.items():
        assert everything["scores"][name]["of_seeds"][1] == pytest.approx(score["score"], abs=0.006)
    assert broken["error"].startswith("seed 0: error: tune.llm: 'nonsense' is not a way to tune")

    # Labels that change nothing: the same bits with the same seed, other bits with another.
    for name, score in same["scores"].items():
        assert score["of_seeds"] == everything["scores"][name]["of_seeds"]
        assert score["difference"]["mean"] == 0 and not score["difference"]["counts"]
    weights = []
    for run in ("rows-all/seed-0", "rows-the-same/seed-0", "rows-all/seed-1"):
        weights.append((undisturbed.parent / "out" / run / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]

    cost = json.loads((undisturbed.parent / "out" / "table.json").read_text())["costs"][0]
    assert cost["steps"] == 8 and cost["seconds"] > 0 and cost["memory_gb"] > 0


def test_a_dry_run_says_what_it_is_based_on(undisturbed, tmp_path, tiny_world, capsys):
    grid = write_grid(tmp_path / "dry", tiny_world)
    lab.main([str(grid), "--dry-run"])
    said = capsys.readouterr().out
    assert "3 cells, 6 runs, 6 of them to be done" in said
    assert "steps: pretrain 2, finetune 6" in said
    assert "based on 6 steps of each stage of the baseline here" in said
    assert not (tmp_path / "dry" / "out").exists()


def start(grid: Path) -> int:
    """Start the laboratory in a session of its own; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        with contextlib.suppress(BaseException):
            lab.main([str(grid)])
    os._exit(0)


def wait_for(condition):
    """Wait until something is so."""
    while not condition():
        time.sleep(0.005)


def test_a_killed_laboratory_ends_with_the_same_table(undisturbed, tmp_path, tiny_world):
    grid = write_grid(tmp_path / "killed", tiny_world)
    cell = tmp_path / "killed" / "out" / "rows-all"

    # With all its processes, while it trains.
    pid = start(grid)
    wait_for(lambda: len(list((cell / "seed-0" / "checkpoints").glob("01-*"))) > 0)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not (cell / "seed-0" / "config.json").exists()

    # Without them: the training goes on alone, and the next start waits for it.
    pid = start(grid)
    wait_for(lambda: (cell / "seed-1" / "log.jsonl").exists())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)

    end(grid, "--workers", "2")
    assert results_of(grid) == results_of(undisturbed)


@pytest.mark.full
def test_three_random_kills(undisturbed, tmp_path, tiny_world):
    """Of `python lab.py` as people start it."""
    rng = random.Random(0)
    grid = write_grid(tmp_path / "killed", tiny_world)
    command = [sys.executable, "lab.py", str(grid)]
    kills = 0
    while kills < 3:
        process = subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL
        )
        try:
            process.wait(rng.uniform(3, 10))
        except subprocess.TimeoutExpired:
            kills += 1
        else:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert kills == 3, "it ended before it was killed"

    end(grid)
    assert results_of(grid) == results_of(undisturbed)


@pytest.mark.full
def test_planted_effects_are_found(tmp_path, tiny_world):
    """And the noise floor of the same cell holds zero."""
    grid = write_grid(tmp_path / "planted", tiny_world, PLANTED)
    rows = json.loads((tiny_world / "finetune.json").read_text())
    answers = [turn for row in rows for turn in row["conversations"][1::2]]
    values = [turn["value"] for turn in answers]
    random.Random(0).shuffle(values)
    for turn, value in zip(answers, values, strict=True):
        turn["value"] = value
    (tmp_path / "planted" / "shuffled.json").write_text(json.dumps(rows))

    lab.main([str(grid)])
    found = results_of(grid)
    for cell in found["cells"][1:]:
        difference = cell["scores"]["attributes"]["difference"]
        assert difference["counts"] and difference["high"] < 0, found
    floor = found["noise_floor"]["attributes"]
    assert floor["low"] < 0 < floor["high"]
