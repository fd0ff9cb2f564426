"""Starts of train.py: after a kill, after a mistake, into folders and logs of every kind."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.tools.forked_runs import launch, losses, said
from tests.tools.stopped_runs import STEPS
from tests.tools.training_runs import RECIPE

# Four rows that are no beginning of a question, though a legal row may begin so; and a bad picture.
ODD = [
    [("system", "Be brief."), ("human", "<image>\nColour?"), ("gpt", "red")],
    [("gpt", "Welcome."), ("human", "<image>\nColour?"), ("gpt", "red")],
    [("system", "Be brief."), ("gpt", "Welcome."), ("human", "<image>\nColour?"), ("gpt", "red")],
    [("human", "Hello"), ("gpt", "hi"), ("human", "<image>\nColour?"), ("gpt", "red")],
    [("gpt", "A red thing.")],
    [("human", "q1"), ("human", "q2"), ("gpt", "a")],
]


def odd_rows(world: Path) -> Path:
    """Write held-out rows of which some cannot be asked about, beside those of a world."""
    picture = json.loads((world / "val.json").read_text())[0]["image"]
    rows = []
    for i, turns in enumerate(ODD):
        conversation = [{"from": speaker, "value": value} for speaker, value in turns]
        row = {"id": i, "conversations": conversation}
        if any("<image>" in value for _, value in turns):
            row["image"] = picture
        rows.append(row)
    rows.append({**rows[3], "id": "no picture", "image": "missing.png"})
    file = world / "odd.json"
    file.write_text(json.dumps(rows))
    return file


def events(out: Path, kind: str) -> list[dict]:
    """Return the events of a kind in the log of a run."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def error(text: str) -> str:
    """Return the only line of an error that a run said."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "; fix: " in lines[0] and "Traceback" not in text, text
    return lines[0]


# ------------------------------------------------------------------- what may change, and what not


def test_the_same_command_ends_with_the_same_bits(stopped):
    code, text = stopped.start()
    assert (code, stopped.weights()) == (0, stopped.want), text
    assert "changed" not in text and not events(stopped.out, "changed")
    assert json.loads((stopped.out / "made_from.json").read_text())["tokenizer"]


def test_fields_that_do_not_decide_may_change_and_are_logged(stopped):
    code, text = stopped.start("train.log_every=2", "train.answers=1", "train.save_every=3")
    assert (code, stopped.weights()) == (0, stopped.want), text
    changed = {row["what"]: (row["old"], row["new"]) for row in events(stopped.out, "changed")}
    assert changed == {
        "train.log_every": (1, 2),
        "train.answers": (0, 1),
        "train.save_every": (2, 3),
    }
    assert "changed: train.log_every: 1 -> 2" in text


def test_data_may_move(stopped):
    """Where rows lie decides nothing. Other rows are refused at the new place, too."""
    elsewhere = stopped.folder / "elsewhere"
    shutil.copytree(stopped.world, elsewhere, symlinks=True)
    recipe = stopped.recipe.read_text()
    for name in ("finetune.json", "images"):
        assert f"{stopped.world}/{name}" in recipe
        recipe = recipe.replace(f"{stopped.world}/{name}", f"{elsewhere}/{name}")
    stopped.recipe.write_text(recipe)

    rows = (elsewhere / "finetune.json").read_text()
    (elsewhere / "finetune.json").write_text(rows.replace("red", "blue"))
    code, text = stopped.start()
    assert code == 1 and "finetune.json" in error(text)

    (elsewhere / "finetune.json").write_text(rows)
    code, text = stopped.start()
    assert (code, stopped.weights()) == (0, stopped.want), text
    assert "stage.finetune.data" in {row["what"] for row in events(stopped.out, "changed")}


def test_fields_that_decide_are_refused_by_name_and_nothing_is_lost(stopped):
    before = stopped.checkpoints()
    code, text = stopped.start("train.seed=5", "stage.finetune.learning_rate=0.5")
    line = error(text)
    assert code == 1 and "train.seed: 0 -> 5" in line
    assert "stage.finetune.learning_rate: 0.001 -> 0.5" in line
    assert "set train.output to a new folder, or put the old value back" in line
    assert "remove" not in line
    assert stopped.checkpoints() == before


def test_rows_that_changed_are_refused_unless_that_is_accepted(stopped):
    rows = stopped.world / "finetune.json"
    before = rows.read_text()
    rows.write_text(json.dumps(json.loads(before)[::-1]))
    line = error(stopped.start()[1])
    assert "stage.finetune rows (0 finetune.json" in line and "pretrain" not in line
    key = line.rpartition("train.accept_changes=")[2]

    # The choice holds for this change and for no other one.
    rows.write_text(json.dumps(json.loads(before)[1:]))
    assert "stage.finetune rows" in error(stopped.start(f"train.accept_changes={key}")[1])

    rows.write_text(json.dumps(json.loads(before)[::-1]))
    code, text = stopped.start(f"train.accept_changes={key}")
    assert code == 0 and stopped.weights() != stopped.want, text
    assert "stage.finetune rows" in events(stopped.out, "changed")[0]["what"]


def test_rows_of_a_stage_that_is_done_may_go(stopped):
    (stopped.world / "pretrain.json").write_text(
        json.dumps(json.loads((stopped.world / "pretrain.json").read_text())[:9])
    )
    code, text = stopped.start()
    assert (code, stopped.weights()) == (0, stopped.want), text


def test_a_refused_start_sets_no_checkpoint_aside(stopped):
    """train.resume names an older checkpoint, and the rows have changed: the newer one stays."""
    rows = stopped.world / "finetune.json"
    rows.write_text(json.dumps(json.loads(rows.read_text())[1:]))
    oldest = stopped.out / "checkpoints" / stopped.checkpoints()[0]
    assert "stage.finetune rows" in error(stopped.start(f"train.resume={oldest}")[1])
    assert len(stopped.checkpoints()) == 2


def test_a_place_that_the_recipe_does_not_have_is_refused(stopped):
    """A checkpoint of another recipe may be named. Behind the end of a stage is no next step."""
    other = stopped.folder / stopped.checkpoints()[-1]
    shutil.copytree(stopped.out / "checkpoints" / other.name, other)
    fewer_steps = stopped.start(f"train.resume={other}", "stage.finetune.steps=2")[1]
    assert "after 2 steps of finetune, which has 2; fix: give its own recipe" in error(fewer_steps)

    text = stopped.recipe.read_text().partition("[stage.finetune]")[0]
    stopped.recipe.write_text(text)
    codes = launch(str(stopped.recipe), stopped.out, 1, (f"train.resume={other}",))
    assert codes == [1] and "in stage 2, and the recipe has 1; fix" in error(said(stopped.out))


def test_before_the_first_checkpoint_another_recipe_may_begin(stopped):
    """An error at a row, in the first step: the corrected command goes on in the same folder."""
    shutil.rmtree(stopped.out)
    rows = stopped.world / "pretrain.json"
    before = rows.read_text()
    table = json.loads(before)
    for row in table:
        row["image"] = "missing.png"
    rows.write_text(json.dumps(table))
    assert "missing.png" in error(stopped.start("stage.pretrain.learning_rate=0.5")[1])

    rows.write_text(before)
    code, text = stopped.start()
    assert (code, stopped.weights()) == (0, stopped.want), text
    assert len(losses(stopped.out)) == 6


# ------------------------------------------------------------------------- the folder and its log


def damage_tail(log: Path):
    log.write_bytes(log.read_bytes() + bytes(3) + b"\n" + bytes(40))


def damage_lines(log: Path):
    lines = log.read_bytes().splitlines(keepends=True)
    odd = [
        b"\n",
        b"{}\n",
        b"\xff\xfe\n",
        b"[1]\n",
        b'{"event": "step", "stage": "pretrain", "step": "1", "loss": 2}\n',
        b'{"event": "step", "stage": "pretrain", "step": 1, "loss": null}\n',
        b'{"event": "step", "stage": "pretrain", "step": 1, "loss": 1' + b"0" * 999 + b"}\n",
        b'{"event": 7, "stage": "pretrain"}\n',
        b"[" * 100_000 + b"\n",
        b"x" * 3_000_000 + b"\n",
        lines[0][:20] + b"\n",
    ]
    log.write_bytes(b"".join(lines + odd) + lines[-1][:30])


def make_folder(log: Path):
    log.unlink()
    log.mkdir()
    (log / "file").write_text("of somebody")


@pytest.mark.parametrize("damage", [damage_tail, damage_lines, make_folder, Path.unlink])
def test_a_damaged_log_does_not_keep_a_run_from_going_on(stopped, damage):
    damage(stopped.out / "log.jsonl")
    (stopped.out / "recipe.toml").write_bytes(b"\xff\0")
    (stopped.out / "PREEMPTED").mkdir()
    code, text = stopped.start()
    assert (code, stopped.weights()) == (0, stopped.want), text
    assert events(stopped.out, "end") and (stopped.out / "README.md").exists()
    if damage is not Path.unlink:
        assert text.count("cannot be read; it is kept as log.jsonl.damaged") == 1
        assert (stopped.out / "log.jsonl.damaged").exists()
    if damage is damage_tail:
        assert len(losses(stopped.out)) == 6


def test_a_finished_run_whose_recipe_cannot_be_read_is_one_line(stopped):
    stopped.start()
    (stopped.out / "recipe.toml").write_bytes(b"\xff")
    assert "nobody knows which recipe was trained" in error(stopped.start()[1])


def test_files_of_others_among_the_checkpoints_stay(stopped):
    folder = stopped.out / "checkpoints"
    for name in ("mine/a", ".mine.tmp/a", "00-00000002.copy/a", "notes.txt", ".x.aside/a"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("precious")
    code, text = stopped.start("train.keep=1")
    assert (code, stopped.weights()) == (0, stopped.want), text
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert left == [
        ".mine.tmp/a",
        ".sealing",
        ".x.aside/a",
        "00-00000002.copy/a",
        "mine/a",
        "notes.txt",
    ]


def test_what_a_killed_write_left_is_removed(stopped):
    for name in (".log.jsonl.abcdefgh", ".recipe.toml.12345678"):
        (stopped.out / name).write_text("half")
    (stopped.out / ".mine.abcdefgh").write_text("of somebody")
    assert stopped.start()[0] == 0
    hidden = sorted(path.name for path in stopped.out.iterdir() if path.name.startswith("."))
    assert hidden == [".barellava", ".lock", ".mine.abcdefgh"]


@pytest.mark.parametrize(
    "name",
    ["checkpoints/mine", "model.safetensors", "checkpoints/00-00000002/tensors", "log.jsonl"],
)
def test_a_folder_of_somebody_else_is_left_as_it_is(tiny_world, tmp_path, name):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("precious")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(world=tiny_world, out=out))
    assert launch(str(recipe), out, 1, STEPS) == [1]
    assert "did not write" in error(said(out))
    assert [path for path in out.rglob("*") if path.is_file()] == [out / name]


@pytest.mark.parametrize("output", ["", " ", ".", "FILE/below", "FILE", "LINK"])
def test_an_output_that_is_no_folder_of_ours_is_one_line(tiny_world, tmp_path, output):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    output = output.replace("FILE", f"{tmp_path}/file").replace("LINK", f"{tmp_path}/link")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(world=tiny_world, out="x"))
    assert launch(str(recipe), tmp_path / "o", 1, (*STEPS, f"train.output={output}")) == [1]
    error(said(tmp_path / "o"))
    assert (tmp_path / "file").read_text() == "precious"


def test_a_later_stage_with_a_wrong_folder_of_pictures_does_not_begin(tiny_world, tmp_path):
    """Neither does the stage before it: else its hours pass before the mistake is seen."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(world=tiny_world, out=tmp_path / "out"))
    wrong = (*STEPS, f"stage.finetune.images={tiny_world}/images/finetune")
    assert launch(str(recipe), tmp_path / "out", 1, wrong) == [1]
    text = said(tmp_path / "out")
    assert "stage.finetune: none of its pictures is at its place" in error(text)
    assert "pretrain 1/" not in text


