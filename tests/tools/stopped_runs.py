"""A run of the tiny recipe that was killed between two checkpoints, for tests of what comes next.

`killed_once` and `stopped` are fixtures, which tests/training/conftest.py makes known there.
"""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from checkpoints import seal
from tests.tools.forked_runs import launch, said
from tests.tools.training_runs import RECIPE

# Two steps and four, with a checkpoint after every second. The kill comes in step 4 of the second
# stage: the newest checkpoint is that of its step 2.
STEPS = ("stage.pretrain.steps=2", "stage.finetune.steps=4", "train.save_every=2")
KILLED_AT = 6


class StoppedRun:
    """A recipe on data of its own, and the folder of a run of it that was killed."""

    def __init__(self, folder: Path):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.world = folder / "world"
        self.out = folder / "out"
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text(RECIPE.format(world=self.world, out=self.out))

    def start(self, *overrides: str, before=None) -> tuple[int, str]:
        """Start the run again; return its exit code and what it said."""
        codes = launch(str(self.recipe), self.out, 1, (*STEPS, *overrides), before)
        return codes[0], said(self.out)

    def weights(self) -> bytes:
        """Return the finished model."""
        return (self.out / "model.safetensors").read_bytes()

    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoints."""
        with seal.alone(self.out / "checkpoints"):
            return [path.name for path in seal.listed(self.out / "checkpoints")]


def die_in_step(call: int):
    """Make this process die when the optimizer is about to make the call-th step."""
    real = torch.optim.AdamW.step
    calls = 0

    def step(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    torch.optim.AdamW.step = step


@pytest.fixture(scope="session")
def killed_once(tiny_world, tmp_path_factory):
    """Return a folder with a run that was killed, in "now" and, for copies, in "before"."""
    folder = tmp_path_factory.mktemp("stopped")
    run = StoppedRun(folder / "now")

    # Rows of its own, for tests that change them. Nobody writes into a picture.
    run.world.mkdir()
    for path in tiny_world.iterdir():
        if path.suffix == ".json":
            shutil.copyfile(path, run.world / path.name)
        else:
            (run.world / path.name).symlink_to(path)

    code, text = run.start()
    assert code == 0, text
    (folder / "want").write_bytes(run.weights())
    shutil.rmtree(run.out)

    code, text = run.start(before=lambda rank: die_in_step(KILLED_AT))
    assert code == -signal.SIGKILL, text
    assert run.checkpoints() == ["01-00000000", "01-00000002"]
    shutil.copytree(run.folder, folder / "before", symlinks=True)
    return folder


@pytest.fixture
def stopped(killed_once):
    """Return the run that was killed, as it was then. `want` are the weights it should end with."""
    shutil.rmtree(killed_once / "now")
    shutil.copytree(killed_once / "before", killed_once / "now", symlinks=True)
    run = StoppedRun(killed_once / "now")
    run.want = (killed_once / "want").read_bytes()
    return run
