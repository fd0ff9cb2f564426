"""Runs of train.py that hold out some of their own rows, by content."""

import json
import os
import signal

import pytest

from config import Source, Stage
from inputs.holdout import open_stage
from inputs.rows import open_rows
from tests.tools.forked_runs import largest_difference, launch, losses, said
from tests.tools.sample_rows import row
from tests.tools.stopped_runs import KILLED_AT, STEPS, die_in_step
from tests.tools.training_runs import RECIPE
from train import describe_rows

HELD_OUT = ("stage.finetune.validation=30", "stage.finetune.validation_every=2")


@pytest.fixture
def train(tiny_world, tmp_path):
    """Return a function that trains in a folder, and returns the exit code and what was said."""

    def start(name, *overrides, ranks=1, before=None):
        out = tmp_path / name
        recipe = tmp_path / f"{name}.toml"
        recipe.write_text(RECIPE.format(world=tiny_world, out=out))
        codes = launch(str(recipe), out, ranks, (*STEPS, *HELD_OUT, *overrides), before)
        return out, codes[0], said(out)

    return start


def test_a_start_says_what_is_left_out_of_folders(tmp_path):
    """Of the data, of each source of a mixture, and of the file of held-out rows."""
    for name, splits in (("a", ("train", "test")), ("b", ("x", "dev")), ("c", ("y",))):
        (tmp_path / name).mkdir()
        for split in splits:
            (tmp_path / name / f"{split}.jsonl").write_text(json.dumps(row(split)) + "\n")
    a, b, c = (str(tmp_path / name) for name in "abc")
    said = "JSON lines; splits left out: test (1)"

    stage = Stage(data=a, validation=b)
    opened = open_stage(stage, "stage")
    expected = f"{said}; validation: JSON lines; splits left out: validation (1)"
    assert describe_rows(opened, stage) == expected

    stage = Stage(mixture={"one": Source(data=a), "two": Source(data=c)})
    assert describe_rows(open_stage(stage, "stage"), stage) == f"{said} ({a}), and JSON lines ({c})"


def validations(out) -> list[tuple[int, float]]:
    """Return (step, loss) of each validation in the log of a run."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if row["event"] == "validation"]


def test_a_run_that_holds_out_rows_resumes_with_the_same_and_refuses_other_numbers(
    train, tiny_world
):
    whole, code, text = train("whole", "train.keep_best=true", "train.answers=1")
    assert code == 0, text
    total = len(open_rows(tiny_world / "finetune.json", tiny_world / "images"))
    note = [line for line in text.splitlines() if "held out by content" in line]
    assert len(note) == 1 and note[0].startswith("finetune: a JSON list; ")
    assert "pretrain: a JSON list\n" in text
    trained, held = [int(word) for word in note[0].split() if word.isdigit()][:2]
    assert trained + held == total and held >= 30
    assert [step for step, _ in validations(whole)] == [2, 4] and (whole / "best").is_dir()
    assert "wanted '" in text

    # Killed and resumed, it ends with the same bits and the same validation losses.
    out, code, text = train("killed", before=lambda rank: die_in_step(KILLED_AT))
    assert code == -signal.SIGKILL, text
    _, code, text = train("killed", "stage.finetune.validation=31")
    assert code == 1 and "stage.finetune.validation: 30.0 -> 31.0" in text
    _, code, text = train("killed", f"stage.finetune.validation={tiny_world}/val.json")
    assert code == 1 and "stage.finetune.validation: 30.0 -> " in text
    _, code, text = train("killed")
    assert code == 0 and "resumed" in text and note[0] in text
    assert validations(out) == validations(whole)
    want = (whole / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == want

    # On two ranks it trains on the same rows and holds out the same.
    two, code, text = train("two", ranks=2)
    assert code == 0 and note[0] in text
    assert largest_difference(losses(two), losses(whole)) < 1e-4
    for of_two, of_one in zip(validations(two), validations(whole), strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-4)


def test_the_planner_counts_the_rows_that_are_left(train):
    out, code, text = train("plan", "--dry-run", "stage.finetune.steps=0")
    assert code == 0 and not os.path.exists(out / "model.safetensors")
    _, code, trained = train("plan", "stage.finetune.steps=1", "stage.pretrain.steps=1")
    note = [line for line in trained.splitlines() if "held out by content" in line]
    left = note[0].partition("; ")[2].split()[0]
    assert code == 0 and f"data: {left} rows" in text
