"""A tiny model that tests serve: the folder, the limits, and `python serve.py` as a process.

folder = write(tmp_path / "tiny")
with serving(folder, tmp_path / "log") as target:
    urllib.request.urlopen(f"{target.url}/health")
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from config import Model
from demo import world as demo_world
from inference.job_queue import Limits
from inputs.tokenizer import load_tokenizer
from model import LLaVA
from tests.tools.environment import ROOT

TEXT = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 16,
    "image_size": 48,
}
LIMITS = Limits(body=100_000, pixels=10_000, images=2, tokens=40, context=200, queue=2, wait=1)


@dataclass
class Target:
    """A server that runs."""

    process: subprocess.Popen
    url: str
    log: Path  # what it prints to stderr


def write(folder: Path) -> Path:
    """Write a model named "tiny" with random weights, and return its folder."""
    demo_world.write(folder / "world", scenes=60)
    LLaVA.from_parts(Model(llm_config=TEXT, vision_config=VISION), "plain").save(folder)
    load_tokenizer(folder / "world" / "tokenizer").save(folder)
    return folder


@contextlib.contextmanager
def serving(folder: Path, log: Path) -> Iterator[Target]:
    """Run serve.py with the limits above, until the end of the `with`."""
    command = [sys.executable, "serve.py", "--model", str(folder), "--port", "0"]
    for limit in fields(Limits):
        command += [f"--max-{limit.name}", str(getattr(LIMITS, limit.name))]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    try:
        url = process.stdout.readline().split()[-1].removesuffix("/v1")
        yield Target(process, url, log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
