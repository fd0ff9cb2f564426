"""The numbers that the rows choose, in recipes/own.toml as a new user starts it."""

import dataclasses
import json
import re
import shutil
import signal

import pytest
import torch

import config
import train
from config import AUTO, UserError
from model import LLaVA
from tests.tools.environment import ROOT
from tests.tools.forked_runs import launch, said
from tests.tools.small_llava import small
from tests.tools.stopped_runs import die_in_step
from tests.tools.training_runs import RECIPE, losses, one_line, run
from training import small_sets

OWN = ROOT / "recipes" / "own.toml"


@pytest.fixture(scope="module")
def finished(tiny_world, tmp_path_factory):
    """Return a folder of a finished model, of random weights."""
    folder = tmp_path_factory.mktemp("finished") / "model"
    small(tower="siglip", vocab=512, template="plain").save(folder)
    for file in (tiny_world / "tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture
def thirty(tiny_world, tmp_path):
    """Return a file of thirty rows."""
    file = tmp_path / "thirty.json"
    file.write_text(json.dumps(json.loads((tiny_world / "finetune.json").read_text())[:30]))
    return file


@pytest.fixture
def arguments(finished, thirty, tiny_world, tmp_path):
    """Return what a user writes behind `train.py`; the output folder is tmp_path/own."""
    return [
        str(OWN),
        f"model.checkpoint={finished}",
        f"stage.own.data={thirty}",
        f"stage.own.images={tiny_world}/images",
        f"train.output={tmp_path}/own",
        "train.workers=0",
        "train.log_every=1",
        "train.precision=fp32",
        "train.gradient_checkpointing=false",
        "stage.own.epochs=3",
        "stage.own.validation_every=100",
    ]


# -------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(
    "rows, held_out, batch, epochs, steps, warmup, r",
    [
        (1, "", 1, 25, 25, 0.1, 8),
        (2, 1, 1, 25, 25, 0.1, 8),
        (10, 1, 2, 23, 104, 0.1, 8),
        (30, 3, 4, 15, 102, 0.1, 8),
        (100, 10, 8, 9, 102, 0.1, 8),
        (1_000, 100, 16, 3, 169, 0.1, 16),
        (10_000, 500, 64, 2, 297, 0.1, 64),
        (100_000, 500, 128, 1, 778, 0.03, 128),
        (1_000_000, 500, 128, 1, 7809, 0.03, 128),
    ],
)
def test_numbers_by_rows(rows, held_out, batch, epochs, steps, warmup, r):
    stage = config.load([str(OWN)], OWN)[0].stage["own"]
    facts = small_sets.Facts(rows - (held_out or 0), rows, width=2560, ranks=1)
    stage, said = small_sets.choose(stage, facts)
    chosen = [line.split()[0] for line in said]
    assert chosen == [field for field in small_sets.RULES if held_out or field != "validation"]
    assert (stage.validation, stage.global_batch, stage.epochs) == (held_out, batch, epochs)
    assert (stage.warmup_ratio, stage.lora.r, stage.lora.alpha) == (warmup, r, 2 * r)
    assert small_sets.steps_of(stage, facts, stage.epochs) == steps
    assert stage.learning_rate == 2e-4  # TinyLLaVA's, of Phi-2


def test_the_rate_is_that_of_what_trains_and_the_batch_feeds_every_rank():
    stage = config.load([str(OWN)], OWN)[0].stage["own"]
    facts = small_sets.Facts(27, 30, width=2560, ranks=8)
    assert small_sets.choose_batch(stage, facts).value == 8
    for llm, vision, rate in (
        ("qlora-nf4", "frozen", 2e-4),
        ("partial:3", "frozen", 2e-5),
        ("frozen", "full", 2e-5),
        ("frozen", "frozen", 1e-3),
    ):
        tuned = dataclasses.replace(stage, tune=config.Tune(llm=llm, vision=vision))
        assert small_sets.choose_rate(tuned, facts).value == rate
    narrow = small_sets.choose_rate(stage, facts._replace(width=128)).value
    assert narrow == pytest.approx(2e-4 * 20**0.78, rel=0.05)


def test_what_is_written_stays(arguments):
    recipe, _ = config.load([*arguments, "stage.own.steps=7", "stage.own.learning_rate=3e-3"], OWN)
    stage = small_sets.fill(recipe).stage["own"]
    assert (stage.steps, stage.epochs, stage.learning_rate) == (7, 3, 3e-3)
    assert (stage.global_batch, stage.template, stage.validation) == (4, "plain", 3)
    assert AUTO not in dataclasses.asdict(stage).values()


# ------------------------------------------------------------------------------------- whole runs


