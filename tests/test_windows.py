"""What Windows lacks is taken away: all imports, a run trains, locks hold, files are flushed."""

import fcntl
import json
import os
import subprocess
import sys

import pytest

from checkpoints import resume, seal
from checkpoints.files import write_file
from config import UserError
from tests.tools import windows
from tests.tools.environment import ROOT, run

WITHOUT = "import sys; from tests.tools.windows import take_away; take_away()\n"
IMPORT_AND_TRAIN = """
import importlib, runpy

for name in sys.argv.pop().split():
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as e:
        # An extra that is not installed is no matter of the system.
        assert e.name.partition(".")[0] in ("lmms_eval", "uvicorn"), name
runpy.run_path("train.py", run_name="__main__")
"""


def modules() -> str:
    """Return the names of all modules of the project."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] not in ("tests", "bench", "out", "build", ".venv") and parts[-1] != "__init__":
            found.append(".".join(parts))
    return " ".join(found)


def test_every_module_imports_and_a_run_trains(recipe):
    file, out = recipe("windows")
    short = ("stage.pretrain.steps=1", "stage.finetune.steps=1", "train.workers=0")
    said = run("-c", WITHOUT + IMPORT_AND_TRAIN, file, *short, modules()).stdout
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["event"] == "step"]
    assert len(steps) == 2 and "memory_gb" not in steps[0]
    assert (out / "model.safetensors").exists() and "warning" not in said


HOLDER = """
from checkpoints import seal

file = open(sys.argv[1] + "/.lock", "a+")
seal.lock(file, wait=False)
print("process 7", file=file, flush=True)
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_second_run_is_refused_and_the_first_one_may_be_killed(tmp_path, monkeypatch):
    command = [sys.executable, "-c", WITHOUT + HOLDER, tmp_path]
    first = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"locked\n"
    monkeypatch.setattr(seal, "fcntl", None)
    monkeypatch.setattr(seal, "msvcrt", windows)
    with pytest.raises(UserError, match=r"another run is training here \(process 7\)"):
        resume.lock(tmp_path)

    # Who waits gets the lock when the first one has ended.
    file = open(tmp_path / ".lock", "a+")
    monkeypatch.setattr(seal.time, "sleep", lambda seconds: [first.kill(), first.wait()])
    seal.lock(file, wait=True)
    file.close()
    with resume.lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()}"


def test_files_are_flushed_as_windows_can(tmp_path, monkeypatch):
    opened = os.open

    def open_file(path, flags, *rest, **how):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *rest, **how)

    def sync(fd):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError):
        write_file(tmp_path / "file", "text")
    monkeypatch.setattr(seal, "WINDOWS", True)
    write_file(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


PRINT_AND_BREAK = """
import command_line


def main(argv):
    if argv[0] == "standard output":
        print("a", flush=True)
    raise BrokenPipeError("another one")


command_line.cli(main, "")
"""


@pytest.mark.parametrize("pipe, code", [("standard output", 141), ("another one", 1)])
def test_a_pipe_that_breaks(pipe, code):
    read, write = os.pipe()
    if code == 141:
        os.close(read)
    command = [sys.executable, "-c", WITHOUT + PRINT_AND_BREAK, pipe]
    env = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, env=env)
    os.close(write)
    assert done.returncode == code
    assert (b"BrokenPipeError" in done.stderr) == (code == 1)
