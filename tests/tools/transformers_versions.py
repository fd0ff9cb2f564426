"""Run hf_llava.py, which stands beside this file, with one version of transformers or another."""

import os
import subprocess
import sys

import pytest

from tests.tools.environment import ROOT


def under(version: str, *command):
    """Run hf_llava.py with transformers 5 (of this environment) or 4 (`make test` adds it)."""
    pytest.importorskip(
        "transformers", reason="the oracle is a development dependency: pip install .[dev]"
    )
    older = ROOT / ".venv" / "hf4"
    if version == "4" and not older.is_dir():
        pytest.skip("transformers 4.57 is not in .venv/hf4; `make test` puts it there")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(older) if version == "4" else ""}
    script = ROOT / "tests" / "tools" / "hf_llava.py"
    done = subprocess.run(
        [sys.executable, script, *map(str, command)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
