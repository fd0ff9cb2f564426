"""What tests share: where the project and its reference data lie, the GPU, how to run a script."""

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
    """Run `python ...` in the repository root, without the GPU; a failure shows its output."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **env}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=env
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done
