"""A checkpoint on the disk: every kind of damage is found, and the right ones are kept."""

import hashlib
import json
import os
import random
import subprocess
import sys

import pytest

from checkpoints import resume, seal
from config import UserError
from tests.tools.environment import ROOT
from tests.tools.run_checkpoints import write_checkpoint

STATE = {"stage": 0, "step": 4}


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


def seal_in_a_process(folder, *options: str, **streams) -> subprocess.CompletedProcess:
    """Seal a checkpoint of stage 0 after four steps, as `resume.save` does."""
    temporary = folder / ".00-00000004.tmp"
    temporary.mkdir()
    (temporary / resume.TENSORS).write_bytes(b"tensors")
    script = [sys.executable, *options, ROOT / "checkpoints" / "seal.py"]
    arguments = [temporary, "00-00000004", "1", "", json.dumps(STATE)]
    return subprocess.run([*script, *arguments], cwd=folder, text=True, **streams)


def test_sealing_needs_neither_packages_nor_the_project(tmp_path):
    """So it starts at once, and an edited file of the project cannot stop a run from saving."""
    done = seal_in_a_process(tmp_path, "-I", "-S", capture_output=True)
    assert done.returncode == 0 and done.stderr == ""
    assert resume.verify(tmp_path / "00-00000004") == STATE


def test_a_seal_ends_though_the_run_is_killed_before_it_begins(tmp_path):
    read, write = os.pipe()
    os.close(read)  # as the kill does
    seal_in_a_process(tmp_path, stdout=write, stderr=subprocess.DEVNULL)
    os.close(write)
    assert resume.verify(tmp_path / "00-00000004") == STATE


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


# What a manifest with a right hash of its own may hold, and no checkpoint has.
EMPTY_FILE = [0, hashlib.sha256(b"").hexdigest()]
PLACE = {"stage": 0, "step": 8}
STATES = {
    "null": None,
    "list": [0, 8],
    "no stage": {"step": 8},
    "step a text": PLACE | {"step": "8"},
    "step negative": PLACE | {"step": -8},
    "step true": PLACE | {"step": True},
    "loss a text": PLACE | {"trained": "b", "validation": "low"},
    "loss NaN": PLACE | {"trained": "b", "validation": float("nan")},
}
FILES = {
    "null": None,
    "list": [resume.TENSORS],
    "no tensors": {},
    "a number": {resume.TENSORS: 7},
    "size a text": {resume.TENSORS: ["1", "00"]},
    "no hash": {resume.TENSORS: [1]},
    "hash a number": {resume.TENSORS: [1, 0]},
}
NAMES = ["/dev/null", "../empty", "a/../empty", "..", "", "a\0b", "\ud800"]


def expect_aside(two, content, capsys):
    """Give the newer checkpoint this manifest; assert that it is passed over, and said."""
    old, new = two
    (new / seal.MANIFEST).write_text(seal.text(content))
    assert seal.best(new.parent, "b") is None
    assert resume.pick(new.parent) == old
    assert f"passing over {new}: " in capsys.readouterr().out
    assert resume.listed(new.parent) == [old]


def content_of(checkpoint):
    """Return the content of a manifest, without its own hash."""
    content = seal.manifest(checkpoint)
    del content["sha256"]
    return content


@pytest.mark.parametrize("kind", STATES)
def test_a_manifest_whose_state_is_none_is_set_aside(two, kind, capsys):
    expect_aside(two, content_of(two[1]) | {"state": STATES[kind]}, capsys)


@pytest.mark.parametrize("kind", FILES)
def test_a_manifest_without_a_table_of_files_is_set_aside(two, kind, capsys):
    expect_aside(two, content_of(two[1]) | {"files": FILES[kind]}, capsys)


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_that_names_no_file_of_its_folder_is_set_aside(two, name, capsys):
    (two[1].parent / "empty").touch()
    content = content_of(two[1])
    content["files"][name] = EMPTY_FILE
    expect_aside(two, content, capsys)


def test_a_manifest_of_nothing_or_a_list_is_set_aside(two, capsys):
    expect_aside(two, {}, capsys)
    (two[0] / seal.MANIFEST).write_text("[]")
    assert resume.pick(two[0].parent) is None


@pytest.mark.parametrize("levels", [500, 100_000])
def test_a_manifest_that_is_nested_deeply_is_set_aside(two, levels, capsys):
    """Of the two, json reads the first one and cannot write it, and cannot read the second."""
    old, new = two
    deep = "[" * levels + "]" * levels
    (new / seal.MANIFEST).write_text(f'{{"state": {deep}}}')
    assert seal.best(new.parent, "b") is None
    assert resume.pick(new.parent) == old
    assert f"passing over {new}: manifest.json is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "link to itself"])
@pytest.mark.parametrize("name", [seal.TENSORS, seal.MANIFEST])
def test_what_is_no_regular_file_is_set_aside(two, name, kind, capsys):
    """A FIFO would be waited for, for ever; /dev/zero has no end."""
    old, new = two
    file = new / name
    size = file.stat().st_size
    file.unlink()
    if kind == "FIFO":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to(name)

    # The size of all these can be right, too.
    if name == seal.TENSORS:
        content = content_of(new)
        if kind != "link to itself":
            size = file.stat().st_size
        content["files"][name][0] = size
        (new / seal.MANIFEST).write_text(seal.text(content))
    assert seal.best(new.parent, "b") is None
    assert resume.pick(new.parent) == old
    assert f"passing over {new}: " in capsys.readouterr().out


def test_a_fifo_in_the_place_of_a_lock_is_said(two):
    old, new = two
    (new.parent / ".sealing").unlink(missing_ok=True)
    os.mkfifo(new.parent / ".sealing")
    with pytest.raises(UserError, match="cannot be written: .*; fix: "):
        resume.pick(new.parent)
    os.mkfifo(new.parent / ".lock")
    with pytest.raises(UserError, match=".lock: no regular file; fix: "):
        resume.lock(new.parent)


def test_a_file_without_tensors_is_said(two):
    """Its size and its hash are right."""
    temporary = two[0].parent / ".00-00000012.tmp"
    temporary.mkdir()
    (temporary / seal.TENSORS).write_bytes(b"tensors")
    seal.seal(temporary, "00-00000012", {"stage": 0, "step": 12})
    chosen = resume.pick(temporary.parent)
    with pytest.raises(UserError, match="not the tensors of a run .*; fix: remove this"):
        resume.read(chosen)
