"""Run a script that stands beside this file with one version of transformers or another."""

import pytest

from tests.tools.environment import ROOT, run_warm

OLDER = ROOT / ".venv" / "hf4"


def under(version: str, *command):
    """Run hf_llava.py with transformers 5 (of this environment) or 4 (`make test` adds it)."""
    pytest.importorskip(
        "transformers", reason="the oracle is a development dependency: pip install .[dev]"
    )
    if version == "4" and not OLDER.is_dir():
        pytest.skip("transformers 4.57 is not in .venv/hf4; `make test` puts it there")
    run_script("hf_llava.py", version, *command)


def run_script(name: str, version: str, *arguments):
    """Run a script of tests/tools in a fork of warm_python.py, which has not yet transformers."""
    script = str(ROOT / "tests" / "tools" / name)
    lines = ["import runpy, sys", f"runpy.run_path({script!r}, run_name='__main__')"]
    if version == "4":
        lines.insert(1, f"sys.path.insert(0, {str(OLDER)!r})")
    argv = [script, *map(str, arguments)]
    run_warm("\n".join(lines), argv, environments=({"HF_HUB_OFFLINE": "1"},))
