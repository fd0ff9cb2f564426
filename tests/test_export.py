"""The command: it writes a new folder or says in one line why not, and a kill harms nothing."""

import os
import signal
import sys
from pathlib import Path

import pytest

from checkpoints import files
from checkpoints.files import write_file
from checkpoints.owned import MARK, own
from config import UserError
from export import MOVED, STAGING, UNFINISHED, whole_folder
from tests.tools.environment import ROOT, run, run_warm, shared

MODEL = "golden/qwen2-siglip-linear"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_command(tmp_path):
    out = tmp_path / "out"
    model = shared(MODEL)
    done = run("export.py", "--model", model, "--to", "tinyllava", out)
    assert "model.safetensors" in done.stdout and (out / "config.json").exists()
    assert not [name for name in names(out) if name.startswith(".")]
    again = run("export.py", "--model", model, "--to", "tinyllava", out, ok=False)
    assert again.stderr.strip().splitlines()[-1].startswith(f"error: {out}: exists; fix: ")
    refused = run("export.py", "--model", model, "--to", "hf-llava", tmp_path / "hf", ok=False)
    assert "two-layer MLP" in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "hf").exists()


# --------------------------------------------------------------------------------- one whole folder

FILES = {"model.safetensors": "weights", "config.json": "{}", "a b.txt": "x"}


def write(out: Path):
    """Write a folder as an export does: files, and a folder in it."""
    with whole_folder(out) as folder:
        for name, content in FILES.items():
            write_file(folder / name, content)
        write_file(folder / "part" / "config.json", "{}")


def is_whole(out: Path) -> bool:
    contents = {name: (out / name).read_text() for name in FILES}
    return contents == FILES and names(out) == sorted([*FILES, "part"])


def killed_at(number: int, out: Path) -> bool:
    """Write the folder in a fork that kills itself before its n-th change; say whether it did."""
    pid = os.fork()
    if pid == 0:
        events = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod")
        left = number

        def kill(event, arguments):
            nonlocal left
            if event in events and str(out) in str(arguments[:2]):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        write(out)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def test_a_kill_at_any_instant_leaves_nothing_that_stops_the_same_command(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "flush", lambda path: None)  # no power is cut here
    number = 0
    while True:
        out = tmp_path / str(number)
        if number % 2:
            out.mkdir()
        if not killed_at(number, out):
            break
        # Once more it is killed at the same instant, then it may end.
        is_done = out.exists() and not (out / MARK).exists() and (out / "config.json").exists()
        if not is_done:
            assert not (out / "config.json").exists() or (out / MARK).exists()
            killed_at(number, out)
            if (out / MARK).exists() or not (out / "config.json").exists():
                write(out)
        (out / MOVED).unlink(missing_ok=True)
        assert is_whole(out), number
        number += 1
    assert number > 20


def test_the_command_killed_on_its_way(tmp_path):
    """The real export is killed while it writes; then the same command ends as it always does."""
    command = ["export.py", "--model", str(shared(MODEL)), "--to", "tinyllava"]
    run(*command, tmp_path / "whole")
    for number in (4, 15):
        out = tmp_path / str(number)
        code = (
            "import os, runpy, signal, sys\n"
            f"left = {number}\n"
            "def kill(event, arguments):\n"
            "    global left\n"
            f"    if event in ('open', 'os.rename') and {str(out)!r} in str(arguments[:2]):\n"
            "        left -= 1\n"
            "        if left < 0:\n"
            "            os.kill(os.getpid(), signal.SIGKILL)\n"
            "sys.addaudithook(kill)\n"
            "runpy.run_path('export.py', run_name='__main__')\n"
        )
        run_warm(code, [*command, str(out)], ok=False)
        assert out.exists() and not (out / "config.json").exists()
        run(*command, out)
        assert names(out) == names(tmp_path / "whole")
        for name in names(out):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_files_of_somebody_else_stay(tmp_path):
    """A folder that holds anything is refused, also one in which a killed export has begun."""
    theirs = tmp_path / "out" / "config.json"
    theirs.parent.mkdir()
    theirs.write_text("precious")
    with pytest.raises(UserError, match="out: exists; fix: name a new folder"):
        write(tmp_path / "out")
    assert names(tmp_path / "out") == ["config.json"] and theirs.read_text() == "precious"

    begun = tmp_path / "begun"
    own(begun, UNFINISHED)
    (begun / STAGING).mkdir()
    (begun / "config.json").write_text("precious")
    with pytest.raises(UserError, match="begun: holds files that no export has written"):
        write(begun)
    assert (begun / "config.json").read_text() == "precious"

    run_folder = tmp_path / "run"
    own(run_folder, "run")
    with pytest.raises(UserError, match="holds run, which is not"):
        write(run_folder)


def test_a_mistake_or_a_full_disk_leaves_the_folder_as_it_was(tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new", tmp_path / "empty"):
        for error, message in (
            (OSError(28, "No space left on device"), "cannot be written: No space left"),
            (UserError("x", "cannot be expressed", "y"), "cannot be expressed"),
        ):
            with pytest.raises(UserError, match=message), whole_folder(out) as folder:
                write_file(folder / "config.json", "{}")
                raise error
    assert names(tmp_path) == ["empty"] and not names(tmp_path / "empty")


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, why in (("file", "exists"), ("file/out", "cannot be written"), ("link", "a link")):
        with pytest.raises(UserError, match=f"{name}: {why}"):
            write(tmp_path / name)
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        write(tmp_path / ("x" * 300))
    assert (tmp_path / "file").read_text() == "precious"


def test_an_empty_name_is_refused():
    done = run("export.py", "--model", ROOT, "--to", "tinyllava", "", ok=False)
    assert done.stderr.strip() == "error: OUT: empty; fix: name a new folder"