# --------------------------------------------------------------------------- what only reports


@pytest.mark.parametrize("on_bad_row", ["skip", "stop"])
def test_held_out_rows_of_every_kind_do_not_stop_training(stopped, on_bad_row):
    held_out = odd_rows(stopped.world)
    code, text = stopped.start(
        f"stage.finetune.validation={held_out}",
        "stage.finetune.validation_every=2",
        "train.answers=9",
        f"train.on_bad_row={on_bad_row}",
    )
    assert (code, stopped.weights()) == (0, stopped.want), text
    answers = events(stopped.out, "answer")
    assert [row["wanted"] for row in answers] == ["red", "red", "red", "hi"], text
    assert [row["question"] for row in answers] == ["<image>\nColour?"] * 3 + ["Hello"]
    failed = [row["what"] for row in events(stopped.out, "failed")]
    rows = [f"the answer to held-out row {i}" for i in (4, 5, 6)]
    if on_bad_row == "skip":
        assert failed == rows
    else:
        assert failed == ["validation", *rows]
    assert text.count("training goes on") == len(failed)


def test_no_held_out_row_is_no_loss_and_not_a_loss_of_zero(stopped):
    odd = json.loads(odd_rows(stopped.world).read_text())
    (stopped.world / "odd.json").write_text(json.dumps(odd[-3:]))
    overrides = (f"stage.finetune.validation={stopped.world}/odd.json", "train.on_bad_row=skip")
    code, text = stopped.start(*overrides)
    assert (code, stopped.weights()) == (0, stopped.want), text
    assert not events(stopped.out, "validation")
    assert [row["what"] for row in events(stopped.out, "failed")] == ["validation"]


