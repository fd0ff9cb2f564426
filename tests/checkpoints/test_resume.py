"""Which checkpoint a run goes on from, what a failed write leaves, who may write in a folder."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from checkpoints import resume, seal
from config import UserError
from tests.tools.environment import ROOT


def test_what_is_read_is_what_was_written(two):
    old, new = two
    assert resume.pick(new.parent) == new
    tensors, state = resume.read(new)
    assert state == {"stage": 0, "step": 8}
    g = torch.Generator().manual_seed(8)
    assert torch.equal(tensors["weight.a"], torch.randn(7, 5, generator=g))


@pytest.mark.parametrize("name", [resume.TENSORS, resume.MANIFEST])
def test_a_file_cut_anywhere_is_found_and_the_one_before_is_used(two, name, capsys):
    old, new = two
    whole = (new / name).read_bytes()
    for i in range(20):
        (new / name).write_bytes(whole[: i * len(whole) // 20])
        with pytest.raises((ValueError, OSError)):
            resume.verify(new)
    assert resume.pick(new.parent) == old
    assert f"passing over {new}: {name}" in capsys.readouterr().out
    assert resume.listed(new.parent) == [old]


@pytest.mark.parametrize("gone", [resume.TENSORS, resume.MANIFEST])
def test_a_missing_file_is_found(two, gone):
    old, new = two
    (new / gone).unlink()
    assert resume.pick(new.parent) == old


def test_an_explicit_checkpoint_is_used_or_nothing_is(two, capsys):
    old, new = two
    whole = (new / resume.TENSORS).read_bytes()
    (new / resume.TENSORS).write_bytes(b"")
    with pytest.raises(
        UserError, match="train.resume=.*has 0 bytes, not .*; fix: name a whole checkpoint"
    ):
        resume.pick(new.parent, str(new))
    assert resume.listed(new.parent) == [old, new]  # nothing was set aside
    with pytest.raises(UserError, match="damaged|No such file"):
        resume.pick(new.parent, str(new.parent / "nowhere"))
    (new / resume.TENSORS).write_bytes(whole)
    assert resume.pick(new.parent, str(old)) == old
    assert "names another one" in capsys.readouterr().out
    assert resume.pick(new.parent) == old  # the newer one is not gone on from by the next start


def test_a_write_or_a_seal_that_fails_leaves_the_old_ones_and_surfaces(two, monkeypatch):
    old, new = two
    given = new.parent, 2, {"weight.a": torch.zeros(3)}, {"stage": 0, "step": 12}
    with monkeypatch.context() as m:
        full = OSError(28, "No space left on device")
        m.setattr(resume, "save_file", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(UserError, match="No space left on device; fix: "):
            resume.save(*given)
    (new.parent / "00-00000012").write_text("a file where a folder should be")
    resume.save(*given)
    with pytest.raises(UserError, match="cannot be written: .*; fix: "):
        resume.save(*given)  # the one before could not be made whole
    (new.parent / "00-00000012").unlink()
    assert sorted(p.name for p in new.parent.iterdir()) == [".sealing", old.name, new.name]
    resume.save(*given)
    resume.wait()
    assert [p.name for p in resume.listed(new.parent)] == [new.name, "00-00000012"]


SLOW_SEAL = """
import sys, time
from pathlib import Path
from checkpoints import seal

folder, temporary, name = map(Path, sys.argv[1:])
held = seal.alone(folder)
print("sealing", flush=True)
time.sleep(1)
temporary.rename(name)
"""


def test_the_next_start_waits_for_the_seal_of_a_killed_run(two):
    old, new = two
    aside = new.rename(new.parent / ".late")
    command = [sys.executable, "-c", SLOW_SEAL, new.parent, aside, new]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    assert resume.pick(new.parent) == new
    process.communicate()


LATE_SEAL = """
import os, sys, time
time.sleep(0.5)
os.execv(sys.executable, [sys.executable, SEAL, *sys.argv[1:]])
"""


def test_the_next_start_waits_for_a_seal_that_was_slow_to_begin(two, tmp_path, monkeypatch):
    old, new = two
    script = tmp_path / "late.py"
    script.write_text(LATE_SEAL.replace("SEAL", repr(seal.__file__)))
    monkeypatch.setattr(seal, "__file__", str(script))

    # The run is killed as soon as `save` has come back, and the next start comes at once.
    child = os.fork()
    if not child:
        try:
            resume.save(new.parent, 2, {"weight.a": torch.zeros(3)}, {"stage": 0, "step": 12})
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert resume.pick(new.parent).name == "00-00000012"


def test_a_full_disk_is_found_before_anything_is_written(two, monkeypatch):
    old, new = two
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(
        UserError, match=r"0.000 GB free, a checkpoint takes 0.000 GB; fix: make room"
    ):
        resume.save(new.parent, 2, {"weight.a": torch.zeros(3)}, {"stage": 0, "step": 12})
    assert resume.listed(new.parent) == [old, new]


HOLDER = """
import sys
from pathlib import Path
from checkpoints import resume

held = resume.lock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_while_the_first_holds_the_folder(tmp_path):
    command = [sys.executable, "-c", HOLDER, tmp_path]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(UserError, match=rf"another run is training here \(process {process.pid}\)"):
        resume.lock(tmp_path)
    process.kill()
    process.wait()
    resume.lock(tmp_path).close()


def test_a_refusal_comes_before_anything_is_set_aside(two):
    """Whether the newest one is damaged, or another one is named."""
    old, new = two

    def refuse(path):
        assert path == old
        raise UserError("run", "other rows", "put them back")

    for explicit in ("", str(old)):
        if not explicit:
            (new / resume.MANIFEST).write_bytes(b"cut")
        with pytest.raises(UserError, match="other rows"):
            resume.pick(new.parent, explicit, refuse)
        assert resume.listed(new.parent) == [old, new]


def test_what_a_run_is_made_from_is_part_of_its_checkpoint(tmp_path):
    origin = {"recipe": "text", "contents": {"rows": {"a": "1 bytes 00"}}}
    state = {"stage": 0, "step": 1}
    resume.save(tmp_path / "checkpoints", 2, {"weight.a": torch.zeros(3)}, state, origin=origin)
    path = resume.pick(tmp_path / "checkpoints")
    assert resume.made_from(path) == origin
    (path / resume.MADE_FROM).write_text('{"recipe": "another"}')
    with pytest.raises(ValueError, match="made_from.json has"):
        resume.verify(path)


def test_a_run_whose_folder_is_gone_does_not_make_it_again(tmp_path):
    state = {"stage": 0, "step": 1}
    with pytest.raises(UserError, match="No such file or directory; fix: "):
        resume.save(tmp_path / "gone/checkpoints", 2, {"weight.a": torch.zeros(3)}, state)
    assert not (tmp_path / "gone").exists()


def test_only_our_own_names_are_removed_at_the_end(two):
    old, new = two
    folder = new.parent
    new.rename(folder / f".{new.name}.aside")
    (folder / f".{old.name}.77.tmp").mkdir()
    for name in ("mine", ".mine.tmp", f"{old.name}.copy", ".x.aside"):
        (folder / name).mkdir()
    resume.discard(folder)
    left = sorted(path.name for path in folder.iterdir() if path.name != ".sealing")
    assert left == [".mine.tmp", ".x.aside", f"{old.name}.copy", "mine"]
    for name in left:
        (folder / name).rmdir()
    resume.discard(folder)
    assert not folder.exists()
