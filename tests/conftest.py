"""What several test files share: where the reference data lies, and how to run a script as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for these sizes threads only wait for each other; scripts inherit it

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

GPU = torch.cuda.is_available()
DEVICES = ["cpu"] + [pytest.param("cuda", marks=pytest.mark.gpu)] * GPU
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before any test file imports the kernels


@pytest.fixture(autouse=True)
def only_when_asked(request):
    """The long ones run with `make test-full`, that is pytest -m full."""
    if request.node.get_closest_marker("full") and "full" not in request.config.getoption("markexpr"):
        pytest.skip("long: make test-full")


@pytest.fixture(autouse=True)
def hidden_gpu(request, monkeypatch):
    """Only tests that are marked see it: the others compare numbers of the CPU, or have more ranks than it has room."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def shared(path: str) -> Path:
    """A file of the reference data that lies beside the repository where it is developed; skips without it."""
    if not SHARED.is_dir():
        pytest.skip("the reference data folder ../shared is not on this machine")
    return SHARED / path


def run(*command, ok: bool = True, **env) -> subprocess.CompletedProcess:
    """Run `python ...` in the repository root, without the GPU unless told so; a failure shows its output."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **env}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=env)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done
