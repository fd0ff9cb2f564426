"""Kill a training run five times in each of its phases; the next start must end with the same bits.

python -m tests.tools.kill_matrix RECIPE FOLDER

`make test-full` runs it. Each phase is a function that is about to be called when the process dies.
"""

import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import train
from checkpoints import resume
from tests.tools.forked_runs import launch, losses, said
from training import output, state

SHORT = ("train.save_every=2", "stage.finetune.validation_every=5")
STEPS_BEFORE = (0, 6, 20)  # steps of the stages that are done: none, the first, both


@dataclass(frozen=True)
class Phase:
    """A function that a run calls so many times. Without an owner, the sealing process calls it."""

    owner: object | None
    name: str
    calls: int


PHASES = {
    "start": Phase(output, "claim", 1),
    "load": Phase(state, "build", 3),
    "first batch": Phase(data.Steps, "__getitem__", 1),
    "forward": Phase(train.LLaVA, "loss", 22),
    "backward": Phase(torch.Tensor, "backward", 22),
    "optimizer": Phase(torch.optim.AdamW, "step", 22),
    "validation": Phase(train, "validate", 3),
    "writing tensors": Phase(resume, "save_file", 9),
    "export": Phase(train.LLaVA, "save", 1),
    "before the manifest": Phase(None, "text", 9),
    "before the rename": Phase(None, "os.rename", 9),
    "pruning": Phase(None, "prune", 9),
    "sealing alone": Phase(None, "digest", 9),
}

# In place of checkpoints/seal.py: the training is killed, and with it this process. In the last
# phase this process goes on alone.
SEAL = """
import os, signal, sys
sys.path.insert(0, os.getcwd())
from checkpoints import seal

def die(*args, real=seal.NAME, **kwargs):
    with open("COUNT", "a") as f:
        f.write(".")
        f.flush()
        if f.tell() == WHICH:
            os.kill(os.getppid(), signal.SIGKILL)
            if "NAME" != "digest":
                os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

seal.NAME = die
seal.main(*sys.argv[1:])
"""


def die_in_training(phase: Phase, call: int):
    """Make this process die when it is about to call the function for the call-th time."""
    real = getattr(phase.owner, phase.name)
    called = 0

    def counted(*args, **kwargs):
        nonlocal called
        called += 1
        if called == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(phase.owner, phase.name, counted)


def die_in_sealing(phase: Phase, call: int, out: Path):
    """Make the process that seals a checkpoint kill this one in front of that call."""
    script = SEAL.replace("NAME", phase.name)
    script = script.replace("COUNT", f"{out}.count").replace("WHICH", str(call))
    file = Path(f"{out}.py")
    file.write_text(script)
    resume.seal.__file__ = str(file)


def steps_resumed(out: Path) -> int:
    """Return the number of steps that the last start found done."""
    found = re.search(r"resumed: (\d+) of \d+ stages done, (\d+) steps", said(out))
    if found is None:
        return 0
    stages, steps = map(int, found.groups())
    return STEPS_BEFORE[stages] + steps


def main(recipe: str, folder: str):
    assert launch(recipe, Path(folder) / "whole", 1, SHORT) == [0]
    want = (Path(folder) / "whole/model.safetensors").read_bytes()

    for title, phase in PHASES.items():
        lost = []
        for i in range(5):
            out = Path(folder) / f"{title} {i}"
            call = 1 + i * phase.calls // 5

            def before(rank, phase=phase, call=call, out=out):
                if phase.owner is None:
                    die_in_sealing(phase, call, out)
                else:
                    die_in_training(phase, call)

            assert launch(recipe, out, 1, SHORT, before) == [-signal.SIGKILL], title
            done = len(losses(out)) if (out / "log.jsonl").exists() else 0

            # Two saves may be lost: one of them may have been in flight.
            assert launch(recipe, out, 1, SHORT) == [0], said(out)
            lost.append(done - steps_resumed(out))
            assert 0 <= lost[-1] <= 4, (title, done, lost)
            assert len(losses(out)) == 20
            assert (out / "model.safetensors").read_bytes() == want, title
        print(f"{title:<20} 5 kills, steps lost {lost}, then the same bits", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