def test_a_log_and_a_card_that_cannot_be_written_do_not_stop_training(stopped):
    def before(rank):
        from training import model_card, run_log

        def full(*_):
            raise OSError(28, "No space left on device")

        run_log.append = full
        model_card.draw_losses = full

    code, text = stopped.start(before=before)
    assert (code, stopped.weights()) == (0, stopped.want), text
    assert text.count("log.jsonl cannot be written, training goes on") == 1
    assert text.count("README.md and loss.png failed") == 1


def test_a_damaged_best_checkpoint_is_said_and_the_model_is_written(stopped):
    def before(rank):
        from training import output

        def flip(recipe, tokenizer, folder, real=output.export_best):
            for path in (folder / "checkpoints").glob("*/tensors.safetensors"):
                content = bytearray(path.read_bytes())
                content[-1] ^= 1
                path.write_bytes(content)
            real(recipe, tokenizer, folder)

        output.export_best = flip

    code, text = stopped.start("train.keep_best=true", before=before)
    assert code == 0 and "so there is no best/" in text, text
    assert not (stopped.out / "best").exists()


# --------------------------------------------------------------------------------- how it ends


def test_a_data_worker_that_is_killed_is_one_line(stopped):
    def before(rank):
        import signal

        import data

        def die(self, i):
            os.kill(os.getpid(), signal.SIGKILL)

        data.Steps.__getitem__ = die

    code, text = stopped.start("train.workers=1", before=before)
    line = error(text)
    assert code == 1 and "a data worker: DataLoader worker (pid" in line
    assert "goes on from the last checkpoint" in line and len(stopped.checkpoints()) == 2