def test_thirty_rows_change_the_model(arguments, finished, tmp_path):
    done = run("train.py", *arguments)
    out = tmp_path / "own"
    assert "own: 27 rows, 21 steps" in done.stdout
    assert re.search(r"own: template plain, which .*model has", done.stdout)
    assert re.search(r"\n  lora.r +8 +what 27 rows have to say", done.stdout)

    seen = losses(out)
    assert sum(seen[-5:]) < 0.8 * sum(seen[:5])
    before, after = LLaVA.from_pretrained(finished), LLaVA.from_pretrained(out)
    moved = {k for k, v in after.state_dict().items() if not torch.equal(v, before.state_dict()[k])}
    assert any(k.startswith("connector.") for k in moved)
    assert any(k.startswith("language_model.model.layers.") for k in moved)
    assert not any(k.startswith("vision_tower.") for k in moved)
    assert after.config.template == "plain"

    # The saved recipe has the numbers, and the same command finds the run finished.
    assert f'"{AUTO}"' not in (out / "recipe.toml").read_text().partition("[stage.own]")[2]
    assert "is finished" in run("train.py", *arguments).stdout


def test_the_numbers_of_a_run_stay_though_rows_change(arguments, thirty, tmp_path):
    out = tmp_path / "own"
    overrides = [*arguments[1:4], *arguments[5:], "train.save_every=2", "stage.own.steps=4"]

    def start(*more, before=None):
        codes = launch(str(OWN), out, 1, (*overrides, *more), before)
        return codes[0], said(out)

    code, text = start(before=lambda rank: die_in_step(4))
    assert code == -signal.SIGKILL, text
    assert "global_batch   4" in text

    # Ninety rows would have another batch. What has changed is the rows, and that is said.
    thirty.write_text(json.dumps(json.loads(thirty.read_text()) * 3))
    code, text = start()
    assert code == 1 and "not what the run began with: stage.own rows" in text
    accepted = re.search(r"train.accept_changes=\w+", text).group()
    code, text = start(accepted)
    assert code == 0, text
    assert "global_batch = 4\n" in (out / "recipe.toml").read_text()


# ----------------------------------------------------------------------- what would change nothing


def check(arguments, *overrides):
    """Refuse a recipe as train.py does before its first step."""
    recipe, _ = config.load([*arguments, *overrides], OWN)
    train.check_that_it_changes(small_sets.fill(recipe))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["stage.own.learning_rate=0"],
            "own.learning_rate: 0 for all that trains (llm, connector)",
        ),
        (["stage.own.learning_rate=0", "stage.own.rate.vision=1"], "0 for all that trains (llm, c"),
        (["stage.own.tune={llm='frozen',connector='frozen'}"], "own.tune: no part of the model"),
        (["stage.own.tune={connector='lora'}", "stage.own.lora.targets=q_proj"], "q_proj"),
    ],
)
def test_a_run_that_would_change_nothing_is_refused(arguments, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        check(arguments, *overrides)
    assert "; fix: " in str(raised.value)


def test_what_sees_pictures_learns_from_rows_with_some(arguments, thirty):
    connector = "stage.own.tune={llm='frozen'}"
    check(arguments, connector)
    rows = [row for row in json.loads(thirty.read_text()) if "image" not in row]
    assert rows
    thirty.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="own.tune: no row has a picture, and nothing else would"):
        check(arguments, connector)
    check(arguments)


def test_one_rate_is_enough(arguments):
    check(arguments)
    check(arguments, "stage.own.learning_rate=0", "stage.own.rate.connector=1e-3")


def test_a_later_stage_that_changes_nothing_is_refused_before_the_first(tiny_world, tmp_path):
    file = tmp_path / "two.toml"
    file.write_text(RECIPE.format(world=tiny_world, out=tmp_path / "out"))
    done = run("train.py", file, "stage.finetune.learning_rate=0", ok=False)
    assert "stage.finetune.learning_rate: 0 for all that trains" in one_line(done)
    assert "pretrain: " not in done.stdout
    assert not (tmp_path / "out" / "recipe.toml").exists()


def test_every_stage_has_a_step_with_a_rate():
    for steps in (1, 2, 3, 5, 10, 100):
        for warmup in (0, 0.03, 0.5, 0.99, 1):
            factors = [train.schedule(step, steps, warmup) for step in range(steps)]
            assert max(factors) > 0.4


def test_a_template_that_nobody_names_is_one_line(tiny_world, tmp_path):
    file = tmp_path / "two.toml"
    file.write_text(RECIPE.format(world=tiny_world, out=tmp_path / "out"))
    recipe, _ = config.load([str(file), "stage.finetune.template="], file)
    with pytest.raises(UserError, match="stage.finetune.template: empty, and there is no model"):
        small_sets.fill(recipe)
