"""What tests share: where the project and its reference data lie, whether there is a GPU, and how to run a script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"

GPU = torch.cuda.is_available()
DEVICES = ["cpu"] + [pytest.param("cuda", marks=pytest.mark.gpu)] * GPU


def shared(path: str) -> Path:
    """A file of the reference data that lies beside the repository where it is developed; skips without it."""
    if not SHARED.is_dir():
        pytest.skip("the reference data folder ../shared is not on this machine")
    return SHARED / path


def run(*command, ok: bool = True, **env) -> subprocess.CompletedProcess:
    """Run `python ...` in the repository root, without the GPU unless told so; a failure shows its output."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **env}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=env
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done
