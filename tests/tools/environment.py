"""What tests share: where the project and its reference data lie, the GPU, how to run a script."""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"

GPU = torch.cuda.is_available()
DEVICES = ["cpu"] + [pytest.param("cuda", marks=pytest.mark.gpu)] * GPU


def shared(path: str) -> Path:
    """Return a file or folder of the reference data.

    One golden case lies in the repository, in tests/golden. The rest lies in ../shared, beside the
    repository where it is developed. Where that folder is absent, tests that need it are skipped.
    """
    own = ROOT / "tests" / path
    if own.exists() and path != "golden":
        return own
    if not SHARED.is_dir():
        pytest.skip("the reference data folder ../shared is not on this machine")
    return SHARED / path


def run(*command, ok: bool = True, **env) -> subprocess.CompletedProcess:
    """Run `python ...` in the repository root, without the GPU; a failure shows its output.

    A script of the project runs in a fork of warm_python.py, which starts faster. A run with
    variables of its own, or of another module or code, is a new Python.
    """
    command = [str(word) for word in command]
    if command[0].endswith(".py") and not env:
        code = f"import runpy; runpy.run_path({command[0]!r}, run_name='__main__')"
        return run_warm(code, command, ok=ok)
    if command[0] == "-m" and command[1].startswith(("demo.", "tests.")) and not env:
        module = command[1]
        code = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        return run_warm(code, command[1:], ok=ok)

    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **env}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=env
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def run_warm(
    code: str, argv: list[str], ok: bool = True, environments: tuple[dict, ...] = ({},)
) -> subprocess.CompletedProcess:
    """Run code in forks of warm_python.py, one for each environment, in the repository root.

    Return what they said, one after the other, and the first exit code that is not zero.
    """
    server = warm_python()
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for i, variables in enumerate(environments):
            env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
            processes.append({"env": env, "out": f"{folder}/{i}.out", "err": f"{folder}/{i}.err"})
        job = {"code": code, "argv": argv, "processes": processes}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        out = "".join(Path(process["out"]).read_text() for process in processes)
        err = "".join(Path(process["err"]).read_text() for process in processes)

    failed = [code for code in codes if code != 0]
    done = subprocess.CompletedProcess(argv, failed[0] if failed else 0, out, err)
    # A process that a signal ended says nothing itself: its code is the signal, negative.
    assert (done.returncode == 0) == ok, f"exit codes {codes}\n{out}{err}"
    return done


@functools.cache
def warm_python() -> subprocess.Popen:
    """Start the warm Python of this test process. It ends with this process."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.tools.warm_python"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    atexit.register(server.kill)
    return server
