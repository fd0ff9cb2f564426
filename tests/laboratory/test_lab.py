"""The laboratory from a grid to the table, with scripts that take no time (toy_grid.py).

test_runs.py has the same with train.py and evaluate.py themselves.
"""

import json
import os
import re
import shutil

import pytest

import lab
from config import UserError
from laboratory import cells, results
from tests.tools.toy_grid import TASK, Scripts, write_grid


@pytest.fixture(autouse=True)
def toy_task(monkeypatch):
    """Let evaluate.py have the task of the toy grid."""
    monkeypatch.setitem(results.TASKS, "toy", TASK)


@pytest.fixture
def scripts(monkeypatch):
    """Return the scripts that the laboratory starts."""
    made = Scripts()
    monkeypatch.setattr(cells, "launch", made.launch)
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a grid whose runs are finished, and what the laboratory printed."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(results.TASKS, "toy", TASK)
        patch.setattr(cells, "launch", Scripts().launch)
        lab.main([str(write_grid(folder))])
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """Return such a folder that a test may change."""
    shutil.copytree(finished / "out", tmp_path / "out")
    return write_grid(tmp_path)


def table_of(grid) -> dict:
    return json.loads((grid.parent / "out" / "table.json").read_text())


def seed_folder(grid, label: str, seed: int):
    return grid.parent / "out" / f"rate-{label}" / f"seed-{seed}"


# ---------------------------------------------------------------------------------- the table


def test_the_table_tells_a_difference_from_none(finished):
    table = table_of(finished / "grid.toml")["results"]
    right, same, worse = table["cells"]
    assert worse["scores"]["all"]["difference"]["counts"]
    assert worse["scores"]["all"]["difference"]["high"] < -40
    assert worse["scores"]["all"]["mean"] == pytest.approx(20, abs=8)

    # The labels of a null axis change nothing, so with the same seeds nothing differs.
    nothing = same["scores"]["all"]["difference"]
    assert nothing["mean"] == 0 and nothing["low"] < 0 < nothing["high"] and not nothing["counts"]
    assert "difference" not in right["scores"]["all"]
    assert table["comparisons"] == 2 * 3
    assert table["noise_floor"]["all"]["low"] < 0 < table["noise_floor"]["all"]["high"]


def test_a_score_is_the_mean_of_what_its_questions_earn(finished):
    cell = table_of(finished / "grid.toml")["results"]["cells"][0]
    written = []
    for seed in range(3):
        file = seed_folder(finished / "grid.toml", "right", seed) / "eval" / "toy.json"
        written.append(json.loads(file.read_text())["scores"]["half"]["score"])
    assert cell["scores"]["half"]["of_seeds"] == pytest.approx(written)
    assert cell["scores"]["half"]["questions"] == 60
    assert cell["scores"]["all"]["blank"] == pytest.approx(50, abs=10)


def test_the_columns_of_costs(finished):
    row = table_of(finished / "grid.toml")["costs"][0]
    assert (row["steps"], row["seconds"], row["memory_gb"]) == (8, 12.5, 0.5)
    assert (row["tokens"], row["interrupted"]) == (3, 0)
    assert 0 < row["trained"] < row["size"] and row["flops"] > 1e6


def test_the_table_for_a_reader(finished):
    text = (finished / "out" / "table.md").read_text()
    order = ["## Noise floor", "## all", "## half", "## cubed", "## Comparisons", "## What it cost"]
    places = [text.index(heading) for heading in order]
    assert places == sorted(places)
    assert re.search(r"\| right \| \d+\.\d\d ± \d\.\d\d \| \d+\.\d\d \| 50\.00 \| baseline", text)
    assert re.search(
        r"\| worse \| .* \| -\d\d\.\d\d \| \[-\d\d\.\d\d, -\d\d\.\d\d\] \| .* \| \* \|", text
    )
    assert "6. By chance" in text and "Holm" in text and "p = 0.05 / 6 = 0.0083" in text


def test_the_page_stands_alone(finished):
    page = (finished / "out" / "table.html").read_text()
    assert page.count('viewBox="0 0 440') == 2
    assert page.count('<circle class="mean line0"') == 3 + 1 + 1
    assert page.count('<circle class="seed"') == 2 * 9
    for outside in ("<script", "http://", "https://", "<link", "@import", "url("):
        assert outside not in page