def test_an_output_folder_that_is_removed_meanwhile_is_one_line(stopped):
    def before(rank):
        import train

        def gone(*arguments, real=train.save_checkpoint):
            shutil.rmtree(stopped.out)
            real(*arguments)

        train.save_checkpoint = gone

    code, text = stopped.start(before=before)
    assert code == 1 and "fix: " in error(text)
    assert not stopped.out.exists()


# ---------------------------------------------------------------------------------- little data


def test_thirty_rows_train_and_it_is_said_that_they_are_few(stopped):
    """One step of 128 samples: it has a rate, and the weights move."""
    shutil.rmtree(stopped.out)
    rows = stopped.world / "pretrain.json"
    rows.write_text(json.dumps(json.loads(rows.read_text())[:30]))
    few = ("stage.pretrain.steps=0", "stage.pretrain.global_batch=128")
    code, text = stopped.start(*few, "stage.finetune.steps=1")
    assert code == 0, text
    assert "warning: pretrain: 30 rows make only 1 optimizer steps of 128" in text
    step = events(stopped.out, "step")[0]
    assert step["learning_rate"] == 1e-3
    assert all(change > 0 for change in step["weight_change"].values())


def test_adapters_of_a_later_stage_are_not_counted_before_it(stopped):
    shutil.rmtree(stopped.out)
    lora = ("stage.finetune.tune.llm=lora", "stage.finetune.lora.r=4")
    frozen = ("stage.pretrain.tune.llm=frozen", "stage.pretrain.steps=1", "stage.finetune.steps=1")
    code, text = stopped.start(*lora, *frozen)
    assert code == 0, text
    first, second = events(stopped.out, "start")
    assert second["parameters"]["llm"] - first["parameters"]["llm"] == second["trainable"]["llm"]
