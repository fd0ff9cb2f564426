"""Runs of train.py for tests: a tiny world, a recipe, and ways to start, watch and read a run.

`recipe`, `whole_run` and `tiny_world` are fixtures, which tests/conftest.py makes known to
every test.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo import world as demo_world
from tests.tools.environment import ROOT, run, run_warm

# A run of a few steps in each stage, with a checkpoint or two.
SHORT = ("stage.pretrain.steps=2", "stage.finetune.steps=4", "train.save_every=2")

# What makes the recipe one of pictures in their own proportions, of nine patches at most.
NATIVE = (
    "model.image_mode=native",
    'model.vision_config={model_type = "siglip2_vision_model", hidden_size = 32, '
    "intermediate_size = 48, num_hidden_layers = 2, num_attention_heads = 2, patch_size = 16, "
    "num_patches = 9, preprocessor = {patch_size = 16, max_num_patches = 9}}",
)

TRAIN = "import runpy; runpy.run_path('train.py', run_name='__main__')"
RECIPE = """
[model]
connector = "linear"
tokenizer = "{world}/tokenizer"
feature_layer = -1
feature_select = "cls_patch"
[model.llm_config]
model_type = "llama"
vocab_size = 512
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
[model.vision_config]
model_type = "siglip_vision_model"
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
patch_size = 16
image_size = 48
[train]
output = "{out}"
precision = "fp32"
workers = 1
log_every = 1
save_every = 4
[stage.pretrain]
data = "{world}/pretrain.json"
images = "{world}/images"
template = "pretrain"
tune = {{ llm = "full", vision = "full" }}
steps = 6
global_batch = 12
[stage.finetune]
data = "{world}/finetune.json"
images = "{world}/images"
validation = "{world}/val.json"
template = "plain"
tune = {{ llm = "partial:1", vision = "frozen" }}
steps = 14
global_batch = 12
weight_decay = 0.1
"""


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    """Return a folder of the demo's data."""
    folder = tmp_path_factory.mktemp("tiny") / "world"
    demo_world.write(folder, scenes=240)

    # Some rows lose their picture, so that micro-batches differ in kind.
    rows = folder / "finetune.json"
    table = json.loads(rows.read_text())
    for row in table[::5]:
        del row["image"]
        row["conversations"][0]["value"] = row["conversations"][0]["value"].replace("<image>\n", "")
    rows.write_text(json.dumps(table))

    # A run validates as often as it trains here, so a few rows of each kind are enough.
    held_out = folder / "val.json"
    held_out.write_text(json.dumps(json.loads(held_out.read_text())[::5]))
    return folder


@pytest.fixture(scope="session")
def whole_run(tiny_world, tmp_path_factory):
    """Return the output folder of the recipe as it is: 20 steps on one rank, never disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    file, out = folder / "whole.toml", folder / "whole"
    file.write_text(RECIPE.format(world=tiny_world, out=out))
    run("train.py", file)
    return out


@pytest.fixture
def recipe(tiny_world, tmp_path):
    """Return a function that writes the recipe for an output folder of a name, and returns both."""

    def write(name: str):
        file, out = tmp_path / f"{name}.toml", tmp_path / name
        file.write_text(RECIPE.format(world=tiny_world, out=out))
        return file, out

    return write


def torchrun(ranks: int, *arguments):
    """Run train.py on several ranks, with a port of this process."""
    port = 29000 + os.getpid() % 2000
    start = ("-m", "torch.distributed.run", "--nproc-per-node", ranks, "--master-port", port)
    return run(*start, "train.py", *arguments)


def distributed(ranks: int, *arguments, ok=True):
    """Run train.py on several ranks; torchrun chooses the port."""
    return run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        ranks,
        "train.py",
        *arguments,
        ok=ok,
    )


def background(*arguments, ranks: int = 1) -> subprocess.Popen:
    """Start train.py and return at once. A test kills it, or sends it a signal."""
    start = []
    if ranks > 1:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *start, "train.py", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_steps(process: subprocess.Popen, out: Path, steps: int):
    """Wait until the log has so many steps of a run that is still going."""
    while process.poll() is None and (
        not (out / "log.jsonl").exists() or len(losses_so_far(out)) < steps
    ):
        time.sleep(0.002)
    assert process.poll() is None, "it ended too early: " + "".join(process.communicate())


def scripted(patch: str, *arguments, ok=False):
    """Run train.py with a few lines of Python before it: what a test breaks."""
    return run_warm(f"{patch}\n{TRAIN}", ["train.py", *map(str, arguments)], ok=ok)


def on_ranks(ranks: int, *arguments, code: str = TRAIN):
    """Run train.py, or other code, on several ranks as torchrun starts them, in warm processes.

    Return what they said, rank after rank.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environments = []
    for rank in range(ranks):
        environments.append({**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    argv = ["train.py", *map(str, arguments)]
    return run_warm(code, argv, environments=tuple(environments))


def one_line(done) -> str:
    """Return the error of a run that said only this one line, as a mistake should end."""
    last = done.stderr.strip().splitlines()
    assert len(last) == 1 and last[0].startswith("error: ") and "; fix: " in last[0], done.stderr
    return last[0]


def losses(out) -> list[float]:
    """Return the loss of each step in the log of a run that has ended."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["event"] == "step"]


def losses_so_far(out) -> list[str]:
    """Return the lines of steps in the log of a run that may be writing one now."""
    return [
        line for line in (out / "log.jsonl").read_text().splitlines() if '"event": "step"' in line
    ]