def test_the_table_again_without_training(copied, scripts):
    before = (copied.parent / "out" / "table.json").read_bytes()
    (copied.parent / "out" / "table.json").unlink()
    lab.main([str(copied), "--table"])
    after = (copied.parent / "out" / "table.json").read_bytes()
    assert json.loads(after)["results"]["cells"] == json.loads(before)["results"]["cells"]
    assert scripts.started == []


# ------------------------------------------------------------------------------------ the runs


def test_each_run_is_one_command_after_the_other(tmp_path, scripts):
    grid = write_grid(tmp_path)
    lab.main([str(grid)])
    assert len(scripts.started) == 12 * 3
    first = [
        "train.py",
        f"{tmp_path}/base.toml",
        "train.precision=fp32",
        "train.seed=0",
        f"train.output={tmp_path}/out/rate-right/seed-0",
    ]
    assert scripts.started[0] == first
    assert scripts.started[2][-1] == "--blank"

    # What is finished is passed over.
    scripts.started.clear()
    lab.main([str(grid)])
    assert scripts.started == []


def test_commands_are_those_that_are_left(copied, capsys):
    shutil.rmtree(seed_folder(copied, "worse", 1))
    (seed_folder(copied, "worse", 2) / "eval" / "toy-blank.json").unlink()
    lab.main([str(copied), "--commands"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("OMP_NUM_THREADS=1 python train.py") and lines[0].count(" && ") == 2
    assert lines[1].endswith("--blank") and "train.py" not in lines[1]
    assert lines[2] == f"# last: python lab.py {copied} --table"


def test_a_run_that_fails_stops_no_other_and_is_a_line(tmp_path, scripts, capsys):
    grid = write_grid(tmp_path, **{"learning_rate=0.2": "tune.llm=nonsense"})
    with pytest.raises(UserError, match="1 of 3 cells are not compared; rate worse: seed 0: error"):
        lab.main([str(grid), "--workers", "2"])
    worse = table_of(grid)["results"]["cells"][2]
    assert worse["labels"] == {"rate": "worse"}
    assert worse["error"].startswith("seed 0: error: tune.llm: 'nonsense' | no way; fix: ")
    assert "| worse | seed 0: error: tune.llm: 'nonsense' \\| no way" in capsys.readouterr().out
    assert '<td class="error" colspan="7">' in (tmp_path / "out" / "table.html").read_text()

    # Mended, it is tried again, and nothing else is.
    scripts.started.clear()
    lab.main([str(write_grid(tmp_path))])
    assert len(scripts.started) == 3 * 3
    assert "error" not in table_of(grid)["results"]["cells"][2]


@pytest.mark.parametrize("at", [0, 4, 8, 20, 33])
def test_a_laboratory_that_is_stopped_goes_on(finished, tmp_path, monkeypatch, at):
    """Stopped at a command, it ends with the table of one that never was."""
    grid = write_grid(tmp_path)

    def interrupt(command):
        if len(killed.started) > at:
            raise KeyboardInterrupt

    killed = Scripts(interrupt)
    monkeypatch.setattr(cells, "launch", killed.launch)
    with pytest.raises(KeyboardInterrupt):
        lab.main([str(grid)])
    assert not (tmp_path / "out" / "table.json").exists()

    whole = Scripts()
    monkeypatch.setattr(cells, "launch", whole.launch)
    lab.main([str(grid), "--workers", "3"])
    assert len(whole.started) == 36 - at
    mine = table_of(grid)["results"]
    other = table_of(finished / "grid.toml")["results"]
    assert {**mine, "grid": ""} == {**other, "grid": ""}


def test_two_laboratories_do_not_share_a_folder(copied):
    grid = lab.read_grid(copied)
    with cells.alone(grid):
        pid = os.fork()
        if pid == 0:
            try:
                cells.alone(grid).__enter__()
            except UserError as e:
                os._exit(7 if "another laboratory is at work" in str(e) else 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_what_a_grid_needs_is_made_once(tmp_path, scripts):
    made = tmp_path / "made"
    command = f"echo x >> {tmp_path}/count; touch {made}"
    grid = write_grid(
        tmp_path, **{"[[measure]]": f"[prepare]\n'{made}' = '{command}'\n[[measure]]"}
    )
    lab.main([str(grid)])
    lab.main([str(grid)])
    assert (tmp_path / "count").read_text() == "x\n"

    # A command that was killed has left its mark, and runs again.
    (tmp_path / "made.unfinished").touch()
    lab.main([str(grid)])
    assert (tmp_path / "count").read_text() == "x\nx\n"
    assert not (tmp_path / "made.unfinished").exists()


def test_a_command_that_makes_nothing_is_an_error(tmp_path, scripts):
    table = f"[prepare]\n'{tmp_path}/made' = 'exit 3'\n[[measure]]"
    grid = write_grid(tmp_path, **{"[[measure]]": table})
    with pytest.raises(UserError, match=r"made: not made by its command \(exit code 3\)"):
        lab.main([str(grid)])
    assert scripts.started == []


# ----------------------------------------------------------------------- what may be compared


@pytest.mark.parametrize(
    "fact, value, said",
    [
        ("steps", 9, "stage.finetune steps 9, not 8 as in rate right, seed 0, and no axis names"),
        ("rows", 99, "stage.finetune rows 99, not 100 as in"),
        ("data", "other", "what is in stage.finetune rows other, not a as in"),
        ("shown", "other", "the pictures of toy other, not b as in"),
    ],
)
def test_what_differs_and_is_no_axis_is_refused(copied, monkeypatch, fact, value, said):
    changed = Scripts()
    changed.facts[fact] = value
    monkeypatch.setattr(cells, "launch", changed.launch)
    shutil.rmtree(seed_folder(copied, "worse", 1))
    with pytest.raises(UserError, match=f"rate worse: refused: seed 1: {re.escape(said)}"):
        lab.main([str(copied)])
    cells_of_table = table_of(copied)["results"]["cells"]
    assert "error" in cells_of_table[2] and "error" not in cells_of_table[1]


def test_other_questions_are_refused(copied):
    file = seed_folder(copied, "worse", 1) / "eval" / "toy.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(UserError, match="the questions of toy not as in rate right, seed 0"):
        lab.main([str(copied), "--table"])


def test_a_recipe_that_has_changed_is_trained_again_or_refused_by_train_py(copied, scripts):
    """A finished run of another recipe is none of this cell."""
    copied.write_text(copied.read_text().replace("learning_rate=0.2", "learning_rate=0.3"))
    lab.main([str(copied)])
    assert [command[0] for command in scripts.started] == ["train.py"] * 3


def test_another_version_of_the_code_is_a_note(copied, monkeypatch):
    changed = Scripts()
    changed.facts["code"] = "d"
    monkeypatch.setattr(cells, "launch", changed.launch)
    shutil.rmtree(seed_folder(copied, "worse", 1))
    lab.main([str(copied)])
    assert table_of(copied)["results"]["notes"] == ["the runs are of 2 versions of the code"]


def test_an_interrupted_stage_has_no_seconds(copied):
    log = seed_folder(copied, "right", 1) / "log.jsonl"
    log.write_text(log.read_text().replace('"step": 0,', '"step": 5,'))
    other = seed_folder(copied, "right", 2) / "log.jsonl"
    other.write_text(other.read_text().replace("12.5", "13.5"))
    lab.main([str(copied), "--table"])
    row = table_of(copied)["costs"][0]
    assert (row["seconds"], row["interrupted"]) == (13.0, 1)
    assert "1 runs were interrupted" in (copied.parent / "out" / "table.md").read_text()


def test_without_the_baseline_there_is_no_table(copied):
    shutil.rmtree(seed_folder(copied, "right", 1))
    with pytest.raises(UserError, match="rate right: 5 of 6 runs are finished"):
        lab.main([str(copied), "--table"])


def test_a_cell_that_is_not_finished_is_a_line(copied):
    shutil.rmtree(seed_folder(copied, "worse", 1))
    with pytest.raises(UserError, match="rate worse: 2 of 3 runs are finished"):
        lab.main([str(copied), "--table"])
    assert table_of(copied)["results"]["cells"][2]["error"] == "2 of 3 runs are finished"
