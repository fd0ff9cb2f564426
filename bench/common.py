"""What the benchmarks share: where results lie, processes of their own, and words for numbers.

It imports no torch. A benchmark that measures memory starts from a small process, because the peak
of a child begins at its parent's.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import subprocess
import sys
from pathlib import Path

from config import UserError

RESULTS = Path(__file__).resolve().parent / "results"  # a folder per machine
OURS = "barellava"
PEER = "transformers"
LLAMA_CPP = "llama.cpp"


def run_child(script: str, *arguments: object) -> dict:
    """Run `script --child arguments` in a process of its own; return the JSON of its last line."""
    command = [sys.executable, script, "--child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if f"No module named '{PEER}'" in done.stderr:
        raise missing_peer(script)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {done.returncode}\n{done.stderr}")
    if not done.stdout:
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def missing_peer(script: str) -> UserError:
    """Return the error that says how to install transformers."""
    where = f"bench/{Path(script).name}"
    return UserError(where, f"the peer {PEER} is missing", 'pip install ".[dev]"')


def installed(*packages: str) -> dict[str, str | None]:
    """Return the versions of Python and of packages; None for what is not installed."""
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def name_versions(versions: dict[str, str | None]) -> list[str]:
    """Return ["python 3.11", ...] of what is installed."""
    return [f"{package} {version}" for package, version in versions.items() if version]


def median_and_range(values: list[float], form: str) -> str:
    """Return "2.0 (1.0 to 4.0)"."""
    middle = statistics.median(values)
    return f"{middle:{form}} ({min(values):{form}} to {max(values):{form}})"


def met(good: bool) -> str:
    """Return the word for a target that is met, or is not."""
    return "met" if good else "MISSED"


def verdict(what: str, value: float, good: bool) -> str:
    """Return the line about a target."""
    return f"target {what}: {met(good)} ({value:.3g})"


def write_json(file: Path, value: dict):
    """Write a result; the folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=1) + "\n")
