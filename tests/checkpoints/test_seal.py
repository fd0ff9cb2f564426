"""A checkpoint on the disk: every kind of damage is found, and the right ones are kept."""

import json
import random
import subprocess
import sys

import pytest

from checkpoints import resume, seal
from tests.tools.environment import ROOT
from tests.tools.run_checkpoints import write_checkpoint


def test_every_flipped_bit_is_found(two):
    old, new = two
    resume.verify(new)
    dice = random.Random(0)
    for i in range(100):
        file = new / (resume.TENSORS, resume.MANIFEST)[i % 2]
        whole = file.read_bytes()
        at, bit = dice.randrange(len(whole)), 1 << dice.randrange(8)
        file.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        with pytest.raises((ValueError, OSError)):
            resume.verify(new)
        file.write_bytes(whole)
    resume.verify(new)


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step, loss in enumerate((0.9, 0.3, 0.5, None, 0.7)):
        write_checkpoint(tmp_path, f"01-{step:08d}", step, trained="b", validation=loss)
    # One of another stage.
    write_checkpoint(tmp_path, "00-00000009", 9, trained="a", validation=0.1)
    seal.prune(tmp_path, 2, "b")
    assert [p.name for p in resume.listed(tmp_path)] == [
        "01-00000001",
        "01-00000003",
        "01-00000004",
    ]
    seal.prune(tmp_path, 1)
    assert [p.name for p in resume.listed(tmp_path)] == ["01-00000004"]


def test_sealing_needs_neither_packages_nor_the_project(tmp_path):
    """So it starts at once, and an edited file of the project cannot stop a run from saving."""
    temporary = tmp_path / ".00-00000004.tmp"
    temporary.mkdir()
    (temporary / resume.TENSORS).write_bytes(b"tensors")
    script = [sys.executable, "-I", "-S", ROOT / "checkpoints" / "seal.py"]
    state = {"stage": 0, "step": 4}
    arguments = [temporary, "00-00000004", "1", "", json.dumps(state)]
    done = subprocess.run([*script, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert resume.verify(tmp_path / "00-00000004") == state


def test_a_damaged_checkpoint_is_never_the_best_and_stops_no_pruning(tmp_path):
    for step, loss in enumerate((0.1, 0.3, 0.5)):
        write_checkpoint(tmp_path, f"01-{step:08d}", step, trained="b", validation=loss)
    (tmp_path / "01-00000000" / resume.MANIFEST).write_bytes(b"\xff")
    assert seal.best(tmp_path, "b").name == "01-00000001"
    seal.prune(tmp_path, 1, "b")
    assert [p.name for p in resume.listed(tmp_path)] == ["01-00000001", "01-00000002"]


def test_an_old_checkpoint_that_cannot_be_removed_is_said_and_the_new_one_is_whole(
    two, monkeypatch, capsys
):
    old, new = two

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    temporary = new.parent / ".00-00000012.tmp"
    temporary.mkdir()
    (temporary / resume.TENSORS).write_bytes(b"tensors")
    monkeypatch.setattr(seal, "prune", refuse)
    seal.main(str(temporary), "00-00000012", "1", "", '{"stage": 0, "step": 12}')
    assert "an old checkpoint cannot be removed" in capsys.readouterr().err
    assert resume.pick(new.parent).name == "00-00000012"


def test_names_of_others_are_no_checkpoints(two):
    old, new = two
    for name in ("00-00000008.copy", "mine", "1-2"):
        (new.parent / name).mkdir()
    (new.parent / "00-00000099").write_text("a file")
    assert resume.listed(new.parent) == [old, new]
    seal.prune(new.parent, 1)
    assert len(list(new.parent.iterdir())) == 5
